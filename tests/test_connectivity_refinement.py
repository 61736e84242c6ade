"""Peaks between the points: barriers of curves whose height is known, found to the tolerance asked for."""
import itertools
import math

import pytest
import torch

from dpkit.connectivity import Path, PathSpec, along, barrier, barrier_linear, excess, path, possible_rise, refine
from dpkit.models import ModelSpec

MLP = ModelSpec(arch="mlp", width=2, image_size=1, channels=1, classes=2)
ENDS = ({"t": torch.tensor(0.0, dtype=torch.float64)}, {"t": torch.tensor(1.0, dtype=torch.float64)})


def curve(function, points=11):
    """A path of losses ``function(alpha)`` without errors, and what measures it; the points asked for are kept."""
    asked = []

    def evaluate(alphas):
        asked.extend(alphas.tolist())
        return along(*ENDS, alphas, lambda p: (0.0, function(float(p["t"]))))

    return evaluate(torch.linspace(0, 1, points, dtype=torch.float64)), evaluate, asked


def quadratic(alpha):
    """Peak 2 at 0.537, between the points of any even grid."""
    return 2 - 5 * (alpha - 0.537) ** 2


def two_basins(alpha):
    """(t^2 - 1)^2 from t = -1 to 1.2: the ends are 0 and 0.1936, the saddle of height 1 is at t = 0."""
    return ((2.2 * alpha - 1) ** 2 - 1) ** 2


def test_a_quadratic_barrier_is_found_to_one_in_a_million():
    coarse, evaluate, _ = curve(quadratic)
    found = refine(coarse, evaluate, loss_tolerance=1e-6)
    ends = (quadratic(0) + quadratic(1)) / 2
    assert abs(coarse.loss_barrier - (2 - ends)) > 1e-3  # the grid alone misses it
    assert found.loss_barrier == pytest.approx(2 - ends, abs=1e-6)
    # above the chord q(0) + alpha (q(1) - q(0)) a parabola 5 alpha (1 - alpha) is left, whatever its ends: 1.25 at the middle
    assert found.loss_barrier_linear == pytest.approx(1.25, abs=1e-6)
    assert found.loss_gap <= 1e-6 < coarse.loss_gap


def test_the_barrier_between_two_basins_is_found_to_one_in_a_million():
    coarse, evaluate, _ = curve(two_basins, points=4)
    found = refine(coarse, evaluate, loss_tolerance=1e-6)
    assert found.loss_barrier == pytest.approx(1 - 0.1936 / 2, abs=1e-6)
    dense = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    assert found.loss_barrier_linear == pytest.approx(barrier_linear(dense, two_basins(dense)), abs=1e-6)
    assert len(found.alphas) < 101


