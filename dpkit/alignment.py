"""Permutation alignment: put the channels of one network in the order that brings its weights closest to another's.

Ainsworth, Hayase & Srinivasa 2022, "Git Re-Basin" (arXiv 2209.04836), section 3.2, weight matching: networks that differ by the
order of their hidden units compute the same, so before two of them are interpolated one may be permuted. The search is coordinate
descent: with all orders but one fixed, the best order of a group of channels is a linear assignment problem, solved exactly.

What may be permuted, and what stands along each axis, is :mod:`dpkit.models.wiring`'s table, which covers every architecture:
group norm's groups and heads of attention stay together and are matched as wholes, with the best order inside each pair.
Permuted networks compute the same in exact arithmetic; floating-point sums run in another order and differ by rounding.
"""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpkit import models
from dpkit.models import ModelSpec
from dpkit.models.wiring import Axis, Group, axes, entries, groups, take
from dpkit.tree import Buffers, Mask, Params, dot

Permutations = dict[str, Tensor]
"""For each group of channels (:func:`dpkit.models.wiring.groups`) an order p (C,) int64 on the CPU: channel i of the permuted
network is channel p[i] of the network before. A group that is left out stays as it is."""

Masks = tuple[Mask, Mask]
ROUNDING = 1e-13
"""A gain below this share of the terms that it is the difference of is rounding."""


def identity(model: ModelSpec) -> Permutations:
    """The permutations that change nothing."""
    return {name: torch.arange(group.size) for name, group in groups(model).items()}


def draw(model: ModelSpec, generator: torch.Generator) -> Permutations:
    """Permutations drawn uniformly from all that leave the network's function as it is."""
    found: Permutations = {}
    for names in _bundles(model):
        group = groups(model)[names[0]]
        order = torch.randperm(group.blocks, generator=generator)
        for name in names:
            inner = [torch.randperm(group.size // group.blocks, generator=generator) for _ in range(group.blocks)]
            found[name] = _joined(order, inner)
    return found


def inverse(permutations: Permutations) -> Permutations:
    """The permutations that undo these."""
    return {name: torch.argsort(order) for name, order in permutations.items()}


def permute(model: ModelSpec, tensors: Params | Buffers | Mask, permutations: Permutations) -> Params:
    """``tensors`` (parameters, buffers or a mask; any of them) of ``model`` with their channels in another order, as copies.

    The same permutations must be given to parameters, buffers and mask of one network, which then computes what it did.
    Raises ``ValueError`` with one line on what is no permutation of a group, or tears apart what must stay together, and
    on tensors of another network.
    """
    check(model, permutations)
    return take(model, tensors, permutations)


def transfer(model: ModelSpec, mask: Mask, permutations: Permutations) -> Mask:
    """The ``mask`` of network a in the order of network b's own channels, to train from b's start.

    permutations: those that bring b to a, as :func:`weight_matching` of the two *trained* networks returns them.
    Adnan et al. 2025, "Sparse Training from Random Initialization" (arXiv 2505.05143), who match activations in place of
    weights. Each tensor keeps as many weights as before. Raises ``ValueError`` as :func:`permute` does.
    """
    return permute(model, mask, inverse(permutations))


def objective(model: ModelSpec, a: Params, b: Params, permutations: Permutations | None = None) -> float:
    """Inner product of all parameters of ``a`` with those of the permuted ``b``, in float64: what matching makes large.

    As a permutation does not change a norm, the squared distance is ``|a|^2 + |b|^2`` minus twice this (Ainsworth et al.
    2022, section 3.2). Running statistics do not count. Raises ``ValueError`` as :func:`permute` does.
    """
    return dot(a, permute(model, b, permutations or {}))


def weight_matching(model: ModelSpec, a: Params, b: Params, masks: Masks | None = None, *, generator: torch.Generator,
                    restarts: int = 1, only: Collection[str] | None = None, sweeps: int = 100) -> Permutations:
    """Permutations of ``b`` that bring it closest to ``a`` over all parameters: :func:`permute` with them aligns the two.

    Algorithm 1 of Ainsworth et al. 2022: starting from the identity, the groups of channels are visited in random order, each is
    given the best order with the others fixed, until a whole sweep gains nothing or ``sweeps`` are done. The result is a local
    optimum (the joint problem is NP-hard).

    masks: of ``a`` and of ``b``; what they remove counts as zero, whatever the tensors hold. The two may differ.
    generator: order of the groups, and random starts. The same generator state gives the same permutations; equally good
        orders (channels that are all zero) keep the one there is where they can.
    restarts: further descents, of which the best one's result is kept. The second starts from one forward pass: groups
        are settled from the images on, each by the tensors that lead to settled groups only, which finds any permutation
        of ``a`` itself whose channels differ. Later ones start from random permutations.
    only: groups that may move; the others keep their order. All by default.

    Raises ``ValueError`` with one line when the networks differ in tensors, have NaN weights, are not of ``model``, or when a
    mask does not fit.
    """
    if restarts < 0 or sweeps < 1:
        raise ValueError(f"restarts must be at least 0 and sweeps at least 1, got {restarts} and {sweeps}")
    problem = _Problem(model, a, b, masks, only)
    best, highest = problem.start(), -float("inf")
    for run in range(1 + restarts):
        found = (problem.start(), problem.forward)[run] if run == 0 else None
        if run == 1:
            found = problem.forward()
        elif run > 1:
            found = problem.random(generator)
        for found, _ in problem.descend(found, generator, sweeps):
            pass
        value = problem.value(found)
        if value > highest:
            best, highest = found, value
    return best


def descend(model: ModelSpec, a: Params, b: Params, masks: Masks | None = None, *, generator: torch.Generator,
            start: Permutations | None = None, only: Collection[str] | None = None,
            sweeps: int = 100) -> Iterator[tuple[Permutations, float]]:
    """One descent of :func:`weight_matching`, step by step: (permutations, their objective) at ``start`` and after each gain.

    start: identity where it says nothing. The objective never falls. Raises ``ValueError`` as :func:`weight_matching` does.
    """
    problem = _Problem(model, a, b, masks, only)
    check(model, start or {})
    yield from problem.descend(problem.start() | (start or {}), generator, sweeps)


def assignment(scores: Tensor) -> Tensor:
    """The permutation p (n,) int64 with the largest sum of ``scores[i, p[i]]``; scores: (n, n), finite.

    Exact up to rounding in float64, in O(n^3): shortest augmenting paths on reduced costs (Jonker & Volgenant 1987, "A shortest
    augmenting path algorithm for dense and sparse linear assignment problems"), the method of scipy's
    ``linear_sum_assignment`` too. Ties go to lower indices. Raises ``ValueError`` unless scores are square and finite.
    """
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1] or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"scores must be a square matrix of finite numbers, got shape {tuple(scores.shape)}"
                         f"{'' if bool(torch.isfinite(scores).all()) else ' with NaN or infinite entries'}")
    cost = -scores.detach().double().cpu().numpy()
    n = len(cost)
    # Duals u, v with cost >= u + v, equality on the pairs of the matching: first column minima, then row minima.
    v = cost.min(0) if n else np.zeros(0)
    reduced = cost - v
    u = reduced.min(1) if n else np.zeros(0)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for i in range(n):
        free = np.flatnonzero((reduced[i] == u[i]) & (row_of < 0))
        if len(free):
            column_of[i], row_of[free[0]] = free[0], i
    for i in np.flatnonzero(column_of < 0):
        column = _augment(cost, u, v, row_of, i)
        while True:
            row = previous_row = column[1][column[0]]
            raise NotImplementedError
    return torch.from_numpy(column_of)
