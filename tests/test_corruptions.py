"""Corruptions against their formulas, other libraries' routines and values worked out by hand."""
from __future__ import annotations

import colorsys
import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dpkit.data import corruptions
from dpkit.data.corruptions import CONSTANTS, NAMES, SEVERITIES, STANDARD, corrupt

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(count=16, size=32, channels=3, seed=1):
    """Images with edges, gradients and colours: a bright bar on a slanting ground with some texture."""
    source = generator(seed)
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    slope, shift = torch.rand(2, count, channels, 1, 1, generator=source)
    ground = 0.2 + 0.3 * (slope * x + (1 - slope) * y) + 0.1 * torch.sin(12 * x + 6 * shift)
    bar = ((x - 0.3 - 0.4 * shift).abs() < 0.12) & ((y - 0.5).abs() < 0.35)
    pixels = torch.where(bar, 0.3 + 0.6 * slope, ground) + 0.02 * torch.randn(count, channels, size, size, generator=source)
    return (255 * pixels.clamp(0, 1)).byte()


def damage(name, severity, images):
    """Mean squared error in levels of 255."""
    changed = corrupt(images, name, severity, generator(severity))
    return float(((changed.float() - images.float()) ** 2).mean())


def hand(name, severity, images, seed=0):
    """The result before it is made bytes, from the function behind a corruption, at the published size."""
    return corruptions._FUNCTIONS[name](images.float() / 255, CONSTANTS[name][severity - 1], 1.0, generator(seed))


# --- all of them ------------------------------------------------------------------------------------------------------

def test_there_are_the_published_ones_but_frost():
    assert len(NAMES) == 18
    assert len(STANDARD) == 14
    assert set(NAMES) - set(STANDARD) == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}
    assert "frost" not in NAMES
    assert set(corruptions._FUNCTIONS) == set(NAMES)
    assert all(len(constants) == 5 for constants in CONSTANTS.values())


@pytest.mark.parametrize("name", NAMES)
def test_shapes_types_and_the_generator_alone_decides(name):
    for size, channels in itertools.product((8, 28, 32), (1, 3)):
        images = photographs(3, size, channels)
        before = images.clone()
        for severity in (1, 5):
            once = corrupt(images, name, severity, generator(3))
            assert once.shape == images.shape
            assert once.dtype == torch.uint8
            assert torch.equal(once, corrupt(images, name, severity, generator(3)))
        assert torch.equal(images, before)
    assert corrupt(images[:0], name, 1, generator()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "glass_blur",
                                  "snow", "fog", "spatter", "elastic_transform"])
def test_random_ones_follow_the_seed(name):
    images = photographs(4)
    assert not torch.equal(corrupt(images, name, 3, generator(0)), corrupt(images, name, 3, generator(1)))


@pytest.mark.parametrize("name", ["defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
                                  "gaussian_blur", "saturate"])
def test_the_others_draw_nothing(name):
    source = generator(0)
    state = source.get_state()
    corrupt(photographs(2), name, 3, source)
    assert torch.equal(source.get_state(), state)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("glass_blur", "motion_blur", "elastic_transform", "saturate",
                                                                "spatter")])
def test_damage_grows_with_severity(name):
    errors = [damage(name, severity, photographs()) for severity in SEVERITIES]
    assert errors[0] > 0
    assert all(a < b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("name, order", [
    ("glass_blur", (1, 4)), ("motion_blur", (1, 2, 3, 5)), ("spatter", (1, 2, 3)), ("saturate", (1, 2)), ("saturate", (3, 4, 5)),
    ("elastic_transform", (5, 4, 3, 2, 1))])
def test_damage_of_those_whose_published_constants_do_not_rise(name, order):
    """Their severities change several things at once; by squared error some mild ones damage more."""
    errors = [damage(name, severity, photographs(64)) for severity in order]
    assert errors[0] > 0
    assert all(a < b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("name", ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform",
                                  "pixelate", "contrast", "jpeg_compression"])
def test_an_image_of_one_colour_stays_as_it_is(name):
    images = torch.tensor([0, 77, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32).contiguous()
    for severity in SEVERITIES:
        changed = corrupt(images, name, severity, generator()).int()
        assert int((changed - images.int()).abs().max()) <= (1 if name == "jpeg_compression" else 0)


def test_lengths_grow_with_a_large_image_and_shapes_stay():
    """Twice the size, blurred, is the blurred image at twice the size; nothing grows below 32 pixels."""
    small = photographs(4)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for name in ("gaussian_blur", "motion_blur", "zoom_blur"):
        a, b = (corrupt(images, name, 5, generator()).float() for images in (small, large))
        back = torch.nn.functional.avg_pool2d(b, 2)
        assert float((a - back).square().mean()) < 0.1 * float((a - small.float()).square().mean())
    y, x = torch.meshgrid(*[torch.linspace(0, 1, 16)] * 2, indexing="ij")
    tiny = (255 * (x + y) / 2).byte().expand(1, 3, 16, 16).contiguous()
    expected = ndimage.gaussian_filter(tiny[0, 0].numpy() / 255, 1.0, mode="nearest") * 255
    assert np.abs(corrupt(tiny, "gaussian_blur", 5, generator())[0, 0].numpy() - expected).max() <= 1.0


# --- refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("images, name, severity, message", [
    (photographs(1), "frost", 1, "corruption must be one of gaussian_noise, .* got 'frost'"),
    (photographs(1), "fog", 0, r"severity must be a whole number in \[1, 5\], got 0"),
    (photographs(1), "fog", 2.5, r"severity must be a whole number in \[1, 5\], got 2.5"),
    (photographs(1).float(), "fog", 1, r"\(N, 1 or 3, S, S\) uint8 .* got \(1, 3, 32, 32\) float32"),
    (photographs(1)[0], "fog", 1, r"got \(3, 32, 32\) uint8"),
    (photographs(1)[..., :-1], "fog", 1, r"got \(1, 3, 32, 31\)"),
    (photographs(1)[:, :2], "fog", 1, r"got \(1, 2, 32, 32\)"),
    (photographs(1, 7), "fog", 1, "S at least 8"),
])
def test_what_cannot_be_corrupted_is_refused_in_one_line(images, name, severity, message):
    with pytest.raises(ValueError, match=message) as caught:
        corrupt(images, name, severity, generator())
    assert len(str(caught.value).splitlines()) == 1


