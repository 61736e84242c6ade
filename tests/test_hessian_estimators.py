"""Estimators of trace, diagonal and top eigenvalue against matrices with a known spectrum."""
import math

import pytest
import torch
from torch import Tensor

from dpkit import tree
from dpkit.hessian import (
    Estimate,
    diagonal,
    estimate,
    exact_diagonal,
    lanczos,
    top_eigenpairs,
    top_eigenvalue,
    trace,
    trace_and_diagonal,
)


class MatrixOperator:
    """A symmetric matrix in the interface of an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device
        self.products = 0

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, vectors: Tensor) -> Tensor:
        self.products += vectors.shape[1]
        return self.matrix @ vectors


def generator(*path) -> torch.Generator:
    return tree.generator_for("hessian tests", *path)


def with_spectrum(eigenvalues, seed=0, dtype=torch.float64) -> MatrixOperator:
    """A dense matrix with these eigenvalues and random eigenvectors."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    square = torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(square)
    return MatrixOperator(((basis * values) @ basis.T).to(dtype))


SPREAD = [3.0 - k / 10 for k in range(40)]


def share_inside(op: MatrixOperator, runs: list[Estimate]) -> float:
    """Share of intervals that hold the true trace."""
    truth = float(op.matrix.trace())
    return sum(low <= truth <= high for low, high in (run.interval() for run in runs)) / len(runs)


def test_intervals_of_the_trace_hold_95_percent():
    op = with_spectrum(SPREAD)
    truth = float(op.matrix.trace())
    runs = [trace(op, 20, generator("trace", seed)) for seed in range(400)]
    # Standard deviation of this share: 1.1 points.
    assert 0.92 <= share_inside(op, runs) <= 0.98
    off = op.matrix - torch.diag(op.matrix.diagonal())
    variance = sum(run.standard_error**2 for run in runs) / len(runs)
    assert math.isclose(variance, float(2 * off.square().sum()) / 20, rel_tol=0.06)
    assert abs(sum(run.value for run in runs) / len(runs) - truth) < 4 * math.sqrt(variance / len(runs))


def test_intervals_of_a_dominated_trace_hold_less():
    """Documented with ``Estimate.interval``: skewed samples, about 90%."""
    op = with_spectrum([40.0] + [1.0] * 39)
    runs = [trace(op, 20, generator("dominated", seed)) for seed in range(400)]
    assert 0.85 <= share_inside(op, runs) <= 0.95


def test_intervals_of_the_diagonal_hold_95_percent():
    op = with_spectrum(SPREAD)
    truth, factor = op.matrix.diagonal(), estimate.student_quantile(0.95, 19)
    inside, squares = [], []
    for seed in range(100):
        values, errors, products = diagonal(op, 20, generator("diagonal", seed))
        assert products == 20
        inside.append(((values - truth).abs() <= factor * errors).double())
        squares.append(errors.square())
    # 40 dependent entries in 100 seeds.
    assert 0.93 <= torch.stack(inside).mean() <= 0.97
    off = op.matrix - torch.diag(truth)
    torch.testing.assert_close(torch.stack(squares).mean(0), off.square().sum(1) / 20, rtol=0.2, atol=1e-6)


def test_a_diagonal_matrix_needs_no_luck():
    op = MatrixOperator(torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64)))
    total, values = trace_and_diagonal(op, 3, generator("exact"))
    assert total == Estimate(55.0, 0.0, products=3, samples=3)
    assert torch.equal(values.values, op.matrix.diagonal())
    assert not values.standard_errors.any()


def test_standard_errors_are_those_of_the_samples():
    """All at once, without blocks: deviation over the probes / sqrt(probes)."""
    op, g = with_spectrum(SPREAD), generator("by hand")
    total, values = trace_and_diagonal(op, 21, generator("by hand"))
    signs = torch.stack([estimate.rademacher(op, g) for _ in range(21)], dim=1)
    samples = signs * (op.matrix @ signs)
    torch.testing.assert_close(values.values, samples.mean(1))
    torch.testing.assert_close(values.standard_errors, samples.std(1) / math.sqrt(21))
    assert math.isclose(total.value, samples.sum(0).mean(), rel_tol=1e-12)
    assert math.isclose(total.standard_error, samples.sum(0).std() / math.sqrt(21), rel_tol=1e-12)


def test_probes_depend_on_the_generator_only(monkeypatch):
    op = with_spectrum(range(1, 21))
    first = trace(op, 21, generator("same"))
    total, values = trace_and_diagonal(op, 21, generator("same"))
    assert (total.value, total.standard_error) == (first.value, first.standard_error)
    assert torch.equal(values.values, diagonal(op, 21, generator("same")).values)
    monkeypatch.setattr(estimate, "BLOCK", 3)
    single = trace(op, 21, generator("same"))
    assert math.isclose(single.value, first.value, rel_tol=1e-12)
    assert op.products == 4 * 21


def test_trace_stops_at_its_target_only():
    op = with_spectrum([1.0] * 30 + [3.0] * 10)
    early = trace(op, 400, generator("stop"), target=0.05)
    assert 10 <= early.products == op.products < 400
    assert early.standard_error <= 0.05 * early.value
    assert trace(op, 400, generator("stop"), target=0.05, minimum=100).products == 104
    assert trace(op, 400, generator("stop")).products == 400
    assert trace(op, 37, generator("stop"), target=1e-9).products == 37


