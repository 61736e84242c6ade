"""Re-estimation of BatchNorm statistics, for networks that no training step has visited.

A network between two trained ones sees other activations than the average of both running statistics
describes, which shows up as a barrier that is not in the weights (Jordan et al. 2022, REPAIR, arXiv
2211.08403).
"""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit.models.checks import check_images, spread
from dpkit.models.layers import Recorder
from dpkit.models.network import family, statistics
from dpkit.models.spec import ModelSpec
from dpkit.tree import Buffers, Params

Moments = tuple[Tensor, Tensor, int]


@torch.no_grad()
def reestimate(model: ModelSpec, params: Params, buffers: Buffers, images: Tensor,
               chunk: int = 250) -> Buffers:
    """New buffers whose BatchNorm means and variances are those of ``images`` under ``params``.

    images: normalised training images (N, channels, S, S), N at least 2.  chunk: images a forward pass, at
    most (one more where a chunk of a single image would be left over). The images go through in train mode in
    nearly equal chunks (:func:`pieces`); moments are pooled over the chunks by :func:`pool`. The old statistics
    have no influence. Networks without BatchNorm get their buffers back. Raises ``ValueError`` on too few
    images or a wrong shape.
    """
    if not statistics(model):
        return dict(buffers)
    device = next(iter(params.values())).device
    return replaced(buffers, [moments(model, params, buffers, x.to(device)) for x in pieces(model, images, chunk)])


def pieces(model: ModelSpec, images: Tensor, chunk: int = 250) -> list[Tensor]:
    """The ``images`` (N, channels, S, S) in nearly equal chunks of at most ``chunk``, of every k-th image each.

    So a data set sorted by class gives chunks alike. Raises ``ValueError`` on fewer than 2 images or a wrong shape.
    """
    check_images(model, images)
    if len(images) < 2 or chunk < 2:
        raise ValueError(f"re-estimating BatchNorm statistics needs at least 2 images, 2 or more a chunk; "
                         f"got {len(images)} images and chunk {chunk}")
    count = -(-len(images) // chunk)
    if len(images) // count < 2:
        # An odd number of images in pairs would leave one alone, which has no variance on a 1x1 map.
        count -= 1
    return [images[piece::count] for piece in range(count)]


def moments(model: ModelSpec, params: Params, buffers: Buffers, images: Tensor) -> dict[str, Moments]:
    """By name of each BatchNorm: mean, variance over n (C,) and n of what reaches it, all norms in train mode."""
    recorder = Recorder(params, buffers)
    family(model).features(model, params, images, recorder)
    return recorder.moments


def replaced(buffers: Buffers, recorded: list[dict[str, Moments]]) -> Buffers:
    """The ``buffers`` with running statistics pooled from the :func:`moments` of each chunk."""
    result = dict(buffers)
    for name in recorded[0]:
        mean, variance = pool([found[name] for found in recorded])
        result[f"{name}.running_mean"] = mean.to(buffers[f"{name}.running_mean"].dtype)
        result[f"{name}.running_var"] = variance.to(buffers[f"{name}.running_var"].dtype)
    return result


def statistics_source(model: ModelSpec, images: Tensor | None, count: int) -> Tensor | None:
    """At most ``count`` of the ``images``, evenly spaced, for :func:`reestimate`; None without BatchNorm.

    Raises ``ValueError`` when the network has BatchNorm and there are no images.
    """
    if not statistics(model):
        return None
    if images is None:
        raise ValueError("re-estimating BatchNorm statistics needs statistics_images, got None; "
                         "pass normalised training images, or choose other statistics than reestimate")
    return images[spread(len(images), count)]


def pool(moments: list[Moments]) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of all samples together, float64, from each chunk's (mean, variance over n, n).

    Law of total variance: the mean of the chunks' variances plus the variance of their means, weighted by n;
    the result is then divided by n - 1, which is what PyTorch's running variance holds.
    """
    total = sum(n for _, _, n in moments)
    mean = sum(m.double() * (n / total) for m, _, n in moments)
    variance = sum((v.double() + (m.double() - mean) ** 2) * (n / total) for m, v, n in moments)
    return mean, variance * (total / (total - 1))
