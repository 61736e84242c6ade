"""Linear mode connectivity: error and loss on the straight line between two networks, and its barrier.

Frankle, Dziugaite, Roy & Carbin 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv
1912.05671), section 2: two children of one start are linearly connected when the error does not rise between
them.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dpkit import models
from dpkit.models import ModelSpec, reestimate
from dpkit.spec import Spec, later
from dpkit.training import evaluate_many
from dpkit.tree import Buffers, Params, lerp

__all__ = ["Path", "PathSpec", "along", "barrier", "barrier_linear", "is_stable", "path", "reestimate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathSpec(Spec):
    """How a path is measured.

    points: evaluation points, both ends included, evenly spaced; at least 3.
    statistics: what BatchNorm uses on the path. ``reestimate`` measures mean and variance anew at every
        point, ends included, so that all points are treated alike (Jordan et al. 2022, arXiv 2211.08403);
        ``interpolate`` takes the weighted average of both networks' running statistics, as the paper's own
        code does, which raises barriers.
    statistics_images: how many training images re-estimation uses, evenly spaced over those passed; at least
    2.
    precision: ``fp32``, or ``bf16`` for all of the forward pass but the classifier.
    """

    points: int = 11
    statistics: str = "reestimate"
    statistics_images: int = 1000
    precision: str = later("fp32", before="fp32")

    def check(self) -> None:
        self.require(self.points >= 3, f"points must be at least 3 (ends and middle), got {self.points}")
        self.one_of("statistics", ("reestimate", "interpolate"))
        self.require(self.statistics_images >= 2,
                     f"statistics_images must be at least 2, got {self.statistics_images}")
        self.one_of("precision", ("fp32", "bf16"))


@dataclasses.dataclass(frozen=True)
class Path:
    """Error (fraction in [0, 1]) and mean cross-entropy (nats) at ``alphas``; three float64 tensors (T,).

    alpha 0 is the first network, alpha 1 the second.
    """

    alphas: Tensor
    errors: Tensor
    losses: Tensor

    @property
    def error_barrier(self) -> float:
        """:func:`barrier` of the errors, a fraction: 0.02 is two points."""
        return barrier(self.errors)

    @property
    def loss_barrier(self) -> float:
        """:func:`barrier` of the losses, nats."""
        return barrier(self.losses)


def barrier(values: Tensor) -> float:
    """Highest value on the path minus the mean of both ends (Frankle et al. 2020, section 2: linear
    interpolation instability).

    values: (T,), T at least 2, in path order. Never negative: it is half the difference of the ends on a
    monotone path. :func:`barrier_linear` is zero there. Raises ``ValueError`` on fewer points or NaN.
    """
    values = _checked(values)
    return float(values.max() - (values[0] + values[-1]) / 2)


def barrier_linear(alphas: Tensor, values: Tensor) -> float:
    """Largest excess of the path over the straight line between its end values: max over alpha of
    L(alpha) - [(1 - alpha) L(0) + alpha L(1)] (Entezari et al. 2022, arXiv 2110.06296, definition 2.1).

    alphas, values: (T,), alphas from 0 to 1. At least 0. Raises ``ValueError`` as :func:`barrier` does.
    """
    values, alphas = _checked(values), torch.as_tensor(alphas, dtype=torch.float64)
    if alphas.shape != values.shape or alphas[0] != 0 or alphas[-1] != 1:
        raise ValueError(f"alphas must run from 0 to 1 with one entry a value, got {alphas.tolist()} for "
                         f"{values.numel()} values")
    return float((values - ((1 - alphas) * values[0] + alphas * values[-1])).max())


def _checked(values: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 1 or values.numel() < 2:
        raise ValueError(f"a path must have at least 2 values in one row, got shape {tuple(values.shape)}")
    if values.isnan().any():
        at = int(values.isnan().nonzero()[0])
        raise ValueError(f"a path must have numbers only, got NaN at point {at}; check the evaluation images")
    return values


def is_stable(error_barrier: float, threshold: float = 0.02) -> bool:
    """Whether an error barrier (fraction) lies below ``threshold``; two points is Frankle et al.'s rule."""
    return error_barrier < threshold


def along(a: Params, b: Params, alphas: Tensor, evaluate: Callable[[Params], tuple[float, float]]) -> Path:
    """Evaluate ``(1 - alpha) a + alpha b`` at each of ``alphas`` (T,).

    evaluate: parameters -> (error, loss). The ends are ``a`` and ``b`` themselves, bit for bit, at alpha 0
    and 1.
    """
    alphas = torch.as_tensor(alphas, dtype=torch.float64)
    values = [evaluate(lerp(a, b, alpha)) for alpha in alphas.tolist()]
    errors, losses = torch.tensor(values, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return Path(alphas, errors, losses)


@torch.no_grad()
def path(spec: PathSpec, model: ModelSpec, a: tuple[Params, Buffers], b: tuple[Params, Buffers],
         images: Tensor, labels: Tensor, *, statistics_images: Tensor | None = None, threads: int = 1) -> Path:
    """Error and loss on the line between networks ``a`` and ``b``, each (params, buffers), in eval mode.

    images: (N, C, S, S) normalised float32, the evaluation set.  labels: (N,) int64.
    statistics_images: normalised training images without augmentation, (M, C, S, S), for re-estimating
        BatchNorm; needed only for networks with BatchNorm under ``spec.statistics == "reestimate"``.
    threads: cores that share the points; the same bits for any number.
    Raises ``ValueError`` with one line when the networks differ in names or shapes, have NaN weights, when
    the evaluation set is empty or its lengths differ, or when statistics images are missing.
    """
    models.check_evaluation(images, labels)
    # One dictionary holds weights and running statistics: one line of code interpolates both.
    trees = {"a": {**a[0], **a[1]}, "b": {**b[0], **b[1]}}
    models.check_same(trees)
    source = None
    if spec.statistics == "reestimate":
        source = models.statistics_source(model, statistics_images, spec.statistics_images)
    alphas = torch.linspace(0, 1, spec.points, dtype=torch.float64)

    def network(i: int) -> tuple[Params, Buffers]:
        between = lerp(trees["a"], trees["b"], float(alphas[i]))
        return {n: between[n] for n in a[0]}, {n: between[n] for n in a[1]}

    errors, losses = evaluate_many(model, spec.points, network, images, labels, statistics_images=source,
                                   precision=spec.precision, threads=threads)
    return Path(alphas, errors, losses)
