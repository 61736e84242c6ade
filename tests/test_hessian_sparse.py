"""Curvature of removed entries and overlaps with eigenvectors, against every mask there is and against many random ones."""
import itertools
import math

import pytest
import torch

from dpkit import models, tree
from dpkit.hessian import Operator, exact_diagonal, top_eigenpairs
from dpkit.hessian.eigenspaces import eigenspace_overlap, space_overlap
from dpkit.hessian.entries import Entries, entries, random_like
from dpkit.hessian.estimate import Estimate
from dpkit.hessian.objective import NetworkLoss
from dpkit.hessian.sparse import SparseSpec, answers, per_weight, removal, removed_curvature, removed_from_diagonal
from dpkit.models import ModelSpec

CONVNET = ModelSpec(arch="convnet3", width=3, image_size=8, channels=1, classes=4)


def generator(*path) -> torch.Generator:
    return tree.generator_for("sparse tests", *path)


class Matrix:
    """A dense symmetric matrix as an operator."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, matrix):
        self.matrix, self.size = matrix, len(matrix)

    def matvec(self, vector):
        return self.matrix @ vector

    def matmat(self, vectors):
        return self.matrix @ vectors


class Quadratic:
    def __init__(self, matrix, slope, weights):
        self.matrix, self.slope, self.weights = matrix, slope, weights

    def value(self, point):
        step = point - self.weights
        return float(self.slope @ step + step @ self.matrix @ step / 2)

    def gradient(self, point):
        return self.value(point), self.slope + self.matrix @ (point - self.weights)


LAYERS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
KEPT = torch.tensor([True, False, True, False, True, False, False, True])
MASK = Entries(KEPT, LAYERS)
COUNTS = ((2, 3), (1, 4), (1, 1))
"""Kept entries and all of them in each layer of :data:`MASK`."""


def symmetric(*path, n=8):
    m = torch.randn(n, n, generator=generator("matrix", *path), dtype=torch.float64)
    return m + m.T


def orthonormal(*path, n=8, k=3):
    return torch.linalg.qr(torch.randn(n, k, generator=generator("basis", *path), dtype=torch.float64))[0]


def all_masks(layerwise=True):
    """Every mask with as many kept entries in each layer, or in all."""
    counts = COUNTS if layerwise else ((4, 8),)
    choices = [[torch.tensor([i in chosen for i in range(n)]) for chosen in itertools.combinations(range(n), m)]
               for m, n in counts]
    return [torch.cat(parts) for parts in itertools.product(*choices)]


def mean_and_deviation(values):
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def test_chance_of_removed_curvature_is_that_of_every_mask():
    diagonal = torch.randn(8, generator=generator("diagonal"), dtype=torch.float64)
    found = removed_from_diagonal(diagonal, {"m": MASK})["m"]
    assert found.removed.value == pytest.approx(float(diagonal[~KEPT].mean()))
    assert found.kept.value == pytest.approx(float(diagonal[KEPT].mean()))
    assert found.all.value == pytest.approx(float(diagonal.mean()))
    mean, deviation = mean_and_deviation([float(diagonal[~kept].mean()) for kept in all_masks()])
    assert (found.chance.value, found.spread) == pytest.approx((mean, deviation))
    mean, deviation = mean_and_deviation([float(diagonal[~kept].mean()) for kept in all_masks(layerwise=False)])
    assert (found.all.value, found.spread_uniform) == pytest.approx((mean, deviation))
    assert found.excess.value == pytest.approx(found.removed.value - found.chance.value)
    assert found.score == pytest.approx(found.excess.value / found.spread)
    assert (found.count, found.size, found.removed.standard_error) == (4, 8, 0.0)
    expected = [[float(diagonal[(layer == LAYERS) & (kept == KEPT)].mean()) for kept in (False, True)] for layer in range(3)]
    torch.testing.assert_close(found.layers, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert math.isnan(found.layers[2, 0])
    assert torch.equal(found.layer_errors.isnan(), found.layers.isnan())


def test_probes_give_what_the_exact_diagonal_gives():
    """200 repetitions: unbiased, and standard errors that are the deviations of what they belong to."""
    op = Matrix(symmetric("probes"))
    exact = removed_from_diagonal(op.matrix.diagonal(), {"m": MASK})["m"]
    g, probes = generator("repeated"), 30
    found = [removed_curvature(op, {"m": MASK}, probes, g)["m"] for _ in range(200)]
    for name in ("removed", "kept", "all", "chance", "excess"):
        values = torch.tensor([getattr(f, name).value for f in found], dtype=torch.float64)
        stated = torch.tensor([getattr(f, name).standard_error for f in found], dtype=torch.float64)
        assert abs(float(values.mean()) - getattr(exact, name).value) <= 4 * float(values.std()) / math.sqrt(200)
        assert float(stated.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.2)
        assert getattr(found[0], name).products == getattr(found[0], name).samples == probes
    # sign vectors leave a variance to subtract, without which random masks would seem to spread more
    many = removed_curvature(op, {"m": MASK}, 20_000, g)["m"]
    assert many.spread == pytest.approx(exact.spread, rel=0.05)
    squares = torch.tensor([f.spread**2 for f in found], dtype=torch.float64)
    assert float(squares.mean()) == pytest.approx(exact.spread**2, rel=0.35)


def test_noise_of_the_probes_does_not_pass_for_spread():
    """Equal diagonal entries under large off-diagonal ones: every mask removes the same."""
    g, n = generator("noise"), 200
    m = torch.randn(n, n, generator=g, dtype=torch.float64)
    m = m + m.T
    m.fill_diagonal_(1.0)
    mask = Entries(torch.arange(n) % 2 == 0, torch.zeros(n, dtype=torch.int64))
    found = removed_curvature(Matrix(m), {"m": mask}, 50, g)["m"]
    naive = math.sqrt(float((m.square().sum(1) - 1).mean()) / 50 / n)
    assert found.spread < naive / 2
    assert abs(found.score) < 4


def test_masks_share_their_probes():
    op = Matrix(symmetric("shared"))
    other = Entries(KEPT.flip(0), LAYERS)
    both = removed_curvature(op, {"a": MASK, "b": other, "c": MASK}, 20, generator("p"))
    alone = removed_curvature(op, {"a": MASK}, 20, generator("p"))["a"]
    assert both["a"].removed == both["c"].removed == alone.removed
    assert both["b"].all == both["a"].all
    assert both["b"].removed != both["a"].removed


def test_magnitude_at_the_sharp_end_scores_high_and_random_masks_do_not():
    g = generator("scores")
    diagonal = torch.rand(400, generator=g, dtype=torch.float64).pow(3)
    layers = torch.arange(400) // 200
    sharp = torch.ones(400, dtype=torch.bool)
    for start in (0, 200):
        sharp[start + diagonal[start:start + 200].argsort()[-60:]] = False
    given = Entries(sharp, layers)
    assert removed_from_diagonal(diagonal, {"m": given})["m"].score > 10
    masks = {i: Entries(random_like(given, g), layers) for i in range(300)}
    scores = torch.tensor([f.score for f in removed_from_diagonal(diagonal, masks).values()])
    assert abs(float(scores.mean())) < 0.2
    assert float(scores.std()) == pytest.approx(1.0, abs=0.15)


def test_overlap_and_its_chance_are_those_of_every_mask():
    vectors = orthonormal("overlap")
    found = eigenspace_overlap(vectors, MASK)
    mass = vectors.square()
    assert found.share == pytest.approx(float(mass[KEPT].sum()) / 3)
    torch.testing.assert_close(found.shares, mass[KEPT].sum(0))
    for chance, masks in ((found.layerwise, all_masks()), (found.uniform, all_masks(layerwise=False))):
        assert tuple(chance) == pytest.approx(mean_and_deviation([float(mass[k].sum()) / 3 for k in masks]))
    for j in range(3):
        expected = mean_and_deviation([float(mass[k, j].sum()) for k in all_masks()])
        assert found.chances[j].tolist() == pytest.approx(expected)
    assert found.uniform.mean == pytest.approx(4 / 8)
    assert found.score == pytest.approx((found.share - found.layerwise.mean) / found.layerwise.deviation)
    # the share belongs to the space, not to its basis
    turned = eigenspace_overlap(vectors @ orthonormal("turn", n=3), MASK)
    assert turned.share == pytest.approx(found.share)
    assert turned.layerwise == pytest.approx(found.layerwise)


def test_a_whole_basis_has_no_overlap_but_chance():
    found = eigenspace_overlap(orthonormal("all", k=8), MASK)
    assert (found.share, found.layerwise.mean) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.layerwise.deviation < 1e-8


def test_spaces_share_all_nothing_or_chance():
    basis = orthonormal("spaces", n=12, k=5)
    assert space_overlap(basis[:, :3], basis).share == pytest.approx(1.0)
    assert space_overlap(basis[:, :2], basis[:, 2:]).share == pytest.approx(0.0, abs=1e-12)
    g = generator("random spaces")
    draws = torch.randn(4000, 12, 8, generator=g, dtype=torch.float64)
    one, other = torch.linalg.qr(draws[:, :, :5])[0], torch.linalg.qr(draws[:, :, 5:])[0]
    shares = (one.mT @ other).square().sum((1, 2)) / 3
    chance = space_overlap(one[0], other[0]).chance
    assert space_overlap(one[0], other[0]).share == pytest.approx(float(shares[0]))
    assert chance.mean == pytest.approx(float(shares.mean()), abs=4 * float(shares.std()) / math.sqrt(4000))
    assert chance.deviation == pytest.approx(float(shares.std()), rel=0.05)


def test_a_move_is_that_of_the_removed_weights():
    g = generator("move")
    matrix, (slope, weights) = symmetric("move"), torch.randn(2, 8, generator=g, dtype=torch.float64)
    found = removal(Matrix(matrix), Quadratic(matrix, slope, weights), MASK, 2000, g)
    step = torch.where(KEPT, 0.0, -weights)

    def expected(step):
        bent = float(step @ matrix @ step)
        return bent / float(step @ step), float(slope @ step), bent / 2, float(slope @ step) + bent / 2

    assert found[:4] == pytest.approx(expected(step), rel=1e-10)
    assert (found.random.shape, found.products) == ((2000, 4), 2001)
    every = torch.tensor([expected(torch.where(kept, 0.0, -weights)) for kept in all_masks()], dtype=torch.float64)
    error = every.std(0) / math.sqrt(2000)
    assert ((found.random.mean(0) - every.mean(0)).abs() <= 4 * error).all()
    assert {round(float(v), 9) for v in found.random[:, 0]} == {round(float(v), 9) for v in every[:, 0]}


def test_random_masks_keep_the_counts_of_each_layer():
    g = generator("alike")
    drawn = [random_like(MASK, g) for _ in range(60)]
    for kept in drawn:
        assert torch.bincount(LAYERS[kept]).tolist() == [m for m, _ in COUNTS]
    assert len({tuple(kept.tolist()) for kept in drawn}) == 3 * 4  # all there are


@pytest.fixture(scope="module")
def network():
    """(dense operator, loss, mask, params) of a tiny network in float64; the mask removes its smallest weights."""
    g = generator("network")
    params, buffers = (tree.to(t, dtype=torch.float64) for t in models.init(CONVNET, g))
    images = torch.randn(12, 1, 8, 8, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 4, (12,), generator=g)
    given = CONVNET, params, buffers, images, labels
    mask = {n: params[n].abs() > params[n].abs().median() for n in models.prunable(CONVNET)}
    return Operator(*given), NetworkLoss(*given), mask, params


def test_a_network_by_its_dense_hessian(network):
    op, loss, mask, params = network
    flat = entries(op, mask)
    assert torch.equal(flat.kept, torch.cat([mask[n].reshape(-1) for n in op.names]))
    assert flat.layers.bincount().tolist() == [params[n].numel() for n in op.names]
    dense = op.matmat(torch.eye(op.size, dtype=torch.float64))
    exact = removed_from_diagonal(exact_diagonal(op).values, {"half": flat})["half"]
    assert exact.removed.value == pytest.approx(float(dense.diagonal()[~flat.kept].mean()))
    spec = SparseSpec(images=12, dtype="float64", probes=60, directions=3, lanczos_steps=60, draws=3)
    found, values, residuals = answers(spec, op, loss, {"half": flat}, generator("answers"))
    half = found["half"]
    assert abs(half.curvature.excess.value - exact.excess.value) <= 4 * half.curvature.excess.standard_error
    assert half.curvature.excess.standard_error > 0
    true, vectors = torch.linalg.eigh(dense)
    torch.testing.assert_close(values, true.flip(0)[:3], rtol=1e-7, atol=1e-10)
    assert float(residuals.max()) < 1e-4
    assert half.overlap.share == pytest.approx(float(vectors[flat.kept, -3:].square().sum()) / 3, rel=1e-5)
    pruned = {**params, **{n: torch.where(m, params[n], 0.0) for n, m in mask.items()}}
    assert half.move.rise == pytest.approx(loss.value(op.flatten(pruned)) - loss.loss, rel=1e-9)
    step = op.flatten(pruned) - loss.weights
    assert half.move.quadratic == pytest.approx(float(step @ dense @ step) / 2, rel=1e-8)


def test_entries_pruned_before_are_in_neither_group(network):
    op, loss, mask, params = network
    pruned = {**params, **{n: torch.where(m, params[n], 0.0) for n, m in mask.items()}}
    sparse = NetworkLoss(CONVNET, pruned, loss._buffers, loss._images, loss._labels, mask)
    further = {n: m & (pruned[n].abs() > 1.5 * params[n].abs().median()) for n, m in mask.items()}
    flat = entries(sparse, further)
    assert len(flat.kept) == sparse.size == sum(int(m.sum()) for m in mask.values())
    assert int(flat.kept.sum()) == sum(int(m.sum()) for m in further.values())
    with pytest.raises(ValueError, match=r"the mask must have every tensor of the operator, got none for classifier\.weight"):
        entries(op, {n: m for n, m in mask.items() if n != "classifier.weight"})


def test_curvature_per_weight():
    assert per_weight(Estimate(30.0, 6.0, 20, 20), 60) == Estimate(0.5, 0.1, 20, 20)
    with pytest.raises(ValueError, match="size must be at least 1 surviving weight, got 0"):
        per_weight(Estimate(1.0, 1.0, 2, 2), 0)


def test_bad_input_is_refused(network):
    op, loss, mask, _ = network
    whole = Entries(torch.ones(8, dtype=torch.bool), LAYERS)
    with pytest.raises(ValueError, match="mask m must remove at least 1 of 8 entries, got none removed"):
        removed_from_diagonal(torch.ones(8), {"m": whole})
    with pytest.raises(ValueError, match=r"mask m must have 9 entries, as the operator, got \(8,\)"):
        removed_from_diagonal(torch.ones(9), {"m": MASK})
    with pytest.raises(ValueError, match="probes must be >= 2 to give an error bar, got 1"):
        removed_curvature(Matrix(symmetric()), {"m": MASK}, 1, generator())
    with pytest.raises(ValueError, match="operator and loss must be of one network, got 8 and"):
        removal(Matrix(symmetric()), loss, MASK, 0, generator())
    with pytest.raises(ValueError, match="draws must be >= 0, got -1"):
        removal(op, loss, entries(op, mask), -1, generator())
    zero = Quadratic(symmetric(), torch.ones(8, dtype=torch.float64), torch.where(KEPT, 1.0, 0.0).double())
    with pytest.raises(ValueError, match="the removed weights must not all be 0, got a move of length 0"):
        removal(Matrix(symmetric()), zero, MASK, 0, generator())
    with pytest.raises(ValueError, match=r"vectors must be \(8, k\) with k >= 1, as the mask, got \(7, 2\)"):
        eigenspace_overlap(torch.ones(7, 2), MASK)
    with pytest.raises(ValueError, match="vectors must be orthonormal columns, got inner products that are 8 off"):
        eigenspace_overlap(torch.ones(8, 2), MASK)
    with pytest.raises(ValueError, match="other must be orthonormal columns"):
        space_overlap(orthonormal(), 2 * orthonormal())
    with pytest.raises(ValueError, match=r"spaces must be \(n, k\) and \(n, m\) with one n >= 2, got \(8, 3\) and \(7, 3\)"):
        space_overlap(orthonormal(), orthonormal(n=7))
    with pytest.raises(ValueError, match=r"directions must lie in \[1, 5\] \(lanczos_steps\), got 6"):
        SparseSpec(directions=6, lanczos_steps=5)


def test_top_vectors_of_an_operator_fit(network):
    op, _, mask, _ = network
    vectors = top_eigenpairs(op, 2, 40, generator("top")).vectors
    found = eigenspace_overlap(vectors.float(), entries(op, mask))
    assert 0 < found.share < 1
    assert found.share == pytest.approx(eigenspace_overlap(vectors, entries(op, mask)).share, rel=1e-5)
