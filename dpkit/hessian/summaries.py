"""What a spectral density says in single numbers: negative mass, effective rank, effective dimension."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpkit.hessian.density import Density
from dpkit.hessian.estimate import Estimate
from dpkit.hessian.norms import jackknife

#: shares of a rule's nodes: how far their values are off stands for what more nodes would change; several, as errors alternate
SHARES = (0.5, 0.67, 0.9)


@dataclass(frozen=True)
class NegativeMass:
    """How much of a spectrum lies below ``threshold`` (<= 0).

    share      of the eigenvalues, counted by nodes
    low, high  bounds of that share which the rules allow (:meth:`Density.below`); the truth may lie anywhere between, and
               ``share`` is no better than they are
    total      sum of these eigenvalues (<= 0), in the operator's unit
    fraction   of sum |eigenvalue|: 0 in a convex basin, 1/2 where negative and positive ones cancel
    """

    threshold: float
    share: Estimate
    low: Estimate
    high: Estimate
    total: Estimate
    fraction: Estimate


@dataclass(frozen=True)
class EffectiveRank:
    """How many eigenvalues make up a spectrum, by their sizes |lambda|; from 1 to n.

    entropy        exp(-sum p ln p) with p = |lambda| / sum |lambda| (Roy and Vetterli 2007, The effective rank: a measure of
                   effective dimensionality, definition 1; singular values of a symmetric matrix are sizes of eigenvalues)
    participation  (sum |lambda|)^2 / sum lambda^2, the same with the Renyi entropy of order 2: large eigenvalues weigh more,
                   so it is never above ``entropy``
    """

    entropy: Estimate
    participation: Estimate


def negative_mass(density: Density, threshold: float = 0.0) -> NegativeMass:
    """Share and sum of the eigenvalues below ``threshold``, each with its standard error over the directions.

    At a threshold of 0 the share is about a discontinuity. A network has most of its eigenvalues near 0, one node stands for
    thousands of them and may come out on either side: two rules for one network can give 20% and 50%, both with small standard
    errors, and only ``low`` and ``high`` say so. A threshold several distances between nodes (spectrum's width / steps, about)
    below 0 asks what the rules can answer. ``total`` and ``fraction`` suffer less, as what lies near 0 adds little, but rules of
    a few dozen nodes still miss |lambda| by more than directions differ. So their errors hold both: that of the directions
    drawn, and the largest difference to rules of fewer nodes (:data:`SHARES`, :meth:`Density.coarser`). The error of ``share``
    is that of the directions alone. Raises ``ValueError`` for a threshold above 0.
    """
    if not threshold <= 0.0:
        raise ValueError(f"threshold must be <= 0, got {threshold}; for outliers use Density.above")
    inside = density.nodes < threshold
    sums = torch.stack([(density.weights * inside).sum(1), (density.weights * density.nodes * inside).sum(1),
                        (density.weights * density.nodes.abs()).sum(1)])
    share = _mean(density, sums[0])
    low, high = density.below(threshold)

    def share_of_mass(mean: torch.Tensor) -> torch.Tensor:
        return torch.where(mean[1] > 0, -mean[0] / mean[1].clamp_min(1e-300), 0.0)

    fewer = []
    for rough in map(density.coarser, SHARES):
        below = rough.nodes < threshold
        fewer.append(torch.stack([(rough.weights * rough.nodes * below).sum(1), (rough.weights * rough.nodes.abs()).sum(1)]))
    total = _widened(_mean(density, sums[1] * density.size), [_mean(density, part[0] * density.size) for part in fewer])
    first, *others = (jackknife(part, share_of_mass, density.products) for part in (sums[1:], *fewer))
    fraction = _widened(first, others)
    return NegativeMass(threshold, share, low, high, total, fraction)


def effective_rank(density: Density) -> EffectiveRank:
    """Both effective ranks of the matrix behind ``density``; errors by the jackknife over directions and from fewer nodes.

    sum |lambda| ln |lambda|, sum |lambda| and sum lambda^2 are n times the density's means of these functions. All are
    continuous at 0, where they add nothing. At least 3 directions; raises ``ValueError`` for fewer, or for a matrix of zeros,
    which has no rank of this kind.
    """
    sizes = density.nodes.abs()
    if not bool((density.weights * sizes).any()):
        raise ValueError("an effective rank needs an eigenvalue other than 0, got none")
    # In units of the largest size, so that a flat network's tiny eigenvalues do not underflow when squared.
    unit = sizes.max()

    def sums(of: Density) -> torch.Tensor:
        sizes = of.nodes.abs() / unit
        return torch.stack([(of.weights * value).sum(1) for value in (torch.xlogy(sizes, sizes), sizes, sizes.square())])

    fewer = [sums(density.coarser(share)) for share in SHARES]

    def entropy(mean: torch.Tensor) -> torch.Tensor:
        return torch.exp((density.size * mean[1]).log() - mean[0] / mean[1])

    def participation(mean: torch.Tensor) -> torch.Tensor:
        return density.size * mean[1].square() / mean[2]

    ranks = []
    for function in (entropy, participation):
        first, *others = (jackknife(part, function, density.products) for part in (sums(density), *fewer))
        ranks.append(_widened(first, others))
    return EffectiveRank(*ranks)


def effective_dimension(density: Density, scale: float) -> Estimate:
    """sum of lambda / (lambda + scale) over the positive eigenvalues: about how many exceed ``scale`` (> 0).

    The number of directions that the data determine against a prior of precision ``scale`` (MacKay 1992, Bayesian model
    comparison and backprop nets; Maddox, Benton and Wilson 2020, Rethinking parameter counting in deep models, arXiv
    2003.02139, section 3). Written for a matrix without negative eigenvalues; here these count 0. Standard error over the
    directions. Raises ``ValueError`` unless scale > 0.
    """
    if not scale > 0.0:
        raise ValueError(f"scale must be > 0, got {scale}")
    positive = density.nodes.clamp_min(0.0)
    return _mean(density, density.size * (density.weights * positive / (positive + scale)).sum(1))


def _widened(fine: Estimate, rough: Sequence[Estimate]) -> Estimate:
    """``fine`` with the largest difference to one of the ``rough`` added to its error, in squares."""
    away = max(abs(fine.value - other.value) for other in rough)
    return Estimate(fine.value, math.hypot(fine.standard_error, away), fine.products, fine.samples)


def _mean(density: Density, samples: torch.Tensor) -> Estimate:
    return Estimate(float(samples.mean()), float(samples.std()) / len(samples)**0.5, density.products, len(samples))
