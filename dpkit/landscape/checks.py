"""Which networks, directions, labels and known results fit together: one line that names both sides where they do not."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpkit.models import ModelSpec
from dpkit.models.network import family
from dpkit.tree import Mask, Params, is_finite

NEAR = 1e-9
"""Relative difference below which two ends of an axis are the same place, computed on two machines."""


def check_model(model: ModelSpec, params: Params, what: str) -> None:
    """Raise ``ValueError`` unless ``params`` have the names that ``model`` says. Shapes are free: channels may be removed."""
    known = [name for layer in family(model).table(model) for name in layer.shapes()]
    wrong, missing = [n for n in params if n not in known], [n for n in known if n not in params]
    if wrong or missing:
        parts = [f"{name!r} is no tensor of it" for name in wrong[:1]] + [f"{name!r} is missing" for name in missing[:1]]
        raise ValueError(f"{what} must be of {model.arch} with {model.norm_kind} norm, but {' and '.join(parts)}; "
                         f"pass the specification that the networks were made with")


def check_mask(mask: Mask | None, trees: Mapping[str, Params]) -> None:
    """Raise ``ValueError`` unless all ``trees`` (what it is -> tensors) are 0 where ``mask`` removes weights."""
    for what, tree in trees.items():
        for name, keep in (mask or {}).items():
            if name not in tree or tree[name].shape != keep.shape:
                has = f"is {tuple(tree[name].shape)} in it" if name in tree else "is not in it"
                raise ValueError(f"{what} must fit the mask, but {name!r} is {tuple(keep.shape)} in the mask and {has}; "
                                 f"pass the mask that it was trained with")
            if keep.dtype != torch.bool:
                raise ValueError(f"the mask of {what} must be boolean (True keeps a weight), got {keep.dtype} for {name!r}; "
                                 f"compare it with 0")
            extra = int(((tree[name] != 0) & ~keep.to(tree[name].device)).sum())
            if extra:
                raise ValueError(f"{what} must be zero where the mask removes weights, but {name!r} has {extra} others there; "
                                 f"put together only what shares one mask")


def check_direction(params: Params, direction: Params, what: str) -> None:
    """Raise ``ValueError`` unless ``direction`` has finite tensors, not all 0, named and shaped like those of ``params``."""
    for name, tensor in direction.items():
        if name not in params or tensor.shape != params[name].shape:
            has = f"is {tuple(params[name].shape)} there" if name in params else "is not there"
            raise ValueError(f"{what} must have tensors of the network, but {name!r}, {tuple(tensor.shape)}, {has}; "
                             f"make it for this network")
    if not is_finite(direction):
        raise ValueError(f"{what} must be finite, but it has NaN or infinite entries")
    if not any(bool((t != 0).any()) for t in direction.values()):
        raise ValueError(f"{what} must not be zero: it leads nowhere")


def check_soft(labels: Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` are (N, classes) probabilities."""
    right = labels.dim() == 2 and labels.shape[1] == classes and labels.is_floating_point()
    if not right or not bool((labels >= 0).all()) or not bool(((labels.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(f"labels must be (N,) whole numbers or (N, {classes}) probabilities whose rows sum to one, "
                         f"got {tuple(labels.shape)} {labels.dtype}"
                         + (f" with row sums from {float(labels.sum(1).min()):g} to {float(labels.sum(1).max()):g}"
                            if right else ""))


def check_ends(axis: str, old: Tensor, new: Tensor) -> None:
    """Raise ``ValueError`` unless known points ``old`` (R0,) end where ``new`` (R,) do."""
    ends, wanted = old[[0, -1]].tolist(), new[[0, -1]].tolist()
    if any(abs(e - w) > NEAR * max(map(abs, wanted)) for e, w in zip(ends, wanted, strict=True)):
        raise ValueError(f"known points must have the same ends to be refined, but {axis} runs from {ends[0]:g} to {ends[1]:g} "
                         f"in them and from {wanted[0]:g} to {wanted[1]:g} here; leave known out or ask for the same ends")


def same_places(old: Tensor, new: Tensor) -> bool:
    """Whether two lists of places (K, 2) agree within rounding."""
    return old.shape == new.shape and bool(torch.allclose(old, new, rtol=NEAR, atol=NEAR * float(new.abs().max())))
