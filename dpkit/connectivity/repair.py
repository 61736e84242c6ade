"""REPAIR: activations of an interpolated network are given the mean and deviation that those of its ends suggest.

Jordan, Sedghi, Saukh, Entezari & Neyshabur 2022 (arXiv 2211.08403): channel by channel, at alpha, the mean becomes
(1 - alpha) mean_a + alpha mean_b and the standard deviation (1 - alpha) deviation_a + alpha deviation_b, since averaged weights
make activations that vary too little ("variance collapse"). All statistics are those of the same training images. Where it is
done, after the notebooks that the authors published (github.com/KellerJordan/REPAIR):

- No BatchNorm: at what each nonlinearity (ReLU, GELU) receives; without any norm those are the outputs of the convolutions and
  hidden linear layers, as in their VGG. In a ResNet the end of a block is corrected behind its ReLU.
- BatchNorm: its means and variances are re-estimated, which is all there is to do in a network without shortcuts: what leaves a
  BatchNorm has the mean and, but for the sign of its scale, the deviation that its interpolated shift and scale ask for. So
  ``repair`` equals ``reestimate`` there. In a ResNet the end of each block is corrected as well, as in their ResNet-50.
- Instance norm fixes each channel's statistics itself and leaves next to nothing to correct. Group and layer norm fix them over
  many channels together, and channels are corrected one by one. A ViT is corrected inside its MLPs only, neither in its
  attention nor in the stream of its tokens.

Here the statistics of the interpolated network are collected with all corrections at work, each chunk of images by its own
moments, as theirs are. Unlike there, the same small constant (that of the norms) is added to all variances before the root, so
that the correction is the identity at the ends and finite in a dead channel; at the ends it is left out.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpkit import cores, models
from dpkit.models import ModelSpec, reestimation
from dpkit.models.layers import EPSILON
from dpkit.training import evaluate_many
from dpkit.tree import Buffers, Params, lerp

Place = tuple[str, str, float]
"""Labels of two networks, and alpha."""


class Moments(NamedTuple):
    """Mean and standard deviation (C,) of each channel."""

    mean: Tensor
    deviation: Tensor


Change = Callable[[int, Tensor], Tensor]


def corrects(model: ModelSpec) -> bool:
    """Whether there is more to do than to re-estimate BatchNorm."""
    return model.norm_kind != "batch" or model.is_resnet


class Sites(TorchFunctionMode):
    """While it is active, the activations at each nonlinearity go through ``change(number of the nonlinearity, activations)``.

    total: nonlinearities in one forward pass, where there are several passes. ``seen`` counts those met.
    """

    def __init__(self, model: ModelSpec, change: Change, total: int = 0):
        super().__init__()
        self.model, self.change, self.total, self.seen = model, change, total, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.relu, F.gelu):
            return func(*args, **(kwargs or {}))
        place = self.seen % self.total if self.total else self.seen
        self.seen += 1
        # of a ResNet: the stem's ReLU, then two for each block, the second of them at its end
        if self.model.is_resnet and place > 0 and place % 2 == 0:
            return self.change(place, func(*args, **(kwargs or {})))
        if self.model.norm_kind == "batch":
            return func(*args, **(kwargs or {}))
        return func(self.change(place, args[0]), *args[1:], **(kwargs or {}))


class Repair:
    """Evaluates networks between others, corrected.

    networks: label -> (parameters, buffers).  images, labels: the evaluation set.  source: (M, C, S, S), normalised training
    images for all statistics.  precision: as in :func:`dpkit.training.evaluate_many`.
    """

    def __init__(self, model: ModelSpec, networks: Mapping[str, tuple[Params, Buffers]], images: Tensor, labels: Tensor,
                 source: Tensor, precision: str):
        self.model, self.networks, self.precision = model, networks, precision
        self.images, self.labels, self.source = images, labels, source
        self.ends: dict[str, dict[int, Moments]] = {}
        self.total = 0

    @torch.no_grad()
    def __call__(self, places: list[Place], threads: int = 1) -> tuple[Tensor, Tensor]:
        """Error in [0, 1] and mean cross-entropy (nats) at each of ``places``: two float64 tensors. Cores: ``threads``."""
        for label in sorted({label for a, b, _ in places for label in (a, b)} - set(self.ends)):
            _, self.ends[label] = self.estimate(*self.networks[label])
        if threads > 1 and len(places) > 1:
            # each thread computes on one core; a network's numbers never depend on who else is at work
            with cores.used(1), ThreadPoolExecutor(threads) as pool:
                values = list(pool.map(self._one, places))
        else:
            values = [self._one(place) for place in places]
        errors, losses = torch.tensor(values, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return errors, losses

    @torch.no_grad()
    def estimate(self, params: Params, buffers: Buffers, goals: dict[int, Moments] | None = None,
                 ) -> tuple[Buffers, dict[int, Moments]]:
        """Re-estimated buffers of a network, and the moments of its activations by number of the nonlinearity.

        goals: corrects the activations to these moments on the way; the moments returned are those before the correction.
        """
        tracked, passes, recorded = bool(models.statistics(self.model)), [], []
        for x in reestimation.pieces(self.model, self.source):
            found: dict[int, tuple[Tensor, Tensor, int]] = {}

            def record(place: int, y: Tensor, found=found) -> Tensor:
                mean, variance, _ = found[place] = moments(y)
                return y if goals is None else changed(y, Moments(mean, (variance + EPSILON).sqrt()), goals[place])

            sites = Sites(self.model, record)
            with sites, torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                if tracked:
                    passes.append(reestimation.moments(self.model, params, buffers, x))
                else:
                    models.features(self.model, params, buffers, x)
            recorded.append(found)
            self.total = sites.seen
        pooled = {place: _pooled([found[place] for found in recorded]) for place in recorded[0]}
        return (reestimation.replaced(buffers, passes) if tracked else dict(buffers)), pooled

    @torch.no_grad()  # a thread starts with gradients on
    def _one(self, place: Place) -> tuple[float, float]:
        a, b, alpha = place
        params, buffers = (lerp(one, other, alpha) for one, other in zip(self.networks[a], self.networks[b], strict=True))
        if alpha in (0.0, 1.0):
            buffers, _ = self.estimate(params, buffers)
            return self._values(params, buffers)
        goals = {site: Moments(*(torch.lerp(one, other, alpha) for one, other in zip(left, self.ends[b][site], strict=True)))
                 for site, left in self.ends[a].items()}
        buffers, now = self.estimate(params, buffers, goals)

        def correct(site: int, y: Tensor) -> Tensor:
            return changed(y, now[site], goals[site]) if site in goals else y

        with Sites(self.model, correct, self.total):
            return self._values(params, buffers)

    def _values(self, params: Params, buffers: Buffers) -> tuple[float, float]:
        # one network at a time and never compiled: neither would meet the nonlinearities one by one
        errors, losses = evaluate_many(self.model, 1, lambda _: (params, buffers), self.images, self.labels, form="solo",
                                       precision=self.precision, compiled=False)
        return float(errors), float(losses)


def moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance over n (C,) of each channel, and n. x: (N, C), (N, C, H, W), or tokens (N, T, C)."""
    axis = 2 if x.dim() == 3 else 1
    exact = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    variance, mean = torch.var_mean(exact, [d for d in range(x.dim()) if d != axis], correction=0)
    return mean, variance, x.numel() // x.shape[axis]


def _pooled(chunks: list[tuple[Tensor, Tensor, int]]) -> Moments:
    """Of all chunks together, the variance over n: what a single chunk is corrected by, so that equal ends change nothing."""
    mean, variance = reestimation.pool(chunks)
    count = sum(n for _, _, n in chunks)
    return Moments(mean, (variance * ((count - 1) / count) + EPSILON).sqrt())


def changed(x: Tensor, now: Moments, goal: Moments) -> Tensor:
    """``x`` shifted and scaled in each channel from the moments that it has ``now`` to those of ``goal``."""
    scale = goal.deviation / now.deviation
    shape = [-1] if x.dim() == 3 else [-1] + [1] * (x.dim() - 2)
    scale, shift = ((t.to(x.dtype)).reshape(shape) for t in (scale, goal.mean - scale * now.mean))
    return x * scale + shift
