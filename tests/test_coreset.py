"""Small sets that are chosen, and how stored images decode into training images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import MEAN, MODEL, STD, coloured

from dpkit import distill, models, tree
from dpkit.data import Split, normalise
from dpkit.distill import coreset as c
from dpkit.distill import decode, decode_images, mosaic
from dpkit.distill.interface import Task
from dpkit.models import ModelSpec

REAL = Split(torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1) * 10, torch.arange(24) % 3)


# --- decoding ---
@pytest.mark.parametrize("factor, side", [(1, 8), (2, 8), (2, 9), (3, 8), (3, 9), (4, 6)])
def test_shapes_and_budget(factor, side):
    split = Split(torch.rand(6, 3, side, side), torch.arange(6) // 2)
    found = decode(split, factor)
    assert found.images.shape == (6 * factor**2, 3, side, side)
    assert found.labels.tolist() == [label for label in [0, 0, 1, 1, 2, 2] for _ in range(factor**2)]
    assert float(found.images.min()) >= 0
    assert float(found.images.max()) <= 1
    packed = mosaic(found.images, factor)
    assert packed.shape == split.images.shape


def test_factor_one_is_the_identity():
    images = torch.rand(2, 3, 7, 7)
    assert torch.equal(decode_images(images, 1), images)
    assert torch.equal(mosaic(images, 1), images)


@pytest.mark.parametrize("factor, side", [(2, 8), (3, 9), (4, 8)])
def test_packing_and_decoding_keep_constant_images_in_order(factor, side):
    levels = torch.linspace(0, 1, 2 * factor**2)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, side, side)
    packed = mosaic(images, factor)
    assert packed.shape == (2, 3, side, side)
    torch.testing.assert_close(packed[0, 0, 0, :: side // factor], levels[:factor])  # the first row of tiles
    torch.testing.assert_close(decode_images(packed, factor), images)


def test_tiles_by_hand():
    image = torch.tensor(
        [[0.0, 1.0, 5.0, 5.0], [0.0, 1.0, 5.0, 5.0], [7.0, 7.0, 2.0, 2.0], [7.0, 7.0, 4.0, 4.0]]
    )
    found = decode_images(image.view(1, 1, 4, 4), 2)[:, 0]
    ramp = torch.tensor([0.0, 0.25, 0.75, 1.0])  # bilinear, pixel centres
    torch.testing.assert_close(found[0], ramp.expand(4, 4))
    torch.testing.assert_close(found[1], torch.full((4, 4), 5.0))
    torch.testing.assert_close(found[2], torch.full((4, 4), 7.0))
    torch.testing.assert_close(found[3], (2 + 2 * ramp).view(4, 1).expand(4, 4))


def test_an_odd_side_is_filled_with_mid_grey():
    found = decode_images(torch.ones(1, 1, 5, 5), 2)
    assert torch.equal(found[0], torch.ones(1, 5, 5))
    torch.testing.assert_close(found[1, 0, :, -1], torch.full((5,), 0.5))


def test_each_stored_pixel_counts():
    images = torch.rand(1, 1, 5, 5).requires_grad_()
    gradient = torch.autograd.grad(decode_images(images, 2).sum(), images)[0]
    assert float(gradient.min()) > 0


def test_a_factor_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="factor must be at most the image's side, 8; got 9"):
        distill.check_factor(9, 8)
    with pytest.raises(ValueError, match="at most the image's side, 2; got 3"):
        decode_images(torch.zeros(1, 1, 2, 4), 3)


# --- chosen sets ---
CHOICES = {"random": (c.RandomSpec, c.random), "herding": (c.HerdingSpec, c.herding), "k_center": (c.KCenterSpec, c.k_center),
           "el2n": (c.EL2NSpec, c.el2n)}
GREY = ModelSpec(width=4, image_size=8, channels=1, classes=3)
ALL = pytest.mark.parametrize("name", CHOICES)


def network(seed):
    return models.init(MODEL, tree.generator_for(seed, "init"))


def task(real=REAL, model=GREY, seed=1, **changes):
    return Task(real=real, mean=MEAN[: model.channels], std=STD[: model.channels], model=model, seed=seed, **changes)


def small(**changes):
    """A task on coloured images with two trajectories of two networks."""
    networks = [(network(0), network(1)), (network(2), network(3))]
    return task(coloured(), MODEL, **{"networks": networks} | changes)


def positions(made, real):
    """Where the chosen images are among the real ones."""
    return [int((real.images.float() / 255 == image).flatten(1).all(1).nonzero()[0]) for image in made.split.images]


@ALL
def test_chosen_sets_are_balanced_real_images_without_repetition(name):
    spec, choose = CHOICES[name]
    made, real = choose(spec(ipc=4), small()), coloured()
    found = positions(made, real)
    assert made.split.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert real.labels[found].tolist() == made.split.labels.tolist()
    assert len(set(found)) == 12
    assert made.split.images.dtype == torch.float32
    again = choose(spec(ipc=4), small())
    assert torch.equal(again.split.images, made.split.images)


@ALL
def test_all_images_of_a_class_can_be_asked_for(name):
    spec, choose = CHOICES[name]
    found = positions(choose(spec(ipc=6), small()), coloured())
    assert len(set(found)) == 18
    assert spec(ipc=6).to_dict() == {"method": name, "ipc": 6}
    assert spec().held(10) == 0


@ALL
def test_chosen_sets_refuse_what_cannot_be(name):
    spec, choose = CHOICES[name]
    with pytest.raises(ValueError, match=r"^ipc must be at most the images of a class; class 2 has 6, got 7$"):
        choose(spec(ipc=7), small())
    with pytest.raises(ValueError, match=r"^ipc must be >= 1, got 0$"):
        spec(ipc=0)
    if name != "random":
        with pytest.raises(ValueError, match=f"^{name} needs networks trained on real data, got none"):
            choose(spec(ipc=1), small(networks=()))


def test_random_sets_follow_from_the_seed_as_they_always_did():
    made = c.random(c.RandomSpec(ipc=5), task(seed=3))
    source = tree.generator_for(3, "random")
    expected = torch.cat([torch.arange(k, 24, 3)[torch.randperm(8, generator=source)[:5]] for k in range(3)])
    assert torch.equal(made.split.images, REAL.images[expected].float() / 255)
    assert not torch.equal(c.random(c.RandomSpec(ipc=5), task(seed=4)).split.images, made.split.images)


def test_images_that_are_numbers_already_stay_as_they_are():
    real = Split(torch.rand(3, 1, 8, 8), torch.arange(3))
    assert torch.equal(c.random(c.RandomSpec(ipc=1), task(real)).split.images, real.images)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_herding_by_hand():
    # three directions; the one between is nearest to the mean, then a tie that the first one wins
    assert c.herd(F.normalize(rows([5, 0], [0, 0.1], [2, 2]), dim=1), 3).tolist() == [2, 0, 1]


def greedy(unit, count):
    """Herding by trying every image."""
    mean, picks = sum(unit) / len(unit), []
    while len(picks) < count:
        free = [i for i in range(len(unit)) if i not in picks]
        picks.append(
            min(
                free,
                key=lambda i: float((sum(unit[p] for p in [*picks, i]) / (len(picks) + 1) - mean).norm()),
            )
        )
    return picks


def test_herding_equals_trying_every_image():
    features = torch.randn(24, 4, generator=torch.Generator().manual_seed(3)).double()
    assert c.herd(features, 9).tolist() == greedy(list(features), 9)


def test_k_center_by_hand():
    # on a line: 5 is nearest to the mean (5.75), 12 is the farthest, then 0, then 9, which is 3 from 12
    assert c.farthest_first(rows([0], [5], [4], [12], [9], [4.5]), 4).tolist() == [1, 3, 0, 4]


def test_k_center_chooses_equal_images_rather_than_one_twice():
    assert c.farthest_first(rows([1], [1], [1]), 3).tolist() == [0, 1, 2]


def test_features_come_from_the_last_network_of_the_first_trajectory():
    real, expected = coloured(), []
    x = normalise(real.images, MEAN, STD)
    features = F.normalize(models.features(MODEL, *network(1), x).double(), dim=1)
    for place in small().places(3):
        expected += place[torch.tensor(greedy(list(features[place]), 3))].tolist()
    assert positions(c.herding(c.HerdingSpec(ipc=3), small()), real) == expected
    first = small(networks=[(network(0), network(1))])
    assert positions(c.k_center(c.KCenterSpec(ipc=3), first), real) == positions(c.k_center(c.KCenterSpec(ipc=3), small()), real)
    other = small(networks=[(network(0), network(9))])
    assert positions(c.herding(c.HerdingSpec(ipc=3), other), real) != expected


def test_el2n_scores_are_means_over_the_first_networks():
    real, x = coloured(), normalise(coloured().images, MEAN, STD)
    scores = torch.zeros(20, dtype=torch.float64)
    for seed in (0, 2):
        p = models.forward(MODEL, *network(seed), x)[0].double().softmax(1)
        scores += ((p - F.one_hot(real.labels, 3)) ** 2).sum(1).sqrt() / 2
    expected = [sorted(range(k, 20, 3), key=lambda i: float(scores[i]))[:2] for k in range(3)]
    assert positions(c.el2n(c.EL2NSpec(ipc=2), small()), real) == [i for own in expected for i in own]


def test_el2n_ties_go_to_the_first(monkeypatch):
    monkeypatch.setattr(c, "el2n_scores", lambda task, params, buffers: torch.ones(20))
    assert positions(c.el2n(c.EL2NSpec(ipc=2), small()), coloured()) == [0, 3, 1, 4, 2, 5]
