"""Traces that take the large eigenvalues out first, traces to a target error, Frobenius norms: known spectra, stated errors."""
import math

import pytest
import torch
from test_hessian import CASES, dense_hessian, problem
from test_hessian_estimators import SPREAD, MatrixOperator, generator, with_spectrum
from torch import Tensor

from dpkit import models
from dpkit.hessian import Estimate, trace
from dpkit.hessian.deflate import Deflated, deflated_trace_and_diagonal, hutch_plus_plus, sketch
from dpkit.hessian.estimate import student_quantile
from dpkit.hessian.norms import jackknife, moments
from dpkit.hessian.stopping import chi_square_quantile, to_error
from dpkit.hessian.xtrace import xtrace

DOMINATED = [40.0] + [1.0] * 39
STEEP = [0.7**i for i in range(200)]
DECAYING = [0.9**i for i in range(200)]
MIXED = [(-1) ** i / (i + 1) for i in range(150)]
SEEDS = 200


def network(name: str) -> MatrixOperator:
    spec, sparsity, soft, names = CASES[name]
    return MatrixOperator(dense_hessian(spec, *problem(spec, sparsity, soft), names or models.prunable(spec)))


@pytest.fixture(scope="module")
def operators() -> dict[str, MatrixOperator]:
    spectra = {"spread": SPREAD, "dominated": DOMINATED, "decaying": DECAYING, "steep": STEEP, "mixed signs": MIXED}
    return {name: with_spectrum(values) for name, values in spectra.items()} | {name: network(name) for name in
                                                                                ("convnet, masked", "resnet, some names, masked")}


def inside(truth: float, runs: list[Estimate], level: float) -> int:
    return sum(low <= truth <= high for low, high in (run.interval(level) for run in runs))


def least(seeds: int, share: float) -> int:
    """A count that ``share`` of ``seeds`` falls short of once in ten thousand times, about (3.7 deviations)."""
    return math.floor(seeds * share - 3.7 * math.sqrt(seeds * share * (1 - share)))


ESTIMATORS = {"hutchinson": (trace, 40, 0.95), "hutch++": (hutch_plus_plus, 39, 0.95), "xtrace": (xtrace, 40, 0.95)}
# What the docstrings admit: samples are as skewed as a squared normal where one eigenvalue dominates, or what a sketch leaves.
ADMITTED = {("hutchinson", "dominated"): 0.90, ("hutchinson", "steep"): 0.91, ("hutch++", "steep"): 0.90}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_trace_is_within_its_stated_error(operators, estimator):
    """Intervals of level 95% hold the truth in 95 of 100 seeds, up to that count's scatter; of level 99.9% in 95 at least."""
    function, products, level = ESTIMATORS[estimator]
    for name, op in operators.items():
        truth = float(op.matrix.trace())
        runs = [function(op, products, generator(estimator, name, seed)) for seed in range(SEEDS)]
        assert {run.products for run in runs} == {products}
        assert inside(truth, runs, level) >= least(SEEDS, ADMITTED.get((estimator, name), level)), name
        assert inside(truth, runs, 0.999) >= 0.95 * SEEDS, name
        mean = torch.tensor([run.value for run in runs], dtype=torch.float64)
        floor = 1e-12 * float(op.matrix.diagonal().abs().sum())
        assert abs(float(mean.mean()) - truth) <= 4 * float(mean.std()) / math.sqrt(SEEDS) + floor, name


def test_errors_are_not_merely_large(operators):
    """Root mean square of the stated errors against the true one: equal for Hutch++, up to 2.4 times for the jackknife."""
    for name in ("dominated", "decaying", "mixed signs", "convnet, masked"):
        op = operators[name]
        for estimator, low, high in (("hutch++", 0.8, 1.2), ("xtrace", 1.0, 3.5)):
            function, products, _ = ESTIMATORS[estimator]
            runs = [function(op, products, generator(estimator, name, seed)) for seed in range(100)]
            stated = sum(run.standard_error**2 for run in runs)
            true = sum((run.value - float(op.matrix.trace()))**2 for run in runs)
            assert low <= math.sqrt(stated / true) <= high, (name, estimator)


