"""Spectral densities of matrices with a known spectrum and of a tiny network."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models, tree
from dpkit.hessian import Density, Operator, spectral_density, top_eigenpairs, trace
from dpkit.hessian.deflate import Deflated
from dpkit.models import ModelSpec


def generator(*path) -> torch.Generator:
    return tree.generator_for("density tests", *path)


class MatrixOperator:
    """A dense symmetric matrix behind the interface of an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device
        self.products = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


def with_spectrum(values) -> MatrixOperator:
    values = torch.as_tensor(values, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator("basis"), dtype=torch.float64))
    return MatrixOperator(q @ torch.diag(values) @ q.T)


SPECTRA = {"bulk and outliers": torch.cat([torch.linspace(0.5, 1.5, 390), torch.linspace(4, 8, 10)]),
           "negative side": torch.linspace(-1, 3, 400), "few values": torch.tensor([1.0, 2.0, 5.0]).repeat_interleave(100)}


@pytest.mark.parametrize("name", SPECTRA)
def test_moments_of_a_known_spectrum(name):
    truth = SPECTRA[name].double()
    op = with_spectrum(truth)
    found = spectral_density(op, 60, 20, generator(name))
    assert found.nodes.shape == found.weights.shape == (60, 20)
    assert found.products == op.products <= 60 * 20
    for order in range(5):
        exact = float((truth**order).mean())
        estimate = found.moment(order)
        assert estimate.samples == 60
        # The operator is small, so directions scatter more than for a network's many thousand weights.
        assert abs(estimate.value - exact) <= 0.02 * abs(exact) + 3 * estimate.standard_error
        assert estimate.standard_error <= 0.15 * abs(exact) + 1e-12
    assert math.isclose(found.moment(0).value, 1.0, rel_tol=1e-12)


def test_moments_to_two_per_cent():
    truth = torch.cat([torch.linspace(0.5, 1.5, 1990), torch.linspace(2, 3, 10)]).double()
    found = spectral_density(MatrixOperator(torch.diag(truth)), 20, 12, generator("diagonal"))
    for order in range(1, 6):
        assert math.isclose(found.moment(order).value, float((truth**order).mean()), rel_tol=0.02)


def test_one_direction_is_integrated_exactly():
    """m nodes integrate v'H^k v for k up to 2 m - 1 and not beyond."""
    op = with_spectrum(torch.linspace(-1, 2, 30))
    found = spectral_density(op, 2, 4, generator("exact"))
    start = torch.randn(30, generator=generator("exact"), dtype=torch.float64)
    start /= start.norm()
    image = start
    for order in range(9):
        by_nodes, exact = float((found.weights[0] * found.nodes[0]**order).sum()), float(start @ image)
        assert (abs(by_nodes - exact) < 1e-12) == (order < 8)
        image = op.matrix @ image


def test_curve_is_the_broadened_spectrum():
    truth = SPECTRA["bulk and outliers"].double()
    found = spectral_density(with_spectrum(truth), 40, 40, generator("curve"))
    curve = found.curve(width=0.15)
    step = float(curve.grid[1] - curve.grid[0])
    assert math.isclose(float(curve.values.sum()) * step, 1.0, rel_tol=1e-3)
    exact = torch.exp(-0.5 * ((curve.grid[:, None] - truth) / 0.15)**2).mean(1) / (0.15 * math.sqrt(2 * math.pi))
    assert ((curve.values - exact).abs() <= 3 * curve.standard_errors + 0.01 * exact.max()).double().mean() >= 0.98
    assert (curve.standard_errors < 0.1 * exact.max()).all()
    assert curve.standard_errors.max() > 0
    # The error bars are those of the mean: a quarter of the directions has twice the error.
    quarter = Density(found.nodes[:10], found.weights[:10], 0, found.size).curve(curve.grid, 0.15)
    assert 1.3 < float(quarter.standard_errors.mean() / curve.standard_errors.mean()) < 3.0
    share = found.above(3.0)
    assert abs(share.value - 10 / 400) <= 3 * share.standard_error
    assert found.curve().width == pytest.approx(float(found.nodes.max() - found.nodes.min()) / 100)
    assert len(found.curve(7).grid) == 7


