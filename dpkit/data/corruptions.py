"""The corruptions of CIFAR-10-C, made from test images.

Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", arXiv
1903.12261, section 3; the constants of each severity are those of the authors' code for CIFAR-10 (hendrycks/robustness on
GitHub, ``ImageNet-C/create_c/make_cifar_c.py``). Frost is left out: it pastes photographs that are not part of the test images.

What differs from the published files: the random numbers, the rounding of intermediate values (by one level of 255 here and
there), and JPEG's last bits, which follow the installed encoder. Two more things are chosen here, for images of another kind
than the published 32 x 32 in colour. Lengths in pixels grow with an image, by size / 32, and stay as they are on a smaller one,
where half a pixel of blur would be none. And a grey image counts as three equal channels for the two corruptions that have a
colour, ``saturate`` and ``spatter``; the luminance of the result is kept.
"""
from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dpkit.data import filters

SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 500  # images of at most 32 x 32 at once, and fewer large ones; another value would give other random numbers

#: what each severity sets, by corruption
CONSTANTS: dict[str, tuple] = {
    # deviation of the noise
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    # photons at full brightness
    "shot_noise": (500, 250, 100, 75, 50),
    # share of the values that become 0 or 1
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    # radius of the disk, softness of its edge
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    # deviation of the blur, reach of the shuffling, times
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    # radius, deviation
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    # how many zooms are averaged: 1, 1.01, 1.02 ...
    "zoom_blur": (7, 12, 16, 21, 26),
    # mean and deviation of the flakes, zoom, threshold, radius and deviation of their motion, share of the image
    "snow": ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
             (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    # amount, decay of the clouds' roughness
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    # added to the value of HSV
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    # factor
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    # as shares of the side: displacement, deviation of its blur, shift of the corners
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    # share of the side
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    # quality
    "jpeg_compression": (80, 65, 58, 50, 40),
    # deviation of the noise, relative to the value
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    # deviation
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    # mean and deviation of the liquid, its blur, threshold, opacity (mud: blur of its edge), whether it is mud
    "spatter": ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
                (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
    # factor and shift of the saturation of HSV
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}
NAMES = tuple(CONSTANTS)
#: those that the benchmark's mean is taken over (without frost); the other four were published for choosing hyperparameters
STANDARD = tuple(name for name in NAMES if name not in ("speckle_noise", "gaussian_blur", "spatter", "saturate"))


def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupt square images (N, C, H, H), uint8, C 1 or 3, H at least 8: the same shape and type, on the same device.

    name: one of :data:`NAMES`; severity: 1 (least) to 5. Values are cut to [0, 255] and, as in the published files, rounded down.
    Raises ``ValueError`` on any other name, severity, shape or type.
    """
    if name not in CONSTANTS:
        raise ValueError(f"corruption must be one of {', '.join(NAMES)}; got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be a whole number in [{SEVERITIES[0]}, {SEVERITIES[-1]}], got {severity!r}")
    shape = tuple(images.shape)
    good = images.dim() == 4 and shape[1] in (1, 3) and shape[2] == shape[3] >= 8
    if not good or images.dtype != torch.uint8:
        raise ValueError(f"images to corrupt must be (N, 1 or 3, S, S) uint8 with S at least 8, got {shape} "
                         f"{str(images.dtype).removeprefix('torch.')}; corrupt them before they are normalised")
    constants, function = CONSTANTS[name][severity - 1], _FUNCTIONS[name]
    scale = max(1.0, shape[-1] / 32)
    together = max(1, int(CHUNK / scale**2))
    parts = [_bytes(function(part.cpu().float() / 255, constants, scale, generator)) for part in images.split(together)]
    return torch.cat(parts).to(images.device) if parts else images.clone()


def _bytes(x: Tensor) -> Tensor:
    """As uint8, rounded down; what single precision takes from a whole number is given back."""
    return (255 * x.clamp(0, 1) + 1e-4).to(torch.uint8)


# --- noise ----------------------------------------------------------------------------------------------------------------
def _gaussian_noise(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    return x + c * torch.randn(x.shape, generator=generator)


def _shot_noise(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(c * x, generator=generator) / c


def _impulse_noise(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    hit, salt = torch.rand((2, *x.shape), generator=generator)
    return torch.where(hit < c, (salt < 0.5).to(x), x)


def _speckle_noise(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    return x + c * x * torch.randn(x.shape, generator=generator)


# --- blur -----------------------------------------------------------------------------------------------------------------
def _gaussian_blur(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    return filters.gaussian(x, c * scale)


def _defocus_blur(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    return filters.filtered(x, filters.disk(c[0] * scale, c[1] * scale, max(1, round(scale))))


def _glass_blur(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    """Pixels take the value of a near one. The published code means to exchange the two, but its arrays share memory, so one is
    copied over the other; on 32 x 32 images, where it looks up and left only, that is the same as a look-up for all at once."""
    sigma, reach, size = c[0] * scale, max(1, round(c[1] * scale)), x.shape[-1]
    x = _bytes(filters.gaussian(x, sigma)).float() / 255
    place = torch.arange(size)
    inside = (place > reach) & (place <= size - reach)
    inside = inside[:, None] & inside
    for _ in range(c[2]):
        shift = torch.randint(-reach, reach, (2, len(x), size, size), generator=generator) * inside
        index = (place[:, None] + shift[0]) * size + place + shift[1]
        x = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return filters.gaussian(x, sigma)


def _motion_blur(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    degrees = 90 * torch.rand(len(x), generator=generator) - 45
    return _rounded(filters.motion(x, c[0] * scale, c[1] * scale, degrees))


def _rounded(x: Tensor) -> Tensor:
    """The nearest whole 255ths, halves up: what goes through an image file or Pillow."""
    return torch.floor(255 * x + 0.5 + 1e-4) / 255


def _zoom_blur(x: Tensor, c: int, scale: float, generator: torch.Generator) -> Tensor:
    hundredth = 1.01 - 1  # with the rounding of numpy's arange, which decides how many pixels a zoom of 1.25 has
    return (x + sum(filters.zoomed(x, 1 + i * hundredth) for i in range(c))) / (c + 1)


# --- weather --------------------------------------------------------------------------------------------------------------
def _snow(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    mean, deviation, zoom, threshold, radius, sigma, share = c
    flakes = mean + deviation * torch.randn((len(x), 1, *x.shape[2:]), generator=generator)
    flakes = filters.zoomed(flakes, zoom * scale)
    flakes = _bytes(torch.where(flakes < threshold, 0.0, flakes)).float() / 255
    degrees = 90 * torch.rand(len(x), generator=generator) - 135
    flakes = _rounded(filters.motion(flakes, radius * scale, sigma * scale, degrees))
    pale = share * x + (1 - share) * torch.maximum(x, 1.5 * _luminance(x) + 0.5)
    return pale + flakes + flakes.rot90(2, (2, 3))


def _fog(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    amount, decay = c
    size, top = x.shape[-1], x.amax((1, 2, 3), keepdim=True)
    clouds = filters.plasma(len(x), 2 ** (size - 1).bit_length(), decay, generator)[:, None, :size, :size]
    return (x + amount * clouds) * top / (top + amount)


def _spatter(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    """On a large image the liquid's deviation grows with its blur, so that as much of it stands out as on a small one. Where it
    is above 1 it is cut; in the published code such a rare value goes round to near 0."""
    mean, deviation, blur, threshold, last, mud = c
    liquid = mean + deviation * scale * torch.randn((len(x), *x.shape[2:]), generator=generator)
    liquid = filters.gaussian(liquid, blur * scale)
    if mud:
        cover = filters.gaussian((liquid >= threshold).float(), last * scale)[:, None]
        cover = torch.where(cover < 0.8, 0.0, cover)
        return _with_colour(x * (1 - cover), cover, (63, 42, 20))
    liquid = torch.where(liquid < threshold, 0.0, liquid)
    drops = torch.floor(255 * liquid.clamp(0, 1))
    near = filters.distance(filters.edges(drops, 50, 150), 20 * scale)[:, None]
    box, relief = torch.full((3, 3), 1 / 9), torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    near = filters.equalised(torch.floor(filters.filtered(near, box))[:, 0])[:, None]
    near = torch.round(filters.filtered(filters.filtered(near, relief).clamp(0, 255), box))
    water = drops[:, None] * near
    water = last * water / water.amax((1, 2, 3), keepdim=True).clamp_min(1e-9)
    return _with_colour(x, water, (175, 238, 238))


def _with_colour(x: Tensor, amount: Tensor, colour: tuple[int, int, int]) -> Tensor:
    added = amount * torch.tensor(colour).view(1, 3, 1, 1) / 255
    return x + (added if x.shape[1] == 3 else _luminance(added))


# --- colour ---------------------------------------------------------------------------------------------------------------
def _luminance(x: Tensor) -> Tensor:
    """(N, 1, H, W): the weights of ITU-R BT.601, as in OpenCV; a grey image is its own."""
    return x if x.shape[1] == 1 else 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _contrast(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def _brightness(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    """Value + c at the same hue and saturation: all channels by one factor; black becomes grey."""
    value = x.amax(1, keepdim=True)
    brighter = (value + c).clamp_max(1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-9)), brighter)


def _saturate(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    """Saturation times and plus a constant at the same hue and value. Grey, which has no hue, counts as red: additions show."""
    factor, shift = c
    colour = x.expand(-1, 3, -1, -1)
    value, least = colour.amax(1, keepdim=True), colour.amin(1, keepdim=True)
    saturation = torch.where(value > 0, (value - least) / value.clamp_min(1e-9), 0.0)
    new = (saturation * factor + shift).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
    lack = torch.where(value > least, (value - colour) / (value - least).clamp_min(1e-9), red)
    result = value * (1 - new * lack)
    return result if x.shape[1] == 3 else _luminance(result)


# --- digital --------------------------------------------------------------------------------------------------------------
def _elastic_transform(x: Tensor, c: tuple, scale: float, generator: torch.Generator) -> Tensor:
    size, count = x.shape[-1], len(x)
    centre, side = size // 2, size // 3
    corners = torch.tensor([[side, side], [side, -side], [-side, -side]], dtype=torch.float64) + centre
    moved = corners + c[2] * size * (2 * torch.rand(count, 3, 2, dtype=torch.float64, generator=generator) - 1)
    # the affine map that takes a place of the result, (x, y, 1), to where its value comes from
    back = torch.linalg.solve(torch.cat([moved, torch.ones(count, 3, 1, dtype=torch.float64)], 2), corners.expand(count, -1, -1))
    rows, columns = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    grid = torch.stack([columns, rows, torch.ones_like(rows)], -1).view(1, -1, 3) @ back
    x = filters.sampled(x, grid[..., 1].view(count, size, size), grid[..., 0].view(count, size, size), "mirror")
    shifts = 2 * torch.rand(2, count, size, size, dtype=torch.float64, generator=generator) - 1
    amount = c[0] * size * scale
    across, down = amount * filters.gaussian(shifts, c[1] * size, "symmetric", 3.0)
    return filters.sampled(x, rows + down, columns + across, "symmetric") if amount else x


def _pixelate(x: Tensor, c: float, scale: float, generator: torch.Generator) -> Tensor:
    size = x.shape[-1]
    small = max(1, int(size * c))
    down, up = filters.box_matrix(size, small).to(x), filters.box_matrix(small, size).to(x)
    # a byte image after each axis, as in Pillow
    return up @ _rounded(down @ _rounded(x @ down.T)) @ up.T


def _jpeg_compression(x: Tensor, c: int, scale: float, generator: torch.Generator) -> Tensor:
    from PIL import Image  # torchvision brings it

    pixels = torch.round(255 * x).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    result = np.empty_like(pixels)
    for i, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(file, "JPEG", quality=c)
        with Image.open(file) as decoded:
            result[i] = np.asarray(decoded).reshape(image.shape)
    return torch.from_numpy(result).permute(0, 3, 1, 2).float() / 255


_FUNCTIONS: dict[str, Callable[[Tensor, object, float, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise, "shot_noise": _shot_noise, "impulse_noise": _impulse_noise, "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur, "motion_blur": _motion_blur, "zoom_blur": _zoom_blur, "snow": _snow, "fog": _fog,
    "brightness": _brightness, "contrast": _contrast, "elastic_transform": _elastic_transform, "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression, "speckle_noise": _speckle_noise, "gaussian_blur": _gaussian_blur, "spatter": _spatter,
    "saturate": _saturate}
