"""How much a network's forward pass computes and moves: counted from the architecture, before anything runs."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from dpkit.models import vit
from dpkit.models.layers import Weight
from dpkit.models.network import family
from dpkit.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one image. flops: floating-point operations, a multiply-add counted as two. bytes: to and from memory."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """One convolution or linear layer, or one attention, on one image.

    flops: 2 x multiply-adds. inputs, outputs: numbers read and written. weights: entries of its weight, 0 for an attention.
    """

    name: str
    flops: int
    inputs: int
    outputs: int
    weights: int


def forward_work(spec: ModelSpec, itemsize: int = 4) -> Work:
    """Work of the forward pass on ONE image with activations of ``itemsize`` bytes (4: fp32, 2: bf16).

    flops: two for each multiply-add of the convolutions and linear layers, and of attention's two products; padding counts as
    it is computed, and biases, norms, activation functions, softmax and pools are left out (a few percent). bytes: each of
    those layers reads its input once and writes its output once, with norm, activation function, addition and pool fused
    into them, the least that a layer-by-layer pass can move. Weights are not counted: a batch shares them.
    """
    layers = [*layer_work(spec), *attention_work(spec)]
    return Work(float(sum(layer.flops for layer in layers)),
                float(itemsize * sum(layer.inputs + layer.outputs for layer in layers)))


def layer_work(spec: ModelSpec) -> Iterator[LayerWork]:
    """:class:`LayerWork` of each convolution and linear layer, in the order of :func:`dpkit.models.prunable`.

    What has no weights is not among them; see :func:`attention_work`.
    """
    weights = {layer.name: layer for layer in family(spec).table(spec) if isinstance(layer, Weight)}
    for name, before, after in family(spec).geometry(spec):
        out, into = weights[name].shape[:2]
        entries = math.prod(weights[name].shape)
        yield LayerWork(name, 2 * entries * after, into * before, out * after, entries)


def attention_work(spec: ModelSpec) -> Iterator[LayerWork]:
    """:class:`LayerWork` of each attention without its linear layers: q k' and the sum of values, 2 T^2 D multiply-adds.

    No mask over weights makes it less. Nothing for a network without attention.
    """
    if spec.arch != "vit":
        return
    tokens, width = vit.TOKENS, spec.width
    scores = vit.heads(width) * tokens**2
    for i in range(vit.DEPTH):
        yield LayerWork(f"blocks.{i}.attn", 4 * tokens**2 * width, 3 * tokens * width + scores, scores + tokens * width, 0)
