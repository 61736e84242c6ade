"""Does speed cost accuracy? The paper's loop and ours with equal networks, epochs and recipe, in minutes.

``python -m dpkit.bench.accuracy FILE`` writes one row a seed and form: the reference loop; the same with the library's
augmentation, which draws crop, scale or rotation for each image where the reference draws one of them for a batch; the library's
loop in fp32; and in bf16, compiled. A seed gives the same initial weights to all forms; the order of images and the random
numbers of augmentation are drawn by each loop in its own way.
"""
from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dpkit import cores, data, models, training, tree
from dpkit.bench import reference
from dpkit.data import Dataset, DataSpec, normalise
from dpkit.models import ModelSpec
from dpkit.statistics import mean_interval
from dpkit.training import TrainSpec

SEEDS = 5
MODEL = ModelSpec(arch="convnet3", width=16, image_size=16)
RECIPE = TrainSpec(epochs=24, lr=0.05)
Network = tuple[tree.Params, tree.Buffers]
EQUAL = "reference, an operation an image"
FORMS = ("reference", EQUAL, "fp32", "bf16 compiled")


def rows(seeds: Iterable[int] = range(SEEDS), recipe: TrainSpec = RECIPE, model: ModelSpec = MODEL, spec: DataSpec | None = None,
         forms: tuple[str, ...] = FORMS, tell: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
    """One row a seed and form: seed, form, accuracy (fraction of the test images)."""
    sets = data.load(spec or DataSpec())
    images, labels = normalise(sets.test.images, sets.mean, sets.std), sets.test.labels
    for seed in seeds:
        for form in forms:
            start = models.init(model, tree.generator_for("accuracy", seed))
            params, buffers = (_reference if form.startswith("reference") else _ours)(form, recipe, model, sets, start, seed)
            error, _ = training.evaluate(model, params, buffers, images, labels)
            tell(f"seed {seed}, {form}: {1 - error:.4f}")
            yield {"seed": seed, "form": form, "accuracy": round(1 - error, 6)}


def _ours(form: str, recipe: TrainSpec, model: ModelSpec, sets: Dataset, start: Network, seed: int) -> Network:
    low = form != "fp32"
    found = training.fit(recipe.replace(precision="bf16" if low else "fp32", compile=low), model, sets.train, sets.mean, sets.std,
                         *(tree.stack([part]) for part in start), [tree.seed_for("accuracy", "noise", seed)])
    return found.network(0)


def _reference(form: str, recipe: TrainSpec, model: ModelSpec, sets: Dataset, start: Network, seed: int) -> Network:
    net = reference.network(model)
    net.load_state_dict({**start[0], **start[1]}, strict=False)
    generator = tree.generator_for("accuracy", "reference", seed)
    batches = reference.loader(normalise(sets.train.images, sets.mean, sets.std), sets.train.labels, generator)
    optimiser = reference.sgd(net, recipe.lr)
    milestones = [round(m * recipe.epochs) for m in recipe.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, recipe.gamma)
    distort = reference.dsa if form == "reference" else functools.partial(data.augment, recipe.augment)
    for _ in range(recipe.epochs):
        reference.train_epoch(net, batches, optimiser, generator, recipe.cutmix > 0, distort)
        schedule.step()
    state = {name: t.detach().clone() for name, t in net.state_dict().items()}
    return {n: state[n] for n in start[0]}, {n: state[n] for n in start[1]}


def differences(found: list[dict[str, Any]]) -> dict[str, tuple[float, float | None, float | None]]:
    """Accuracy of each form minus that of :data:`EQUAL`, paired by seed: mean and 95% interval."""
    by = {(row["seed"], row["form"]): float(row["accuracy"]) for row in found}
    seeds = sorted({seed for seed, _ in by})
    forms = [form for form in dict.fromkeys(row["form"] for row in found) if form != EQUAL]
    return {form: mean_interval([by[seed, form] - by[seed, EQUAL] for seed in seeds]) for form in forms}


def main(path: str) -> None:
    """Write the rows to ``path`` and print the differences."""
    cores.keep_memory()
    found = list(rows(tell=lambda text: print(text, file=sys.stderr, flush=True)))
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["seed", "form", "accuracy"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    for form, (mean, low, high) in differences(found).items():
        print(f"{form} minus {EQUAL}: {100 * mean:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}], n = {SEEDS}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dpkit.bench.accuracy FILE.csv")
    main(sys.argv[1])
