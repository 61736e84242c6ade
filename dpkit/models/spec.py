"""Which network: the specification that every function of :mod:`dpkit.models` takes first."""
from __future__ import annotations

import dataclasses

from dpkit.spec import Spec

BLOCKS = {"resnet10": 1, "resnet18": 2, "resnet20": 3}
"""Basic blocks in each stage of a ResNet."""

NORMS = ("auto", "batch", "instance", "group", "layer", "none")
STEMS = ("cifar", "imagenet")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an architecture asks of a specification.

    norms: those that it can have; the first is what ``auto`` means. least: pixels of the smallest image. multiple: of what the
    image's side must be.  reason: why, for the refusal.
    """

    norms: tuple[str, ...]
    least: int
    multiple: int = 1
    reason: str = ""


_BATCH, _INSTANCE = ("batch", "instance", "group", "layer", "none"), ("instance", "batch", "group", "layer", "none")
RULES = {
    "convnet3": Rules(_INSTANCE, 8, 8, "three 2x2 pools"),
    "resnet10": Rules(_BATCH, 8),
    "resnet18": Rules(_BATCH, 8),
    "convnet4": Rules(_INSTANCE, 16, 16, "four 2x2 pools"),
    "resnet20": Rules(_BATCH, 8),
    "alexnet": Rules(("none", "batch", "instance", "group", "layer"), 8, reason="three 2x2 pools"),
    "vgg16": Rules(_BATCH, 16, reason="four 2x2 pools"),
    # one number a channel: instance norm would leave none of it
    "mlp": Rules(("none", "batch", "group", "layer"), 1),
    "vit": Rules(("layer", "none"), 8, 8, "patches on an 8x8 grid"),
}
ARCHITECTURES = tuple(RULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """A network architecture.

    arch: ``convnet3``, ``convnet4`` (that many blocks of convolution, norm, ReLU, average pool; Gidaris & Komodakis 2018,
        as used by IDC, arXiv 2205.14959); ``resnet10``, ``resnet18`` (He et al. 2016, arXiv 1512.03385; basic blocks, one or
        two in each of four stages); ``resnet20`` (the same paper's section 4.2: three blocks in each of three stages);
        ``alexnet`` (the five convolutions of DC's code, Zhao et al. 2021, arXiv 2006.05929); ``vgg16`` (Simonyan & Zisserman
        2015, arXiv 1409.1556, as in Frankle et al. 2020, arXiv 1912.05671); ``mlp`` (LeNet-300-100, LeCun et al. 1998);
        ``vit`` (Dosovitskiy et al. 2021, arXiv 2010.11929, six blocks on 64 patches).
    width: what the other sizes follow from: channels of every ConvNet layer; of the first ResNet stage (later stages double
        it), the first convolution of AlexNet and of VGG-16; units of the MLP's second hidden layer (the first has three times
        as many); dimensions of a ViT's tokens. Usual: 128 for ConvNets and AlexNet, 32 for ResNet-10/18 on CIFAR and 64 on
        ImageNet subsets, 16 for ResNet-20, 64 for VGG-16, 100 for the MLP, 192 for a ViT.
    norm: ``batch``; ``instance`` (affine); ``group`` (:func:`dpkit.models.layers.groups`); ``layer`` (over channels and
        positions of an image, in a ViT over the channels of a token); ``none``; or ``auto``: ``instance`` for ConvNets,
        ``batch`` for ResNets and VGG-16, ``layer`` for a ViT, ``none`` for AlexNet and the MLP.
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
        rules = RULES[self.arch]
        self.require(self.norm == "auto" or self.norm in rules.norms,
                     f"norm must be one of auto, {', '.join(rules.norms)} for {self.arch}, got {self.norm!r}")
        if self.is_resnet:
            # Four stages shrink the image 8 times after a cifar stem and 32 times after an imagenet stem.
            least = 32 if self.stem == "imagenet" else rules.least
            self.require(self.image_size >= least,
                         f"image_size must be at least {least} for {self.arch} with the {self.stem} stem, "
                         f"got {self.image_size}")
            return
        self.require(self.stem == "cifar",
                     f"stem applies to ResNets only; keep it cifar for {self.arch}, got {self.stem!r}")
        why = f" ({rules.reason})" if rules.reason else ""
        if rules.multiple > 1:
            self.require(self.image_size >= rules.least and self.image_size % rules.multiple == 0,
                         f"image_size must be a positive multiple of {rules.multiple} for {self.arch}{why}, "
                         f"got {self.image_size}")
        # What is behind the fourth pool of a VGG-16 needs two pixels a side: over one, instance norm leaves nothing.
        least = 32 if self.arch == "vgg16" and self.norm == "instance" else rules.least
        why = " with instance norm" if least > rules.least else why
        self.require(self.image_size >= least,
                     f"image_size must be at least {least} for {self.arch}{why}, got {self.image_size}")

    @property
    def is_resnet(self) -> bool:
        """Whether the architecture is one of the ResNets."""
        return self.arch in BLOCKS

    @property
    def norm_kind(self) -> str:
        """``batch``, ``instance``, ``group``, ``layer`` or ``none``: the norm with ``auto`` resolved."""
        return RULES[self.arch].norms[0] if self.norm == "auto" else self.norm
