"""The network that images are matched on, trained a little on real images between two image steps (Kim et al. 2022, 4.3)."""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from dpkit import models
from dpkit.data import AugmentSpec, Split, augment, cutmix
from dpkit.distill.spec import DistillSpec
from dpkit.training.gradient import can_compile, loss
from dpkit.tree import Buffers, Params

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@functools.lru_cache(maxsize=8)
def _compiled(model: models.ModelSpec, precision: str):
    return torch.compile(torch.func.grad(functools.partial(loss, model, precision=precision), has_aux=True), dynamic=False)


class Trainer:
    """Trains a matching network by SGD with momentum, augmentation and CutMix. What it does to a network depends on the real
    images and the generator only, never on the synthetic images.

    real: the training images; pixels: the same, normalised, on the device, (N, C, H, W).
    """

    def __init__(self, spec: DistillSpec, model: models.ModelSpec, real: Split, pixels: Tensor):
        self.spec, self.model, self.pixels = spec, model, pixels
        self.targets = real.targets(model.classes).to(pixels.device)
        self.count = min(spec.network_images, len(real))
        self.compiled = spec.compile and self.count > 0 and can_compile()
        self.augment = AugmentSpec()

    def __call__(self, params: Params, buffers: Buffers, velocity: Params, generator: torch.Generator) -> Buffers:
        """One pass over ``network_images`` random images. ``params`` and ``velocity`` change in place; returns the buffers."""
        if self.count == 0:
            return buffers
        weights, momenta = list(params.values()), [velocity[name] for name in params]
        order = torch.randperm(len(self.pixels), generator=generator)[:self.count].to(self.pixels.device)
        for rows in order.split(self.spec.network_batch):
            x = augment(self.augment, self.pixels[rows], generator)
            x, y = cutmix(x, self.targets[rows], generator)
            gradients, buffers = self._gradients(params, buffers, x, y)
            with torch.no_grad():
                torch._foreach_mul_(momenta, MOMENTUM)
                torch._foreach_add_(momenta, torch._foreach_add(gradients, weights, alpha=WEIGHT_DECAY))
                torch._foreach_sub_(weights, momenta, alpha=self.spec.network_lr)
        return buffers

    def _gradients(self, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> tuple[list[Tensor], Buffers]:
        # a last batch that is not whole would cost another compilation
        if self.compiled and len(x) == self.spec.network_batch:
            plain = {name: t.detach() for name, t in params.items()}
            found, buffers = _compiled(self.model, self.spec.precision)(
                plain, buffers, x.contiguous(memory_format=torch.channels_last), y)
            return [found[name] for name in params], buffers
        leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
        value, buffers = loss(self.model, leaves, buffers, x, y, self.spec.precision)
        return list(torch.autograd.grad(value, list(leaves.values()))), {n: b.detach() for n, b in buffers.items()}
