"""Barriers with known values, symmetries of networks, and BatchNorm statistics counted by hand."""
import pytest
import torch
from torch import nn

from dpkit import models, tree
from dpkit.connectivity import Path, PathSpec, along, barrier, barrier_linear, is_stable, path, reestimate
from dpkit.data._torchvision import load
from dpkit.models import ModelSpec
from dpkit.training import evaluate

CONVNET = ModelSpec(arch="convnet3", width=5, image_size=8, classes=4)
RESNET = ModelSpec(arch="resnet10", width=4, image_size=16, classes=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(model, seed=0):
    """Strong weights, so that networks differ in what they say, and statistics off their initial values."""
    params, buffers = models.init(model, generator(seed))
    source = generator(seed + 100)
    params = {n: t + 0.3 * torch.randn(t.shape, generator=source) for n, t in params.items()}
    return params, {n: t + torch.rand(t.shape, generator=source) for n, t in buffers.items()}


def examples(model, count=40, seed=1):
    shape = (count, model.channels, model.image_size, model.image_size)
    images = torch.randn(shape, generator=generator(seed))
    return images, torch.randint(model.classes, (count,), generator=generator(seed + 1))


def two_basins(params):
    """Loss (t^2 - 1)^2 has minima at -1 and 1 and height 1 between them; error is 0.3 - 0.2 t^2."""
    t = float(params["t"])
    return 0.3 - 0.2 * t * t, (t * t - 1) ** 2


def point(t):
    return {"t": torch.tensor(t, dtype=torch.float64)}


def test_two_basins_have_the_barrier_that_was_built_in():
    found = along(point(-1.0), point(1.0), torch.linspace(0, 1, 11), two_basins)
    assert found.loss_barrier == pytest.approx(1.0, abs=1e-6)
    assert found.error_barrier == pytest.approx(0.2, abs=1e-6)
    assert barrier_linear(found.alphas, found.losses) == pytest.approx(1.0, abs=1e-6)
    expected = [((2 * i / 10 - 1) ** 2 - 1) ** 2 for i in range(11)]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert found.losses.dtype == found.errors.dtype == found.alphas.dtype == torch.float64


def test_a_convex_path_with_unequal_ends():
    # t^2 from -1 to 3: no point lies above the chord; the highest is an end, 4 above the mean of both.
    found = along(point(-1.0), point(3.0), torch.linspace(0, 1, 5), lambda p: (0.0, float(p["t"]) ** 2))
    assert found.losses.tolist() == [1, 0, 1, 4, 9]
    assert found.loss_barrier == 4
    assert barrier_linear(found.alphas, found.losses) == 0


def test_both_definitions_on_numbers():
    alphas, values = torch.tensor([0, 0.25, 1.0]), torch.tensor([0.0, 2.0, 2.0])
    assert barrier(values) == 1.0
    assert barrier_linear(alphas, values) == 1.5
    assert barrier([0.1, 0.1]) == 0.0


@pytest.mark.parametrize("values, message", [
    ([1.0], "at least 2 values in one row, got shape \\(1,\\)"),
    ([[1.0, 2.0]], "at least 2 values in one row"),
    ([0.0, float("nan"), 0.0], "got NaN at point 1"),
])
def test_barriers_refuse_what_is_no_path(values, message):
    with pytest.raises(ValueError, match=message):
        barrier(values)


@pytest.mark.parametrize("alphas", [[0.0, 0.5], [0.1, 0.5, 1.0], [0.0, 0.5, 0.9]])
def test_linear_barrier_needs_alphas_from_0_to_1(alphas):
    with pytest.raises(ValueError, match="alphas must run from 0 to 1"):
        barrier_linear(alphas, [0.0, 1.0, 0.0])


def test_stability_threshold():
    assert is_stable(0.0199)
    assert not is_stable(0.02)
    assert is_stable(0.02, threshold=0.03)
    assert not is_stable(float("nan"))


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
def test_identical_networks_have_no_barrier(model):
    a, (images, labels) = network(model), examples(model)
    found = path(PathSpec(points=5), model, a, (tree.detach(a[0]), tree.detach(a[1])), images, labels,
                 statistics_images=images)
    assert found.error_barrier == 0.0
    assert found.loss_barrier == pytest.approx(0.0, abs=1e-12)


def test_the_path_of_a_network_equals_direct_evaluation():
    a, b, (images, labels) = network(CONVNET), network(CONVNET, 1), examples(CONVNET)
    found = path(PathSpec(points=4), CONVNET, a, b, images, labels)
    for alpha, error, loss in zip(found.alphas.tolist(), found.errors, found.losses, strict=True):
        between = {n: (1 - alpha) * a[0][n] + alpha * b[0][n] for n in a[0]}
        logits, _ = models.forward(CONVNET, between, {}, images)
        assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-6)
        assert float(error) == pytest.approx(float((logits.argmax(1) != labels).double().mean()), abs=1e-9)
    assert (found.errors[0], found.losses[0]) == evaluate(CONVNET, *a, images, labels)
    assert (found.errors[-1], found.losses[-1]) == evaluate(CONVNET, *b, images, labels)
    assert found.alphas.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_the_way_back_has_the_same_barrier():
    a, b, (images, labels) = network(RESNET), network(RESNET, 1), examples(RESNET)
    there, back = (path(PathSpec(points=5), RESNET, *pair, images, labels, statistics_images=images)
                   for pair in ((a, b), (b, a)))
    torch.testing.assert_close(there.losses, back.losses.flip(0), rtol=1e-4, atol=1e-5)
    assert there.loss_barrier == pytest.approx(back.loss_barrier, abs=1e-4)


