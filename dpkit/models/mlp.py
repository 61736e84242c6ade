"""LeNet-300-100: two hidden layers on flattened images (LeCun et al. 1998, Gradient-based learning applied to document
recognition).

Hidden layers of 3 * width and width units, each linear with bias, norm if one is asked for, and ReLU: the network of the first
lottery tickets (Frankle & Carbin 2019, arXiv 1803.03635) at width 100. Parameters are ``linear0``, ``linear1``,
``classifier`` (``.weight/bias``) and ``norm0``, ``norm1``.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from dpkit.models.layers import Layer, Normaliser, Weight, norms
from dpkit.models.spec import ModelSpec
from dpkit.tree import Params

CLASSIFIER = "classifier"


def hidden(spec: ModelSpec) -> tuple[int, int]:
    """Units of the two hidden layers."""
    return 3 * spec.width, spec.width


def table(spec: ModelSpec) -> list[Layer]:
    """All layers with tensors, in forward order."""
    layers: list[Layer] = []
    into = spec.channels * spec.image_size**2
    for i, out in enumerate(hidden(spec)):
        layers.append(Weight(f"linear{i}", (out, into), bias=True))
        layers += norms(spec.norm_kind, f"norm{i}", out)
        into = out
    return [*layers, Weight(CLASSIFIER, (spec.classes, into), bias=True)]


def features(spec: ModelSpec, params: Params, x: Tensor, norm: Normaliser) -> Tensor:
    """Images (N, channels, S, S) to the classifier's input (N, width)."""
    x = x.flatten(1)
    for i in range(len(hidden(spec))):
        x = F.relu(norm(f"norm{i}", F.linear(x, params[f"linear{i}.weight"], params[f"linear{i}.bias"])))
    return x


def geometry(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Name of each weight layer and the positions that it reads and writes: one of each."""
    for i in range(len(hidden(spec))):
        yield f"linear{i}", 1, 1
    yield CLASSIFIER, 1, 1
