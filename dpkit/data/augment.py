"""Augmentation as functions of (images, generator): differentiable siamese augmentation and CutMix.

DSA: Zhao and Bilen 2021 (arXiv 2102.08259), amounts as used by IDC (Kim et al. 2022). CutMix: Yun et al. 2019
(arXiv 1905.04899). Random numbers are drawn first, as a small table per image, and applied after. Applying one row to many
images is what "siamese" means: in gradient matching the real and the synthetic images of a class share a row.
All functions act on normalised images, as the published code does, and are differentiable in them.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit.spec import Spec

COLOUR = ("color", "flip")
GEOMETRIC = ("crop", "scale", "rotate")
OPERATIONS = (*COLOUR, *GEOMETRIC, "cutout")


@dataclass(frozen=True, kw_only=True)
class AugmentSpec(Spec):
    """Which operations (names joined by ``_``, empty for none) and how much of each.

    flip: probability. brightness: width of the uniform shift, in standard deviations. saturation, contrast: factors are
    drawn from 1 +- saturation / 2 and 1 +- contrast. crop: largest shift, as a share of the side. scale: factors between
    1 / scale and scale for each axis. rotate: largest angle in degrees. cutout: side of the erased square, as a share.
    Of crop, scale and rotate, those named, one is drawn for each row; the others named are always applied.
    """

    operations: str = "color_crop_flip_scale_rotate"
    flip: float = 0.5
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    scale: float = 1.2
    rotate: float = 15.0
    cutout: float = 0.5

    def check(self) -> None:
        unknown = [name for name in self.names if name not in OPERATIONS]
        self.require(not unknown, f"operations must be joined by _ from {', '.join(OPERATIONS)}; got {self.operations!r}")
        for name in ("flip", "crop", "cutout"):
            self.between(name, 0, 1)
        for name in ("brightness", "saturation", "contrast", "rotate"):
            self.between(name, 0, 360)
        self.between("scale", 1, 10)

    @property
    def names(self) -> tuple[str, ...]:
        """The operations as a tuple."""
        return tuple(name for name in self.operations.split("_") if name)


@dataclass(frozen=True)
class Draw:
    """Random numbers of n rows; every tensor is (n,) float32 except ``affine`` (n, 2, 3) and ``hole`` (n, 2) in [0, 1)."""

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    affine: Tensor
    hole: Tensor

    def rows(self, index: Tensor) -> Draw:
        """The rows at ``index`` (m,) int64, so that several images share one row."""
        return Draw(*(getattr(self, field.name)[index] for field in fields(self)))


def draw(spec: AugmentSpec, count: int, generator: torch.Generator) -> Draw:
    """Draw the random numbers for ``count`` rows. The same number is drawn whatever the operations are."""
    uniform = torch.rand(count, 12, generator=generator)
    signed = uniform * 2 - 1
    names = spec.names
    angle, sx, sy = torch.zeros(count), torch.ones(count), torch.ones(count)
    tx, ty = torch.zeros(count), torch.zeros(count)
    geometric = [name for name in GEOMETRIC if name in names]
    if geometric:
        choice = (uniform[:, 0] * len(geometric)).long()
        for index, name in enumerate(geometric):
            chosen = choice == index
            if name == "rotate":
                angle = torch.where(chosen, signed[:, 1] * math.radians(spec.rotate), angle)
            elif name == "scale":
                low, high = 1 / spec.scale, spec.scale
                sx = torch.where(chosen, low + uniform[:, 2] * (high - low), sx)
                sy = torch.where(chosen, low + uniform[:, 3] * (high - low), sy)
            else:
                tx = torch.where(chosen, signed[:, 4] * spec.crop, tx)
                ty = torch.where(chosen, signed[:, 5] * spec.crop, ty)
    mirror = torch.where(uniform[:, 6] < spec.flip, -1.0, 1.0) if "flip" in names else torch.ones(count)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # shifts are shares of the side here; apply() rounds them to whole pixels
    affine = torch.stack([torch.stack([mirror * sx * cos, -sx * sin, tx], 1),
                          torch.stack([mirror * sy * sin, sy * cos, ty], 1)], 1)
    colour = float("color" in names)
    return Draw(brightness=colour * spec.brightness * signed[:, 7] / 2,
                saturation=1 + colour * spec.saturation * signed[:, 8] / 2,
                contrast=1 + colour * spec.contrast * signed[:, 9],
                affine=affine, hole=uniform[:, 10:12])


def apply(spec: AugmentSpec, images: Tensor, rows: Draw) -> Tensor:
    """Augment normalised images (n, C, H, W) by n rows. Pixels from outside the image are 0, the mean colour."""
    names = spec.names
    column = (-1, 1, 1, 1)
    if "color" in names:
        images = images + rows.brightness.view(column).to(images)
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * rows.saturation.view(column).to(images) + grey
        level = images.mean((1, 2, 3), keepdim=True)
        images = (images - level) * rows.contrast.view(column).to(images) + level
    if any(name in names for name in GEOMETRIC):
        height, width = images.shape[2:]
        side = torch.tensor([width, height], dtype=torch.float32)
        affine = rows.affine.clone()
        # whole-pixel shifts, as a padded crop makes them, keep cropped images sharp
        affine[:, :, 2] = torch.round(affine[:, :, 2] * side) * 2 / side
        grid = F.affine_grid(affine, [len(images), 1, height, width], align_corners=False).to(images)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    elif "flip" in names:
        mirrored = (rows.affine[:, 0, 0] < 0).view(column).to(images.device)
        images = torch.where(mirrored, images.flip(3), images)
    if "cutout" in names and spec.cutout > 0:
        images = images * _outside_hole(spec, images, rows.hole.to(images.device))
    return images


def _outside_hole(spec: AugmentSpec, images: Tensor, hole: Tensor) -> Tensor:
    """1 outside and 0 inside a square of share ``cutout`` centred at ``hole``: (n, 1, H, W)."""
    height, width = images.shape[2:]
    keep = []
    for axis, side in enumerate((height, width)):
        length = int(side * spec.cutout + 0.5)
        start = torch.floor(hole[:, axis] * (side + 1 - length % 2)) - length // 2
        position = torch.arange(side, device=images.device)
        keep.append((position >= start[:, None]) & (position < start[:, None] + length))
    return (~(keep[0][:, None, :, None] & keep[1][:, None, None, :])).to(images)


def augment(spec: AugmentSpec, images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment each of the normalised images (n, C, H, W) on its own."""
    if not spec.names:
        return images
    return apply(spec, images, draw(spec, len(images), generator))


