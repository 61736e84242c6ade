"""Does pruning remove the sharp directions? Curvature of removed entries and masks against top eigenvectors, beside chance.

Everything is measured at the *dense* network, whose Hessian still has the entries that a mask removes. Two levels of chance:
a random mask of the same size (*uniform*), and one of the same size in every layer (*layerwise*). Only the second tells choice of
weights from choice of layers: the classifier's entries are sharper than a wide convolution's, whatever mask one takes.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.hessian.eigenspaces import Overlap, eigenspace_overlap
from dpkit.hessian.entries import Entries, check_entries, in_deviations, random_like
from dpkit.hessian.estimate import BLOCK, Estimate, LinearOperator, probed
from dpkit.hessian.lanczos import top_eigenpairs
from dpkit.hessian.objective import Objective
from dpkit.spec import Spec


@dataclass(frozen=True)
class Removed:
    """Mean curvature, the mean of the Hessian's diagonal, over the entries that a mask removes from the dense network.

    It is also the expected Rayleigh quotient v'Hv / v'v of a random direction (isotropic) among those entries.

    removed, kept, all  over entries removed, kept (NaN where none is), and all
    chance              expected over removed entries of random masks with the same layer counts
    excess              removed - chance, from the same probes: its standard error is smaller than theirs
    spread              standard deviation over these random masks of their mean curvature, 0 where layers go whole
    spread_uniform      the same over random masks of the same total size, about ``all``
    layers              (L, 2): means over removed and kept entries of each layer, NaN where there are none
    layer_errors        (L, 2): their standard errors
    count, size         entries removed, and all of them

    Standard errors are those of the probes, the same network measured again; 0 for an exact diagonal.
    """

    removed: Estimate
    kept: Estimate
    all: Estimate
    chance: Estimate
    excess: Estimate
    spread: float
    spread_uniform: float
    layers: Tensor
    layer_errors: Tensor
    count: int
    size: int

    @property
    def score(self) -> float:
        """The excess in standard deviations of what random masks and probes do: above 0, the mask removes sharp entries."""
        return in_deviations(self.excess.value, math.hypot(self.spread, self.excess.standard_error))


def removed_curvature(op: LinearOperator, masks: Mapping[str, Entries], probes: int,
                      generator: torch.Generator) -> dict[str, Removed]:
    """:class:`Removed` of each mask from the same ``probes`` products, so that differences between masks are paired.

    A probe v of signs gives v_i (Hv)_i, an unbiased estimate of entry i of the diagonal (Bekas, Kokiopoulou and Saad 2007); means
    over groups are taken probe by probe and their standard errors over probes. The spread over random masks needs the variance
    of the true diagonal within a layer: that of the estimates less the mean of their squared standard errors, at least 0.

    op at the dense network; probes at least 2; CPU generator. Raises ``ValueError`` on masks that do not fit the operator or
    remove nothing.
    """
    check_entries(masks, op.size)
    sums: dict[str, list[Tensor]] = {name: [] for name in masks}
    total, squares = torch.zeros(2, op.size, dtype=torch.float64)
    for block in probed(op, probes, generator):
        samples = block.double().cpu()
        total += samples.sum(1)
        squares += samples.square().sum(1)
        for name, mask in masks.items():
            sums[name].append(_grouped(samples, mask))
    mean = total / probes
    noise = (squares / probes - mean.square()).clamp_min(0) / (probes - 1)
    return {name: _removed(torch.cat(sums[name], 1), mask, mean, noise, probes) for name, mask in masks.items()}


def removed_from_diagonal(diagonal: Tensor, masks: Mapping[str, Entries]) -> dict[str, Removed]:
    """The same from an exact diagonal (n,): no standard errors, no products. Raises as :func:`removed_curvature`."""
    check_entries(masks, len(diagonal))
    values = diagonal.double().cpu()
    return {name: _removed(_grouped(values[:, None], mask), mask, values, torch.zeros_like(values), 0)
            for name, mask in masks.items()}


def _grouped(samples: Tensor, mask: Entries) -> Tensor:
    """(2 L, s): sums of samples (n, s) over the removed entries of each layer and, in odd rows, over its kept ones."""
    group = 2 * mask.layers + mask.kept
    return samples.new_zeros(2 * (int(mask.layers.max()) + 1), samples.shape[1]).index_add(0, group, samples)


def _removed(sums: Tensor, mask: Entries, diagonal: Tensor, noise: Tensor, products: int) -> Removed:
    counts = torch.bincount(2 * mask.layers + mask.kept, minlength=len(sums)).double()
    gone, sizes = counts[0::2], counts[0::2] + counts[1::2]
    out = gone.sum()

    def estimate(samples: Tensor) -> Estimate:
        error = float(samples.std()) / math.sqrt(len(samples)) if products else 0.0
        return Estimate(float(samples.mean()), error, products, products or None)

    by_layer = sums[0::2] + sums[1::2]
    removed, kept = sums[0::2].sum(0) / out, sums[1::2].sum(0) / (len(diagonal) - out)
    chance = (by_layer * (gone / sizes.clamp_min(1))[:, None]).sum(0) / out
    means = sums / counts[:, None]
    errors = means.std(1) / math.sqrt(means.shape[1]) if products else torch.where(counts > 0, 0.0, math.nan)
    layerwise = sum(float(gone[i] * (1 - gone[i] / sizes[i])) * _variance(diagonal[here], noise[here])
                    for i in range(len(gone)) if (here := mask.layers == i).any())
    uniform = float(out * (1 - out / len(diagonal))) * _variance(diagonal, noise)
    return Removed(estimate(removed), estimate(kept), estimate(by_layer.sum(0) / len(diagonal)), estimate(chance),
                   estimate(removed - chance), math.sqrt(layerwise) / float(out), math.sqrt(uniform) / float(out),
                   means.mean(1).view(-1, 2), errors.view(-1, 2), int(out), len(diagonal))


def _variance(values: Tensor, noise: Tensor) -> float:
    """Of a finite population, divisor n - 1, less the variance of the errors of its members."""
    return max(float(values.var() - noise.mean()), 0.0) if len(values) > 1 else 0.0


class Removal(NamedTuple):
    """Setting the removed weights to 0, a move by d from the dense network, beside random masks with the same layer counts.

    quotient     d'Hd / d'd: curvature along the move, whatever its length
    linear       g'd, nats: what the gradient predicts
    quadratic    d'Hd / 2, nats: what the curvature adds (LeCun et al. 1990, Optimal Brain Damage, equation 1)
    rise         nats: what the loss does
    random       (draws, 4): the same four of each random mask
    products     with the Hessian
    """

    quotient: float
    linear: float
    quadratic: float
    rise: float
    random: Tensor
    products: int


def removal(op: LinearOperator, loss: Objective, mask: Entries, draws: int, generator: torch.Generator) -> Removal:
    """:class:`Removal` of one mask against ``draws`` random ones (0 or more).

    op, loss: of the same dense network and images. Unlike mean curvature this is one direction, that of the weights as they
    are; magnitude pruning makes it short, so compare quotients for sharpness and rises for damage. Costs one product and one
    forward pass a mask. Raises ``ValueError`` where mask, operator and loss differ in size, nothing or only zeros are removed, or
    draws are negative.
    """
    check_entries({"given": mask}, op.size)
    weights = loss.weights
    if len(weights) != op.size:
        raise ValueError(f"operator and loss must be of one network, got {op.size} and {len(weights)} entries")
    if draws < 0:
        raise ValueError(f"draws must be >= 0, got {draws}")
    value, slope = loss.gradient(weights)
    kept = [mask.kept, *(random_like(mask, generator) for _ in range(draws))]
    rows = []
    for start in range(0, len(kept), BLOCK):
        moves = torch.stack([torch.where(k.to(weights.device), 0.0, -weights) for k in kept[start:start + BLOCK]], 1)
        images = op.matmat(moves.to(op.device, op.dtype)).double()
        for move, image in zip(moves.double().T, images.to(moves.device).T, strict=True):
            length, bent = float(move @ move), float(move @ image)
            if length == 0:
                raise ValueError("the removed weights must not all be 0, got a move of length 0; measure at the dense network")
            rise = loss.value(weights + move.to(weights)) - value
            rows.append((bent / length, float(slope.double() @ move), bent / 2, rise))
    return Removal(*rows[0], torch.tensor(rows[1:], dtype=torch.float64).view(-1, 4), len(kept))


def per_weight(total: Estimate, size: int) -> Estimate:
    """A sum over entries, such as a trace, for each of ``size`` surviving weights: comparable between sparsities.

    Raises ``ValueError`` unless size is at least 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 surviving weight, got {size}")
    return Estimate(total.value / size, total.standard_error / size, total.products, total.samples)


