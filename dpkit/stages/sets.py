"""Stages that make small sets: by a method, by giving one soft labels, by reading what others publish."""
from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpkit import distill, models
from dpkit.data import Split, normalise
from dpkit.distill import published
from dpkit.models import ModelSpec
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact
from dpkit.tree import Buffers, Params

CHECKPOINT_SECONDS = 30.0


def network_of(artifact: Artifact, prefix: str = "") -> tuple[Params, Buffers]:
    """Parameters and buffers in an artifact (of a snapshot, with ``prefix`` ``"STEP/"``)."""
    return artifact.group(f"{prefix}params"), artifact.group(f"{prefix}buffers")


def trajectories(unit: Unit, parents: Mapping[str, Artifact]) -> list[list[tuple[Params, Buffers]]]:
    """The trained networks among the parents, ``network0`` and so on, each at the ``times`` that the unit says."""
    roles = sorted((r for r in parents if r.startswith("network")), key=lambda r: int(r.removeprefix("network")))
    return [[network_of(parents[role], f"{step}/" if step >= 0 else "") for step in unit.spec["times"]] for role in roles]


@stage("distill", 1)
def make_set(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Make a small set by a method.

    Tensors: images, labels, mean, std, and ``before``, what learned images started from. Result: the recipe, sizes, and the
    history of the method's loss.
    """
    spec, dataset = distill.spec_of(unit.spec["distill"]), context.dataset(unit.data)
    saved = context.store.load_partial(unit.key)
    if saved:
        context.start_clock(float(saved.get("cpu_seconds", 0.0)))
    last = time.monotonic()

    def checkpoint(state: Mapping[str, Tensor]) -> None:
        nonlocal last
        if time.monotonic() - last > CHECKPOINT_SECONDS:
            context.store.save_partial(unit.key, dict(state) | {"cpu_seconds": torch.tensor(context.cpu_seconds())})
            last = time.monotonic()

    task = distill.Task(real=dataset.train, mean=dataset.mean, std=dataset.std, model=ModelSpec(**unit.spec["model"]),
                        seed=unit.spec["seed"], networks=trajectories(unit, parents), device=context.device, held=unit.held,
                        resume=saved, checkpoint=checkpoint, progress=context.step(unit))
    try:
        made = distill.distil(spec, task)
    except FloatingPointError as error:
        return Output({}, {}, failed=str(error))
    recipe = {"train": dict(unit.spec["train"]) | dict(made.learned), "factor": spec.factor, "space": "pixels",
              "mean": dataset.mean.tolist(), "std": dataset.std.tolist(), "learned": dict(made.learned)}
    output = _stored(made.split, recipe, history=list(made.history))
    if made.before is not None:
        output.tensors["before"] = made.before.clone()  # safetensors stores no tensor twice
    return output


def _stored(split: Split, recipe: Mapping[str, Any], **result: Any) -> Output:
    count, factor = len(split), recipe["factor"]
    tensors = {"images": split.images, "labels": split.labels, "mean": torch.tensor(recipe["mean"]),
               "std": torch.tensor(recipe["std"])}
    return Output(tensors, {"factor": factor, "stored_images": count, "training_images": count * factor**2,
                            "recipe": dict(recipe), **result})


@stage("published", 1)
def read_published(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Take in a set that others published. Whitened images stay so, and the recipe says it; others are stored as pixels.

    Normalised images are read with the authors' statistics where they are on record (``statistics``), else the data set's own.
    """
    asked, dataset = unit.spec["published"], context.dataset(unit.data)
    found = published.read(unit.file, asked["form"], classes=asked["classes"], image_shape=tuple(asked["shape"][1:]),
                           factor=asked["factor"], space=asked["space"])
    if found.identity() != asked:
        raise ValueError(f"{unit.file} is not the file any more that it was when the study was planned; start again")
    mean, std = map(torch.tensor, unit.spec["statistics"]) if unit.spec["statistics"] else (dataset.mean, dataset.std)
    whitened = found.space == "whitened"
    split = published.as_stored(found) if whitened else published.to_pixels(found, mean, std)
    recipe = {"train": dict(unit.spec["train"]), "factor": found.factor, "space": "whitened" if whitened else "pixels",
              "mean": dataset.mean.tolist(), "std": dataset.std.tolist(), "learned": {}, "published": dict(asked)}
    return _stored(split, recipe, history=[])


@stage("soften", 1)
def soften(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """The same images with soft labels: a teacher's probabilities for each decoded image (Hinton et al. 2015, arXiv 1503.02531).

    softmax(logits / temperature) in eval mode, without augmentation. Tensors: those of the set, and soft (N, K) float32.
    """
    teacher, images, spec = parents["teacher"], parents["set"], unit.spec
    model, dataset = ModelSpec(**spec["model"]), context.dataset(unit.data)
    space = images.result["recipe"].get("space", "pixels")
    if space != "pixels":
        raise ValueError(f"soft labels need images as pixels, which the teacher knows; this set is {space}")
    decoded = normalise(read_set(images).images, dataset.mean, dataset.std)
    with torch.no_grad():
        logits = torch.cat([models.forward(model, *network_of(teacher), x)[0] for x in decoded.split(500)])
    soft = torch.softmax(logits.double() / spec["temperature"], 1).float()
    agree = float((soft.argmax(1) == read_set(images).hard_labels()).double().mean())
    kept = {name: t for name, t in images.tensors.items() if name != "before"}
    return Output(kept | {"soft": soft}, dict(images.result) | {"temperature": spec["temperature"],
                                                                                 "teacher_agrees": agree})


def read_set(artifact: Artifact) -> Split:
    """The decoded training images of a stored set, with its soft labels if it has them."""
    split = distill.decode(Split(artifact.tensors["images"], artifact.tensors["labels"]), artifact.result["factor"])
    return Split(split.images, artifact.tensors["soft"]) if "soft" in artifact.tensors else split
