"""Stages that measure what lies between networks: paths, paths layer by layer, paths after matching channels."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import wraps
from math import gcd
from typing import Any

import torch

from dpkit import alignment, connectivity, models, tree
from dpkit.connectivity import NotFinite, Path, PathSpec
from dpkit.data import Split, normalise
from dpkit.models import ModelSpec
from dpkit.stages.make import initial, network_of
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact, key_for

FINEST = 201  # points of the finest path or grid side that is looked for in the store
TOLERANCES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.0)  # of paths that are looked for in the store, those with most points first


def on_device(device: str, artifact: Artifact):
    """Parameters and buffers of an artifact on the device."""
    params, buffers = network_of(artifact)
    return tree.to(params, device), tree.to(buffers, device)


def shown(context: Context, unit: Unit) -> tuple[Split, torch.Tensor]:
    """What errors are measured on, and training images for statistics, both normalised, on the device.

    Test images, or as many training images as the unit's ``images`` says, evenly spaced, where it is ``on`` ``train``. Of the
    other training images only as many are normalised as are used.
    """
    dataset = context.dataset(unit.data)
    few = dataset.train.images[:: max(1, len(dataset.train) // 1000)]
    split = dataset.test
    if unit.spec.get("on") == "train":
        chosen = models.spread(len(dataset.train), unit.spec["images"])
        split = Split(dataset.train.images[chosen], dataset.train.labels[chosen])
    mean, std = dataset.mean, dataset.std
    return (Split(normalise(split.images, mean, std), split.labels).to(context.device),
            normalise(few, mean, std).to(context.device))


def children_of(context: Context, unit: Unit, names: str) -> dict[str, Any]:
    """``masks`` and ``starts`` of the networks called ``names``, for what checks them; nothing unless all grew from one ticket.

    Networks of different tickets, or of none, are compared in a study because they are of different ones.
    """
    tickets = [unit.parents[name].parents.get("ticket") for name in names]
    if None in tickets or len({ticket.key for ticket in tickets}) > 1:
        return {}
    ticket = context.store.get(tickets[0].key)
    mask, start = (tree.to(ticket.group(group), context.device) for group in ("mask", "params"))
    return {"masks": (mask,) * len(names), "starts": (start,) * len(names)}


def as_failure(function):
    """A path through networks without finite values is a row without a result: it is kept, and stops no chapter."""
    @wraps(function)
    def measured(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
        try:
            return function(context, unit, parents)
        except NotFinite as error:
            return Output({}, {}, failed=str(error))

    return measured


def stored(context: Context, unit: Unit, group: str, others: Iterable[Mapping[str, Any]]) -> Artifact | None:
    """The same measurement under another specification of its points, if the store has one; the first of ``others`` that it has.

    others: what the field ``group`` of the unit's specification may be instead. On a processor points that two measurements
    share have the same values to the last bit, so they need not be measured twice; on a GPU, where networks are evaluated
    together, they have not, and nothing is taken over.
    """
    if context.device != "cpu":
        return None
    parents = {role: parent.key for role, parent in unit.parents.items()}
    for other in others:
        key = key_for(unit.stage, unit.version, {**unit.spec, group: other}, parents)
        if key != unit.key and context.store.has(key):
            found = context.store.get(key)
            if not found.failed and found.meta.get("device") == "cpu":
                return found
    return None


def refined(before: Artifact | None) -> dict[str, str]:
    """Which artifact's points were taken over, for the result; nothing where all were measured."""
    return {"refined": before.key} if before else {}


def nested(points: int, least: int = 3) -> list[int]:
    """Counts of evenly spaced points that share some with ``points``: those that share most first, finer before coarser ones.

    All of the points of one, or more than the ends and the middle.

    >>> nested(21)[:3], nested(21)[-1], 61 in nested(41), 16 in nested(11)
    ([41, 61, 81], 3, True, True)
    """
    def shared(count: int) -> int:
        return gcd(count - 1, points - 1)

    counts = [n for n in range(least, FINEST + 1) if n != points and (shared(n) > 2 or shared(n) == min(n, points) - 1)]
    return sorted(counts, key=lambda n: (-shared(n), n < points, n))


def earlier_paths(spec: PathSpec) -> list[dict[str, Any]]:
    """Specifications of paths that share points with one: to another tolerance, which adds points to the same ones, or of
    another number of points."""
    changes = [{"error_tolerance": t} for t in TOLERANCES]
    usual = dict.fromkeys((spec.error_tolerance, 0.0))
    changes += [{"points": n, "error_tolerance": t} for n in nested(spec.points) for t in usual]
    return [spec.replace(**change).to_dict() for change in changes if change.get("points", 0) <= spec.most_points]


def known_path(before: Artifact | None) -> Path | None:
    """The path in an artifact."""
    return before and Path(*(before.tensors[name] for name in ("alphas", "errors", "losses")))


