"""What an operator asks of its mask and images, a fixed subset of them, and full precision while it multiplies."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real

import torch
from torch import Tensor

from dpkit.tree import Mask, Params


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 convolutions and matrix products at their own precision, then the former setting again.

    A GPU computes convolutions in TF32 by default; its 10 bits of mantissa are too coarse for the derivative
    of a derivative. Without effect on a CPU.
    """
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def check_whole(**values: object) -> None:
    """Raise ``ValueError`` with the name of the first of ``values`` that is no whole number."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_memory(memory: object) -> None:
    """Raise ``ValueError`` unless a memory bound is a finite number of bytes, at least 1, or None."""
    fits = memory is None or (isinstance(memory, Real) and math.isfinite(memory) and memory >= 1)
    if not fits:
        raise ValueError(f"memory must be a finite number of bytes, at least 1, or None for no bound; got {memory!r}")


def check_labels(images: Tensor, labels: Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless every image, of at least one, has a class or ``classes`` probabilities, none below 0."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError("images and labels must be equally many and at least one, "
                         f"got {len(images)} images and {len(labels)} labels")
    if labels.is_floating_point():
        fits = labels.dim() == 2 and labels.shape[1] == classes and bool(((labels >= 0) & labels.isfinite()).all())
    else:
        fits = labels.dim() == 1 and bool(((labels >= 0) & (labels < classes)).all())
    if not fits:
        raise ValueError(f"labels must be (N,) whole numbers from 0 to {classes - 1} or "
                         f"(N, {classes}) probabilities of at least 0, got {tuple(labels.shape)} {labels.dtype} "
                         f"from {labels.min().item():g} to {labels.max().item():g}")


def check_mask(mask: Mask, params: Params) -> Mask:
    """``mask`` on the device of ``params``.

    Raises ``ValueError`` where a mask does not fit its parameter or a pruned entry is not 0.
    """
    for name, keep in mask.items():
        if name not in params or keep.shape != params[name].shape or keep.dtype != torch.bool:
            has = tuple(params[name].shape) if name in params else "no such parameter"
            raise ValueError(f"mask of {name} must be boolean and shaped like it ({has}), "
                             f"got {tuple(keep.shape)} {keep.dtype}")
        weight = params[name].detach()
        pruned = int((weight[~keep.to(weight.device)] != 0).sum())
        if pruned:
            raise ValueError(f"pruned entries must be 0, got {pruned} others in {name}; "
                             "apply the mask to the network first")
    return {name: keep.to(params[name].device) for name, keep in mask.items()}


def subset(labels: Tensor, count: int) -> Tensor:
    """Index (count,) of a fixed selection: the first image of every class, then the second, and so on.

    No random number enters, so every network of a study is measured on the same images, and a data set sorted
    by class does not give one class only. Soft labels (N, K) count as their largest. Raises ``ValueError``
    unless 1 <= count <= N.
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"images must lie in [1, {len(labels)}] (the images given), got {count}")
    classes = (labels.argmax(1) if labels.dim() == 2 else labels).cpu()
    rank = torch.empty(len(classes), dtype=torch.int64)
    for c in classes.unique():
        members = (classes == c).nonzero().squeeze(1)
        rank[members] = torch.arange(len(members))
    # Stable, so that images of equal rank keep the order of the data.
    return torch.argsort(rank, stable=True)[:count]
