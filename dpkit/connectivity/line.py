"""Error and loss on the straight line between two networks, or between all pairs of several."""
from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpkit import models
from dpkit.connectivity.checks import check_masks, check_networks, check_starts
from dpkit.connectivity.record import Path, refine
from dpkit.connectivity.repair import Place, Repair, corrects
from dpkit.models import ModelSpec
from dpkit.spec import Spec, later
from dpkit.training import evaluate_many
from dpkit.training.evaluation import pays
from dpkit.tree import Buffers, Mask, Params, lerp

STATISTICS = ("reestimate", "interpolate", "repair")
Network = tuple[Params, Buffers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathSpec(Spec):
    """How a path is measured.

    points: evaluation points, both ends included, evenly spaced; at least 3.
    statistics: what BatchNorm uses on the path. ``reestimate`` measures mean and variance anew at every
        point, ends included, so that all points are treated alike (Jordan et al. 2022, arXiv 2211.08403);
        ``interpolate`` takes the weighted average of both networks' running statistics, as the paper's own
        code does, which raises barriers; ``repair`` re-estimates and then gives activations the interpolated
        moments of the ends, in networks without BatchNorm too (:mod:`dpkit.connectivity.repair`).
    statistics_images: how many training images re-estimation uses, evenly spaced over those passed; at least
    2.
    precision: ``fp32``, or ``bf16`` for all of the forward pass but the classifier.
    error_tolerance (a fraction), loss_tolerance (nats): more points around the peak until the barriers are known this
        well, see :func:`refine`; 0 for none.  most_points: of a path after that.
    """

    points: int = 11
    statistics: str = "reestimate"
    statistics_images: int = 1000
    precision: str = later("fp32", before="fp32")
    error_tolerance: float = later(0.0, before=0.0)
    loss_tolerance: float = later(0.0, before=0.0)
    most_points: int = later(101, before=101)

    def check(self) -> None:
        self.require(self.points >= 3, f"points must be at least 3 (ends and middle), got {self.points}")
        self.one_of("statistics", STATISTICS)
        self.require(self.statistics_images >= 2,
                     f"statistics_images must be at least 2, got {self.statistics_images}")
        self.one_of("precision", ("fp32", "bf16"))
        self.between("error_tolerance", 0, 1, open_high=True)
        self.between("loss_tolerance", 0, float("inf"), open_high=True)
        refined = self.error_tolerance > 0 or self.loss_tolerance > 0
        self.require(not refined or self.most_points >= self.points,
                     f"most_points must be at least points, {self.points}, to refine a path; got {self.most_points}")


def path(spec: PathSpec, model: ModelSpec, a: Network, b: Network, images: Tensor, labels: Tensor, *,
         statistics_images: Tensor | None = None, threads: int = 1, masks: tuple[Mask, Mask] | None = None,
         starts: tuple[Params, Params] | None = None) -> Path:
    """Error and loss on the line between networks ``a`` and ``b``, each (params, buffers), in eval mode.

    images: (N, C, S, S) normalised float32, the evaluation set (of test or of training data).  labels: (N,) int64.
    statistics_images: normalised training images without augmentation, (M, C, S, S), for re-estimating
        BatchNorm; needed only for networks with BatchNorm under ``spec.statistics == "reestimate"``, and always
        under ``repair``.
    threads: cores that share the points; the same bits for any number.
    masks: of both, where they must be the same.  starts: initial parameters of both, where they must be the same.
    Raises ``ValueError`` with one line when the networks differ in names or shapes, are not of ``model``, have NaN weights, do
    not share mask or start where that is asked for, when the evaluation set is empty or its lengths differ, or when
    statistics images are missing.
    """
    both = {"a": a, "b": b}
    masks_of, starts_of = (pair and dict(zip(both, pair, strict=True)) for pair in (masks, starts))
    _check(model, both, images, labels, masks_of, starts_of)
    evaluate = _evaluator(spec, model, both, images, labels, statistics_images, threads)
    evenly = _between(evaluate, "a", "b", torch.linspace(0, 1, spec.points, dtype=torch.float64))
    return _refined(spec, evenly, evaluate, "a", "b")


def all_pairs(spec: PathSpec, model: ModelSpec, networks: Mapping[str, Network], images: Tensor, labels: Tensor, *,
              statistics_images: Tensor | None = None, threads: int = 1, masks: Mapping[str, Mask] | None = None,
              starts: Mapping[str, Params] | None = None) -> dict[tuple[str, str], Path]:
    """:func:`path` between each two of n ``networks`` (label -> (params, buffers)), by labels in their order.

    Each network itself is evaluated once for all its paths: n + n (n - 1) / 2 (points - 2) evaluations. masks, starts: label ->
    mask, initial parameters. Other arguments, values and errors as of :func:`path`; fewer than 2 networks are refused as well.
    """
    if len(networks) < 2:
        raise ValueError(f"paths need at least 2 networks, got {len(networks)}; train another child")
    _check(model, networks, images, labels, masks, starts)
    evaluate = _evaluator(spec, model, networks, images, labels, statistics_images, threads)
    alphas = torch.linspace(0, 1, spec.points, dtype=torch.float64)
    inside = alphas[1:-1].tolist()
    pairs = list(itertools.combinations(networks, 2))
    values = torch.stack(evaluate([(name, name, 0.0) for name in networks]
                                  + [(*pair, alpha) for pair in pairs for alpha in inside]), 1)
    ends = dict(zip(networks, values[:len(networks)], strict=True))
    found = {}
    for (one, other), middle in zip(pairs, values[len(networks):].split(len(inside)), strict=True):
        line = Path(alphas, *torch.cat([ends[one][None], middle, ends[other][None]]).unbind(1))
        found[one, other] = _refined(spec, line, evaluate, one, other)
    return found


def _check(model: ModelSpec, networks: Mapping[str, Network], images: Tensor, labels: Tensor,
           masks: Mapping[str, Mask] | None, starts: Mapping[str, Params] | None) -> None:
    models.check_evaluation(images, labels)
    check_networks(model, {label: {**params, **buffers} for label, (params, buffers) in networks.items()})
    for what, given in (("masks", masks), ("starts", starts)):
        if given is not None and set(given) != set(networks):
            raise ValueError(f"{what} must be given for networks {', '.join(networks)}, got {', '.join(given)}")
    if masks is not None:
        check_masks(masks, {label: params for label, (params, _) in networks.items()})
    if starts is not None:
        check_starts(starts)


Evaluate = Callable[[list[Place]], tuple[Tensor, Tensor]]


def _evaluator(spec: PathSpec, model: ModelSpec, networks: Mapping[str, Network], images: Tensor, labels: Tensor,
               statistics_images: Tensor | None, threads: int) -> Evaluate:
    """Errors and losses at places between ``networks``, as the specification asks for them."""
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
    # for all points of a path alike, whether they are asked for together or one by one
    compiled = pays(model, spec.points * (len(images) + (0 if source is None else len(source))))

    def evaluate(places: list[Place]) -> tuple[Tensor, Tensor]:
        def network(i: int) -> Network:
            a, b, alpha = places[i]
            between = lerp(trees[a], trees[b], alpha)
            params, buffers = networks[a]
            return {n: between[n] for n in params}, {n: between[n] for n in buffers}

        return evaluate_many(model, len(places), network, images, labels, statistics_images=source, precision=spec.precision,
                             compiled=compiled, threads=threads)

    return evaluate


def _between(evaluate: Evaluate, a: str, b: str, alphas: Tensor) -> Path:
    return Path(alphas, *evaluate([(a, b, alpha) for alpha in alphas.tolist()]))


def _refined(spec: PathSpec, found: Path, evaluate: Evaluate, a: str, b: str) -> Path:
    return refine(found, functools.partial(_between, evaluate, a, b), error_tolerance=spec.error_tolerance,
                  loss_tolerance=spec.loss_tolerance, most_points=spec.most_points)
