"""DC and DSA: dataset condensation with gradient matching (Zhao et al. 2021, arXiv 2006.05929), and with differentiable siamese
augmentation (Zhao and Bilen 2021, arXiv 2102.08259).

The gradients of all weights are compared by one minus their cosine for each output channel, all classes are stepped together by
SGD with momentum, and between two image steps the network is trained on the synthetic images themselves. DSA draws one
augmentation for the real and the synthetic images of a class, and starts from real images.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dpkit.data import AugmentSpec
from dpkit.distill.interface import Made, Task
from dpkit.distill.learn import learn
from dpkit.distill.spec import MatchingSpec


@dataclass(frozen=True, kw_only=True)
class DCSpec(MatchingSpec):
    """DC's settings; defaults as the authors' code has them for CIFAR-10 at ten images a class.

    At one image a class it takes one image step a network (``inner`` 1), at fifty it takes 50, with 10 ``network_epochs``
    between them.
    """

    method = "dc"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)  # bf16 has been measured for IDC only
    distance: str = "cosine"
    real_batch: int = 256
    augment: AugmentSpec = field(default_factory=lambda: AugmentSpec(operations=""))
    network_batch: int = 256
    momentum: float = 0.5
    start: str = "noise"
    space: str = "normalised"
    matched: str = "weights"
    network_data: str = "synthetic"
    network_epochs: int = 50


@dataclass(frozen=True, kw_only=True)
class DSASpec(DCSpec):
    """DSA's settings: DC's with an augmentation, from real images."""

    method = "dsa"
    augment: AugmentSpec = field(default_factory=lambda: AugmentSpec(operations="color_crop_cutout_flip_scale_rotate",
                                                                     single=True))
    start: str = "real"


def dc(spec: DCSpec, task: Task, form: str = "auto") -> Made:
    """Learn ``ipc`` images per class; history: the matching distance of each outer iteration. See :func:`learn`."""
    return learn(spec, task, rate=spec.lr, form=form)


def dsa(spec: DSASpec, task: Task, form: str = "auto") -> Made:
    """As :func:`dc`, with the augmentation shared by real and synthetic images."""
    return learn(spec, task, rate=spec.lr, form=form)