def test_points_are_measured_once_reused_and_returned():
    coarse, evaluate, asked = curve(two_basins, points=5)
    found = refine(coarse, evaluate, loss_tolerance=1e-3)
    assert sorted(asked) == found.alphas.tolist()
    assert len(set(asked)) == len(asked)
    assert set(coarse.alphas.tolist()) < set(found.alphas.tolist())
    torch.testing.assert_close(found.losses, two_basins(found.alphas), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_tolerance_holds_and_costs_what_it_must(tolerance):
    coarse, evaluate, asked = curve(quadratic, points=5)
    found = refine(coarse, evaluate, loss_tolerance=tolerance)
    assert 0 <= 2 - float(found.losses.max()) <= tolerance
    # at most two points for each halving of the interval 1/4, from a rise of 5 / 16 to the tolerance, for each definition
    rounds = math.ceil(math.log2(math.sqrt(2 * 5 / 16 / tolerance)) + 1)
    assert len(asked) <= 5 + 4 * rounds


def test_flat_and_convex_paths_need_no_points():
    for function in (lambda alpha: 1.0, lambda alpha: (alpha - 0.3) ** 2, lambda alpha: alpha):
        coarse, evaluate, asked = curve(function, points=5)
        assert refine(coarse, evaluate, loss_tolerance=1e-9) is coarse
        assert len(asked) == 5
    assert curve(lambda alpha: (alpha - 0.3) ** 2)[0].loss_barrier_linear == 0.0


def test_a_peak_inside_the_first_interval_is_found():
    coarse, evaluate, _ = curve(lambda alpha: -(alpha - 0.04) ** 2, points=6)
    assert int(coarse.losses.argmax()) == 0
    assert float(refine(coarse, evaluate, loss_tolerance=1e-6).losses.max()) == pytest.approx(0, abs=1e-6)
    back, evaluate, _ = curve(lambda alpha: -(alpha - 0.96) ** 2, points=6)
    assert float(refine(back, evaluate, loss_tolerance=1e-6).losses.max()) == pytest.approx(0, abs=1e-6)


def test_errors_are_refined_in_their_own_unit():
    def evaluate(alphas):
        return along(*ENDS, alphas, lambda p: (0.5 - (float(p["t"]) - 0.3) ** 2, -5 * (float(p["t"]) - 0.7) ** 2))

    coarse = evaluate(torch.linspace(0, 1, 3, dtype=torch.float64))
    errors = refine(coarse, evaluate, error_tolerance=1e-4)
    assert errors.error_gap <= 1e-4 < errors.loss_gap
    both = refine(coarse, evaluate, error_tolerance=1e-4, loss_tolerance=1e-4)
    assert max(both.error_gap, both.loss_gap) <= 1e-4


def test_the_number_of_points_is_bounded():
    steps, evaluate, asked = curve(lambda alpha: math.floor(40 * alpha * (1 - alpha)) / 40 + 0.01 * math.sin(1e4 * alpha))
    found = refine(steps, evaluate, loss_tolerance=1e-12, most_points=20)
    assert len(found.alphas) == len(asked) == 20
    assert refine(steps, evaluate, loss_tolerance=1e-12, most_points=11) is steps
    assert refine(steps, evaluate) is steps


def test_how_far_a_concave_curve_may_rise():
    alphas = torch.tensor([0.0, 0.5, 0.75, 1.0])
    # peak at 0.5: from the left the slope 2 goes on for 0.25, from the right the slope -4 for 0.5
    assert possible_rise(alphas, torch.tensor([0.0, 1.0, 0.0, -1.0])).tolist() == [2.0, 0.5, 0.0]
    # two highest points: only outside of both can the curve rise, as far as between them it is level
    assert possible_rise(alphas, torch.tensor([0.0, 1.0, 1.0, 0.0])).tolist() == [0.0, 1.0, 0.0]
    # the highest point is an end: the line through the other two goes on
    assert possible_rise(alphas, torch.tensor([1.0, 0.75, 0.0, 0.0])).tolist() == [1.25, 0.0, 0.0]
    assert possible_rise(alphas[:2] * 2, torch.tensor([0.0, 1.0])).tolist() == [0.0]


def test_no_concave_curve_rises_further_than_said():
    source = torch.Generator().manual_seed(0)
    for _ in range(50):
        # the least of four lines is concave
        slopes, heights = torch.randn(2, 4, generator=source, dtype=torch.float64) * torch.tensor([[3.0], [1.0]])
        dense = torch.linspace(0, 1, 4001, dtype=torch.float64)
        least = (slopes[:, None] * dense + heights[:, None]).min(0).values
        inside = torch.randperm(3999, generator=source)[:4] + 1
        points = torch.cat([torch.tensor([0, 4000]), inside]).sort().values
        rise = possible_rise(dense[points], least[points])
        for i, (low, high) in enumerate(itertools.pairwise(points)):
            assert float(least[low:high + 1].max()) <= float(least[points].max() + rise[i]) + 1e-12


def test_the_height_above_the_chord():
    alphas, values = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    assert excess(alphas, values).tolist() == [0.0, 0.5, 0.0]
    assert (barrier(values), barrier_linear(alphas, values)) == (1.0, 0.5)


def test_paths_join_in_order_and_never_twice():
    one, two = (Path(torch.tensor(a), torch.tensor(a), torch.tensor(a) * 2) for a in ([0.0, 1.0], [0.75, 0.25]))
    joined = one.joined(two)
    assert joined.alphas.tolist() == joined.errors.tolist() == [0, 0.25, 0.75, 1]
    assert joined.losses.tolist() == [0, 0.5, 1.5, 2]
    with pytest.raises(ValueError, match=r"different points, but both have alpha 0\.25; leave it out"):
        joined.joined(two)


def mirrored(strength=1.5):
    """A network of x, one grey pixel, with logits +-strength x, and the same with its two last hidden units exchanged.

    The first layer gives relu(x) and relu(-x), the second layer again, as units that are each other's negatives.
    """
    first = torch.tensor([[1.0], [-1.0], [0.0], [0.0], [0.0], [0.0]])
    second = torch.tensor([[1.0, -1.0, 0, 0, 0, 0], [-1.0, 1.0, 0, 0, 0, 0]])
    last = strength * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    params = {"linear0.weight": first, "linear0.bias": torch.zeros(6), "linear1.weight": second, "linear1.bias": torch.zeros(2),
              "classifier.weight": last, "classifier.bias": torch.zeros(2)}
    return params, params | {"linear1.weight": second.flip(0), "classifier.weight": last.flip(1)}


def test_a_permuted_network_has_the_barrier_that_symmetry_asks_for():
    # Half-way both hidden units have weight zero: the logits are zero, the loss is log 2, and class 0 is said of every image.
    a, b = mirrored()
    images, labels = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(4, 1, 1, 1), torch.tensor([0, 1, 0, 1])
    # at alpha the weights shrink by |1 - 2 alpha| in each of both layers: the logits are +-1.5 (1 - 2 alpha)^2
    found = path(PathSpec(points=11), MLP, (a, {}), (b, {}), images, labels)
    expected = [math.log1p(math.exp(-3 * (1 - 2 * i / 10) ** 2)) for i in range(11)]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    barrier_of = math.log(2) - math.log1p(math.exp(-3))
    assert found.loss_barrier == pytest.approx(barrier_of, abs=1e-6)
    assert found.loss_barrier_linear == pytest.approx(barrier_of, abs=1e-6)
    assert found.error_barrier == 0.5
    even = path(PathSpec(points=4, loss_tolerance=1e-6), MLP, (a, {}), (b, {}), images, labels)
    assert even.loss_barrier == pytest.approx(barrier_of, abs=1e-6)
