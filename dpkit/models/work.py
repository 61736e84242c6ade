"""How much a network's forward pass computes and moves: counted from the architecture, before anything runs."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from dpkit.models import convnet, resnet
from dpkit.models.layers import Weight
from dpkit.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one image. flops: floating-point operations, a multiply-add counted as two. bytes: to and from memory."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """One convolution or linear layer on one image.

    flops: 2 x multiply-adds. inputs, outputs: numbers read and written. weights: entries of its weight.
    """

    name: str
    flops: int
    inputs: int
    outputs: int
    weights: int


def forward_work(spec: ModelSpec, itemsize: int = 4) -> Work:
    """Work of the forward pass on ONE image with activations of ``itemsize`` bytes (4: fp32, 2: bf16).

    flops: two for each multiply-add of the convolutions and linear layers; padding counts as it is computed, and biases,
    norms, ReLUs and pools are left out (a few percent). bytes: each of those layers reads its input once and writes its
    output once, with norm, ReLU, addition and pool fused into them, the least that a layer-by-layer pass can move. Weights
    are not counted: a batch shares them.
    """
    layers = list(layer_work(spec))
    return Work(float(sum(layer.flops for layer in layers)),
                float(itemsize * sum(layer.inputs + layer.outputs for layer in layers)))


def layer_work(spec: ModelSpec) -> Iterator[LayerWork]:
    """:class:`LayerWork` of each convolution and linear layer, in the order of :func:`dpkit.models.prunable`."""
    weights = {layer.name: layer for layer in (resnet if spec.is_resnet else convnet).table(spec) if isinstance(layer, Weight)}
    for name, side_in, side_out in _geometry(spec):
        shape = weights[name].shape
        out, into = shape[:2]
        if len(shape) == 2:
            yield LayerWork(name, 2 * out * into, into, out, out * into)
        else:
            entries = math.prod(shape)
            yield LayerWork(name, 2 * entries * side_out**2, into * side_in**2, out * side_out**2, entries)


def _geometry(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Name, height of the input and height of the output of each layer; images are square, linear layers have height 1."""
    side = spec.image_size
    if not spec.is_resnet:
        for i in range(convnet.DEPTH):
            yield f"conv{i}", side, side
            side //= 2
        yield convnet.CLASSIFIER, 1, 1
        return

    def halved(height: int) -> int:
        return (height + 1) // 2  # of every stride of two here: kernel 2 p + 1 with padding p

    if spec.stem == "imagenet":
        yield "conv1", side, halved(side)
        side = halved(halved(side))
    else:
        yield "conv1", side, side
    for name, into, out, stride in resnet.blocks(spec):
        after = halved(side) if stride == 2 else side
        yield f"{name}.conv1", side, after
        yield f"{name}.conv2", after, after
        if stride != 1 or into != out:
            yield f"{name}.downsample.0", side, after
        side = after
    yield resnet.CLASSIFIER, 1, 1
