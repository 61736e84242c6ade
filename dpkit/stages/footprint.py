"""What a unit leaves on disk and takes in memory, known from specifications before it runs."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpkit.distill import METHODS, MTTSpec
from dpkit.distill import spec_of as distill_spec
from dpkit.hessian.spectrum import POINTS
from dpkit.models import prunable
from dpkit.stages.features import (
    CHUNK,
    EVALUATED,
    Specs,
    itemsize,
    model_of,
    pixels_of,
    schedule,
    set_images,
    sizes,
)

BLOCK = 4096  # bytes that the smallest file takes
CORRUPTED = 1e9  # bytes of corrupted images that a process keeps for the next network


def disk(stage: str, spec: Mapping[str, Any], parents: Specs) -> int:
    """Bytes of the artifact: its tensors' shapes, a header line each, the description, in blocks of the file system."""
    data, numbers, tensors = spec.get("data", {}), 0, 4
    if "model" in spec:
        net = sizes(model_of(spec))
        whole = 4 * (net.parameters + net.buffers)
    if stage == "network":
        copies = 1 + len(spec["snapshots"])
        numbers, tensors = whole * copies + 8 * spec["train"]["epochs"], net.tensors * copies
    elif stage == "ticket":
        numbers, tensors = whole + net.prunable, net.tensors + 10
    elif stage in ("distill", "soften", "published"):
        copies = 2 if "seed" in spec and METHODS[spec["distill"]["method"]].learned else 1  # learned ones with their start
        numbers = spec["distill"]["ipc"] * data["classes"] * (4 * copies * pixels_of(data) + 8)
        numbers += 4 * data["classes"] * set_images(spec["distill"], data["classes"]) * (stage == "soften")
    elif stage == "masks":
        arms, layers, tensors = len(spec["arms"]), len(prunable(model_of(spec))), 11
        numbers = 8 * (arms**2 * (5 * layers + 6) + arms * (3 * layers + 1) + layers)
    elif stage == "early_bird":
        numbers = 8 * len(parents["network"]["snapshots"]) ** 2 if "network" in parents else 0
    elif stage == "robustness":
        numbers = 8 * (len(spec["robustness"]["corruptions"]) * len(spec["robustness"]["severities"])
                       + len(spec["robustness"]["bits"]))
    elif stage in ("path", "alignment"):
        numbers = 24 * spec["path"]["points"]
    elif stage == "layers":
        numbers = 32 * spec["path"]["points"] * len(prunable(model_of(spec)))
    elif stage in ("plane", "square", "around"):
        numbers = 16 * spec[stage]["resolution"] ** 2
    elif stage == "profile":
        numbers = 16 * spec["profile"]["directions"] * spec["profile"]["points"]
    elif stage == "trajectory":
        numbers = 100 * len(parents["way_a"]["snapshots"]) if "way_a" in parents else 0
    elif stage == "spectrum":
        asked = spec["spectrum"]
        numbers = 16 * (asked["eigenvalues"] + asked["probes"] * (asked["steps"] + asked["eigenvalues"])) + 24 * POINTS
    elif stage == "diagonal":
        numbers = 9 * net.prunable
    elif stage == "removed":
        numbers = 8 * len(spec["arms"]) * (20 + spec["removed"]["draws"])
    elif stage == "edge":
        numbers = 48 * len(parents["network"]["snapshots"]) if "network" in parents else 0
    elif stage == "hessian":
        ticket = parents.get("ticket")
        numbers = 8 * net.prunable * ((1 - ticket["prune"]["fraction"]) ** ticket["round"] if ticket else 1)
    history = 20 * spec["distill"].get("outer", spec["distill"].get("steps", 0)) if stage == "distill" else 0
    description = 4000 + history
    return sum(math.ceil(part / BLOCK) * BLOCK for part in (numbers + 90 * tensors, description)) + BLOCK


