"""A small Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

The image is cut into 8 x 8 patches, image_size / 8 pixels a side, each mapped to a token of ``width`` dimensions to which a
learned position is added. Six pre-norm blocks follow: x + attention(norm(x)), then x + MLP(norm(x)) with four times the width
inside and GELU. The classifier reads the mean of the normalised tokens, not a class token (Beyer et al. 2022, arXiv
2205.01580). Heads have 32 dimensions where the width allows (:func:`heads`).

Attention is written out with matrix products and softmax, because the fused kernels have no second derivative. All linear
weights may be pruned, the patches' map and the classifier included; the positions are neither weights nor norms. Parameter names
are those of timm's ``VisionTransformer`` without class token. The initialisation is PyTorch's default for linear layers, as for
all networks here, and a standard deviation of 0.02 for positions, as in the paper's code.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from dpkit.models.layers import Embedding, Layer, Normaliser, Weight, norms
from dpkit.models.spec import ModelSpec
from dpkit.tree import Params

CLASSIFIER = "head"
DEPTH = 6
GRID = 8
TOKENS = GRID**2
EXPANSION = 4
HEAD = 32


def heads(width: int) -> int:
    """Heads of attention: as many as divide ``width`` with at least 32 dimensions each; one for a width below 64."""
    return max([1, *[count for count in range(1, width // HEAD + 1) if width % count == 0]])


def table(spec: ModelSpec) -> list[Layer]:
    """All layers with tensors: weights in forward order, each norm before what it normalises for."""
    width, patch, kind = spec.width, spec.image_size // GRID, spec.norm_kind
    layers: list[Layer] = [Weight("patch_embed.proj", (width, spec.channels, patch, patch), bias=True),
                           Embedding("pos_embed", (1, TOKENS, width), deviation=0.02)]
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        layers += [*norms(kind, f"{block}.norm1", width),
                   Weight(f"{block}.attn.qkv", (3 * width, width), bias=True),
                   Weight(f"{block}.attn.proj", (width, width), bias=True),
                   *norms(kind, f"{block}.norm2", width),
                   Weight(f"{block}.mlp.fc1", (EXPANSION * width, width), bias=True),
                   Weight(f"{block}.mlp.fc2", (width, EXPANSION * width), bias=True)]
    return [*layers, *norms(kind, "norm", width), Weight(CLASSIFIER, (spec.classes, width), bias=True)]


def features(spec: ModelSpec, params: Params, x: Tensor, norm: Normaliser) -> Tensor:
    """Images (N, channels, S, S) to the classifier's input (N, width), the mean over normalised tokens."""
    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])

    patches = F.conv2d(x, params["patch_embed.proj.weight"], params["patch_embed.proj.bias"], stride=spec.image_size // GRID)
    x = patches.flatten(2).transpose(1, 2) + params["pos_embed"]
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        mixed = attention(linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)), heads(spec.width))
        x = x + linear(f"{block}.attn.proj", mixed)
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
    return norm("norm", x).mean(1)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(d)) v for each head, (N, T, D), from queries, keys and values side by side (N, T, 3 D).

    d: D / heads. Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def geometry(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Name of each weight layer and the positions that it reads and writes: pixels, then tokens."""
    yield "patch_embed.proj", spec.image_size**2, TOKENS
    for layer in table(spec):
        if isinstance(layer, Weight) and layer.name.startswith("blocks."):
            yield layer.name, TOKENS, TOKENS
    yield CLASSIFIER, 1, 1
