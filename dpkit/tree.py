"""Arithmetic on flat dictionaries of tensors, and the only source of seeds.

Parameters and buffers of a network are ``dict[str, Tensor]`` named as in a ``state_dict``. A population of P networks is
the same dictionary with a leading axis P on every tensor.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpkit.spec import canonical_json

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]
Mask = dict[str, Tensor]


def seed_for(run: int | str, *path: int | str) -> int:
    """A 63-bit seed for one purpose, from SHA-256 of the run and a path of names and numbers.

    Equal in every process and on every machine; distinct purposes give independent seeds, so adding a network to a study
    never changes another one's random numbers.
    """
    digest = hashlib.sha256(canonical_json([run, *path]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(run: int | str, *path: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_for`.

    Random numbers are always drawn on the CPU and then moved, so that a GPU run sees the same batches, augmentations and
    initial weights as a CPU run.
    """
    return torch.Generator().manual_seed(seed_for(run, *path))


def lerp(a: Params, b: Params, alpha: float) -> Params:
    """``(1 - alpha) a + alpha b`` for each tensor; exact at ``alpha`` 0 and 1."""
    if alpha == 0.0:
        return dict(a)
    if alpha == 1.0:
        return dict(b)
    return {name: torch.lerp(a[name], b[name], alpha) for name in a}


def add(a: Params, b: Params, scale: float = 1.0) -> Params:
    """``a + scale * b``."""
    return {name: torch.add(a[name], b[name], alpha=scale) for name in a}


def subtract(a: Params, b: Params) -> Params:
    """``a - b``."""
    return {name: a[name] - b[name] for name in a}


def dot(a: Params, b: Params) -> float:
    """Inner product over all entries, accumulated in float64."""
    return float(sum(torch.sum(a[name].double() * b[name].double()) for name in a))


def norm(a: Params) -> float:
    """Euclidean norm over all entries, accumulated in float64."""
    return dot(a, a) ** 0.5


def flatten(tree: Params, names: Iterable[str] | None = None) -> Tensor:
    """All tensors (or those named, in that order) as one vector (n,)."""
    return torch.cat([tree[name].reshape(-1) for name in (tree if names is None else names)])


def unflatten(vector: Tensor, like: Params) -> Params:
    """Inverse of :func:`flatten`: a vector (n,) cut into the names, order and shapes of ``like``.

    Raises ``ValueError`` when the lengths differ.
    """
    sizes = [t.numel() for t in like.values()]
    if vector.numel() != sum(sizes):
        raise ValueError(f"vector must have {sum(sizes)} entries to fill the tree, got {vector.numel()}")
    return {name: part.view(t.shape) for (name, t), part in zip(like.items(), vector.split(sizes), strict=True)}


def stack(trees: Sequence[Params]) -> Params:
    """A population (P, ...) from P dictionaries with equal names and shapes."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def unstack(tree: Params) -> list[Params]:
    """The P members of a population."""
    count = population(tree)
    return [{name: t[p] for name, t in tree.items()} for p in range(count)]


def population(tree: Params) -> int:
    """P, the length of the leading axis; raises ``ValueError`` when tensors disagree or there are none."""
    lengths = {t.shape[0] if t.dim() else -1 for t in tree.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise ValueError(f"a population needs one leading axis shared by all tensors, got lengths {sorted(lengths)}")
    return lengths.pop()


def detach(tree: Params) -> Params:
    """A copy that shares no memory and no graph with ``tree``."""
    return {name: t.detach().clone() for name, t in tree.items()}


def to(tree: Params, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Params:
    """Every tensor moved to ``device``; floating tensors also cast to ``dtype``."""
    return {name: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for name, t in tree.items()}


def is_finite(tree: Params) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(t).all()) for t in tree.values() if t.is_floating_point())