def permuted(params):
    """The ConvNet with the channels of its three layers reordered."""
    result = tree.detach(params)
    for i in range(3):
        order = torch.randperm(CONVNET.width, generator=generator(i))
        for name in (f"conv{i}.weight", f"conv{i}.bias", f"norm{i}.weight", f"norm{i}.bias"):
            result[name] = result[name][order]
        following = "classifier.weight" if i == 2 else f"conv{i + 1}.weight"
        result[following] = result[following][:, order]  # one position a channel is left at size 8
    return result


def test_permuting_hidden_units_changes_weights_and_the_path_but_no_output():
    (params, _), (images, labels) = network(CONVNET), examples(CONVNET)
    other = permuted(params)
    assert not torch.equal(other["conv1.weight"], params["conv1.weight"])
    torch.testing.assert_close(models.forward(CONVNET, other, {}, images)[0],
                               models.forward(CONVNET, params, {}, images)[0], rtol=1e-5, atol=1e-5)
    found = path(PathSpec(points=3), CONVNET, (params, {}), (other, {}), images, labels)
    assert float(found.losses[0]) == pytest.approx(float(found.losses[2]), abs=1e-5)
    assert abs(float(found.losses[1] - found.losses[0])) > 1e-3


def by_hand(params, buffers, images, pieces):
    """Mean and unbiased variance of all that reaches each BatchNorm of an equal torchvision network."""
    load()
    from torchvision.models.resnet import BasicBlock, ResNet
    module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    # The same topology at another width and with another stem.
    module.conv1, module.maxpool = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Identity()
    for name, tensor in {**params, **buffers}.items():
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if leaf in layer._parameters:
            layer._parameters[leaf] = nn.Parameter(tensor.clone())
        else:
            layer._buffers[leaf] = tensor.clone()
    seen = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0]))
    with torch.no_grad():
        for piece in range(pieces):
            module.train()(images[piece::pieces])
    result = {}
    for name, parts in seen.items():
        rows = torch.cat([x.double().transpose(0, 1).flatten(1) for x in parts], 1)
        result[f"{name}.running_mean"], result[f"{name}.running_var"] = rows.mean(1), rows.var(1)
    return result


@pytest.mark.parametrize("count, chunk, pieces", [(20, 20, 1), (20, 7, 3), (21, 10, 3), (5, 2, 2),
                                                  (3, 2, 1)])
def test_reestimated_statistics_equal_those_counted_by_hand(count, chunk, pieces):
    params, buffers = network(RESNET)
    images, _ = examples(RESNET, count)
    found = reestimate(RESNET, params, buffers, images, chunk=chunk)
    expected = by_hand(params, buffers, images, pieces)
    assert set(found) == set(expected) == set(models.statistics(RESNET))
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5)
        assert found[name].dtype == torch.float32
        assert not torch.allclose(found[name], buffers[name], atol=1e-3)


