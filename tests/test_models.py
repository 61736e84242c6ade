"""Networks against plain modules, their counts, their initial values, and their purity."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from dpkit import models, tree
from dpkit.data._torchvision import load
from dpkit.models import ModelSpec
from dpkit.models.layers import max_pool
from dpkit.models.spec import RULES

NEW = {"convnet4": {"width": 4, "image_size": 16}, "resnet20": {"width": 4, "image_size": 8},
       "alexnet": {"width": 4, "image_size": 16}, "vgg16": {"width": 4, "image_size": 32}, "mlp": {"width": 4, "image_size": 6},
       "vit": {"width": 8, "image_size": 16}}
SMALL = {
    "convnet": ModelSpec(arch="convnet3", width=6, image_size=16),
    "convnet batch": ModelSpec(arch="convnet3", width=6, image_size=16, norm="batch"),
    "convnet none": ModelSpec(arch="convnet3", width=6, image_size=16, norm="none"),
    "resnet10": ModelSpec(arch="resnet10", width=4, image_size=16),
    "resnet18": ModelSpec(arch="resnet18", width=4, image_size=16, channels=1, classes=3),
    "resnet10 instance": ModelSpec(arch="resnet10", width=4, image_size=16, norm="instance"),
    "resnet10 imagenet": ModelSpec(arch="resnet10", width=4, image_size=64, stem="imagenet"),
    "convnet group": ModelSpec(arch="convnet3", width=8, image_size=16, norm="group"),
    "resnet10 layer": ModelSpec(arch="resnet10", width=4, image_size=16, norm="layer"),
    **{f"{arch} {norm}": ModelSpec(arch=arch, norm=norm, channels=2, classes=4, **sizes)
       for arch, sizes in NEW.items() for norm in RULES[arch].norms},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(spec, count, seed=1):
    return torch.randn(count, spec.channels, spec.image_size, spec.image_size, generator=generator(seed))


def network(spec, seed=0):
    """A network whose norms and statistics are not at their trivial initial values."""
    params, buffers = models.init(spec, generator(seed))
    source = generator(seed + 100)
    params = {n: t + 0.1 * torch.randn(t.shape, generator=source) for n, t in params.items()}
    return params, {n: t + torch.rand(t.shape, generator=source) for n, t in buffers.items()}


def plain_convnet(spec):
    """The same network out of nn layers, with our names."""
    layers, channels = {}, spec.channels
    for i in range(3):
        layers[f"conv{i}"] = nn.Conv2d(channels, spec.width, 3, padding=1)
        if spec.norm_kind == "instance":
            layers[f"norm{i}"] = nn.InstanceNorm2d(spec.width, affine=True)
        elif spec.norm_kind == "batch":
            layers[f"norm{i}"] = nn.BatchNorm2d(spec.width)
        layers[f"relu{i}"], layers[f"pool{i}"] = nn.ReLU(), nn.AvgPool2d(2)
        channels = spec.width
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(spec.width * (spec.image_size // 8) ** 2, spec.classes)
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def plain_resnet(spec, stages):
    load()
    from torchvision.models.resnet import BasicBlock, ResNet
    return ResNet(BasicBlock, stages, num_classes=spec.classes)


def assert_equal_to(module, spec, count=5, tolerance=1e-5):
    params, buffers = network(spec)
    missing, unexpected = module.load_state_dict({**params, **buffers}, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert [n for n, _ in module.named_parameters()] == list(params)
    x = images(spec, count)
    with torch.no_grad():
        for train in (False, True, False):
            logits, buffers = models.forward(spec, params, buffers, x, train=train)
            torch.testing.assert_close(logits, module.train(train)(x), rtol=tolerance, atol=tolerance)
            state = module.state_dict()
            for name in buffers:
                torch.testing.assert_close(buffers[name], state[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["convnet", "convnet batch", "convnet none"])
def test_convnet_equals_plain_layers(name):
    assert_equal_to(plain_convnet(SMALL[name]), SMALL[name])


@pytest.mark.parametrize("arch, stages", [("resnet10", [1, 1, 1, 1]), ("resnet18", [2, 2, 2, 2])])
def test_resnet_equals_torchvision(arch, stages):
    spec = ModelSpec(arch=arch, width=64, image_size=64, stem="imagenet")
    assert_equal_to(plain_resnet(spec, stages), spec, count=3, tolerance=2e-4)


def test_resnet_with_cifar_stem_equals_torchvision_with_that_stem():
    spec = ModelSpec(arch="resnet10", width=64, image_size=16)
    module = plain_resnet(spec, [1, 1, 1, 1])
    module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert_equal_to(module, spec, count=3, tolerance=2e-4)


@pytest.mark.parametrize("fields, count", [
    ({"arch": "convnet3", "width": 128}, 318_848),
    ({"arch": "resnet10", "width": 32}, 1_226_080),
    ({"arch": "resnet18", "width": 32}, 2_792_800),
    ({"arch": "resnet10", "width": 64, "stem": "imagenet", "image_size": 224}, 4_905_152),
])
def test_prunable_counts_of_the_paper(fields, count):
    spec = ModelSpec(**fields)
    params, _ = models.init(spec, generator())
    assert models.count_prunable(spec) == count == sum(params[n].numel() for n in models.prunable(spec))


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_names(spec):
    params, buffers = models.init(spec, generator())
    assert models.prunable(spec) == tuple(n for n, t in params.items() if t.dim() > 1 and n != "pos_embed")
    assert models.prunable(spec)[-1] == models.classifier_name(spec) + ".weight"
    assert models.statistics(spec) == tuple(buffers)
    assert bool(buffers) == (spec.norm_kind == "batch")


def test_init_has_the_bounds_of_pytorch_layers():
    spec = ModelSpec(arch="convnet3", width=32, image_size=16)
    params, _ = models.init(spec, generator())
    reference = plain_convnet(spec).state_dict()
    for name, tensor in params.items():
        if name.startswith("norm"):
            assert torch.equal(tensor, reference[name])
            continue
        weight = params[name.rsplit(".", 1)[0] + ".weight"]
        bound = 1 / math.sqrt(weight[0].numel())
        assert tensor.abs().max() <= bound
        assert reference[name].abs().max() <= bound
        if tensor.numel() > 500:
            assert tensor.abs().max() > 0.98 * bound
            assert tensor.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert tensor.std() == pytest.approx(float(reference[name].std()), rel=0.1)


def test_init_depends_on_the_generator_alone():
    spec = SMALL["resnet10"]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, _ = models.init(spec, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again, _ = models.init(spec, generator(5))
    other, _ = models.init(spec, generator(6))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def loss(spec, params, buffers, x, y):
    logits, buffers = models.forward(spec, params, buffers, x, train=True)
    return nn.functional.cross_entropy(logits, y), buffers


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_a_population_under_vmap_equals_its_members(spec):
    # In float64, so that a wrong gradient is told from rounding.
    members = [tuple(tree.to(part, dtype=torch.float64) for part in network(spec, seed)) for seed in range(3)]
    x = torch.stack([images(spec, 4, seed).double() for seed in range(3)])
    y = torch.randint(spec.classes, (3, 4), generator=generator())
    params, buffers = tree.stack([m[0] for m in members]), tree.stack([m[1] for m in members])
    step = grad(lambda p, b, x, y: loss(spec, p, b, x, y), has_aux=True)
    gradients, updated = vmap(step)(params, buffers, x, y)
    for p, (solo, solo_buffers) in enumerate(members):
        leaves = {n: t.clone().requires_grad_() for n, t in solo.items()}
        value, after = loss(spec, leaves, solo_buffers, x[p], y[p])
        for name, expected in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            torch.testing.assert_close(gradients[name][p], expected, rtol=1e-6, atol=1e-8)
        for name, expected in after.items():
            torch.testing.assert_close(updated[name][p], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_inputs_are_never_mutated(spec):
    params, buffers = network(spec)
    x = images(spec, 4)
    before = tree.detach(params), tree.detach(buffers), x.clone()
    _, after = models.forward(spec, params, buffers, x, train=True)
    _, same = models.forward(spec, params, buffers, x)
    models.features(spec, params, buffers, x)
    models.reestimate(spec, params, buffers, x, chunk=2)
    twice = tree.stack([params] * 2), tree.stack([buffers] * 2)
    vmap(lambda p, b: models.forward(spec, p, b, x, train=True))(*twice)
    assert torch.equal(x, before[2])
    assert all(torch.equal(params[n], before[0][n]) for n in params)
    assert all(torch.equal(buffers[n], before[1][n]) for n in buffers)
    assert all(torch.equal(same[n], buffers[n]) for n in buffers)
    assert all(not torch.equal(after[n], buffers[n]) for n in buffers)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["convnet", "resnet10"])
def test_second_derivative_equals_a_difference_of_gradients(name, train):
    spec = SMALL[name]
    params, buffers = (tree.to(part, dtype=torch.float64) for part in network(spec))
    x, y = images(spec, 4).double(), torch.arange(4) % spec.classes
    source = generator(2)
    direction = {n: torch.randn(t.shape, generator=source, dtype=torch.float64) for n, t in params.items()}

    def gradient(at):
        leaves = {n: t.requires_grad_() for n, t in tree.detach(at).items()}
        logits, _ = models.forward(spec, leaves, buffers, x, train=train)
        value = nn.functional.cross_entropy(logits, y)
        return leaves, torch.autograd.grad(value, list(leaves.values()), create_graph=True)

    leaves, first = gradient(params)
    inner = sum((g * v).sum() for g, v in zip(first, direction.values(), strict=True))
    product = torch.autograd.grad(inner, list(leaves.values()))
    step = 1e-7
    above, below = (gradient(tree.add(params, direction, sign * step))[1] for sign in (1, -1))
    difference = torch.cat([(a - b).detach().flatten() for a, b in zip(above, below, strict=True)])
    difference /= 2 * step
    product = torch.cat([t.flatten() for t in product])
    assert (product - difference).norm() < 1e-4 * difference.norm()


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_features_are_the_input_of_the_classifier(spec):
    params, buffers = network(spec)
    x = images(spec, 3)
    name = models.classifier_name(spec)
    inputs = models.features(spec, params, buffers, x)
    logits = nn.functional.linear(inputs, params[f"{name}.weight"], params[f"{name}.bias"])
    assert torch.equal(logits, models.forward(spec, params, buffers, x)[0])


@pytest.mark.parametrize("fields, message", [
    ({"arch": "vgg11"}, "arch must be one of convnet3, resnet10, resnet18, convnet4, resnet20, alexnet, vgg16, mlp, vit; got "),
    ({"norm": "weight"}, "norm must be one of auto, batch, instance, group, layer, none; got 'weight'"),
    ({"arch": "vit", "norm": "batch"}, "norm must be one of auto, layer, none for vit, got 'batch'"),
    ({"arch": "mlp", "norm": "instance"}, "norm must be one of auto, none, batch, group, layer for mlp, got 'instance'"),
    ({"arch": "vgg16", "norm": "instance", "image_size": 28}, "image_size must be at least 32 for vgg16 with instance norm, got"),
    ({"arch": "vgg16", "image_size": 8}, "image_size must be at least 16 for vgg16 (four 2x2 pools), got 8"),
    ({"arch": "alexnet", "image_size": 4}, "image_size must be at least 8 for alexnet (three 2x2 pools), got 4"),
    ({"arch": "convnet4", "image_size": 24}, "image_size must be a positive multiple of 16 for convnet4 (four 2x2 pools)"),
    ({"arch": "vit", "image_size": 28}, "image_size must be a positive multiple of 8 for vit (patches on an 8x8 grid), got 28"),
    ({"arch": "mlp", "image_size": 0}, "image_size must be at least 1 for mlp, got 0"),
    ({"arch": "mlp", "stem": "imagenet"}, "stem applies to ResNets only; keep it cifar for mlp, got 'imagenet'"),
    ({"arch": "resnet20", "image_size": 4}, "image_size must be at least 8 for resnet20 with the cifar stem, got 4"),
    ({"stem": "big", "arch": "resnet10"}, "stem must be one of cifar, imagenet"),
    ({"stem": "imagenet"}, "stem applies to ResNets only"),
    ({"width": 0}, "width must be at least 1 channel, got 0"),
    ({"classes": 1}, "classes must be at least 2, got 1"),
    ({"channels": 0}, "channels must be at least 1, got 0"),
    ({"image_size": 28}, "image_size must be a positive multiple of 8 for convnet3"),
    ({"image_size": 0}, "image_size must be a positive multiple of 8"),
    ({"arch": "resnet10", "image_size": 4}, "image_size must be at least 8 for resnet10"),
    ({"arch": "resnet18", "stem": "imagenet", "image_size": 16}, "image_size must be at least 32 for"),
    ({"width": "wide"}, "width must be a whole number"),
])
def test_bad_specifications_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError) as error:
        ModelSpec(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("x, message", [
    (torch.zeros(2, 1, 16, 16), r"images must have shape \(N, 3, 16, 16\).*got \(2, 1, 16, 16\)"),
    (torch.zeros(3, 16, 16), "images must have shape"),
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "images must be floating numbers, got torch.uint8"),
])
def test_bad_images_are_refused(x, message):
    spec = SMALL["convnet"]
    params, buffers = models.init(spec, generator())
    for function in (models.forward, models.features):
        with pytest.raises(ValueError, match=message):
            function(spec, params, buffers, x)


def test_spread_is_even_and_complete():
    assert models.spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert models.spread(3, 100).tolist() == [0, 1, 2]
    assert models.spread(100_000, 1000).unique().numel() == 1000
    assert models.spread(0, 5).tolist() == []


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_maxima_of_bf16_are_those_of_torch_and_their_gradients_are_rounded_once(window):
    x = torch.randn(3, 2, 9, 9, generator=generator(5)).bfloat16().requires_grad_()
    single = x.detach().float().requires_grad_()
    found, expected = max_pool(x, *window), F.max_pool2d(single, *window)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), expected)
    slopes = torch.randn(found.shape, generator=generator(6)).bfloat16()
    found.backward(slopes)
    expected.backward(slopes.float())
    assert torch.equal(x.grad, single.grad.bfloat16())
