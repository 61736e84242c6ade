"""Every architecture, whole and with a fifth of its weights pruned: products, eigenpairs, error bars and densities against dense
float64 matrices that are not degenerate."""
import functools
import math

import pytest
import torch
from test_hessian import generator, problem
from test_hessian_estimators import MatrixOperator
from test_hessian_operators import ARCHITECTURES, assert_products, dense

from dpkit import models
from dpkit.hessian import (
    Operator,
    deflated_trace_and_diagonal,
    exact_diagonal,
    spectral_density,
    top_eigenpairs,
    trace_and_diagonal,
)
from dpkit.hessian.estimate import student_quantile
from dpkit.hessian.lanczos import Eigenpairs

IMAGES, SPREAD, KNOWN = 12, 0.5, 8
each = pytest.mark.parametrize("arch", ARCHITECTURES)
both = pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])


@functools.cache
def given(arch: str, masked: bool):
    """What an operator takes, with images that the network tells apart: deep networks at PyTorch's initialisation do not."""
    spec, names = ARCHITECTURES[arch]
    params, buffers, images, labels, mask = problem(spec, 0.2 if masked else 0.0, count=IMAGES)
    # 1 / sqrt(fan in) times the root of six is He's initialisation, which carries a signal through many layers
    params = {n: t * (math.sqrt(6) if t.dim() == 4 and spec.norm_kind != "instance" else 1) for n, t in params.items()}
    last = models.classifier_name(spec)
    params[f"{last}.weight"] = params[f"{last}.weight"] * SPREAD / models.forward(spec, params, buffers, images)[0].std(0).mean()
    # about 0, so that no class is certain: gradients of a saturated softmax are rounding
    params[f"{last}.bias"] = params[f"{last}.bias"] - models.forward(spec, params, buffers, images)[0].mean(0)
    return spec, params, buffers, images, labels, mask, names or models.prunable(spec)


@functools.cache
def matrix(arch: str, masked: bool) -> torch.Tensor:
    """The Hessian (n, n) that products with the unit vectors give."""
    op = Operator(*given(arch, masked))
    found = op.matmat(torch.eye(op.size, dtype=torch.float64))
    return (found + found.T) / 2


@both
@each
def test_products_equal_dense_matrices(arch, masked):
    spec, params, buffers, images, labels, mask, names = given(arch, masked)
    op = Operator(*given(arch, masked), chunk=5)
    assert 20 < op.size < 500
    assert op.pruned == ("left out" if masked else "none")
    truth, _, logits = dense(spec, params, buffers, images, labels, mask, names)
    assert float(logits.std(0).mean()) == pytest.approx(SPREAD, rel=1e-6)
    assert int(torch.linalg.matrix_rank(truth["hessian"], rtol=1e-10)) > 20
    assert_products(given(arch, masked), truth, chunk=5)
    torch.testing.assert_close(exact_diagonal(op).values, truth["hessian"].diagonal(), rtol=1e-9, atol=1e-10)


@both
@each
def test_top_eigenvalues_to_eight_digits(arch, masked):
    op = Operator(*given(arch, masked))
    truth = torch.linalg.eigvalsh(matrix(arch, masked)).flip(0)
    pairs = top_eigenpairs(op, 5, min(60, op.size), generator("top", arch))
    assert ((pairs.values - truth[:5]).abs() <= 1e-8 * truth[:5].abs()).all(), pairs.values - truth[:5]
    left = (matrix(arch, masked) @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert (left <= pairs.residuals + 1e-9 * truth[0]).all()


def pairs_of(dense_matrix: torch.Tensor, count: int) -> Eigenpairs:
    """The ``count`` eigenpairs of largest size."""
    values, vectors = torch.linalg.eigh(dense_matrix)
    chosen = values.abs().argsort(descending=True)[:count]
    return Eigenpairs(values[chosen], vectors[:, chosen], torch.zeros(count, dtype=torch.float64), 0)


def one_sided(square: torch.Tensor) -> bool:
    """Whether a probe's samples are as skewed as a squared normal variable: of the entries off the diagonal, which make its
    variance, more than half lies in one eigenvalue."""
    values = torch.linalg.eigvalsh(square - torch.diag(square.diagonal()))
    return bool(values.square().max() > 0.5 * values.square().sum())


@each
@pytest.mark.parametrize("deflated", [False, True], ids=["plain", "deflated"])
def test_error_bars_hold_what_they_say(arch, deflated):
    """95% intervals from 20 probes, 200 seeds for each of both networks. Of traces whose samples are skewed 89 to 91% do, as
    :meth:`Estimate.interval` says; the deviation of a share of 400 is 1.1 points. Where eigenvalues taken out leave others that
    fall on by a ratio, intervals are short of 95% by a point or two."""
    expected, traces, entries = 0.0, 0, []
    for masked in (True, False):
        square = matrix(arch, masked)
        op, basis = MatrixOperator(square), pairs_of(square, KNOWN).vectors[:, :KNOWN if deflated else 0]
        rest = torch.eye(len(square), dtype=torch.float64) - basis @ basis.T
        expected += (0.9 if one_sided(rest @ square @ rest) else 0.95) / 2
        for seed in range(200):
            g = generator("coverage", arch, str(masked), seed)
            total, found = deflated_trace_and_diagonal(op, basis, 20, g) if deflated else trace_and_diagonal(op, 20, g)
            low, high = total.interval()
            traces += low <= float(square.trace()) <= high
            away = (found.values - square.diagonal()).abs()
            entries.append(float((away <= student_quantile(0.95, 19) * found.standard_errors + 1e-12).double().mean()))
    assert traces / 400 >= expected - (0.03 if deflated else 0.02), (expected, traces)
    assert sum(entries) / 400 >= 0.94


@both
@each
def test_moments_of_a_density_to_two_per_cent(arch, masked):
    """Of the mean of |eigenvalue|^k, as positive and negative ones cancel in an odd moment; a third of the spectrum known."""
    square = matrix(arch, masked)
    values, known = torch.linalg.eigvalsh(square), pairs_of(square, len(square) // 3)
    room = len(square) - len(known.values)
    found = spectral_density(MatrixOperator(square), 30, min(20, room), generator("density", arch), known)
    for order in range(1, 6):
        exact, size = float((values**order).mean()), float((values.abs()**order).mean())
        assert abs(found.moment(order).value - exact) <= 0.02 * size, order
