"""REPAIR against networks of modules wrapped as its authors wrap them, and against what it promises."""
import pytest
import torch
from torch import nn

from dpkit import models, tree
from dpkit.connectivity import PathSpec, path, repair
from dpkit.data._torchvision import load
from dpkit.models import ModelSpec

ALEXNET = ModelSpec(arch="alexnet", width=4, image_size=8, classes=4)
RESNET = ModelSpec(arch="resnet10", width=4, image_size=16, classes=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(model, seed=0):
    params, buffers = models.init(model, generator(seed))
    source = generator(seed + 100)
    params = {n: t + 0.2 * torch.randn(t.shape, generator=source) for n, t in params.items()}
    return params, {n: t + torch.rand(t.shape, generator=source) for n, t in buffers.items()}


def examples(model, count=40, seed=1):
    shape = (count, model.channels, model.image_size, model.image_size)
    return torch.randn(shape, generator=generator(seed)), torch.randint(model.classes, (count,), generator=generator(seed + 1))


def filled(module, params, buffers):
    """The module with the tensors of a network, by name."""
    for name, tensor in {**params, **buffers}.items():
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if leaf in layer._parameters:
            layer._parameters[leaf] = nn.Parameter(tensor.clone())
        else:
            layer._buffers[leaf] = tensor.clone()
    return module


def reset_statistics(module, images):
    """Means and variances of every BatchNorm in the module from one pass over the images."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.reset_running_stats()
    with torch.no_grad():
        module.train()(images)
    return module.eval()


class Wrapped(nn.Module):
    """A layer with a BatchNorm behind it, which only watches (affine parameters None) or resets."""

    def __init__(self, layer, channels, watch):
        super().__init__()
        self.layer, self.bn, self.watch = layer, nn.BatchNorm2d(channels), watch

    def forward(self, x):
        y = self.layer(x)
        z = self.bn(y)
        return y if self.watch else z


def repaired(build, a, b, alpha, images):
    """The interpolated module with its wrapped layers reset to the interpolated statistics of both ends.

    build: (network, watch) -> module and its wrapped layers.
    """
    goals = []
    for net in (a, b):
        module, layers = build(net, True)
        reset_statistics(module, images)
        goals.append([(layer.bn.running_mean, (layer.bn.running_var + 1e-5).sqrt()) for layer in layers])
    between = tuple(tree.lerp(one, other, alpha) for one, other in zip(a, b, strict=True))
    module, layers = build(between, False)
    for layer, (mean_a, deviation_a), (mean_b, deviation_b) in zip(layers, *goals, strict=True):
        layer.bn.bias.data = (1 - alpha) * mean_a + alpha * mean_b
        layer.bn.weight.data = (1 - alpha) * deviation_a + alpha * deviation_b
    return reset_statistics(module, images)


def alexnet(net, watch):
    """AlexNet without norm; every convolution is wrapped."""
    params, layers, body = net[0], [], []
    for i in range(5):
        out, into, kernel, _ = params[f"conv{i}.weight"].shape
        own = {leaf: params[f"conv{i}.{leaf}"] for leaf in ("weight", "bias")}
        layers.append(Wrapped(filled(nn.Conv2d(into, out, kernel, padding=kernel // 2), own, {}), out, watch))
        body += [layers[-1], nn.ReLU(), *[nn.MaxPool2d(2)] * (i in (0, 1, 4))]
    last = nn.Linear(params["classifier.weight"].shape[1], 4)
    filled(last, {k: params[f"classifier.{k}"] for k in ("weight", "bias")}, {})
    return nn.Sequential(*body, nn.Flatten(), last), layers


def resnet(net, watch):
    """ResNet-10 with BatchNorm; every block is wrapped."""
    load()
    from torchvision.models.resnet import BasicBlock, ResNet
    module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    module.conv1, module.maxpool = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Identity()
    filled(module, *net)
    layers = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        stage = getattr(module, name)
        stage[0] = Wrapped(stage[0], stage[0].conv2.weight.shape[0], watch)
        layers.append(stage[0])
    return module, layers


@pytest.mark.parametrize("model, build", [(ALEXNET, alexnet), (RESNET, resnet)], ids=["alexnet", "resnet"])
def test_it_equals_modules_wrapped_as_published(model, build):
    a, b, (images, labels), training = network(model), network(model, 1), examples(model), examples(model, 250, seed=9)[0]
    found = path(PathSpec(points=5, statistics="repair"), model, a, b, images, labels, statistics_images=training)
    plain = path(PathSpec(points=5), model, a, b, images, labels, statistics_images=training)
    for i, alpha in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        with torch.no_grad():
            logits = repaired(build, a, b, alpha, training)(images)
        # theirs divide some variances by n and some by n - 1
        assert float(found.losses[i]) == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=5e-4)
        assert float(found.errors[i]) == pytest.approx(float((logits.argmax(1) != labels).double().mean()), abs=1 / 40 + 1e-9)
    assert float((found.losses[1:-1] - plain.losses[1:-1]).abs().min()) > 3e-3
    assert torch.equal(found.losses[[0, -1]], plain.losses[[0, -1]])
    assert torch.equal(found.errors[[0, -1]], plain.errors[[0, -1]])


PLAIN = [ModelSpec(arch="mlp", width=4, image_size=4, channels=1, classes=3), ALEXNET.replace(norm="group"),
         ModelSpec(arch="resnet20", width=2, image_size=8, classes=3, norm="none"), RESNET.replace(norm="layer"), RESNET,
         ModelSpec(arch="vit", width=8, image_size=8, classes=3)]
SITES = {"mlp": 2, "alexnet": 5, "resnet20": 19, "resnet10": 9, "vit": 6}


def watched(model, net, images):
    """Moments at each nonlinearity in one pass, BatchNorm in train mode."""
    found = {}

    def keep(place, x):
        found[place] = repair.moments(x)
        return x

    with torch.no_grad(), repair.Sites(model, keep) as sites:
        models.forward(model, *net, images, train=True)
    assert sites.seen == SITES[model.arch]
    return list(found.values())


@pytest.mark.parametrize("model", PLAIN, ids=lambda m: f"{m.arch}-{m.norm_kind}")
def test_every_channel_gets_the_moments_in_the_middle_of_both_ends(model, monkeypatch):
    a, b, (images, labels) = network(model), network(model, 1), examples(model, 200)
    means, deviations = [], []
    for (mean_a, var_a, _), (mean_b, var_b, _) in zip(*(watched(model, net, images) for net in (a, b)), strict=True):
        means.append(0.75 * mean_a + 0.25 * mean_b)
        deviations.append(0.75 * var_a.sqrt() + 0.25 * var_b.sqrt())
    before, after, changed = [], [], repair.changed

    def watch(x, *moments):
        y = changed(x, *moments)
        before.append(repair.moments(x))
        after.append(repair.moments(y))
        return y

    monkeypatch.setattr(repair, "changed", watch)
    path(PathSpec(points=5, statistics="repair"), model, a, b, images, labels, statistics_images=images)
    count = len(means)
    # blocks are corrected in a ResNet with BatchNorm, and every nonlinearity elsewhere
    assert count == (SITES[model.arch] - 1) // 2 if model.norm_kind == "batch" else SITES[model.arch]
    assert len(after) == 3 * 2 * count  # three points inside, each in one pass for the statistics and one over the images
    for begin in (0, count):  # alpha is 1 / 4 in both
        now = after[begin:begin + count]
        for (mean, variance, _), (_, old, _), goal, deviation in zip(now, before[begin:], means, deviations, strict=False):
            alive = old > 1e-3  # what never varies cannot be stretched
            assert float(alive.double().mean()) > 0.8
            torch.testing.assert_close(mean, goal, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(variance.sqrt()[alive], deviation[alive], rtol=2e-2, atol=2e-3)
    off = [float((mean - goal).abs().max()) for (mean, _, _), goal in zip(before[:count], means, strict=True)]
    assert max(off) > 0.05  # it was needed


def test_averaged_weights_vary_too_little_and_are_repaired():
    # of two independent networks the average has half the variance, layer by layer
    model = ModelSpec(arch="mlp", width=64, image_size=4, channels=1, classes=3)
    a, b, (images, _) = models.init(model, generator(0)), models.init(model, generator(1)), examples(model, 500)
    middle = tuple(tree.lerp(one, other, 0.5) for one, other in zip(a, b, strict=True))
    ends, between = watched(model, a, images), watched(model, middle, images)
    assert float(between[0][1].mean() / ends[0][1].mean()) == pytest.approx(0.5, abs=0.1)
    assert float(between[1][1].mean() / ends[1][1].mean()) < 0.4
    found = repair.Repair(model, {"a": a, "b": b}, images, torch.zeros(500, dtype=torch.int64), images, "fp32")
    found([("a", "b", 0.5)])
    goals = {site: repair.Moments(*((x + y) / 2 for x, y in zip(found.ends["a"][site], found.ends["b"][site], strict=True)))
             for site in found.ends["a"]}
    _, after = found.estimate(*middle, goals)
    # the second layer, measured behind the corrected first one, is back at half the variance
    assert float(after[1].deviation.square().mean() / ends[1][1].mean()) == pytest.approx(0.5, abs=0.1)


def test_without_shortcuts_batchnorm_needs_no_more_than_reestimation():
    model = ModelSpec(arch="convnet3", width=4, norm="batch", image_size=8, classes=4)
    a, b, (images, labels) = network(model), network(model, 1), examples(model)
    one, other = (path(PathSpec(points=4, statistics=s), model, a, b, images, labels, statistics_images=images)
                  for s in ("repair", "reestimate"))
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.errors, other.errors)


@pytest.mark.parametrize("model", [ALEXNET, RESNET], ids=["alexnet", "resnet"])
def test_identical_networks_stay_as_they_are(model):
    a, (images, labels) = network(model), examples(model)
    found = path(PathSpec(points=5, statistics="repair"), model, a, a, images, labels, statistics_images=images)
    torch.testing.assert_close(found.losses, found.losses[:1].expand(5), rtol=1e-5, atol=0)


def test_statistics_are_pooled_over_chunks_and_threads_give_the_same_bits():
    a, b, (images, labels), training = network(RESNET), network(RESNET, 1), examples(RESNET, 503), examples(RESNET, 600, 9)[0]
    spec = PathSpec(points=5, statistics="repair", statistics_images=520)  # three chunks
    one, two = (path(spec, RESNET, a, b, images, labels, statistics_images=training, threads=n) for n in (1, 2))
    assert torch.equal(one.losses, two.losses)
    # the images go through in chunks of 500, each of them corrected
    parts = [path(spec, RESNET, a, b, images[part], labels[part], statistics_images=training).losses
             for part in (slice(500), slice(500, None))]
    torch.testing.assert_close(one.losses, (500 * parts[0] + 3 * parts[1]) / 503, rtol=1e-6, atol=0)
    few = path(spec.replace(statistics_images=250), RESNET, a, b, images, labels, statistics_images=training)
    torch.testing.assert_close(one.losses, few.losses, rtol=0.05, atol=0)
    assert not torch.equal(one.losses, few.losses)
    rough = path(spec.replace(precision="bf16"), RESNET, a, b, images, labels, statistics_images=training)
    torch.testing.assert_close(one.losses, rough.losses, rtol=0.03, atol=0)
    assert not torch.equal(one.losses, rough.losses)


def test_a_dead_channel_stays_finite():
    a, b, (images, labels) = network(ALEXNET), network(ALEXNET, 1), examples(ALEXNET)
    for params, _ in (a, b):
        params["conv1.weight"][0], params["conv1.bias"][0] = 0.0, -1.0
    b[0]["conv2.weight"][1] = -a[0]["conv2.weight"][1]  # alive at both ends, a constant in the middle
    found = path(PathSpec(points=3, statistics="repair"), ALEXNET, a, b, images, labels, statistics_images=images)
    assert bool(found.losses.isfinite().all())


def test_repair_needs_training_images_everywhere():
    a, (images, labels) = network(ALEXNET), examples(ALEXNET)
    with pytest.raises(ValueError, match="repairing activations needs statistics_images, got None; pass normalised training"):
        path(PathSpec(statistics="repair"), ALEXNET, a, a, images, labels)
