"""Spectral density: how the eigenvalues are spread, by stochastic Lanczos quadrature."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.hessian.checks import check_whole
from dpkit.hessian.deflate import Deflated
from dpkit.hessian.estimate import Estimate, LinearOperator
from dpkit.hessian.lanczos import Eigenpairs, tridiagonalise
from dpkit.hessian.trace import mean_estimate

POINTS = 512
"""Points of a grid that is not given."""


class Curve(NamedTuple):
    """grid (g,), values (g,) and standard_errors (g,), float64: a density, so the values have unit 1 / eigenvalue."""

    grid: Tensor
    values: Tensor
    standard_errors: Tensor
    width: float


@dataclass(frozen=True)
class Density:
    """The spectrum as seen from each of p random directions: a Gauss quadrature rule each.

    nodes     (p, m) Ritz values, ascending; float64 on the CPU
    weights   (p, m), at least 0, each row with sum 1: the share of the spectrum near each node. A rule that ended early (see
              :func:`spectral_density`) is filled up with nodes of weight 0
    products  matrix-vector products spent
    size      entries n of the operator; n times a weight counts eigenvalues
    known     how many of the last columns are not sampled: eigenvalues that :func:`spectral_density` was given, the same in every
              row, with the weight 1 / n each. The columns before them are the rules, ascending
    """

    nodes: Tensor
    weights: Tensor
    products: int
    size: int
    known: int = 0

    def moment(self, order: int) -> Estimate:
        """The mean of the eigenvalues' ``order``-th power, tr(H^k) / n, with its standard error over the directions.

        Unbiased up to order 2 m - 1, since m nodes integrate such polynomials exactly (Golub and Welsch 1969); order 1 times n is
        the trace. Raises ``ValueError`` for an order below 0.
        """
        if order < 0:
            raise ValueError(f"order must be >= 0, got {order}")
        samples = (self.weights * self.nodes**order).sum(1)
        return Estimate(float(samples.mean()), mean_estimate(samples).standard_error, self.products, len(samples))

    def coarser(self, share: float = 0.5) -> Density:
        """The same directions after a ``share`` of the Lanczos steps, in (0, 1], at no product: what the rest of them changed.

        A rule's measure determines the tridiagonal matrix that it came from: Lanczos on the diagonal matrix of its nodes, from
        the roots of its weights, gives that matrix again, and its leading part is that of fewer steps (Golub and Welsch 1969).
        Eigenvalues that are known exactly stay.
        """
        sampled = self.nodes.shape[1] - self.known
        steps = max(1, int(share * sampled))
        nodes, weights = self.nodes[:, :sampled].clone(), torch.zeros(len(self.nodes), sampled, dtype=torch.float64)
        for row in range(len(nodes)):
            mass = self.weights[row, :sampled]
            used = mass > 0
            if not bool(used.any()):
                continue
            values, found = _leading(self.nodes[row, :sampled][used], mass[used], steps)
            nodes[row] = values[-1]
            nodes[row, :len(values)], weights[row, :len(values)] = values, found * mass.sum()
        return Density(torch.cat([nodes, self.nodes[:, sampled:]], 1), torch.cat([weights, self.weights[:, sampled:]], 1),
                       self.products, self.size, self.known)

    def above(self, threshold: float) -> Estimate:
        """The share of eigenvalues above ``threshold``, with its standard error over the directions.

        A node stands for its neighbourhood: the share is known to about one node's weight near the threshold (to what,
        :meth:`below` says).
        """
        samples = (self.weights * (self.nodes > threshold)).sum(1)
        return Estimate(float(samples.mean()), mean_estimate(samples).standard_error, self.products, len(samples))

    def below(self, threshold: float) -> tuple[Estimate, Estimate]:
        """Bounds of the share of eigenvalues at or below ``threshold``: (lowest, highest), each with its standard error.

        What m nodes can say: of all measures with the moments that a rule matches, the share below a node lies between the
        weights before it and those up to it (the inequalities of Chebyshev, Markov and Stieltjes; Szego 1939, Orthogonal
        polynomials, section 3.41). Between two nodes it is thus known to the weights of both. More steps narrow the bounds; more
        probes only their errors. Spectra with many eigenvalues at the threshold itself leave them wide, since no polynomial
        tells 0 from just below 0.
        """
        rules = self.nodes.shape[1] - self.known
        nodes, weights = self.nodes[:, :rules], self.weights[:, :rules]
        at = torch.where(nodes <= threshold, nodes, -math.inf).amax(1, keepdim=True)
        after = torch.where(nodes > threshold, nodes, math.inf).amin(1, keepdim=True)
        fixed = float((self.weights[0, rules:] * (self.nodes[0, rules:] <= threshold)).sum())
        bounds = (weights * (nodes < at)).sum(1), (weights * (nodes <= after)).sum(1)
        return tuple(Estimate(fixed + float(samples.mean()), mean_estimate(samples).standard_error, self.products, len(samples))
                     for samples in bounds)

    def curve(self, grid: Tensor | int = POINTS, width: float | None = None) -> Curve:
        """The density with each eigenvalue broadened to a normal density of deviation ``width``.

        phi(t) = mean over directions of sum_j weight_j N(t; node_j, width^2) (Lin, Saad and Yang 2016, Approximating spectral
        densities of large matrices, section 2; Ghorbani, Krishnan and Xiao 2019, equation 6). The standard errors say how
        much the directions disagree; they do not know the bias from broadening, and that from too few steps only where
        directions differ.

        grid   points (g,), or how many, spread evenly over all nodes and four widths on either side
        width  in the unit of the eigenvalues; None: a hundredth of the distance between the outermost
               nodes, or of their size where they are one

        Raises ``ValueError`` unless width > 0 and the grid has at least two points.
        """
        low, high = (float(bound) for bound in self.nodes.aminmax())
        if width is None:
            largest = max(abs(low), abs(high))
            # A single eigenvalue has no width of its own, and rounding is none either.
            width = (high - low if high - low > 1e-6 * largest else largest or 1.0) / 100
        if not width > 0:
            raise ValueError(f"width must be > 0, got {width}")
        if not isinstance(grid, Tensor):
            grid = torch.linspace(low - 4 * width, high + 4 * width, grid, dtype=torch.float64)
        grid = grid.to(torch.float64)
        if grid.dim() != 1 or len(grid) < 2:
            raise ValueError(f"grid must be (g,) with at least two points, got {tuple(grid.shape)}")
        samples = torch.stack([_broadened(grid, nodes, weights, width)
                               for nodes, weights in zip(self.nodes, self.weights, strict=True)])
        return Curve(grid, samples.mean(0), samples.std(0) / math.sqrt(len(samples)), width)


def spectral_density(op: LinearOperator, probes: int, steps: int, generator: torch.Generator,
                     pairs: Eigenpairs | Deflated | None = None) -> Density:
    """The spectrum's density from ``probes`` random directions of ``steps`` Lanczos products each.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature;
    Ghorbani, Krishnan and Xiao 2019, An investigation into neural net optimization via Hessian eigenvalue density). For a
    direction v, uniform on the sphere, v'f(H)v is the integral of f over the spectral measure of v; its mean over v is
    tr f(H) / n. Lanczos from v gives a tridiagonal T whose eigenvalues are nodes and whose eigenvectors' squared first
    components are weights of the Gauss rule for that measure.

    The basis is kept orthogonal throughout. The recurrence alone returns converged eigenvalues many times over, with their
    weight split among the copies: sums over nodes survive that, but outliers then take the steps that the bulk needs.

    A direction has a random share of each eigenvector, with a relative deviation of about sqrt(2): an eigenvalue that stands out
    is counted as 0.1 as well as 3, and high moments, which it makes up, are known to sqrt(2 / probes) only. With ``pairs`` such
    eigenvalues count as what they are, one each, and directions are drawn in the complement of their vectors. The rules are then
    those of P H P (:class:`dpkit.hessian.deflate.Deflated`), and traces of powers are off by the squares of the pairs' residuals,
    which should be small beside the eigenvalues that matter. A :class:`dpkit.hessian.deflate.Deflated` of ``op`` stands for its
    basis; it was made for another estimate and costs nothing here.

    op symmetric (n, n); probes at least 2; steps from 1 to n (with k pairs n - k), and as many vectors of length n in memory; CPU
    generator; pairs fewer than n; products of pairs count with the density's, those of a ``Deflated`` do not. Fewer products are
    spent where a space closes early.
    Raises ``ValueError`` outside these ranges.
    """
    check_whole(probes=probes, steps=steps)
    if pairs is not None:
        return _around(op, probes, steps, generator, pairs)
    if probes < 2:
        raise ValueError(f"probes must be >= 2 to give an error bar, got {probes}")
    if not 1 <= steps <= op.size:
        raise ValueError(f"steps must lie in [1, {op.size}] (the dimension), got {steps}")
    nodes, weights, products = _rules(op, probes, steps, generator, None)
    return Density(nodes, weights, products, op.size)


def _around(op: LinearOperator, probes: int, steps: int, generator: torch.Generator, pairs: Eigenpairs | Deflated) -> Density:
    """The density with eigenvalues that are known, each of weight 1 / n, beside rules for the rest."""
    made = isinstance(pairs, Deflated)
    vectors = pairs.basis if made else pairs.vectors
    if len(vectors) != op.size or vectors.shape[1] >= op.size:
        raise ValueError(f"pairs must be fewer than {op.size} (the dimension) vectors of that length, got {tuple(vectors.shape)}")
    known = vectors.shape[1]
    if probes < 2:
        raise ValueError(f"probes must be >= 2 to give an error bar, got {probes}")
    if not 1 <= steps <= op.size - known:
        raise ValueError(f"steps must lie in [1, {op.size - known}] (the dimension without {known} pairs), got {steps}")
    rest = pairs if made else Deflated(op, vectors)
    nodes, weights, products = _rules(rest, probes, steps, generator, rest)
    # On Q's columns H is known by Q'HQ; its eigenvalues are the pairs' own where these are orthonormal.
    inner = (rest.basis.T @ rest.image).double().cpu()
    values = torch.linalg.eigvalsh((inner + inner.T) / 2)
    return Density(torch.cat([nodes, values.expand(probes, known)], 1),
                   torch.cat([weights * (1 - known / op.size), torch.full((probes, known), 1 / op.size, dtype=torch.float64)], 1),
                   products + (0 if made else rest.products + pairs.products), op.size, known)


def _rules(op: LinearOperator, probes: int, steps: int, generator: torch.Generator,
           within: Deflated | None) -> tuple[Tensor, Tensor, int]:
    """Nodes and weights (probes, steps) of a rule a direction, drawn within the complement of a basis, and their products."""
    nodes, weights = torch.zeros(2, probes, steps, dtype=torch.float64)
    products = 0
    for probe in range(probes):
        start = None
        if within is not None:
            start = torch.randn(op.size, 1, generator=generator, dtype=torch.float64).to(within.basis)
            start = within.project(within.project(start))[:, 0]
        alphas, betas, _ = tridiagonalise(op, steps, generator, start)
        off, found = betas[:-1], len(alphas)
        values, vectors = torch.linalg.eigh(torch.diag(alphas) + torch.diag(off, 1) + torch.diag(off, -1))
        nodes[probe] = values[-1]
        nodes[probe, :found] = values
        weights[probe, :found] = vectors[0].square()
        products += found
    return nodes, weights / weights.sum(1, keepdim=True), products


def _broadened(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    scaled = (grid[:, None] - nodes) / width
    return (weights * torch.exp(-0.5 * scaled.square())).sum(1) / (width * math.sqrt(2 * math.pi))


def _leading(nodes: Tensor, weights: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, with sum 1, of the rule of at most ``steps`` nodes for the measure of a finer one."""
    vector = (weights / weights.sum()).sqrt()
    basis, alphas, betas = [vector], [], []
    for _ in range(min(steps, len(nodes))):
        image = nodes * basis[-1]
        alphas.append(torch.dot(basis[-1], image))
        known = torch.stack(basis)
        for _ in range(2):
            image = image - known.T @ (known @ image)
        beta = image.norm()
        if not beta > 1e-12 * nodes.abs().max():
            break
        betas.append(beta)
        basis.append(image / beta)
    off = torch.stack(betas[:len(alphas) - 1]) if len(alphas) > 1 else torch.zeros(0, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.diag(torch.stack(alphas)) + torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0].square()
