"""Scores that need no trained network: SNIP, GraSP and SynFlow, for pruning at initialisation.

All of them are written so that the weights with the HIGHEST score are kept.
"""
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models
from dpkit.prune import masks
from dpkit.prune.effective import path_sum
from dpkit.prune.iterate import PruneSpec, select
from dpkit.tree import Buffers, Mask, Params, is_finite


def snip(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor, mask: Mask, *,
         train: bool = True, batch_size: int | None = None) -> Params:
    """Connection sensitivity ``|w * dL/dw|`` (Lee et al. 2019, arXiv 1810.02340; their normalisation changes no ranking).

    images: normalised (N, C, H, W), one mini-batch in the paper. labels: (N,) classes or (N, K) probabilities; L is the
    mean cross-entropy over all images. mask: survivors so far; removed weights are zero in the network and score zero.
    train: BatchNorm uses the batch's own statistics, as in the published code; the buffers never change. batch_size: images
    of a pass, None for all at once. Returns one score >= 0 for each weight. Raises ``ValueError`` where images and
    labels disagree, the mask does not fit, or a score is no finite number.
    """
    weights, network = _leaves(params, mask)
    total = [torch.zeros_like(w) for w in weights]
    for loss in _losses(model, network, buffers, images, labels, train, batch_size, 1.0):
        total = [t + g for t, g in zip(total, torch.autograd.grad(loss, weights), strict=True)]
    return _finite({n: (w.detach() * g).abs() for n, w, g in zip(mask, weights, total, strict=True)}, "SNIP")


def grasp(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor, mask: Mask, *,
          temperature: float = 200.0, train: bool = True, batch_size: int | None = None) -> Params:
    """Gradient signal preservation ``w * (H g)`` (Wang et al. 2020, arXiv 2002.07376, eq. 8).

    g and H are gradient and Hessian, over the surviving weights, of the mean cross-entropy of logits divided by ``temperature``
    (200 in the published code). The paper's score is ``S = -w * H g`` and it REMOVES the highest: taking a weight away
    changes the squared gradient norm by about ``2 S``, so what is kept would have lowered it most. This is ``-S``, so
    that here as everywhere the highest are kept; scores have either sign. Departure: the published code draws linear layers anew
    before it scores them; here they are as given.

    Arguments and errors as for :func:`snip`; ``temperature`` must be positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    weights, network = _leaves(params, mask)
    flow = [torch.zeros_like(w) for w in weights]
    for loss in _losses(model, network, buffers, images, labels, train, batch_size, temperature):
        flow = [f + g for f, g in zip(flow, torch.autograd.grad(loss, weights), strict=True)]
    flow = [torch.where(m, f, torch.zeros_like(f)) for m, f in zip(mask.values(), flow, strict=True)]
    product = [torch.zeros_like(w) for w in weights]
    for loss in _losses(model, network, buffers, images, labels, train, batch_size, temperature):
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        inner = sum((f * s).sum() for f, s in zip(flow, slopes, strict=True))
        product = [p + h for p, h in zip(product, torch.autograd.grad(inner, weights), strict=True)]
    return _finite({n: w.detach() * p for n, w, p in zip(mask, weights, product, strict=True)}, "GraSP")


def synflow_scores(model: models.ModelSpec, params: Params, mask: Mask) -> Params:
    """Synaptic flow ``|w| * dR/d|w|`` >= 0 in float64 (Tanaka et al. 2020, arXiv 2006.05467).

    R is the sum of the logits of the network of absolute weights on one image of ones. Biases count as zero, as in the paper's
    R, a product of weights (the published networks begin with biases of zero where there are any); norms do nothing, which is
    what BatchNorm in eval mode with fresh statistics does up to its epsilon; max pools stay. Along a chain of layers the
    scores of each layer then add up to R: the conservation that keeps layers from collapsing. A residual network can lose a
    shortcut, as the flow has another way.

    Raises ``ValueError`` for a vision transformer, whose attention is not linear in its weights, where the mask does not
    fit, and where it lets nothing through.
    """
    if model.arch == "vit":
        raise ValueError("SynFlow needs a network that is linear in each layer's absolute weights, got vit, whose attention is "
                         "not; use snip or grasp")
    masks.check_model(mask, model)
    weights = {n: torch.where(m, params[n].detach().double().abs(), 0.0).requires_grad_() for n, m in mask.items()}
    with torch.enable_grad():
        flow = path_sum(model, weights)
    if not 0 < flow.item() < math.inf:
        raise ValueError(f"SynFlow needs a path of finite weights from input to output, but the flow is {flow.item():g}; "
                         "keep more weights, or begin with another mask")
    slopes = torch.autograd.grad(flow, list(weights.values()))
    return {n: w.detach() * s for (n, w), s in zip(weights.items(), slopes, strict=True)}


def synflow(model: models.ModelSpec, params: Params, buffers: Buffers, mask: Mask, count: int, iterations: int = 100, *,
            spec: PruneSpec | None = None) -> Mask:
    """The mask of ``count`` weights by iterative synaptic flow pruning (Tanaka et al. 2020, arXiv 2006.05467, algorithm 1).

    Each of the ``iterations`` scores the network masked so far by :func:`synflow_scores` and keeps the highest; after k of n
    there are ``s (count / s)^(k / n)`` of the ``s`` weights that ``mask`` has, rounded, so the last leaves exactly
    ``count``. No data is used, and no ``buffers``, as norms do nothing. spec: whose allocation and spared layers hold in
    every iteration, as in :func:`dpkit.prune.iterate.select`; None ranks all tensors together, as published. Raises
    ``ValueError`` as these functions do, and unless ``iterations`` is at least 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    first = masks.surviving(mask)
    if not 1 <= count <= first:
        raise ValueError(f"count must lie in [1, {first}], the surviving weights; got {count}")
    for done in range(1, iterations + 1):
        left = count if done == iterations else round(first * (count / first) ** (done / iterations))
        mask = select(spec or PruneSpec(), synflow_scores(model, params, mask), mask, left, model=model)
    return mask


def _leaves(params: Params, mask: Mask) -> tuple[list[Tensor], Params]:
    """The masked prunable weights as leaves of a graph, and the network that holds them."""
    masked = {name: t.detach() for name, t in masks.apply(params, mask).items()}
    weights = {name: masked[name].clone().requires_grad_() for name in mask}
    return list(weights.values()), masked | weights


def _losses(model: models.ModelSpec, network: Params, buffers: Buffers, images: Tensor, labels: Tensor, train: bool,
            batch_size: int | None, temperature: float) -> Iterator[Tensor]:
    """Cross-entropy of each batch, weighted so that their sum is the mean over all images."""
    models.check_evaluation(images, labels)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None for all images, got {batch_size}")
    size = batch_size or len(images)
    with torch.enable_grad():
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            logits, _ = models.forward(model, network, buffers, x, train=train)
            yield F.cross_entropy(logits / temperature, y) * (len(x) / len(images))


def _finite(scores: Params, what: str) -> Params:
    if not is_finite(scores):
        raise ValueError(f"{what} scores must be finite numbers, got NaN or infinity; are weights and images finite?")
    return scores
