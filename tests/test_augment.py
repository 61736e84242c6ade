"""Augmentation by hand: amounts of zero, equal seeds, flips, shifts, turns, colours, holes and boxes."""

from __future__ import annotations

import math

import pytest
import torch

from dpkit.data import AugmentSpec, Mix, apply, apply_cutmix, augment, cutmix, draw, draw_cutmix
from dpkit.data.augment import OPERATIONS, Draw, _paste_at_once

ALL = "_".join(OPERATIONS)
NOTHING = {
    "flip": 0,
    "brightness": 0,
    "saturation": 0,
    "contrast": 0,
    "crop": 0,
    "scale": 1,
    "rotate": 0,
    "cutout": 0,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, side=16, seed=5, dtype=torch.float32):
    return torch.randn(count, 3, side, side, generator=generator(seed), dtype=dtype)


def still(count, **changes):
    """Rows that change nothing, but for the changes."""
    ones, zeros = torch.ones(count), torch.zeros(count)
    affine = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(count, 1, 1)
    return Draw(
        **{
            "brightness": zeros,
            "saturation": ones,
            "contrast": ones,
            "affine": affine,
            "hole": torch.zeros(count, 2),
        }
        | changes
    )


# --- all operations ---
@pytest.mark.parametrize("operations", [ALL, "", *OPERATIONS])
def test_amounts_of_zero_change_nothing(operations):
    x = pictures()
    found = augment(AugmentSpec(operations=operations, **NOTHING), x, generator())
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("operations", OPERATIONS)
def test_each_operation_does_something_and_leaves_its_input_alone(operations):
    x = pictures()
    before = x.clone()
    assert not torch.allclose(augment(AugmentSpec(operations=operations), x, generator()), x, atol=1e-3)
    assert torch.equal(x, before)


def test_equal_seeds_give_equal_batches():
    x, spec = pictures(), AugmentSpec(operations=ALL)
    assert torch.equal(augment(spec, x, generator(3)), augment(spec, x, generator(3)))
    assert not torch.equal(augment(spec, x, generator(3)), augment(spec, x, generator(4)))


def test_images_that_share_a_row_get_the_same_and_others_their_own():
    x, spec = pictures(4), AugmentSpec(operations=ALL)
    table = draw(spec, 2, generator(1))
    found = apply(spec, x, table.rows(torch.tensor([0, 0, 1, 1])))
    alone = [apply(spec, x[i : i + 1], table.rows(torch.tensor([row]))) for i, row in enumerate([0, 0, 1, 1])]
    torch.testing.assert_close(found, torch.cat(alone))
    assert not torch.allclose(apply(spec, x[:1], table.rows(torch.tensor([1]))), alone[0])


def test_the_operations_do_not_shift_one_another_s_random_numbers():
    one, other = draw(AugmentSpec(operations="color"), 5, generator()), draw(AugmentSpec(), 5, generator())
    assert torch.equal(one.brightness, other.brightness)
    assert torch.equal(one.hole, other.hole)


def test_pixels_can_be_differentiated_through_everything():
    spec = AugmentSpec(operations=ALL, cutout=0.3)
    rows = draw(spec, 2, generator(2))
    x = pictures(2, side=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply(spec, x, rows), (x,))


@pytest.mark.parametrize(
    "change, line",
    [
        ({"operations": "color_blur"}, "operations must be joined by _ from color, flip"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"scale": 0.5}, r"scale must lie in \[1, 10\], got 0.5"),
        ({"cutout": -0.1}, r"cutout must lie in \[0, 1\], got -0.1"),
        ({"brightness": -1}, r"brightness must lie in \[0, 360\], got -1"),
    ],
)
def test_wrong_amounts_are_refused(change, line):
    with pytest.raises(ValueError, match=line):
        AugmentSpec(**change)


# --- geometry ---
@pytest.mark.parametrize("operations", ["flip", "crop_flip"])
def test_a_certain_flip_mirrors_the_columns(operations):
    x = pictures()
    found = augment(AugmentSpec(operations=operations, flip=1, crop=0), x, generator())
    torch.testing.assert_close(found, x.flip(3), atol=1e-5, rtol=0)


def test_half_of_the_images_are_flipped():
    x = pictures(400, side=4)
    found = augment(AugmentSpec(operations="flip"), x, generator())
    mirrored = (found == x.flip(3)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], x[~mirrored])
    assert 160 < int(mirrored.sum()) < 240


