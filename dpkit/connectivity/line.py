"""Error and loss on the straight line between two networks, or between all pairs of several."""
from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from torch import Tensor

from dpkit.connectivity.places import Measured, Network, check, evaluator
from dpkit.connectivity.record import Path, refine
from dpkit.connectivity.spec import PathSpec, evenly
from dpkit.models import ModelSpec
from dpkit.tree import Mask, Params


def path(spec: PathSpec, model: ModelSpec, a: Network, b: Network, images: Tensor, labels: Tensor, *,
         statistics_images: Tensor | None = None, threads: int = 1, masks: tuple[Mask, Mask] | None = None,
         starts: tuple[Params, Params] | None = None, known: Path | None = None) -> Path:
    """Error and loss on the line between networks ``a`` and ``b``, each (params, buffers), in eval mode.

    images: (N, C, S, S) normalised float32, the evaluation set (of test or of training data).  labels: (N,) int64.
    statistics_images: normalised training images without augmentation, (M, C, S, S), for re-estimating
        BatchNorm; needed only for networks with BatchNorm under ``spec.statistics == "reestimate"``, and always
        under ``repair``.
    threads: cores that share the points; the same bits for any number.
    masks: of both, where they must be the same.  starts: initial parameters of both, where they must be the same.
    known: a path between the same networks, on the same images and under the same statistics and precision: its points are taken
        over and only the others are evaluated. The result is that without ``known``, bit for bit on a CPU; on a GPU, where
        networks are evaluated several at a time, within rounding.
    Raises ``ValueError`` with one line when the networks differ in names or shapes, are not of ``model``, have NaN weights, do
    not share mask or start where that is asked for, when the evaluation set is empty or its lengths differ, when labels are no
    classes of the model, when statistics images are missing, when ``known`` cannot have been measured on as many images, or
    (:class:`dpkit.barriers.NotFinite`) when the logits of a network on the way overflow.
    """
    both = {"a": a, "b": b}
    masks_of, starts_of = (pair and dict(zip(both, pair, strict=True)) for pair in (masks, starts))
    check(model, both, images, labels, masks_of, starts_of)
    measured = Measured(evaluator(spec, model, both, images, labels, statistics_images, threads), len(images))
    if known is not None:
        measured.take("a", "b", known)
    return _refined(spec, measured, "a", "b")


def all_pairs(spec: PathSpec, model: ModelSpec, networks: Mapping[str, Network], images: Tensor, labels: Tensor, *,
              statistics_images: Tensor | None = None, threads: int = 1, masks: Mapping[str, Mask] | None = None,
              starts: Mapping[str, Params] | None = None,
              known: Mapping[tuple[str, str], Path] | None = None) -> dict[tuple[str, str], Path]:
    """:func:`path` between each two of n ``networks`` (label -> (params, buffers)), by labels in their order.

    Each network itself is evaluated once for all its paths: n + n (n - 1) / 2 (points - 2) evaluations. masks, starts: label ->
    mask, initial parameters. known: some or all of the pairs, measured before. Other arguments, values and errors as of
    :func:`path`; fewer than 2 networks, and known pairs of others, are refused as well.
    """
    if len(networks) < 2:
        raise ValueError(f"paths need at least 2 networks, got {len(networks)}; train another child")
    check(model, networks, images, labels, masks, starts)
    pairs = list(itertools.combinations(networks, 2))
    measured = Measured(evaluator(spec, model, networks, images, labels, statistics_images, threads), len(images))
    for pair, line in (known or {}).items():
        if pair not in pairs:
            raise ValueError(f"known must be paths between two of the networks {', '.join(networks)}, in this order; got "
                             f"{' and '.join(pair)}")
        measured.take(*pair, line)
    inside = evenly(spec.points)[1:-1].tolist()
    measured([(name, name, 0.0) for name in networks] + [(*pair, alpha) for pair in pairs for alpha in inside])  # in one job
    return {pair: _refined(spec, measured, *pair) for pair in pairs}


def _refined(spec: PathSpec, measured: Measured, a: str, b: str) -> Path:
    between = functools.partial(measured.between, a, b)
    return refine(between(evenly(spec.points)), between, error_tolerance=spec.error_tolerance,
                  loss_tolerance=spec.loss_tolerance, most_points=spec.most_points)
