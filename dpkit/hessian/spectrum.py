"""One network's spectrum by several measures that share their products."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit.hessian.block_lanczos import block_eigenpairs
from dpkit.hessian.deflate import deflated_trace_and_diagonal
from dpkit.hessian.density import Density, spectral_density
from dpkit.hessian.estimate import Estimate, LinearOperator
from dpkit.hessian.lanczos import Eigenpairs, top_eigenvalue
from dpkit.hessian.norms import moments
from dpkit.hessian.summaries import EffectiveRank, NegativeMass, effective_rank, negative_mass
from dpkit.hessian.trace import trace
from dpkit.spec import Spec

POINTS = 400  # of a density's curve
CONVERGED = 0.01  # a pair counts as known where its residual is within this share of its eigenvalue


@dataclass(frozen=True, kw_only=True)
class SpectrumSpec(Spec):
    """How a spectrum is measured; fixed images and dtype as in ``HessianSpec``.

    eigenvalues    pairs of largest size to look for, by ``pair_products`` products in all
    pair_products  at least as many
    probes         random directions of the density, at least 3; steps: products along each
    trace_probes   sign vectors for the trace of what the pairs leave, at least 3; also for the Frobenius norm
    other_probes   sign vectors for the traces of the Gauss-Newton matrix and of the empirical Fisher, at least 2; other_steps:
                   products for the top eigenvalue of the former
    """

    images: int = 500
    dtype: str = "float32"
    eigenvalues: int = 10
    pair_products: int = 60
    probes: int = 10
    steps: int = 40
    trace_probes: int = 20
    other_probes: int = 10
    other_steps: int = 15

    def check(self) -> None:
        self.require(self.images >= 1, f"images must be >= 1, got {self.images}")
        self.one_of("dtype", ("float32", "float64"))
        self.require(1 <= self.eigenvalues <= self.pair_products,
                     f"eigenvalues must lie in [1, {self.pair_products}] (pair_products), got {self.eigenvalues}")
        for name, least in (("probes", 3), ("trace_probes", 3), ("other_probes", 2), ("steps", 1), ("other_steps", 1)):
            self.require(getattr(self, name) >= least, f"{name} must be >= {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Spectrum:
    """What :func:`spectrum` finds. pairs: of largest size, those that did not converge included; density rests on those that did.

    gauss_newton, gauss_newton_top, fisher: trace and top eigenvalue of the generalised Gauss-Newton matrix, trace of the
    empirical Fisher. size: entries. products: of all three matrices together.
    """

    pairs: Eigenpairs
    density: Density
    trace: Estimate
    frobenius: Estimate
    negative: NegativeMass
    rank: EffectiveRank
    gauss_newton: Estimate
    gauss_newton_top: Estimate
    fisher: Estimate
    size: int
    products: int


def spectrum(spec: SpectrumSpec, operator: Callable[[str], LinearOperator], generator: torch.Generator) -> Spectrum:
    """Eigenvalues, density, trace, norm, negative mass and rank of the Hessian, and what of it the other two matrices hold.

    operator: the name of a matrix (``hessian``, ``gauss_newton``, ``empirical_fisher``) to its operator at one network; called
    once for each, so that only one holds its graphs at a time. The eigenpairs of largest size are found first; what converged is
    taken out of the matrix exactly, and probes see the rest only (:mod:`dpkit.hessian.deflate`). Where there are fewer entries
    than products are asked for, as many as there are entries are spent, and where there are no more entries than ``eigenvalues``
    all of them are found: trace and density are then exact, up to the products' rounding. Raises ``ValueError`` as the parts do.
    """
    op = operator("hessian")
    wanted = min(spec.eigenvalues, op.size)
    pairs = block_eigenpairs(op, wanted, min(max(spec.pair_products, wanted), op.size), generator, which="magnitude", block=1)
    good = pairs.residuals <= CONVERGED * pairs.values.abs()
    known = Eigenpairs(pairs.values[good], pairs.vectors[:, good.to(pairs.vectors.device)], pairs.residuals[good], pairs.products)
    total, _ = deflated_trace_and_diagonal(op, known.vectors, spec.trace_probes, generator)
    norms = moments(op, spec.trace_probes, generator)
    # Directions are drawn from what is not known, so one is left to them where all pairs converged: the last, of smallest size.
    apart = Eigenpairs(*(t[..., :op.size - 1] for t in known[:3]), known.products)
    density = spectral_density(op, spec.probes, min(spec.steps, op.size - len(apart.values)), generator, apart)
    of_hessian = total.products + norms.frobenius.products + density.products
    op = operator("gauss_newton")
    newton, newton_top = trace(op, spec.other_probes, generator), top_eigenvalue(op, min(spec.other_steps, op.size), generator)
    op = operator("empirical_fisher")
    fisher = trace(op, spec.other_probes, generator)
    return Spectrum(pairs, density, total, norms.frobenius, negative_mass(density), effective_rank(density), newton, newton_top,
                    fisher, op.size, of_hessian + newton.products + newton_top.products + fisher.products)


def curve(density: Density, width: float = 0.25, points: int = POINTS) -> tuple[Tensor, Tensor, Tensor]:
    """A density for a symmetric logarithmic axis: grid (g,), values (g,) per unit of eigenvalue, and standard errors (g,).

    In u = asinh(eigenvalue / s), with s a thousandth of the largest size, each node is a normal density of deviation ``width``;
    as a function of the eigenvalue it is divided by the derivative sqrt(eigenvalue^2 + s^2) and so is still a density. Large
    eigenvalues are thus broadened in proportion to themselves, and those below s by about ``width`` s: the peak at 0 is no
    higher than that allows. Raises ``ValueError`` for a matrix of zeros.
    """
    largest = float(density.nodes.abs().max())
    if not largest > 0:
        raise ValueError("a density needs an eigenvalue other than 0 to be drawn, got none")
    unit = largest / 1000
    places = torch.asinh(density.nodes / unit)
    low, high = float(places.min()) - 4 * width, float(places.max()) + 4 * width
    u = torch.linspace(low, high, points, dtype=torch.float64)
    grid = unit * torch.sinh(u)
    scaled = (u[:, None, None] - places) / width
    samples = (density.weights * torch.exp(-0.5 * scaled.square())).sum(2) / (width * math.sqrt(2 * math.pi))
    samples = samples / (grid.square() + unit**2).sqrt()[:, None]
    return grid, samples.mean(1), samples.std(1) / math.sqrt(samples.shape[1])
