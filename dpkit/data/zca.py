"""ZCA whitening, as the recipes of some distilled sets want it."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit.data.split import Split

_ROWS = 1024  # images at once: 25 MB of float64 for CIFAR-10


@dataclass(frozen=True, eq=False)
class Whitening:
    """A fitted whitening of images with D = C * H * W values.

    mean: (D,). transform, inverse: (D, D), symmetric. All float64. eps: what was added to the eigenvalues.
    An image is flattened to a row in the order C, H, W.
    """

    mean: Tensor
    transform: Tensor
    inverse: Tensor
    eps: float

    def apply(self, images: Tensor) -> Tensor:
        """``(x - mean) transform`` for each image (N, C, H, W), as float32 of the same shape; uint8 images are divided by 255."""
        return self._each(images, -self.mean, self.transform, 0.0)

    def invert(self, images: Tensor) -> Tensor:
        """``y inverse + mean`` for each whitened image (N, C, H, W), as float32; undoes :meth:`apply`."""
        return self._each(images, 0.0, self.inverse, self.mean)

    def _each(self, images: Tensor, before: Tensor | float, matrix: Tensor, after: Tensor | float) -> Tensor:
        if images.dim() != 4 or images[0:1].numel() not in (0, len(self.mean)):
            raise ValueError(f"images must be (N, C, H, W) with {len(self.mean)} values each, as those that the whitening was "
                             f"fitted on; got {tuple(images.shape)}")
        before, matrix, after = (v.to(images.device) if isinstance(v, Tensor) else v for v in (before, matrix, after))
        found = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        for at, rows in _chunks(images):
            found[at] = ((rows + before) @ matrix + after).view(found[at].shape).float()
        return found


def fit(images: Tensor, eps: float = 0.1) -> Whitening:
    """The ZCA whitening of images (N, C, H, W): uint8, which are divided by 255, or floating point, taken as they are.

    With the eigenvectors U and eigenvalues S of the covariance of the flattened images (divided by N - 1),
    ``transform = U (S + eps)^(-1/2) U^T`` and ``inverse = U (S + eps)^(1/2) U^T``. The formula and the divisor are those of
    kornia's ``ZCAWhitening`` (kornia 0.6.3), which trajectory matching (Cazenavette et al. 2022, arXiv 2203.11932) uses with
    eps 0.1 on the *pixels in [0, 1]* of the training images, with no normalisation of the channels before it. Computed in
    float64, by chunks of images: the memory is that of a few (D, D) matrices. Raises ``ValueError`` on fewer than two
    images, pixels that are not finite, or an eps that is not positive.
    """
    if images.dim() != 4 or len(images) < 2 or images[0].numel() == 0:
        raise ValueError(f"whitening needs at least two images (N, C, H, W), got {tuple(images.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    total = torch.zeros(images[0].numel(), dtype=torch.float64, device=images.device)
    for _, rows in _chunks(images):
        total += rows.sum(0)
    if not bool(torch.isfinite(total).all()):
        raise ValueError("whitening needs finite pixels, got NaN or infinity; remove those images")
    mean = total / len(images)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=images.device)
    for _, rows in _chunks(images):  # a second pass: the differences from the mean lose no digits
        rows = rows - mean
        covariance.addmm_(rows.T, rows)
    values, vectors = torch.linalg.eigh(covariance / (len(images) - 1))
    root = (values.clamp_min(0) + eps).sqrt()  # rounding may leave eigenvalues a little below zero
    return Whitening(mean, (vectors / root) @ vectors.T, (vectors * root) @ vectors.T, float(eps))


def whiten(split: Split, whitening: Whitening) -> Split:
    """The split with whitened images, float32, and the same labels.

    A network that was trained on whitened images is to be tested on these, whitened by the transform that was fitted on the
    real training images; both are then used without another normalisation (mean 0, deviation 1).
    """
    return Split(whitening.apply(split.images), split.labels)


def _chunks(images: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the images as float64 rows (n, D), with their places."""
    for first in range(0, len(images), _ROWS):
        at = slice(first, first + _ROWS)
        rows = images[at].flatten(1).double()
        yield at, rows / 255 if images.dtype == torch.uint8 else rows
