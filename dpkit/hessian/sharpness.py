"""Sharpness: how far the loss rises near a trained network, beside the curvature at it.

What each measure can say:

- *Plain* sharpness (worst case in a ball, average over noise, top eigenvalue, trace) depends on how a function is written down:
  in a ReLU network one layer's weights times a and the next one's by 1 / a give the same network and any sharpness at all
  (Dinh et al. 2017, arXiv 1703.04933). It may be compared between networks trained alike, and tells nothing by itself.
- *Adaptive* sharpness moves each weight in proportion to its size and is the same for all these networks (Kwon et al. 2021,
  arXiv 2102.11600); so is the Fisher-Rao norm. Show both kinds: where they disagree, scale decided.
- Neither makes a network generalise: over many settings the correlation is weak and may have either sign (Andriushchenko
  et al. 2023, arXiv 2302.07011).
- A ball of one radius has fewer directions in a sparser network. All moves here are of surviving weights only.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.hessian.estimate import Estimate
from dpkit.hessian.objective import NetworkLoss, Objective
from dpkit.spec import Spec

BALLS = ("l2", "linf")


class Sharpness(NamedTuple):
    """The largest rise of the loss found in a ball.

    value        nats, at least 0: the loss at ``point`` minus that at the weights. A point found is a lower bound on the maximum
    first_order  the rise at SAM's own point, one step along the gradient; may be negative
    linear       what the gradient alone predicts for that point
    point        the displacement (n,) that gave ``value``
    passes       forward and backward passes over the images
    """

    value: float
    first_order: float
    linear: float
    point: Tensor
    passes: int


def sharpness(objective: Objective, radius: float, *, adaptive: bool = False, ball: str = "l2", steps: int = 10,
              restarts: int = 0, generator: torch.Generator | None = None) -> Sharpness:
    """max L(w + e) - L(w) over the ball ||e / s|| <= radius, with s = 1 or, if ``adaptive``, s = |w| entry by entry.

    s = 1 is the sharpness of SAM (Foret et al. 2021, arXiv 2010.01412, section 2), s = |w| that of ASAM (Kwon et al. 2021, arXiv
    2102.11600, section 3), whose radius has no unit; entries that are 0 stay 0. ball: ``l2``, or ``linf``, the largest entry.

    The first point is SAM's: the ball's farthest point along the gradient of u -> L(w + s u) at 0. From there ``steps`` more,
    each to the farthest point along the gradient found (a power method for maximising over a ball; Journee et al. 2010, arXiv
    0811.4724) as long as the loss rises, and from the first time it does not by projected steps of at most the radius, halved at
    each failure. All steps are spent: there is no stopping rule (on a trained ConvNet-3 and radii 0.05 to 0.1, adaptive 0.5 to 1,
    10 steps came within 0.01% of 100, and the first point alone fell short by up to a tenth). restarts: the same from so many
    random points on the ball's edge, drawn from ``generator``, for losses with several maxima.

    Raises ``ValueError`` on a radius not above 0, negative steps or restarts, restarts without a generator, another ball, a
    gradient of 0 without restarts (the ascent has no direction), or a loss that is not finite in the ball.
    """
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be a finite number above 0, got {radius}")
    if ball not in BALLS:
        raise ValueError(f"ball must be one of {', '.join(BALLS)}; got {ball!r}")
    if steps < 0 or restarts < 0:
        raise ValueError(f"steps and restarts must be >= 0, got {steps} and {restarts}")
    if restarts and generator is None:
        raise ValueError(f"restarts are random and need a generator, got {restarts} without one")
    weights = objective.weights
    scale = weights.abs() if adaptive else torch.ones_like(weights)
    loss, slope = objective.gradient(weights)
    if not math.isfinite(loss):
        raise ValueError(f"the loss must be finite, got {loss} at the weights; the network has diverged")
    slope = scale * slope
    ascent = _Ascent(objective, scale, radius, ball, loss)
    starts = [slope] if bool(slope.any()) else []
    if not starts and not restarts:
        raise ValueError("the gradient must not be 0, for the ascent has no direction then; ask for restarts")
    starts += [torch.randn(len(weights), generator=generator, dtype=torch.float64).to(weights) for _ in range(restarts)]
    found = [ascent.run(start, steps) for start in starts]
    best, place, _ = max(found, key=lambda each: each[0])
    point = scale * place if best > 0 else torch.zeros_like(weights)
    dual = slope.double().norm() if ball == "l2" else slope.double().abs().sum()
    return Sharpness(max(best, 0.0), found[0][2] if bool(slope.any()) else 0.0, radius * float(dual), point, ascent.passes + 1)


class _Ascent:
    """Steps of :func:`sharpness` in the coordinates u = e / s, where both balls are round."""

    def __init__(self, objective: Objective, scale: Tensor, radius: float, ball: str, loss: float) -> None:
        self.objective, self.scale, self.radius, self.ball, self.loss = objective, scale, radius, ball, loss
        self.passes = 0

    def run(self, start: Tensor, steps: int) -> tuple[float, Tensor, float]:
        """Rise and place of the best point, and the rise of the first one."""
        place = self.farthest(start)
        rise, slope = self.look(place)
        first, step = rise, None
        for _ in range(steps):
            if not bool(slope.any()):
                break
            far = self.farthest(slope)
            there = far if step is None else self.projected(place + step * far)
            found, slope_there = self.look(there)
            if found > rise:
                place, rise, slope = there, found, slope_there
            else:
                step = 1.0 if step is None else step / 2
        return rise, place, first

    def look(self, place: Tensor) -> tuple[float, Tensor]:
        self.passes += 1
        loss, slope = self.objective.gradient(self.objective.weights + self.scale * place)
        if not math.isfinite(loss):
            raise ValueError(f"the loss must be finite in the ball, got {loss}; take a radius below {self.radius}")
        return loss - self.loss, self.scale * slope

    def farthest(self, direction: Tensor) -> Tensor:
        """The point of the ball where the inner product with ``direction`` is largest."""
        if self.ball == "linf":
            return self.radius * direction.sign()
        direction = direction / direction.abs().max()  # squares of tiny gradients would vanish
        return self.radius * direction / direction.norm()

    def projected(self, place: Tensor) -> Tensor:
        if self.ball == "linf":
            return place.clamp(-self.radius, self.radius)
        return place * min(1.0, self.radius / float(place.norm()))


def average_sharpness(objective: Objective, deviation: float, pairs: int, generator: torch.Generator, *,
                      adaptive: bool = False) -> Estimate:
    """E[L(w + e)] - L(w) with e_i normal, of standard deviation ``deviation`` or, if ``adaptive``, ``deviation`` x |w_i|.

    Average-case sharpness of Andriushchenko et al. 2023 (arXiv 2302.07011). To second order deviation^2 / 2 times
    the trace of S H S, S = diag(s): it grows with the number of weights; for the mean over directions take a deviation of radius
    / sqrt(n). Noise comes in pairs e, -e, which leaves the mean as it is and takes the gradient's part out of its variance.

    pairs at least 2; CPU generator. Returns the mean over pairs with its standard error; ``products`` counts forward passes
    over the images. Raises ``ValueError`` on other values, or a loss that is not finite.
    """
    if not (deviation > 0 and math.isfinite(deviation)):
        raise ValueError(f"deviation must be a finite number above 0, got {deviation}")
    if pairs < 2:
        raise ValueError(f"pairs must be >= 2 to give an error bar, got {pairs}")
    weights = objective.weights
    scale = deviation * (weights.abs() if adaptive else torch.ones_like(weights))
    loss, rises = objective.value(weights), []
    for _ in range(pairs):
        noise = scale * torch.randn(len(weights), generator=generator, dtype=torch.float64).to(weights)
        rises.append((objective.value(weights + noise) + objective.value(weights - noise)) / 2 - loss)
    found = torch.tensor(rises, dtype=torch.float64)
    if not bool(found.isfinite().all()):
        raise ValueError(f"the loss must be finite, got NaN or infinity near the weights; take a deviation below {deviation}")
    return Estimate(float(found.mean()), float(found.std()) / math.sqrt(pairs), 2 * pairs + 1, pairs)


class FisherRao(NamedTuple):
    """Squared Fisher-Rao norms w' F w, in nats^2, with their standard errors over the images.

    labels, labels_error  F of the data's labels, the definition of Liang et al.
    model, model_error    F of labels drawn from the network's own probabilities: the Fisher information, which for cross-entropy
                          is the generalised Gauss-Newton matrix
    """

    labels: float
    labels_error: float
    model: float
    model_error: float


def fisher_rao(loss: NetworkLoss) -> FisherRao:
    """w' E[g g'] w with g the gradient of one image's loss: the squared Fisher-Rao norm (Liang et al. 2019, arXiv 1711.01530,
    section 3), over the surviving weights.

    w'g is (p - y)'z with p the probabilities, y the label and z = d f(w + t w) / dt at t = 0 the logits' derivative along the
    weights themselves, so one pass gives it for all images (:func:`fisher_rao_of`). Independent of how a ReLU network's layers
    are scaled against each other; small where all images are fitted, whatever the scale.
    """
    logits, along = loss.logits_along(loss.weights)
    return fisher_rao_of(logits, along, loss.targets)


def fisher_rao_of(logits: Tensor, along: Tensor, targets: Tensor) -> FisherRao:
    """The norms from logits (N, K), their derivative along the weights (N, K) and targets (N, K).

    labels: mean of ((p - y)'z)^2. model: mean over images of z's variance under p, sum p z^2 - (sum p z)^2. In a network of L
    layers without biases or norms, all of whose weights count, z = L f and the logits alone suffice (their theorem 3.1): pass
    ``L * logits``. Norm layers and biases break that, the derivative does not need it. Raises ``ValueError`` unless the shapes
    are equal and there are at least 2 images.
    """
    if not logits.shape == along.shape == targets.shape or logits.dim() != 2 or len(logits) < 2:
        raise ValueError("logits, their derivative and targets must be (N, K) with N >= 2, "
                         f"got {tuple(logits.shape)}, {tuple(along.shape)} and {tuple(targets.shape)}")
    logits, along, targets = logits.double(), along.double(), targets.double()
    p = logits.softmax(1)
    # soft labels need not add up to 1: the gradient of -sum y log p is (sum y) p - y
    residual = targets.sum(1, keepdim=True) * p - targets
    by_label = (residual * along).sum(1).square()
    by_model = (p * (along - (p * along).sum(1, keepdim=True)).square()).sum(1)
    mean = [float(each.mean()) for each in (by_label, by_model)]
    error = [float(each.std()) / math.sqrt(len(logits)) for each in (by_label, by_model)]
    return FisherRao(mean[0], error[0], mean[1], error[1])


def edge_ratio(top_eigenvalue: float, lr: float, momentum: float = 0.0, *, nesterov: bool = False,
               weight_decay: float = 0.0) -> float:
    """(lambda + weight decay) over the largest curvature at which gradient descent is stable; above 1 it is not.

    The limit on a quadratic is 2 (1 + b) / lr with heavy-ball momentum b, so that without momentum the ratio is lr lambda / 2,
    and 2 (1 + b) / (lr (1 + 2 b)) with Nesterov's (Cohen et al. 2021, arXiv 2103.00065; momentum as in torch.optim.SGD,
    dampening 0). Full-batch training hovers near 1, the edge of stability; mini-batches hold it below. lambda is of the loss
    that is trained on: augmentation, train mode and pruned weights change it.

    Raises ``ValueError`` unless lr > 0, momentum lies in [0, 1), weight_decay >= 0 and the eigenvalue is finite.
    """
    if not (lr > 0 and 0 <= momentum < 1 and weight_decay >= 0 and math.isfinite(top_eigenvalue)):
        raise ValueError("edge_ratio needs lr > 0, momentum in [0, 1), weight_decay >= 0 and a finite eigenvalue, "
                         f"got {lr}, {momentum}, {weight_decay} and {top_eigenvalue}")
    limit = 2 * (1 + momentum) / (lr * (1 + 2 * momentum if nesterov else 1))
    return (top_eigenvalue + weight_decay) / limit


@dataclass(frozen=True, kw_only=True)
class SharpnessSpec(Spec):
    """Settings of :func:`measure`.

    images              fixed images, as in HessianSpec (at least 2)
    scope, dtype        as in HessianSpec
    radius              of the plain ball, in the weights' own unit (SAM's value on CIFAR)
    adaptive_radius     of the adaptive ball (ASAM's value on CIFAR)
    steps, restarts     of the ascent in either ball
    deviation           of plain noise, in the weights' own unit
    adaptive_deviation  of noise relative to each weight
    pairs               of noise vectors (at least 2)
    """

    images: int = 500
    scope: str = "weights"
    dtype: str = "float32"
    radius: float = 0.05
    adaptive_radius: float = 0.5
    steps: int = 10
    restarts: int = 0
    deviation: float = 0.005
    adaptive_deviation: float = 0.05
    pairs: int = 20

    def check(self) -> None:
        self.require(self.images >= 2, f"images must be >= 2 to give an error bar, got {self.images}")
        self.one_of("scope", ("weights", "all"))
        self.one_of("dtype", ("float32", "float64"))
        for name in ("radius", "adaptive_radius", "deviation", "adaptive_deviation"):
            self.require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)}")
        self.require(self.steps >= 0, f"steps must be >= 0, got {self.steps}")
        self.require(self.restarts >= 0, f"restarts must be >= 0, got {self.restarts}")
        self.require(self.pairs >= 2, f"pairs must be >= 2 to give an error bar, got {self.pairs}")


class Measured(NamedTuple):
    """Plain and adaptive sharpness of one network side by side, in nats."""

    plain: Sharpness
    adaptive: Sharpness
    average: Estimate
    adaptive_average: Estimate
    fisher_rao: FisherRao


def measure(spec: SharpnessSpec, loss: NetworkLoss, generator: torch.Generator) -> Measured:
    """All measures of one network; ``loss`` from :func:`dpkit.hessian.objective.fixed_loss`. Raises as they do."""
    plain, adaptive = (sharpness(loss, radius, adaptive=kind, steps=spec.steps, restarts=spec.restarts, generator=generator)
                       for radius, kind in ((spec.radius, False), (spec.adaptive_radius, True)))
    average = average_sharpness(loss, spec.deviation, spec.pairs, generator)
    relative = average_sharpness(loss, spec.adaptive_deviation, spec.pairs, generator, adaptive=True)
    return Measured(plain, adaptive, average, relative, fisher_rao(loss))
