"""Compacted networks compute, and learn, what the masked ones do."""
import pytest
import torch
import torch.nn.functional as F

from dpkit import models, prune, tree
from dpkit.models import ModelSpec
from dpkit.prune import compact

MODELS = [ModelSpec(arch="convnet3", width=6, image_size=16, classes=4),
          ModelSpec(arch="convnet3", width=6, image_size=16, classes=4, norm="batch"),
          ModelSpec(arch="convnet3", width=6, image_size=16, classes=4, norm="none"),
          ModelSpec(arch="resnet10", width=4, image_size=16, classes=4),
          ModelSpec(arch="resnet18", width=4, image_size=16, classes=4),
          *(ModelSpec(arch=arch, norm=norm, width=width, image_size=16, classes=4) for arch, norm, width in (
              ("convnet4", "instance", 4), ("resnet20", "batch", 4), ("alexnet", "none", 4), ("alexnet", "instance", 4),
              ("vgg16", "batch", 4), ("mlp", "none", 40), ("mlp", "batch", 40)))]
IDS = ["instance", "batch", "none", "resnet10", "resnet18", "convnet4", "resnet20", "alexnet", "alexnet instance", "vgg16", "mlp",
       "mlp batch"]


def ticket(model, sparsity, seed=0):
    """A random ticket, with biases of zero so that no rounding noise stands where a zero should."""
    generator = torch.Generator().manual_seed(seed)
    params, buffers = models.init(model, generator)
    biases = [n for n in params if n.startswith(("conv", "linear")) and n.endswith(".bias")]
    params.update({n: torch.zeros_like(params[n]) for n in biases})
    full = prune.full(model, params)
    mask = prune.keep_highest(prune.random_scores(full, generator), full, round(prune.size(full) * (1 - sparsity)))
    return prune.apply(params, mask), buffers, mask


def remove(mask, name, channel, side):
    """The mask without what channel ``channel`` of weight ``name`` writes (side 0) or is read by (side 1)."""
    changed = mask[name].clone()
    changed.select(side, channel).fill_(False)
    return {**mask, name: changed}


def loss_of(model, params, buffers, mask, x, y):
    masked = prune.apply(params, mask)
    logits, buffers = models.forward(model, masked, buffers, x, train=True)
    return F.cross_entropy(logits, y), buffers


def train(model, params, buffers, mask, x, y, steps=3):
    """Steps of SGD with momentum and weight decay on surviving weights."""
    momentum = {n: torch.zeros_like(t) for n, t in params.items()}
    for _ in range(steps):
        leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
        value, buffers = loss_of(model, leaves, buffers, mask, x, y)
        gradients = torch.autograd.grad(value, list(leaves.values()))
        for (n, t), g in zip(params.items(), gradients, strict=True):
            momentum[n] = 0.9 * momentum[n] + g + 5e-3 * t
            params = {**params, n: t - 0.1 * momentum[n]}
        buffers = tree.detach(buffers)
    return params, buffers


@pytest.mark.parametrize("sparsity", [0.5, 0.97])
@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_the_remnant_computes_and_learns_the_same(model, sparsity):
    for seed in range(3):
        params, buffers, mask = (tree.to(t, dtype=torch.float64) for t in ticket(model, sparsity, seed))
        mask = {n: m.bool() for n, m in mask.items()}
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (8,), generator=generator)
        keep = compact.remnant(model, mask, params, buffers)
        if sparsity > 0.9:
            assert sum(int((~k).sum()) for k in keep.values()) > 0
        small = [compact.compact(model, keep, t) for t in (params, buffers, mask)]
        for train_mode in (False, True):
            expected = models.forward(model, params, buffers, x, train=train_mode)[0]
            torch.testing.assert_close(models.forward(model, *small[:2], x, train=train_mode)[0], expected)
        trained, moved = train(model, params, buffers, mask, x, y)
        bias = f"{models.classifier_name(model)}.bias"
        assert not torch.equal(trained[bias], params[bias])
        rest = train(model, *small, x, y)
        for own, whole in zip(rest, (trained, moved), strict=True):
            expected = compact.compact(model, keep, whole)
            for name in own:
                torch.testing.assert_close(own[name], expected[name], msg=name)


def test_an_unread_channel_goes_and_takes_with_it_what_it_alone_reads():
    model = MODELS[0]
    params, buffers, mask = ticket(model, 0.0)
    mask = remove(mask, "conv2.weight", 3, 1)
    keep = compact.remnant(model, mask, params, buffers)
    assert {g: (~k).nonzero().flatten().tolist() for g, k in keep.items()} == {"conv0": [], "conv1": [3], "conv2": []}
    only = torch.zeros_like(mask["conv1.weight"])
    only[:, :5] = True
    only[3, 5] = True  # channel 5 of the first layer is read by channel 3 of the second alone
    keep = compact.remnant(model, {**mask, "conv1.weight": only}, params, buffers)
    assert (~keep["conv0"]).nonzero().flatten().tolist() == [5]


def test_a_silent_channel_goes_only_if_it_is_zero():
    model = MODELS[0]
    params, buffers, mask = ticket(model, 0.0)
    mask = remove(mask, "conv1.weight", 2, 0)
    assert not compact.remnant(model, mask, params, buffers)["conv1"][2]
    assert compact.remnant(model, mask, params, buffers, silent=False)["conv1"].all()
    shifted = {**params, "norm1.bias": torch.full((6,), 0.1)}
    assert compact.remnant(model, mask, shifted, buffers)["conv1"].all()
    batch = MODELS[1]
    params, buffers, _ = ticket(batch, 0.0)
    assert not compact.remnant(batch, mask, params, buffers)["conv1"][2]
    moved = {**buffers, "norm1.running_mean": torch.ones(6)}
    assert compact.remnant(batch, mask, params, moved)["conv1"].all()