# --- formulas ---------------------------------------------------------------------------------------------------------

def flat(value, count=40, channels=3):
    """Images of one value in [0, 1]."""
    return torch.full((count, channels, 32, 32), round(255 * value)).byte()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_published_deviation(severity):
    value = 102 / 255  # far from both ends
    expected = {"gaussian_noise": CONSTANTS["gaussian_noise"][severity - 1],
                "speckle_noise": value * CONSTANTS["speckle_noise"][severity - 1],
                # a Poisson count of mean c x has the variance c x
                "shot_noise": math.sqrt(value / CONSTANTS["shot_noise"][severity - 1])}
    for name, deviation in expected.items():
        noise = hand(name, severity, flat(value)) - value
        assert float(noise.mean()) == pytest.approx(0, abs=4 * deviation / math.sqrt(noise.numel()))
        assert float(noise.std()) == pytest.approx(deviation, rel=0.02)


def test_shot_noise_counts_whole_photons():
    counts = hand("shot_noise", 5, flat(0.4)) * 50
    torch.testing.assert_close(counts, counts.round())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_a_share_of_the_values_half_of_it_white(severity):
    share, changed = CONSTANTS["impulse_noise"][severity - 1], corrupt(flat(0.4), "impulse_noise", severity, generator())
    assert set(changed.unique().tolist()) == {0, 102, 255}
    for value in (0, 255):
        tolerance = 4 * math.sqrt(share / 2 / changed.numel())
        assert float((changed == value).float().mean()) == pytest.approx(share / 2, abs=tolerance)
    hit = changed != 102
    assert 0 < int((hit[:, 0] & hit[:, 1]).sum()) < int(hit[:, 0].sum())  # each channel on its own


def test_contrast_by_hand():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[:, :, :4] = 200  # mean 100
    assert corrupt(image, "contrast", 2, generator())[0, 0, [0, 7], 0].tolist() == [150, 50]
    assert corrupt(image, "contrast", 5, generator())[0, 0, [0, 7], 0].tolist() == [115, 85]


