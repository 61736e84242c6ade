"""Where batches come from: data that stay on the device, and one pass of augmentation over many batches.

The order of epoch e depends on (seed, e), the augmentation of a batch on (seed, step) alone, so that any step can be
reproduced without the ones before it. That is what makes resuming exact, and what lets the tables of random numbers of many
steps be drawn ahead and applied together, which changes no bit of any batch.
"""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit import tree
from dpkit.data import Mix, Split, apply, apply_cutmix, draw_cutmix, normalise, table, uniforms
from dpkit.training.spec import TrainSpec

#: Pixel values (N x C x H x W) augmented in one pass. More than one batch pays for small images only on a processor, whose caches
#: are the limit (measured: four batches of 16 x 16, one of 32 x 32); on a GPU a pass costs launches, whatever it holds.
TOGETHER = {"cpu": 200_000, "cuda": 100_000_000}


class Batches:
    """The batches of runs over one split.

    split: real images (uint8) or a small set (float32); it is kept as it is on ``device`` and normalised a batch at a time.
    mean, std: (C,). classes: K.
    """

    def __init__(self, spec: TrainSpec, split: Split, mean: Tensor, std: Tensor, classes: int,
                 device: torch.device | str = "cpu"):
        self.spec, self.device = spec, torch.device(device)
        self.images, self.mean, self.std = (t.to(self.device) for t in (split.images, mean, std))
        targets = split.targets(classes)
        if spec.label_smoothing > 0:
            targets = targets * (1 - spec.label_smoothing) + spec.label_smoothing / classes
        self.targets = targets.to(self.device)
        self.per_epoch = spec.steps_per_epoch(len(split))
        self._orders: dict[int, tuple[int, Tensor]] = {}  # seed -> (epoch, order)
        self._mirrored: dict[int, Tensor] = {}

    def step(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Batch number ``step`` of the run with noise ``seed``: images (B, C, H, W), targets (B, K)."""
        epoch, position = divmod(step, self.per_epoch)
        return self.take(seed, epoch, position, 1)[0]

    def take(self, seed: int, epoch: int, position: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """``count`` batches of one epoch from ``position`` on (fewer at its end): normalised, augmented, mixed.

        Nothing here waits for the device: all that is drawn is drawn, and all that is decided is decided, on the CPU.
        """
        spec, size = self.spec, self.spec.batch_size
        rows = self._order(seed, epoch)[position * size:(position + count) * size]
        parts = rows.split(size)
        generators = [tree.generator_for(seed, "augment", epoch * self.per_epoch + position + i) for i in range(len(parts))]
        there = rows.to(self.device, non_blocking=True)
        images, targets = normalise(self.images[there], self.mean, self.std), self.targets[there]
        if spec.augment.names:
            uniform = torch.cat([uniforms(len(part), g) for part, g in zip(parts, generators, strict=True)])
            if spec.alternating_flip:
                # 0 is below any probability of a flip and 1 above
                mirrored = self._mirror(seed)[rows] ^ bool(epoch % 2)
                uniform[:, 6] = (~mirrored).float()
            images = apply(spec.augment, images, table(spec.augment, uniform))
        if spec.cutmix > 0 and spec.cutmix_beta > 0:
            shape = (images.shape[2], images.shape[3])
            mixes = [draw_cutmix(len(part), shape, g, beta=spec.cutmix_beta, probability=spec.cutmix)
                     for part, g in zip(parts, generators, strict=True)]
            images, targets = apply_cutmix(images, targets, Mix.join(mixes))
        return list(zip(images.split(size), targets.split(size), strict=True))

    def together(self, population: int = 1) -> int:
        """How many batches are best made in one :meth:`take` for each of so many networks on this device."""
        values = self.spec.batch_size * self.images[0].numel() * population
        return max(1, TOGETHER.get(self.device.type, TOGETHER["cuda"]) // values)

    def _order(self, seed: int, epoch: int) -> Tensor:
        if self._orders.get(seed, (None,))[0] != epoch:
            self._orders[seed] = (epoch, torch.randperm(len(self.images), generator=tree.generator_for(seed, "order", epoch)))
        return self._orders[seed][1]

    def _mirror(self, seed: int) -> Tensor:
        """Which images the first epoch mirrors: (N,) bool, half of them by chance."""
        if seed not in self._mirrored:
            self._mirrored[seed] = torch.rand(len(self.images), generator=tree.generator_for(seed, "mirror")) < 0.5
        return self._mirrored[seed]
