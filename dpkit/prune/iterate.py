"""Iterative magnitude pruning: train, prune, rewind, repeat (Frankle and Carbin 2019, arXiv 1803.03635).

The same loop serves every arm of the study. Traditional IMP searches with real data and rewinds to initialisation;
lottery-ticket rewinding (Frankle et al. 2020, arXiv 1912.05671) rewinds to an early step; distilled pruning (McDermott and
Cummings 2023, arXiv 2307.03364) searches with distilled data. Only what ``fit`` trains on differs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpkit.prune import masks
from dpkit.spec import Spec
from dpkit.tree import Buffers, Mask, Params

SCOPES = ("all", "weights")


@dataclass(frozen=True, kw_only=True)
class PruneSpec(Spec):
    """fraction: share of the surviving weights that a round removes, in (0, 1). rounds: how many.

    scope: what rewinding resets. ``all``: every parameter and buffer. ``weights``: the prunable weights only, so that
    biases, norm scales and shifts and running statistics stay as trained; the form in the authors' code.
    """

    fraction: float = 0.2
    rounds: int = 10
    scope: str = "all"

    def check(self) -> None:
        masks.check_fraction(self.fraction)
        self.require(self.rounds >= 1, f"rounds must be >= 1, got {self.rounds}")
        self.one_of("scope", SCOPES)

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


def rewind(trained: tuple[Params, Buffers], start: tuple[Params, Buffers], mask: Mask, round: int,
           scope: str = "all") -> Ticket:
    """The ticket that starts from ``start`` with ``mask``; see :class:`PruneSpec` for ``scope``."""
    if scope == "all":
        params, buffers = dict(start[0]), dict(start[1])
    elif scope == "weights":
        params = {name: start[0][name] if name in mask else t for name, t in trained[0].items()}
        buffers = dict(trained[1])
    else:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    return Ticket(masks.apply(params, mask), buffers, mask, round)


def next_ticket(spec: PruneSpec, ticket: Ticket, trained: tuple[Params, Buffers], start: tuple[Params, Buffers]) -> Ticket:
    """One round: prune the trained weights by magnitude and rewind the survivors."""
    mask = masks.prune(masks.magnitude(trained[0], ticket.mask), ticket.mask, spec.fraction)
    return rewind(trained, start, mask, ticket.round + 1, spec.scope)


def iterate(spec: PruneSpec, fit: Callable[[Ticket], tuple[Params, Buffers]], start: tuple[Params, Buffers],
            mask: Mask) -> Iterator[Ticket]:
    """Yield the ticket of each round, 1 to ``rounds``. fit: trains a ticket and returns parameters and buffers.

    start: where survivors are rewound to. mask: what to begin with; a sparse one continues another search.
    """
    ticket = Ticket(masks.apply(start[0], mask), start[1], mask, 0)
    for _ in range(spec.rounds):
        ticket = next_ticket(spec, ticket, fit(ticket), start)
        yield ticket
