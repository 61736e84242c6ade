"""What is known about a unit before it runs: how much it computes.

Everything is read from specifications, of the unit and of its parents, so that a unit to come and an artifact in the store
are described by the same function.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dpkit.distill import METHODS, DMSpec, GeneratorSpec, MatchingSpec, MTTSpec
from dpkit.distill import spec_of as distill_spec
from dpkit.models import ModelSpec, forward_work, prunable
from dpkit.models.network import family
from dpkit.models.work import attention_work, layer_work
from dpkit.prune import survivors
from dpkit.spec import canonical_json

CHUNK = 100  # images of one piece of a Hessian product
EVALUATED = 500  # images of one pass of an evaluation
BACKWARD = 3  # a forward and a backward pass, in forward passes
LANES = 16  # channels that are computed together
TWICE = 9  # the same differentiated once more
REFINED = 1.2  # points of a refined path over those that it starts with: 13.1 for 11 in the quick study

Specs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Features:
    """kind: units whose speed is one thing, as ``network/bf16+compile``. amounts: how much of each sort of work, by name.

    Amounts are in GFLOP, GB, millions of pixels or of weights, or counts; each is at least 0. compiled: names of the functions
    that are compiled for it, once in a process.
    """

    kind: str
    amounts: Mapping[str, float]
    compiled: tuple[str, ...] = ()


@lru_cache(maxsize=256)
def _model(text: str) -> ModelSpec:
    return ModelSpec(**json.loads(text))


def model_of(spec: Mapping[str, Any]) -> ModelSpec:
    """The network that a unit's specification names."""
    return _model(canonical_json(spec["model"]))


@dataclass(frozen=True)
class Sizes:
    """Of one network: FLOPs (its channels filled up to whole vectors) and numbers moved for one image forward; entries of
    parameters, buffers and prunable weights; activations: numbers that a backward pass needs, for one image; tensors: how
    many it has."""

    flops: float
    moved: float
    parameters: int
    buffers: int
    prunable: int
    activations: float
    tensors: int


