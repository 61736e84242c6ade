"""Top of the spectrum by Lanczos' method."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.hessian.checks import check_whole
from dpkit.hessian.estimate import Estimate, LinearOperator


class Eigenpairs(NamedTuple):
    """values (k,), descending, and residuals (k,): float64 on the CPU; vectors (n, k): unit columns."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


def top_eigenvalue(op: LinearOperator, steps: int, generator: torch.Generator) -> Estimate:
    """The largest eigenvalue (algebraically: a large negative one does not count), by ``steps`` of Lanczos.

    ``standard_error`` is no sampling error but the Ritz residual bound ||H y - theta y||: some eigenvalue
    lies within it of the returned theta (Parlett 1980, The Symmetric Eigenvalue Problem, theorem 4.5.1). It
    does not say which one; theta itself never exceeds the largest eigenvalue. The bound does not know the
    rounding of the products (about 1e-6 of the value in float32) and can be smaller.

    op symmetric (n, n); steps from 1 to n; CPU generator for the start vector. Raises ``ValueError`` outside
    that range.
    """
    pairs = top_eigenpairs(op, 1, steps, generator)
    return Estimate(float(pairs.values[0]), float(pairs.residuals[0]), pairs.products)


def top_eigenpairs(op: LinearOperator, k: int, steps: int, generator: torch.Generator) -> Eigenpairs:
    """The ``k`` largest Ritz values with their vectors and residual bounds after ``steps`` products.

    Ritz pairs of the Krylov space of one random start: theta from the eigenvalues of the tridiagonal matrix
    T, vectors Q s, residual beta_m |s_m| (Golub and Van Loan, Matrix Computations, 4th edition, section
    10.1). A repeated eigenvalue shows up once, since one start vector has one direction in its eigenspace;
    :func:`dpkit.hessian.block_lanczos.block_eigenpairs` finds it more often, and the other end of the spectrum
    too. If the space closes early, fewer products are spent.

    1 <= k <= steps <= n. Raises ``ValueError`` otherwise, or when the space closes on fewer than k pairs.
    """
    check_whole(k=k, steps=steps)
    if not 1 <= steps <= op.size:
        raise ValueError(f"steps must lie in [1, {op.size}] (the dimension), got {steps}")
    if not 1 <= k <= steps:
        raise ValueError(f"k must lie in [1, {steps}] (the steps), got {k}")
    alphas, betas, basis = tridiagonalise(op, steps, generator)
    if k > len(alphas):
        raise ValueError(f"k must be <= {len(alphas)}, the number of distinct eigenvalues, got {k}")
    off = betas[:-1]
    ritz, within = torch.linalg.eigh(torch.diag(alphas) + torch.diag(off, 1) + torch.diag(off, -1))
    values, within = ritz.flip(0)[:k], within.flip(1)[:, :k]
    vectors = basis @ within.to(basis)
    # A converged component s_m underflows; the arithmetic's own unit keeps the bound honest there.
    floor = torch.finfo(basis.dtype).eps * ritz.abs().max()
    residuals = (betas[-1] * within[-1].abs()).clamp_min(floor)
    return Eigenpairs(values, vectors / vectors.norm(dim=0), residuals, len(alphas))


def tridiagonalise(op: LinearOperator, steps: int, generator: torch.Generator,
                   start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """alphas (m,), betas (m,) in float64 on the CPU and the orthonormal basis (n, m), with m <= steps.

    From ``start`` (n,), of any length but 0; None: a normal vector from ``generator``.

    betas[-1] couples the basis to the vector that the next step would add; it is 0 when the space has closed.
    Every new vector is made orthogonal to all former ones twice, in the operator's dtype: the three-term
    recurrence alone loses orthogonality as soon as a Ritz value converges and then returns copies of it, and
    two rounds of Gram-Schmidt suffice (Giraud, Langou and Rozloznik 2005).
    """
    if start is None:
        start = torch.randn(op.size, generator=generator, dtype=torch.float64)
    basis = torch.zeros(steps, op.size, dtype=op.dtype, device=op.device)  # rows: each vector contiguous
    basis[0] = (start / start.norm()).to(basis)
    alphas, betas = [], []
    scale, eps = 0.0, torch.finfo(op.dtype).eps
    for step in range(steps):
        image = op.matvec(basis[step])
        alphas.append(float(torch.dot(basis[step], image)))
        scale = max(scale, float(image.norm()))
        known = basis[:step + 1]
        for _ in range(2):
            image = image - known.T @ (known @ image)
        beta = float(image.norm())
        if beta <= op.size ** 0.5 * eps * scale:
            # What is left is rounding: the space is invariant, its Ritz values are eigenvalues.
            betas.append(0.0)
            break
        betas.append(beta)
        if step + 1 < steps:
            basis[step + 1] = image / beta
    return (torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64),
            basis[:len(alphas)].T)
