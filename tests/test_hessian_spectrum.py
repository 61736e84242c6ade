"""The measures of one spectrum that share their products, on known eigenvalues; as many as there are entries, and fewer, too."""
import math

import pytest
import torch
from test_hessian_estimators import MatrixOperator, generator, with_spectrum

from dpkit.hessian.spectrum import SpectrumSpec, curve, spectrum

SPEC = SpectrumSpec(eigenvalues=10, pair_products=60, probes=4, steps=8, trace_probes=6, other_probes=2, other_steps=15)


def of(values, spec=SPEC):
    op = with_spectrum(values)
    return spectrum(spec, lambda matrix: op, generator("spectrum", len(values)))


@pytest.mark.parametrize("size", range(1, 15))
def test_small_matrices_are_known_whole(size):
    """Fewer entries than eigenvalues asked for, as many, and a few more: all of the spectrum comes out."""
    values = [float(5 - k) for k in range(size)]
    found, truth = of(values), torch.tensor(values, dtype=torch.float64)
    assert found.size == size
    expected = truth[truth.abs().argsort(descending=True, stable=True)][:10]
    torch.testing.assert_close(found.pairs.values.abs(), expected.abs(), rtol=1e-9, atol=1e-12)
    assert abs(found.trace.value - float(truth.sum())) <= 6 * found.trace.standard_error + 1e-9
    if size <= 10:
        assert found.trace.value == pytest.approx(float(truth.sum()), abs=1e-9)
        nodes = found.density.nodes[0].sort(descending=True).values
        torch.testing.assert_close(nodes, truth, rtol=1e-9, atol=1e-9)
        assert found.density.weights.sum(1).tolist() == pytest.approx([1.0] * 4)
        assert float(found.negative.fraction.value) == pytest.approx(float(truth.clamp(max=0).abs().sum() / truth.abs().sum()))
        grid, heights, _ = curve(found.density)
        assert float(torch.trapezoid(heights, grid)) == pytest.approx(1.0, abs=0.02)


def test_a_large_matrix_is_sampled():
    values = [40.0, -30.0, *(2 - k / 50 for k in range(150))]
    found, truth = of(values), torch.tensor(values, dtype=torch.float64)
    assert found.pairs.values[:2].tolist() == pytest.approx([40.0, -30.0])
    assert 2 <= found.density.known <= 10
    assert 0 < found.trace.standard_error < 12  # 29 with the two outliers in it
    assert abs(found.trace.value - float(truth.sum())) <= 6 * found.trace.standard_error
    assert abs(found.frobenius.value - float(truth.norm())) <= 6 * found.frobenius.standard_error


def test_nothing_to_measure_is_said_in_a_line():
    with pytest.raises(ValueError, match="an effective rank needs an eigenvalue other than 0, got none"):
        spectrum(SPEC, lambda matrix: MatrixOperator(torch.zeros(6, 6, dtype=torch.float64)), generator("none"))
    with pytest.raises(ValueError, match="probes must be >= 3, got 2"):
        SpectrumSpec(probes=2)
    assert math.isclose(of([2.0] * 5).trace.value, 10.0)
