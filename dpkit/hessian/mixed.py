"""Estimates from products in bfloat16, corrected by a few in full precision so that no bias is left.

An operator with ``precision`` "bf16" multiplies by a matrix A near H for about half the time. Two identities turn that into
statements about H:

    tr H = tr A + tr(H - A),    diag H = diag A + diag(H - A)

Many cheap probes estimate the first term and a few dear ones the second, whose spread is smaller by the rounding: two levels of
a multilevel estimator (Giles 2015, Multilevel Monte Carlo methods, Acta Numerica 24). The sum is unbiased for H, whatever the
rounding does, and its error is the root of both squares.

Eigenvectors of A are eigenvectors of H up to the rounding; one product in full precision for each gives Ritz values whose error
is of second order in it, and residuals that bound it (:func:`refined`).
"""
from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from dpkit.hessian.diagonal import Diagonal
from dpkit.hessian.diagonal import trace_and_diagonal as of_one_matrix
from dpkit.hessian.estimate import Estimate, LinearOperator
from dpkit.hessian.lanczos import Eigenpairs, top_eigenpairs

CORRECTIONS = 4
"""Probes in full precision, unless said otherwise."""


class RoundedOperator(LinearOperator, Protocol):
    """A symmetric matrix H (n, n) whose ``matvec`` and ``matmat`` multiply by a rounded one, A."""

    def exact(self, vectors: Tensor) -> Tensor:
        """H V for the columns of V (n, k), in the operator's dtype throughout."""


class Difference:
    """H - A as an operator (n, n); a product takes one of each kind."""

    def __init__(self, op: RoundedOperator) -> None:
        self._op, self.size, self.dtype, self.device = op, op.size, op.dtype, op.device

    def matvec(self, vector: Tensor) -> Tensor:
        """(H - A) v for a vector (n,)."""
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """(H - A) V for the columns of V (n, k)."""
        return self._op.exact(vectors) - self._op.matmat(vectors)


def trace_and_diagonal(op: RoundedOperator, probes: int, generator: torch.Generator,
                       corrections: int = CORRECTIONS) -> tuple[Estimate, Diagonal]:
    """Trace and diagonal of H as :func:`dpkit.hessian.trace_and_diagonal` gives them, from ``probes`` sign vectors in bfloat16.

    op           an operator whose ``matmat`` is rounded and whose ``exact`` is not
    probes       at least 2
    corrections  further sign vectors, on which both kinds of product are taken; at least 2

    ``products`` counts both kinds; ``samples`` the probes. Raises ``ValueError`` for fewer.
    """
    if corrections < 2:
        raise ValueError(f"corrections must be >= 2 to give an error bar, got {corrections}")
    total, entries = of_one_matrix(op, probes, generator)
    more, rest = of_one_matrix(Difference(op), corrections, generator)
    products = total.products + 2 * more.products
    return (Estimate(total.value + more.value, math.hypot(total.standard_error, more.standard_error), products, total.samples),
            Diagonal(entries.values + rest.values, torch.hypot(entries.standard_errors, rest.standard_errors), products))


def top_eigenvalue(op: RoundedOperator, steps: int, generator: torch.Generator) -> Estimate:
    """The largest eigenvalue of H from ``steps`` of Lanczos in bfloat16 and one product in full precision.

    As :func:`dpkit.hessian.top_eigenvalue`, and as there ``standard_error`` is the residual; here it is computed and not read off
    the recurrence, so it does hold the rounding.
    """
    pairs = refined(op, top_eigenpairs(op, 1, steps, generator))
    return Estimate(float(pairs.values[0]), float(pairs.residuals[0]), pairs.products)


def refined(op: RoundedOperator, pairs: Eigenpairs) -> Eigenpairs:
    """The best approximations to eigenpairs of H in the span of ``pairs.vectors``, by a product in full precision for each.

    Rayleigh-Ritz: with Q an orthonormal basis of the span, Q'H Q = S T S', values T, vectors Q S (Parlett 1980, The Symmetric
    Eigenvalue Problem, section 11.3). With vectors off by an angle e the values are off by at most e^2 times the spread of the
    spectrum. residuals ||H y - theta y|| (float64, CPU) are computed, so they bound the error to the dtype's rounding. The order,
    descending or by size, stays that of ``pairs``.
    """
    basis = torch.linalg.qr(pairs.vectors)[0]
    image = op.exact(basis)
    inner = (basis.T @ image).double().cpu()
    values, within = torch.linalg.eigh((inner + inner.T) / 2)
    order = torch.empty(len(values), dtype=torch.int64)
    order[torch.argsort(pairs.values, stable=True)] = torch.arange(len(values))  # the i-th found gets the value of its rank
    values, within = values[order], within[:, order]
    turned = within.to(basis)
    vectors = basis @ turned
    left = image @ turned - vectors * values.to(basis)
    floor = torch.finfo(op.dtype).eps * float(values.abs().max())
    residuals = left.norm(dim=0).double().cpu().clamp_min(floor)
    return Eigenpairs(values, vectors / vectors.norm(dim=0), residuals, pairs.products + len(values))