def test_a_space_that_closes_early():
    op = MatrixOperator(torch.diag(torch.tensor([2.0] * 20 + [5.0] * 10, dtype=torch.float64)))
    found = spectral_density(op, 5, 9, generator("closed"))
    assert found.products == op.products < 5 * 9
    assert torch.allclose(found.weights.sum(1), torch.ones(5, dtype=torch.float64))
    assert found.nodes.max() <= 5 + 1e-9
    same = spectral_density(MatrixOperator(torch.eye(6)), 2, 3, generator(0))
    assert same.moment(3).value == pytest.approx(1.0)
    assert same.curve().width == pytest.approx(0.01)


def test_density_of_a_network():
    """All eigenvalues of a dense float64 Hessian against as many steps as see them and a few."""
    spec = ModelSpec(arch="convnet3", width=3, image_size=8, channels=1, classes=4)
    params, buffers = (tree.to(t, dtype=torch.float64) for t in models.init(spec, generator("net")))
    images = torch.randn(12, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    labels = torch.randint(0, 4, (12,), generator=generator("labels"))
    op = Operator(spec, params, buffers, images, labels)
    names = models.prunable(spec)

    def loss(flat: Tensor) -> Tensor:
        logits, _ = models.forward(spec, {**params, **tree.unflatten(flat, {n: params[n] for n in names})}, buffers, images)
        return F.cross_entropy(logits, labels)

    truth = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, tree.flatten({n: params[n] for n in names})))
    found = spectral_density(op, 40, 30, generator("probes"))
    assert found.size == len(truth)
    for order in (1, 2, 3):
        estimate, exact = found.moment(order), float((truth**order).mean())
        assert abs(estimate.value - exact) <= 3 * estimate.standard_error
        assert estimate.standard_error <= 0.3 * abs(exact)
    total = trace(op, 40, generator("trace"))
    assert abs(found.moment(1).value * found.size - total.value) <= 4 * total.standard_error
    threshold = 0.05 * float(truth[-1])
    share = found.above(threshold)
    assert abs(share.value - float((truth > threshold).double().mean())) <= 3 * share.standard_error + 0.02
    assert math.isclose(float(found.nodes.max()), float(truth[-1]), rel_tol=1e-9)


def test_what_makes_no_sense_is_refused():
    op, found = with_spectrum([1.0, 2.0, 3.0]), Density(torch.zeros(2, 3), torch.ones(2, 3) / 3, 6, 3)
    for call, line in [
        (lambda: spectral_density(op, 1, 2, generator(0)), "probes must be >= 2"),
        (lambda: spectral_density(op, 2, 4, generator(0)), r"steps must lie in \[1, 3\]"),
        (lambda: spectral_density(op, 2, 0, generator(0)), r"steps must lie in \[1, 3\]"),
        (lambda: found.moment(-1), "order must be >= 0, got -1"),
        (lambda: found.curve(width=0.0), "width must be > 0, got 0.0"),
        (lambda: found.curve(width=math.nan), "width must be > 0, got nan"),
        (lambda: found.curve(1), "at least two points"),
        (lambda: found.curve(torch.zeros(2, 2)), "at least two points"),
    ]:
        with pytest.raises(ValueError, match=line):
            call()


def test_directions_that_were_taken_out_for_another_estimate_serve_the_density_too():
    op = with_spectrum(SPECTRA["bulk and outliers"])
    pairs = top_eigenpairs(op, 10, 60, generator("pairs"))
    rest = Deflated(op, pairs.vectors)
    found, again = (spectral_density(op, 3, 8, generator("shared"), given) for given in (rest, pairs))
    assert torch.allclose(found.nodes, again.nodes, atol=1e-12)
    assert torch.allclose(found.weights, again.weights, atol=1e-12)
    assert (found.products, again.products, found.known) == (3 * 8, 3 * 8 + 10 + pairs.products, 10)
    small = with_spectrum([1.0, 2.0, 3.0])
    whole = Deflated(small, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"pairs must be fewer than 3 \(the dimension\)"):
        spectral_density(small, 2, 1, generator(0), whole)
