"""Small sets that are chosen, and how stored images decode into training images."""

from __future__ import annotations

import pytest
import torch

from dpkit import distill
from dpkit.data import Split
from dpkit.distill import Distilled, decode, decode_images, mosaic
from dpkit.training import TrainSpec

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


def test_the_recipe_travels_with_the_set():
    small = Distilled(
        Split(torch.rand(4, 3, 8, 8), torch.arange(4)), 2, torch.zeros(3), torch.ones(3), TrainSpec()
    )
    assert len(small.decoded()) == 16


# --- chosen sets ---
def test_random_sets_are_balanced_and_without_replacement():
    found = distill.random(REAL, 3, 5, torch.Generator().manual_seed(1))
    assert found.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    values = torch.round(found.images.flatten() * 25.5).long()
    assert len(set(values.tolist())) == 15
    assert torch.equal(values % 3, found.labels)  # images keep their labels
    assert found.images.dtype == torch.float32
    again, other = (distill.random(REAL, 3, 5, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(again.images, found.images)
    assert not torch.equal(other.images, found.images)


def test_all_images_of_a_class_can_be_asked_for():
    found = distill.random(REAL, 3, 8, torch.Generator().manual_seed(1))
    assert sorted(found.images.flatten().tolist()) == pytest.approx([i * 10 / 255 for i in range(24)])


def test_herding_by_hand():
    # three directions; the one between is nearest to the mean, then a tie that the first one wins
    features = torch.tensor([[5.0, 0.0], [0.0, 0.1], [2.0, 2.0]])
    real = Split(torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1), torch.zeros(3).long())
    found = distill.herding(real, 1, 3, features)
    torch.testing.assert_close(found.images.flatten(), torch.tensor([0.3, 0.1, 0.2]))


def greedy(features, count):
    """Herding by trying every image."""
    unit = [f / f.norm() for f in features.double()]
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
    features = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    found = distill.herding(REAL, 3, 5, features)
    expected = [c + 3 * i for c in range(3) for i in greedy(features[c::3], 5)]
    assert torch.round(found.images.flatten() * 25.5).long().tolist() == expected


def test_chosen_sets_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="ipc must be at most the images of a class; class 0 has 8, got 9"):
        distill.random(REAL, 3, 9, torch.Generator())
    with pytest.raises(ValueError, match="class 3 has 0, got 1"):
        distill.herding(REAL, 4, 1, torch.ones(24, 2))
    with pytest.raises(ValueError, match="features must be one row per image, 24; got 23"):
        distill.herding(REAL, 3, 1, torch.ones(23, 2))
