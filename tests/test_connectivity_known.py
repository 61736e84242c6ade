"""Points that were measured before: taken over, never measured again, and nobody can tell the result from a fresh one."""
import functools

import pytest
import torch
from connectivity_networks import CONVNET, RESNET, examples, network

from dpkit import models
from dpkit.connectivity import (
    Path,
    PathSpec,
    all_pairs,
    along,
    barrier,
    barrier_linear,
    barrier_over,
    evenly,
    is_stable,
    path,
    places,
)
from dpkit.models import ModelSpec
from dpkit.training.evaluation import evaluate_many, pays
from dpkit.tree import lerp

FIELDS = ("alphas", "errors", "losses")


def same(one, other):
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in FIELDS)


def test_fractions_that_grids_share_are_the_same_numbers():
    for coarse, fine in ((11, 21), (11, 31), (4, 7), (8, 15), (15, 29)):
        every = (fine - 1) // (coarse - 1)
        assert torch.equal(evenly(fine)[::every], evenly(coarse))
    assert evenly(11).tolist() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert not torch.equal(torch.linspace(0, 1, 11, dtype=torch.float64), evenly(11))  # what is being mended
    for points in range(3, 402):
        assert torch.equal(torch.linspace(0, 1, points, dtype=torch.float64).float(), evenly(points).float())


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
@pytest.mark.parametrize("points", [11, 12, 25])
def test_paths_of_before_keep_their_bits(model, points):
    """Results that were stored have the alphas of torch.linspace: their errors and losses are the same numbers still."""
    a, b, (images, labels) = network(model), network(model, 1), examples(model)
    old = torch.linspace(0, 1, points, dtype=torch.float64).tolist()

    def between(i):
        return tuple(lerp(one, other, old[i]) for one, other in zip(a, b, strict=True))

    errors, losses = evaluate_many(model, points, between, images, labels, statistics_images=images[:20])
    found = path(PathSpec(points=points), model, a, b, images, labels, statistics_images=images[:20])
    assert torch.equal(found.errors, errors)
    assert torch.equal(found.losses, losses)


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
@pytest.mark.parametrize("statistics", ["reestimate", "interpolate", "repair"])
def test_a_path_with_known_points_is_the_path_without(model, statistics, counted):
    a, b, (images, labels) = network(model), network(model, 1), examples(model)
    spec = PathSpec(points=4, statistics=statistics)
    measure = functools.partial(path, model=model, a=a, b=b, images=images, labels=labels, statistics_images=images[:30])
    coarse, fine = measure(spec), measure(spec.replace(points=7))
    counted.clear()
    again = measure(spec.replace(points=7), known=coarse)
    if statistics != "repair":  # which also looks at both ends, for the moments that it restores
        assert sum(counted) == 3 * 40
    assert same(again, fine)
    counted.clear()
    assert same(measure(spec.replace(points=7), known=fine), fine)
    assert same(measure(spec, known=fine), coarse)
    assert not counted


def test_the_alphas_of_linspace_are_known_too(counted):
    a, b, (images, labels) = network(CONVNET), network(CONVNET, 1), examples(CONVNET)
    fresh = path(PathSpec(points=11), CONVNET, a, b, images, labels)
    stored = Path(torch.linspace(0, 1, 11, dtype=torch.float64), fresh.errors, fresh.losses)
    counted.clear()
    found = path(PathSpec(points=21), CONVNET, a, b, images, labels, known=stored)
    assert sum(counted) == 10 * 40
    assert torch.equal(found.losses[::2], fresh.losses)
    assert torch.equal(found.alphas, evenly(21))


