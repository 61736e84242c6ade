"""Estimates on what is left of a spectrum once some directions are taken out and dealt with exactly."""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit.hessian.checks import check_whole
from dpkit.hessian.diagonal import Diagonal, trace_and_diagonal
from dpkit.hessian.estimate import Estimate, LinearOperator, rademacher
from dpkit.hessian.trace import trace


class Deflated:
    """P H P with P = I - Q Q', the part of H on the complement of a few directions; itself an operator (n, n).

    A random probe sees every eigenvalue with a weight that varies as a squared normal variable, so a few large ones set the
    error of all that is estimated. Here the part of H on their directions is computed, not sampled:

        tr H = tr(Q' H Q) + tr(P H P),    diag H = diag(Q Q'H + H Q Q' - Q (Q'H Q) Q') + diag(P H P)

    Both hold for any Q, whether or not its columns are eigenvectors: a poor choice costs accuracy, never truth.

    op     symmetric operator (n, n)
    basis  (n, k), 0 <= k <= n, columns linearly independent: approximate eigenvectors, say, or a sketch H S of random vectors S

    Attributes: size, dtype, device as of ``op``; basis Q (n, k), the columns made orthonormal; image H Q (n, k); products spent
    on it, k; trace, tr(Q' H Q); rounding, about the error of that sum by the dtype's unit; diagonal (n,), the diagonal's part
    that is known, float64 on the CPU.

    Raises ``ValueError`` for a basis of another shape.
    """

    def __init__(self, op: LinearOperator, basis: Tensor) -> None:
        if basis.dim() != 2 or len(basis) != op.size or basis.shape[1] > op.size:
            raise ValueError(f"basis must be ({op.size}, k) with at most {op.size} columns, got {tuple(basis.shape)}; "
                             "pass vectors of this operator")
        self._op, self.size, self.dtype, self.device = op, op.size, op.dtype, op.device
        self.basis = torch.linalg.qr(basis.to(dtype=op.dtype, device=op.device))[0]
        self.products = self.basis.shape[1]
        self.image = op.matmat(self.basis) if self.products else self.basis
        inner = self.basis.T @ self.image
        self.trace = float(inner.diagonal().sum(dtype=torch.float64))
        self.rounding = torch.finfo(op.dtype).eps * float(self.image.norm(dim=0).sum(dtype=torch.float64))
        known = 2 * self.image - self.basis @ ((inner + inner.T) / 2)
        self.diagonal = (self.basis * known).sum(1, dtype=torch.float64).cpu()

    def project(self, vectors: Tensor) -> Tensor:
        """P V: the columns of V (n, k) without their part along the basis."""
        return vectors - self.basis @ (self.basis.T @ vectors)

    def completed(self, rest: Estimate) -> Estimate:
        """The trace of H from an estimate of that of P H P; no error is smaller than ``rounding``."""
        return Estimate(self.trace + rest.value, max(rest.standard_error, self.rounding), self.products + rest.products,
                        rest.samples)

    def matvec(self, vector: Tensor) -> Tensor:
        """P H P v for a vector (n,)."""
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """P H P V for the columns of V (n, k)."""
        return self.project(self._op.matmat(self.project(vectors)))


def deflated_trace_and_diagonal(op: LinearOperator, basis: Tensor, probes: int,
                                generator: torch.Generator) -> tuple[Estimate, Diagonal]:
    """:func:`trace_and_diagonal` with the part of H along ``basis`` (n, k) computed exactly; see :class:`Deflated`.

    Meant for eigenvectors that are known anyway: for k more products they leave the probes with the bulk of the spectrum. Both
    estimates are unbiased whatever the basis, as long as it was not chosen with the probes of this call. Products include the
    basis' k. Raises ``ValueError`` as :class:`Deflated`, and for fewer than 2 probes.
    """
    rest = Deflated(op, basis)
    total, entries = trace_and_diagonal(rest, probes, generator)
    return rest.completed(total), Diagonal(rest.diagonal + entries.values, entries.standard_errors, rest.products + probes)


def sketch(op: LinearOperator, columns: int, generator: torch.Generator) -> Deflated:
    """H without the range of H S, S random signs (n, ``columns``): most of its large eigenvalues, for 2 x columns products.

    Raises ``ValueError`` unless columns lies in [0, n].
    """
    check_whole(columns=columns)
    if not 0 <= columns <= op.size:
        raise ValueError(f"columns of a sketch must lie in [0, {op.size}] (the dimension), got {columns}")
    if columns == 0:
        return Deflated(op, torch.zeros(op.size, 0))
    signs = torch.stack([rademacher(op, generator) for _ in range(columns)], dim=1)
    found = Deflated(op, op.matmat(signs))
    found.products += columns
    return found


def hutch_plus_plus(op: LinearOperator, products: int, generator: torch.Generator) -> Estimate:
    """Hutch++ estimate of tr(H): exact along a random sketch of the range, Hutchinson's on the complement.

    With Q an orthonormal basis of H S, S random signs (n, k): tr(Q'H Q) + the mean of g'P H P g over sign vectors g, k and k
    products for the first and the rest for the second, k a third of all (Meyer, Musco, Musco and Woodruff 2021, Hutch++:
    Optimal stochastic trace estimation, arXiv 2010.09649, algorithm 1, written for positive semidefinite matrices; unbiased for
    any). It pays where few eigenvalues carry the sum of squares, and loses against :func:`trace` on a flat spectrum, where its
    probes are a third as many. Where a few outliers are all that skews Hutchinson's samples, they are gone, and intervals hold
    that fell short (:meth:`Estimate.interval`). Where eigenvalues go on falling by a constant ratio, the largest that the sketch
    missed takes their place: of 95% intervals with 10 to 20 probes, 90 to 94% held the truth in simulations.

    op symmetric (n, n); products at least 4 and at most 3 n; CPU generator. ``standard_error`` is that of the probes, given the
    sketch: the sketch and the probes are independent, so it is an honest one; ``samples`` counts the probes. Raises
    ``ValueError`` outside that range.
    """
    check_whole(products=products)
    if not 4 <= products <= 3 * op.size:
        raise ValueError(f"products must lie in [4, {3 * op.size}] (three times the dimension), got {products}")
    rest = sketch(op, products // 3, generator)
    return rest.completed(trace(rest, products - rest.products, generator))
