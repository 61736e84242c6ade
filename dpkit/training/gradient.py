"""Loss and gradient of a population of networks on its batches: one by one, or all at once with vmap.

One by one is the faster form on a CPU (measured: vmap over small convolutional networks is 1.7 to 2 times slower there);
vmap is the form for a GPU, where single small kernels leave the chip idle.
"""
from __future__ import annotations

import functools
import shutil
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models
from dpkit.tree import Buffers, Params


def loss(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, targets: Tensor,
         precision: str = "fp32") -> tuple[Tensor, Buffers]:
    """Mean cross-entropy of soft ``targets`` (B, K) on normalised ``images`` (B, C, H, W), and the new buffers."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits, buffers = models.forward(model, params, buffers, images, train=True)
    return F.cross_entropy(logits.float(), targets), buffers


@functools.lru_cache(maxsize=8)
def _loss_function(model: models.ModelSpec, precision: str, compiled: bool):
    function = functools.partial(loss, model, precision=precision)
    return torch.compile(function, dynamic=False) if compiled and can_compile() else function


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile can work here; says so once if not. Results differ from compiled ones by rounding only."""
    if torch.cuda.is_available() or any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return True
    warnings.warn("no C++ compiler found: training runs uncompiled, slower, with the same mathematics", stacklevel=2)
    return False


class Solo:
    """Gradients of P networks in turn, written into views of one flat gradient (P, n)."""

    def __init__(self, model: models.ModelSpec, precision: str, compiled: bool, weights: Tensor, like: Params):
        self.function = _loss_function(model, precision, compiled)
        self.gradient = torch.zeros_like(weights)
        self.networks = []
        for row, gradient in zip(weights, self.gradient, strict=True):
            views = {}
            for name, part, piece in _pieces(like, row, gradient):
                leaf = part.detach().requires_grad_()
                leaf.grad = piece  # backward accumulates in place, so the flat gradient fills without a copy
                views[name] = leaf
            self.networks.append(views)

    def __call__(self, buffers: Buffers, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor, Buffers]:
        """Losses (P,), flat gradient (P, n) and new buffers (P, ...) for batches of each network."""
        self.gradient.zero_()
        losses, updated = [], []
        for p, params in enumerate(self.networks):
            value, new = self.function(params, {name: b[p] for name, b in buffers.items()}, images[p], targets[p])
            value.backward()
            losses.append(value.detach())
            updated.append(new)
        merged = {name: torch.stack([new[name].detach() for new in updated]) for name in buffers}
        return torch.stack(losses), self.gradient, merged


class Vmapped:
    """Gradients of P networks in one pass of ``torch.func.vmap`` over ``torch.func.grad_and_value``."""

    def __init__(self, model: models.ModelSpec, precision: str, compiled: bool, weights: Tensor, like: Params):
        def one(params, buffers, images, targets):
            return loss(model, params, buffers, images, targets, precision)

        function = torch.func.vmap(torch.func.grad_and_value(one, has_aux=True))
        self.function = torch.compile(function, dynamic=False) if compiled and can_compile() else function
        sizes = [t[0].numel() for t in like.values()]
        self.views = {name: part.view(t.shape)
                      for (name, t), part in zip(like.items(), weights.split(sizes, dim=1), strict=True)}

    def __call__(self, buffers: Buffers, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor, Buffers]:
        """As :meth:`Solo.__call__`; all batches must have one size."""
        gradients, (losses, updated) = self.function(self.views, buffers, torch.stack(images), torch.stack(targets))
        flat = torch.cat([gradients[name].reshape(len(losses), -1) for name in self.views], 1)
        return losses.detach(), flat, {name: b.detach() for name, b in updated.items()}


def _pieces(like: Params, row: Tensor, gradient: Tensor):
    """Name, weight view and gradient view of each tensor of one network; ``like`` carries the leading axis P."""
    start = 0
    for name, tensor in like.items():
        shape, size = tensor.shape[1:], tensor[0].numel()
        yield name, row[start:start + size].view(shape), gradient[start:start + size].view(shape)
        start += size