def test_refinement_goes_on_from_what_is_known(counted):
    params, _ = network(CONVNET)
    turned = {}
    for name, tensor in params.items():  # hidden units in reverse: the same function, and a barrier between both
        tensor = tensor if name == "classifier.bias" or name == "classifier.weight" else tensor.flip(0)
        turned[name] = tensor.flip(1) if name in ("conv1.weight", "conv2.weight", "classifier.weight") else tensor
    a, b, (images, _) = (params, {}), (turned, {}), examples(CONVNET)
    labels = models.forward(CONVNET, *a, images)[0].argmax(1)
    spec = PathSpec(points=5, loss_tolerance=1e-3)
    rough, fine = (path(spec.replace(loss_tolerance=t), CONVNET, a, b, images, labels) for t in (0.05, 1e-3))
    counted.clear()
    assert same(path(spec, CONVNET, a, b, images, labels, known=rough), fine)
    assert sum(counted) == (len(fine.alphas) - len(rough.alphas)) * 40 > 0
    assert set(rough.alphas.tolist()) < set(fine.alphas.tolist())


def test_pairs_with_known_points_are_the_pairs_without(counted):
    children, (images, labels) = {str(i): network(RESNET, i) for i in range(3)}, examples(RESNET)
    measure = functools.partial(all_pairs, model=RESNET, networks=children, images=images, labels=labels,
                                statistics_images=images[:20])
    coarse, fine = (measure(PathSpec(points=points)) for points in (3, 5))
    counted.clear()
    some = {pair: line for pair, line in coarse.items() if pair != ("1", "2")}
    again = measure(PathSpec(points=5), known=some)
    assert sum(counted) == (2 + 2 + 3) * 40  # the ends of all three are known from two of the pairs
    assert list(again) == list(fine)
    assert all(same(again[pair], fine[pair]) for pair in fine)
    with pytest.raises(ValueError, match=r"known must be paths between two of the networks 0, 1, 2, in this order; got 1 and 0$"):
        measure(PathSpec(points=5), known={("1", "0"): coarse["0", "1"]})


@pytest.mark.parametrize("alphas, errors, losses, message", [
    ([0, 0.5, 1], [0.1, 0.2, 0.25], [1, 1, 1], None),
    ([0, 0.5, 1], [0.1, 0.21, 0.25], [1, 1, 1], "got error 0.21 and loss 1 at alpha 0.5"),
    ([0, 0.5, 1.5], [0.1, 0.2, 0.25], [1, 1, 1], "at alpha 1.5"),
    ([0, 0.5, 1], [0.1, float("nan"), 0.25], [1, 1, 1], "got error nan"),
    ([0, 0.5, 1], [0.1, 0.2, 0.25], [1, 1, float("nan")], "loss nan at alpha 1;"),
])
def test_points_that_cannot_be_of_these_images_are_refused(alphas, errors, losses, message):
    a, b, (images, labels) = network(CONVNET), network(CONVNET, 1), examples(CONVNET, 20)
    known = Path(*(torch.tensor(t, dtype=torch.float64) for t in (alphas, errors, losses)))
    if message is None:
        assert path(PathSpec(points=3), CONVNET, a, b, images, labels, known=known).errors.tolist() == errors
        return
    with pytest.raises(ValueError) as error:
        path(PathSpec(points=3), CONVNET, a, b, images, labels, known=known)
    text = str(error.value)
    assert "known points between a and b must have alphas from 0 to 1, losses, and errors that are shares of the 20" in text
    assert message in text
    assert "\n" not in text


