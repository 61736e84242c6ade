"""Planes: networks lie where their coordinates say, and the grid reads what they give themselves."""
import pytest
import torch

from dpkit import models, tree
from dpkit.landscape import Plane, PlaneSpec, grid, plane
from dpkit.models import ModelSpec
from dpkit.training import evaluate

CONVNET = ModelSpec(arch="convnet3", width=5, image_size=8, classes=4)
RESNET = ModelSpec(arch="resnet10", width=4, image_size=16, classes=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(model, seed=0):
    params, buffers = models.init(model, generator(seed))
    source = generator(seed + 100)
    params = {n: t + 0.3 * torch.randn(t.shape, generator=source) for n, t in params.items()}
    return params, {n: t + torch.rand(t.shape, generator=source) for n, t in buffers.items()}


def three(model):
    return [network(model, seed)[0] for seed in range(3)]


def examples(model, count=30, seed=1):
    shape = (count, model.channels, model.image_size, model.image_size)
    images = torch.randn(shape, generator=generator(seed))
    return images, torch.randint(model.classes, (count,), generator=generator(seed + 1))


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
def test_networks_land_on_their_coordinates(model):
    networks, (images, labels) = three(model), examples(model)
    _, buffers = network(model)
    found = plane(*networks)
    for params, (x, y) in zip(networks, found.coordinates.tolist(), strict=True):
        there = found.point(x, y)
        assert list(there) == list(params)
        for name in params:
            assert there[name].dtype == params[name].dtype
            torch.testing.assert_close(there[name], params[name], rtol=0, atol=1e-5)
        error, loss = evaluate(model, there, buffers, images, labels)
        own_error, own_loss = evaluate(model, params, buffers, images, labels)
        assert error == own_error
        assert loss == pytest.approx(own_loss, abs=1e-5)


def test_the_basis_is_orthonormal_and_distances_are_true():
    a, b, c = three(RESNET)
    found = plane(a, b, c)
    basis = torch.stack([found.u, found.v])
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.u.dtype == found.origin.dtype == torch.float64
    assert found.u.numel() == sum(t.numel() for t in a.values())
    first, second, third = found.coordinates
    assert first.tolist() == [0, 0]
    assert second[1] == 0
    assert third[1] > 0
    for (p, q), (s, t) in {(0, 1): (a, b), (0, 2): (a, c), (1, 2): (b, c)}.items():
        distance = float((found.coordinates[p] - found.coordinates[q]).norm())
        difference = tree.subtract(tree.to(s, dtype=torch.float64), t)
        assert distance == pytest.approx(tree.norm(difference), rel=1e-6)


def test_a_plane_by_hand():
    found = plane(*({"w": torch.tensor(t)} for t in ([1.0, 1, 1], [3.0, 1, 1], [2.0, 4, 1])))
    assert found.coordinates.tolist() == [[0, 0], [2, 0], [1, 3]]
    assert found.u.tolist() == [1, 0, 0]
    assert found.v.tolist() == [0, 1, 0]
    assert found.point(-1, 0.5)["w"].tolist() == [0, 1.5, 1]
    x, y = found.axes(3, 0.5)
    assert x.tolist() == [-1.5, 1, 3.5]
    assert y.tolist() == [-1.5, 1.5, 4.5]


def test_nearly_parallel_directions_stay_orthogonal():
    source = generator(1)
    a = torch.randn(2000, generator=source)
    step, aside = torch.randn(2000, generator=source), torch.randn(2000, generator=source)
    found = plane({"w": a}, {"w": a + step}, {"w": a + 3 * step + 1e-3 * aside})
    assert abs(float(found.u @ found.v)) < 1e-12


def test_zeros_of_a_shared_mask_stay_zero():
    networks = three(CONVNET)
    for params in networks:
        params["conv1.weight"][0] = 0
    point = plane(*networks).point(1.3, -2.1)
    assert point["conv1.weight"][0].count_nonzero() == 0


def test_grid_equals_evaluation_point_by_point():
    found, (images, labels) = plane(*three(CONVNET)), examples(CONVNET)
    result = grid(PlaneSpec(resolution=3, margin=0.1, images=10), CONVNET, found, {}, images, labels)
    assert result.errors.shape == result.losses.shape == (3, 3)
    assert torch.equal(result.coordinates, found.coordinates)
    for i, y in enumerate(result.y.tolist()):
        for j, x in enumerate(result.x.tolist()):
            expected = evaluate(CONVNET, found.point(x, y), {}, images[::3], labels[::3])
            assert (result.errors[i, j], result.losses[i, j]) == expected
    x, y = found.axes(3, 0.1)
    assert torch.equal(result.x, x)
    assert torch.equal(result.y, y)


def test_without_margin_three_corners_are_the_networks():
    # This c lies straight above a, so the box has a and b in its lower corners and c in the upper left one.
    a, b, c = three(CONVNET)
    c = plane(a, b, c).point(0.0, 2.0)
    images, labels = examples(CONVNET)
    result = grid(PlaneSpec(resolution=2, margin=0, images=0), CONVNET, plane(a, b, c), {}, images, labels)
    for value, params in ((result.losses[0, 0], a), (result.losses[0, 1], b), (result.losses[1, 0], c)):
        assert float(value) == pytest.approx(evaluate(CONVNET, params, {}, images, labels)[1], abs=1e-4)


def test_statistics_are_reestimated_or_kept():
    found, (images, labels) = plane(*three(RESNET)), examples(RESNET)
    training, _ = examples(RESNET, 20, seed=9)
    _, buffers = network(RESNET)
    spec = PlaneSpec(resolution=2, statistics_images=10)
    again = grid(spec, RESNET, found, buffers, images, labels, training)
    kept = grid(spec.replace(statistics="keep"), RESNET, found, buffers, images, labels)
    corner = found.point(float(again.x[0]), float(again.y[1]))
    fresh = models.reestimate(RESNET, corner, buffers, training[::2])
    assert (again.errors[1, 0], again.losses[1, 0]) == evaluate(RESNET, corner, fresh, images, labels)
    assert (kept.errors[1, 0], kept.losses[1, 0]) == evaluate(RESNET, corner, buffers, images, labels)


@pytest.mark.parametrize("where", [0.0, 1.0, 0.3, -2.0, 50.0])
def test_networks_on_one_line_are_refused(where):
    a, b, _ = three(CONVNET)
    with pytest.raises(ValueError, match="must not lie on one line") as error:
        plane(a, b, tree.add(a, tree.subtract(b, a), where))
    assert "\n" not in str(error.value)


def test_rounding_of_a_close_second_network_is_no_direction():
    a, _, c = three(CONVNET)
    with pytest.raises(ValueError, match="must not lie on one line"):
        plane(a, tree.add(a, tree.subtract(c, a), 1e-4), c)


def test_bad_inputs_are_refused():
    a, b, c = three(CONVNET)
    with pytest.raises(ValueError, match="networks a and b must differ"):
        plane(a, tree.detach(a), c)
    with pytest.raises(ValueError, match=r"networks a and c must have the same tensors, but 'conv0\.bias'"):
        plane(a, b, {n: t for n, t in c.items() if n != "conv0.bias"})
    with pytest.raises(ValueError, match="network b must have finite weights"):
        plane(a, {n: t * float("nan") for n, t in b.items()}, c)
    images, labels = examples(RESNET)
    spread = plane(*three(RESNET))
    with pytest.raises(ValueError, match="needs statistics_images, got None"):
        grid(PlaneSpec(resolution=2), RESNET, spread, network(RESNET)[1], images, labels)
    with pytest.raises(ValueError, match="at least 1 image and one label for each"):
        grid(PlaneSpec(resolution=2), RESNET, spread, network(RESNET)[1], images[:0], labels[:0], images)
    assert isinstance(spread, Plane)


@pytest.mark.parametrize("fields, message", [
    ({"resolution": 1}, "resolution must be at least 2"),
    ({"margin": -0.1}, "margin must lie in"),
    ({"images": -1}, "images must be at least 0"),
    ({"statistics": "interpolate"}, "statistics must be one of reestimate, keep"),
    ({"statistics_images": 0}, "statistics_images must be at least 2"),
])
def test_bad_specifications_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PlaneSpec(**fields)
