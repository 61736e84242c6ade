"""The square of four networks, and where other networks lie on a plane."""
import itertools

import pytest
import torch
from landscape_networks import (
    CONVNET,
    MLP,
    RESNET,
    constant,
    examples,
    known_values,
    masked,
    network,
    random_mask,
    several,
)

from dpkit import tree
from dpkit.landscape import PlaneSpec, SquareSpec, around, grid, plane, project, square
from dpkit.training import evaluate


def test_weights_of_the_four_networks():
    for form in ("bilinear", "diagonals"):
        for x, y in itertools.product((-0.25, 0.0, 0.3, 1.0, 1.5), repeat=2):
            assert sum(square_weights(x, y, form)) == pytest.approx(1)
    assert square_weights(0.25, 0.5, "bilinear") == (0.375, 0.125, 0.375, 0.125)
    assert [square_weights(x, y, "bilinear") for x, y in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    # as the paper's code: the middle of a and d, plus or minus half of the other diagonal
    assert square_weights(1, 0, "diagonals") == (0.5, 0.5, -0.5, 0.5)
    assert square_weights(0, 0, "diagonals") == (1, 0, 0, 0)
    assert square_weights(1, 1, "diagonals") == (0, 0, 0, 1)


def square_weights(x, y, form):
    return square(*({"w": torch.tensor([float(i)])} for i in range(4))).weights(x, y, form)


def test_a_square_by_hand():
    found = square(*({"w": torch.tensor(t)} for t in ([0.0, 0], [2.0, 0], [0.0, 4], [2.0, 8])))
    assert found.point(0.5, 0.5)["w"].tolist() == [1, 3]
    assert found.point(1, 0.5)["w"].tolist() == [2, 4]
    assert found.point(-0.5, 0)["w"].tolist() == [-1, 0]
    assert found.point(1, 0, "diagonals")["w"].tolist() == [2, 2]  # b itself is at [2, 0]
    # a + d - b - c = [0, 4]; sides 2, 4, 8 and sqrt(4 + 16)
    assert found.twist == pytest.approx(4 / ((2 + 4 + 8 + 20**0.5) / 4))
    assert found.coordinates.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]


def test_a_parallelogram_is_a_plane_in_both_forms():
    a, b, c, _ = several(CONVNET, 4)
    d = {n: b[n] + c[n] - a[n] for n in a}
    found = square(a, b, c, d)
    assert found.twist < 1e-6
    for x, y in ((0.3, 0.8), (1.0, 0.0), (-0.5, 1.5)):
        expected = {n: a[n] + x * (b[n] - a[n]) + y * (c[n] - a[n]) for n in a}
        for form in ("bilinear", "diagonals"):
            for name, tensor in found.point(x, y, form).items():
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
def test_corners_of_the_grid_are_the_networks_bit_for_bit(model):
    nets = [network(model, seed) for seed in range(4)]
    images, labels = examples(model)
    found = square(*(p for p, _ in nets), buffers=tuple(b for _, b in nets))
    spec = SquareSpec(resolution=3, images=0, statistics="interpolate")
    result = grid(spec, model, found, nets[0][1], images, labels)
    assert result.x.tolist() == result.y.tolist() == [0, 0.5, 1]
    for (params, buffers), (column, row) in zip(nets, ((0, 0), (2, 0), (0, 2), (2, 2)), strict=True):
        assert (result.errors[row, column], result.losses[row, column]) == evaluate(model, params, buffers, images, labels)
    middle = [{n: sum(t[n].double() for t in trees).div(4).float() for n in trees[0]} for trees in zip(*nets, strict=True)]
    assert result.losses[1, 1] == pytest.approx(evaluate(model, *middle, images, labels)[1], rel=1e-5)


def test_a_margin_meets_the_corners_exactly():
    found, (images, labels) = square(*several(CONVNET, 4)), examples(CONVNET)
    result = grid(SquareSpec(resolution=13, margin=0.1), CONVNET, found, {}, images[:3], labels[:3])
    assert result.x[1] == 0
    assert result.x[11] == 1
    assert result.x[0] == -0.1
    assert result.losses[11, 1] == evaluate(CONVNET, found.corners[2], {}, images[:3], labels[:3])[1]


def test_a_loss_in_closed_form_over_the_square():
    corners = [torch.tensor(t) for t in ([0.0, 1, 2, 3], [4.0, 0, 1, 0], [1.0, 2, 0, 1], [0.0, 0, 5, 1])]
    images, labels = examples(MLP, 12)
    found = square(*map(constant, corners))
    for form in ("bilinear", "diagonals"):
        result = grid(SquareSpec(resolution=5, form=form, margin=0.5), MLP, found, {}, images, labels)
        for (i, y), (j, x) in itertools.product(enumerate(result.y.tolist()), enumerate(result.x.tolist())):
            logits = sum(w * t.double() for w, t in zip(found.weights(x, y, form), corners, strict=True))
            error, loss = known_values(logits, labels)
            assert float(result.losses[i, j]) == pytest.approx(loss, abs=1e-6)
            assert float(result.errors[i, j]) == pytest.approx(error, abs=1e-12)


def test_zeros_that_all_four_share_stay():
    nets = several(CONVNET, 4)
    mask = random_mask(CONVNET, nets[0])
    found = square(*(masked(p, mask) for p in nets), mask=mask)
    for form in ("bilinear", "diagonals"):
        point = found.point(0.3, 1.7, form)
        assert not any(bool(point[name][~keep].any()) for name, keep in mask.items())


