"""Products spent until the error bar is as small as asked for."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from dpkit.hessian.deflate import sketch
from dpkit.hessian.estimate import Estimate, LinearOperator
from dpkit.hessian.trace import trace


@dataclass(frozen=True)
class Targeted:
    """A trace measured to a target error.

    estimate  of the second stage alone; its products are all that were spent, sketch and pilot included
    pilot     the estimate that decided how many probes the second stage takes; not part of ``estimate``
    target    standard error asked for, in the unit of the trace
    planned   probes that the pilot asked for in the second stage; more than ``estimate.samples`` where ``most`` forbade it
    reached   whether the standard error found is at most ``target``
    """

    estimate: Estimate
    pilot: Estimate
    target: float
    planned: int
    reached: bool


def to_error(op: LinearOperator, target: float, most: int, generator: torch.Generator, *, relative: bool = True,
             columns: int = 0, pilot: int = 16, caution: float = 0.9) -> Targeted:
    """tr(H) to a target standard error, in two stages that do not see each other's probes.

    A rule that looks at its own samples and stops once their error is small stops more readily after samples that agree by
    chance, and those go with small values where few eigenvalues dominate: the mean is then biased downwards and its error bar
    too small (by how much: :func:`trace`, ``target``). A rule that waits for the mean to be quiet does not look at an error at
    all. Here a pilot estimates the variance s^2 of one probe, the number of probes that the target asks for follows from it
    (the first stage of Stein 1945, A two-sample test for a linear hypothesis whose power is independent of the variance), and
    the value and its standard error come from fresh probes only. Given their number they are independent of how it was found,
    so the mean is unbiased and the Student interval of ``estimate`` as good as with a fixed number of probes. The pilot's
    products are the price.

    op         symmetric operator (n, n)
    target     standard error wanted, > 0: a share of the pilot's |mean| if ``relative``, else in the unit of the trace
    most       most products to spend in all, at least 2 (columns + pilot). Where they do not suffice, all are spent and
               ``reached`` is False
    generator  CPU generator
    columns    of a sketch whose range is taken out first (:func:`hutch_plus_plus`), two products each; 0: Hutchinson's
    pilot      probes of the first stage, at least 4, and the fewest of the second: the error bar of fewer is itself not known
    caution    the plan uses the upper confidence bound of the variance at this level, (pilot - 1) s^2 / chi^2, in [0.5, 1): about
               how often the target is reached if samples are normal. 0.5 plans with s^2 itself, about, and misses every second
               time; the larger, the more probes, 1.8 times as many at 0.9 and a pilot of 16

    Raises ``ValueError`` outside these ranges.
    """
    if not (target > 0.0 and math.isfinite(target)):
        raise ValueError(f"target must be a standard error > 0, got {target}; give probes to trace to spend a fixed number")
    if pilot < 4 or not 0.5 <= caution < 1.0:
        raise ValueError(f"pilot must be >= 4 and caution lie in [0.5, 1), got {pilot} and {caution}")
    if most < 2 * (columns + pilot):
        raise ValueError(f"most must be >= {2 * (columns + pilot)} products (sketch, pilot and as many probes), got {most}")
    rest = sketch(op, columns, generator)
    first = trace(rest, pilot, generator)
    guess = rest.completed(first)
    wanted = target * abs(guess.value) if relative else target
    variance = first.standard_error**2 * pilot * (pilot - 1) / chi_square_quantile(1.0 - caution, pilot - 1)
    allowed = most - guess.products
    # A trace of 0 has no relative error: everything is spent, unless there is no error to make small.
    needed = variance / wanted**2 if wanted > 0.0 else math.inf if variance > 0.0 else 0.0
    planned = max(pilot, math.ceil(min(needed, 2.0**62)))
    found = rest.completed(trace(rest, min(planned, allowed), generator))
    found = replace(found, products=pilot + found.products)
    return Targeted(found, guess, wanted, planned, found.standard_error <= wanted)


def chi_square_quantile(level: float, freedom: int) -> float:
    """The quantile of chi-square by Wilson and Hilferty (1931): within 2% from 3 degrees of freedom on for levels 0.1 to 0.95.

    level in (0, 1), freedom at least 1. Raises ``ValueError`` outside.
    """
    if not 0.0 < level < 1.0 or freedom < 1:
        raise ValueError(f"level must lie in (0, 1) and freedom be >= 1, got {level} and {freedom}")
    spread = 2.0 / (9.0 * freedom)
    return freedom * max(0.0, 1.0 - spread + NormalDist().inv_cdf(level) * math.sqrt(spread))**3
