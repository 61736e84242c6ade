"""Filters against scipy's and against values worked out by hand."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from dpkit.data import filters

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- blurs, zooms, sampling -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 2.3])
@pytest.mark.parametrize("border, theirs, truncate", [("nearest", "nearest", 4.0), ("symmetric", "reflect", 3.0),
                                                      ("mirror", "mirror", 4.0)])
def test_gaussian_blur_is_scipys(sigma, border, theirs, truncate):
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=generator())
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode=theirs, truncate=truncate)
    np.testing.assert_allclose(filters.gaussian(x, sigma, border, truncate).numpy(), expected, atol=1e-12)


def test_correlation_is_scipys_with_mirrored_borders():
    x, kernel = torch.rand(1, 1, 9, 9, generator=generator()), torch.rand(5, 5, generator=generator(1))
    expected = ndimage.correlate(x[0, 0].numpy(), kernel.numpy(), mode="mirror")
    np.testing.assert_allclose(filters.filtered(x, kernel)[0, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.05, 1.25, 1.75, 2.25])
def test_zoom_is_scipys(factor):
    x = torch.rand(1, 1, 32, 32, generator=generator())
    part = math.ceil(32 / factor)
    start = (32 - part) // 2
    big = ndimage.zoom(x[0, 0, start:start + part, start:start + part].numpy(), factor, order=1)
    start = (len(big) - 32) // 2
    np.testing.assert_allclose(filters.zoomed(x, factor)[0, 0].numpy(), big[start:start + 32, start:start + 32], atol=1e-5)


@pytest.mark.parametrize("border, theirs", [("mirror", "mirror"), ("symmetric", "reflect")])
def test_sampling_is_scipys(border, theirs):
    x = torch.rand(1, 1, 10, 10, generator=generator())
    places = 16 * torch.rand(2, 1, 10, 10, dtype=torch.float64, generator=generator(1)) - 3
    expected = ndimage.map_coordinates(x[0, 0].numpy(), places[:, 0].numpy(), order=1, mode=theirs)
    np.testing.assert_allclose(filters.sampled(x, places[0], places[1], border)[0, 0].numpy(), expected, atol=1e-5)


def test_kernels_of_a_lens_by_hand():
    tail = math.exp(-0.5 / 0.4**2)
    side, middle = tail / (1 + 2 * tail), 1 / (1 + 2 * tail)
    soft = filters.disk(0.3, 0.4, 1)  # a disk of one pixel: the softening alone
    expected = [side * side, side * middle, side * side, side * middle, middle * middle, side * middle, side * side,
                side * middle, side * side]
    assert soft[soft > 0].tolist() == pytest.approx(expected)
    cross = filters.disk(1, 0.02, 1)  # and one without softening: five pixels
    assert cross[cross > 1e-9].tolist() == pytest.approx([0.2] * 5)
    assert int((filters.disk(1.5, 0.02, 1) > 1e-9).sum()) == 9
    assert int((filters.disk(3, 0.02, 1) > 1e-9).sum()) == 29  # places of whole numbers in a circle of radius 3
    assert float(filters.disk(2.2, 0.7, 2).sum()) == pytest.approx(1)


@pytest.mark.parametrize("degrees, down, right", [(0, 0, 1), (90, 1, 0), (-90, -1, 0), (180, 0, -1)])
def test_motion_takes_its_values_from_ahead(degrees, down, right):
    x = torch.zeros(1, 1, 21, 21)
    x[..., 10, 10] = 1
    found = filters.motion(x, 2.5, 1.5, torch.tensor([float(degrees)]))[0, 0]
    weights = np.exp(-0.5 * (np.arange(7) / 1.5) ** 2)  # a radius of 2.5 has three pixels, twice, and one
    line = [float(found[10 - i * down, 10 - i * right]) for i in range(7)]
    assert line == pytest.approx(list(weights / weights.sum()), abs=1e-6)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_motion_in_any_direction_pixel_by_pixel():
    x, angles = torch.rand(3, 2, 9, 9, generator=generator()), torch.tensor([-45.0, 20.0, -100.0])
    weights = np.exp(-0.5 * (np.arange(9) / 2) ** 2)
    expected = np.zeros(x.shape)
    for n, angle in enumerate(np.deg2rad(angles.double().numpy())):
        for i, weight in enumerate(weights / weights.sum()):
            down, right = (math.ceil(i * part - 0.5) for part in (math.sin(angle), math.cos(angle)))
            for row in range(9):
                for column in range(9):
                    there = min(max(row + down, 0), 8), min(max(column + right, 0), 8)
                    expected[n, :, row, column] += weight * x[n, :, there[0], there[1]].numpy()
    np.testing.assert_allclose(filters.motion(x, 4, 2, angles).numpy(), expected, atol=2e-6)


# --- clouds -----------------------------------------------------------------------------------------------------------

def test_the_smallest_clouds_by_hand():
    """2 x 2: a corner of 0, the middle, and two sides with half of the middle; noise is 100^2 times uniform."""
    middle, right, below = (1e4 * (2 * torch.rand(1, 1, 1, generator=source) - 1).item() for source in [generator(4)] * 3)
    values = np.array([[0.0, middle / 2 + right], [middle / 2 + below, middle]])
    expected = (values - values.min()) / (values.max() - values.min())
    np.testing.assert_allclose(filters.plasma(1, 2, 2.0, generator(4))[0].numpy(), expected, atol=1e-6)


def test_clouds_are_smoother_the_faster_their_noise_decays():
    fields = [filters.plasma(200, 32, decay, generator()) for decay in (1.5, 2.0, 3.0)]
    steps = [float(field.diff(dim=1).abs().mean()) for field in fields]
    assert steps[0] > 1.5 * steps[1] > 1.5 * steps[2]
    for field, step in zip(fields, steps, strict=True):
        assert (field.amin((1, 2)).tolist(), field.amax((1, 2)).tolist()) == ([0.0] * 200, [1.0] * 200)
        # rows and columns alike, and the last row borders on the first
        assert float(field.diff(dim=2).abs().mean()) == pytest.approx(step, rel=0.05)
        assert float((field[:, 0] - field[:, -1]).abs().mean()) < 2 * step


# --- edges, distances, histograms -------------------------------------------------------------------------------------

def wall(heights):
    """A step upwards between columns 7 and 8 of as many levels as ``heights`` say, by row; (1, 16, 16)."""
    image = torch.zeros(1, 16, 16)
    image[0, :, 8:] = torch.as_tensor(heights, dtype=torch.float32)[:, None]
    return image


def test_an_edge_is_one_pixel_wide_and_weak_parts_need_a_strong_one():
    assert filters.edges(wall([200] * 16), 50, 150)[0].nonzero()[:, 1].tolist() == [7] * 16
    assert filters.edges(wall([200] * 16).transpose(1, 2), 50, 150)[0].nonzero()[:, 0].tolist() == [7] * 16
    assert not filters.edges(wall([20] * 16), 50, 150).any()  # a gradient of 80: between both thresholds
    assert not filters.edges(wall([10] * 16), 50, 150).any()
    # slightly falling, so that the bright side has more gradient: the lower rows alone are none
    assert filters.edges(wall(range(42, 26, -1)), 50, 150)[0].nonzero()[:, 1].tolist() == [8] * 16
    assert not filters.edges(wall(range(35, 19, -1)), 50, 150).any()
    diagonal = filters.edges(200 * torch.ones(16, 16).tril()[None], 50, 150)[0]
    rows, columns = diagonal[2:-2, 2:-2].nonzero().T
    assert set((rows - columns).tolist()) <= {-1, 0}
    assert set(rows.tolist()) == set(range(12))


def test_distances_are_those_of_the_moves():
    marked = torch.zeros(2, 25, 25, dtype=torch.bool)
    marked[0, 12, 12] = True
    found = filters.distance(marked, 14.0)
    offset = np.abs(np.arange(25) - 12)
    long, short = np.maximum(offset[:, None], offset), np.minimum(offset[:, None], offset)
    knights = np.where(2 * short <= long, long - 2 * short + 2.1969 * short, 1.4 * (2 * short - long) + 2.1969 * (long - short))
    np.testing.assert_allclose(found[0].numpy(), knights.clip(max=14), atol=1e-5)
    assert bool((found[1] == 14.0).all())  # nothing is marked
    many = torch.rand(5, 20, 20, generator=generator()) < 0.02
    for field, result in zip(many, filters.distance(many, 100.0), strict=True):
        straight = ndimage.distance_transform_edt(~field.numpy())
        np.testing.assert_allclose(result.numpy(), straight, rtol=0.03)


def test_equalising_by_hand():
    image = torch.tensor([[[0, 0], [1, 9]], [[5, 5], [5, 5]], [[7, 8], [9, 10]]]).float()
    # of four pixels, those of the darkest level do not count: the others share out 255 levels
    assert filters.equalised(image).int().tolist() == [[[0, 0], [128, 255]], [[5, 5], [5, 5]], [[0, 85], [170, 255]]]
