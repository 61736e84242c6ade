"""How far two networks are apart: in their weights, and in what they say about images."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from dpkit import models
from dpkit.barriers import NotFinite
from dpkit.connectivity.checks import check_networks
from dpkit.models import ModelSpec
from dpkit.tree import Buffers, Mask, Params


@dataclasses.dataclass(frozen=True)
class Distances:
    """Two networks' weights compared, by tensor; index L of the arrays means all L tensors together, as one vector.

    tensors: names (L,). sizes: (L + 1,) int64, entries that were compared. l2: (L + 1,) float64, Euclidean distance |a - b|.
    cosine: (L + 1,) float64, a'b / (|a| |b|) in [-1, 1]: 1 for the same direction; NaN where one of them is all zero.
    """

    tensors: tuple[str, ...]
    sizes: Tensor
    l2: Tensor
    cosine: Tensor


def distances(a: Params, b: Params, *, mask: Mask | None = None, names: Iterable[str] | None = None,
              origin: Params | None = None) -> Distances:
    """Euclidean distance and cosine similarity of two networks' weights, in float64.

    mask: compares the surviving weights of its tensors only.  names: which tensors; by default those of the mask, or all.
    origin: where the vectors begin, such as the common start of two children: the cosine then is that of a - origin and
        b - origin, of the ways that training took. The distance does not change.
    Raises ``ValueError`` with one line when the networks (or the origin) differ in names or shapes or have NaN, and when a name
    or the mask does not fit.
    """
    networks = {"a": a, "b": b} | ({} if origin is None else {"origin": origin})
    models.check_same(networks)
    chosen = tuple(names if names is not None else mask if mask is not None else a)
    unknown = [name for name in [*chosen, *(mask or ())] if name not in a]
    if unknown or not chosen:
        raise ValueError(f"names must be tensors of the networks, got {unknown[0]!r} which a and b lack" if unknown else
                         "distances need at least 1 tensor, got none; leave names out for all")
    sums = torch.zeros(len(chosen) + 1, 4, dtype=torch.float64)
    sizes = torch.zeros(len(chosen) + 1, dtype=torch.int64)
    for i, name in enumerate(chosen):
        x, y = a[name].double(), b[name].double()
        if origin is not None:
            x, y = x - origin[name].double(), y - origin[name].double()
        if mask is not None and name in mask:
            if mask[name].dtype != torch.bool:
                raise ValueError(f"mask of {name} must be boolean (True keeps a weight of a and b), got {mask[name].dtype}; "
                                 f"compare it with 0")
            if mask[name].shape != x.shape:
                raise ValueError(f"mask of {name} is {tuple(mask[name].shape)}, the weight of a and b is {tuple(x.shape)}; "
                                 f"use their mask")
            x, y = x[mask[name]], y[mask[name]]
        sizes[i] = x.numel()
        sums[i] = torch.stack([((x - y) ** 2).sum(), (x * y).sum(), (x * x).sum(), (y * y).sum()])
    sizes[-1], sums[-1] = sizes.sum(), sums.sum(0)
    squares, inner, left, right = sums.unbind(1)
    # two roots, as the product of two small squares is zero; rounding may leave a cosine of 1 + 1e-16
    cosine = (inner / (left.sqrt() * right.sqrt())).clamp(-1, 1)
    return Distances(chosen, sizes, squares.sqrt(), cosine)


@torch.no_grad()
def predict(model: ModelSpec, params: Params, buffers: Buffers, images: Tensor, chunk: int = 500) -> Tensor:
    """Class that a network in eval mode predicts for each image, (N,) int64.

    images: (N, C, S, S) normalised float32.  chunk: images a forward pass. Raises ``ValueError`` without images, on a network
    that is not of ``model`` or has NaN, and (:class:`dpkit.barriers.NotFinite`) when its logits overflow.
    """
    if len(images) == 0:
        raise ValueError("the evaluation set is empty; give at least one image")
    check_networks(model, {"to predict with": {**params, **buffers}})
    found = []
    for x in images.split(chunk):
        logits = models.forward(model, params, buffers, x)[0]
        if not bool(torch.isfinite(logits).all()):
            raise NotFinite("the network to predict with must have finite logits, got NaN or infinite ones; its weights are "
                            "finite but too large for these images: pass a network that is trained, and normalised images")
        found.append(logits.argmax(1))
    return torch.cat(found)


def disagreement(a: Tensor, b: Tensor) -> float:
    """Share of the images on which two networks predict different classes, in [0, 1] (Fort et al. 2019, arXiv 1912.02757).

    a, b: (N,) predicted classes, see :func:`predict`. Two networks of errors e and f disagree on at least |e - f| and at most
    e + f of the images. Raises ``ValueError`` without images or on different lengths.
    """
    _check_predictions(a=a, b=b)
    return float((a != b).double().mean())


@dataclasses.dataclass(frozen=True)
class Churn:
    """What changes when network b takes the place of a: shares of all images, in [0, 1], which add up to ``total``.

    gains: wrong before, right now.  losses: right before, wrong now.  sideways: wrong both times, with different classes.
    """

    gains: float
    losses: float
    sideways: float

    @property
    def total(self) -> float:
        """Prediction churn: the share of images whose predicted class changes, the same as :func:`disagreement`."""
        return self.gains + self.losses + self.sideways

    @property
    def needless(self) -> float:
        """Churn beyond the difference of both errors, |gains - losses|: two networks of equal error could do without it."""
        return self.total - abs(self.gains - self.losses)


def churn(a: Tensor, b: Tensor, labels: Tensor) -> Churn:
    """Prediction churn from ``a`` to ``b``, by what it does (Milani Fard et al. 2016, "Launch and iterate: reducing prediction
    churn", NIPS).

    a, b: (N,) predicted classes.  labels: (N,) true ones. Raises ``ValueError`` without images or on different lengths.
    """
    _check_predictions(a=a, b=b, labels=labels)
    before, after = a == labels, b == labels
    return Churn(*(float(part.double().mean()) for part in (~before & after, before & ~after, ~before & ~after & (a != b))))


def _check_predictions(**rows: Tensor) -> None:
    lengths = [len(row) for row in rows.values()]
    if min(lengths) == 0 or len(set(lengths)) > 1 or any(row.dim() != 1 for row in rows.values()):
        got = ", ".join(f"{name} {tuple(row.shape)}" for name, row in rows.items())
        raise ValueError(f"predictions must be one class for each of the same images, at least 1, got {got}")
