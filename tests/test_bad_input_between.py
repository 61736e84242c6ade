"""What must not stand between or around networks: one clear line for each, and none of it in silence."""
import pytest
import torch
from connectivity_networks import CONVNET, RESNET, examples, generator, network

from dpkit import landscape, models
from dpkit.alignment import identity, transfer
from dpkit.connectivity import (
    NotFinite,
    PathSpec,
    all_pairs,
    barrier,
    barrier_linear,
    check_masks,
    distances,
    layer_paths,
    path,
    possible_rise,
    predict,
)
from dpkit.landscape import PlaneSpec, ProfileSpec, SquareSpec
from dpkit.models import ModelSpec

BATCH = CONVNET.replace(norm="batch")
MLP = ModelSpec(arch="mlp", width=4, image_size=8, classes=4)
SPEC = PathSpec(points=3)
INF = float("inf")


def one_line(call, message, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def huge(seed=0):
    """Finite weights whose logits are not: sums of products of 1e30 and the like overflow float32."""
    params, buffers = network(MLP, seed)
    return {n: 1e30 * t for n, t in params.items()}, buffers


def masks_of(params, seed=5):
    return {n: torch.rand(t.shape, generator=generator(seed)) < 0.5 for n, t in params.items() if t.dim() == 4}


def pruned(params, mask):
    return {n: torch.where(mask[n], t, 0.0) if n in mask else t for n, t in params.items()}


# --- values that are no numbers ---------------------------------------------------------------------------------------

def test_logits_that_overflow_are_no_path():
    images, labels = examples(MLP)
    assert all(bool(torch.isfinite(t).all()) for t in huge()[0].values())
    one_line(lambda: path(SPEC, MLP, network(MLP), huge(1), images, labels),
             "losses on the way from network a to network b must be finite, got nan at alpha 0.5", NotFinite)
    one_line(lambda: all_pairs(SPEC, MLP, {"0": network(MLP), "1": network(MLP, 1), "2": huge()}, images, labels),
             "from network 2 to network 2 must be finite", NotFinite)
    one_line(lambda: layer_paths(SPEC, MLP, huge(), huge(1), images, labels), "must be finite, got nan", NotFinite)
    one_line(lambda: predict(MLP, *huge(), images), "must have finite logits", NotFinite)


def test_barriers_of_infinite_values_are_none():
    for values in ([INF, 1.0, 0.0], [0.0, 1.0, INF], [0.0, INF, 0.0], [0.0, -INF, 0.0]):
        one_line(lambda values=values: barrier(values), "a path must have finite values, got", NotFinite)
        one_line(lambda values=values: barrier_linear([0.0, 0.5, 1.0], values), "a path must have finite values", NotFinite)
        one_line(lambda values=values: possible_rise([0.0, 0.5, 1.0], values), "a path must have finite values", NotFinite)
    one_line(lambda: barrier([0.0, INF]), "got inf at point 1; check the networks")


@pytest.mark.parametrize("alphas", [[0.0, 0.7, 0.3, 1.0], [0.0, 0.5, 0.5, 1.0]])
def test_points_out_of_order_are_refused(alphas):
    for function in (barrier_linear, possible_rise):
        one_line(lambda function=function: function(alphas, [0.0, 1.0, 1.0, 0.0]),
                 "alphas must ascend with one entry a value, each once")


def test_a_rise_needs_an_alpha_for_each_value():
    for alphas in ([0.0, 1.0], [0.0, 0.3, 0.6, 1.0]):
        one_line(lambda alphas=alphas: possible_rise(alphas, [0.0, 1.0, 0.0]), "alphas must ascend with one entry a value")


# --- networks and what belongs to them --------------------------------------------------------------------------------

def test_predictions_are_of_the_network_that_was_named():
    images, _ = examples(CONVNET)
    params, buffers = network(CONVNET)
    broken = params | {"conv1.bias": params["conv1.bias"] * float("nan")}
    one_line(lambda: predict(CONVNET, broken, buffers, images), "to predict with must have finite weights, but 'conv1.bias'")
    one_line(lambda: predict(RESNET, params, buffers, images), "network to predict with must be of resnet10 with batch norm")
    one_line(lambda: predict(BATCH, params, {}, images), "it lacks 'norm0.running_mean'")


def test_masks_that_fit_no_network():
    params, images_labels = network(CONVNET)[0], examples(CONVNET)
    mask = masks_of(params)
    child = pruned(params, mask)
    unknown, wrong, numbers = mask | {"nothing": mask["conv0.weight"]}, mask | {"conv0.weight": mask["conv1.weight"]}, {
        n: m.float() for n, m in mask.items()}
    for bad, said in ((unknown, "the mask of network a must be over its weights, but 'nothing', (5, 3, 3, 3) in the mask, is not "
                                "there"),
                      (wrong, "but 'conv0.weight', (5, 5, 3, 3) in the mask, is (5, 3, 3, 3) there"),
                      (numbers, "the mask of network a must be boolean (True keeps a weight), got torch.float32 for 'conv0")):
        one_line(lambda bad=bad: check_masks({"a": bad, "b": bad}, {"a": child, "b": child}), said)
        one_line(lambda bad=bad: path(SPEC, CONVNET, (child, {}), (child, {}), *images_labels, masks=(bad, bad)), said)
    one_line(lambda: distances(child, child, mask=numbers), "mask of conv0.weight must be boolean")
    one_line(lambda: transfer(CONVNET, numbers, identity(CONVNET)), "the mask of network a must be boolean")
    one_line(lambda: landscape.random_directions(ProfileSpec(directions=1), CONVNET, child, generator(), mask=numbers),
             "the mask of the network must be boolean")


def test_starts_of_another_architecture_are_refused():
    a, b, start = network(CONVNET), network(CONVNET, 1), network(MLP)[0]
    one_line(lambda: path(SPEC, CONVNET, a, b, *examples(CONVNET), starts=(start, start)),
             "networks a at its start and a must have the same tensors, but")


@pytest.mark.parametrize(("labels", "said"), [
    (torch.full((40,), 4), "labels must lie between 0 and 3, as the network knows 4 classes, got 4"),
    (torch.full((40,), -1), "labels must lie between 0 and 3, as the network knows 4 classes, got -1"),
    (torch.zeros(40), "labels must be (N,) whole numbers (int64), one class an image, got (40,) torch.float32"),
    (torch.zeros(40, 4), "one class an image, got (40, 4)")])
def test_labels_that_are_no_classes(labels, said):
    images = examples(CONVNET)[0]
    one_line(lambda: path(SPEC, CONVNET, network(CONVNET), network(CONVNET, 1), images, labels), said)
    if labels.dim() == 1 and not labels.is_floating_point():
        flat = landscape.plane(*(network(CONVNET, i)[0] for i in range(3)))
        one_line(lambda: landscape.grid(PlaneSpec(resolution=2), CONVNET, flat, {}, images, labels), said)


# --- landscapes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("shape", "count"), [(landscape.plane, 3), (landscape.square, 4)])
def test_surfaces_compare_masks_and_starts(shape, count):
    networks = [network(CONVNET, i)[0] for i in range(count)]
    mask, other = masks_of(networks[0]), masks_of(networks[0], seed=6)
    children = [pruned(params, mask) for params in networks]
    shape(*children, masks=(mask,) * count, starts=(networks[0],) * count)
    one_line(lambda: shape(*children, masks=(mask,) * (count - 1) + (other,)),
             f"networks a and {'abcd'[count - 1]} must have the same mask, but of 'conv0.weight'")
    one_line(lambda: shape(*networks, masks=(mask,) * count), "network a must be zero where its mask removes weights")
    one_line(lambda: shape(*children, starts=(networks[0],) * (count - 1) + (networks[1],)),
             f"networks a and {'abcd'[count - 1]} must start from the same initialisation")
    one_line(lambda: shape(*children, masks=(mask, mask)), "masks must be given for networks a, b, c")


@pytest.mark.parametrize("statistics", ["keep", "reestimate"])
def test_buffers_of_a_landscape_are_checked(statistics):
    networks, (images, labels) = [network(BATCH, i) for i in range(4)], examples(BATCH)
    flat, buffers = landscape.plane(*(params for params, _ in networks[:3])), networks[0][1]
    broken = buffers | {"norm1.running_var": buffers["norm1.running_var"] * float("nan")}
    spec = PlaneSpec(resolution=2, statistics=statistics)
    for bad, said in (({}, "the networks of the surface must have the buffers of convnet3 with batch norm, but "
                           "'norm0.running_mean' is missing"),
                      (broken, "the networks of the surface must have finite buffers, but 'norm1.running_var' has NaN")):
        one_line(lambda bad=bad: landscape.grid(spec, BATCH, flat, bad, images, labels, images), said)
    lines = ProfileSpec(points=3)
    one_line(lambda: landscape.profile(lines, BATCH, networks[0][0], {}, [networks[1][0]], images, labels, images),
             "the network must have the buffers of convnet3")
    square = landscape.square(*(params for params, _ in networks), buffers=({},) * 4)
    one_line(lambda: landscape.grid(SquareSpec(resolution=2, statistics="interpolate"), BATCH, square, buffers, images, labels),
             "network a of the square must have the buffers of convnet3 with batch norm")
    assert models.statistics(BATCH)
