"""Weight matching: coordinate descent over the orders of channels (Ainsworth et al. 2022, arXiv 2209.04836, algorithm 1)."""
from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dpkit import models
from dpkit.alignment.assignment import assignment
from dpkit.alignment.permutations import Permutations, bundles, check, draw, identity, joined, permute
from dpkit.models import ModelSpec
from dpkit.models.wiring import Axis, axes, entries, groups, take, tensor_shapes
from dpkit.tree import Mask, Params, dot, norm

Masks = tuple[Mask, Mask]
ROUNDING = 1e-14
"""A gain below this share of the norms of the channels that it is the difference of is rounding."""


def objective(model: ModelSpec, a: Params, b: Params, permutations: Permutations | None = None) -> float:
    """Inner product of all parameters of ``a`` with those of the permuted ``b``, in float64: what matching makes large.

    As a permutation does not change a norm, the squared distance is ``|a|^2 + |b|^2`` minus twice this (Ainsworth et al.
    2022, section 3.2). Running statistics do not count. Raises ``ValueError`` with one line on networks of different
    tensors, and as :func:`dpkit.alignment.permute` does.
    """
    models.check_same({"a": a, "b": b})
    return dot(a, permute(model, b, permutations or {}))


def weight_matching(model: ModelSpec, a: Params, b: Params, masks: Masks | None = None, *, generator: torch.Generator,
                    restarts: int = 1, only: Collection[str] | None = None, sweeps: int = 100) -> Permutations:
    """Permutations of ``b`` that bring it closest to ``a`` over all parameters; :func:`dpkit.alignment.permute` applies them.

    Algorithm 1 of Ainsworth et al. 2022: starting from the identity, the groups of channels are visited in random order, each is
    given the best order with the others fixed, until a whole sweep gains nothing or ``sweeps`` are done. The result is a local
    optimum (the joint problem is NP-hard).

    masks: of ``a`` and of ``b``; what they remove counts as zero, whatever the tensors hold. The two may differ.
    generator: order of the groups, and random starts. The same generator state gives the same permutations; equally good
        orders (channels that are all zero) keep the one there is where they can.
    restarts: descents after the first; the best result of all is kept. 0 is the published algorithm. The first of them starts
        from one forward pass: groups are settled from the images on, each by those tensors alone whose other channels are
        settled already, which finds any permutation of ``a`` itself whose channels differ in those tensors. Later ones start
        from random permutations.
    only: groups that may move; the others keep their order. All by default.

    Raises ``ValueError`` with one line when the networks differ in tensors, have NaN weights, are not of ``model``, or when a
    mask does not fit.
    """
    if restarts < 0 or sweeps < 1:
        raise ValueError(f"restarts must be at least 0 and sweeps at least 1, got {restarts} and {sweeps}")
    problem = _Problem(model, a, b, masks, only)
    best, highest = identity(model), problem.value(identity(model))
    for run in range(1 + restarts):
        found = identity(model) if run == 0 else problem.forward() if run == 1 else problem.drawn(generator)
        *_, (found, value) = problem.descend(found, generator, sweeps)
        if value > highest + ROUNDING * problem.scale:
            best, highest = found, value
    return best


def descend(model: ModelSpec, a: Params, b: Params, masks: Masks | None = None, *, generator: torch.Generator,
            start: Permutations | None = None, only: Collection[str] | None = None,
            sweeps: int = 100) -> Iterator[tuple[Permutations, float]]:
    """One descent of :func:`weight_matching`, step by step: (permutations, their objective) at ``start`` and after each gain.

    start: identity where it says nothing. The objective never falls. Raises ``ValueError`` as :func:`weight_matching` does.
    """
    check(model, start or {})
    yield from _Problem(model, a, b, masks, only).descend(identity(model) | (start or {}), generator, sweeps)


