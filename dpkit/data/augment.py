"""Augmentation as functions of (images, generator): differentiable siamese augmentation and CutMix.

DSA: Zhao and Bilen 2021 (arXiv 2102.08259), amounts as used by IDC (Kim et al. 2022). CutMix: Yun et al. 2019
(arXiv 1905.04899). Random numbers are drawn first, as a small table per image, and applied after. Applying one row to many
images is what "siamese" means: in gradient matching the real and the synthetic images of a class share a row. And tables of
many batches, each from its own generator, can be joined and applied in one pass, where the images are.
All functions act on normalised images, as the published code does, and are differentiable in them.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit.spec import Spec, later

COLOUR = ("color", "flip")
GEOMETRIC = ("crop", "scale", "rotate")
OPERATIONS = (*COLOUR, *GEOMETRIC, "cutout")


@dataclass(frozen=True, kw_only=True)
class AugmentSpec(Spec):
    """Which operations (names joined by ``_``, empty for none) and how much of each.

    flip: probability. brightness: width of the uniform shift, in standard deviations. saturation, contrast: factors are
    drawn from 1 +- saturation / 2 and 1 +- contrast. crop: largest shift, as a share of the side. scale: factors between
    1 / scale and scale for each axis. rotate: largest angle in degrees. cutout: side of the erased square, as a share.
    Of crop, scale and rotate, those named, one is drawn for each row; the others named are always applied (IDC's form of DSA).
    single: of all those named one alone is drawn for each row, as DSA has it (``aug_mode`` S in its authors' code).
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
    single: bool = later(False, before=False)

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
    """Random numbers of n rows; every tensor is (n,) float32 except ``affine`` (n, 2, 3) and ``hole`` (n, 2) in [0, 1), or
    -1 where there is no hole."""

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    affine: Tensor
    hole: Tensor

    def rows(self, index: Tensor) -> Draw:
        """The rows at ``index`` (m,) int64, so that several images share one row."""
        return Draw(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Draw:
        """The same rows on another device."""
        return Draw(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """The random numbers of ``count`` rows, (count, 12) in [0, 1), as many whatever the operations are.

    Column 6 decides the mirror: below ``flip`` an image is mirrored.
    """
    return torch.rand(count, 12, generator=generator)


def draw(spec: AugmentSpec, count: int, generator: torch.Generator) -> Draw:
    """Draw the random numbers for ``count`` rows."""
    return table(spec, uniforms(count, generator))


def table(spec: AugmentSpec, uniform: Tensor) -> Draw:
    """What the random numbers of :func:`uniforms` (n, 12) mean under ``spec``: n rows."""
    count, signed, drawn = len(uniform), uniform * 2 - 1, _drawn(spec, uniform[:, 0])
    angle = torch.where(drawn["rotate"], signed[:, 1] * math.radians(spec.rotate), 0.0)
    low, high = 1 / spec.scale, spec.scale
    sx, sy = (torch.where(drawn["scale"], low + uniform[:, i] * (high - low), 1.0) for i in (2, 3))
    tx, ty = (torch.where(drawn["crop"], signed[:, i] * spec.crop, 0.0) for i in (4, 5))
    mirror = torch.where(drawn["flip"] & (uniform[:, 6] < spec.flip), -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # shifts are shares of the side here; apply() rounds them to whole pixels
    affine = torch.stack([torch.stack([mirror * sx * cos, -sx * sin, tx], 1),
                          torch.stack([mirror * sy * sin, sy * cos, ty], 1)], 1)
    colour = drawn["color"].float()
    hole = torch.where(drawn["cutout"][:, None], uniform[:, 10:12], -torch.ones(count, 2))
    return Draw(brightness=colour * (spec.brightness * signed[:, 7] / 2),
                saturation=1 + colour * (spec.saturation * signed[:, 8] / 2),
                contrast=1 + colour * (spec.contrast * signed[:, 9]), affine=affine, hole=hole)


def _drawn(spec: AugmentSpec, uniform: Tensor) -> dict[str, Tensor]:
    """For each operation the rows (n,) bool that it is applied to."""
    never, always = torch.zeros(len(uniform), dtype=torch.bool), torch.ones(len(uniform), dtype=torch.bool)
    found = {name: always if name in spec.names else never for name in OPERATIONS}
    one_of = [name for name in (OPERATIONS if spec.single else GEOMETRIC) if name in spec.names]
    choice = (uniform * len(one_of)).long()
    return found | {name: choice == index for index, name in enumerate(one_of)}


def apply(spec: AugmentSpec, images: Tensor, rows: Draw) -> Tensor:
    """Augment normalised images (n, C, H, W) by n rows. Pixels from outside the image are 0, the mean colour."""
    names, affine, (height, width) = spec.names, rows.affine, images.shape[2:]
    if any(name in names for name in GEOMETRIC):
        # whole-pixel shifts, as a padded crop makes them, keep cropped images sharp; made where the rows are, without a wait
        affine, side = affine.clone(), torch.tensor([width, height], dtype=torch.float32, device=affine.device)
        affine[:, :, 2] = torch.round(affine[:, :, 2] * side) * 2 / side
    rows, column = replace(rows, affine=affine).to(images.device), (-1, 1, 1, 1)
    if "color" in names:
        images = images + rows.brightness.view(column).to(images)
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * rows.saturation.view(column).to(images) + grey
        level = images.mean((1, 2, 3), keepdim=True)
        images = (images - level) * rows.contrast.view(column).to(images) + level
    if any(name in names for name in GEOMETRIC):
        grid = F.affine_grid(rows.affine, [len(images), 1, height, width], align_corners=False).to(images)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    elif "flip" in names:
        mirrored = (rows.affine[:, 0, 0] < 0).view(column)
        images = torch.where(mirrored, images.flip(3), images)
    if "cutout" in names and spec.cutout > 0:
        images = images * _outside_hole(spec, images, rows.hole)
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


@dataclass(frozen=True)
class Mix:
    """CutMix of n images in one or more batches.

    order: (n,) int64, each image's partner. boxes: for each batch its images, and the box that is pasted: top, bottom, left,
    right (ends excluded; top equal to bottom where nothing is).
    """

    order: Tensor
    boxes: tuple[tuple[int, int, int, int, int], ...]

    @staticmethod
    def join(parts: Sequence[Mix]) -> Mix:
        """The mixes of several batches as one of all their images."""
        starts = [0, *accumulate(len(part.order) for part in parts[:-1])]
        order = torch.cat([part.order + start for part, start in zip(parts, starts, strict=True)])
        return Mix(order, tuple(box for part in parts for box in part.boxes))


def draw_cutmix(count: int, size: tuple[int, int], generator: torch.Generator, *, beta: float = 1.0,
                probability: float = 0.5) -> Mix:
    """Draw one batch's CutMix: with ``probability`` one box for all its ``count`` images of ``size`` (H, W).

    The box's share of the area follows Beta(beta, beta), its centre is uniform, and the mixing weight is the area that is
    really covered (Yun et al. 2019, equation 2).
    """
    coin, row, column = torch.rand(3, generator=generator).tolist()
    order = torch.randperm(count, generator=generator)
    # Beta(b, b) as a ratio of two gamma draws, from this generator only
    first, second = torch._standard_gamma(torch.full((2,), beta), generator=generator).tolist()
    height, width = size
    share = math.sqrt(1 - first / (first + second)) if coin < probability else 0.0
    half_h, half_w = int(height * share) / 2, int(width * share) / 2
    top, bottom = (min(max(round(row * height + s * half_h), 0), height) for s in (-1, 1))
    left, right = (min(max(round(column * width + s * half_w), 0), width) for s in (-1, 1))
    return Mix(order, ((count, top, bottom, left, right),))


def apply_cutmix(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Paste each image's box into it from its partner, and mix the targets by area.

    images (n, C, H, W); targets (n, K) probabilities; both new, what is passed in stays.
    """
    counts, top, bottom, left, right = torch.tensor(mix.boxes).T
    covered = ((bottom - top) * (right - left)).double() / (images.shape[2] * images.shape[3])
    if not bool(covered.any()):  # known where it was drawn, on the CPU: no wait for the device
        return images, targets
    order, share = mix.order.to(images.device, non_blocking=True), covered.float().repeat_interleave(counts)[:, None]
    targets = torch.lerp(targets, targets[order], share.to(targets.device, non_blocking=True))
    edges = torch.stack([top, bottom, left, right]).repeat_interleave(counts, 1)
    paste = _paste_at_once if images.is_cuda else _paste_in_turn
    return paste(images, order, mix, edges), targets


def _paste_in_turn(images: Tensor, order: Tensor, mix: Mix, edges: Tensor) -> Tensor:
    """A copy a batch: the least memory traffic, for a processor."""
    mixed, start = images.clone(), 0
    for count, top, bottom, left, right in mix.boxes:
        part = slice(start, start + count)
        mixed[part, :, top:bottom, left:right] = images[order[part], :, top:bottom, left:right]
        start += count
    return mixed


def _paste_at_once(images: Tensor, order: Tensor, mix: Mix, edges: Tensor) -> Tensor:
    """A fixed number of kernels for any number of batches, for a GPU. edges: (4, n), the box of each image."""
    top, bottom, left, right = edges[:, :, None].to(images.device, non_blocking=True)
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    tall, wide = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return torch.where(tall[:, None, :, None] & wide[:, None, None, :], images[order], images)


def cutmix(images: Tensor, targets: Tensor, generator: torch.Generator, *, beta: float = 1.0,
           probability: float = 0.5) -> tuple[Tensor, Tensor]:
    """CutMix of one batch: :func:`draw_cutmix` and :func:`apply_cutmix`.

    images (n, C, H, W); targets (n, K) probabilities. With probability or beta 0 nothing is drawn.
    """
    if probability <= 0 or beta <= 0:
        return images, targets
    size = (images.shape[2], images.shape[3])
    return apply_cutmix(images, targets, draw_cutmix(len(images), size, generator, beta=beta, probability=probability))
