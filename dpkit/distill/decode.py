"""Multi-formation: one stored image is a mosaic of factor x factor training images (Kim et al. 2022, section 4.1)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit.data import Split


def _padded(images: Tensor, factor: int) -> Tensor:
    """Images whose sides are multiples of ``factor``, padded with mid grey at the right and the bottom."""
    height, width = images.shape[2:]
    if factor > min(height, width):
        raise ValueError(f"factor must be at most the image's side, {min(height, width)}; got {factor}")
    return F.pad(images, (0, -width % factor, 0, -height % factor), value=0.5)


def decode_images(images: Tensor, factor: int) -> Tensor:
    """Stored images (N, C, H, W) to training images (N * factor^2, C, H, W), the tiles of an image side by side in order.

    Each tile is upsampled bilinearly to the full size. Differentiable; the identity for factor 1.
    """
    if factor == 1:
        return images
    count, channels, height, width = images.shape
    padded = _padded(images, factor)
    h, w = padded.shape[2] // factor, padded.shape[3] // factor
    tiles = padded.reshape(count, channels, factor, h, factor, w).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(count * factor * factor, channels, h, w)
    return F.interpolate(tiles, size=(height, width), mode="bilinear", align_corners=False)


def decode(split: Split, factor: int) -> Split:
    """The decoded split; each label is repeated factor^2 times."""
    return Split(decode_images(split.images, factor), split.labels.repeat_interleave(factor * factor, 0))


def mosaic(images: Tensor, factor: int) -> Tensor:
    """Pack real images (N * factor^2, C, H, W) into N stored ones, each shrunk by averaging; a start for the learning."""
    if factor == 1:
        return images.clone()
    count, channels, height, width = images.shape
    h, w = -(-height // factor), -(-width // factor)
    small = F.interpolate(images, size=(h, w), mode="bilinear", align_corners=False, antialias=True)
    grid = small.reshape(count // factor**2, factor, factor, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, factor * h, factor * w)[:, :, :height, :width].contiguous()


def check_factor(factor: int, image_size: int) -> None:
    """Raise ``ValueError`` when images of this side cannot be cut into factor x factor tiles."""
    _padded(torch.empty(1, 1, image_size, image_size), factor)
