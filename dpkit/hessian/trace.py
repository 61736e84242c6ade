"""Trace by random probes."""
from __future__ import annotations

import math

import torch

from dpkit.hessian.estimate import Estimate, LinearOperator, probed


def trace(op: LinearOperator, probes: int, generator: torch.Generator, *, target: float = 0.0,
          minimum: int = 10) -> Estimate:
    """Hutchinson's estimate of tr(H): the mean of v'Hv over sign vectors v.

    With Rademacher signs the estimate is unbiased and one probe has variance 2 sum_{i != j} H_ij^2, the
    smallest among probes with independent entries (Hutchinson 1990, A stochastic estimator of the trace of
    the influence matrix; Avron and Toledo 2011). A diagonal matrix is therefore exact after one probe.

    op         symmetric operator (n, n)
    probes     most probes to spend, at least 2
    generator  CPU generator
    target     0 spends all probes; otherwise stop once standard error <= target x |mean|, looked at after
               every block of 8 probes. The rule asks for a small error bar, never for a mean that has ceased
               to move: a mean over k probes moves by 1/k of its deviation whether or not it is near the
               truth.
    minimum    probes before the first look, at least 2. A small error bar goes with a small mean where one
               eigenvalue dominates, so stopping early biases the trace downwards: simulated with half of it
               in one eigenvalue and target 0.1, by 5% at minimum 2, 3% at 10 and 2% at 24, by 0.1% at target
               0.02; not measurably for spread spectra. For a published number spend all probes, or let a
               pilot decide how many (:func:`dpkit.hessian.stopping.to_error`), which has no such bias.

    Returns the mean, its standard error (deviation over probes / sqrt(probes)) and the products spent.
    Raises ``ValueError`` for fewer than 2 probes, a target outside [0, 1) or a minimum below 2.
    """
    if not 0.0 <= target < 1.0:
        raise ValueError(f"target must lie in [0, 1), got {target}")
    if minimum < 2:
        raise ValueError(f"minimum must be >= 2 to give an error bar, got {minimum}")
    quadratic = torch.empty(0, dtype=torch.float64)
    for samples in probed(op, probes, generator):
        quadratic = torch.cat([quadratic, samples.sum(0, dtype=torch.float64).cpu()])
        estimate = mean_estimate(quadratic)
        if target > 0.0 and len(quadratic) >= minimum and estimate.relative_error <= target:
            break
    return estimate


def mean_estimate(samples: torch.Tensor) -> Estimate:
    """Mean and standard error of at least two independent samples (s,), one product each."""
    count = len(samples)
    error = float(samples.std()) / math.sqrt(count)
    return Estimate(float(samples.mean()), error, products=count, samples=count)
