"""`shapes`: the built-in procedural data set, ten classes of 16 x 16 colour images.

Each image shows one shape, bright on dark, of random place, size and angle; shape and ground carry a sinusoidal grating of
random frequency, angle, phase and two random colours, and Gaussian noise lies over everything. The amounts were
calibrated so that the phenomena of the study show up on a CPU within minutes: a dense network is accurate and yet unstable
to SGD noise, ten random images a class are far from enough, and ten distilled ones are much better (asserted in
``tests/test_calibration.py``).

Everything is computed in float64 and rounded to uint8 last, so the same seed gives the same bytes on every machine.
"""
from __future__ import annotations

import numpy as np
import torch

from dpkit.data.split import Split
from dpkit.tree import seed_for

CLASSES = ("disk", "square", "triangle", "star", "cross", "ring", "half disk", "crescent", "bar", "corner")
SIDE = 16
NOISE = 0.15
CENTRE = 0.3  # centre of the shape lies within this share of the half-width
SIZE = (0.6, 0.95)  # radius of the shape, as a share of the half-width
_SUPERSAMPLING = 3


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five-pointed star: radius falls linearly in angle from tip (1) to notch (0.42)."""
    angle = np.abs((np.arctan2(y, x) / (2 * np.pi / 5) + 0.5) % 1.0 - 0.5) * 2
    return np.hypot(x, y) <= 1.0 - 0.58 * angle


def _inside(shape: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x, y), in units of the radius, lie inside the class's outline."""
    radius = np.hypot(x, y)
    match CLASSES[shape]:
        case "disk":
            return radius <= 0.85
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.75
        case "triangle":
            return (y >= -0.5) & (y <= 1 - np.sqrt(3) * abs(x))
        case "star":
            return _star(x, y)
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.27) & (np.maximum(abs(x), abs(y)) <= 0.9)
        case "ring":
            return (radius <= 0.95) & (radius >= 0.5)
        case "half disk":
            return (radius <= 1.0) & (y >= 0.05)
        case "crescent":
            return (radius <= 0.95) & (np.hypot(x - 0.5, y) >= 0.75)
        case "bar":
            return (abs(x) <= 0.95) & (abs(y) <= 0.3)
        case _:  # corner: two arms that meet at a right angle
            return ((abs(x + 0.5) <= 0.27) & (abs(y) <= 0.8)) | ((abs(y + 0.53) <= 0.27) & (x >= -0.77) & (x <= 0.8))


def _grating(rng: np.random.Generator, count: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sinusoidal textures (count, H, W, 3) in [0, 1] between two random colours each."""
    frequency = rng.uniform(0.5, 3.0, (count, 1, 1)) * np.pi
    angle, phase = (rng.uniform(0, 2 * np.pi, (count, 1, 1)) for _ in range(2))
    wave = 0.5 + 0.5 * np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    first, second = (rng.uniform(0, 1, (count, 1, 1, 3)) for _ in range(2))
    return first + (second - first) * wave[..., None]


def render(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images (N, 16, 16, 3) uint8 for class labels (N,) in [0, 10)."""
    count, fine = len(labels), SIDE * _SUPERSAMPLING
    axis = (np.arange(fine) + 0.5) / fine * 2 - 1
    coarse = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    centre = rng.uniform(-CENTRE, CENTRE, (2, count, 1, 1))
    size = rng.uniform(*SIZE, (count, 1, 1))
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    dx, dy = (axis[None, None, :] - centre[0]) / size, (axis[None, :, None] - centre[1]) / size
    x, y = dx * np.cos(angle) + dy * np.sin(angle), -dx * np.sin(angle) + dy * np.cos(angle)
    inside = np.empty(x.shape, dtype=bool)
    for shape in np.unique(labels):
        rows = labels == shape
        inside[rows] = _inside(int(shape), x[rows], y[rows])
    blocks = (count, SIDE, _SUPERSAMPLING, SIDE, _SUPERSAMPLING)
    cover = inside.reshape(blocks).mean((2, 4))[..., None]
    grid = coarse[None, None, :], coarse[None, :, None]
    ground, figure = 0.5 * _grating(rng, count, *grid), 0.5 + 0.5 * _grating(rng, count, *grid)
    pixels = ground + (figure - ground) * cover + NOISE * rng.standard_normal((count, SIDE, SIDE, 3))
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def make(part: str, count: int, classes: int = len(CLASSES)) -> Split:
    """The first ``count`` images of part ``"train"`` or ``"test"`` that show one of the first ``classes`` classes.

    Images are made in blocks of 1,000, each from a seed of its own, which hold 100 of each class, shuffled. So a shorter part
    is a prefix of a longer one, and a part of fewer classes is what is left of one of all.
    """
    images, labels, each = [], [], 1000 // len(CLASSES)
    for block in range(-(-count // (each * classes))):
        rng = np.random.Generator(np.random.PCG64(seed_for("shapes", part, block)))
        # shuffled: an evenly spaced subset of classes in turn would miss some of them
        shown = rng.permutation(np.arange(1000) % len(CLASSES))
        images.append(render(shown, rng)[shown < classes])
        labels.append(shown[shown < classes])
    pixels = torch.from_numpy(np.concatenate(images)[:count]).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.from_numpy(np.concatenate(labels)[:count]))