def test_a_quiet_mean_does_not_stop_the_trace():
    """Every block of eight repeats the same mean, +3, with a deviation of 4: quiet, but not known."""

    class Quiet(MatrixOperator):
        def matmat(self, vectors: Tensor) -> Tensor:
            self.products += vectors.shape[1]
            wanted = torch.tensor([7.0, -1.0] * 4, dtype=torch.float64)[:vectors.shape[1]]
            return vectors / self.size * wanted

    run = trace(Quiet(torch.eye(5, dtype=torch.float64)), 80, generator("quiet"), target=0.05)
    assert run.products == 80
    assert math.isclose(run.value, 3.0)
    assert math.isclose(run.standard_error, 4 / math.sqrt(79))


def test_lanczos_finds_the_algebraic_top():
    truth = [-50.0, 9.0, 7.0, 4.0] + [k / 40 for k in range(36)]
    op = with_spectrum(truth)
    for steps in range(1, 41):
        top = top_eigenvalue(op, steps, generator("top"))
        assert top.products == steps
        assert top.samples is None
        assert top.value <= 9.0 + 1e-12
        assert min(abs(top.value - t) for t in truth) <= top.standard_error + 1e-12
    for steps in (3, 6, 9):
        pairs = top_eigenpairs(op, 3, steps, generator("top"))
        residuals = (op.matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
        torch.testing.assert_close(pairs.residuals, residuals)
    low, high = top.interval()
    assert math.isclose(top.value, 9.0, rel_tol=1e-12)
    assert low <= 9.0 <= high
    pairs = top_eigenpairs(op, 40, 40, generator("top"))
    torch.testing.assert_close(pairs.values, torch.tensor(sorted(truth, reverse=True), dtype=torch.float64))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_lanczos_basis_stays_orthogonal(dtype, tolerance):
    """With a gap this wide the recurrence alone has copies of the top after some 15 steps."""
    op = with_spectrum([1e4] + [1.0 + k / 100 for k in range(199)], dtype=dtype)
    alphas, betas, basis = lanczos.tridiagonalise(op, 80, generator("basis"))
    assert len(alphas) == len(betas) == basis.shape[1] == 80
    assert (basis.T @ basis - torch.eye(80, dtype=dtype)).abs().max() <= tolerance
    pairs = top_eigenpairs(op, 2, 80, generator("basis"))
    assert pairs.values[1] < 3.0 * (1 + tolerance)


def test_lanczos_stops_in_a_closed_space():
    op = with_spectrum([5.0] * 3 + [2.0] * 10 + [0.0] * 27)
    top = top_eigenvalue(op, 40, generator("closed"))
    assert top.products == 3
    assert math.isclose(top.value, 5.0, rel_tol=1e-12)
    assert top.standard_error <= 1e-14
    with pytest.raises(ValueError, match="k must be <= 3, the number of distinct eigenvalues, got 4"):
        top_eigenpairs(op, 4, 40, generator("closed"))
    assert top_eigenvalue(MatrixOperator(torch.zeros(7, 7)), 5, generator(0)) == Estimate(0.0, 0.0, 1)


def test_student_quantiles_equal_the_table():
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 29: 2.04523, 999: 1.96234}
    for freedom, quantile in table.items():
        assert math.isclose(estimate.student_quantile(0.95, freedom), quantile, rel_tol=2e-3)
    assert Estimate(1.0, 0.5, 7).interval() == (0.5, 1.5)
    assert Estimate(0.0, 0.5, 7, 7).relative_error == math.inf


def test_estimators_refuse_counts_that_make_no_sense():
    op, g = with_spectrum([1.0, 2.0, 3.0]), generator(0)
    for call, line in [
        (lambda: trace(op, 1, g), "probes must be >= 2"),
        (lambda: trace(op, 9, g, target=1.0), r"target must lie in \[0, 1\), got 1.0"),
        (lambda: trace(op, 9, g, minimum=1), "minimum must be >= 2"),
        (lambda: diagonal(op, 1, g), "probes must be >= 2"),
        (lambda: exact_diagonal(op, limit=2), "at most 2, got 3 entries"),
        (lambda: top_eigenvalue(op, 4, g), r"steps must lie in \[1, 3\] \(the dimension\), got 4"),
        (lambda: top_eigenvalue(op, 0, g), r"steps must lie in \[1, 3\]"),
        (lambda: top_eigenpairs(op, 3, 2, g), r"k must lie in \[1, 2\]"),
        (lambda: trace(op, 2.5, g), r"probes must be a whole number, got 2\.5"),
        (lambda: trace(op, True, g), "probes must be a whole number, got True"),
        (lambda: top_eigenpairs(op, 2.5, 3, g), r"k must be a whole number, got 2\.5"),
        (lambda: top_eigenvalue(op, "3", g), "steps must be a whole number, got '3'"),
        (lambda: Estimate(1.0, 0.5, 1, 1).interval(), "at least 2 measurements, got 1"),
        (lambda: Estimate(1.0, 0.5, 9, 9).interval(1.0), r"level must lie in \(0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
