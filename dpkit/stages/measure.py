"""Stages that measure one network: what it stands, and the Hessian where it ended."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from dpkit import hessian, robustness, tree
from dpkit.data import normalise
from dpkit.hessian import HessianSpec
from dpkit.models import ModelSpec
from dpkit.robustness import RobustnessSpec
from dpkit.stages.connect import on_device
from dpkit.stages.footprint import CORRUPTED
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact

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
    network = on_device(context.device, parents["network"])
    found = robustness.measure(spec, ModelSpec(**unit.spec["model"]), *network, dataset.test, dataset.mean, dataset.std, seed,
                               shared)
    bits = {f"error_{bits}bit": float(error) for bits, error in zip(spec.bits, found.quantised_errors, strict=True)}
    return Output({"corruption_errors": found.corruption_errors, "quantised_errors": found.quantised_errors},
                  {"clean_error": found.clean_error, "mean_corruption_error": found.mean_corruption_error, **bits})


@stage("hessian", 1)
def measure_hessian(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Trace, diagonal and top eigenvalue at a trained network, on surviving weights. Result: values and standard errors."""
    spec, model, dataset = HessianSpec(**unit.spec["hessian"]), ModelSpec(**unit.spec["model"]), context.dataset(unit.data)
    params, buffers = on_device(context.device, parents["network"])
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
