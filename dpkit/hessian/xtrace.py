"""Trace with every product used twice: for the sketch and as a probe."""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit.hessian.checks import check_whole
from dpkit.hessian.estimate import Estimate, LinearOperator


def xtrace(op: LinearOperator, products: int, generator: torch.Generator) -> Estimate:
    """XTrace estimate of tr(H), half of the ``products`` for a sketch, half for its image.

    For each of m random vectors w_i, the basis Q_i of the range of H times the other m - 1 gives one estimate

        t_i = tr(Q_i' H Q_i) + d u' H u / (u'u),    u = (I - Q_i Q_i') w_i,    d = n - m + 1

    which is unbiased, since w_i is isotropic and Q_i does not know it; u is scaled to the length sqrt(d) that it has on average.
    The result is the mean t of the t_i (Epperly, Tropp and Webber 2024, XTrace: Making the most of every sample in stochastic
    trace estimation, arXiv 2301.07825, sections 2 and 2.3). All Q_i follow from one decomposition: Q_i Q_i' = Q (I - s s') Q'
    with s orthogonal to the other columns of R in H W = Q R.

    The t_i share their sketches and are correlated: the paper's error estimate, their deviation over sqrt(m), came out at 0.7 to
    0.9 of the true error in simulations and at 0.4 where m approached n. ``standard_error`` here is the jackknife's, from the
    estimates without one vector at all, sqrt(sum (t_-j - mean)^2), which needs no more products. Its square is on average at
    least the variance of the estimate from m - 1 vectors (Efron and Stein 1981, The jackknife estimate of variance, theorem 2):
    too large where one more vector helps much (1.2 to 2.4 times the true error in the same simulations, 3.6 where m approached
    n), not too small. Where H has rank below m - 1 the trace comes out
    exact and the error is that of rounding.

    op symmetric (n, n); products even, at least 6 and at most 2 n; CPU generator. The vectors held are 4 x m. Raises
    ``ValueError`` outside that range.
    """
    check_whole(products=products)
    if products % 2 or not 6 <= products <= 2 * op.size:
        raise ValueError(f"products must be even and lie in [6, {2 * op.size}] (twice the dimension), got {products}")
    count = products // 2
    probes = torch.randn(count, op.size, generator=generator, dtype=torch.float64).T
    probes = (probes * (op.size**0.5 / probes.norm(dim=0))).to(dtype=op.dtype, device=op.device)
    images = op.matmat(probes)
    basis, triangle = torch.linalg.qr(images)
    basis_images = op.matmat(basis)
    inner = (basis.T @ basis_images).double()
    left_out = _left_out(triangle.double())
    along = (basis.T @ probes).double()
    # Coordinates of Q_i Q_i' w_i in the basis Q, one column for each i.
    within = along - left_out * (left_out * along).sum(0)
    outside = probes - basis @ within.to(basis)
    outside_images = images - basis_images @ within.to(basis)
    quadratic = (outside * outside_images).sum(0, dtype=torch.float64)
    lengths = outside.square().sum(0, dtype=torch.float64)
    taken = (left_out * (inner @ left_out)).sum(0)
    traces = inner.diagonal().sum() - taken + _scaled(op.size - count + 1, quadratic, lengths)
    # What the jackknife needs besides: w'Hw, w'HQ and Q'Hw.
    own = (probes * images).sum(0, dtype=torch.float64)
    cross = ((basis.T @ images).double() + (basis_images.T @ probes).double()) / 2
    without = _without_one(op.size, inner, left_out, along, own, cross)
    error = float((without - without.mean()).square().sum().sqrt())
    rounding = torch.finfo(op.dtype).eps * float(basis_images.norm(dim=0).sum(dtype=torch.float64))
    return Estimate(float(traces.mean()), max(error, rounding), products, count)


def _without_one(size: int, inner: Tensor, left_out: Tensor, along: Tensor, own: Tensor, cross: Tensor) -> Tensor:
    """The estimates (m,) from all vectors but the j-th, by arithmetic in the basis Q.

    The range without vectors i and j is Q without the directions s_i and s_j: ``second`` is what s_j has beside s_i.
    """
    count = len(inner)
    first = left_out.T[:, None]                                # (i, 1, m)
    second = left_out.T[None] - first * (left_out.T @ left_out)[..., None]
    length = second.norm(dim=2, keepdim=True)
    # Parallel directions: a matrix of low rank, of which either basis has all.
    second = torch.where(length > 1e-8, second / length.clamp_min(1e-8), 0.0)
    coordinates = along.T[:, None]
    coordinates = coordinates - first * (first * coordinates).sum(2, keepdim=True)
    coordinates = coordinates - second * (second * coordinates).sum(2, keepdim=True)
    lengths = size - coordinates.square().sum(2)
    quadratic = own[:, None] - 2 * (coordinates * cross.T[:, None]).sum(2) + (coordinates @ inner * coordinates).sum(2)
    taken = (left_out * (inner @ left_out)).sum(0)[:, None] + (second @ inner * second).sum(2)
    pairs = inner.diagonal().sum() - taken + _scaled(size - count + 2, quadratic, lengths)  # (i, j)
    return (pairs.sum(0) - pairs.diagonal()) / (count - 1)


def _scaled(dimension: int, quadratic: Tensor, lengths: Tensor) -> Tensor:
    """d u'Hu / u'u, and 0 where nothing is left of u."""
    return torch.where(lengths > 0, dimension * quadratic / torch.where(lengths > 0, lengths, 1.0), 0.0)


def _left_out(triangle: Tensor) -> Tensor:
    """Columns (m, m): the i-th is a unit vector orthogonal to all columns of ``triangle`` (m, m) but the i-th.

    By a decomposition each: inverting the triangle, as the paper's formula has it, fails for a matrix of low rank.
    """
    columns = []
    for i in range(len(triangle)):
        others = torch.cat([triangle[:, :i], triangle[:, i + 1:]], dim=1)
        columns.append(torch.linalg.qr(others, mode="complete")[0][:, -1])
    return torch.stack(columns, dim=1)