def by_colorsys(image, change):
    """``change`` of (hue, saturation, value) applied to each pixel with the standard library's conversions."""
    pixels = (colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist()) for y in range(8) for x in range(8))
    return torch.tensor([colorsys.hsv_to_rgb(*change(*pixel)) for pixel in pixels]).T.view(3, 8, 8)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_colours_change_as_in_hsv(severity):
    image = torch.randint(0, 256, (1, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    image[0, :, 0, :4] = torch.tensor([[0, 255, 90, 255], [0, 255, 90, 0], [0, 255, 90, 0]])  # black, white, grey, red
    added = CONSTANTS["brightness"][severity - 1]
    torch.testing.assert_close(hand("brightness", severity, image)[0],
                               by_colorsys(image[0], lambda h, s, v: (h, s, min(1, v + added))))
    factor, shift = CONSTANTS["saturate"][severity - 1]
    torch.testing.assert_close(hand("saturate", severity, image)[0],
                               by_colorsys(image[0], lambda h, s, v: (h, min(1, s * factor + shift), v)))


def test_colour_on_grey_images():
    grey = photographs(2, channels=1)
    for severity, change in ((1, 0.0), (3, 0.0), (4, 0.1), (5, 0.2)):
        # grey turns to (v, v (1 - s), v (1 - s)), whose luminance is v (1 - 0.701 s)
        torch.testing.assert_close(hand("saturate", severity, grey), grey.float() / 255 * (1 - 0.701 * change))
    white = torch.full((20, 1, 32, 32), 255, dtype=torch.uint8)
    brown = (0.299 * 63 + 0.587 * 42 + 0.114 * 20) / 255
    assert float(hand("spatter", 5, white).min()) == pytest.approx(brown, abs=0.02)


def test_fog_keeps_the_brightest_value_and_lifts_the_darkest():
    images = photographs(30)
    top = images.float().amax((1, 2, 3)) / 255
    for severity, (amount, _) in zip(SEVERITIES, CONSTANTS["fog"], strict=True):
        fogged, x = hand("fog", severity, images), images.float() / 255
        assert bool((fogged.amax((1, 2, 3)) <= top + 1e-6).all())
        clouds = fogged * (top + amount).view(-1, 1, 1, 1) / top.view(-1, 1, 1, 1) - x
        # one map for all channels, from 0 to its amount
        torch.testing.assert_close(clouds, clouds[:, :1].expand_as(clouds), atol=1e-5, rtol=0)
        torch.testing.assert_close(clouds[:, 0].amax((1, 2)), torch.full((30,), float(amount)), atol=1e-5, rtol=0)
        torch.testing.assert_close(clouds[:, 0].amin((1, 2)), torch.zeros(30), atol=1e-5, rtol=0)


def test_snow_pales_and_falls_downwards():
    images = photographs(100)
    for severity, (*_, share) in zip(SEVERITIES, CONSTANTS["snow"], strict=True):
        x = images.float() / 255
        grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        flakes = hand("snow", severity, images) - (share * x + (1 - share) * torch.maximum(x, 1.5 * grey + 0.5))
        assert float(flakes.min()) > -1e-6
        torch.testing.assert_close(flakes, flakes.rot90(2, (2, 3)), atol=1e-5, rtol=0)
        across, along = flakes.diff(dim=3).square().mean(), flakes.diff(dim=2).square().mean()
        assert along < across  # smeared in angles about the vertical


def test_glass_takes_each_pixel_from_itself_or_from_above_and_left():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    changed = corrupt(image, "glass_blur", 1, generator())  # a deviation of .05 blurs nothing
    moved = (image.int() - changed.int())[0, 0]
    assert set(moved.unique().tolist()) == {0, 1, 16, 17}
    assert not moved[:2].any()
    assert not moved[:, :2].any()
    counts = [int((moved[2:, 2:] == step).sum()) for step in (0, 1, 16, 17)]
    assert min(counts) > 196 / 4 - 4 * math.sqrt(196 * 3 / 16)


def test_drops_and_mud_have_their_colours():
    black = torch.zeros(60, 3, 32, 32, dtype=torch.uint8)
    for severity in (1, 2, 3):
        water = hand("spatter", severity, black)
        torch.testing.assert_close(water[:, 0] * 238, water[:, 1] * 175)
        torch.testing.assert_close(water[:, 1], water[:, 2])
        highest = water[:, 2].amax((1, 2))
        wet = highest > 0  # some images are hit by nothing
        assert int(wet.sum()) > 30
        torch.testing.assert_close(highest[wet], torch.full((int(wet.sum()),), 0.5 * 238 / 255))
    white = black + 255
    for severity in (4, 5):
        mud = hand("spatter", severity, white)
        cover = (1 - mud[:, :1]) / (1 - 63 / 255)
        assert float(cover[cover > 1e-6].min()) >= 0.8 - 1e-6
        assert float(cover.max()) == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(mud, 1 - cover * (1 - torch.tensor([63, 42, 20]).view(1, 3, 1, 1) / 255))


@pytest.mark.parametrize("severity", [1, 3, 4, 5])  # the second one's noise is so wide that all of it feels the border
def test_elastic_corners_move_as_far_as_published(severity):
    size, (amount, sigma, shift) = 32, CONSTANTS["elastic_transform"][severity - 1]
    columns = torch.linspace(0, 1, size).expand(1000, 1, size, size)
    moved = (size - 1) * (corruptions._elastic_transform(columns, (amount, sigma, shift), 1.0, generator()) - columns)
    reach = int(3 * sigma * size + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (sigma * size + 1e-9)) ** 2)
    weights /= weights.sum()
    # a corner by up to +- shift of the side, and its noise, smoothed along both axes
    variance = ((shift * size) ** 2 + (amount * size * (weights**2).sum()) ** 2) / 3
    corner = moved[:, 0, 6, 6]  # a third of the side from the centre
    assert float(corner.std()) == pytest.approx(math.sqrt(variance), rel=0.1)
    assert float(corner.mean()) == pytest.approx(0, abs=4 * math.sqrt(variance / 1000))


# --- against other libraries ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [8, 28, 32, 33])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixels_are_pillows(size, severity):
    images, small = photographs(4, size), int(size * CONSTANTS["pixelate"][severity - 1])
    changed = corrupt(images, "pixelate", severity, generator())
    for image, found in zip(images, changed, strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((small, small), Image.Resampling.BOX)
        theirs = theirs.resize((size, size), Image.Resampling.BOX)
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(theirs))


def test_jpeg_is_pillows():
    images = photographs(3)
    for severity, quality in zip(SEVERITIES, (80, 65, 58, 50, 40), strict=True):
        changed = corrupt(images, "jpeg_compression", severity, generator())
        for image, found in zip(images, changed, strict=True):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
            np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
