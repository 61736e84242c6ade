"""What a distillation is asked for, and the recipe that travels with what it gives."""
from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dpkit.data import AugmentSpec, Split
from dpkit.distill.decode import decode
from dpkit.spec import Spec, later
from dpkit.training import TrainSpec

METHODS = ("idc", "random", "herding")
DISTANCES = ("squared", "l1", "cosine")


@dataclass(frozen=True, kw_only=True)
class DistillSpec(Spec):
    """How to make a small training set; defaults as IDC's on CIFAR-10 (Kim et al. 2022, arXiv 2205.14959).

    method: ``idc`` learns images, ``random`` and ``herding`` choose real ones. ipc: stored images per class. factor: each
    stored image decodes into factor x factor training images (1: itself).

    For ``idc`` only. outer: times a fresh network is drawn; inner: image steps on each. lr: image learning rate at ten
    images a class (it grows with ipc / 10). distance: between gradients, summed over the convolution weights.
    real_batch: real images per class and step; synthetic_batch: at most so many decoded ones. augment: drawn once per class
    and step and shared by both. network_images: real images that the network is trained on after each image step, with
    CutMix and the settings network_lr, network_batch. precision: ``fp32``, or ``bf16`` for the passes through the network.
    compile: fuse the matching step with torch.compile (other bits, same mathematics); pays from minutes of matching on.
    """

    method: str = "idc"
    ipc: int = 10
    factor: int = 2
    outer: int = 2000
    inner: int = 100
    lr: float = 5e-3
    distance: str = "squared"
    real_batch: int = 64
    synthetic_batch: int = 128
    augment: AugmentSpec = field(default_factory=lambda: AugmentSpec(operations="color_crop_cutout"))
    network_images: int = 2000
    network_batch: int = 64
    network_lr: float = 0.01
    precision: str = "fp32"
    compile: bool = later(False, before=False)

    def check(self) -> None:
        self.one_of("method", METHODS)
        self.one_of("distance", DISTANCES)
        self.one_of("precision", ("fp32", "bf16"))
        for name in ("ipc", "factor", "outer", "inner", "real_batch", "synthetic_batch", "network_batch"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        self.require(self.network_images >= 0, f"network_images must be >= 0, got {self.network_images}")
        self.require(self.lr > 0 and self.network_lr > 0, f"lr and network_lr must be > 0, got {self.lr}, {self.network_lr}")
        self.require(self.method == "idc" or self.factor == 1,
                     f"factor must be 1 for method {self.method}, which stores whole real images; got {self.factor}")


@dataclass(frozen=True)
class Distilled:
    """A small set with its recipe, the settings without which such sets do not give their accuracy.

    split: the stored images (K * ipc, C, H, W) float32 in [0, 1] and labels. factor: how they decode. mean, std: (C,)
    normalisation. train: the training to use. history: one value for each outer iteration (the matching distance).
    """

    split: Split
    factor: int
    mean: Tensor
    std: Tensor
    train: TrainSpec
    history: tuple[float, ...] = ()

    def decoded(self) -> Split:
        """The training images: (K * ipc * factor^2, C, H, W) float32 in [0, 1]."""
        return decode(self.split, self.factor)
