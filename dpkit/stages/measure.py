"""Stages that measure: paths between networks, planes through three, the Hessian at one."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from dpkit import alignment, connectivity, hessian, landscape, robustness, tree
from dpkit.connectivity import PathSpec
from dpkit.data import normalise
from dpkit.hessian import HessianSpec
from dpkit.landscape import PlaneSpec
from dpkit.models import ModelSpec
from dpkit.robustness import RobustnessSpec
from dpkit.stages.footprint import CORRUPTED
from dpkit.stages.make import initial, network_of
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact


def _on(device: str, artifact: Artifact):
    params, buffers = network_of(artifact)
    return tree.to(params, device), tree.to(buffers, device)


def _images(context: Context, unit: Unit):
    """Test images, labels and training images, normalised, on the device; training images only as many as are used."""
    dataset = context.dataset(unit.data)
    few = dataset.train.images[:: max(1, len(dataset.train) // 1000)]
    return (normalise(dataset.test.images, dataset.mean, dataset.std).to(context.device),
            dataset.test.labels.to(context.device), normalise(few, dataset.mean, dataset.std).to(context.device))


_CORRUPTED: dict[tuple, dict] = {}


@stage("robustness", 1)
def measure_robustness(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Errors on corrupted test images, and on clean ones with weights of few bits.

    Tensors: corruption_errors (C, S) and quantised_errors (B,), fractions, in the order of the specification. Result: the
    clean error, the mean over corruptions and severities, and the error at each number of bits.
    """
    spec, dataset, seed = RobustnessSpec(**unit.spec["robustness"]), context.dataset(unit.data), unit.spec["seed"]
    place, shared = (spec, unit.data, str(context.data_root), seed), None
    if robustness.bytes_needed(spec, len(dataset.test), tuple(dataset.test.images.shape[1:])) <= CORRUPTED:
        if place not in _CORRUPTED:
            _CORRUPTED.clear()
            _CORRUPTED[place] = robustness.corrupted_images(spec, dataset.test.images, seed)
        shared = _CORRUPTED[place]
    found = robustness.measure(spec, ModelSpec(**unit.spec["model"]), *_on(context.device, parents["network"]), dataset.test,
                               dataset.mean, dataset.std, seed, shared)
    bits = {f"error_{bits}bit": float(error) for bits, error in zip(spec.bits, found.quantised_errors, strict=True)}
    return Output({"corruption_errors": found.corruption_errors, "quantised_errors": found.quantised_errors},
                  {"clean_error": found.clean_error, "mean_corruption_error": found.mean_corruption_error, **bits})


@stage("path", 1)
def measure_path(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss on the test images along the line between two children. Result: both curves and their barriers."""
    images, labels, few = _images(context, unit)
    model = ModelSpec(**unit.spec["model"])
    found = connectivity.path(PathSpec(**unit.spec["path"]), model, _on(context.device, parents["a"]),
                              _on(context.device, parents["b"]), images, labels, statistics_images=few)
    return Output({"alphas": found.alphas, "errors": found.errors, "losses": found.losses},
                  {"error_barrier": found.error_barrier, "loss_barrier": found.loss_barrier,
                   "stable": connectivity.is_stable(found.error_barrier)})


@stage("alignment", 1)
def measure_alignment(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """How far apart two children are, and what lies between them once the second one's channels are put in the first one's order.

    Tensors: alphas, errors and losses along the line to the matched child. Result: aligned_barrier (error) and
    aligned_loss_barrier; moved, the share of channels that changed places; l2 and aligned_l2, distances over all parameters;
    cosine of the ways that training took from their start; sparsity_between, that of a network strictly between the matched
    two, whose masks differ where channels moved; disagreement, the share of test images that they class differently.
    """
    images, labels, few = _images(context, unit)
    model = ModelSpec(**unit.spec["model"])
    a, b = (_on(context.device, parents[name]) for name in "ab")
    ticket = parents.get("ticket")
    mask = tree.to(ticket.group("mask"), context.device) if ticket else None
    found = alignment.weight_matching(model, a[0], b[0], (mask, mask) if mask else None,
                                      generator=tree.generator_for(unit.spec["seed"], "alignment"))
    matched = tuple(alignment.permute(model, tensors, found) for tensors in b)
    along = connectivity.path(PathSpec(**unit.spec["path"]), model, a, matched, images, labels, statistics_images=few)
    start = tree.to(network_of(ticket)[0] if ticket else initial(unit.spec)[0], context.device)
    said = [connectivity.predict(model, *network, images) for network in (a, b)]
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


@stage("plane", 1)
def measure_plane(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss on the plane through three children. Tensors: x (R,), y (R,), errors and losses (R, R), corners."""
    images, labels, few = _images(context, unit)
    model = ModelSpec(**unit.spec["model"])
    networks = [_on(context.device, parents[name]) for name in "abc"]
    flat = landscape.plane(*(params for params, _ in networks))
    grid = landscape.grid(PlaneSpec(**unit.spec["plane"]), model, flat, networks[0][1], images, labels, statistics_images=few)
    return Output({"x": grid.x, "y": grid.y, "errors": grid.errors, "losses": grid.losses, "corners": flat.coordinates},
                  {"highest_error": float(grid.errors.max()), "lowest_error": float(grid.errors.min())})


@stage("hessian", 1)
def measure_hessian(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Trace, diagonal and top eigenvalue at a trained network, on surviving weights. Result: values and standard errors."""
    spec, model, dataset = HessianSpec(**unit.spec["hessian"]), ModelSpec(**unit.spec["model"]), context.dataset(unit.data)
    params, buffers = _on(context.device, parents["network"])
    mask = tree.to(parents["ticket"].group("mask"), context.device) if "ticket" in parents else None
    chosen = hessian.subset(dataset.train.labels, min(spec.images, len(dataset.train)))
    images = normalise(dataset.train.images[chosen], dataset.mean, dataset.std).to(context.device)
    op = hessian.Operator.from_spec(spec, model, params, buffers, images, dataset.train.labels[chosen].to(context.device),
                                    mask=mask, compile="auto")
    trace, diagonal = hessian.trace_and_diagonal(op, spec.probes, tree.generator_for(unit.spec["seed"], "probes"))
    steps = min(spec.lanczos_steps, op.size)
    top = hessian.top_eigenvalue(op, steps, tree.generator_for(unit.spec["seed"], "lanczos"))
    values = diagonal.values.double()
    negative = float((values < -2 * diagonal.standard_errors.double()).double().mean())
    return Output({"diagonal": diagonal.values.float(), "diagonal_error": diagonal.standard_errors.float()},
                  {"trace": trace.value, "trace_error": trace.standard_error, "top_eigenvalue": top.value,
                   "top_eigenvalue_error": top.standard_error, "surviving": op.size,
                   "trace_per_weight": trace.value / op.size, "diagonal_negative": negative,
                   "diagonal_error": float(torch.sqrt((diagonal.standard_errors.double() ** 2).mean())),
                   "products": trace.products + top.products})
