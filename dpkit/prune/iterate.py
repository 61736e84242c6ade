"""Iterative magnitude pruning: train, prune, rewind, repeat (Frankle and Carbin 2019, arXiv 1803.03635).

The same loop serves every arm of the study. Traditional IMP searches with real data and rewinds to initialisation;
lottery-ticket rewinding (Frankle et al. 2020, arXiv 1912.05671) rewinds to an early step; distilled pruning (McDermott and
Cummings 2023, arXiv 2307.03364) searches with distilled data. Only what ``fit`` trains on differs. Other scores than magnitude
(:mod:`dpkit.prune.scores`) and cuts in one shot go through the same functions.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpkit import models
from dpkit.models.layers import Norm
from dpkit.models.network import family
from dpkit.prune import allocation, masks
from dpkit.spec import Spec, later
from dpkit.tree import Buffers, Mask, Params

SCOPES = ("all", "weights", "norm_only")
Network = tuple[Params, Buffers]
Score = Callable[[Network, Mask], Params]


@dataclass(frozen=True, kw_only=True)
class PruneSpec(Spec):
    """fraction: share of the surviving weights that a round removes, in (0, 1). rounds: how many.

    scope: what rewinding resets. ``all``: every parameter and buffer. ``weights``: the prunable weights only, so that
    biases, norm scales and shifts and running statistics stay as trained; the form in the authors' code. ``norm_only``: all
    but the norms, whose scales, shifts and running statistics stay as trained (a transplant of the norms alone).

    allocation: which tensors the removed weights come from. ``global``: one ranking over all tensors. ``layerwise``: the
    same share of each. ``erk``: Erdos-Renyi-Kernel densities; see :func:`dpkit.prune.allocation.counts`.

    spare: layers that stay dense, among ``first`` and ``last`` (the classifier). They count in every total, so a round leaves
    as many weights as without them.
    """

    fraction: float = 0.2
    rounds: int = 10
    scope: str = "all"
    allocation: str = later("global", before="global")
    spare: tuple[str, ...] = later((), before=())

    def check(self) -> None:
        masks.check_fraction(self.fraction)
        self.require(self.rounds >= 1, f"rounds must be >= 1, got {self.rounds}")
        self.one_of("scope", SCOPES)
        self.one_of("allocation", allocation.ALLOCATIONS)
        wrong = [word for i, word in enumerate(self.spare) if word not in allocation.SPARES or word in self.spare[:i]]
        self.require(not wrong, f"spare must name {' or '.join(allocation.SPARES)}, each at most once; "
                     f"got {', '.join(self.spare)}")
        # one set of layers, one key
        object.__setattr__(self, "spare", tuple(word for word in allocation.SPARES if word in self.spare))

    def sparsity(self, round: int, total: int) -> float:
        """Share of ``total`` weights removed after ``round`` rounds, in [0, 1)."""
        return 1 - masks.survivors(total, self.fraction, round)[-1] / total


@dataclass(frozen=True)
class Ticket:
    """A subnetwork ready to train: parameters (removed weights are zero), buffers, mask, and the round that made it."""

    params: Params
    buffers: Buffers
    mask: Mask
    round: int


def norm_names(model: models.ModelSpec) -> tuple[str, ...]:
    """Names of all norm scales and shifts, by the table of the architecture; none for a network without norms."""
    norms = (layer for layer in family(model).table(model) if isinstance(layer, Norm))
    return tuple(name for norm in norms for name in norm.shapes())


def rewind(trained: Network, start: Network, mask: Mask, round: int, scope: str = "all", *,
           model: models.ModelSpec | None = None) -> Ticket:
    """The ticket that starts from ``start`` with ``mask``; see :class:`PruneSpec` for ``scope``.

    model: the architecture, which ``norm_only`` needs to tell norms from biases. Raises ``ValueError`` where it is missing, or
    where it has no norms, so that nothing would differ from ``all``.
    """
    if scope == "all":
        params, buffers = dict(start[0]), dict(start[1])
    elif scope == "weights":
        params = {name: start[0][name] if name in mask else t for name, t in trained[0].items()}
        buffers = dict(trained[1])
    elif scope == "norm_only":
        norms = norm_names(_needed(model, "scope norm_only"))
        if not norms:
            raise ValueError(f"scope norm_only needs a network with norms, got {model.arch} with norm {model.norm_kind}; use all")
        params, buffers = start[0] | {name: trained[0][name] for name in norms}, dict(trained[1])
    else:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    return Ticket(masks.apply(params, mask), buffers, mask, round)


def magnitude_score(trained: Network, mask: Mask) -> Params:
    """The score of iterative magnitude pruning, :func:`dpkit.prune.masks.magnitude`."""
    return masks.magnitude(trained[0], mask)


def select(spec: PruneSpec, scores: Params, mask: Mask, count: int, *, model: models.ModelSpec | None = None) -> Mask:
    """The mask that keeps ``count`` of the weights in ``mask`` by ``scores``, as the allocation and ``spare`` of ``spec`` say.

    model: the architecture; needed where layers are spared. Raises ``ValueError`` as :func:`dpkit.prune.allocation.keep` does.
    """
    names = allocation.spared(_needed(model, "spare"), spec.spare) if spec.spare else ()
    return allocation.keep(scores, mask, count, spec.allocation, names)


def next_ticket(spec: PruneSpec, ticket: Ticket, trained: Network, start: Network, *, model: models.ModelSpec | None = None,
                score: Score = magnitude_score, count: int | None = None) -> Ticket:
    """One round: score the trained weights, remove the lowest and rewind the survivors.

    score: function of (trained network, mask) that gives a number for each prunable weight; the highest are kept.
    count: weights to keep, for a cut in one shot; None removes the specification's fraction of what survives. model: the
    architecture, where the specification spares layers or rewinds all but norms. Raises ``ValueError`` where nothing
    would be left.
    """
    left = masks.surviving(ticket.mask)
    if count is None:
        count = masks.survivors(left, spec.fraction, 1)[1]
        if count < 1:
            raise ValueError(f"a round must leave at least 1 weight, but fraction {spec.fraction:g} of {left} removes all; "
                             "take fewer rounds or a smaller fraction")
    mask = select(spec, score(trained, ticket.mask), ticket.mask, count, model=model)
    return rewind(trained, start, mask, ticket.round + 1, spec.scope, model=model)


def iterate(spec: PruneSpec, fit: Callable[[Ticket], Network], start: Network, mask: Mask, *,
            model: models.ModelSpec | None = None, score: Score = magnitude_score) -> Iterator[Ticket]:
    """Yield the ticket of each round, 1 to ``rounds``. fit: trains a ticket and returns parameters and buffers.

    start: where survivors are rewound to. mask: what to begin with; a sparse one continues another search. model, score: as
    for :func:`next_ticket`.
    """
    ticket = Ticket(masks.apply(start[0], mask), start[1], mask, 0)
    for _ in range(spec.rounds):
        ticket = next_ticket(spec, ticket, fit(ticket), start, model=model, score=score)
        yield ticket


def _needed(model: models.ModelSpec | None, what: str) -> models.ModelSpec:
    if model is None:
        raise ValueError(f"{what} needs the architecture to name layers, got none; pass model=")
    return model
