"""Finer grids and profiles take over what is known, bit for bit; soft labels on the same surfaces."""
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape_networks import CONVNET, MLP, RESNET, constant, examples, generator, known_values, network, several

from dpkit.landscape import (
    AroundSpec,
    Grid,
    PlaneSpec,
    Profile,
    ProfileSpec,
    SquareSpec,
    around,
    grid,
    measure,
    plane,
    profile,
    random_directions,
    square,
)
from dpkit.landscape.surfaces import exact, lines
from dpkit.training.evaluation import evaluate_many


@pytest.fixture
def asked(monkeypatch):
    """How many networks each job evaluated."""
    counts = []

    def counted(model, count, *arguments, **settings):
        counts.append(count)
        return evaluate_many(model, count, *arguments, **settings)

    monkeypatch.setattr(measure, "evaluate_many", counted)
    return counts


def same(one, other):
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))


def surfaces(model):
    nets = [network(model, seed) for seed in range(4)]
    params = [p for p, _ in nets]
    directions = random_directions(AroundSpec(), model, params[0], generator(3))
    return {"plane": (PlaneSpec(), plane(*params[:3])),
            "square": (SquareSpec(margin=0.1), square(*params)),
            "interpolated": (SquareSpec(statistics="interpolate"), square(*params, buffers=tuple(b for _, b in nets))),
            "around": (AroundSpec(reach=0.7), around(params[0], *directions))}


@pytest.mark.parametrize("kind", ["plane", "square", "interpolated", "around"])
@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
def test_a_refined_grid_has_the_bits_of_one_measured_at_once(kind, model, asked):
    spec, surface = surfaces(model)[kind]
    spec = spec.replace(images=6, statistics_images=4)
    _, buffers = network(model)
    data = (*examples(model), examples(model, 8, seed=9)[0])
    known = None
    for resolution in (3, 5, 9):
        known = grid(spec.replace(resolution=resolution), model, surface, buffers, *data, known=known)
    assert asked == [9, 25 - 9, 81 - 25]
    straight = grid(spec.replace(resolution=9), model, surface, buffers, *data)
    assert same(known, straight)
    assert same(grid(spec.replace(resolution=9), model, surface, buffers, *data, known=known), straight)
    assert asked == [9, 16, 56, 81]  # nothing was left to do
    assert same(grid(spec.replace(resolution=3), model, surface, buffers, *data, known=known),
                grid(spec.replace(resolution=3), model, surface, buffers, *data))  # a coarser one is part of it
    assert asked[4:] == [9]


def test_ratios_meet_at_every_equal_fraction(asked):
    spec, surface = surfaces(CONVNET)["square"]
    data = examples(CONVNET, 5)
    coarse = grid(spec.replace(resolution=4), CONVNET, surface, {}, *data)
    fine = grid(spec.replace(resolution=10), CONVNET, surface, {}, *data, known=coarse)
    assert asked == [16, 100 - 16]
    assert same(fine, grid(spec.replace(resolution=10), CONVNET, surface, {}, *data))
    grid(spec.replace(resolution=6), CONVNET, surface, {}, *data, known=coarse)
    assert asked[3:] == [36 - 4]  # thirds and fifths share the ends


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
def test_a_refined_profile_has_the_bits_of_one_measured_at_once(model, asked):
    params, buffers = network(model)
    data = (*examples(model), examples(model, 8, seed=9)[0])
    spec = ProfileSpec(points=5, directions=3, reach=0.3, images=6, statistics_images=4)
    steps = random_directions(spec, model, params, generator(2))

    def measured(points, count, known=None):
        return profile(spec.replace(points=points), model, params, buffers, steps[:count], *data, known=known)

    known = measured(5, 2)
    assert asked == [1 + 2 * 4]  # the network itself once
    finer = measured(9, 2, known)
    more = measured(9, 3, finer)
    both = measured(9, 3, known)
    assert asked[1:] == [2 * 4, 8, 2 * 4 + 8]
    straight = measured(9, 3)
    assert asked[4:] == [1 + 3 * 8]
    assert same(more, straight)
    assert same(both, straight)
    assert same(finer, Profile(straight.t, straight.errors[:2], straight.losses[:2]))
    assert len(set(straight.losses[:, 4].tolist())) == 1