def test_taking_the_top_out_pays_where_it_dominates():
    """At equal products: Hutchinson's error, then a fraction of it. A flat spectrum is the other way round."""
    def error(function, op):
        runs = [function(op, 30, generator("pays", seed)).value for seed in range(100)]
        return math.sqrt(sum((value - float(op.matrix.trace()))**2 for value in runs) / len(runs))

    steep = with_spectrum(STEEP)
    assert error(hutch_plus_plus, steep) < 0.2 * error(trace, steep)
    assert error(xtrace, steep) < 0.3 * error(hutch_plus_plus, steep)
    flat = with_spectrum([1.0 + (i % 2) / 10 for i in range(200)])
    assert error(hutch_plus_plus, flat) > error(trace, flat)


def test_xtrace_is_the_mean_over_left_out_vectors():
    """By the definition: a basis of its own for each vector, and for each pair in the jackknife."""
    op = with_spectrum(MIXED)
    g, count = generator("definition"), 7
    found = xtrace(op, 2 * count, generator("definition"))
    vectors = torch.randn(count, op.size, generator=g, dtype=torch.float64).T
    vectors = vectors / vectors.norm(dim=0) * math.sqrt(op.size)

    def one(i: int, others: list[int]) -> Tensor:
        basis = torch.linalg.qr(op.matrix @ vectors[:, others])[0]
        outside = vectors[:, i] - basis @ (basis.T @ vectors[:, i])
        share = (op.size - len(others)) / outside.square().sum()
        return (basis.T @ op.matrix @ basis).trace() + share * outside @ op.matrix @ outside

    def estimate(members: list[int]) -> Tensor:
        return torch.stack([one(i, [j for j in members if j != i]) for i in members]).mean()

    everyone = list(range(count))
    assert math.isclose(found.value, float(estimate(everyone)), rel_tol=1e-9)
    without = torch.stack([estimate([j for j in everyone if j != i]) for i in everyone])
    assert math.isclose(found.standard_error, float((without - without.mean()).square().sum().sqrt()), rel_tol=1e-7)
    assert (found.products, found.samples) == (14, 7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_a_low_rank_is_exact(rank, dtype, tolerance):
    op = with_spectrum([5.0 - k for k in range(rank)] + [0.0] * (60 - rank), dtype=dtype)
    for found in (hutch_plus_plus(op, 18, generator("low")), xtrace(op, 14, generator("low"))):
        assert abs(found.value - float(op.matrix.double().trace())) <= tolerance * 20
        assert found.standard_error <= tolerance * 20
    assert math.isfinite(xtrace(with_spectrum(DECAYING, dtype=dtype), 60, generator("low")).standard_error)


@pytest.mark.parametrize("columns", [0, 3, 30])
def test_deflation_is_exact_for_any_basis(columns):
    """The two parts of H add up, whether the basis has anything to do with it or not."""
    op = with_spectrum(MIXED[:30])
    basis = torch.randn(30, columns, generator=generator("any"), dtype=torch.float64)
    rest = Deflated(op, basis)
    identity = torch.eye(30, dtype=torch.float64)
    outside = rest.matmat(identity)
    torch.testing.assert_close(rest.diagonal + outside.diagonal(), op.matrix.diagonal(), rtol=1e-12, atol=1e-13)
    assert math.isclose(rest.trace + float(outside.trace()), float(op.matrix.trace()), rel_tol=1e-11)
    assert torch.allclose(outside, outside.T, atol=1e-13)
    assert torch.allclose(rest.matvec(identity[0]), outside[:, 0], atol=1e-14)
    assert rest.products == columns
    assert (outside @ rest.basis).abs().max() <= 1e-13 if columns else rest.trace == 0.0


def test_diagonals_without_their_outliers(operators):
    """A quarter of the error, and every entry within it in 95 of 100."""
    op = with_spectrum([40.0, -30.0, 20.0] + SPREAD[3:])
    values, vectors = torch.linalg.eigh(op.matrix)
    basis = vectors[:, values.abs() > 15.0]
    truth, factor, within, ratio = op.matrix.diagonal(), student_quantile(0.95, 19), [], []
    for seed in range(60):
        total, found = deflated_trace_and_diagonal(op, basis, 20, generator("outliers", seed))
        assert found.products == total.products == 23
        within.append(((found.values - truth).abs() <= factor * found.standard_errors).double())
        plain = deflated_trace_and_diagonal(op, basis[:, :0], 20, generator("outliers", seed))[1]
        ratio.append(found.standard_errors.mean() / plain.standard_errors.mean())
        assert math.isclose(total.value, float(found.values.sum()), rel_tol=1e-9)
    assert 0.93 <= torch.stack(within).mean() <= 0.97
    assert torch.stack(ratio).mean() < 0.3


def test_a_target_is_reached_by_fresh_probes():
    op = with_spectrum(SPREAD)
    truth = float(op.matrix.trace())
    runs = [to_error(op, 0.02, 4000, generator("target", seed)) for seed in range(120)]
    assert sum(run.reached for run in runs) >= least(120, 0.85)
    for run in runs:
        assert run.estimate.products == 16 + run.estimate.samples
        assert run.target == 0.02 * abs(run.pilot.value)
        assert run.reached == (run.estimate.standard_error <= run.target)
    assert inside(truth, [run.estimate for run in runs], 0.95) >= least(120, 0.95)
    before = op.products
    run = to_error(op, 2.0, 4000, generator("absolute"), relative=False)
    assert op.products - before == run.estimate.products
    assert run.target == 2.0


def test_stopping_early_does_not_bias():
    """One eigenvalue makes up half of the trace: the rule that looks at its own samples is low by percents, this one is not."""
    op = with_spectrum(DOMINATED)
    truth, seeds = float(op.matrix.trace()), 1000
    own = torch.tensor([trace(op, 4000, generator("own", s), target=0.1, minimum=4).value for s in range(seeds)])
    fresh = torch.tensor([to_error(op, 0.1, 4000, generator("fresh", s), pilot=8).estimate.value for s in range(seeds)])
    assert own.mean() < truth - 5 * own.std() / math.sqrt(seeds)
    assert abs(fresh.mean() - truth) <= 3.5 * fresh.std() / math.sqrt(seeds)


def test_a_target_with_a_sketch_and_one_that_is_too_dear():
    op = with_spectrum(STEEP)
    plain = to_error(op, 0.01, 100_000, generator("sketch"))
    deflated = to_error(op, 0.01, 100_000, generator("sketch"), columns=10)
    assert plain.reached
    assert deflated.reached
    assert deflated.estimate.products < 0.1 * plain.estimate.products
    assert deflated.estimate.products == 20 + 16 + deflated.estimate.samples
    assert to_error(op, 0.9, 100, generator("cheap")).estimate.samples == 16
    dear = to_error(op, 1e-6, 50, generator("dear"))
    assert (dear.reached, dear.estimate.products, dear.estimate.samples) == (False, 50, 34)
    assert dear.planned > 1e6
    exact = to_error(MatrixOperator(torch.eye(9, dtype=torch.float64)), 0.01, 1000, generator("exact"))
    assert (exact.estimate.value, exact.estimate.standard_error, exact.estimate.samples, exact.reached) == (9.0, 0.0, 16, True)
    nothing = to_error(MatrixOperator(torch.zeros(9, 9)), 0.01, 1000, generator("zero"))
    assert (nothing.estimate.value, nothing.estimate.samples, nothing.reached) == (0.0, 16, True)


def test_chi_square_quantiles_equal_the_table():
    for freedom, level, quantile in [(3, 0.1, 0.58437), (7, 0.1, 2.83311), (15, 0.1, 8.54676), (15, 0.5, 14.33886),
                                     (30, 0.05, 18.49266), (10, 0.95, 18.30704)]:
        assert math.isclose(chi_square_quantile(level, freedom), quantile, rel_tol=0.015)


def test_frobenius_norm_and_participation(operators):
    for name in ("spread", "decaying", "mixed signs", "convnet, masked"):
        op = operators[name]
        values = torch.linalg.eigvalsh(op.matrix)
        truth = (values.sum(), values.square().sum(), values.square().sum().sqrt(), values.sum()**2 / values.square().sum())
        runs = [moments(op, 30, generator("moments", name, seed)) for seed in range(SEEDS)]
        for place, exact in enumerate(float(t) for t in truth):
            if place == 3 and name in ("mixed signs", "convnet, masked"):
                continue  # the trace is within its error of 0: a square of it is no normal variable
            assert inside(exact, [run[place] for run in runs], 0.99) >= 0.95 * SEEDS, (name, place)
    same = moments(MatrixOperator(2.0 * torch.eye(9, dtype=torch.float64)), 5, generator("same"))
    assert [round(e.value, 12) for e in same] == [18.0, 36.0, 6.0, 9.0]
    assert all(e.standard_error < 1e-12 and e.products == 5 for e in same)
    assert moments(MatrixOperator(torch.zeros(4, 4)), 3, generator("none")).participation == Estimate(0.0, 0.0, 3, 3)


def test_the_jackknife_of_a_mean_is_the_standard_error():
    samples = torch.randn(1, 12, generator=generator("jackknife"), dtype=torch.float64)
    found = jackknife(samples, lambda mean: mean[0], 12)
    assert math.isclose(found.value, float(samples.mean()), abs_tol=1e-12)
    assert math.isclose(found.standard_error, float(samples.std()) / math.sqrt(12), rel_tol=1e-12)
    # The square of a mean: the jackknife takes out var / s and nothing else.
    squared = jackknife(samples, lambda mean: mean[0].square(), 12)
    assert math.isclose(squared.value, float(samples.mean()**2 - samples.var() / 12), rel_tol=1e-9)


def test_agreement_with_curvlinops():
    """Another implementation on the same spectrum: both near the truth, at the same number of products."""
    curvlinops, examples = pytest.importorskip("curvlinops"), pytest.importorskip("curvlinops.examples")
    op = with_spectrum([0.7**i for i in range(100)])
    truth = float(op.matrix.trace())
    for theirs, ours in (("xtrace", xtrace), ("hutchpp_trace", hutch_plus_plus)):
        function = getattr(curvlinops, theirs, None)
        if function is None:
            pytest.skip(f"this curvlinops has no {theirs}")
        other = float(function(examples.TensorLinearOperator(op.matrix), 30))
        mine = ours(op, 30, generator("curvlinops"))
        assert abs(mine.value - truth) <= 0.03 * truth
        assert abs(other - truth) <= 0.06 * truth


def test_what_makes_no_sense_is_refused():
    op, g = with_spectrum([1.0, 2.0, 3.0]), generator(0)
    for call, line in [
        (lambda: hutch_plus_plus(op, 3, g), r"products must lie in \[4, 9\]"),
        (lambda: hutch_plus_plus(op, 10, g), r"products must lie in \[4, 9\]"),
        (lambda: xtrace(op, 5, g), r"products must be even and lie in \[6, 6\]"),
        (lambda: xtrace(op, 8, g), r"products must be even and lie in \[6, 6\]"),
        (lambda: sketch(op, 4, g), r"must lie in \[0, 3\]"),
        (lambda: Deflated(op, torch.ones(2, 1)), r"basis must be \(3, k\) with at most 3 columns, got \(2, 1\)"),
        (lambda: Deflated(op, torch.ones(3, 4)), r"got \(3, 4\)"),
        (lambda: deflated_trace_and_diagonal(op, torch.ones(3, 1), 1, g), "probes must be >= 2"),
        (lambda: moments(op, 2, g), "probes must be >= 3"),
        (lambda: moments(op, 4, g, block=0), "block must be >= 1, got 0"),
        (lambda: moments(op, 4.5, g), r"probes must be a whole number, got 4\.5"),
        (lambda: hutch_plus_plus(op, 6.0, g), r"products must be a whole number, got 6\.0"),
        (lambda: xtrace(op, 6.0, g), r"products must be a whole number, got 6\.0"),
        (lambda: jackknife(torch.ones(1, 2), lambda m: m[0], 2), "at least 3 independent draws, got 2"),
        (lambda: to_error(op, 0.0, 99, g), "target must be a standard error > 0, got 0.0"),
        (lambda: to_error(op, math.nan, 99, g), "target must be a standard error > 0, got nan"),
        (lambda: to_error(op, 0.1, 99, g, pilot=3), "pilot must be >= 4"),
        (lambda: to_error(op, 0.1, 99, g, caution=1.0), r"caution lie in \[0.5, 1\)"),
        (lambda: to_error(op, 0.1, 33, g, columns=1), "most must be >= 34 products"),
        (lambda: chi_square_quantile(0.0, 3), r"level must lie in \(0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