def cutmix(images: Tensor, targets: Tensor, generator: torch.Generator, *, beta: float = 1.0,
           probability: float = 0.5) -> tuple[Tensor, Tensor]:
    """With ``probability``, paste one box of a shuffled batch into each image and mix the targets by area.

    images (n, C, H, W); targets (n, K) probabilities. The box's share of the area follows Beta(beta, beta), its centre is
    uniform, and the mixing weight is the area that is really covered (Yun et al. 2019, equation 2).
    """
    if probability <= 0 or beta <= 0:
        return images, targets
    coin, row, column = torch.rand(3, generator=generator).tolist()
    order = torch.randperm(len(images), generator=generator)
    # Beta(b, b) as a ratio of two gamma draws, from this generator only
    first, second = torch._standard_gamma(torch.full((2,), beta), generator=generator).tolist()
    if coin >= probability:
        return images, targets
    height, width = images.shape[2:]
    share = math.sqrt(1 - first / (first + second))
    half_h, half_w = int(height * share) / 2, int(width * share) / 2
    top, bottom = (min(max(round(row * height + s * half_h), 0), height) for s in (-1, 1))
    left, right = (min(max(round(column * width + s * half_w), 0), width) for s in (-1, 1))
    order = order.to(images.device)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    covered = (bottom - top) * (right - left) / (height * width)
    return images, torch.lerp(targets, targets[order], covered)