def test_values_are_taken_over_and_not_looked_at_again(asked):
    spec, surface = surfaces(CONVNET)["plane"]
    data = examples(CONVNET, 5)
    found = grid(spec.replace(resolution=3), CONVNET, surface, {}, *data)
    marked = dataclasses.replace(found, errors=found.errors + 7, losses=found.losses + 100)
    fine = grid(spec.replace(resolution=5), CONVNET, surface, {}, *data, known=marked)
    assert torch.equal(fine.losses[::2, ::2], marked.losses)
    assert torch.equal(fine.errors[::2, ::2], marked.errors)
    assert fine.losses[1::2].max() < 100
    assert fine.losses[:, 1::2].max() < 100


def test_whether_it_compiles_does_not_depend_on_the_number_of_points(monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "pays", lambda model, images: seen.append(images) or False)
    data = examples(CONVNET, 7)
    for resolution in (2, 4):
        grid(PlaneSpec(resolution=resolution), CONVNET, plane(*several(CONVNET, 3)), {}, *data)
    for points in (3, 5):
        params, _ = network(CONVNET)
        profile(ProfileSpec(points=points), CONVNET, params, {}, [{"conv0.bias": torch.ones(5)}], *data)
    params, buffers = network(RESNET)
    grid(AroundSpec(resolution=2, statistics_images=3), RESNET, around(params, *random_directions(
        AroundSpec(), RESNET, params, generator())), buffers, *examples(RESNET, 7), examples(RESNET, 8)[0])
    assert seen == [121 * 7] * 4 + [121 * (7 + 3)]


@pytest.mark.parametrize("kind", [PlaneSpec, SquareSpec, AroundSpec, ProfileSpec])
def test_compiling_can_be_asked_for_and_leaves_old_keys_alone(kind, monkeypatch):
    assert "compile" not in kind().to_dict()
    assert kind(compile=True).to_dict()["compile"] is True
    seen = []
    monkeypatch.setattr(measure, "evaluate_many", lambda *_, compiled, **__: seen.append(compiled) or torch.zeros(2, 9).double())
    for spec in (kind(compile=True), kind()):
        params, _ = network(CONVNET)
        if kind is ProfileSpec:
            profile(spec.replace(points=9), CONVNET, params, {}, [{"conv0.bias": torch.ones(5)}], *examples(CONVNET))
        else:
            surface = {PlaneSpec: "plane", SquareSpec: "square", AroundSpec: "around"}[kind]
            grid(spec.replace(resolution=3), CONVNET, surfaces(CONVNET)[surface][1], {}, *examples(CONVNET))
    assert seen == [True, False]


@settings(max_examples=60, deadline=None)
@given(low=st.floats(-100, 0), length=st.floats(1e-3, 1e3), count=st.integers(2, 60))
def test_twice_as_fine_lines_of_a_plane_hold_the_coarse_ones(low, length, count):
    # planes keep torch.linspace, by which results exist; this is what their refinement stands on
    coarse, fine = (torch.linspace(low, low + length, n, dtype=torch.float64) for n in (count, 2 * count - 1))
    assert torch.equal(fine[::2], coarse)


@settings(max_examples=60, deadline=None)
@given(reach=st.floats(1e-3, 1e3), count=st.integers(2, 40), times=st.integers(1, 7))
def test_lines_of_any_multiple_hold_the_coarse_ones(reach, count, times):
    coarse, fine = (lines(-exact(reach), exact(reach), n) for n in (count, times * (count - 1) + 1))
    assert torch.equal(fine[::times], coarse)
    assert torch.equal(coarse, -coarse.flip(0))
    assert (coarse[0], coarse[-1]) == (-reach, reach)
    torch.testing.assert_close(coarse, torch.linspace(-reach, reach, count, dtype=torch.float64), rtol=1e-12, atol=1e-12 * reach)


def test_what_does_not_fit_is_refused():
    nets, data = several(CONVNET, 4), examples(CONVNET, 5)
    spec, flat = PlaneSpec(resolution=2), plane(*nets[:3])
    found = grid(spec, CONVNET, flat, {}, *data)
    with pytest.raises(ValueError, match="known points must have the same ends to be refined, but x runs from"):
        grid(spec.replace(margin=0.5), CONVNET, flat, {}, *data, known=found)
    with pytest.raises(ValueError, match="a known grid must be of the same networks to be refined, but its are at"):
        grid(spec, CONVNET, plane(*nets[1:]), {}, *data, known=found)
    with pytest.raises(ValueError, match="a known grid must be of the same networks"):
        grid(SquareSpec(), CONVNET, square(*nets), {}, *data, known=found)
    step = [{"conv0.bias": torch.ones(5)}]
    line = profile(ProfileSpec(points=3), CONVNET, nets[0], {}, step, *data)
    with pytest.raises(ValueError, match="but t runs from -1 to 1 in them and from -2 to 2 here"):
        profile(ProfileSpec(points=3, reach=2), CONVNET, nets[0], {}, step, *data, known=line)
    with pytest.raises(ValueError, match="must not have more directions than are asked for, got 2 and 1"):
        profile(ProfileSpec(points=3), CONVNET, nets[0], {}, step, *data,
                known=Profile(line.t, line.errors.repeat(2, 1), line.losses.repeat(2, 1)))
    rounded = dataclasses.replace(found, x=found.x * (1 + 1e-13), coordinates=found.coordinates * (1 + 1e-13))
    assert same(grid(spec, CONVNET, flat, {}, *data, known=rounded), found)  # other places: evaluated again
    assert isinstance(found, Grid)