def test_a_residual_stream_stays_while_any_of_its_writers_or_readers_lives():
    model = MODELS[4]
    params, buffers, mask = ticket(model, 0.0)
    readers = [n for n, (source, _) in compact.wiring(model).items() if source == "layer2"]
    assert readers == ["layer2.1.conv1.weight", "layer3.0.conv1.weight", "layer3.0.downsample.0.weight"]
    for count, name in enumerate(readers):
        assert compact.remnant(model, mask, params, buffers)["layer2"].all(), f"after {count} of three"
        mask = remove(mask, name, 1, 1)
    assert (~compact.remnant(model, mask, params, buffers)["layer2"]).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_every_prunable_weight_is_wired_and_full_masks_keep_everything(model):
    params, buffers, mask = ticket(model, 0.0)
    assert set(compact.wiring(model)) == set(models.prunable(model))
    keep = compact.remnant(model, mask, params, buffers)
    assert all(k.all() for k in keep.values())
    assert compact.share(model, keep) == 1.0
    same = compact.compact(model, keep, {**params, **buffers})
    assert all(torch.equal(same[n], t) for n, t in {**params, **buffers}.items())


def test_the_share_of_work_by_hand():
    model = MODELS[0]  # 16x16, width 6: 3 -> 6 at 256 positions, 6 -> 6 at 64 and at 16, 6 x 4 inputs to 4 classes
    params, buffers, mask = ticket(model, 0.0)
    mask = remove(remove(remove(mask, "conv2.weight", 3, 1), "conv2.weight", 4, 1), "conv2.weight", 5, 1)
    keep = compact.remnant(model, mask, params, buffers)
    work = [3 * 6 * 9 * 256, 6 * 6 * 9 * 64, 6 * 6 * 9 * 16, 24 * 4]
    assert compact.share(model, keep) == pytest.approx((work[0] + work[1] / 2 + work[2] / 2 + work[3]) / sum(work))


def test_a_network_that_is_cut_through_keeps_valid_shapes():
    model = MODELS[0]
    params, buffers, mask = ticket(model, 0.0)
    mask = {n: torch.zeros_like(m) if n == "conv1.weight" else m for n, m in mask.items()}
    keep = compact.remnant(model, mask, params, buffers)
    assert not any(k.any() for k in keep.values())
    params = prune.apply(params, mask)
    small = compact.compact(model, keep, params)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(models.forward(model, small, {}, x)[0], models.forward(model, params, {}, x)[0])


def test_masks_that_do_not_fit_are_refused():
    model = MODELS[0]
    params, buffers, mask = ticket(model, 0.0)
    with pytest.raises(ValueError, match=r"mask must cover all prunable weights, but conv2\.weight is not in it"):
        compact.remnant(model, {n: m for n, m in mask.items() if n != "conv2.weight"}, params, buffers)
    with pytest.raises(ValueError, match=r"mask of conv0\.weight is \(1,\)"):
        compact.remnant(model, {**mask, "conv0.weight": torch.ones(1, dtype=torch.bool)}, params, buffers)
    with pytest.raises(ValueError, match=r"'extra\.weight' belongs to no layer of convnet3"):
        compact.compact(model, compact.remnant(model, mask, params, buffers), {"extra.weight": torch.zeros(1)})


@pytest.mark.parametrize("arch", ["alexnet", "mlp"])
def test_without_a_norm_a_silent_channel_is_its_bias(arch):
    model = ModelSpec(arch=arch, width=4, image_size=16, classes=4)
    params, buffers, mask = ticket(model, 0.0)
    layer = "conv1" if arch == "alexnet" else "linear1"
    mask = remove(remove(mask, f"{layer}.weight", 1, 0), f"{layer}.weight", 2, 0)
    params = prune.apply({**params, f"{layer}.bias": torch.eye(len(params[f"{layer}.bias"]))[1]}, mask)
    keep = compact.remnant(model, mask, params, buffers)
    assert {g: (~k).nonzero().flatten().tolist() for g, k in keep.items() if not k.all()} == {layer: [2]}
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = compact.compact(model, keep, params)
    expected = models.forward(model, params, buffers, x)[0]
    torch.testing.assert_close(models.forward(model, small, buffers, x)[0], expected)
    without = models.forward(model, {**params, f"{layer}.bias": torch.zeros_like(params[f"{layer}.bias"])}, buffers, x)[0]
    assert not torch.allclose(without, expected)  # the constant does reach the logits


@pytest.mark.parametrize("fields, message", [
    ({"norm": "group"}, r"norm must be batch, instance or none, so that removing a channel is exact; got group"),
    ({"arch": "mlp", "norm": "layer"}, r"norm must be batch, instance or none.*got layer, which mixes the channels of mlp"),
    ({"arch": "vit"}, r"norm must be batch, instance or none"),
    ({"arch": "vit", "norm": "none"}, r"channels can be followed through convolutions and MLPs only, got vit"),
])
def test_networks_that_mix_channels_are_refused(fields, message):
    model = ModelSpec(width=4, image_size=16, **fields)
    params, buffers, mask = ticket(model, 0.5)
    with pytest.raises(ValueError, match=message) as error:
        compact.remnant(model, mask, params, buffers)
    assert "\n" not in str(error.value)


def test_a_mixing_norm_is_no_different_where_channels_are_only_followed():
    assert compact.wiring(MODELS[0].replace(norm="layer")) == compact.wiring(MODELS[0])
