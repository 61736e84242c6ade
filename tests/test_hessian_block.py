"""Block Lanczos on clusters, repeated eigenvalues and both ends, and on the dense Hessians of tiny networks."""
import pytest
import torch
from test_hessian import CASES, dense_hessian, problem
from test_hessian_estimators import MatrixOperator, generator, with_spectrum

from dpkit import models
from dpkit.hessian import Operator, top_eigenpairs
from dpkit.hessian.block_lanczos import block_eigenpairs


def check(op: MatrixOperator, pairs, tolerance: float = 1e-10) -> None:
    """Unit, orthogonal vectors; residuals as they are found by multiplying."""
    matrix, vectors = op.matrix.double(), pairs.vectors.double()
    identity = torch.eye(vectors.shape[1], dtype=torch.float64)
    assert (vectors.T @ vectors - identity).abs().max() <= tolerance
    residuals = (matrix @ vectors - vectors * pairs.values).norm(dim=0)
    assert (residuals <= 1.01 * pairs.residuals + tolerance * matrix.abs().max()).all()
    assert (pairs.residuals <= 1.01 * residuals + 20 * tolerance * matrix.abs().max()).all()


@pytest.mark.parametrize("name", ["convnet, masked", "convnet with BatchNorm, masked", "resnet, some names, masked",
                                  "convnet, soft labels, masked"])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_top_k_of_a_network(name, which):
    """1e-8 of the largest, the project's bound, from fewer products than the dimension."""
    spec, sparsity, soft, _ = CASES[name]
    given = problem(spec, sparsity, soft)
    truth = torch.linalg.eigvalsh(dense_hessian(spec, *given, models.prunable(spec)))
    op = Operator(spec, *given)
    pairs = block_eigenpairs(op, 5, op.size, generator(which), tolerance=1e-9, which=which)
    order = {"largest": truth.argsort(descending=True), "smallest": truth.argsort(),
             "magnitude": truth.abs().argsort(descending=True)}[which]
    assert (pairs.values - truth[order[:5]]).abs().max() <= 1e-8 * truth.abs().max()
    assert pairs.residuals.max() <= 1e-9 * truth.abs().max()
    assert pairs.products <= op.size
    images = op.matmat(pairs.vectors)
    assert ((images - pairs.vectors * pairs.values).norm(dim=0) <= 1.01 * pairs.residuals + 1e-12).all()


def test_a_cluster_is_found_whole():
    """Four eigenvalues that rounding hardly tells apart: one start vector goes on to what lies below them."""
    cluster = [10.0 + k * 1e-13 for k in range(4)]
    op = with_spectrum(cluster + [k / 290 for k in range(290)])
    block = block_eigenpairs(op, 4, 100, generator("cluster"), block=4, tolerance=1e-10)
    check(op, block)
    torch.testing.assert_close(block.values, torch.full((4,), 10.0, dtype=torch.float64), rtol=1e-12, atol=0)
    assert block.products <= 60
    one = top_eigenpairs(op, 4, 8, generator("cluster"))
    assert one.values[0] > 9.99
    assert one.values[1] < 1.1


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_repeated_eigenvalues_come_as_often_as_they_occur(block):
    truth = [5.0] * 4 + [2.0] * 10 + [-3.0] * 2 + [0.0] * 24
    op = with_spectrum(truth)
    pairs = block_eigenpairs(op, 6, 40, generator("repeated", block), block=block)
    torch.testing.assert_close(pairs.values, torch.tensor([5.0] * 4 + [2.0] * 2, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    check(op, pairs)
    everything = block_eigenpairs(op, 40, 40, generator("all", block), block=block, which="smallest")
    torch.testing.assert_close(everything.values, torch.tensor(sorted(truth), dtype=torch.float64), rtol=1e-12, atol=1e-12)
    check(op, everything)
    assert everything.products == 40


@pytest.mark.parametrize("block", [1, 3, 4])
def test_residuals_are_bounds_on_the_way(block):
    op = with_spectrum([9.0, 8.9, 8.8] + [k / 40 for k in range(57)])
    truth = torch.linalg.eigvalsh(op.matrix)
    for products in (6, 9, 13, 20, 41, 60):
        before = op.products
        pairs = block_eigenpairs(op, 3, products, generator("way"), block=block)
        assert op.products - before == pairs.products <= products
        assert pairs.products > products - block
        check(op, pairs)
        for value, bound in zip(pairs.values, pairs.residuals, strict=True):
            assert (truth - value).abs().min() <= bound + 1e-12


def test_both_ends_and_the_sizes():
    op = with_spectrum([-50.0, 30.0, 9.0, -7.0] + [k / 40 for k in range(36)])
    for which, expected in (("largest", [30.0, 9.0]), ("smallest", [-50.0, -7.0]), ("magnitude", [-50.0, 30.0])):
        found = block_eigenpairs(op, 2, 40, generator("ends"), which=which)
        torch.testing.assert_close(found.values, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)


def test_float32_and_a_matrix_of_zeros():
    """The basis stays orthogonal where one eigenvalue towers over the rest."""
    op = with_spectrum([1e4] + [1.0 + k / 100 for k in range(199)], dtype=torch.float32)
    pairs = block_eigenpairs(op, 4, 80, generator("single"), block=4)
    assert (pairs.vectors.T @ pairs.vectors - torch.eye(4)).abs().max() <= 1e-5
    assert abs(pairs.values[0] - 1e4) <= 1e-2
    assert pairs.values[1] < 3.0 + 1e-2
    zeros = block_eigenpairs(MatrixOperator(torch.zeros(7, 7)), 3, 7, generator("zeros"))
    assert not zeros.values.any()
    assert not zeros.residuals.any()


def test_stops_by_its_residuals_only():
    op = with_spectrum([100.0, 99.0] + [k / 100 for k in range(98)])
    loose, tight = (block_eigenpairs(op, 2, 100, generator("stop"), tolerance=t) for t in (1e-2, 1e-12))
    assert loose.products < tight.products < 100
    assert loose.residuals.max() <= 1e-2 * 100
    assert tight.residuals.max() <= 1e-12 * 100
    assert block_eigenpairs(op, 2, 100, generator("stop")).products == 100


def test_what_makes_no_sense_is_refused():
    op, g = with_spectrum([1.0, 2.0, 3.0]), generator(0)
    for arguments, more, line in [
        ((4, 3), {}, r"k must lie in \[1, 3\] \(the dimension\), got 4"),
        ((0, 3), {}, r"k must lie in \[1, 3\]"),
        ((2, 4), {}, r"products must lie in \[2, 3\]"),
        ((2, 1), {}, r"products must lie in \[2, 3\]"),
        ((1, 3), {"block": 0}, r"block must lie in \[1, 3\]"),
        ((1, 2), {"block": 3}, r"block must lie in \[1, 2\]"),
        ((1, 3), {"tolerance": -1.0}, "tolerance must be >= 0"),
        ((1, 3), {"which": "middle"}, "which one of largest, smallest, magnitude, .* 'middle'"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            block_eigenpairs(op, *arguments, g, **more)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="2 whole blocks of 2 to give 3 pairs, got 3"):
        block_eigenpairs(with_spectrum(range(9)), 3, 3, g, block=2)