# --- soft labels ----------------------------------------------------------------------------------------------------

def soft(labels, classes, seed=3):
    """Probabilities (N, K) whose largest is that of the label in most rows."""
    noise = torch.rand(len(labels), classes, generator=generator(seed)) + 2 * torch.nn.functional.one_hot(labels, classes)
    return noise / noise.sum(1, keepdim=True)


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_labels_of_one_class_give_what_hard_labels_give(model, precision):
    images, labels = examples(model, 23)
    _, buffers = network(model)
    training, _ = examples(model, 8, seed=9)
    spec, flat = PlaneSpec(resolution=2, images=11, precision=precision), plane(*several(model, 3))
    hard, certain = (grid(spec, model, flat, buffers, images, y, training)
                     for y in (labels, torch.nn.functional.one_hot(labels, model.classes).float()))
    assert torch.equal(hard.errors, certain.errors)
    torch.testing.assert_close(hard.losses, certain.losses, rtol=1e-12, atol=1e-12)


def test_soft_labels_in_closed_form():
    images, labels = examples(MLP, 20)
    shares = soft(labels, MLP.classes)
    logits, slope = torch.tensor([1.0, 0, 2, -1]), torch.tensor([3.0, 0, -4, 1])
    found = profile(ProfileSpec(points=5), MLP, constant(logits), {}, [{"classifier.bias": slope}], images, shares)
    for column, t in enumerate(found.t.tolist()):
        error, loss = known_values(logits.double() + t * slope.double(), shares)
        assert float(found.errors[0, column]) == pytest.approx(error, abs=1e-12)
        assert float(found.losses[0, column]) == pytest.approx(loss, abs=1e-6)


def test_soft_labels_refine_and_share_cores_with_the_same_bits():
    images, labels = examples(RESNET, 12)
    params, buffers = network(RESNET)
    spec = AroundSpec(resolution=3, statistics_images=4)
    surface = around(params, *random_directions(spec, RESNET, params, generator(1)))
    data = (images, soft(labels, RESNET.classes), images)
    coarse = grid(spec, RESNET, surface, buffers, *data)
    fine = grid(spec.replace(resolution=5), RESNET, surface, buffers, *data, known=coarse, threads=2)
    straight = grid(spec.replace(resolution=5), RESNET, surface, buffers, *data)
    assert same(fine, straight)
    assert len(set(straight.losses.flatten().tolist())) == 25


@pytest.mark.parametrize("labels, got", [
    (torch.full((6, 4), 0.5), r"\(6, 4\) torch.float32 with row sums from 2 to 2"),
    (torch.full((6, 3), 1 / 3), r"\(6, 3\) torch.float32"),
    (torch.full((6, 4), 1), r"\(6, 4\) torch.int64"),
    (torch.full((6, 4), float("nan")), "row sums from nan to nan"),
    (torch.full((6,), 0.5), r"\(6,\) torch.float32"),
])
def test_bad_labels_are_refused(labels, got):
    images, _ = examples(CONVNET, 6)
    with pytest.raises(ValueError, match=r"labels must be \(N,\) whole numbers or \(N, 4\) probabilities .*" + got):
        grid(PlaneSpec(resolution=2), CONVNET, plane(*several(CONVNET, 3)), {}, images, labels)


def test_places_come_in_the_order_of_rows():
    spec, surface = surfaces(CONVNET)["around"]
    data = examples(CONVNET, 5)
    found = grid(spec.replace(resolution=3), CONVNET, surface, {}, *data)
    for (i, y), (j, x) in itertools.product(enumerate(found.y.tolist()), enumerate(found.x.tolist())):
        alone = evaluate_many(CONVNET, 1, lambda _, x=x, y=y: (surface.point(x, y), {}), *data)[1]
        assert found.losses[i, j] == alone
