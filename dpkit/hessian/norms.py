"""Trace and Frobenius norm from the same products, and what follows from the two."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.hessian.checks import check_whole
from dpkit.hessian.estimate import Estimate, LinearOperator, rademacher
from dpkit.hessian.trace import mean_estimate


class Moments(NamedTuple):
    """First two moments of a spectrum, each with its standard error.

    trace          tr(H), the sum of the eigenvalues
    square         ||H||_F^2 = tr(H^2), the sum of their squares
    frobenius      its root
    participation  tr(H)^2 / tr(H^2): n where all eigenvalues are equal, 1 where one is all there is; small, too, where positive
                   and negative ones cancel (:func:`dpkit.hessian.summaries.effective_rank` takes their sizes)
    """

    trace: Estimate
    square: Estimate
    frobenius: Estimate
    participation: Estimate


def moments(op: LinearOperator, probes: int, generator: torch.Generator, block: int = 8) -> Moments:
    """tr(H) and ||H||_F^2 by the means of v'Hv and ||Hv||^2 over sign vectors v, one product each for both.

    Both are unbiased; the second has variance 2 sum_{i != j} (H^2)_ij^2 a probe. Root and ratio are those of the means,
    corrected to first order by the jackknife (:func:`jackknife`), and need more than a few probes.

    op symmetric (n, n); probes at least 3; CPU generator; ``block`` of them, at least 1, are multiplied together. Raises
    ``ValueError`` outside these ranges.
    """
    check_whole(probes=probes, block=block)
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    if probes < 3:
        raise ValueError(f"probes must be >= 3 to give an error bar of a ratio, got {probes}")
    first, second = [], []
    for start in range(0, probes, block):
        signs = torch.stack([rademacher(op, generator) for _ in range(min(block, probes - start))], dim=1)
        images = op.matmat(signs)
        first.append((signs * images).sum(0, dtype=torch.float64).cpu())
        second.append(images.square().sum(0, dtype=torch.float64).cpu())
    samples = torch.stack([torch.cat(first), torch.cat(second)])
    return Moments(mean_estimate(samples[0]), mean_estimate(samples[1]),
                   jackknife(samples[1:], lambda mean: mean[0].sqrt(), probes),
                   jackknife(samples, lambda mean: _ratio(mean[0].square(), mean[1]), probes))


def jackknife(samples: Tensor, function: Callable[[Tensor], Tensor], products: int) -> Estimate:
    """A function of means, from samples (q, s) of q quantities in s independent draws.

    ``function`` maps means (q, ...) to values (...). With f all draws and f_i all but the i-th: value s f - (s - 1) mean f_i,
    free of the bias of order 1/s, and standard error sqrt((s - 1) / s sum (f_i - mean f_i)^2) (Efron and Tibshirani 1993, An
    introduction to the bootstrap, chapters 10 and 11). ``products`` is handed on. Raises ``ValueError`` for fewer than 3 draws.
    """
    count = samples.shape[1]
    if count < 3:
        raise ValueError(f"a jackknife needs at least 3 independent draws, got {count}")
    samples = samples.double()
    total = samples.sum(1)
    whole = function(total / count)
    without = function((total[:, None] - samples) / (count - 1))
    centre = without.mean()
    error = math.sqrt((count - 1) / count * float((without - centre).square().sum()))
    return Estimate(float(count * whole - (count - 1) * centre), error, products, count)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where both are 0: a matrix of zeros has no direction that takes part."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