def test_compiling_does_not_depend_on_the_number_of_points(monkeypatch):
    asked = []
    monkeypatch.setattr(places, "pays", lambda model, images: asked.append(images) or False)
    a, b, (images, labels) = network(RESNET), network(RESNET, 1), examples(RESNET)
    for points in (3, 11, 25):
        path(PathSpec(points=points, statistics_images=20), RESNET, a, b, images, labels, statistics_images=images)
    assert asked == [11 * 60] * 3  # what 11 points always were: 40 images, and 20 for the statistics
    # of the study's networks nothing changes: the smallest never pays, the paper's do on thousands of images
    assert not pays(ModelSpec(width=16, image_size=16), 11 * 7000)
    assert all(pays(ModelSpec(arch=arch, width=width), 11 * 6000) for arch, width in (("convnet3", 128), ("resnet10", 32)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_points_are_taken_over_to_the_last_bit_too(monkeypatch, precision):
    monkeypatch.setattr(places, "pays", lambda model, images: True)
    a, b, (images, labels) = network(RESNET), network(RESNET, 1), examples(RESNET, 130)
    spec = PathSpec(points=3, precision=precision)
    coarse, fine = (path(spec.replace(points=points), RESNET, a, b, images, labels, statistics_images=images[:30])
                    for points in (3, 5))
    again = path(spec.replace(points=5), RESNET, a, b, images, labels, statistics_images=images[:30], known=coarse)
    assert same(again, fine)
    assert torch.equal(fine.losses[::2], coarse.losses)


def test_each_place_is_asked_for_once():
    asked = []

    def evaluate(wanted):
        asked.extend(wanted)
        return torch.tensor([len(a) / 4 for a, _, _ in wanted]), torch.tensor([alpha for *_, alpha in wanted])

    measured = places.Measured(evaluate, 4)
    measured([("a", "b", 0.0), ("a", "c", 0.0), ("a", "b", 0.5), ("a", "b", 0.5)])
    assert asked == [("a", "b", 0.0), ("a", "b", 0.5)]
    errors, losses = measured([("b", "a", 1.0), ("a", "b", 0.5), ("b", "a", 0.5)])
    assert asked[2:] == [("b", "a", 0.5)]  # the other way round is another sum, and other bits
    assert errors.tolist() == [0.25] * 3
    assert losses.tolist() == [0.0, 0.5, 0.5]
    assert errors.dtype == losses.dtype == torch.float64


def test_every_definition_by_its_name_on_error_and_loss():
    """A double well seen from unequal ends: error 0.3 - 0.2 t^2 and loss (t^2 - 1)^2 from t = -1 to 1/2, the saddle at t = 0."""
    def well(params):
        t = float(params["t"])
        return 0.3 - 0.2 * t * t, (t * t - 1) ** 2

    ends = ({"t": torch.tensor(t, dtype=torch.float64)} for t in (-1.0, 0.5))
    found = along(*ends, evenly(1501), well)
    assert found.error_barrier == barrier(found.errors) == pytest.approx(0.3 - (0.1 + 0.25) / 2, abs=1e-6)
    assert found.loss_barrier == barrier(found.losses) == pytest.approx(1 - 0.5625 / 2, abs=1e-6)
    # a parabola of curvature -0.4 is 0.2 * (1.5 / 2)^2 above its chord at the middle
    assert found.error_barrier_linear == barrier_linear(found.alphas, found.errors) == pytest.approx(0.1125, abs=1e-6)
    # above the chord 0.375 (t + 1): the derivative 4 t^3 - 4 t - 0.375 vanishes at t = -0.094591...
    t = torch.linspace(-1, 0.5, 1_500_001, dtype=torch.float64)
    top = float(((t * t - 1) ** 2 - 0.375 * (t + 1)).max())
    assert found.loss_barrier_linear == pytest.approx(top, abs=1e-6)
    assert barrier_over(found.losses, [0.0, 0.5625]) == found.loss_barrier
    assert not found.stable
    assert not is_stable(found.error_barrier)
    flat = Path(found.alphas, 0.1 + found.errors * 0.15, found.losses)
    assert flat.stable  # 0.15 * 0.125 is under two points


def test_a_barrier_over_two_networks():
    assert barrier_over([0.0, 0.5, 1.0], [0.0, 0.5]) == 0.75
    assert barrier_over([0.0, 0.1], [0.5, 0.5]) == -0.4
    with pytest.raises(ValueError, match="a barrier lies between 2 networks, got values of 3; pass those of both"):
        barrier_over([0.0, 0.1], [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="got NaN at point 1"):
        barrier_over([0.0, float("nan")], [0.5, 0.5])
