"""ConvNet-3: three blocks of [convolution 3x3, norm, ReLU, average pool 2x2] and a linear classifier.

Gidaris & Komodakis 2018 (arXiv 1804.09458), the network of the dataset distillation literature and of IDC
(Kim et al. 2022, arXiv 2205.14959). Parameters are ``conv{i}.weight/bias``, ``norm{i}.weight/bias`` for i =
0, 1, 2, and ``classifier.weight/bias``.
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpkit.models.layers import Norm, Normaliser, Weight
from dpkit.models.spec import ModelSpec
from dpkit.tree import Params

DEPTH = 3
CLASSIFIER = "classifier"


def table(spec: ModelSpec) -> list[Weight | Norm]:
    """All layers with tensors, in forward order."""
    layers: list[Weight | Norm] = []
    channels = spec.channels
    for i in range(DEPTH):
        layers.append(Weight(f"conv{i}", (spec.width, channels, 3, 3), bias=True))
        if spec.norm_kind != "none":
            layers.append(Norm(f"norm{i}", spec.width, tracked=spec.norm_kind == "batch"))
        channels = spec.width
    side = spec.image_size // 2**DEPTH
    layers.append(Weight(CLASSIFIER, (spec.classes, spec.width * side * side), bias=True))
    return layers


def features(spec: ModelSpec, params: Params, x: Tensor, norm: Normaliser) -> Tensor:
    """Images (N, channels, S, S) to the classifier's input (N, width * (S / 8)^2)."""
    for i in range(DEPTH):
        x = F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], padding=1)
        x = F.avg_pool2d(F.relu(norm(f"norm{i}", x)), 2)
    return x.flatten(1)
