"""A measured path, and how points are added to one where its peak is not known well enough."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dpkit.barriers import barrier, barrier_linear, excess, is_stable, possible_rise
from dpkit.tree import Params, lerp


@dataclasses.dataclass(frozen=True)
class Path:
    """Error (fraction in [0, 1]) and mean cross-entropy (nats) at ``alphas``; three float64 tensors (T,).

    alpha 0 is the first network, alpha 1 the second.
    """

    alphas: Tensor
    errors: Tensor
    losses: Tensor

    @property
    def error_barrier(self) -> float:
        """:func:`barrier` of the errors, a fraction: 0.02 is two points."""
        return barrier(self.errors)

    @property
    def loss_barrier(self) -> float:
        """:func:`barrier` of the losses, nats."""
        return barrier(self.losses)

    @property
    def error_barrier_linear(self) -> float:
        """:func:`barrier_linear` of the errors, a fraction."""
        return barrier_linear(self.alphas, self.errors)

    @property
    def loss_barrier_linear(self) -> float:
        """:func:`barrier_linear` of the losses, nats."""
        return barrier_linear(self.alphas, self.losses)

    @property
    def stable(self) -> bool:
        """:func:`is_stable` of the error barrier: under two points, the rule of Frankle et al."""
        return is_stable(self.error_barrier)

    @property
    def error_gap(self) -> float:
        """By how much the error barriers may be too low, a fraction: the largest :func:`possible_rise` of either definition."""
        return self._gap(self.errors)

    @property
    def loss_gap(self) -> float:
        """By how much the loss barriers may be too low, nats."""
        return self._gap(self.losses)

    def joined(self, other: Path) -> Path:
        """The points of both, in the order of their alphas. Raises ``ValueError`` where both have the same alpha."""
        alphas = torch.cat([self.alphas, other.alphas])
        order = torch.argsort(alphas, stable=True)
        twice = alphas[order][1:][alphas[order].diff() == 0]
        if len(twice):
            raise ValueError(f"paths to be joined must have different points, but both have alpha {float(twice[0]):g}; "
                             f"leave it out of one of them")
        return Path(alphas[order], torch.cat([self.errors, other.errors])[order], torch.cat([self.losses, other.losses])[order])

    def _gap(self, values: Tensor) -> float:
        return max(float(possible_rise(self.alphas, heights).max()) for heights in (values, excess(self.alphas, values)))


def along(a: Params, b: Params, alphas: Tensor, evaluate: Callable[[Params], tuple[float, float]]) -> Path:
    """Evaluate ``(1 - alpha) a + alpha b`` at each of ``alphas`` (T,).

    evaluate: parameters -> (error, loss). The ends are ``a`` and ``b`` themselves, bit for bit, at alpha 0
    and 1.
    """
    alphas = torch.as_tensor(alphas, dtype=torch.float64)
    values = [evaluate(lerp(a, b, alpha)) for alpha in alphas.tolist()]
    errors, losses = torch.tensor(values, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return Path(alphas, errors, losses)


def refine(found: Path, evaluate: Callable[[Tensor], Path], *, error_tolerance: float = 0.0, loss_tolerance: float = 0.0,
           most_points: int = 101) -> Path:
    """``found`` with points added around its peaks until its barriers are known to the tolerances; all points, old and new.

    evaluate: alphas (K,), none of which was measured before, to the path at them; called once a round.
    error_tolerance (a fraction), loss_tolerance (nats): the barrier of either definition may be too low by at most this much,
        under the assumption of :func:`possible_rise`; :attr:`Path.error_gap` and :attr:`Path.loss_gap` say what is left. 0 leaves
        that curve as it is. An error is a count of N images: below 2 / N its steps are all that is left to find.
    most_points: of the result; where they do not suffice, the intervals that could rise highest get them.

    Each round halves the intervals next to a highest point that could rise by more than the tolerance. Near a smooth peak their
    rise falls to a quarter from round to round.
    Raises ``ValueError`` when the path has NaN or does not run from 0 to 1.
    """
    while True:
        room = most_points - len(found.alphas)
        wanted: dict[float, float] = {}
        for values, tolerance in ((found.errors, error_tolerance), (found.losses, loss_tolerance)):
            if tolerance > 0:
                for heights in (values, excess(found.alphas, values)):
                    _add_wanted(wanted, found.alphas, possible_rise(found.alphas, heights) / tolerance)
        new = sorted(sorted(wanted, key=lambda alpha: (-wanted[alpha], alpha))[:max(room, 0)])
        if not new:
            return found
        found = found.joined(evaluate(torch.tensor(new, dtype=torch.float64)))


def _add_wanted(wanted: dict[float, float], alphas: Tensor, urgency: Tensor) -> None:
    """Middle of each interval whose urgency (T - 1,) is over 1, with the greatest urgency that it had so far."""
    for i in (urgency > 1).nonzero().flatten().tolist():
        low, high = float(alphas[i]), float(alphas[i + 1])
        middle = (low + high) / 2
        if low < middle < high:
            wanted[middle] = max(wanted.get(middle, 0.0), float(urgency[i]))
