"""The two rows of a GPU that are whole pieces of work with a time limit, not pairs."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dpkit import data, distill, models, project, stages, training, tree
from dpkit.data import DataSpec, Split, normalise
from dpkit.distill import IDCSpec, decode
from dpkit.models import ModelSpec
from dpkit.stages import forecast
from dpkit.stages.run import POPULATION, SMALL
from dpkit.store import Store
from dpkit.training import TrainSpec

HOLDOUT = "cifar10_holdout.npz"
#: four arms, ten rounds, two children at six sparsities, paths, spectra
STUDY: Mapping[str, Any] = {
    "width": 128, "rounds": 10, "fraction": 0.2, "at_rounds": (1, 2, 4, 6, 8, 10), "children": 2, "seeds": 1, "points": 25,
    "arms": ("imp", "distilled", "random_real", "random"), "hessian_arms": ("dense", "imp", "distilled", "random_real"),
    "distill_precision": "bf16", "distill_compile": True,
}


class _Enough(Exception):
    """Time to distil is over."""


def cifar10() -> str:
    """The data set of CIFAR-10 that is at hand: the hold-out file where there is one."""
    return f"npz:{project.data_folder() / HOLDOUT}" if (project.data_folder() / HOLDOUT).is_file() else "cifar10"


def idc(dataset: str | None = None, *, minutes: float = 15.0, device: str = "cuda", wanted: float = 0.65, seeds: int = 3,
        model: Mapping[str, Any] | None = None, recipe: IDCSpec | None = None,
        train: TrainSpec | None = None) -> dict[str, Any]:
    """Distil for two thirds of ``minutes``, train ``seeds`` networks on the result, and report minutes and mean test accuracy.

    The ratio is the time allowed over the time taken, and there is none if the accuracy stays below ``wanted``.
    """
    started = time.perf_counter()
    sets = data.load(DataSpec(dataset=dataset or cifar10()), project.data_folder())
    spec = ModelSpec(classes=sets.classes, image_size=sets.train.images.shape[-1], **(model or {"width": 128}))
    recipe = recipe or IDCSpec(precision="bf16", compile=True)
    found: list[torch.Tensor] = []

    def checkpoint(state: Mapping[str, torch.Tensor]) -> None:
        found[:] = [state["images"]]
        if time.perf_counter() - started > 60 * minutes * 2 / 3:
            raise _Enough

    with suppress(_Enough):
        distill.idc(recipe, distill.Task(real=sets.train, mean=sets.mean, std=sets.std, model=spec, seed=0, device=device,
                                         checkpoint=checkpoint))
    labels = torch.arange(spec.classes).repeat_interleave(recipe.ipc)
    small = decode(Split(found[0], labels), recipe.factor)
    train = train or TrainSpec(epochs=1000, precision="bf16", compile=True)
    starts = [models.init(spec, tree.generator_for("benchmark", "idc", seed)) for seed in range(seeds)]
    fitted = training.fit(train, spec, small, sets.mean, sets.std, tree.stack([p for p, _ in starts]),
                          tree.stack([b for _, b in starts]), list(range(seeds)), device=device)
    images = normalise(sets.test.images, sets.mean, sets.std).to(device)
    accuracy = fmean(1 - training.evaluate(spec, *(tree.to(part, device) for part in fitted.network(p)), images,
                                           sets.test.labels.to(device))[0] for p in range(seeds))
    taken = (time.perf_counter() - started) / 60
    text = f"accuracy {accuracy:.1%} (mean of {seeds}) after {taken:.1f} minutes"
    reached = accuracy >= wanted
    return {"ours": taken, "peer": minutes, "ratio": minutes / taken if reached else None, "pairs": 1, "note": text,
            "low": minutes / taken, "high": minutes / taken, "why": "" if reached else f"{text}; {wanted:.0%} was asked"}


def study(dataset: str | None = None, *, minutes: float = 60.0, device: str = "cuda", profile: str = "cifar10-small",
          settings: Mapping[str, Any] = STUDY) -> dict[str, Any]:
    """Make a whole study in an empty store; minutes taken, and what was predicted before."""
    chosen = stages.load_study(profile, {**settings, "dataset": dataset or cifar10()})
    plan = stages.Plan(chosen, data.load(chosen.data, project.data_folder()).identity)
    units = [unit for chapter in stages.CHAPTERS for unit in plan.share(chapter)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        todo = stages.missing(store, units)
        predicted = forecast.of(store, todo, device=device, small=SMALL, population=POPULATION).seconds / 60
        started = time.perf_counter()
        report = stages.compute(store, units, device=device, data_root=project.data_folder())
        taken = (time.perf_counter() - started) / 60
    text = f"predicted {predicted:.1f} minutes, taken {taken:.1f} ({taken / predicted - 1:+.0%} of the prediction)"
    why = f"{len(report.errors)} units ended in an error; {text}" if report.errors else ""
    return {"ours": taken, "peer": minutes, "ratio": None if why else minutes / taken, "low": minutes / taken,
            "high": minutes / taken, "pairs": 1, "note": text, "why": why}


WHOLE = {"gpu-idc": idc, "gpu-study": study}
