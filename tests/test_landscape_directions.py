"""Directions with the norms of filters, planes around a network, and lines through it."""
import pytest
import torch
from landscape_networks import CONVNET, MLP, RESNET, constant, examples, generator, known_values, masked, network, random_mask

from dpkit import models
from dpkit.landscape import AroundSpec, ProfileSpec, around, filter_normalised, grid, profile, random_directions
from dpkit.models import ModelSpec
from dpkit.training import evaluate

GREY = ModelSpec(arch="mlp", width=1, image_size=2, channels=1, classes=2, norm="none")


def filled(model, value=1.0, **tensors):
    params, _ = models.init(model, generator())
    named = {name.replace("_", ".", 1): torch.tensor(t) for name, t in tensors.items()}
    return {name: named.get(name, torch.full_like(t, value)) for name, t in params.items()}


def test_norms_by_hand():
    params = filled(GREY, linear0_weight=[[3.0, 0, 0, 4], [0, 0, 0, 0], [1, 1, 1, 1]], classifier_weight=[[2.0], [-6.0]])
    step = filled(GREY, linear0_weight=[[0.0, 2, 0, 0], [1, 2, 3, 4], [0, -3, 4, 0]], classifier_weight=[[-0.5], [0.1]])
    found = filter_normalised(GREY, params, step)
    expected = torch.tensor([[0, 5, 0, 0], [0, 0, 0, 0], [0, -1.2, 1.6, 0]], dtype=torch.float64)  # norms 5, 0, 2
    torch.testing.assert_close(found["linear0.weight"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["classifier.weight"], torch.tensor([[-2], [6]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert not found["linear0.bias"].any()
    moved = filter_normalised(GREY, params, step | {"linear0.bias": torch.tensor([0.0, 7, 0])}, others="tensor")
    torch.testing.assert_close(moved["linear0.bias"], torch.tensor([0, 3**0.5, 0], dtype=torch.float64))  # |(1, 1, 1)|
    assert torch.equal(moved["linear0.weight"], found["linear0.weight"])


def test_norms_of_survivors_by_hand():
    keep = torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, False]])
    params = filled(GREY, linear0_weight=[[3.0, 0, 0, 4], [0, 0, 0, 0], [2, 0, 0, 0]])
    step = filled(GREY, linear0_weight=[[4.0, 3, 100, 0], [1, 1, 1, 1], [-0.1, 9, 9, 9]])
    found = filter_normalised(GREY, params, step, mask={"linear0.weight": keep})["linear0.weight"]
    expected = torch.tensor([[4, 3, 0, 0], [0, 0, 0, 0], [-2, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [CONVNET, RESNET, ModelSpec(arch="vit", width=8, image_size=8, classes=4)],
                         ids=["convnet", "resnet", "vit"])
@pytest.mark.parametrize("others", ["zero", "tensor"])
def test_every_filter_of_a_random_direction_has_the_norm_of_the_network(model, others):
    params, _ = network(model)
    mask = random_mask(model, params)
    params = masked(params, mask)
    first, second = random_directions(AroundSpec(others=others), model, params, generator(3), mask=mask)
    assert list(first) == list(params)
    for name, weight in params.items():
        assert first[name].dtype == torch.float64
        rows = len(weight) if name in mask else 1
        expected = weight.double().reshape(rows, -1).norm(dim=1) * (name in mask or others == "tensor")
        for direction in (first, second):
            torch.testing.assert_close(direction[name].reshape(rows, -1).norm(dim=1), expected, rtol=1e-12, atol=1e-12)
        if name in mask:
            assert not first[name][~mask[name]].any()
            assert first[name][mask[name]].all()
            assert not torch.equal(first[name], second[name])


def test_draws_do_not_depend_on_masks_or_on_how_many_are_asked_for():
    params, _ = network(CONVNET)
    mask = random_mask(CONVNET, params)
    few, many = (random_directions(ProfileSpec(directions=n), CONVNET, params, generator(4)) for n in (2, 4))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(few, many[:2], strict=True) for n in a)
    sparse = random_directions(ProfileSpec(directions=2), CONVNET, masked(params, mask), generator(4), mask=mask)[1]
    for name, keep in mask.items():  # the same signs and, within a filter, the same ratios
        own, full = (t[name] * keep for t in (sparse, few[1]))
        cosine = (own * full).flatten(1).sum(1) / (own.flatten(1).norm(dim=1) * full.flatten(1).norm(dim=1)).clamp(min=1e-30)
        torch.testing.assert_close(cosine[keep.flatten(1).any(1)], torch.ones(int(keep.flatten(1).any(1).sum())).double())


def test_the_network_lies_in_the_middle_bit_for_bit():
    params, buffers = network(RESNET)
    images, labels = examples(RESNET)
    spec = AroundSpec(resolution=3, reach=0.5, images=0, statistics="keep")
    first, second = random_directions(spec, RESNET, params, generator(2))
    result = grid(spec, RESNET, around(params, first, second), buffers, images, labels)
    assert result.x.tolist() == result.y.tolist() == [-0.5, 0, 0.5]
    assert result.coordinates.tolist() == [[0, 0]]
    assert (result.errors[1, 1], result.losses[1, 1]) == evaluate(RESNET, params, buffers, images, labels)
    corner = {n: (t.double() - 0.5 * first[n] + 0.5 * second[n]).float() for n, t in params.items()}
    assert result.losses[2, 0] == evaluate(RESNET, corner, buffers, images, labels)[1]


def test_masked_weights_stay_zero_around_a_network():
    params, _ = network(CONVNET)
    mask = random_mask(CONVNET, params)
    params = masked(params, mask)
    found = around(params, *random_directions(AroundSpec(), CONVNET, params, generator(2), mask=mask), mask=mask)
    point = found.point(-0.7, 1.3)
    assert not any(bool(point[name][~keep].any()) for name, keep in mask.items())
    assert torch.equal(point["norm0.weight"], params["norm0.weight"])


def test_directions_of_some_tensors_leave_the_others_where_they_are():
    params, _ = network(CONVNET)
    steps = {name: torch.ones_like(params[name]) for name in ("conv1.weight", "classifier.bias")}
    found = around(params, {"conv1.weight": steps["conv1.weight"]}, {"classifier.bias": steps["classifier.bias"]})
    point = found.point(0.5, -2.0)
    for name, tensor in params.items():
        moved = {"conv1.weight": 0.5, "classifier.bias": -2.0}.get(name, 0.0)
        assert torch.equal(point[name], (tensor.double() + moved).float())
    normalised = filter_normalised(CONVNET, params, {"conv1.weight": steps["conv1.weight"]})
    assert [name for name, t in normalised.items() if t.any()] == ["conv1.weight"]


def test_rescaling_a_network_changes_no_profile():
    # Scaling one layer by s and the next by 1/s leaves the outputs of a ReLU network; what is normalised by filters follows.
    params, _ = network(MLP)
    images, labels = examples(MLP, 60)
    rescaled = {n: t * {"linear0": 8.0, "linear1": 0.125}.get(n.split(".")[0], 1.0) for n, t in params.items()}
    rescaled["linear1.bias"] = params["linear1.bias"]  # behind both layers their scales cancel
    spec = ProfileSpec(points=5, directions=2, images=0)
    normalised, plain = [], []
    for network_ in (params, rescaled):
        steps = random_directions(spec, MLP, network_, generator(7))
        normalised.append(profile(spec, MLP, network_, {}, steps, images, labels).losses)
        raw = [{n: 0.3 * torch.randn(t.shape, generator=generator(7)) for n, t in network_.items()}]
        plain.append(profile(spec, MLP, network_, {}, raw, images, labels).losses)
    torch.testing.assert_close(*normalised, rtol=1e-5, atol=1e-6)
    assert (plain[0] - plain[1]).abs().max() > 0.1
    assert float((normalised[0][0] - normalised[0][1]).abs().max()) > 1e-3


def test_a_profile_in_closed_form():
    logits, slope = torch.tensor([1.0, 0, 2, -1]), torch.tensor([3.0, 0, -4, 1])
    images, labels = examples(MLP, 20)
    steps = [{"classifier.bias": slope}, {"classifier.bias": -2 * slope}]
    found = profile(ProfileSpec(points=5, reach=1.5), MLP, constant(logits), {}, steps, images, labels)
    assert found.t.tolist() == [-1.5, -0.75, 0, 0.75, 1.5]
    assert found.errors.shape == found.losses.shape == (2, 5)
    for row, times in enumerate((1, -2)):
        for column, t in enumerate(found.t.tolist()):
            error, loss = known_values(logits.double() + t * times * slope.double(), labels)
            assert float(found.losses[row, column]) == pytest.approx(loss, abs=1e-6)
            assert float(found.errors[row, column]) == pytest.approx(error, abs=1e-12)


def test_a_profile_equals_evaluation_point_by_point():
    params, buffers = network(RESNET)
    images, labels = examples(RESNET)
    training, _ = examples(RESNET, 20, seed=9)
    spec = ProfileSpec(points=3, directions=2, images=10, statistics_images=10)
    steps = random_directions(spec, RESNET, params, generator(2))
    found = profile(spec, RESNET, params, buffers, steps, images, labels, training)
    again = profile(spec, RESNET, params, buffers, steps, images, labels, training, threads=2)
    assert torch.equal(found.losses, again.losses)
    for row, step in enumerate(steps):
        for column, t in enumerate((-1.0, 0.0, 1.0)):
            there = {n: (p.double() + t * step[n]).float() for n, p in params.items()}
            fresh = models.reestimate(RESNET, there, buffers, training[::2])
            expected = evaluate(RESNET, there, fresh, images[::3], labels[::3])
            assert (found.errors[row, column], found.losses[row, column]) == expected


def test_bad_directions_are_refused():
    params, _ = network(CONVNET)
    images, labels = examples(CONVNET)
    mask = random_mask(CONVNET, params)
    one, two = random_directions(AroundSpec(), CONVNET, params, generator(1))
    with pytest.raises(ValueError, match=r"the second direction must have tensors of .* but 'stem', \(2,\), is not there"):
        around(params, one, {"stem": torch.ones(2)})
    with pytest.raises(ValueError, match=r"the first direction must have .* but 'conv0\.bias', \(2,\), is \(5,\) there"):
        around(params, {"conv0.bias": torch.ones(2)}, two)
    with pytest.raises(ValueError, match="the first direction must not be zero"):
        around(params, {n: t * 0 for n, t in one.items()}, two)
    with pytest.raises(ValueError, match="the second direction must be finite"):
        around(params, one, {n: t * float("nan") for n, t in two.items()})
    with pytest.raises(ValueError, match="two directions must not lie on one line, got cosine -1"):
        around(params, one, {n: -3 * t for n, t in one.items()})
    with pytest.raises(ValueError, match=r"the first direction must be zero where the mask removes weights, but 'conv0\.weight'"):
        around(masked(params, mask), one, two, mask=mask)
    with pytest.raises(ValueError, match="the network must be zero where the mask removes weights"):
        random_directions(AroundSpec(), CONVNET, params, generator(), mask=mask)
    with pytest.raises(ValueError, match="the network must be of resnet10 with batch norm, but"):
        filter_normalised(RESNET, params, one)
    with pytest.raises(ValueError, match="others must be one of zero, tensor; got 'copy'"):
        filter_normalised(CONVNET, params, one, others="copy")
    with pytest.raises(ValueError, match="network at the centre must have finite weights"):
        filter_normalised(CONVNET, {n: t * float("nan") for n, t in params.items()}, one)
    with pytest.raises(ValueError, match="a profile needs at least 1 direction, got none"):
        profile(ProfileSpec(), CONVNET, params, {}, [], images, labels)
    with pytest.raises(ValueError, match="direction 1 must not be zero"):
        profile(ProfileSpec(), CONVNET, params, {}, [one, {"conv0.bias": torch.zeros(5)}], images, labels)
    with pytest.raises(ValueError, match="direction 0 must be zero where the mask removes weights"):
        profile(ProfileSpec(), CONVNET, masked(params, mask), {}, [one], images, labels, mask=mask)
    with pytest.raises(ValueError, match="at least 1 image"):
        profile(ProfileSpec(), CONVNET, params, {}, [one], images[:0], labels[:0])


@pytest.mark.parametrize("kind, fields, message", [
    (AroundSpec, {"resolution": 1}, "resolution must be at least 2"),
    (AroundSpec, {"reach": 0}, "reach must lie in"),
    (AroundSpec, {"others": "copy"}, "others must be one of zero, tensor"),
    (AroundSpec, {"statistics": "interpolate"}, "statistics must be one of reestimate, keep"),
    (ProfileSpec, {"points": 10}, "points must be odd and at least 3, so that the network itself is one of them; got 10"),
    (ProfileSpec, {"reach": -1}, "reach must lie in"),
    (ProfileSpec, {"directions": 0}, "directions must be at least 1"),
    (ProfileSpec, {"others": "copy"}, "others must be one of zero, tensor"),
    (ProfileSpec, {"statistics_images": 1}, "statistics_images must be at least 2"),
])
def test_bad_specifications_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)
