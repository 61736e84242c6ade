"""The units that a study is built of: small sets, networks, tickets, each made from the study's settings on demand.

Nothing is computed here: keys follow from specifications.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any

from dpkit.distill import METHODS, check_factor, published
from dpkit.distill import spec_of as distill_spec
from dpkit.models import count_prunable
from dpkit.prune import spared_weights, survivors
from dpkit.stages.arms import LENT
from dpkit.stages.costs import shipped_seconds
from dpkit.stages.features import set_images
from dpkit.stages.footprint import allowed_images, needed_memory
from dpkit.stages.making import SETS, SOFT, Making
from dpkit.stages.unit import Unit
from dpkit.training import TrainSpec
from dpkit.tree import seed_for


def _once(method):
    """Build each unit of a plan once: a ticket reaches back to the dense network along two ways in every round."""
    @wraps(method)
    def remembered(self: Blocks, *place: int | str) -> Unit:
        at = (method.__name__, *place)
        if at not in self.memo:
            self.memo[at] = method(self, *place)
        return self.memo[at]

    return remembered


@dataclass
class Blocks:
    """The units of a study for one data set. identity: ``Dataset.identity``; see :func:`dpkit.data.load`."""

    study: Making
    identity: dict
    memo: dict[tuple, Unit] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # what does not fit the images is better found now than by a worker in an hour
        self.study.model(self.identity)
        check_factor(self.study.factor, min(self.identity["shape"][1:]))
        last = self.study.train.steps(self.identity["train"])
        wrong = [step for step in self.study.snapshots if not 0 < step < last]
        if wrong:
            raise ValueError(f"snapshots must be steps before the end of the dense run, in [1, {last - 1}]; got {wrong}")
        model = self.study.model(self.identity)
        spared = spared_weights(model, self.study.spare)
        if self.counts[-1] <= spared:
            why = f" and {spared} of them are spared" if spared else ""
            raise ValueError(f"fraction {self.study.fraction:g} leaves {self.counts[-1]} of {self.counts[0]} weights after round "
                             f"{self.study.rounds}{why}; take a smaller fraction or fewer rounds")

    # --- building blocks ------------------------------------------------------------------------------------------------
    @cached_property
    def model(self) -> dict:
        """The network's specification as plain values."""
        return self.study.model(self.identity).to_dict()

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Surviving weights after 0 .. rounds rounds."""
        return survivors(count_prunable(self.study.model(self.identity)), self.study.fraction, self.study.rounds)

    def percent(self, round: int) -> int:
        """Sparsity after a round in whole percent, as in names of numbers."""
        return round_half_up(100 * (1 - self.counts[round] / self.counts[0]))

    @cached_property
    def rewind_step(self) -> int:
        """The step of the dense run that ``ltr`` rewinds to."""
        return max(1, round(self.study.rewind_epochs * self.study.train.steps_per_epoch(self.identity["train"])))

    def seed_at(self, *path: int | str) -> int:
        """The seed of one piece of the study's randomness."""
        return seed_for(self.study.run, *path)

    def unit(self, stage: str, spec: dict, parents: dict[str, Unit], label: str) -> Unit:
        """The unit, built once: equal requests give the same object. Its cost is in seconds of a known machine."""
        unit = Unit(stage, spec, parents, label, data=self.study.data)
        if (unit.key,) not in self.memo:
            self.memo[unit.key,] = replace(unit, cost=shipped_seconds(unit))
        return self.memo[unit.key,]

    @_once
    def small_set(self, name: str, seed: int) -> Unit:
        """The small set ``name``: one of ``study.SETS`` or of the published ones, with ``_soft`` for a teacher's labels.

        Learned sets are made ``set_seeds`` times, random ones for every seed, chosen ones once.
        """
        study = self.study
        if name.endswith(SOFT):
            hard = self.small_set(name.removesuffix(SOFT), seed)
            spec = {"data": self.identity, "model": self.model, "temperature": study.soft_temperature,
                    "distill": hard.spec["distill"]}
            return self.unit("soften", spec, {"set": hard, "teacher": self.dense(0, "search")}, f"{hard.label}, soft labels")
        if name in study.published_files:
            return self._published(name)
        method = SETS[name]
        found = METHODS[method]
        own = seed if method == "random" else seed % study.set_seeds if found.learned else 0
        asked = study.distill(method, study.factor if name == "idc" else 1)
        spec = {"data": self.identity, "model": self.model, "distill": asked.to_dict(),
                "train": study.train_on_set(asked.ipc * asked.factor**2).to_dict(), "seed": self.seed_at("set", method, own)}
        networks, times = self._networks_for("experts" if study.distill_pool and method == "idc" else found.networks)
        if networks:
            spec["times"] = times
        more = f", seed {own}" if method == "random" or (found.learned and study.set_seeds > 1) else ""
        return self._bounded(self.unit("distill", spec, networks, f"small set {name}{more}"))

    def _bounded(self, unit: Unit) -> Unit:
        """The unit within the study's memory bound; raises ``ValueError`` if it does not fit into that at all."""
        if not self.study.distill_memory:
            return unit
        bound, spec = self.study.distill_memory, distill_spec(unit.spec["distill"])
        least = spec.fewest(self.identity["classes"])
        if (need := needed_memory(unit.spec, least)) > 1e9 * bound:
            raise ValueError(f"distill_memory must be at least {math.ceil(need / 1e7) / 100:.2f} gigabytes for {unit.label}, got "
                             f"{bound:g}; raise it, or lower {spec.lower()} or width")
        allowed = allowed_images(unit.spec, 1e9 * bound)
        return replace(unit, held=allowed)

    def _networks_for(self, which: str) -> tuple[dict[str, Unit], list[int]]:
        """Trained networks for a method by role, and the steps at which it sees them (-1: the end)."""
        study = self.study
        if which == "trained":
            return {"network0": self.dense(0, "search")}, [-1]
        if which == "early":
            return {f"network{i}": self.dense(i, "search") for i in range(study.el2n_networks)}, [self.rewind_step]
        if which == "experts":
            per_epoch = study.experts.steps_per_epoch(self.identity["train"])
            count = max(study.expert_count, study.distill_pool)
            return ({f"network{i}": self.expert(i) for i in range(count)},
                    [epoch * per_epoch for epoch in range(study.experts.epochs + 1)])
        return {}, []

    @_once
    def expert(self, number: int) -> Unit:
        """A network trained on real data for others to follow, kept at initialisation and after every epoch."""
        train = self.study.experts
        per_epoch = train.steps_per_epoch(self.identity["train"])
        spec = {"data": self.identity, "model": self.model, "train": train.to_dict(), "init_seed": self.seed_at("expert", number),
                "noise_seed": self.seed_at("expert noise", number), "first_step": 0,
                "snapshots": [epoch * per_epoch for epoch in range(train.epochs + 1)]}
        return self.unit("network", spec, {}, f"expert {number}")

    def _published(self, name: str) -> Unit:
        """A set that others published, known by what its file holds; raises ``ValueError`` where it does not fit this study."""
        path, factor, space = self.study.published_files[name]
        found = published.read(path, classes=self.identity["classes"], image_shape=tuple(self.identity["shape"]),
                               factor=factor or 1, space=space)
        if found.form == "idc" and not factor:
            raise ValueError(f"published set {name} is in IDC's form, which does not say its factor; add it: {name}={path}@2")
        known = published.authors_statistics(found.form, self.study.dataset)
        spec = {"data": self.identity, "model": self.model, "published": found.identity(),
                "statistics": [part.tolist() for part in known] if known else None,
                "distill": {"method": "published", "ipc": found.ipc, "factor": found.factor},
                "train": self.study.train_on_set(found.ipc * found.factor**2).to_dict()}
        return replace(self.unit("published", spec, {}, f"published set {name}"), file=path)

    def network(self, init: int, noise: int, label: str, *, images: Unit | None = None, ticket: Unit | None = None,
                first_step: int = 0, snapshots: tuple[int, ...] = (), train: TrainSpec | None = None,
                start: Unit | None = None) -> Unit:
        """A network trained on real data (as ``train`` says, else as usual), or on the small set ``images``.

        It starts at ``first_step`` from the ``ticket``, from what ``start`` was at that step, or from initialisation.
        """
        study = self.study
        train = train or study.train
        if images is not None:
            train = self._on_set(images)
        given = (("images", images), ("ticket", ticket), ("start", start))
        parents = {name: u for name, u in given if u is not None}
        spec = {"data": self.identity, "model": self.model, "train": train.to_dict(), "init_seed": self.seed_at("init", init),
                "noise_seed": noise, "first_step": first_step, "snapshots": list(snapshots)}
        return self.unit("network", spec, parents, label)

    def _on_set(self, images: Unit) -> TrainSpec:
        """Training on a small set."""
        asked = images.spec["distill"]
        return self.study.train_on_set(asked["ipc"] * asked.get("factor", 1) ** 2)

    @_once
    def dense(self, init: int, role: str, child: int = 0) -> Unit:
        """A dense network trained on real data: the one that searches start with, or a child."""
        noise = self.seed_at("search", init) if role == "search" else self.seed_at("child", init, child)
        kept = tuple(sorted({self.rewind_step, *self.study.snapshots})) if role == "search" else ()
        name = "search" if role == "search" else f"child {child}"
        return self.network(init, noise, f"dense network {init}, {name}", snapshots=kept)

    def first_step(self, arm: str) -> int:
        """The step of the dense run that an arm's tickets start from; 0: initialisation."""
        found = self.study.arm(arm)
        return (found.step or self.rewind_step) if found.early else 0

    def shared_with(self, arm: str, round: int) -> str:
        """The arm whose ticket of this round is also that of ``arm``; nothing where it has its own."""
        found = self.study.arm(arm)
        if not found.before or found.control or round > self.study.combined_round:
            return ""
        return found.before + (f"_{found.scope}" if found.scope else "")

    @_once
    def searched(self, arm: str, init: int, round: int) -> Unit:
        """The network whose magnitudes decide the mask of round ``round + 1``."""
        found = self.study.arm(arm)
        if found.of:
            return self.searched(found.of, init, round)
        if other := self.shared_with(arm, round + 1):
            return self.searched(other, init, round)
        if found.once:
            return self.dense(init, "search")
        ticket = self.ticket(arm, init, round) if round else self._pretrained(arm, init) if found.pretrained else None
        noise, label = self.seed_at("search", init), f"{arm} search {init}, round {round}"
        if found.source != "real":
            return self.network(init, noise, label, images=self.small_set(found.source, init), ticket=ticket)
        if round == 0 and found.training == "usual":
            return self.dense(init, "search")
        return self.network(init, noise, label, ticket=ticket, first_step=self.first_step(arm),
                            train=self.study.search[found.training])

    def lender(self, arm: str, init: int) -> int:
        """The initialisation whose ticket an arm's ticket is made from: the next one for :data:`~dpkit.stages.arms.LENT`."""
        return (init + 1) % self.study.seeds if self.study.arm(arm).control in LENT else init

    def searches_of(self, arm: str, init: int, round: int) -> list[Unit]:
        """All networks that were trained to find the mask of an arm's ticket of ``round``."""
        found, init = self.study.arm(arm), self.lender(arm, init)
        if not found.trains:
            return []
        return [self.searched(arm, init, 0)] if found.once else [self.searched(arm, init, r) for r in range(round)]

    @_once
    def ticket(self, arm: str, init: int, round: int) -> Unit:
        """The subnetwork of an arm after ``round`` rounds, from 1."""
        study, found = self.study, self.study.arm(arm)
        if other := self.shared_with(arm, round):
            return self.ticket(other, init, round)
        spec, parents = self._beginning(arm, init, round)
        label = f"{arm} ticket {init}, round {round}"
        if found.control:
            lender = self.lender(arm, init)
            spec |= {"control": found.control, "control_seed": self.seed_at(found.control, init)}
            if found.control == "transferred":
                parents |= {"own": self.dense(init, "search"), "theirs": self.dense(lender, "search")}
            return self.unit("ticket", spec, {"of": self.ticket(found.of, lender, round), **parents}, label)
        if found.trains:
            network = {"network": self.searched(arm, init, round - 1)}
            if found.once:
                spec["once"] = True
            elif round > 1:
                network["previous"] = self.ticket(arm, init, round - 1)
            return self.unit("ticket", spec, network | parents, label)
        if found.score == "random":
            spec["mask_seed"] = self.seed_at("mask", init)
        else:
            spec["score"] = found.score
        if found.score in ("snip", "grasp"):
            spec |= {"data": self.identity, "per_class": study.score_per_class, "score_seed": self.seed_at("score", init)}
        return self.unit("ticket", spec, parents, label)

    def _beginning(self, arm: str, init: int, round: int) -> tuple[dict[str, Any], dict[str, Unit]]:
        """What all tickets say: how they are pruned, and where they start from."""
        prune = self.study.prune.replace(scope=self.study.arm(arm).scope or self.study.scope).to_dict()
        spec = {"prune": {k: v for k, v in prune.items() if k != "rounds"}, "model": self.model, "round": round,
                "init_seed": self.seed_at("init", init)}
        if not self.study.arm(arm).early:
            return spec, {}
        return spec | {"rewind_step": self.first_step(arm)}, {"start": self.dense(init, "search")}

    @_once
    def _pretrained(self, arm: str, init: int) -> Unit:
        """The dense network of the early step as a ticket that lacks nothing."""
        spec, parents = self._beginning(arm, init, 0)
        return self.unit("ticket", spec, parents, f"{arm} start {init}")

    @_once
    def child(self, arm: str, init: int, round: int, child: int) -> Unit:
        """Child ``child`` of a ticket (of the dense network for arm ``dense``, round 0), trained on real data."""
        if arm == "dense":
            return self.dense(init, "child", child)
        return self.network(init, self.seed_at("child", init, child), f"{arm} {init}, round {round}, child {child}",
                            ticket=self.ticket(arm, init, round), first_step=self.first_step(arm))

    @_once
    def spawner(self, arm: str, init: int, round: int, steps: tuple[int, ...]) -> Unit:
        """A ticket (the dense network for arm ``dense``) trained on real data and kept at ``steps``, where children part."""
        ticket, first = (None, 0) if arm == "dense" else (self.ticket(arm, init, round), self.first_step(arm))
        return self.network(init, self.seed_at("spawn", init), f"{arm} {init}, round {round}, before children part",
                            ticket=ticket, first_step=first, snapshots=steps)

    @_once
    def spawned(self, arm: str, init: int, round: int, child: int, step: int, steps: tuple[int, ...]) -> Unit:
        """Child ``child`` of what the :meth:`spawner` was at ``step``."""
        label = f"{arm} {init}, round {round}, child {child} from step {step}"
        return self.network(init, self.seed_at("child", init, child), label,
                            ticket=None if arm == "dense" else self.ticket(arm, init, round), first_step=step,
                            start=self.spawner(arm, init, round, steps))

    @_once
    def tracked(self, arm: str, init: int, round: int, child: int, points: int) -> Unit:
        """A child once more, kept at ``points`` evenly spaced steps after its start and at the start itself.

        As with :meth:`watched`, looking at a child must not change the key that its paths rest on.
        """
        first = 0 if arm == "dense" else self.first_step(arm)
        last = self.study.train.steps(self.identity["train"])
        steps = sorted({first + round_half_up(i * (last - first) / points) for i in range(points + 1)})
        return self.network(init, self.seed_at("child", init, child), f"{arm} {init}, round {round}, child {child}, watched",
                            ticket=None if arm == "dense" else self.ticket(arm, init, round), first_step=first,
                            snapshots=tuple(steps))

    @_once
    def watched(self, source: str, init: int) -> Unit:
        """A dense network trained on ``source`` and kept at evenly spaced steps, initialisation and end included.

        On real data this is the search's dense network once more: what is watched must not change the key that all searches and
        their tickets rest on.
        """
        images = None if source == "real" else self.small_set(source, init)
        train, count = self.study.train, self.identity["train"]
        if images is not None:
            train, count = self._on_set(images), set_images(images.spec["distill"], self.identity["classes"])
        last, points = train.steps(count), self.study.early_bird_points
        steps = sorted({round_half_up(i * last / points) for i in range(points + 1)})
        return self.network(init, self.seed_at("search", init), f"watched network {init} on {source}", images=images,
                            snapshots=tuple(steps))


def round_half_up(value: float) -> int:
    """The nearest whole number; halves go up, so names of numbers do not depend on the parity rule."""
    return int(value + 0.5)
