"""The loss as a function of the surviving weights: what measures of sharpness move about in."""
from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models, tree
from dpkit.hessian.checks import check_labels, full_precision, subset
from dpkit.hessian.spec import DTYPES, SCOPES
from dpkit.hessian.weights import Weights
from dpkit.models import ModelSpec
from dpkit.tree import Buffers, Mask, Params

CHUNK = 100
"""Images that are passed at once; time and memory only."""


class Objective(Protocol):
    """A function of n numbers with its gradient, at a point of interest.

    Measures of sharpness need nothing else, so a test can hand them a quadratic whose sharpness is known.
    """

    weights: Tensor
    """The point (n,)."""

    def value(self, point: Tensor) -> float:
        """The function at a point (n,)."""

    def gradient(self, point: Tensor) -> tuple[float, Tensor]:
        """The function and its gradient (n,) there."""


class NetworkLoss(Weights):
    """L(w), the mean cross-entropy over fixed images in eval mode, w the surviving weights as one vector (n,).

    Arguments, order of the entries and refusals are those of :class:`dpkit.hessian.Operator`, whose matrix is the second
    derivative of this function at ``weights``; pruned entries stay 0 wherever it is evaluated. Losses of images are added up in
    float64, so that small differences between two points are not lost in the sum.

    Attributes: weights (n,), size n, dtype, device, names, and loss, the value at ``weights`` (nats). Raises ``ValueError``
    where the arguments do not fit or the loss at ``weights`` is not finite.
    """

    def __init__(self, model: ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
                 mask: Mask | None = None, names: Iterable[str] | None = None, chunk: int = CHUNK,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(model, params, mask, names, dtype, include_pruned=False)
        if chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        self._buffers = tree.to(tree.detach(buffers), dtype=self.dtype)
        check_labels(images, labels, model.classes)
        self._images = images.to(device=self.device, dtype=self.dtype)
        self._labels = labels.to(self.device, self.dtype if labels.is_floating_point() else torch.int64)
        self._chunk = chunk
        self.weights = self.flatten(self._weights).detach()
        self.loss = self.value(self.weights)
        if not math.isfinite(self.loss):
            raise ValueError(f"the loss must be finite, got {self.loss}; the network has diverged or the images are not finite")

    @torch.no_grad()
    def value(self, point: Tensor) -> float:
        """L at a point (n,), nats; not finite where the network overflows."""
        weights = self._at(point)
        with full_precision():
            return sum(float(self._losses(weights, chunk).double().sum()) for chunk in self._chunks()) / len(self._images)

    @torch.enable_grad()
    def gradient(self, point: Tensor) -> tuple[float, Tensor]:
        """L and its gradient (n,) at a point (n,), by one pass forwards and backwards."""
        total, slope = 0.0, torch.zeros(self.size, dtype=self.dtype, device=self.device)
        weights = {name: t.requires_grad_() for name, t in self._at(point).items()}
        with full_precision():
            for chunk in self._chunks():
                losses = self._losses(weights, chunk)
                parts = torch.autograd.grad(losses.sum(), tuple(weights.values()), materialize_grads=True)
                slope += self.flatten(dict(zip(self.names, parts, strict=True)))
                total += float(losses.detach().double().sum())
        return total / len(self._images), slope / len(self._images)

    @torch.enable_grad()
    def logits_along(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) at ``weights`` and their derivative (N, K) along ``vector`` (n,), d f(w + t v) / dt at t = 0.

        J v is the derivative of J'u with respect to u, in reverse mode twice: the backward pass of group normalisation has no
        forward mode.
        """
        weights = {name: t.requires_grad_() for name, t in self._at(self.weights).items()}
        along = tuple(self._at(vector).values())
        logits, derivatives = [], []
        with full_precision():
            for chunk in self._chunks():
                out = self._logits(weights, chunk)
                dummy = torch.zeros_like(out, requires_grad=True)
                back = torch.autograd.grad(out, tuple(weights.values()), dummy, create_graph=True, materialize_grads=True)
                inner = sum((one * other).sum() for one, other in zip(back, along, strict=True))
                derivatives.append(torch.autograd.grad(inner, dummy)[0])
                logits.append(out.detach())
        return torch.cat(logits), torch.cat(derivatives)

    @property
    def targets(self) -> Tensor:
        """(N, K): the labels as probabilities."""
        if self._labels.is_floating_point():
            return self._labels
        return F.one_hot(self._labels, self.model.classes).to(self.dtype)

    def batches(self, size: int) -> Iterator[Self]:
        """The loss over each ``size`` images in turn; a last group of fewer is left out.

        Mean sharpness over batches of m images is m-sharpness (Foret et al. 2021, arXiv 2010.01412, section 4.1). Raises
        ``ValueError`` unless size lies in [1, N].
        """
        if not 1 <= size <= len(self._images):
            raise ValueError(f"a batch must have from 1 to {len(self._images)} images (those given), got {size}")
        for start in range(0, len(self._images) - size + 1, size):
            part = copy.copy(self)
            part._images, part._labels = self._images[start:start + size], self._labels[start:start + size]
            part.loss = part.value(part.weights)
            yield part

    def _at(self, point: Tensor) -> Params:
        """The weights at a point (n,), without a graph and without memory shared with it."""
        return {name: t.clone() for name, t in self.unflatten(point.detach().to(self.device, self.dtype)).items()}

    def _chunks(self) -> Iterator[slice]:
        return (slice(start, start + self._chunk) for start in range(0, len(self._images), self._chunk))

    def _logits(self, weights: Params, chunk: slice) -> Tensor:
        return models.forward(self.model, {**self._fixed, **weights}, self._buffers, self._images[chunk])[0]

    def _losses(self, weights: Params, chunk: slice) -> Tensor:
        return F.cross_entropy(self._logits(weights, chunk), self._labels[chunk], reduction="none")


def fixed_loss(model: ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor, mask: Mask | None = None, *,
               count: int, scope: str = "weights", dtype: str = "float32", chunk: int = CHUNK) -> NetworkLoss:
    """The loss over the fixed, class-balanced :func:`dpkit.hessian.subset` of ``count`` images, as Hessians are measured on.

    scope: ``weights``, the prunable weights, or ``all`` parameters; dtype: ``float32`` or ``float64``. Raises ``ValueError`` for
    other words, as :class:`NetworkLoss` does, and where there are fewer images.
    """
    for word, value, allowed in (("scope", scope, SCOPES), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"{word} must be one of {', '.join(allowed)}; got {value!r}")
    index = subset(labels, count)
    names = models.prunable(model) if scope == "weights" else tuple(params)
    return NetworkLoss(model, params, buffers, images[index.to(images.device)], labels[index.to(labels.device)], mask, names,
                       chunk, getattr(torch, dtype))