BASE_MEMORY = 375e6  # a process that has loaded the library and done anything, measured
COMPILER_MEMORY = 200e6  # what torch.compile leaves in it
SCATTER = 2.0  # a heap that keeps what was freed, and the convolutions' own copies, for each byte that is needed; measured


def memory(stage: str, spec: Mapping[str, Any], parents: Specs, population: int = 1, *, in_turn: bool = False) -> float:
    """Bytes of the process at the highest, while it makes ``population`` such units together; within a third or so.

    The data set as uint8 and normalised, the weights with gradient and momentum, and what the largest pass keeps. in_turn: the
    networks of a population are computed one after another, as on a CPU.
    """
    if "model" not in spec or "data" not in spec:
        return BASE_MEMORY
    data, net = spec["data"], sizes(model_of(spec))
    pixels, kept = pixels_of(data), 4 * SCATTER * net.activations
    loaded = pixels * (data["train"] + data["test"])
    weights, needed = 4 * (net.parameters + net.buffers), 0.0
    normalised = 4 * pixels * (data["train"] + data["test"])
    evaluated = min(EVALUATED, data["test"]) * kept / 2
    if stage == "network":
        train = spec["train"]
        images, _, _ = schedule(spec, parents)
        batch = min(images, train["batch_size"]) * (kept * itemsize(train) / 4 + 12 * pixels)
        passed = max(evaluated, batch * (1 if in_turn else population))
        needed = normalised + passed + weights * population * (6 + len(spec["snapshots"]))
    elif stage == "distill":
        asked = distill_spec(spec["distill"])
        # on a CPU class by class, but for MTT, which holds what it may
        held = asked.held(data["classes"]) if isinstance(asked, MTTSpec) else asked.fewest(data["classes"])
        evaluates = METHODS[asked.method].networks in ("trained", "early")
        needed = normalised + kept * held + (evaluated if evaluates else 6 * weights)
    elif stage == "robustness":
        asked = spec["robustness"]
        shown = min(asked["images"] or data["test"], data["test"])
        kept = min(CORRUPTED, pixels * shown * len(asked["corruptions"]) * len(asked["severities"]))
        needed = 12 * pixels * shown + kept + evaluated + 2 * weights
    elif stage in ("path", "plane", "square", "around", "profile", "layers", "alignment"):
        needed = 4 * pixels * (data["test"] + 1000) + evaluated + 6 * weights
    elif stage in ("hessian", "sharpness", "spectrum", "diagonal", "removed", "edge"):
        asked = next(spec[name] for name in ("hessian", "sharpness", "spectrum", "removed") if name in spec)
        vectors = asked.get("lanczos_steps", 0) + asked.get("pair_products", 0) + asked.get("directions", 0)
        size = 2 if asked.get("dtype") == "float64" else 1
        needed = 4 * kept * size * min(CHUNK, asked["images"]) + weights * (8 + vectors) * size
    compiled = any(part.get("compile") for part in spec.values() if isinstance(part, Mapping))
    return BASE_MEMORY + loaded + needed + (COMPILER_MEMORY if compiled else 0)


def image_memory(spec: Mapping[str, Any]) -> float:
    """Bytes that a backward pass keeps for one image, with what the heap scatters."""
    return 4 * SCATTER * sizes(model_of(spec)).activations


def needed_memory(spec: Mapping[str, Any], held: float) -> float:
    """Bytes of a process that distils and holds the activations of so many images at once."""
    data, net = spec["data"], sizes(model_of(spec))
    loaded = 5 * pixels_of(data) * (data["train"] + data["test"])  # as bytes and normalised
    return BASE_MEMORY + loaded + 24 * (net.parameters + net.buffers) + held * image_memory(spec)


def allowed_images(spec: Mapping[str, Any], bound: float) -> float:
    """How many images' activations a distillation may hold so that its process stays within ``bound`` bytes; 0 or more."""
    return max(0.0, (bound - needed_memory(spec, 0.0)) / image_memory(spec))