class _Problem:
    """Two networks in float64 without what their masks remove, and the bundles of groups that may move."""

    def __init__(self, model: ModelSpec, a: Params, b: Params, masks: Masks | None, only: Collection[str] | None):
        models.check_same({"a": a, "b": b})
        self.model, self.groups = model, groups(model)
        of_a, of_b = masks or ({}, {})
        self.a, self.b = _masked("a", model, a, of_a), _masked("b", model, b, of_b)
        self.scale = norm(self.a) * norm(self.b)
        every = bundles(model)
        for name in only or ():
            if name not in self.groups or not set(next(names for names in every if name in names)) <= set(only):
                raise ValueError(f"only must name groups of {model.arch}, those that share an order together, got {name!r}; "
                                 "see models.wiring.groups")
        self.bundles = [names for names in every if only is None or names[0] in only]
        self.table = {name: places for name, places in axes(model).items() if name in a}
        self.where = {names: [(name, place) for name, places in self.table.items() for place, axis in enumerate(places)
                              if axis is not None and not set(names).isdisjoint(axis.groups)] for names in self.bundles}

    def value(self, found: Permutations) -> float:
        """The objective."""
        return dot(self.a, take(self.model, self.b, found))

    def drawn(self, generator: torch.Generator) -> Permutations:
        """Random permutations of the groups that may move."""
        moving = {name for names in self.bundles for name in names}
        return identity(self.model) | {name: order for name, order in draw(self.model, generator).items() if name in moving}

    def forward(self) -> Permutations:
        """Each bundle in forward order by those tensors alone whose other channels are settled."""
        found, settled = identity(self.model), set(self.groups) - {name for names in self.bundles for name in names}
        for names in self.bundles:
            found |= self.best(names, {name: scores for name, (scores, _, _) in self.scores(found, names, settled).items()})
            settled |= set(names)
        return found

    def descend(self, found: Permutations, generator: torch.Generator, sweeps: int) -> Iterator[tuple[Permutations, float]]:
        """(permutations, objective) at the start and after each gain."""
        value = self.value(found)
        yield found, value
        for _ in range(sweeps):
            gained = False
            for k in torch.randperm(len(self.bundles), generator=generator).tolist():
                names = self.bundles[k]
                scores = self.scores(found, names)
                better = self.best(names, {name: of for name, (of, _, _) in scores.items()})
                gain = scale = 0.0
                for name, (of, left, right) in scores.items():
                    rows = (better[name] != found[name]).nonzero().flatten()
                    new, old = better[name][rows], found[name][rows]
                    gain += float((of[rows, new] - of[rows, old]).sum())
                    scale += float((left[rows] * (right[new] + right[old])).sum())
                if gain > ROUNDING * scale:
                    found, value, gained = found | better, value + gain, True
                    yield found, value
            if not gained:
                return

    def best(self, names: Sequence[str], scores: Mapping[str, Tensor]) -> Permutations:
        """The orders with the highest sum of scores: of whole blocks, and inside each pair of blocks."""
        blocks = self.groups[names[0]].blocks
        cut = {name: of.unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1)) for name, of in scores.items()}  # (B, d, B, d)
        pairs = itertools.product(range(blocks), repeat=2)
        inner = {(i, j): {name: assignment(of[i, :, j]) for name, of in cut.items()} for i, j in pairs}
        worth = torch.zeros(blocks, blocks, dtype=torch.float64)
        for (i, j), orders in inner.items():
            worth[i, j] = sum(cut[name][i, torch.arange(len(p)), j, p].sum() for name, p in orders.items())
        order = assignment(worth)
        return {name: joined(order, [inner[i, j][name] for i, j in enumerate(order.tolist())]) for name in names}

    def scores(self, found: Permutations, names: Sequence[str],
               settled: Collection[str] | None = None) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """For each group of a bundle the worth (C, C) of putting channel j of b at place i, and the norms (C,) of both sides.

        The objective is linear in a bundle's order: no tensor has it on two axes. settled: leave out tensors with a channel of
        any other group on another axis.
        """
        result = {}
        for name in names:
            size = self.groups[name].size
            result[name] = [torch.zeros(size, size, dtype=torch.float64), *torch.zeros(2, size, dtype=torch.float64)]
        for tensor, place in self.where[tuple(names)]:
            others = [(p, axis) for p, axis in enumerate(self.table[tensor]) if axis is not None and p != place]
            if settled is not None and any(not set(axis.groups) <= set(settled) for _, axis in others):
                continue
            left, right = self.a[tensor], self.b[tensor]
            for p, axis in others:
                right = right.index_select(p, entries(axis, self.groups, found).to(right.device))
            left, right = (t.movedim(place, 0) for t in (left, right))
            axis = self.table[tensor][place]
            for name, x, y in zip(axis.groups, self.parts(left, axis), self.parts(right, axis), strict=True):
                if name in result:
                    for total, new in zip(result[name], (x @ y.T, x.square().sum(1), y.square().sum(1)), strict=True):
                        total += new.cpu()
        return {name: (worth, left.sqrt(), right.sqrt()) for name, (worth, left, right) in result.items()}

    def parts(self, tensor: Tensor, axis: Axis) -> list[Tensor]:
        """``tensor`` (all channels, ...) as one matrix (C, entries) for each group along its first axis."""
        sizes = [self.groups[name].size for name in axis.groups]
        pieces = tensor.split([size * axis.taps for size in sizes])
        return [piece.reshape(size, -1) for size, piece in zip(sizes, pieces, strict=True)]


def _masked(label: str, model: ModelSpec, params: Params, mask: Mask) -> Params:
    """The parameters of network ``label`` in float64, zero where its mask is False."""
    running = models.statistics(model)
    shapes = {name: shape for name, shape in tensor_shapes(model).items() if name not in running}
    for name in [*shapes, *params]:
        if name not in params or name not in shapes or tuple(params[name].shape) != shapes[name]:
            sides = [tuple(params[name].shape) if name in params else "nothing", shapes.get(name, "nothing")]
            raise ValueError(f"network {label} must have the parameters of {model.arch} with width {model.width}, but {name!r} "
                             f"is {sides[0]} in {label} and {sides[1]} in the architecture")
    for name, m in mask.items():
        if name not in models.prunable(model) or m.dtype != torch.bool or tuple(m.shape) != shapes[name]:
            raise ValueError(f"mask of network {label} must be boolean, over prunable weights of {model.arch} in their shapes; "
                             f"got {name!r} as {m.dtype} {tuple(m.shape)}")
    return {name: (torch.where(mask[name], t, 0) if name in mask else t).detach().double() for name, t in params.items()}
