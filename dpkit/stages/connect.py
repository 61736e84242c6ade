"""Stages that measure what lies between networks: paths, paths layer by layer, paths after matching channels."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dpkit import alignment, connectivity, models, tree
from dpkit.connectivity import PathSpec
from dpkit.data import Split, normalise
from dpkit.models import ModelSpec
from dpkit.stages.make import initial, network_of
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact, key_for

FINEST = 201  # points of the finest path or grid side that is looked for in the store


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


def stored(context: Context, unit: Unit, group: str, counts: Iterable[int], field: str) -> Artifact | None:
    """The same measurement with another count of points, if the store has one; the first of ``counts`` that it has.

    On a processor points that two measurements share have the same values to the last bit, so they need not be measured twice; on
    a GPU, where networks are evaluated together, they have not, and nothing is taken over.
    """
    if context.device != "cpu":
        return None
    parents = {role: parent.key for role, parent in unit.parents.items()}
    for count in counts:
        spec = {**unit.spec, group: {**unit.spec[group], field: count}}
        key = key_for(unit.stage, unit.version, spec, parents)
        if count != unit.spec[group][field] and context.store.has(key):
            found = context.store.get(key)
            if not found.failed and found.meta.get("device") == "cpu":
                return found
    return None


def refined(before: Artifact | None) -> dict[str, str]:
    """Which artifact's points were taken over, for the result; nothing where all were measured."""
    return {"refined": before.key} if before else {}


def nested(points: int, least: int = 3) -> list[int]:
    """Counts of evenly spaced points that share some with ``points``, the most useful first: finer ones, then coarser ones.

    >>> nested(21)[-4:], 41 in nested(21)
    ([11, 6, 5, 3], True)
    """
    steps = points - 1
    finer = [times * steps + 1 for times in range(2, (FINEST - 1) // steps + 1)]
    return [*finer, *(steps // part + 1 for part in range(2, steps) if steps % part == 0 and steps // part + 1 >= least)]


@stage("path", 1)
def measure_path(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss along the line between two networks, on test images or, ``on`` ``train``, on training images.

    Result: both curves and their barriers.
    """
    split, few = shown(context, unit)
    spec, known = PathSpec(**unit.spec["path"]), None
    if before := stored(context, unit, "path", nested(spec.points), "points"):
        known = connectivity.Path(*(before.tensors[name] for name in ("alphas", "errors", "losses")))
    found = connectivity.path(spec, ModelSpec(**unit.spec["model"]), on_device(context.device, parents["a"]),
                              on_device(context.device, parents["b"]), split.images, split.labels, statistics_images=few,
                              known=known)
    return Output({"alphas": found.alphas, "errors": found.errors, "losses": found.losses},
                  {"error_barrier": found.error_barrier, "loss_barrier": found.loss_barrier,
                   "stable": connectivity.is_stable(found.error_barrier), **refined(before)})


@stage("layers", 1)
def measure_layers(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss while one layer moves from the first child to the second, and while all but this one do.

    Tensors: alphas (T,); errors, losses, others_errors and others_losses (L, T); end_errors and end_losses (2,), of both
    children. Result: names of the layers; the highest barrier of one that moves, and of others that do.
    """
    split, few = shown(context, unit)
    spec, known = PathSpec(**unit.spec["path"]), None
    if before := stored(context, unit, "path", nested(spec.points), "points"):
        known = connectivity.LayerPaths(tuple(before.result["layers"]), **before.tensors)
    found = connectivity.layer_paths(spec, ModelSpec(**unit.spec["model"]), on_device(context.device, parents["a"]),
                                     on_device(context.device, parents["b"]), split.images, split.labels,
                                     statistics_images=few, known=known)
    names = ("alphas", "errors", "losses", "others_errors", "others_losses", "end_errors", "end_losses")
    return Output({name: getattr(found, name) for name in names},
                  {"layers": list(found.layers), "highest_barrier": float(found.error_barriers.max()),
                   "highest_others_barrier": float(found.others_error_barriers.max()), **refined(before)})


@stage("alignment", 1)
def measure_alignment(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """How far apart two children are, and what lies between them once the second one's channels are put in the first one's order.

    Tensors: alphas, errors and losses along the line to the matched child. Result: aligned_barrier (error) and
    aligned_loss_barrier; moved, the share of channels that changed places; l2 and aligned_l2, distances over all parameters;
    cosine of the ways that training took from their start; sparsity_between, that of a network strictly between the matched
    two, whose masks differ where channels moved; disagreement, the share of test images that they class differently.
    """
    split, few = shown(context, unit)
    model = ModelSpec(**unit.spec["model"])
    a, b = (on_device(context.device, parents[name]) for name in "ab")
    ticket = parents.get("ticket")
    mask = tree.to(ticket.group("mask"), context.device) if ticket else None
    found = alignment.weight_matching(model, a[0], b[0], (mask, mask) if mask else None,
                                      generator=tree.generator_for(unit.spec["seed"], "alignment"))
    matched = tuple(alignment.permute(model, tensors, found) for tensors in b)
    along = connectivity.path(PathSpec(**unit.spec["path"]), model, a, matched, split.images, split.labels, statistics_images=few)
    start = tree.to(network_of(ticket)[0] if ticket else initial(unit.spec)[0], context.device)
    said = [connectivity.predict(model, *network, split.images) for network in (a, b)]
    between = 0.0
    if mask:
        other = alignment.permute(model, mask, found)
        between = 1 - sum(int((mask[n] | other[n]).sum()) for n in mask) / sum(m.numel() for m in mask.values())
    moved = sum(int((order != torch.arange(len(order))).sum()) for order in found.values())
    return Output({"alphas": along.alphas, "errors": along.errors, "losses": along.losses},
                  {"aligned_barrier": along.error_barrier, "aligned_loss_barrier": along.loss_barrier,
                   "moved": moved / sum(map(len, found.values())),
                   "l2": float(connectivity.distances(a[0], b[0]).l2[-1]),
                   "aligned_l2": float(connectivity.distances(a[0], matched[0]).l2[-1]),
                   "cosine": float(connectivity.distances(a[0], b[0], origin=start).cosine[-1]),
                   "sparsity_between": between, "disagreement": connectivity.disagreement(*said)})