def test_a_crop_is_a_shift_by_whole_pixels_with_zeros_outside():
    x, spec = pictures(60), AugmentSpec(operations="crop")
    rows = draw(spec, len(x), generator(1))
    shifts = torch.round(rows.affine[:, :, 2] * 16).long()
    found = apply(spec, x, rows)
    for image, (right, down), moved in zip(x, shifts.tolist(), found, strict=True):
        padded = torch.zeros(3, 32, 32)
        padded[:, 8:24, 8:24] = image
        expected = padded[:, 8 + down : 24 + down, 8 + right : 24 + right]
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    assert shifts.amin(0).tolist() == [-2, -2]  # an eighth of 16
    assert shifts.amax(0).tolist() == [2, 2]


def test_a_quarter_turn_turns():
    x = pictures()
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).repeat(len(x), 1, 1)
    found = apply(AugmentSpec(operations="rotate"), x, still(len(x), affine=quarter))
    torch.testing.assert_close(found, torch.rot90(x, 1, (2, 3)), atol=1e-5, rtol=0)


def test_one_geometric_operation_is_drawn_for_each_image_within_its_amount():
    affine = draw(AugmentSpec(), 300, generator()).affine
    mirror = torch.sign(affine[:, 0, 0])
    linear = affine[:, :, :2].clone()
    linear[:, 0, 0] *= mirror
    linear[:, 1, 0] *= mirror
    cropped = affine[:, :, 2].abs().amax(1) > 0
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    rotated = angle.abs() > 0
    scaled = (linear.diagonal(dim1=1, dim2=2) - 1).abs().amax(1).gt(1e-6) & ~rotated
    assert ((cropped.int() + rotated.int() + scaled.int()) == 1).all()
    assert all(70 < int(kind.sum()) < 130 for kind in (cropped, rotated, scaled))
    assert float(affine[:, :, 2].abs().max()) <= 0.125
    assert 14 < math.degrees(float(angle.abs().max())) <= 15.0001
    factors = linear[scaled].diagonal(dim1=1, dim2=2)
    assert 1 / 1.2 - 1e-6 <= float(factors.min()) < 0.85
    assert 1.15 < float(factors.max()) <= 1.2 + 1e-6
    torch.testing.assert_close(torch.linalg.det(linear[rotated]), torch.ones(int(rotated.sum())))


def test_a_scale_of_two_keeps_the_middle_half_of_the_samples():
    wide = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]).repeat(1, 1, 1)
    found = apply(AugmentSpec(operations="scale"), torch.ones(1, 3, 16, 16), still(1, affine=wide))
    assert torch.equal(found[0, 0, 4:12, 4:12], torch.ones(8, 8))  # the image, shrunk to the middle
    assert float(found.sum()) == 3 * 64


# --- colour and holes ---
def test_colours_by_hand():
    spec, x = AugmentSpec(operations="color"), pictures(2)
    bright = torch.tensor([0.3, -0.2])
    torch.testing.assert_close(apply(spec, x, still(2, brightness=bright)), x + bright.view(2, 1, 1, 1))
    grey = apply(spec, x, still(2, saturation=torch.zeros(2)))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))
    flat = apply(spec, x, still(2, contrast=torch.zeros(2)))
    torch.testing.assert_close(flat, x.mean((1, 2, 3), keepdim=True).expand_as(x))
    strong = apply(spec, x, still(2, contrast=torch.full((2,), 1.5)))
    torch.testing.assert_close(strong.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(strong.std((1, 2, 3)), 1.5 * x.std((1, 2, 3)))


def test_colours_stay_within_their_amounts():
    rows = draw(AugmentSpec(operations="color", brightness=1, saturation=2, contrast=0.5), 500, generator())
    for values, low, high in (
        (rows.brightness, -0.5, 0.5),
        (rows.saturation, 0, 2),
        (rows.contrast, 0.5, 1.5),
    ):
        width = high - low
        assert low <= float(values.min()) < low + 0.02 * width
        assert high - 0.02 * width < float(values.max()) <= high


@pytest.mark.parametrize(
    "share, side, hole, rows, columns",
    [
        (0.5, 16, (0.5, 0.5), range(4, 12), range(4, 12)),
        (0.5, 16, (0.0, 0.5), range(4), range(4, 12)),
        (0.5, 16, (0.999, 0.0), range(12, 16), range(4)),
        (0.2, 16, (0.5, 0.999), range(7, 10), range(14, 16)),
        (1.0, 8, (0.5, 0.5), range(8), range(8)),
    ],
)
def test_a_hole_is_where_it_should_be(share, side, hole, rows, columns):
    x = torch.ones(1, 3, side, side)
    found = apply(AugmentSpec(operations="cutout", cutout=share), x, still(1, hole=torch.tensor([hole])))
    expected = x.clone()
    expected[:, :, rows.start : rows.stop, columns.start : columns.stop] = 0
    assert torch.equal(found, expected)


# --- CutMix ---
def mixed(seed, count=8, side=16, **options):
    """Constant images 0 .. count - 1 with one-hot targets, mixed."""
    x = torch.arange(count).float().view(-1, 1, 1, 1).expand(count, 3, side, side)
    return cutmix(x, torch.eye(count), generator(seed), **{"probability": 1.0} | options)


def test_targets_are_mixed_by_the_area_that_is_covered():
    shares = set()
    for seed in range(40):
        images, targets = mixed(seed)
        boxes = []
        for i, image in enumerate(images):
            foreign = image[0] != i
            partner = int(image[0][foreign][0]) if foreign.any() else i
            share = float(foreign.float().mean())
            expected = torch.zeros(8)
            expected[i] += 1 - share
            expected[partner] += share
            torch.testing.assert_close(targets[i], expected)
            if partner != i:
                assert torch.equal(image[0][foreign], torch.full((int(foreign.sum()),), float(partner)))
                rows, columns = foreign.any(1).nonzero().flatten(), foreign.any(0).nonzero().flatten()
                area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
                assert int(area) == int(foreign.sum())  # one rectangle
                boxes.append((int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])))
                shares.add(share)
        assert len(set(boxes)) <= 1  # the same for the whole batch
    assert len(shares) > 20
    assert min(shares) < 0.1 < 0.6 < max(shares)