@stage("path", 1)
@as_failure
def measure_path(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss along the line between two networks, on test images or, ``on`` ``train``, on training images.

    Result: both curves and their barriers.
    """
    split, few = shown(context, unit)
    spec = PathSpec(**unit.spec["path"])
    before = stored(context, unit, "path", earlier_paths(spec))
    found = connectivity.path(spec, ModelSpec(**unit.spec["model"]), on_device(context.device, parents["a"]),
                              on_device(context.device, parents["b"]), split.images, split.labels, statistics_images=few,
                              known=known_path(before), **children_of(context, unit, "ab"))
    return Output({"alphas": found.alphas, "errors": found.errors, "losses": found.losses},
                  {"error_barrier": found.error_barrier, "loss_barrier": found.loss_barrier,
                   "stable": connectivity.is_stable(found.error_barrier), **refined(before)})


@stage("layers", 1)
@as_failure
def measure_layers(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss while one layer moves from the first child to the second, and while all but this one do.

    Tensors: alphas (T,); errors, losses, others_errors and others_losses (L, T); end_errors and end_losses (2,), of both
    children. Result: names of the layers; the highest barrier of one that moves, and of others that do.
    """
    split, few = shown(context, unit)
    spec, known = PathSpec(**unit.spec["path"]), None
    if before := stored(context, unit, "path", earlier_paths(spec)):
        known = connectivity.LayerPaths(tuple(before.result["layers"]), **before.tensors)
    found = connectivity.layer_paths(spec, ModelSpec(**unit.spec["model"]), on_device(context.device, parents["a"]),
                                     on_device(context.device, parents["b"]), split.images, split.labels,
                                     statistics_images=few, known=known, **children_of(context, unit, "ab"))
    names = ("alphas", "errors", "losses", "others_errors", "others_losses", "end_errors", "end_losses")
    return Output({name: getattr(found, name) for name in names},
                  {"layers": list(found.layers), "highest_barrier": float(found.error_barriers.max()),
                   "highest_others_barrier": float(found.others_error_barriers.max()), **refined(before)})


@stage("alignment", 2)
@as_failure
def measure_alignment(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """How far apart two networks are, and what lies between them once the second one's channels are put in the first one's order.

    Tensors: alphas, errors and losses along the line to the matched network; l2, aligned_l2 and cosine (L + 1,), of each layer's
    weight and, last, of all parameters; sizes (L + 1,), entries behind them; ``order/GROUP``, the permutations. Result: layers,
    the L names; aligned_barrier (error) and aligned_loss_barrier; moved, the share of channels that changed places; l2 and
    aligned_l2, distances over all parameters; cosine of the ways that training took from a common start (of the weights
    themselves where the starts differ), and aligned_cosine of the weights of the matched two where there is no common start;
    sparsity_between, that of a network strictly between the matched two, whose masks differ where channels moved; disagreement,
    the share of test images that they class differently, and churn_gains, churn_losses, churn_sideways and churn_needless of it
    (:class:`dpkit.connectivity.Churn`). Nothing but the line depends on its points, and is taken over with them.
    """
    split, few = shown(context, unit)
    model, spec = ModelSpec(**unit.spec["model"]), PathSpec(**unit.spec["path"])
    a, b = (on_device(context.device, parents[name]) for name in "ab")
    if before := stored(context, unit, "path", earlier_paths(spec)):
        order = before.group("order")
        tensors = {name: t for name, t in before.tensors.items() if name not in ("alphas", "errors", "losses")}
        result = {name: value for name, value in before.result.items() if name not in ("aligned_barrier", "aligned_loss_barrier")}
    else:
        order, tensors, result = _matched(context, unit, model, a, b, parents.get("ticket"), split)
    matched = tuple(alignment.permute(model, t, order) for t in b)
    found = connectivity.path(spec, model, a, matched, split.images, split.labels, statistics_images=few,
                              known=known_path(before))
    return Output({"alphas": found.alphas, "errors": found.errors, "losses": found.losses, **tensors},
                  {**result, "aligned_barrier": found.error_barrier, "aligned_loss_barrier": found.loss_barrier,
                   **refined(before)})


def _matched(context: Context, unit: Unit, model: ModelSpec, a, b, ticket: Artifact | None, split: Split):
    """Permutations of ``b``, and what of :func:`measure_alignment` has nothing to do with the line: tensors and results."""
    mask = tree.to(ticket.group("mask"), context.device) if ticket else None
    order = alignment.weight_matching(model, a[0], b[0], (mask, mask) if mask else None,
                                      generator=tree.generator_for(unit.spec["seed"], "alignment"))
    params = alignment.permute(model, b[0], order)
    start = network_of(ticket)[0] if ticket else initial(unit.spec)[0] if "init_seed" in unit.spec else None
    origin = start and tree.to(start, context.device)
    far = {"l2": _apart(model, a[0], b[0]), "aligned_l2": _apart(model, a[0], params),
           "cosine": _apart(model, a[0], b[0], origin)}
    tensors = {"l2": far["l2"].l2, "aligned_l2": far["aligned_l2"].l2, "cosine": far["cosine"].cosine, "sizes": far["l2"].sizes}
    changed = connectivity.churn(*(connectivity.predict(model, *network, split.images) for network in (a, b)), split.labels)
    between = 0.0
    if mask:
        other = alignment.permute(model, mask, order)
        between = 1 - sum(int((mask[n] | other[n]).sum()) for n in mask) / sum(m.numel() for m in mask.values())
    moved = sum(int((p != torch.arange(len(p))).sum()) for p in order.values())
    without = {} if origin else {"aligned_cosine": float(far["aligned_l2"].cosine[-1])}
    result = {"layers": list(far["l2"].tensors), "moved": moved / sum(map(len, order.values())),
              **{name: float(tensors[name][-1]) for name in far}, **without, "sparsity_between": between,
              "disagreement": changed.total, "churn_gains": changed.gains, "churn_losses": changed.losses,
              "churn_sideways": changed.sideways, "churn_needless": changed.needless}
    return order, {**tensors, **{f"order/{name}": p for name, p in order.items()}}, result


def _apart(model: ModelSpec, a, b, origin=None) -> connectivity.Distances:
    """Distances of each layer's weight and, last, of all parameters (not of these weights alone)."""
    layers, whole = (connectivity.distances(a, b, names=names, origin=origin) for names in (models.prunable(model), None))
    both = {name: torch.cat([getattr(layers, name)[:-1], getattr(whole, name)[-1:]]) for name in ("sizes", "l2", "cosine")}
    return connectivity.Distances(layers.tensors, **both)
