"""One layer moved, and all but one: a function written out by hand, networks put together by hand, and what is refused."""
import math

import pytest
import torch
from connectivity_networks import CONVNET, RESNET, examples, generator, network

from dpkit import models, tree
from dpkit.connectivity import PathSpec, evenly, layer_paths, layer_tensors, path
from dpkit.models import ModelSpec
from dpkit.training import evaluate

MLP = ModelSpec(arch="mlp", width=2, image_size=1, channels=1, classes=2)
PLAIN = PathSpec(points=5, statistics="interpolate")


OTHERS = [ModelSpec(arch=arch, width=32, image_size=16, norm=norm) for arch, norm in (
    ("alexnet", "none"), ("vgg16", "batch"), ("resnet20", "group"), ("vit", "layer"), ("vit", "none"))]


@pytest.mark.parametrize("model", [CONVNET, RESNET, MLP, *OTHERS], ids=lambda m: f"{m.arch}-{m.norm}")
def test_every_tensor_belongs_to_one_layer(model):
    found = layer_tensors(model)
    assert tuple(f"{name}.weight" for name in found) == models.prunable(model)
    assert all(f"{name}.weight" in tensors for name, tensors in found.items())
    params, buffers = models.init(model, generator())
    assert sorted(n for tensors in found.values() for n in tensors) == sorted([*params, *buffers])


def test_norms_and_statistics_go_with_the_layer_that_they_follow():
    assert layer_tensors(CONVNET)["conv1"] == ("conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias")
    assert layer_tensors(RESNET)["layer2.0.downsample.0"] == (
        "layer2.0.downsample.0.weight", "layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias",
        "layer2.0.downsample.1.running_mean", "layer2.0.downsample.1.running_var")
    vit = layer_tensors(ModelSpec(arch="vit", width=32, image_size=8))
    assert vit["patch_embed.proj"] == ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed")
    assert vit["blocks.3.mlp.fc1"][:2] == ("blocks.3.norm2.weight", "blocks.3.norm2.bias")
    assert vit["head"] == ("norm.weight", "norm.bias", "head.weight", "head.bias")


def mirrored(strength=1.5):
    """A network of x, one grey pixel, with logits +-strength x, and the same with its two last hidden units exchanged."""
    first = torch.tensor([[1.0], [-1.0], [0.0], [0.0], [0.0], [0.0]])
    second = torch.tensor([[1.0, -1.0, 0, 0, 0, 0], [-1.0, 1.0, 0, 0, 0, 0]])
    last = strength * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    params = {"linear0.weight": first, "linear0.bias": torch.zeros(6), "linear1.weight": second, "linear1.bias": torch.zeros(2),
              "classifier.weight": last, "classifier.bias": torch.zeros(2)}
    return params, params | {"linear1.weight": second.flip(0), "classifier.weight": last.flip(1)}


def test_a_permuted_network_layer_by_layer_has_the_curves_of_its_formula():
    """Two layers undo the permutation together, so each of them alone turns the answers round: its end is wrong on all images."""
    a, b = mirrored()
    images, labels = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(4, 1, 1, 1), torch.tensor([0, 1, 0, 1])
    found = layer_paths(PathSpec(points=11), MLP, (a, {}), (b, {}), images, labels)
    assert found.layers == ("linear0", "linear1", "classifier")

    def losses(scale):  # logits +-1.5 x scale
        return torch.tensor([math.log1p(math.exp(-3 * scale(1 - 2 * i / 10))) for i in range(11)], dtype=torch.float64)

    still, turned, both = losses(lambda s: 1), losses(lambda s: s), losses(lambda s: s * s)
    for layer, one, rest in (("linear0", still, both), ("linear1", turned, turned), ("classifier", turned, turned)):
        torch.testing.assert_close(found.moved(layer).losses, one, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.others(layer).losses, rest, rtol=0, atol=1e-6)
    ends = math.log1p(math.exp(-3))
    swapped = math.log1p(math.exp(3)) - ends
    # against both full networks, which are both right on all images
    expected = torch.tensor([0.0, swapped, swapped], dtype=torch.float64)
    torch.testing.assert_close(found.loss_barriers, expected, rtol=0, atol=1e-6)
    assert found.error_barriers.tolist() == [0, 1, 1]
    assert found.others_error_barriers.tolist() == [0.5, 1, 1]
    torch.testing.assert_close(found.others_loss_barriers, torch.tensor([math.log(2) - ends, swapped, swapped],
                                                                        dtype=torch.float64), rtol=0, atol=1e-6)
    # against the ends of its own path, the second of which nobody trained, half of it is left
    assert found.moved("linear1").loss_barrier == pytest.approx(swapped / 2, abs=1e-6)
    assert found.end_errors.tolist() == [0, 0]
    assert found.end_losses.tolist() == pytest.approx([ends, ends], abs=1e-6)


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
@pytest.mark.parametrize("statistics", ["interpolate", "reestimate"])
def test_each_place_is_the_network_put_together_by_hand(model, statistics):
    a, b, (images, labels) = network(model), network(model, 1), examples(model)
    few = examples(model, 20, seed=9)[0]
    spec, groups = PathSpec(points=3, statistics=statistics), layer_tensors(model)
    layers = list(groups)[::3]
    found = layer_paths(spec, model, a, b, images, labels, layers=layers, statistics_images=few)
    assert found.errors.shape == found.others_losses.shape == (len(layers), 3)

    def value(tensors):
        params, buffers = {n: tensors[n] for n in a[0]}, {n: tensors[n] for n in a[1]}
        if statistics == "reestimate":
            buffers = models.reestimate(model, params, buffers, few)
        return evaluate(model, params, buffers, images, labels)

    one, other = a[0] | a[1], b[0] | b[1]
    assert (found.end_errors[1], found.end_losses[1]) == value(other)
    for i, layer in enumerate(layers):
        for j, alpha in enumerate(found.alphas.tolist()):
            between = tree.lerp(one, other, alpha)
            alone = one | {n: between[n] for n in groups[layer]}
            assert (found.errors[i, j], found.losses[i, j]) == value(alone)
            assert (found.others_errors[i, j], found.others_losses[i, j]) == value(between | {n: one[n] for n in groups[layer]})


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
def test_repaired_layers_are_repaired_paths_to_the_mixed_networks(model):
    a, b, (images, labels) = network(model), network(model, 1), examples(model)
    spec, layer = PathSpec(points=3, statistics="repair"), list(layer_tensors(model))[1]
    found = layer_paths(spec, model, a, b, images, labels, layers=[layer], statistics_images=images)
    mixed = tuple({n: other[n] if n in layer_tensors(model)[layer] else one[n] for n in one}
                  for one, other in zip(a, b, strict=True))
    alone = path(spec, model, a, mixed, images, labels, statistics_images=images)
    assert torch.equal(found.moved(layer).losses, alone.losses)
    assert torch.equal(found.moved(layer).alphas, alone.alphas)


