"""The table of channels: complete, of the right sizes, and what it says by hand for a network of each kind."""
import pytest
import torch

from dpkit import models
from dpkit.models import ModelSpec, wiring
from dpkit.models.spec import RULES
from dpkit.models.wiring import Axis, Group

MODELS = [ModelSpec(arch=arch, norm=norm, width=8, image_size=32 if (arch, norm) == ("vgg16", "instance") else 16, classes=4)
          for arch, rules in RULES.items() for norm in rules.norms]
IDS = [f"{model.arch} {model.norm}" for model in MODELS]


def network(model, seed=0):
    return models.init(model, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_every_axis_of_every_tensor_is_spoken_for(model):
    params, buffers = network(model)
    table, groups = wiring.axes(model), wiring.groups(model)
    assert set(table) == set(params) | set(buffers)
    seen = set()
    for name, tensor in {**params, **buffers}.items():
        assert len(table[name]) == tensor.dim()
        for length, axis in zip(tensor.shape, table[name], strict=True):
            if axis is not None:
                assert length == axis.taps * sum(groups[group].size for group in axis.groups)
                seen |= set(axis.groups)
        if tensor.dim() == 1 and name != f"{models.classifier_name(model)}.bias":
            assert table[name][0] is not None
        # no order stands on two axes: the objective of matching is linear in each
        orders = [{groups[group].order for group in axis.groups} for axis in table[name] if axis is not None]
        assert sum(map(len, orders)) == len(set().union(*orders))
    assert seen == set(groups)
    for name, group in groups.items():
        assert group.size % group.blocks == 0
        written, read = ([places[side] for places in table.values() if len(places) > 1 and places[side]] for side in (0, 1))
        assert any(name in axis.groups for axis in written)
        # products of queries and keys are read by softmax, not by a layer
        assert any(name in axis.groups for axis in read) != name.endswith(".attn.qk")


@pytest.mark.parametrize("model", [m for m in MODELS if m.arch != "vit"],
                         ids=[name for name in IDS if "vit" not in name])
def test_weights_read_and_write_what_the_wiring_says(model):
    table = wiring.axes(model)
    for name, (source, into) in wiring.wiring(model).items():
        written, read, *rest = table[name]
        assert (None if read is None else read.groups, None if written is None else written.groups) == (
            source and (source,), into and (into,))
        assert set(rest) <= {None}


def test_a_residual_network_by_hand():
    model = ModelSpec(arch="resnet10", width=8, classes=4)
    assert {name: group.size for name, group in wiring.groups(model).items()} == {
        "layer1": 8, "layer1.0.conv1": 8, "layer2.0.conv1": 16, "layer2": 16, "layer3.0.conv1": 32, "layer3": 32,
        "layer4.0.conv1": 64, "layer4": 64}
    table = wiring.axes(model)
    assert table["bn1.running_var"] == table["layer1.0.bn2.weight"] == (Axis(("layer1",)),)
    assert table["layer1.0.bn1.bias"] == (Axis(("layer1.0.conv1",)),)
    assert table["layer2.0.downsample.0.weight"] == (Axis(("layer2",)), Axis(("layer1",)), None, None)
    assert table["layer2.0.downsample.1.running_mean"] == (Axis(("layer2",)),)
    assert table["fc.weight"] == (None, Axis(("layer4",)))
    assert table["fc.bias"] == (None,)


def test_flattened_maps_have_taps_and_group_norm_has_blocks():
    model = ModelSpec(width=8, image_size=16, norm="group", classes=4)
    assert wiring.axes(model)["classifier.weight"] == (None, Axis(("conv2",), taps=4))
    assert wiring.groups(model) == {f"conv{i}": Group(8, 2, f"conv{i}") for i in range(3)}
    assert wiring.groups(model.replace(norm="layer"))["conv1"].blocks == 1


def test_a_transformer_by_hand():
    model = ModelSpec(arch="vit", width=64, image_size=16)
    groups, table = wiring.groups(model), wiring.axes(model)
    assert len(groups) == 1 + 6 * 3
    assert groups["blocks.3.attn.qk"] == groups["blocks.3.attn.v"] == Group(64, 2, "blocks.3.attn")
    assert groups["blocks.3.mlp"] == Group(256, 1, "blocks.3.mlp")
    stream = Axis(("stream",))
    assert table["pos_embed"] == (None, None, stream)
    assert table["blocks.0.attn.qkv.weight"] == (Axis(("blocks.0.attn.qk", "blocks.0.attn.qk", "blocks.0.attn.v")), stream)
    assert table["blocks.0.attn.proj.weight"] == (stream, Axis(("blocks.0.attn.v",)))
    assert table["blocks.0.norm1.weight"] == table["blocks.0.norm2.bias"] == table["norm.weight"] == (stream,)


def test_taking_channels_by_hand():
    model = ModelSpec(width=2, image_size=16, classes=4)
    params, _ = network(model)
    taken = wiring.take(model, params, {"conv0": torch.tensor([1]), "conv2": torch.tensor([1, 0])})
    assert torch.equal(taken["conv0.weight"], params["conv0.weight"][1:])
    assert torch.equal(taken["norm0.bias"], params["norm0.bias"][1:])
    assert torch.equal(taken["conv1.weight"], params["conv1.weight"][:, 1:])
    maps = params["classifier.weight"].reshape(4, 2, 4)
    assert torch.equal(taken["classifier.weight"], torch.cat([maps[:, 1], maps[:, 0]], 1))
    for name, tensor in taken.items():
        assert tensor.data_ptr() != params[name].data_ptr()


def test_what_is_of_another_network_is_refused():
    model = ModelSpec(width=4, image_size=16, classes=4)
    params, _ = network(model)
    with pytest.raises(ValueError, match=r"'extra' belongs to no layer of convnet3") as error:
        wiring.take(model, {"extra": torch.zeros(1)}, {})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'conv1\.weight' must be \(6, 6, 3, 3\) in convnet3 with width 6, got \(4, 4, 3, 3\)"):
        wiring.take(model.replace(width=6), {"conv1.weight": params["conv1.weight"]}, {})
    with pytest.raises(ValueError, match=r"channels can be followed through convolutions and MLPs only, got vit"):
        wiring.wiring(ModelSpec(arch="vit", image_size=16))


def test_the_norm_of_a_layer():
    assert wiring.norm_of(ModelSpec(arch="resnet10"), "layer2.0.downsample.0") == "layer2.0.downsample.1"
    assert wiring.norm_of(ModelSpec(), "conv2") == "norm2"
    with pytest.raises(ValueError, match=r"layer must have a norm behind it, got 'conv2' of alexnet with norm none"):
        wiring.norm_of(ModelSpec(arch="alexnet"), "conv2")


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_groups_come_in_an_order_that_a_forward_pass_can_settle(model):
    known = set()
    table = wiring.axes(model)
    for name in wiring.groups(model):
        writers = [table[weight] for weight in models.prunable(model) if table[weight][0] and name in table[weight][0].groups]
        assert any(read is None or set(read.groups) <= known for _, read, *_ in writers)
        known.add(name)
