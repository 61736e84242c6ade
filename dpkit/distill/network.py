"""The network that images are matched on, trained a little between two image steps: on real images (Kim et al. 2022, arXiv
2205.14959, section 4.3), or on the synthetic ones (Zhao et al. 2021, arXiv 2006.05929, algorithm 1)."""
from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models
from dpkit.data import AugmentSpec, Split, augment, cutmix
from dpkit.distill.spec import MatchingSpec
from dpkit.training.gradient import can_compile, loss, unbuilt
from dpkit.tree import Buffers, Params

#: momentum and weight decay of the network's SGD, by what it is trained on
SETTINGS = {"real": (0.9, 5e-4), "synthetic": (0.0, 0.0)}


@functools.lru_cache(maxsize=8)
def _compiled(model: models.ModelSpec, precision: str):
    return torch.compile(torch.func.grad(functools.partial(loss, model, precision=precision), has_aux=True), dynamic=False)


class Trainer:
    """Trains a matching network by SGD: on real images with momentum, weight decay, augmentation and CutMix, or plainly on the
    synthetic images, augmented as they are matched.

    real: the training images; pixels: the same, normalised, on the device, (N, C, H, W). What it does to a network on real images
    depends on these and the generator only, never on the synthetic images (``on_real``).
    """

    def __init__(self, spec: MatchingSpec, model: models.ModelSpec, real: Split, pixels: Tensor):
        self.spec, self.model, self.pixels = spec, model, pixels
        self.targets = real.targets(model.classes).to(pixels.device)
        self.on_real = spec.network_data == "real"
        self.count = min(spec.network_images, len(real)) if self.on_real else model.classes * spec.ipc * spec.factor**2
        self.momentum, self.weight_decay = SETTINGS[spec.network_data]
        self.augment = AugmentSpec() if self.on_real else spec.augment
        self.compiled = spec.compile and self.count * spec.network_epochs > 0 and can_compile()

    def __call__(self, params: Params, buffers: Buffers, velocity: Params, generator: torch.Generator,
                 images: Tensor | None = None, labels: Tensor | None = None) -> Buffers:
        """``network_epochs`` passes over ``network_images`` random real images, or over all synthetic ``images`` (normalised).

        labels: of the images, each for as many in turn as they decode into. ``params`` and ``velocity`` change in place; returns
        the buffers.
        """
        if images is None:
            pixels, targets = self.pixels, self.targets
        else:
            pixels = images.detach()
            targets = F.one_hot(labels, self.model.classes).float().repeat_interleave(len(pixels) // len(labels), 0)
            targets = targets.to(pixels.device, pixels.dtype, non_blocking=True)
        weights, momenta = list(params.values()), [velocity[name] for name in params]
        for _ in range(self.spec.network_epochs if self.count else 0):
            order = torch.randperm(len(pixels), generator=generator)[:self.count].to(pixels.device, non_blocking=True)
            for rows in order.split(self.spec.network_batch):
                x, y = augment(self.augment, pixels[rows], generator), targets[rows]
                if self.on_real:
                    x, y = cutmix(x, y, generator)
                gradients, buffers = self._gradients(params, buffers, x, y)
                with torch.no_grad():
                    torch._foreach_mul_(momenta, self.momentum)
                    torch._foreach_add_(momenta, torch._foreach_add(gradients, weights, alpha=self.weight_decay))
                    torch._foreach_sub_(weights, momenta, alpha=self.spec.network_lr)
        return buffers

    def _gradients(self, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> tuple[list[Tensor], Buffers]:
        # a last batch that is not whole would cost another compilation
        if self.compiled and len(x) == self.spec.network_batch:
            plain = {name: t.detach() for name, t in params.items()}
            try:
                found, new = _compiled(self.model, self.spec.precision)(
                    plain, buffers, x.contiguous(memory_format=torch.channels_last), y)
                return [found[name] for name in params], new
            except Exception as error:
                if not unbuilt(error):
                    raise
                self.compiled = False
                warnings.warn(f"training of {self.model.arch} cannot be compiled here ({type(error).__name__}): slower, with the "
                              "same mathematics", stacklevel=2)
        leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
        value, buffers = loss(self.model, leaves, buffers, x, y, self.spec.precision)
        return list(torch.autograd.grad(value, list(leaves.values()))), {n: b.detach() for n, b in buffers.items()}
