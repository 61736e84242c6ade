"""Masks with exact counts: which weights survive."""
from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dpkit import models
from dpkit.models.layers import Weight
from dpkit.models.network import family
from dpkit.tree import Mask, Params, flatten, unflatten

NAN = "scores must be numbers, got NaN; did the training diverge?"


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
    lacking = [name for name in mask if name not in scores]
    if lacking:
        raise ValueError(f"scores must have every tensor of the mask, got none for {listed(lacking)}")
    flat, alive = flatten(scores, mask), flatten(mask)
    if bool(torch.isnan(flat[alive]).any()):
        raise ValueError(NAN)
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
    """Raise ``ValueError`` unless every tensor of the mask fits a parameter; the line names what either side lacks.

    A mask may leave weights out, which are then whole; :func:`check_model` wants all of them.
    """
    unknown = [name for name in mask if name not in params]
    if unknown:
        missing = [name for name, t in params.items() if name.endswith(".weight") and t.dim() > 1 and name not in mask]
        raise ValueError(f"mask names {listed(unknown)}, which the network lacks, "
                         f"{f'and leaves out {listed(missing)}' if missing else f'it has {listed(params)}'}; "
                         "use a mask of this architecture")
    for name, m in mask.items():
        if m.shape != params[name].shape:
            raise ValueError(f"mask of {name} is {tuple(m.shape)}, the weight is {tuple(params[name].shape)}; "
                             "use a mask of this architecture and width")


def check_model(mask: Mask, model: models.ModelSpec) -> None:
    """Raise ``ValueError`` unless the mask is boolean and covers exactly the prunable weights of ``model``, in their shapes."""
    shapes = {f"{layer.name}.weight": layer.shape for layer in family(model).table(model) if isinstance(layer, Weight)}
    lacks, knows_not = [n for n in shapes if n not in mask], [n for n in mask if n not in shapes]
    if lacks or knows_not:
        sides = [f"lacks {listed(lacks)}"] * bool(lacks)
        sides += [f"has {listed(knows_not)}, which {model.arch} lacks"] * bool(knows_not)
        raise ValueError(f"mask must cover the prunable weights of {model.arch}, but it {' and '.join(sides)}; "
                         "use a mask of this architecture")
    for name, m in mask.items():
        if tuple(m.shape) != shapes[name]:
            raise ValueError(f"mask of {name} is {tuple(m.shape)}, the weight of {model.arch} with width {model.width} is "
                             f"{shapes[name]}; use a mask of this architecture, width and image size")
        if m.dtype != torch.bool:
            raise ValueError(f"mask of {name} must be boolean, got {m.dtype}; compare with zero first")


def listed(names: Collection[str], most: int = 3) -> str:
    """The first ``most`` names in quotes, and how many more there are."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def collapsed(mask: Mask) -> Sequence[str]:
    """Tensors in which nothing survives: no signal passes there any more."""
    return [name for name, m in mask.items() if not bool(m.any())]
