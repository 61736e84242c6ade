"""The stage that measures what a network stands."""
from __future__ import annotations

from collections.abc import Mapping

from dpkit import robustness
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
