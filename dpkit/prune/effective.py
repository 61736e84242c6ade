"""Which surviving weights matter at all: those on a path from an input to an output.

Vysogorets and Kempe 2023 (arXiv 2107.02306) call the share of weights on no such path, removed ones included, the effective
sparsity. A survivor whose inputs all died computes zero for ever, and one that nothing reads has no gradient.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpkit import models
from dpkit.models.network import family
from dpkit.prune import masks
from dpkit.tree import Mask


def effective(model: models.ModelSpec, mask: Mask) -> Mask:
    """The survivors of ``mask`` on at least one path from an input number to a logit, as a mask.

    Every survivor has weight one, biases are zero, norms do nothing, maxima become means: the sum of the logits on an image of
    ones then counts paths, each with a positive factor, and its derivative with respect to a weight is zero exactly
    where no path goes through it (sums of nonnegative float64 numbers on the CPU, so nothing cancels). A tap that reads padding
    only, as at the border of a 1 x 1 map, is on no path even in a dense network.

    Attention passes every value on to every token, and queries and keys act through their products: softmax(s) becomes
    (1 + s / max s) / T. So a weight of a query counts where a key has the same dimension and a value of the head goes on, and the
    other way round; without queries or keys attention is uniform and values still pass.

    Raises ``ValueError`` where the mask is not of ``model``.
    """
    masks.check_model(mask, model)
    weights = {name: m.to("cpu", torch.float64).requires_grad_() for name, m in mask.items()}
    with torch.enable_grad(), _Positive():
        flow = path_sum(model, weights)
    slopes = torch.autograd.grad(flow, list(weights.values()))
    return {name: m & (slope > 0).to(m.device) for (name, m), slope in zip(mask.items(), slopes, strict=True)}


def path_sum(model: models.ModelSpec, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of the logits on one image of ones, a scalar, for the prunable ``weights``; no biases, norms or positions.

    With nonnegative weights every activation is nonnegative and ReLU does nothing, so without maxima and attention this is the
    sum over all paths of the product of their weights.
    """
    like = next(iter(weights.values()))
    shapes = {name: shape for layer in family(model).table(model) for name, shape in layer.shapes().items()}
    network = {name: weights[name] if name in weights else like.new_zeros(shape) for name, shape in shapes.items()}
    image = like.new_ones(1, model.channels, model.image_size, model.image_size)
    inputs = family(model).features(model, network, image, lambda name, x: x)
    return F.linear(inputs, network[f"{models.classifier_name(model)}.weight"]).sum()


class _Positive(TorchFunctionMode):
    """Runs an architecture's own code with functions that pass on what every position carries: means for maxima, and so on."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.max_pool2d, torch.max_pool2d):
            shared = ("input", "kernel_size", "stride", "padding", "ceil_mode")
            return F.avg_pool2d(*args, **{name: value for name, value in kwargs.items() if name in shared})
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            scores = args[0]
            most = scores.detach().max()
            return (1 + scores / torch.where(most > 0, most, 1.0)) / scores.shape[-1]
        return func(*args, **kwargs)