def test_bad_squares_are_refused():
    a, b, c, d = several(CONVNET, 4)
    with pytest.raises(ValueError, match="four networks of a square must differ, but b and d are equal"):
        square(a, b, c, tree.detach(b))
    with pytest.raises(ValueError, match="networks a and d must have tensors of the same shapes"):
        square(a, b, c, d | {"conv0.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="network c must have finite weights"):
        square(a, b, {n: t * float("inf") for n, t in c.items()}, d)
    mask = random_mask(CONVNET, a)
    with pytest.raises(ValueError, match=r"network c must be zero where the mask removes weights, but 'conv0\.weight' has \d+ "):
        square(masked(a, mask), masked(b, mask), c, masked(d, mask), mask=mask)
    with pytest.raises(ValueError, match=r"network a must fit the mask, but 'conv0\.weight' is \(2,\) in the mask and is \(5,"):
        plane(a, b, c, mask={"conv0.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"network a must fit the mask, but 'fc' is \(2,\) in the mask and is not in it"):
        plane(a, b, c, mask={"fc": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="buffers of its 4 networks, got 3"):
        square(a, b, c, d, buffers=({}, {}, {}))
    images, labels = examples(CONVNET)
    with pytest.raises(ValueError, match="a square of four networks must be measured as a SquareSpec says, got a PlaneSpec"):
        grid(PlaneSpec(), CONVNET, square(a, b, c, d), {}, images, labels)
    with pytest.raises(ValueError, match="interpolated statistics need the buffers of all four networks"):
        grid(SquareSpec(statistics="interpolate"), CONVNET, square(a, b, c, d), {}, images, labels)
    with pytest.raises(ValueError, match=r"must be of resnet10 with batch norm, but 'conv0\.weight' is no tensor of it and 'bn1"):
        grid(SquareSpec(), RESNET, square(a, b, c, d), {}, *examples(RESNET))
    with pytest.raises(ValueError, match="networks are projected onto planes, got the square"):
        project(square(a, b, c, d), [a])


@pytest.mark.parametrize("fields, message", [
    ({"resolution": 1}, "resolution must be at least 2"),
    ({"margin": -1}, "margin must lie in"),
    ({"form": "round"}, "form must be one of bilinear, diagonals"),
    ({"statistics": "interpolate", "margin": 0.5}, "need margin 0 and form bilinear, where no .* got margin 0.5"),
    ({"statistics": "interpolate", "form": "diagonals"}, "got margin 0 and form diagonals"),
    ({"images": -1}, "images must be at least 0"),
    ({"precision": "fp8"}, "precision must be one of fp32, bf16"),
])
def test_bad_specifications_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SquareSpec(**fields)


def test_projection_by_hand():
    flat = plane(*({"w": torch.tensor(t)} for t in ([1.0, 1, 1], [3.0, 1, 1], [2.0, 4, 1])))
    found = project(flat, [{"w": torch.tensor(t)} for t in ([4.0, 5, 13], [1.0, 1, 1], [1.0, 1, 0], [0.0, 2, 1])])
    assert found.positions.tolist() == [[3, 4], [0, 0], [0, 0], [-1, 1]]
    assert found.outside.tolist() == [12, 0, 1, 0]
    assert found.relative.tolist() == [12 / 13, 0, 1, 0]
    # as near to the origin as rounding brings the end of a way there says nothing, and a hundred times as far does
    found = project(flat, [{"w": torch.tensor([1.0, 1, 1 + gap])} for gap in (1e-5, 1e-3)])
    assert found.relative.tolist() == [0, 1]
    assert (found.outside > 0).all()


def test_projection_onto_directions_that_are_not_orthogonal():
    base, first, second = ({"w": torch.tensor(t)} for t in ([0.0, 0, 1], [2.0, 0, 0], [1.0, 1, 0]))
    positions, outside, relative = project(around(base, first, second), [{"w": torch.tensor([4.0, 2, 4])}])
    torch.testing.assert_close(positions, torch.tensor([[1.0, 2.0]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(outside) == pytest.approx(3)
    assert float(relative) == pytest.approx(3 / 29**0.5)


def test_projection_is_the_nearest_point_and_corners_lie_on_the_plane():
    a, b, c, other = several(RESNET, 4)
    flat = plane(a, b, c)
    found = project(flat, (p for p in (a, b, c, other)))
    torch.testing.assert_close(found.positions[:3], flat.coordinates, rtol=0, atol=1e-9)
    assert found.outside[:3].max() < 1e-9
    away = tree.norm(tree.subtract(tree.to(other, dtype=torch.float64), a))
    assert float(found.positions[3].square().sum() + found.outside[3] ** 2) == pytest.approx(away**2)
    assert float(found.relative[3]) == pytest.approx(float(found.outside[3]) / away)

    def distance(x, y):
        point = flat.origin + x * flat.u + y * flat.v
        return float((tree.flatten(other).double() - point).norm())

    x, y = found.positions[3].tolist()
    assert distance(x, y) == pytest.approx(float(found.outside[3]))
    assert all(distance(x + dx, y + dy) > float(found.outside[3]) for dx, dy in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)))
    none = project(flat, [])
    assert none.positions.shape == (0, 2)
    assert none.outside.shape == (0,)


def test_projection_refuses_other_networks():
    flat = plane(*several(CONVNET, 3))
    with pytest.raises(ValueError, match="networks plane and number 1 must have the same tensors"):
        project(flat, [network(CONVNET)[0], network(RESNET)[0]])
    with pytest.raises(ValueError, match="network number 0 must have finite weights"):
        project(flat, [{n: t * float("nan") for n, t in network(CONVNET)[0].items()}])
