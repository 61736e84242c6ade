"""Masks with exact counts: which weights survive."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpkit import models
from dpkit.tree import Mask, Params, flatten, unflatten


def full(model: models.ModelSpec, params: Params) -> Mask:
    """The mask that keeps every prunable weight."""
    return {name: torch.ones_like(params[name], dtype=torch.bool) for name in models.prunable(model)}


def surviving(mask: Mask) -> int:
    """How many weights the mask keeps."""
    return sum(int(m.sum()) for m in mask.values())


def size(mask: Mask) -> int:
    """How many weights the mask speaks of."""
    return sum(m.numel() for m in mask.values())


def sparsity(mask: Mask) -> float:
    """Share of the weights that are removed, in [0, 1], counted."""
    return 1 - surviving(mask) / size(mask)


def density(mask: Mask) -> dict[str, float]:
    """Share of the weights that survive in each tensor, in [0, 1]."""
    return {name: float(m.sum()) / m.numel() for name, m in mask.items()}


def check_fraction(fraction: float) -> None:
    """Raise ``ValueError`` unless ``fraction`` lies in (0, 1)."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")


def survivors(total: int, fraction: float, rounds: int) -> tuple[int, ...]:
    """Counts of surviving weights after 0, 1, ..., ``rounds`` rounds that each remove ``fraction`` of what is left.

    Each round removes ``round(fraction * left)`` weights, the same rule as ``torch.nn.utils.prune`` applied repeatedly.
    """
    check_fraction(fraction)
    counts = [total]
    for _ in range(rounds):
        counts.append(counts[-1] - round(fraction * counts[-1]))
    return tuple(counts)


def magnitude(params: Params, mask: Mask) -> Params:
    """Scores: the absolute value of each maskable weight (Han et al. 2015)."""
    return {name: params[name].detach().abs() for name in mask}


def random_scores(mask: Mask, generator: torch.Generator) -> Params:
    """Scores drawn uniformly, for random masks."""
    return {name: torch.rand(m.shape, generator=generator) for name, m in mask.items()}


def keep_highest(scores: Params, mask: Mask, count: int) -> Mask:
    """The mask that keeps exactly ``count`` of the weights in ``mask``: those with the highest scores, over all tensors.

    Equal scores are kept in order of position (first tensor first), so the result never depends on the sorting
    algorithm. Raises ``ValueError`` when a score is NaN or when ``count`` is more than there are or less than one.
    """
    flat, alive = flatten(scores, mask), flatten(mask)
    if bool(torch.isnan(flat[alive]).any()):
        raise ValueError("scores must be numbers, got NaN; did the training diverge?")
    if not 1 <= count <= int(alive.sum()):
        raise ValueError(f"count must lie in [1, {int(alive.sum())}], the surviving weights; got {count}")
    places = torch.nonzero(alive).flatten()
    order = torch.argsort(flat[places], descending=True, stable=True)
    keep = torch.zeros_like(alive)
    keep[places[order[:count]]] = True
    return unflatten(keep, mask)


def prune(scores: Params, mask: Mask, fraction: float) -> Mask:
    """Remove ``round(fraction * survivors)`` of the surviving weights, the lowest scores first, over all tensors."""
    return keep_highest(scores, mask, survivors(surviving(mask), fraction, 1)[1])


def apply(params: Params, mask: Mask) -> Params:
    """Parameters with removed weights set to zero (``torch.where``: a product would keep NaN and -0.0)."""
    check(mask, params)
    return {name: torch.where(mask[name], t, torch.zeros_like(t)) if name in mask else t for name, t in params.items()}


def check(mask: Mask, params: Params) -> None:
    """Raise ``ValueError`` unless every tensor of the mask fits a parameter."""
    for name, m in mask.items():
        if name not in params:
            raise ValueError(f"mask names {name!r}, the network has {', '.join(params)}; use a mask of this architecture")
        if m.shape != params[name].shape:
            raise ValueError(f"mask of {name} is {tuple(m.shape)}, the weight is {tuple(params[name].shape)}; "
                             "use a mask of this architecture and width")


def collapsed(mask: Mask) -> Sequence[str]:
    """Tensors in which nothing survives: no signal passes there any more."""
    return [name for name, m in mask.items() if not bool(m.any())]


def jaccard(a: Mask, b: Mask) -> float:
    """Overlap of the surviving weights, |a and b| / |a or b|, in [0, 1]."""
    x, y = flatten(a), flatten(b, a)
    union: Tensor = (x | y).sum()
    return float((x & y).sum() / union) if int(union) else 1.0
