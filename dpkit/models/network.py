"""The public functions on networks; each dispatches on the architecture."""
from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit.models import convnet, mlp, resnet, vit
from dpkit.models.checks import check_images
from dpkit.models.layers import Normaliser, Weight
from dpkit.models.spec import ModelSpec
from dpkit.tree import Buffers, Params

FAMILIES = {"mlp": mlp, "vit": vit}


def family(spec: ModelSpec) -> ModuleType:
    """The module of the architecture.

    It holds ``table`` (a list of :data:`dpkit.models.layers.Layer`: weights, norms, embeddings), ``features`` (images to the
    classifier's input), ``geometry`` (positions that each weight layer reads and writes) and ``CLASSIFIER``, the name of the
    last linear layer.
    """
    return resnet if spec.is_resnet else FAMILIES.get(spec.arch, convnet)


def init(spec: ModelSpec, generator: torch.Generator) -> tuple[Params, Buffers]:
    """A network at initialisation: (params, buffers), float32 on the CPU.

    Weights and biases follow PyTorch's default, uniform on +-1/sqrt(fan_in), drawn in forward order from the
    CPU ``generator`` alone; norms start at scale 1 and shift 0, running means at 0 and running variances at
    1. A ViT's positions are normal with deviation 0.02.
    """
    params: Params = {}
    buffers: Buffers = {}
    for layer in family(spec).table(spec):
        params.update(layer.init(generator))
        buffers.update(layer.buffers())
    return params, buffers


def forward(spec: ModelSpec, params: Params, buffers: Buffers, x: Tensor,
            train: bool = False) -> tuple[Tensor, Buffers]:
    """Logits (N, classes) of normalised images ``x`` (N, channels, S, S), and the buffers after this pass.

    With ``train`` BatchNorm normalises by the batch and the returned running statistics have moved towards it
    by a tenth (variance with n - 1, as in PyTorch); otherwise the buffers come back as they were. Pure:
    nothing that is passed in changes. Raises ``ValueError`` when ``x`` has another shape than the
    specification says.
    """
    check_images(spec, x)
    norm = Normaliser(spec.norm_kind, params, buffers, train)
    return _classify(spec, params, family(spec).features(spec, params, x, norm)), norm.updated


def _classify(spec: ModelSpec, params: Params, inputs: Tensor) -> Tensor:
    name = classifier_name(spec)
    return F.linear(inputs, params[f"{name}.weight"], params[f"{name}.bias"])


def features(spec: ModelSpec, params: Params, buffers: Buffers, x: Tensor) -> Tensor:
    """The classifier's input (N, D) in eval mode, for normalised images ``x`` (N, channels, S, S)."""
    check_images(spec, x)
    return family(spec).features(spec, params, x, Normaliser(spec.norm_kind, params, buffers, train=False))


def prunable(spec: ModelSpec) -> tuple[str, ...]:
    """Names of all convolution and linear weights in forward order, stem, shortcuts, classifier included.

    Biases, norms and a ViT's positions are not among them.
    """
    return tuple(f"{layer.name}.weight" for layer in family(spec).table(spec) if isinstance(layer, Weight))


def count_prunable(spec: ModelSpec) -> int:
    """How many entries the prunable weights have together."""
    return sum(math.prod(layer.shape) for layer in family(spec).table(spec) if isinstance(layer, Weight))


def classifier_name(spec: ModelSpec) -> str:
    """Name of the last linear layer, without ``.weight``."""
    return family(spec).CLASSIFIER


def statistics(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the BatchNorm means and variances among the buffers; none for a network without BatchNorm."""
    return tuple(name for layer in family(spec).table(spec) for name in layer.buffers())
