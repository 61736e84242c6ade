"""How many weights each tensor keeps: one ranking over all tensors, the same share of each, or Erdos-Renyi-Kernel.

The total is exact for every allocation, so arms with different allocations are compared at equal sparsity. Layers that are spared
stay as they are and still count: the others lose what they would have lost.
"""
from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from dpkit import models
from dpkit.prune import masks
from dpkit.tree import Mask, Params

ALLOCATIONS = ("global", "layerwise", "erk")
SPARES = ("first", "last")


def spared(model: models.ModelSpec, spare: Sequence[str]) -> tuple[str, ...]:
    """Names of the weights that ``spare`` (``first``, ``last`` or both) means: those of the first layer and of the classifier."""
    unknown = [word for word in spare if word not in SPARES]
    if unknown:
        raise ValueError(f"spare must name layers among {', '.join(SPARES)}; got {unknown[0]!r}")
    names = {"first": models.prunable(model)[0], "last": f"{models.classifier_name(model)}.weight"}
    return tuple(names[word] for word in SPARES if word in spare)


def spared_weights(model: models.ModelSpec, spare: Sequence[str]) -> int:
    """How many weights these layers have."""
    names = spared(model, spare)
    return sum(layer.weights for layer in models.layer_work(model) if f"{layer.name}.weight" in names)


def shares(total: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Whole numbers that add up to ``total``, proportional to ``weights`` but none above its cap; exact arithmetic.

    The real-valued solution is ``min(cap, epsilon * weight)`` with the one ``epsilon`` that gives the total; what rounding
    down leaves over goes to the largest remainders, in order of position where they are equal. weights: positive wherever the
    cap is. Raises ``ValueError`` where ``total`` does not lie in [0, sum of caps].
    """
    if not 0 <= total <= sum(caps):
        raise ValueError(f"total must lie in [0, {sum(caps)}], the sum of the caps; got {total}")
    capped = {i for i, cap in enumerate(caps) if cap == 0}
    while True:
        free = [i for i in range(len(caps)) if i not in capped]
        scale = Fraction(total - sum(caps[i] for i in capped), sum(weights[i] for i in free)) if free else Fraction(0)
        # a capped one stays capped: taking it out leaves more for the others, so the scale only grows
        over = [i for i in free if scale * weights[i] > caps[i]]
        if not over:
            break
        capped.update(over)
    exact = [Fraction(cap) if i in capped else scale * weights[i] for i, cap in enumerate(caps)]
    found = [int(value) for value in exact]
    by_remainder = sorted(range(len(caps)), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[:total - sum(found)]:
        found[i] += 1
    return found


def counts(allocation: str, mask: Mask, count: int) -> dict[str, int]:
    """How many weights each tensor of ``mask`` keeps when ``count`` are kept in all; at most what the mask keeps there.

    ``layerwise``: the same share of what survives in each tensor. ``erk``: Erdos-Renyi-Kernel (Mocanu et al. 2018, arXiv
    1707.04780, with the kernel's sides by Evci et al. 2020, arXiv 1911.11134, section 3): the density of a tensor is
    proportional to the sum of its shape over their product, so the number kept is proportional to the sum, and dense
    tensors are capped. A tensor that an earlier round left with less than that keeps all it has, so masks are nested.
    Rounding: :func:`shares`.
    """
    alive = [int(m.sum()) for m in mask.values()]
    if allocation == "layerwise":
        weights = alive
    elif allocation == "erk":
        weights = [sum(m.shape) for m in mask.values()]
    else:
        raise ValueError(f"allocation must be layerwise or erk to fix the count of each tensor; got {allocation!r}")
    return dict(zip(mask, shares(count, weights, alive), strict=True))


def keep(scores: Params, mask: Mask, count: int, allocation: str = "global", spare: Sequence[str] = ()) -> Mask:
    """The mask that keeps exactly ``count`` of the weights in ``mask``, the highest scores first, under an allocation.

    allocation: ``global`` ranks all tensors together (:func:`dpkit.prune.masks.keep_highest`); the others rank within each
    tensor, which keeps what :func:`counts` says. spare: names of tensors that lose nothing; they are part of ``count``. Equal
    scores are kept in order of position. Raises ``ValueError`` on NaN, unknown names, and a count that leaves no weight, or more
    than survive, in the tensors that are not spared.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}; got {allocation!r}")
    unknown = [name for name in spare if name not in mask]
    if unknown:
        raise ValueError(f"spare must name tensors of the mask, got {unknown[0]!r}; it has {masks.listed(mask)}")
    if allocation == "global" and not spare:
        return masks.keep_highest(scores, mask, count)
    free = {name: m for name, m in mask.items() if name not in spare}
    held, left = masks.surviving(mask) - masks.surviving(free), masks.surviving(free)
    if left == 0:
        raise ValueError(f"spare must leave weights to prune, but all {held} that survive are in {masks.listed(spare)}; "
                         "spare less")
    if not 1 <= count - held <= left:
        raise ValueError(f"count must lie in [{held + 1}, {held + left}], as {held} weights are spared and {left} others "
                         f"survive; got {count}; spare less or prune less")
    if allocation == "global":
        kept = masks.keep_highest({name: scores[name] for name in free}, free, count - held)
    else:
        kept = {name: _keep_in(name, scores, free, n) for name, n in counts(allocation, free, count - held).items()}
    return {name: kept.get(name, m) for name, m in mask.items()}


def _keep_in(name: str, scores: Params, mask: Mask, count: int) -> torch.Tensor:
    """The mask of one tensor with its ``count`` highest scores; ``count`` may be nothing."""
    if count == 0:
        if bool(torch.isnan(scores[name][mask[name]]).any()):
            raise ValueError(masks.NAN)
        return torch.zeros_like(mask[name])
    return masks.keep_highest({name: scores[name]}, {name: mask[name]}, count)[name]
