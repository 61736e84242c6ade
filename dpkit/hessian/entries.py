"""Masks in the order of an operator's entries, and random ones like them."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dpkit.tree import Mask, Params


class Flat(Protocol):
    """What knows the order of the surviving entries: an Operator or a NetworkLoss."""

    names: tuple[str, ...]

    def flatten(self, values: Params) -> Tensor:
        """Tensors named and shaped like the weights as one vector (n,)."""


class Entries(NamedTuple):
    """A mask in the order of an operator's entries: kept (n,) bool and layers (n,) int64, the place of its name; on the CPU."""

    kept: Tensor
    layers: Tensor


def entries(op: Flat, mask: Mask) -> Entries:
    """``mask`` as vectors. Entries that ``op`` has pruned already are in neither group.

    Raises ``ValueError`` where the mask lacks a tensor of the operator's.
    """
    missing = [name for name in op.names if name not in mask]
    if missing:
        raise ValueError(f"the mask must have every tensor of the operator, got none for {', '.join(missing)}; "
                         "measure on prunable weights")
    kept = op.flatten({name: mask[name] for name in op.names})
    layers = op.flatten({name: torch.full_like(mask[name], i, dtype=torch.int64) for i, name in enumerate(op.names)})
    return Entries(kept.cpu(), layers.cpu())


def random_like(like: Entries, generator: torch.Generator) -> Tensor:
    """A uniformly random mask (n,) with as many kept entries in each layer. generator: on the CPU."""
    found = torch.empty_like(like.kept)
    for layer in like.layers.unique():
        places = (like.layers == layer).nonzero().squeeze(1)
        found[places] = like.kept[places[torch.randperm(len(places), generator=generator)]]
    return found


def in_deviations(value: float, deviation: float) -> float:
    """``value / deviation``; infinite, with its sign, where only the deviation vanishes, and 0 where both do."""
    return value / deviation if deviation else math.copysign(math.inf, value) if value else 0.0


def check_entries(masks: Mapping[str, Entries], size: int) -> None:
    """Raise ``ValueError`` where a mask does not fit an operator of ``size`` entries or removes nothing."""
    for name, mask in masks.items():
        if mask.kept.shape != (size,) or mask.layers.shape != (size,):
            raise ValueError(f"mask {name} must have {size} entries, as the operator, got {tuple(mask.kept.shape)} and "
                             f"layers {tuple(mask.layers.shape)}")
        if bool(mask.kept.all()):
            raise ValueError(f"mask {name} must remove at least 1 of {size} entries, got none removed")
