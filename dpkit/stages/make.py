"""Stages that make networks: trained ones, and tickets."""
from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpkit import alignment, models, prune, training, tree
from dpkit.data import Dataset, Split, normalise, zca
from dpkit.models import ModelSpec
from dpkit.prune import PruneSpec
from dpkit.spec import canonical_json
from dpkit.stages.arms import LENT
from dpkit.stages.sets import CHECKPOINT_SECONDS, network_of, read_set
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact
from dpkit.training import State, TrainSpec
from dpkit.tree import Buffers, Mask, Params


def named(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of several groups under names ``GROUP/NAME``."""
    return {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def initial(spec: Mapping[str, Any]) -> tuple[Params, Buffers]:
    """The network at initialisation that a unit's ``model`` and ``init_seed`` say."""
    return models.init(ModelSpec(**spec["model"]), tree.generator_for(spec["init_seed"], "init"))


# --- networks -------------------------------------------------------------------------------------------------------------
def _group(unit: Unit, device: str) -> str:
    """Networks that share data, architecture, schedule and snapshots may be trained as one population.

    On a CPU, which computes one after another, that pays for networks of equal noise: their batches are made once.
    """
    images = unit.parents["images"].key if "images" in unit.parents else ""
    names = ("data", "model", "train", "first_step", "snapshots", *(("noise_seed",) if device == "cpu" else ()))
    return canonical_json([{name: unit.spec[name] for name in names}, images])


def train_many(context: Context, units: list[Unit], parents: list[Mapping[str, Artifact]]) -> list[Output]:
    """Train networks that share everything but start, mask and noise; see :func:`train_network`.

    Those that were stopped go on from where they were, together with those that were stopped at the same step.
    """
    saved = [context.store.load_partial(unit.key) for unit in units]
    cohorts: dict[int, list[int]] = {}
    for i, found in enumerate(saved):
        cohorts.setdefault(int(found["step"]) if found else -1, []).append(i)
    outputs: dict[int, Output] = {}
    spent = context.cpu_seconds()
    for some in cohorts.values():
        context.start_clock(sum(float(saved[i].get("cpu_seconds", 0.0)) for i in some if saved[i]))
        made = _train(context, *([part[i] for i in some] for part in (units, parents, saved)))
        outputs |= zip(some, made, strict=True)
        spent += context.cpu_seconds()
    context.start_clock(spent)
    return [outputs[i] for i in range(len(units))]


def _train(context: Context, units: list[Unit], parents: list[Mapping[str, Artifact]],
           saved: list[Mapping[str, Tensor] | None]) -> list[Output]:
    """Train networks from initialisation, or all from the step that their checkpoints are of."""
    spec, dataset = units[0].spec, context.dataset(units[0].data)
    model, train = ModelSpec(**spec["model"]), TrainSpec(**spec["train"])
    split, mean, std = dataset.train, dataset.mean, dataset.std
    if "images" in parents[0]:
        split, train, mean, std = _small(parents[0]["images"], train, dataset)
    starts, kept = [], []
    for unit, family in zip(units, parents, strict=True):
        ticket, start = family.get("ticket"), family.get("start")
        early = network_of(start, f"{spec['first_step']}/") if start else None
        starts.append(early or (network_of(ticket) if ticket else initial(unit.spec)))
        kept.append(ticket.group("mask") if ticket else prune.full(model, starts[-1][0]))
    fit = training.fit(train, model, split, mean, std, tree.stack([s[0] for s in starts]),
                       tree.stack([s[1] for s in starts]), [unit.spec["noise_seed"] for unit in units],
                       masks=tree.stack(kept), first_step=spec["first_step"], snapshots=spec["snapshots"],
                       resume=_read_states(saved), checkpoint=_checkpointing(context, units),
                       progress=context.step(units[0]), device=context.device)
    test = dataset.test
    if "images" in parents[0] and parents[0]["images"].result["recipe"].get("space") == "whitened":
        test = zca.whiten(test, context.whitening(units[0].data))  # a network knows only what it was trained on
    test = Split(normalise(test.images, mean, std), test.labels).to(context.device)
    return [_trained(context, test, model, train, len(split), fit, p) for p in range(len(units))]


def _small(images: Artifact, train: TrainSpec, dataset: Dataset) -> tuple[Split, TrainSpec, Tensor, Tensor]:
    """A small set as training data: images, the training with what its recipe learned, and how to normalise it."""
    recipe = images.result["recipe"]
    mean, std = dataset.mean, dataset.std
    if recipe.get("space") == "whitened":  # which it is instead
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return read_set(images), train.replace(**recipe.get("learned", {})), mean, std


@stage("network", 1, many=train_many, group=_group)
def train_network(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Train one network on real data, or on the set ``images``, from a ``ticket`` or from initialisation, or on from the step
    ``first_step`` of the network ``start``, with the mask of ``ticket`` if there is one.

    Tensors: params, buffers, those of the snapshots, and the training loss of each epoch. Result: error in [0, 1] and mean
    cross-entropy on the test images, last training loss, steps, and training points (images processed).
    """
    return train_many(context, [unit], [parents])[0]


def _trained(context: Context, test: Split, model: ModelSpec, train: TrainSpec, images: int, fit: training.Fit,
             p: int) -> Output:
    per_epoch = train.steps_per_epoch(images)
    steps = fit.losses.shape[1]
    curve = [float(part.mean()) for part in fit.losses[p].split(per_epoch)]
    points = steps * images / per_epoch
    try:
        params, buffers = fit.network(p)
    except training.Diverged as error:
        return Output({}, {"steps": steps, "points": points}, failed=f"diverged at step {error.step}")
    on_device = tree.to(params, context.device), tree.to(buffers, context.device)
    error, loss = training.evaluate(model, *on_device, test.images, test.labels)
    tensors = named(params=params, buffers=buffers) | {"curve": torch.tensor(curve, dtype=torch.float64)}
    for step, (at_params, at_buffers) in fit.snapshots.items():
        tensors |= {f"{step}/{name}": t[p] for name, t in named(params=at_params, buffers=at_buffers).items()}
    return Output(tensors, {"error": error, "loss": loss, "train_loss": curve[-1], "steps": steps, "points": points})


def _checkpointing(context: Context, units: list[Unit]):
    """A checkpoint callback that writes at most every half minute: most networks finish before the first.

    Each network gets a checkpoint of its own, so that it goes on whichever others are trained with it then.
    """
    last = time.monotonic()

    def write(state: State) -> None:
        nonlocal last
        if time.monotonic() - last < CHECKPOINT_SECONDS:
            return
        tensors = named(params=state.params, buffers=state.buffers, momentum=state.momentum) | {"losses": state.losses}
        for step, (params, buffers) in state.snapshots.items():
            tensors |= {f"snapshot/{step}/{name}": t for name, t in named(params=params, buffers=buffers).items()}
        same = {"step": torch.tensor(state.step), "cpu_seconds": torch.tensor(context.cpu_seconds() / len(units))}
        for p, unit in enumerate(units):
            context.store.save_partial(unit.key, {name: t[p:p + 1].clone() for name, t in tensors.items()} | same)
        last = time.monotonic()

    return write


def _read_states(several: list[Mapping[str, Tensor] | None]) -> State | None:
    """The state of a population from its networks' checkpoints, all of one step; None where there are none."""
    parts = [found for found in several if found]
    if not parts:
        return None
    alone = ("step", "cpu_seconds")
    saved = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name not in alone}
    def group(prefix: str) -> dict[str, Tensor]:
        return {n[len(prefix) + 1:]: t for n, t in saved.items() if n.startswith(prefix + "/")}
    steps = {int(n.split("/")[1]) for n in saved if n.startswith("snapshot/")}
    snapshots = {s: (group(f"snapshot/{s}/params"), group(f"snapshot/{s}/buffers")) for s in sorted(steps)}
    return State(group("params"), group("buffers"), group("momentum"), int(parts[0]["step"]), saved["losses"], snapshots)


# --- tickets --------------------------------------------------------------------------------------------------------------
@stage("ticket", 1)
def make_ticket(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Make the ticket of one round. Tensors: params (removed weights zero), buffers, mask. Result: counted sparsity.

    Survivors start from the snapshot ``rewind_step`` of ``start``, or from initialisation. The mask comes from the magnitudes
    of ``network``, on top of the ticket ``previous`` if there is one (``once``: in one cut); from ``score`` at initialisation;
    or at random, where ``mask_seed`` says so. Without any of these nothing is removed. With ``control`` the ticket ``of`` is
    changed.
    """
    spec, model = unit.spec, ModelSpec(**unit.spec["model"])
    settings = PruneSpec(**spec["prune"])
    start = network_of(parents["start"], f"{spec['rewind_step']}/") if "start" in parents else initial(spec)
    mask = prune.full(model, start[0])
    if spec.get("control") in LENT:
        ticket = prune.rewind(start, start, _lent(spec, model, parents), spec["round"])
    elif "control" in spec:
        ticket = _controlled(spec, model, parents["of"], start[0])
    elif "network" in parents:
        if "previous" in parents:
            mask = parents["previous"].group("mask")
        before = prune.Ticket(start[0], start[1], {n: mask[n] for n in start[0] if n in mask}, spec["round"] - 1)
        count = _count(settings, mask, spec["round"]) if spec.get("once") else None
        ticket = prune.next_ticket(settings, before, network_of(parents["network"]), start, model=model, count=count)
    elif "mask_seed" in spec:
        scores = prune.random_scores(mask, tree.generator_for(spec["mask_seed"], "mask"))
        kept = prune.select(settings, scores, mask, _count(settings, mask, spec["round"]), model=model)
        ticket = prune.rewind(start, start, kept, spec["round"])
    elif "score" in spec:
        ticket = prune.rewind(start, start, _scored(context, unit, model, settings, start, mask), spec["round"])
    else:
        ticket = prune.rewind(start, start, mask, spec["round"])
    return Output(named(params=ticket.params, buffers=ticket.buffers, mask=ticket.mask),
                  {"sparsity": prune.sparsity(ticket.mask), "surviving": prune.surviving(ticket.mask),
                   "weights": prune.size(ticket.mask), "round": ticket.round, "density": prune.density(ticket.mask),
                   "collapsed": list(prune.collapsed(ticket.mask))})


def _count(settings: PruneSpec, mask: Mask, round: int) -> int:
    """How many weights iterative pruning leaves after ``round`` rounds."""
    return prune.survivors(prune.size(mask), settings.fraction, round)[-1]


def _scored(context: Context, unit: Unit, model: ModelSpec, settings: PruneSpec, start: tuple[Params, Buffers],
            mask: Mask) -> Mask:
    """The mask of a score at initialisation; SNIP and GraSP see as many real images of each class as ``per_class`` says."""
    spec, count = unit.spec, _count(settings, mask, unit.spec["round"])
    if spec["score"] == "synflow":
        return prune.synflow(model, *start, mask, count, spec=settings)
    dataset = context.dataset(unit.data)
    labels, generator = dataset.train.labels, tree.generator_for(spec["score_seed"], "score")
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.cat([order[labels[order] == c][:spec["per_class"]] for c in range(dataset.classes)])
    images = normalise(dataset.train.images[chosen], dataset.mean, dataset.std)
    scores = getattr(prune, spec["score"])(model, *start, images, labels[chosen], mask)
    return prune.select(settings, scores, mask, count, model=model)


def _lent(spec: Mapping[str, Any], model: ModelSpec, parents: Mapping[str, Artifact]) -> Mask:
    """The mask of another initialisation's ticket ``of``; ``transferred``, in the order of this network's own channels.

    The channels are those of both dense networks after training on real data: ``own``, and ``theirs``, whose mask it is.
    """
    found = parents["of"].group("mask")
    mask = {name: found[name] for name in models.prunable(model)}
    if spec["control"] == "borrowed":
        return mask
    theirs, own = (network_of(parents[role])[0] for role in ("theirs", "own"))
    generator = tree.generator_for(spec["control_seed"], "matching")
    found = alignment.weight_matching(model, theirs, own, generator=generator)
    return alignment.transfer(model, mask, found)


def _controlled(spec: Mapping[str, Any], model: ModelSpec, of: Artifact, start: Params) -> prune.Ticket:
    """The ticket ``of`` with its mask shuffled or its weights drawn anew; see :data:`dpkit.stages.arms.CONTROLS`."""
    params, buffers = network_of(of)
    mask = of.group("mask")
    ticket = prune.Ticket(params, buffers, {n: mask[n] for n in params if n in mask}, spec["round"])
    generator = tree.generator_for(spec["control_seed"], spec["control"])
    if spec["control"] == "shuffled":
        return prune.shuffled(ticket, start, generator)
    fresh, _ = models.init(model, generator)
    return {"reinit": prune.reinit, "signs": prune.signs}[spec["control"]](ticket, fresh)
