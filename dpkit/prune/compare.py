"""How much masks agree, beside what chance would give, by layer and over all layers."""
from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit.prune import masks
from dpkit.tree import Mask, Params

COLUMNS = 2**20  # positions of a matrix product at a time: bounds memory, and float32 counts them exactly
TAILS = 12.0  # standard deviations of the hypergeometric distribution that are summed; less than 1e-30 lies outside


@dataclass(frozen=True)
class Comparison:
    """Agreement of A masks over L tensors. Index L of a last axis of length L + 1 means all layers together.

    names: of the masks. tensors: of the weights. sizes (L,) int64: positions. kept (A, L) int64: survivors. both (A, A, L)
    int64: positions that both keep.

    jaccard, hamming (A, A, L + 1) float64: both kept over either kept, in [0, 1] (1 where neither keeps any); share of positions
    that differ, in [0, 1]. jaccard_chance, hamming_chance (A, A, L + 1): their expectation for two independent masks, uniform
    among those with as many survivors (:func:`chance_jaccard`, :func:`chance_hamming`); over all layers only the two totals
    are given. jaccard_within, hamming_within (A, A): over all layers, the expectation where the survivors of each layer are
    given, which asks whether masks agree on more than how many weights each layer keeps. unique (A, L + 1) int64: positions
    that only this mask keeps.
    """

    names: tuple[str, ...]
    tensors: tuple[str, ...]
    sizes: Tensor
    kept: Tensor
    both: Tensor
    jaccard: Tensor
    hamming: Tensor
    jaccard_chance: Tensor
    hamming_chance: Tensor
    jaccard_within: Tensor
    hamming_within: Tensor
    unique: Tensor

    @property
    def excess(self) -> Tensor:
        """(A, A, L + 1): agreement above chance, (J - Jc) / (1 - Jc): 0 by chance, 1 for equal masks, NaN where Jc is 1."""
        return excess(self.jaccard, self.jaccard_chance)

    @property
    def excess_within(self) -> Tensor:
        """(A, A): the same over all layers, above the chance level with the survivors of each layer given."""
        return excess(self.jaccard[..., -1], self.jaccard_within)


def compare(found: Mapping[str, Mask]) -> Comparison:
    """Compare masks of one architecture, by name.

    Positions are counted by matrix products on flattened masks, some at a time. Raises ``ValueError`` without masks, and where
    two of them do not have the same tensors in the same shapes; the line names both.
    """
    check_masks(found)
    names, first = tuple(found), next(iter(found.values()))
    sizes = torch.tensor([m.numel() for m in first.values()])
    both = torch.zeros(len(names), len(names), len(first), dtype=torch.int64)
    unique = torch.zeros(len(names), len(first) + 1, dtype=torch.int64)
    for index, tensor in enumerate(first):
        flat = [mask[tensor].reshape(-1) for mask in found.values()]
        for begin in range(0, len(flat[0]), COLUMNS):
            rows = torch.stack([f[begin:begin + COLUMNS].to("cpu") for f in flat])
            numbers = rows.float()
            both[..., index] += (numbers @ numbers.T).long()
            unique[:, index] += (rows & (rows.sum(0) == 1)).sum(1)
    unique[:, -1] = unique.sum(1)
    kept = both.diagonal().T.clone()
    all_sizes, all_kept = _with_total(sizes), _with_total(kept)
    joint, left, right = _with_total(both), all_kept[:, None], all_kept[None]
    pairs = torch.broadcast_tensors(left, right, all_sizes)
    chance = [chance_jaccard(*numbers) for numbers in zip(*(p.reshape(-1).tolist() for p in pairs), strict=True)]
    return Comparison(
        names, tuple(first), sizes, kept, both,
        jaccard=_jaccard(joint.double(), (left + right).double()),
        hamming=(left + right - 2 * joint).double() / all_sizes,
        jaccard_chance=torch.tensor(chance, dtype=torch.float64).reshape(joint.shape),
        hamming_chance=chance_hamming(left, right, all_sizes),
        jaccard_within=_jaccard_within(kept, sizes),
        hamming_within=(chance_hamming(kept[:, None], kept[None], sizes) * sizes).sum(-1) / sizes.sum(),
        unique=unique)


def jaccard(a: Mask, b: Mask) -> float:
    """Overlap of the surviving weights over all tensors, |a and b| / |a or b|, in [0, 1]; errors as :func:`compare`'s."""
    return float(compare({"a": a, "b": b}).jaccard[0, 1, -1])


def distances(found: Sequence[Mask]) -> Tensor:
    """Hamming distances (T, T) between masks: the share of positions, over all tensors, at which two differ, in [0, 1]."""
    check_masks({f"number {i}": mask for i, mask in enumerate(found)})
    differ = torch.zeros(len(found), len(found), dtype=torch.float64)
    for tensor in found[0]:
        flat = [mask[tensor].reshape(-1) for mask in found]
        for begin in range(0, len(flat[0]), COLUMNS):
            numbers = torch.stack([f[begin:begin + COLUMNS].to("cpu") for f in flat]).float()
            joint = (numbers @ numbers.T).double()
            alone = joint.diagonal()
            differ += alone[:, None] + alone[None] - 2 * joint
    return differ / masks.size(found[0])


