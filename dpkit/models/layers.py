"""Building blocks: what a layer's tensors are, how they start, and how activations are normalised."""
from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit.tree import Buffers, Params

EPSILON = 1e-5
MOMENTUM = 0.1


@dataclasses.dataclass(frozen=True)
class Weight:
    """One convolution or linear layer: its weight's ``shape`` (out, in, ...), and whether it has a bias."""

    name: str
    shape: tuple[int, ...]
    bias: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name."""
        found = {f"{self.name}.weight": self.shape}
        if self.bias:
            found[f"{self.name}.bias"] = self.shape[:1]
        return found

    def init(self, generator: torch.Generator) -> Params:
        """Weight and bias, both uniform on +-1/sqrt(fan_in): the default of ``nn.Conv2d`` and ``nn.Linear``.

        That default is He et al. (2015) with negative slope sqrt(5), whose bound sqrt(6 / ((1 + 5) fan_in))
        is 1/sqrt(fan_in).
        """
        bound = 1.0 / math.sqrt(math.prod(self.shape[1:]))
        return {name: torch.empty(shape).uniform_(-bound, bound, generator=generator)
                for name, shape in self.shapes().items()}

    def buffers(self) -> Buffers:
        """Nothing."""
        return {}


@dataclasses.dataclass(frozen=True)
class Norm:
    """One affine normalisation over ``channels``; ``tracked`` if it keeps running statistics (BatchNorm)."""

    name: str
    channels: int
    tracked: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name."""
        return {f"{self.name}.weight": (self.channels,), f"{self.name}.bias": (self.channels,)}

    def init(self, generator: torch.Generator) -> Params:
        """Scale one and shift zero, (channels,) each; nothing is drawn."""
        return {f"{self.name}.weight": torch.ones(self.channels),
                f"{self.name}.bias": torch.zeros(self.channels)}

    def buffers(self) -> Buffers:
        """Running mean zero and running variance one, (channels,) each; nothing for an untracked norm."""
        if not self.tracked:
            return {}
        return {f"{self.name}.running_mean": torch.zeros(self.channels),
                f"{self.name}.running_var": torch.ones(self.channels)}


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A learned tensor ``name`` that is added to activations: no weight that could be pruned, and no norm.

    deviation: standard deviation of its normal start.
    """

    name: str
    shape: tuple[int, ...]
    deviation: float

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name."""
        return {self.name: self.shape}

    def init(self, generator: torch.Generator) -> Params:
        """Normal numbers of mean zero."""
        return {self.name: torch.empty(self.shape).normal_(0.0, self.deviation, generator=generator)}

    def buffers(self) -> Buffers:
        """Nothing."""
        return {}


Layer = Weight | Norm | Embedding
"""An entry of an architecture's table: parameters (``shapes``, ``init``) and ``buffers`` that belong together."""


def norms(kind: str, name: str, channels: int) -> list[Norm]:
    """The :class:`Norm` called ``name``, or none where ``kind`` is ``none``."""
    return [] if kind == "none" else [Norm(name, channels, tracked=kind == "batch")]


def groups(channels: int) -> int:
    """How many groups group norm makes of ``channels``: as many as divide them, at most 32, of at least four channels each.

    Wu & He 2018 (arXiv 1803.08494) take 32 groups; the least size keeps narrow layers from becoming instance norm. Fewer than
    four channels, and numbers that cannot be divided so, are one group.
    """
    return max([1, *[count for count in range(1, 33) if channels % count == 0 and channels // count >= 4]])


def max_pool(x: Tensor, kernel: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """Maxima of (N, C, H, W) over windows, ``stride`` apart (by default as far as they are wide).

    On a processor those of bf16 are taken in fp32, which changes none of them: code that Inductor (torch 2.13) makes for bf16
    took 19 ms, forward and backward, for the windows of an ImageNet stem of width 16 on 64 images of 96 pixels, and this 7.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return F.max_pool2d(x.float(), kernel, stride, padding).to(x.dtype)
    return F.max_pool2d(x, kernel, stride, padding)


class Normaliser:
    """Applies the norm called ``name`` to activations and collects the new running statistics.

    Activations are (N, C, H, W), (N, C), or tokens (N, T, C). kind: ``batch``, ``instance``, ``group`` (so many :func:`groups`),
    ``layer`` (one group of all channels and positions; of the channels of each token) or ``none``.  train: whether
    BatchNorm uses the batch's own statistics.
    After the forward pass ``updated`` holds all buffers, the old ones untouched.
    """

    def __init__(self, kind: str, params: Params, buffers: Buffers, train: bool, momentum: float = MOMENTUM):
        self.kind, self.params, self.train, self.momentum = kind, params, train, momentum
        self.updated = dict(buffers)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        scale, shift = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        if self.kind == "instance":
            # One group a channel is instance norm; this kernel is faster than mean and variance written out.
            return F.group_norm(x, x.shape[1], scale, shift, EPSILON)
        if self.kind == "layer" and x.dim() == 3:
            return F.layer_norm(x, x.shape[-1:], scale, shift, EPSILON)
        if self.kind in ("layer", "group"):
            return F.group_norm(x, groups(x.shape[1]) if self.kind == "group" else 1, scale, shift, EPSILON)
        mean, variance = self.updated[f"{name}.running_mean"], self.updated[f"{name}.running_var"]
        if self.train:
            # batch_norm overwrites the running statistics that it is given, even under vmap.
            mean, variance = mean.clone(), variance.clone()
            self.updated[f"{name}.running_mean"], self.updated[f"{name}.running_var"] = mean, variance
        return F.batch_norm(x, mean, variance, scale, shift, self.train, self.momentum, EPSILON)


class Recorder(Normaliser):
    """BatchNorm in train mode that keeps by name the batch's mean, variance (over n) and n, per channel."""

    def __init__(self, params: Params, buffers: Buffers):
        # Momentum one replaces the running statistics by those of the batch; from zeros, as 0 * NaN is NaN.
        zeros = {name: torch.zeros_like(t) for name, t in buffers.items()}
        super().__init__("batch", params, zeros, train=True, momentum=1.0)
        self.moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        y = super().__call__(name, x)
        count = x.numel() // x.shape[1]
        biased = self.updated[f"{name}.running_var"] * ((count - 1) / count)
        self.moments[name] = (self.updated[f"{name}.running_mean"], biased, count)
        return y
