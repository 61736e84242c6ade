"""Which network: the specification that every function of :mod:`dpkit.models` takes first."""
from __future__ import annotations

import dataclasses

from dpkit.spec import Spec

BLOCKS = {"resnet10": 1, "resnet18": 2}
ARCHITECTURES = ("convnet3", *BLOCKS)
NORMS = ("auto", "batch", "instance", "none")
STEMS = ("cifar", "imagenet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """A network architecture.

    arch: ``convnet3`` (three blocks of convolution, norm, ReLU, average pool; Gidaris & Komodakis 2018, as
        used by IDC, arXiv 2205.14959), ``resnet10`` or ``resnet18`` (He et al. 2016; basic blocks, one or two
        a stage).
    width: channels of every ConvNet layer, or of the first ResNet stage (later stages double it). The paper
        takes 128 for the ConvNet, 32 for ResNets on CIFAR and 64 for ResNets on ImageNet subsets.
    norm: ``auto`` is ``instance`` (affine) for the ConvNet and ``batch`` for ResNets.
    image_size: height and width in pixels.  channels: of the image.  classes: number of outputs.
    stem: first layer of a ResNet: ``cifar`` is 3x3 with stride 1, ``imagenet`` is 7x7 with stride 2 and a max
        pool.

    Raises ``ValueError`` with one line when a field or a combination makes no sense.
    """

    arch: str = "convnet3"
    width: int = 128
    norm: str = "auto"
    image_size: int = 32
    channels: int = 3
    classes: int = 10
    stem: str = "cifar"

    def check(self) -> None:
        self.one_of("arch", ARCHITECTURES)
        self.one_of("norm", NORMS)
        self.one_of("stem", STEMS)
        self.require(self.width >= 1, f"width must be at least 1 channel, got {self.width}")
        self.require(self.channels >= 1, f"channels must be at least 1, got {self.channels}")
        self.require(self.classes >= 2, f"classes must be at least 2, got {self.classes}")
        if self.is_resnet:
            # Four stages shrink the image 8 times after a cifar stem and 32 times after an imagenet stem.
            least = 32 if self.stem == "imagenet" else 8
            self.require(self.image_size >= least,
                         f"image_size must be at least {least} for {self.arch} with the {self.stem} stem, "
                         f"got {self.image_size}")
        else:
            self.require(self.image_size >= 8 and self.image_size % 8 == 0,
                         f"image_size must be a positive multiple of 8 for {self.arch} (three 2x2 pools), "
                         f"got {self.image_size}")
            self.require(self.stem == "cifar",
                         f"stem applies to ResNets only; keep it cifar for {self.arch}, got {self.stem!r}")

    @property
    def is_resnet(self) -> bool:
        """Whether the architecture is one of the ResNets."""
        return self.arch in BLOCKS

    @property
    def norm_kind(self) -> str:
        """``batch``, ``instance`` or ``none``: the norm with ``auto`` resolved."""
        if self.norm != "auto":
            return self.norm
        return "batch" if self.is_resnet else "instance"
