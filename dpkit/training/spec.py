"""How a network is trained: the specification and the learning-rate schedules."""
from __future__ import annotations

import math
from dataclasses import dataclass, field

from dpkit.data import AugmentSpec
from dpkit.spec import Spec, later

SCHEDULES = ("multistep", "onecycle", "constant")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainSpec(Spec):
    """Stochastic gradient descent with momentum, defaults as in the paper's scripts.

    epochs: passes over the images, the last short batch of a pass included. lr: peak learning rate. weight_decay: added
    to the gradient of every parameter, biases and norms included, as ``torch.optim.SGD`` does. schedule: ``multistep``
    multiplies lr by ``gamma`` at the ``milestones`` (shares of all steps); ``onecycle`` rises linearly over ``warmup`` of
    the steps and falls linearly to zero; ``constant``. augment: what is done to each normalised image. cutmix: probability
    of CutMix for a batch; cutmix_beta: its Beta parameter. precision: ``fp32``, or ``bf16`` for the forward and backward
    pass with fp32 weights. compile: fuse the forward and backward pass with torch.compile (other bits, same mathematics).

    For short schedules, as in fast CIFAR training (Jordan 2024, arXiv 2404.00498); of its tricks only those that leave the
    network, its evaluation and the noise of SGD what they are. label_smoothing: share of each target that is spread evenly
    over the classes (Szegedy et al. 2016). nesterov: Nesterov's momentum, as ``torch.optim.SGD`` has it. alternating_flip:
    an image is mirrored in every second epoch, drawn once for its first, instead of by chance in each; needs ``flip`` among
    the operations.
    """

    epochs: int = 300
    batch_size: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "multistep"
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    gamma: float = 0.2
    warmup: float = 0.2
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    cutmix: float = 0.5
    cutmix_beta: float = 1.0
    precision: str = "fp32"
    compile: bool = False
    label_smoothing: float = later(0.0, before=0.0)
    nesterov: bool = later(False, before=False)
    alternating_flip: bool = later(False, before=False)

    def check(self) -> None:
        self.require(self.epochs >= 1, f"epochs must be >= 1, got {self.epochs}")
        self.require(self.batch_size >= 1, f"batch_size must be >= 1, got {self.batch_size}")
        self.require(self.lr > 0 and math.isfinite(self.lr), f"lr must be > 0, got {self.lr:g}")
        self.between("momentum", 0, 1, open_high=True)
        self.require(self.weight_decay >= 0, f"weight_decay must be >= 0, got {self.weight_decay:g}")
        self.one_of("schedule", SCHEDULES)
        self.one_of("precision", PRECISIONS)
        self.between("warmup", 0, 1, open_high=True)
        self.between("cutmix", 0, 1)
        inside = all(0 < m < 1 for m in self.milestones)
        self.require(inside, f"milestones must lie in (0, 1), got {list(self.milestones)}")
        self.between("label_smoothing", 0, 1, open_high=True)
        self.require(not self.nesterov or self.momentum > 0, "nesterov needs momentum > 0, got 0")
        self.require(not self.alternating_flip or "flip" in self.augment.names,
                     f"alternating_flip needs flip among the operations, got {self.augment.operations!r}")

    def steps_per_epoch(self, images: int) -> int:
        """Batches in one pass over ``images``."""
        return -(-images // self.batch_size)

    def steps(self, images: int) -> int:
        """Batches in the whole run."""
        return self.epochs * self.steps_per_epoch(images)

    def learning_rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` in [0, steps)."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "multistep":
            # an epoch's length never matters: milestones count shares of the steps
            passed = sum(step >= math.floor(m * steps) for m in self.milestones)
            return self.lr * self.gamma ** passed
        peak = self.warmup * steps
        if step < peak:
            return self.lr * (step + 1) / (math.floor(peak) + 1)
        return self.lr * (steps - step) / (steps - peak)