@lru_cache(maxsize=256)
def sizes(model: ModelSpec) -> Sizes:
    """The sizes of a network, from its layers' shapes alone."""
    parameters = buffers = tensors = 0
    for layer in family(model).table(model):
        shapes, moving = layer.shapes(), layer.buffers()
        parameters += sum(math.prod(shape) for shape in shapes.values())
        buffers += sum(t.numel() for t in moving.values())
        tensors += len(shapes) + len(moving)
    # vector units take channels sixteen at a time: a network of width 24 computes as long as one of width 32
    whole = model.replace(width=-(-model.width // LANES) * LANES)
    flops, moved = forward_work(whole, 1).flops, forward_work(model, 1).bytes
    layers = [*layer_work(model), *attention_work(model)]
    # kept for a backward pass: each layer's input, and around it the norm's input and the ReLU's output; of attention its scores
    kept = sum(layer.inputs + 2 * layer.outputs for layer in layers)
    return Sizes(flops, moved, parameters, buffers, sum(layer.weights for layer in layers), kept, tensors)


def _moved(model: ModelSpec, gbyte: float) -> dict[str, float]:
    """Gigabytes, and how much of them an instance norm works on, which takes longer than BatchNorm does."""
    return {"gbyte": gbyte, "norm gbyte": gbyte * (model.norm_kind in ("instance", "group", "layer"))}


def _ways(spec: Mapping[str, Any]) -> str:
    """Precision and execution, as part of a kind."""
    return (spec.get("precision") or spec.get("dtype") or "fp32") + ("+compile" if spec.get("compile") else "")


def itemsize(spec: Mapping[str, Any]) -> int:
    """Bytes of a number in the precision of a specification."""
    return {"bf16": 2, "float64": 8}.get(spec.get("precision") or spec.get("dtype") or "", 4)


def pixels_of(data: Mapping[str, Any]) -> int:
    """Numbers in one image."""
    return math.prod(data["shape"])


def _operations(names: str) -> int:
    """How many passes over the pixels an augmentation makes: moving them takes about two of changing their colours."""
    found = set(filter(None, names.split("_")))
    return len(found & {"color", "flip", "cutout"}) + 2 * bool(found & {"crop", "scale", "rotate"})


def set_images(distill: Mapping[str, Any], classes: int) -> int:
    """Training images that a small set decodes into."""
    return distill["ipc"] * classes * distill.get("factor", 1) ** 2


def schedule(spec: Mapping[str, Any], parents: Specs) -> tuple[int, int, int]:
    """(images, steps, batches of an epoch) of a network's training."""
    train, data = spec["train"], spec["data"]
    images = set_images(parents["images"]["distill"], data["classes"]) if "images" in parents else data["train"]
    per_epoch = -(-images // train["batch_size"])
    return images, max(1, train["epochs"] * per_epoch - spec.get("first_step", 0)), per_epoch


def _network(spec: Mapping[str, Any], parents: Specs) -> Features:
    train, data, net = spec["train"], spec["data"], sizes(model_of(spec))
    images, steps, per_epoch = schedule(spec, parents)
    points, operations = steps * images / per_epoch, _operations(train["augment"]["operations"])
    changed = operations + train["cutmix"]
    amounts = {"unit": 1, "step": steps, "gflop": BACKWARD * net.flops * points / 1e9,
               **_moved(model_of(spec), (BACKWARD * net.moved * points * itemsize(train) + 32 * net.parameters * steps) / 1e9),
               "augmented step": steps * (changed > 0), "augmented mpixel": changed * points * pixels_of(data) / 1e6,
               "test gflop": net.flops * data["test"] / 1e9}
    compiled: tuple[str, ...] = ()
    if train.get("compile"):
        sizes_of_batches = {min(images, train["batch_size"]), images - (per_epoch - 1) * train["batch_size"]}
        compiled = tuple(canonical_json([spec["model"], train["precision"], size]) for size in sorted(sizes_of_batches))
    return Features(f"network/{_ways(train)}", amounts, compiled)


def _distill(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked, data, net = distill_spec(spec["distill"]), spec["data"], sizes(model_of(spec))
    plain, image, classes = spec["distill"], pixels_of(data), data["classes"]
    if isinstance(asked, MatchingSpec):
        return _matching(asked, spec)
    if isinstance(asked, DMSpec):
        seen = asked.steps * classes
        passes = seen * (asked.real_batch + BACKWARD * asked.ipc)
        pixels = seen * (asked.real_batch + asked.ipc) * _operations(asked.augment) * image / 1e6
        return Features(f"dm/{_ways(plain)}", {"unit": 1, "step": asked.steps, "gflop": passes * net.flops / 1e9,
                                               **_moved(model_of(spec), passes * net.moved * itemsize(plain) / 1e9),
                                               "augmented mpixel": pixels})
    if isinstance(asked, MTTSpec):
        passes = asked.steps * asked.student_steps * min(asked.batch or asked.ipc * classes, asked.ipc * classes) * TWICE
        return Features("mtt", {"unit": 1, "step": asked.steps * asked.student_steps, "gflop": passes * net.flops / 1e9,
                                **_moved(model_of(spec), 4 * passes * net.moved / 1e9)})
    if isinstance(asked, GeneratorSpec):
        # a U-Net's work grows with its width squared; sampling passes forward only
        shown = asked.steps * asked.batch * BACKWARD + asked.sample_steps * asked.ipc * classes
        return Features(f"generator/{_ways(plain)}", {"unit": 1, "step": asked.steps,
                                                      "gflop": shown * asked.width**2 * image / 1e6})
    passes = {"trained": 1, "early": sum(r.startswith("network") for r in parents)}.get(METHODS[asked.method].networks, 0)
    return Features("choose", {"unit": 1, "gflop": passes * net.flops * data["train"] / 1e9})


def _matching(asked: MatchingSpec, spec: Mapping[str, Any]) -> Features:
    data, net, plain = spec["data"], sizes(model_of(spec)), spec["distill"]
    steps, classes, image = asked.outer * asked.inner, data["classes"], pixels_of(data)
    passes = classes * (BACKWARD * asked.real_batch + TWICE * asked.shown)
    on_real = asked.network_data == "real"
    shown = min(asked.network_images, data["train"]) if on_real else set_images(plain, classes)
    trained = (steps if on_real else steps - asked.outer) * asked.network_epochs
    operations = _operations(asked.augment.operations)
    changed = 5 if on_real else operations
    amounts = {"unit": 1, "step": steps, "gflop": steps * passes * net.flops / 1e9,
               **_moved(model_of(spec), steps * passes * net.moved * itemsize(plain) / 1e9),
               "network step": trained * -(-shown // asked.network_batch),
               "network gflop": trained * shown * BACKWARD * net.flops / 1e9,
               "augmented mpixel": image / 1e6 * (steps * operations * classes * (asked.real_batch + asked.shown)
                                                  + trained * changed * shown)}
    compiled = (canonical_json([spec["model"], asked.precision, "match"]),) if asked.compile else ()
    return Features(f"idc/{_ways(plain)}", amounts, compiled)


def _soften(spec: Mapping[str, Any], parents: Specs) -> Features:
    images = set_images(spec["distill"], spec["data"]["classes"])
    return Features("choose", {"unit": 1, "gflop": images * sizes(model_of(spec)).flops / 1e9})


def _published(spec: Mapping[str, Any], parents: Specs) -> Features:
    return Features("choose", {"unit": 1, "gflop": 0.0})


def score_work(score: str, shown: int) -> tuple[int, float]:
    """Images that a score at initialisation takes, and forward passes that each costs; ``shown`` real images are given.

    SNIP takes one gradient. GraSP takes another one, differentiates it again, and sees the images for both. SynFlow takes a
    gradient on an image of ones a hundred times.
    """
    return {"snip": (shown, float(BACKWARD)), "grasp": (2 * shown, (BACKWARD + TWICE) / 2),
            "synflow": (100, float(BACKWARD))}[score]


def _ticket(spec: Mapping[str, Any], parents: Specs) -> Features:
    net, score, data = sizes(model_of(spec)), spec.get("score", ""), spec.get("data", {})
    shown = spec["per_class"] * data["classes"] if data else 0
    points, passes = score_work(score, shown) if score else (0, 0.0)
    repeated = 100 if score == "synflow" else 24 if spec.get("control") == "transferred" else 1  # matching takes so much longer
    return Features("ticket", {"unit": 1, "mweight": net.parameters / 1e6 * repeated,
                               "gflop": points * passes * net.flops / 1e9})


def _masks(spec: Mapping[str, Any], parents: Specs) -> Features:
    net = sizes(model_of(spec))
    # pairs of arms, and a pass with its gradient for the paths of each
    return Features("compare", {"unit": 1, "mweight": len(spec["arms"]) * net.prunable / 1e6})


def _early_bird(spec: Mapping[str, Any], parents: Specs) -> Features:
    steps = len(parents["network"]["snapshots"]) if "network" in parents else 1
    return Features("compare", {"unit": 1, "mweight": steps * sizes(model_of(spec)).prunable / 1e6})


def _robustness(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked, model, data = spec["robustness"], model_of(spec), spec["data"]
    images = min(asked["images"] or data["test"], data["test"])
    made = len(asked["corruptions"]) * len(asked["severities"])
    passes = 1 + made + len(asked["bits"])
    net = sizes(model)
    return Features("robustness/fp32", {"unit": 1, "step": passes * -(-images // EVALUATED),
                                        "gflop": passes * images * net.flops / 1e9,
                                        **_moved(model, 4 * passes * images * net.moved / 1e9),
                                        "augmented mpixel": made * images * pixels_of(data) / 1e6})


def _evaluations(kind: str, asked: Mapping[str, Any], spec: Mapping[str, Any], points: float, images: int) -> Features:
    model, net = model_of(spec), sizes(model_of(spec))
    needs = asked["statistics"] == "repair" or (asked["statistics"] == "reestimate" and model.norm_kind == "batch")
    measured = asked["statistics_images"] if needs else 0
    total = points * (images + measured)
    compiled = (canonical_json([spec["model"], asked.get("precision", "fp32"), "evaluate"]),) if asked.get("compile") else ()
    return Features(f"{kind}/{_ways(asked)}", {"unit": 1, "step": points * (-(-images // EVALUATED) + -(-measured // 250)),
                                               "gflop": total * net.flops / 1e9,
                                               **_moved(model, total * net.moved * itemsize(asked) / 1e9)}, compiled)


def _points(asked: Mapping[str, Any]) -> float:
    return asked["points"] * (REFINED if asked.get("error_tolerance") else 1)


def _path(spec: Mapping[str, Any], parents: Specs) -> Features:
    return _evaluations("path", spec["path"], spec, _points(spec["path"]), spec.get("images") or spec["data"]["test"])


def _layers(spec: Mapping[str, Any], parents: Specs) -> Features:
    places = 2 + 2 * len(prunable(model_of(spec))) * (spec["path"]["points"] - 1)
    return _evaluations("path", spec["path"], spec, places, spec["data"]["test"])


def _alignment(spec: Mapping[str, Any], parents: Specs) -> Features:
    # the line, both children once more, and the matching
    found = _evaluations("alignment", spec["path"], spec, _points(spec["path"]) + 2, spec["data"]["test"])
    return Features(found.kind, {**found.amounts, "mweight": sizes(model_of(spec)).prunable / 1e6})


def _plane(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked = next(spec[name] for name in ("plane", "square", "around", "profile") if name in spec)
    images = min(asked["images"] or spec["data"]["test"], spec["data"]["test"])
    if "images" in parents:
        images = set_images(parents["images"]["distill"], spec["data"]["classes"])
    places = asked["resolution"] ** 2 if "resolution" in asked else asked["directions"] * (asked["points"] - 1) + 1
    return _evaluations("plane", asked, spec, places, images)


def _trajectory(spec: Mapping[str, Any], parents: Specs) -> Features:
    steps = len(parents["way_a"]["snapshots"]) if "way_a" in parents else 1
    return Features("compare", {"unit": 1, "mweight": 3 * steps * sizes(model_of(spec)).parameters / 1e6})


def _products(asked: Mapping[str, Any], spec: Mapping[str, Any], products: float, images: int) -> Features:
    """So many Hessian products; ``asked`` says in which precision."""
    net, total = sizes(model_of(spec)), products * images * TWICE
    return Features(f"hessian/{_ways(asked)}", {"unit": 1, "step": products * -(-images // CHUNK),
                                                "gflop": total * net.flops / 1e9,
                                                **_moved(model_of(spec), total * net.moved * itemsize(asked) / 1e9)})


def _hessian(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked = spec["hessian"]
    # one probe's deviation is about the trace itself, as a rule, and a pilot plans with caution
    aimed = min(asked["most"], 16 + 2 / asked["target"]**2) if asked["target"] else 0
    return _products(asked, spec, asked["probes"] + asked["lanczos_steps"] + aimed, asked["images"])


def _sharpness(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked = spec["sharpness"]
    # a gradient takes a third of a product, a pass of noise a ninth
    return _products(asked, spec, (2 * (asked["steps"] + 2) * BACKWARD + 4 * asked["pairs"] + 8) / TWICE, asked["images"])


def _spectrum(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked = spec["spectrum"]
    products = (asked["pair_products"] + asked["eigenvalues"] + 2 * asked["trace_probes"] + asked["probes"] * asked["steps"]
                + 2 * asked["other_probes"] + asked["other_steps"])
    return _products(asked, spec, products, asked["images"])


def _diagonal(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked, limit, entries, ticket = spec["hessian"], spec["limit"], sizes(model_of(spec)).prunable, parents.get("ticket")
    kept = survivors(entries, ticket["prune"]["fraction"], ticket["round"])[-1] if ticket else entries
    exact = entries if entries <= limit else kept if kept <= limit else 0
    return _products(asked, spec, exact + (asked["probes"] if entries > limit else 0), asked["images"])


def _removed(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked = spec["removed"]
    images = set_images(parents["images"]["distill"], spec["data"]["classes"]) if "images" in parents else asked["images"]
    products = asked["probes"] + asked["lanczos_steps"] + len(spec["arms"]) * (1 + asked["draws"]) * (1 + 1 / TWICE)
    return _products(asked, spec, products, images)


def _edge(spec: Mapping[str, Any], parents: Specs) -> Features:
    asked = spec["hessian"]
    points = len(parents["network"]["snapshots"]) if "network" in parents else 1
    return _products(asked, spec, points * asked["lanczos_steps"], asked["images"])


_FEATURES = {"network": _network, "distill": _distill, "soften": _soften, "published": _published,
             "ticket": _ticket, "masks": _masks, "early_bird": _early_bird, "robustness": _robustness, "path": _path,
             "layers": _layers, "alignment": _alignment, "plane": _plane, "square": _plane, "around": _plane, "profile": _plane,
             "trajectory": _trajectory, "hessian": _hessian, "sharpness": _sharpness, "spectrum": _spectrum,
             "diagonal": _diagonal, "removed": _removed, "edge": _edge}


def features(stage: str, spec: Mapping[str, Any], parents: Specs) -> Features | None:
    """What a unit of ``stage`` computes; parents: their specifications by role. None for a stage that is not described."""
    return _FEATURES[stage](spec, parents) if stage in _FEATURES else None


#: amounts that networks of one population share: a GPU launches what all of them need at once, on a CPU they have one noise
SHARED = {"cuda": ("step", "augmented step"), "cpu": ("augmented step", "augmented mpixel")}


def together(found: Features, population: int, sort: str) -> Features:
    """The features of one of ``population`` networks that are trained at once on a ``sort`` of device, cpu or cuda."""
    shared = {name: value / (population if name in SHARED[sort] else 1) for name, value in found.amounts.items()}
    return Features(found.kind, shared, found.compiled)