def early_bird(params: Sequence[Params], mask_like: Mask, count: int) -> Tensor:
    """Hamming distances (T, T) between the magnitude masks of a network at T times (You et al. 2020, arXiv 1909.11957).

    params: its parameters at each time. mask_like: which weights may be kept, :func:`dpkit.prune.masks.full` for all.
    count: weights that each mask keeps, over all tensors. An early-bird ticket is drawn when the distances to the
    last masks stay small. Raises ``ValueError`` as :func:`dpkit.prune.masks.keep_highest` does.
    """
    return distances([masks.keep_highest(masks.magnitude(p, mask_like), mask_like, count) for p in params])


def check_masks(found: Mapping[str, Mask]) -> None:
    """Raise ``ValueError`` unless there is a mask and all have the same tensors in the same shapes."""
    if not found:
        raise ValueError("comparing needs at least 1 mask, got none")
    (name, reference), *others = found.items()
    for other, mask in others:
        lacks, more = [n for n in reference if n not in mask], [n for n in mask if n not in reference]
        if lacks or more:
            owner, without = (name, other) if lacks else (other, name)
            both = f" and {masks.listed(more)} in {other} and not in {name}" if lacks and more else ""
            raise ValueError(f"masks {name} and {other} must have the same tensors, but {masks.listed(lacks or more)} "
                             f"{'is' if len(lacks or more) == 1 else 'are'} in {owner} and not in {without}{both}; "
                             "compare masks of one architecture")
        for tensor, m in reference.items():
            if m.shape != mask[tensor].shape:
                raise ValueError(f"masks {name} and {other} must have the same shapes, but {tensor} is {tuple(m.shape)} in "
                                 f"{name} and {tuple(mask[tensor].shape)} in {other}; compare masks of one network")


def excess(jaccard: Tensor, chance: Tensor) -> Tensor:
    """``(J - Jc) / (1 - Jc)``, NaN where the chance level is 1."""
    return torch.where(chance < 1, (jaccard - chance) / (1 - chance), math.nan)


@functools.lru_cache(maxsize=4096)
def chance_jaccard(left: int, right: int, size: int) -> float:
    """Expected Jaccard index of two independent uniform masks that keep ``left`` and ``right`` of ``size`` positions, in [0, 1].

    The overlap X is hypergeometric, and this is ``E[X / (left + right - X)]``, summed over all X within twelve standard
    deviations. 1 where neither keeps any, as for the index itself.
    """
    if left + right == 0:
        return 1.0
    low, high = max(0, left + right - size), min(left, right)
    mean = left * right / size
    reach = TAILS * math.sqrt(_variance(left, right, size)) + TAILS
    low, high = max(low, math.floor(mean - reach)), min(high, math.ceil(mean + reach))
    x = torch.arange(low, high + 1, dtype=torch.float64)
    before = x[:-1]
    # p(x + 1) / p(x)
    steps = (left - before) * (right - before) / ((before + 1) * (size - left - right + before + 1))
    logs = torch.cat([torch.zeros(1, dtype=torch.float64), steps.log().cumsum(0)])
    p = (logs - logs.max()).exp()
    return float((p / p.sum() * x / (left + right - x)).sum())


def chance_hamming(left: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """Expected share of positions at which two such masks differ: ``(a + b - 2 a b / n) / n``, exact."""
    left, right = left.double(), right.double()
    return (left + right - 2 * left * right / size) / size


def _variance(left: int | Tensor, right: int | Tensor, size: int | Tensor) -> float | Tensor:
    """Variance of the hypergeometric overlap; nothing can vary at a single position."""
    return left * right / size * (size - left) / size * (size - right) / (size - 1 + (size == 1))


def _jaccard_within(kept: Tensor, sizes: Tensor) -> Tensor:
    """(A, A): expected index over all layers with each layer's survivors given.

    The overlap is a sum of independent hypergeometric numbers with mean m and variance v; expanding ``X / (s - X)`` to second
    order gives ``m / (s - m) + s v / (s - m)^3``, whose relative error falls with the number of survivors s.
    """
    left, right = kept[:, None].double(), kept[None].double()
    mean, variance = (left * right / sizes).sum(-1), _variance(left, right, sizes).sum(-1)
    total = (left + right).sum(-1)
    found = _jaccard(mean, total)
    return torch.where(total > 0, found + total * variance / (total - mean).clamp(min=1e-300) ** 3, found)


def _jaccard(joint: Tensor, total: Tensor) -> Tensor:
    """``joint / (total - joint)``, 1 where nothing is kept."""
    return torch.where(total > 0, joint / (total - joint).clamp(min=1e-300), 1.0)


def _with_total(counts: Tensor) -> Tensor:
    """The last axis with its sum at the end."""
    return torch.cat([counts, counts.sum(-1, keepdim=True)], -1)
