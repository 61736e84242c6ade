"""Networks between networks: checked together, evaluated in one job, each place once."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpkit import models
from dpkit.barriers import NotFinite
from dpkit.connectivity.checks import check_networks
from dpkit.connectivity.record import Path
from dpkit.connectivity.repair import Place, Repair, corrects
from dpkit.connectivity.spec import PathSpec
from dpkit.models import ModelSpec
from dpkit.training import evaluate_many
from dpkit.training.evaluation import pays
from dpkit.tree import Buffers, Mask, Params, lerp

Network = tuple[Params, Buffers]
Evaluate = Callable[[list[Place]], tuple[Tensor, Tensor]]

USUAL = 11
"""Points of a path by which it is decided whether compiling pays, whatever the number asked for: else a point's last bits would
depend on how many others there are, and a path of 21 points would not contain that of 11."""


def check(model: ModelSpec, networks: Mapping[str, Network], images: Tensor, labels: Tensor,
          masks: Mapping[str, Mask] | None = None, starts: Mapping[str, Params] | None = None) -> None:
    """Raise ``ValueError`` unless there are images with labels, and ``networks`` (masks, starts) may stand at ends of paths."""
    models.check_evaluation(images, labels)
    models.check_labels(labels, model.classes)
    check_networks(model, {label: {**params, **buffers} for label, (params, buffers) in networks.items()})
    models.check_shared({label: params for label, (params, _) in networks.items()}, masks, starts)


def evaluator(spec: PathSpec, model: ModelSpec, networks: Mapping[str, Network], images: Tensor, labels: Tensor,
              statistics_images: Tensor | None, threads: int) -> Evaluate:
    """Errors and losses at places between ``networks``, as the specification asks for them.

    The value at a place does not depend on how many places are asked for, together or one by one (on a GPU: within rounding).
    """
    if spec.statistics == "repair" and corrects(model):
        if statistics_images is None:
            raise ValueError("repairing activations needs statistics_images, got None; "
                             "pass normalised training images, or choose other statistics than repair")
        source = statistics_images[models.spread(len(statistics_images), spec.statistics_images)]
        return functools.partial(Repair(model, networks, images, labels, source, spec.precision), threads=threads)
    source = None
    if spec.statistics != "interpolate":
        source = models.statistics_source(model, statistics_images, spec.statistics_images)
    # One dictionary holds weights and running statistics: one line of code interpolates both.
    trees = {label: {**params, **buffers} for label, (params, buffers) in networks.items()}
    compiled = pays(model, USUAL * (len(images) + (0 if source is None else len(source))))

    def evaluate(places: list[Place]) -> tuple[Tensor, Tensor]:
        def network(i: int) -> Network:
            a, b, alpha = places[i]
            one, other = trees[a], trees[b]
            moved = [n for n in one if other[n] is not one[n]]  # where layers are moved one by one, the others are shared
            between = one | lerp({n: one[n] for n in moved}, {n: other[n] for n in moved}, alpha)
            params, buffers = networks[a]
            return {n: between[n] for n in params}, {n: between[n] for n in buffers}

        return evaluate_many(model, len(places), network, images, labels, statistics_images=source, precision=spec.precision,
                             compiled=compiled, threads=threads)

    return evaluate


class Measured:
    """Errors and losses at places, each of which is evaluated once, however often it is asked for.

    evaluate: what measures places that are not known yet; called once for all of a question.  images: how many there are.

    Places are known by their labels and by alpha to 12 decimals, so that alphas of ``torch.linspace`` and fractions agree. Both
    ends of a line belong to their networks, and are shared by all lines that end there.
    """

    def __init__(self, evaluate: Evaluate, images: int):
        self.evaluate, self.images = evaluate, images
        self.values: dict[Place, tuple[float, float]] = {}

    def take(self, a: str, b: str, known: Path) -> None:
        """Take over the points of a path from ``a`` to ``b`` that was measured before.

        Raises ``ValueError`` when an alpha lies outside of 0 to 1, a value is not finite, or an error is no count of so many
        images.
        """
        for alpha, error, loss in zip(known.alphas.tolist(), known.errors.tolist(), known.losses.tolist(), strict=True):
            wrong = error * self.images
            counted = math.isfinite(wrong) and abs(wrong - round(wrong)) < 1e-6
            if not (0 <= alpha <= 1 and counted and math.isfinite(loss)):
                raise ValueError(f"known points between {a} and {b} must have alphas from 0 to 1, losses, and errors that are "
                                 f"shares of the {self.images} images here; got error {error:g} and loss {loss:g} at alpha "
                                 f"{alpha:g}; pass a path that was measured on these images, or none")
            self.values[_key((a, b, alpha))] = (error, loss)

    def __call__(self, places: list[Place]) -> tuple[Tensor, Tensor]:
        """Errors and losses at ``places``: two float64 tensors. Raises :class:`NotFinite` on a loss that is not.

        Where logits are NaN every image counts as one of class 0: the error of such a network looks like any other.
        """
        new: dict[Place, Place] = {}
        for place in places:
            if _key(place) not in self.values:
                new.setdefault(_key(place), place)
        if new:
            measured = list(zip(*(t.tolist() for t in self.evaluate(list(new.values()))), strict=True))
            for (a, b, alpha), (_, loss) in zip(new.values(), measured, strict=True):
                if not math.isfinite(loss):
                    raise NotFinite(f"losses on the way from network {a} to network {b} must be finite, got {loss:g} at alpha "
                                    f"{alpha:g}; its weights are finite but its logits overflow: compare networks that are "
                                    f"trained, on normalised images")
            self.values.update(zip(new, measured, strict=True))
        found = [self.values[_key(place)] for place in places]
        errors, losses = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return errors.contiguous(), losses.contiguous()

    def between(self, a: str, b: str, alphas: Tensor) -> Path:
        """The path from ``a`` to ``b`` at ``alphas`` (T,)."""
        return Path(alphas, *self([(a, b, alpha) for alpha in alphas.tolist()]))


def _key(place: Place) -> Place:
    a, b, alpha = place
    alpha = round(alpha, 12)
    if alpha in (0.0, 1.0):
        end = a if alpha == 0.0 else b
        return end, end, 0.0
    return a, b, alpha
