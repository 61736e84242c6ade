"""Plain stacks of convolutions: ConvNet-3, ConvNet-4, AlexNet and VGG-16.

Each block is convolution with bias and padding that keeps the size, norm, ReLU, and in some blocks a 2x2 pool; a linear
classifier follows. Parameters are ``conv{i}.weight/bias``, ``norm{i}.weight/bias`` for i = 0, 1, ..., and
``classifier.weight/bias``.

- ConvNets: 3x3 convolutions of one width, average pools (Gidaris & Komodakis 2018, arXiv 1804.09458), the network of the
  dataset distillation literature and of IDC (Kim et al. 2022, arXiv 2205.14959).
- AlexNet: two 5x5 and three 3x3 convolutions of w, 3w/2, 2w, 3w/2, 3w/2 channels, max pools behind the first, the second and the
  last; the form in the code of DC (Zhao et al. 2021, arXiv 2006.05929) and MTT (Cazenavette et al. 2022, arXiv 2203.11932), which
  the predecessor of the study prunes (McDermott & Cummings 2023, arXiv 2307.03364). No norm unless one is asked for. A
  padding of 2 for grey images too, where that code takes 4 to fill them up to 32 pixels.
- VGG-16: thirteen 3x3 convolutions in groups of two, two, three, three and three, of w, 2w, 4w, 8w, 8w channels, a max pool
  between groups, the mean over positions, and one linear layer in place of three (Simonyan & Zisserman 2015, arXiv
  1409.1556, in the form of Frankle et al. 2020, arXiv 1912.05671).
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dpkit.models.layers import Layer, Normaliser, Weight, max_pool, norms
from dpkit.models.spec import ModelSpec
from dpkit.tree import Params

CLASSIFIER = "classifier"
DEPTHS = {"convnet3": 3, "convnet4": 4}
VGG16 = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Width, in multiples of the first, and number of convolutions between two pools."""


class Block(NamedTuple):
    """Channels out, size of the kernel, and whether a pool follows."""

    channels: int
    kernel: int
    pool: bool


def plan(spec: ModelSpec) -> list[Block]:
    """The blocks of an architecture, in forward order."""
    w = spec.width
    if spec.arch in DEPTHS:
        return [Block(w, 3, True)] * DEPTHS[spec.arch]
    if spec.arch == "alexnet":
        half = 3 * w // 2
        return [Block(w, 5, True), Block(half, 5, True), Block(2 * w, 3, False), Block(half, 3, False), Block(half, 3, True)]
    blocks = [Block(times * w, 3, i + 1 == count) for times, count in VGG16 for i in range(count)]
    return [*blocks[:-1], blocks[-1]._replace(pool=False)]


def _side(spec: ModelSpec) -> int:
    """Height of the maps that the classifier reads."""
    return 1 if spec.arch == "vgg16" else spec.image_size // 2 ** sum(block.pool for block in plan(spec))


def table(spec: ModelSpec) -> list[Layer]:
    """All layers with tensors, in forward order."""
    layers: list[Layer] = []
    channels = spec.channels
    for i, block in enumerate(plan(spec)):
        layers.append(Weight(f"conv{i}", (block.channels, channels, block.kernel, block.kernel), bias=True))
        layers += norms(spec.norm_kind, f"norm{i}", block.channels)
        channels = block.channels
    layers.append(Weight(CLASSIFIER, (spec.classes, channels * _side(spec) ** 2), bias=True))
    return layers


def features(spec: ModelSpec, params: Params, x: Tensor, norm: Normaliser) -> Tensor:
    """Images (N, channels, S, S) to the classifier's input: maps as one vector (N, C * H^2), of a VGG-16 their means (N, C)."""
    pool = F.avg_pool2d if spec.arch in DEPTHS else max_pool
    for i, block in enumerate(plan(spec)):
        x = F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], padding=block.kernel // 2)
        x = F.relu(norm(f"norm{i}", x))
        if block.pool:
            x = pool(x, 2)
    return x.mean((2, 3)) if spec.arch == "vgg16" else x.flatten(1)


def geometry(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Name of each weight layer and the positions that it reads and writes; see :func:`dpkit.models.layer_work`."""
    side = spec.image_size
    for i, block in enumerate(plan(spec)):
        yield f"conv{i}", side**2, side**2
        side //= 2 if block.pool else 1
    yield CLASSIFIER, 1, 1