@dataclass(frozen=True, kw_only=True)
class SparseSpec(Spec):
    """Settings of :func:`answers`: fixed images and dtype as in HessianSpec; probes (at least 2) for the diagonal; the
    ``directions`` top eigenvectors by ``lanczos_steps`` products; ``draws`` random masks for the move along the weights."""

    images: int = 500
    dtype: str = "float32"
    probes: int = 100
    directions: int = 10
    lanczos_steps: int = 60
    draws: int = 20

    def check(self) -> None:
        self.require(self.images >= 1, f"images must be >= 1, got {self.images}")
        self.one_of("dtype", ("float32", "float64"))
        self.require(self.probes >= 2, f"probes must be >= 2 to give an error bar, got {self.probes}")
        self.require(1 <= self.directions <= self.lanczos_steps,
                     f"directions must lie in [1, {self.lanczos_steps}] (lanczos_steps), got {self.directions}")
        self.require(self.draws >= 0, f"draws must be >= 0, got {self.draws}")


class Answers(NamedTuple):
    """What one mask removes from the dense network."""

    curvature: Removed
    move: Removal
    overlap: Overlap


def answers(spec: SparseSpec, op: LinearOperator, loss: Objective, masks: Mapping[str, Entries],
            generator: torch.Generator) -> tuple[dict[str, Answers], Tensor, Tensor]:
    """All of them, by mask, with the eigenvalues (k,) that were taken for the top and the residuals (k,) that bound their error.

    A Ritz vector whose residual is not small against the gap to the next eigenvalue is a mixture; the whole space is better
    known than its vectors. Raises as the parts do.
    """
    curvature = removed_curvature(op, masks, spec.probes, generator)
    pairs = top_eigenpairs(op, spec.directions, spec.lanczos_steps, generator)
    found = {name: Answers(curvature[name], removal(op, loss, mask, spec.draws, generator),
                           eigenspace_overlap(pairs.vectors, mask)) for name, mask in masks.items()}
    return found, pairs.values, pairs.residuals