def test_ends_and_places_are_evaluated_once(counted):
    a, b, (images, labels) = network(CONVNET), network(CONVNET, 1), examples(CONVNET)
    found = layer_paths(PLAIN, CONVNET, a, b, images, labels, threads=2)
    assert sum(counted) == (2 + 2 * 4 * 4) * 40
    assert len(set(found.losses[:, 0].tolist()) | set(found.others_losses[:, 0].tolist())) == 1
    assert float(found.losses[0, 0]) == float(found.end_losses[0])
    whole = path(PLAIN, CONVNET, a, b, images, labels)
    assert torch.equal(found.end_losses, whole.losses[[0, -1]])


def test_known_points_are_taken_over_to_the_last_bit(counted):
    a, b, (images, labels) = network(RESNET), network(RESNET, 1), examples(RESNET)
    names = list(layer_tensors(RESNET))[:3]
    coarse = layer_paths(PLAIN, RESNET, a, b, images, labels, layers=names[:2])
    fine = layer_paths(PLAIN.replace(points=9), RESNET, a, b, images, labels, layers=names)
    counted.clear()
    again = layer_paths(PLAIN.replace(points=9), RESNET, a, b, images, labels, layers=names, known=coarse)
    assert sum(counted) == (2 * 2 * 4 + 2 * 8) * 40  # four new points of each known row, eight of the third layer's
    for field in ("alphas", "errors", "losses", "others_errors", "others_losses", "end_errors", "end_losses"):
        assert torch.equal(getattr(again, field), getattr(fine, field))
    assert torch.equal(fine.alphas, evenly(9))


def test_pruned_layers_stay_pruned_and_masks_are_checked():
    (a, _), (b, _), (images, labels) = network(CONVNET), network(CONVNET, 1), examples(CONVNET)
    mask = {n: torch.rand(t.shape, generator=generator(3)) < 0.5 for n, t in a.items() if t.dim() == 4}
    a, b = ({n: torch.where(mask[n], t, torch.zeros_like(t)) if n in mask else t for n, t in p.items()} for p in (a, b))
    found = layer_paths(PLAIN, CONVNET, (a, {}), (b, {}), images, labels, masks=(mask, mask))
    assert found.losses.isfinite().all()
    other = {n: ~m for n, m in mask.items()}
    with pytest.raises(ValueError, match=r"networks a and b must have the same mask, but of 'conv0.weight' a keeps"):
        layer_paths(PLAIN, CONVNET, (a, {}), (b, {}), images, labels, masks=(mask, other))


@pytest.mark.parametrize("change, message", [
    ({"layers": ["conv0", "conv7"]}, "layers must be different ones of convnet3, at least one: conv0, conv1, conv2, classifier; "
                                     "got conv7"),
    ({"layers": []}, "got none"),
    ({"layers": ["conv0", "conv0"]}, "got conv0, conv0"),
    ({"spec": PLAIN.replace(loss_tolerance=0.1)},
     "paths of layers share their points, got error_tolerance 0 and loss_tolerance 0.1"),
    ({"b": network(RESNET)}, "networks a and b must have the same tensors, but 'conv0.weight' is in a and not in b"),
    ({"b": ({**network(CONVNET, 1)[0], "conv1.bias": torch.full((5,), math.nan)}, {})},
     "network b must have finite weights, but 'conv1.bias' has NaN"),
    ({"images": torch.zeros(0, 3, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, "at least 1 image and one label for each"),
    ({"starts": (network(CONVNET)[0], network(CONVNET, 1)[0])}, "networks a and b must start from the same initialisation"),
])
def test_what_does_not_fit_is_refused_in_one_line(change, message):
    images, labels = examples(CONVNET)
    given = {"spec": PLAIN, "a": network(CONVNET), "b": network(CONVNET, 1), "images": images, "labels": labels} | change
    with pytest.raises(ValueError) as error:
        layer_paths(given.pop("spec"), CONVNET, *(given.pop(name) for name in ("a", "b", "images", "labels")), **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_layer_that_was_not_measured_is_named():
    a, b, (images, labels) = network(CONVNET), network(CONVNET, 1), examples(CONVNET)
    found = layer_paths(PLAIN, CONVNET, a, b, images, labels, layers=["conv0"])
    with pytest.raises(ValueError, match="layer must be one of conv0; got 'conv1'"):
        found.moved("conv1")
    with pytest.raises(ValueError, match=r"layers must be different ones of resnet10.*got conv0"):
        layer_paths(PLAIN, RESNET, network(RESNET), network(RESNET, 1), images, labels, known=found)