def test_old_statistics_have_no_influence_and_first_layer_ignores_chunks():
    params, buffers = network(RESNET)
    images, _ = examples(RESNET, 24)
    one = reestimate(RESNET, params, buffers, images, chunk=6)
    other = reestimate(RESNET, params, {n: t * float("nan") for n, t in buffers.items()}, images, chunk=6)
    assert all(torch.equal(one[n], other[n]) for n in one)
    whole = reestimate(RESNET, params, buffers, images, chunk=24)
    torch.testing.assert_close(one["bn1.running_var"], whole["bn1.running_var"], rtol=1e-6, atol=1e-6)
    assert reestimate(CONVNET, network(CONVNET)[0], {}, images) == {}


def test_a_path_with_either_kind_of_statistics():
    a, b, (images, labels) = network(RESNET), network(RESNET, 1), examples(RESNET)
    training, _ = examples(RESNET, 30, seed=9)
    middle, statistics = tree.lerp(a[0], b[0], 0.5), tree.lerp(a[1], b[1], 0.5)
    spec = PathSpec(points=3, statistics_images=10)
    again = path(spec, RESNET, a, b, images, labels, statistics_images=training)
    fresh = reestimate(RESNET, middle, statistics, training[::3])
    assert (again.errors[1], again.losses[1]) == evaluate(RESNET, middle, fresh, images, labels)
    averaged = path(spec.replace(statistics="interpolate"), RESNET, a, b, images, labels)
    assert (averaged.errors[1], averaged.losses[1]) == evaluate(RESNET, middle, statistics, images, labels)
    assert (averaged.errors[0], averaged.losses[0]) == evaluate(RESNET, *a, images, labels)
    assert abs(float(again.losses[1] - averaged.losses[1])) > 1e-3


def spoiled(kind):
    params, buffers = network(CONVNET, 1)
    if kind == "name":
        params["extra.weight"] = torch.zeros(1)
    elif kind == "missing":
        del params["conv0.bias"]
    elif kind == "shape":
        params["classifier.bias"] = torch.zeros(7)
    elif kind == "nan":
        params["conv2.weight"][0, 0, 0, 0] = float("nan")
    return params, buffers


@pytest.mark.parametrize("kind, message", [
    ("name", "networks a and b must have the same tensors, but 'extra.weight' is in b and not in a"),
    ("missing", "networks a and b must have the same tensors, but 'conv0.bias' is in a and not in b"),
    ("shape", "'classifier.bias' is (4,) in a and (7,) in b"),
    ("nan", "network b must have finite weights, but 'conv2.weight' has NaN"),
])
def test_networks_that_do_not_fit_are_refused_in_one_line(kind, message):
    images, labels = examples(CONVNET)
    with pytest.raises(ValueError) as error:
        path(PathSpec(), CONVNET, network(CONVNET), spoiled(kind), images, labels)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_inputs_are_refused():
    a, (images, labels) = network(RESNET), examples(RESNET)
    with pytest.raises(ValueError, match="at least 1 image and one label for each, got 0 images"):
        path(PathSpec(), RESNET, a, a, images[:0], labels[:0], statistics_images=images)
    with pytest.raises(ValueError, match="got 40 images and 39 labels"):
        path(PathSpec(), RESNET, a, a, images, labels[1:], statistics_images=images)
    with pytest.raises(ValueError, match="needs statistics_images, got None"):
        path(PathSpec(), RESNET, a, a, images, labels)
    with pytest.raises(ValueError, match="needs at least 2 images, 2 or more a chunk; got 1 images"):
        reestimate(RESNET, *a, images[:1])


@pytest.mark.parametrize("fields, message", [
    ({"points": 2}, "points must be at least 3"),
    ({"statistics": "mean"}, "statistics must be one of reestimate, interpolate, repair; got 'mean'"),
    ({"statistics_images": 1}, "statistics_images must be at least 2"),
])
def test_bad_specifications_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PathSpec(**fields)


def test_a_path_is_a_plain_record():
    line = Path(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.1]), torch.tensor([1.0, 3.0]))
    assert line.loss_barrier == 1.0
    assert line.error_barrier == pytest.approx(0.0, abs=1e-9)