def test_the_box_covers_the_drawn_share_of_the_area():
    # a large beta draws one half; a box of half the area has side 16 / sqrt(2), cut to whole pixels
    covered = [1 - float(targets.max(1).values.min()) for _, targets in (mixed(s, beta=1e5, count=9) for s in range(60))]
    assert max(covered) == pytest.approx(11 * 11 / 16**2)
    assert min(covered) < 0.35  # where the image's edge cuts it


def test_targets_stay_probabilities_and_inputs_stay_as_they_were():
    x, targets = pictures(8), torch.eye(8)
    before = x.clone()
    images, found = cutmix(x, targets, generator(1), probability=1.0)
    assert not torch.equal(images, x)
    torch.testing.assert_close(found.sum(1), torch.ones(8))
    assert torch.equal(x, before)
    assert torch.equal(targets, torch.eye(8))


@pytest.mark.parametrize("options", [{"probability": 0.0}, {"beta": 0.0}])
def test_no_mixing(options):
    images, targets = mixed(0, **options)
    assert torch.equal(targets, torch.eye(8))
    assert torch.equal(images[:, 0, 0, 0], torch.arange(8).float())


def test_half_of_the_batches_are_mixed():
    count = sum(not torch.equal(mixed(seed, side=8, probability=0.5)[1], torch.eye(8)) for seed in range(200))
    assert 70 < count < 125


def test_equal_seeds_mix_equally():
    assert all(torch.equal(a, b) for a, b in zip(mixed(7), mixed(7), strict=True))


def test_mixes_of_many_batches_are_pasted_alike_in_both_ways():
    sizes = (5, 4, 6, 1)
    x, targets = torch.randn(16, 3, 8, 12), torch.softmax(torch.randn(16, 4), 1)
    parts = [draw_cutmix(n, (8, 12), generator(n), probability=p) for n, p in zip(sizes, (1, 0, 1, 1), strict=True)]
    images, mixed = apply_cutmix(x, targets, Mix.join(parts))
    alone = [apply_cutmix(a, b, part) for a, b, part in zip(x.split(sizes), targets.split(sizes), parts, strict=True)]
    assert torch.equal(images, torch.cat([a for a, _ in alone]))
    assert torch.equal(mixed, torch.cat([b for _, b in alone]))
    assert torch.equal(images[5:9], x[5:9])
    assert not torch.equal(images, x)
    joined = Mix.join(parts)
    edges = torch.tensor([box[1:] for box in joined.boxes]).T.repeat_interleave(torch.tensor(sizes), 1)
    assert torch.equal(_paste_at_once(x, joined.order, joined, edges), images), "the form for a GPU"


def test_one_operation_alone_is_applied_to_each_row():
    spec = AugmentSpec(single=True, operations="color_crop_cutout_flip_scale_rotate")
    count = 6000
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1, -1)
    rows = draw(spec, count, torch.Generator().manual_seed(1))
    plain = draw(spec.replace(operations=""), count, torch.Generator().manual_seed(1))
    colour = rows.brightness != 0
    geometric = (rows.affine != plain.affine).flatten(1).any(1)
    hole = rows.hole[:, 0] >= 0
    assert not (colour & geometric).any()
    assert not (colour & hole).any()
    assert not (geometric & hole).any()
    for found in (colour, hole):
        assert abs(float(found.float().mean()) - 1 / 6) < 0.02  # each with the same chance
    untouched = (apply(spec, x, rows) == x).flatten(1).all(1)
    assert abs(float((untouched & ~colour & ~geometric & ~hole).float().mean()) - 1 / 12) < 0.02  # flips that did not happen
    assert "single" not in AugmentSpec().to_dict()
