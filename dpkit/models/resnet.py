"""ResNet-10 and ResNet-18, four stages of one or two basic blocks, and ResNet-20, three stages of three (He et al. 2016,
arXiv 1512.03385).

Widths are w, 2w, 4w, 8w; stages after the first halve the image. Convolutions have no bias. A shortcut is a
1x1 convolution with norm where stride or channels change, the identity elsewhere. For ResNet-20 that is the paper's option B, as
in the lottery-ticket literature (Frankle et al. 2020, arXiv 1912.05671); its authors' own CIFAR networks pad with zeros (option
A), which has 2,560 weights less at width 16. Parameter names are torchvision's. The initialisation is PyTorch's default, as in
the paper's code; torchvision's own class draws normal weights instead.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from dpkit.models.layers import Layer, Normaliser, Weight, max_pool, norms
from dpkit.models.spec import BLOCKS, ModelSpec
from dpkit.tree import Params

CLASSIFIER = "fc"


def stages(spec: ModelSpec) -> int:
    """How many stages of blocks there are."""
    return 3 if spec.arch == "resnet20" else 4


def blocks(spec: ModelSpec) -> Iterator[tuple[str, int, int, int]]:
    """Each basic block in forward order: (name, channels in, channels out, stride)."""
    before = spec.width
    for stage in range(stages(spec)):
        after = spec.width * 2**stage
        for i in range(BLOCKS[spec.arch]):
            yield f"layer{stage + 1}.{i}", before, after, 2 if stage > 0 and i == 0 else 1
            before = after


def table(spec: ModelSpec) -> list[Layer]:
    """All layers with tensors, in forward order; a block's shortcut comes after its two convolutions."""
    layers: list[Layer] = []

    def convolution(name: str, norm: str, into: int, out: int, kernel: int) -> None:
        layers.append(Weight(name, (out, into, kernel, kernel), bias=False))
        layers.extend(norms(spec.norm_kind, norm, out))

    convolution("conv1", "bn1", spec.channels, spec.width, 7 if spec.stem == "imagenet" else 3)
    for name, into, out, stride in blocks(spec):
        convolution(f"{name}.conv1", f"{name}.bn1", into, out, 3)
        convolution(f"{name}.conv2", f"{name}.bn2", out, out, 3)
        if stride != 1 or into != out:
            convolution(f"{name}.downsample.0", f"{name}.downsample.1", into, out, 1)
    layers.append(Weight(CLASSIFIER, (spec.classes, spec.width * 2 ** (stages(spec) - 1)), bias=True))
    return layers


def features(spec: ModelSpec, params: Params, x: Tensor, norm: Normaliser) -> Tensor:
    """Images (N, channels, S, S) to the classifier's input (N, last width), averaged over positions."""
    if spec.stem == "imagenet":
        x = F.relu(norm("bn1", F.conv2d(x, params["conv1.weight"], stride=2, padding=3)))
        x = max_pool(x, 3, stride=2, padding=1)
    else:
        x = F.relu(norm("bn1", F.conv2d(x, params["conv1.weight"], padding=1)))
    for name, into, out, stride in blocks(spec):
        y = F.conv2d(x, params[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = F.relu(norm(f"{name}.bn1", y))
        y = norm(f"{name}.bn2", F.conv2d(y, params[f"{name}.conv2.weight"], padding=1))
        if stride != 1 or into != out:
            x = F.conv2d(x, params[f"{name}.downsample.0.weight"], stride=stride)
            x = norm(f"{name}.downsample.1", x)
        x = F.relu(x + y)
    return x.mean((2, 3))


def geometry(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Name of each weight layer and the positions that it reads and writes; see :func:`dpkit.models.layer_work`."""
    def halved(height: int) -> int:
        return (height + 1) // 2  # of every stride of two here: kernel 2 p + 1 with padding p

    side = spec.image_size
    if spec.stem == "imagenet":
        yield "conv1", side**2, halved(side)**2
        side = halved(halved(side))
    else:
        yield "conv1", side**2, side**2
    for name, into, out, stride in blocks(spec):
        after = halved(side) if stride == 2 else side
        yield f"{name}.conv1", side**2, after**2
        yield f"{name}.conv2", after**2, after**2
        if stride != 1 or into != out:
            yield f"{name}.downsample.0", side**2, after**2
        side = after
    yield CLASSIFIER, 1, 1
