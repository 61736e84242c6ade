"""What gradient matching is asked for; IDC, DC and DSA are three sets of these settings."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dpkit.data import AugmentSpec
from dpkit.distill.interface import MethodSpec
from dpkit.spec import later

DISTANCES = ("squared", "l1", "cosine")
SECOND = 4  # activations that a matching step keeps for a synthetic image, in those of a plain backward pass (measured)


@dataclass(frozen=True, kw_only=True)
class MatchingSpec(MethodSpec):
    """How images are learned by gradient matching; see :func:`dpkit.distill.learn.learn`.

    factor: each stored image decodes into factor x factor training images (1: itself). start: from ``real`` images, packed
    into mosaics, or from ``noise``, standard normal after normalising. space: the stored values are ``pixels``, kept in
    [0, 1], or ``normalised`` ones without bounds; lr is per unit of it.

    outer: times a network is drawn; inner: image steps on each. networks: ``fresh`` ones at initialisation, or of a ``pool``
    of trained networks, each at some time of its training. lr: image learning rate; momentum: of the images' SGD.

    matched: gradients of the ``convolutions`` or of all ``weights``, the classifier's included; never biases and norms.
    distance: between them, ``squared``, ``l1`` or ``cosine``. real_batch: real images per class and step; synthetic_batch: at
    most so many decoded ones. augment: drawn once per class and step and shared by both.

    After each image step but the last the network is trained: network_data: on ``real`` images (with DSA and CutMix, momentum
    and weight decay) or on the ``synthetic`` ones (augmented as they are matched, plain SGD); network_images: on so many real
    ones; network_epochs: passes; network_batch, network_lr. precision: ``fp32``, or ``bf16`` for the passes through the network.
    compile: fuse the matching step with torch.compile (other bits, same mathematics); pays from minutes of matching on.
    """

    #: shown to keep the accuracy of the set within noise (five seeds, the page on performance)
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")

    factor: int = 1
    outer: int = 1000
    inner: int = 10
    lr: float = 0.1
    distance: str = "squared"
    real_batch: int = 64
    synthetic_batch: int = 128
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    network_images: int = 2000
    network_batch: int = 64
    network_lr: float = 0.01
    precision: str = "fp32"
    compile: bool = later(False, before=False)
    momentum: float = later(0.0, before=0.0)
    start: str = later("real", before="real")
    space: str = later("pixels", before="pixels")
    matched: str = later("convolutions", before="convolutions")
    networks: str = later("fresh", before="fresh")
    network_data: str = later("real", before="real")
    network_epochs: int = later(1, before=1)

    def check(self) -> None:
        super().check()
        self.one_of("distance", DISTANCES)
        self.one_of("precision", self.precisions)
        self.one_of("start", ("real", "noise"))
        self.one_of("space", ("pixels", "normalised"))
        self.one_of("matched", ("convolutions", "weights"))
        self.one_of("networks", ("fresh", "pool"))
        self.one_of("network_data", ("real", "synthetic"))
        for name in ("factor", "outer", "inner", "real_batch", "synthetic_batch", "network_batch"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("network_images", "network_epochs"):
            self.require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        self.require(self.lr > 0 and self.network_lr > 0, f"lr and network_lr must be > 0, got {self.lr}, {self.network_lr}")
        self.between("momentum", 0, 1, open_high=True)

    @property
    def shown(self) -> int:
        """Decoded images of a class that one step matches."""
        return min(self.ipc * self.factor**2, self.synthetic_batch)

    def held(self, classes: int) -> float:
        return max(classes * self._one_class(), float(self.network_batch))

    def fewest(self, classes: int) -> float:
        return max(self._one_class(), float(self.network_batch))

    def lower(self) -> str:
        return "real_batch, synthetic_batch or network_batch"

    def _one_class(self) -> float:
        return float(max(self.real_batch, SECOND * self.shown))
