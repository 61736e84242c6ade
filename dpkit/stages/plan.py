"""From a study's settings to the units that it consists of, and to where each one stands in the study.

Nothing is computed here: keys follow from specifications, so the whole plan is known before the first step, which is what
`status`, shares of a study and the frames in the report rest on.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from itertools import combinations
from typing import Any

from dpkit.connectivity import PathSpec
from dpkit.distill import check_factor
from dpkit.hessian import HessianSpec
from dpkit.landscape import PlaneSpec
from dpkit.models import count_prunable
from dpkit.prune import survivors
from dpkit.stages.costs import shipped_seconds
from dpkit.stages.study import ARMS, Study
from dpkit.stages.unit import Unit
from dpkit.tree import seed_for

CHAPTERS = ("data", "distillation", "tickets", "connectivity", "landscape", "hessian")
_METHODS = {"idc": "idc", "idc_factor1": "idc", "random_real": "random", "herding": "herding", "random": "random"}


@dataclass(frozen=True)
class Entry:
    """One row of a chapter's frame: where it stands in the study (plain values) and the unit that holds its numbers."""

    place: dict[str, Any]
    unit: Unit


def _once(method):
    """Build each unit of a plan once: a ticket reaches back to the dense network along two ways in every round."""
    @wraps(method)
    def remembered(self: Plan, *place: int | str) -> Unit:
        at = (method.__name__, *place)
        if at not in self.memo:
            self.memo[at] = method(self, *place)
        return self.memo[at]

    return remembered


@dataclass
class Plan:
    """The units of a study for one data set, by chapter. identity: ``Dataset.identity``; see :func:`dpkit.data.load`."""

    study: Study
    identity: dict
    memo: dict[tuple, Unit] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # what does not fit the images is better found now than by a worker in an hour
        self.study.model(self.identity)
        check_factor(self.study.factor, min(self.identity["shape"][1:]))

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

    def _seed(self, *path: int | str) -> int:
        return seed_for(self.study.run, *path)

    def _unit(self, stage: str, spec: dict, parents: dict[str, Unit], label: str) -> Unit:
        """The unit, built once: equal requests give the same object. Its cost is in seconds of a known machine."""
        unit = Unit(stage, spec, parents, label, data=self.study.data)
        if (unit.key,) not in self.memo:
            self.memo[unit.key,] = replace(unit, cost=shipped_seconds(unit))
        return self.memo[unit.key,]

    @_once
    def small_set(self, name: str, seed: int) -> Unit:
        """The small set ``name`` (one of ``study.SETS``). IDC is made once; chosen sets differ from seed to seed."""
        study, method = self.study, _METHODS[name]
        factor = study.factor if name == "idc" else 1
        spec = study.distill(factor, method)
        own = 0 if method in ("idc", "herding") else seed
        parents = {"network": self.dense(0, "search")} if method == "herding" else {}
        return self._unit("distill", {"data": self.identity, "model": self.model, "distill": spec.to_dict(),
                                      "train": study.train_on_set(factor).to_dict(), "seed": self._seed("set", method, own)},
                          parents, f"small set {name}" + ("" if method in ("idc", "herding") else f", seed {seed}"))

    def _network(self, init: int, noise: int, label: str, *, images: Unit | None = None, ticket: Unit | None = None,
                 first_step: int = 0, snapshots: tuple[int, ...] = ()) -> Unit:
        study = self.study
        train = study.train if images is None else study.train_on_set(images.spec["distill"]["factor"])
        parents = {name: u for name, u in (("images", images), ("ticket", ticket)) if u is not None}
        spec = {"data": self.identity, "model": self.model, "train": train.to_dict(), "init_seed": self._seed("init", init),
                "noise_seed": noise, "first_step": first_step, "snapshots": list(snapshots)}
        return self._unit("network", spec, parents, label)

    @_once
    def dense(self, init: int, role: str, child: int = 0) -> Unit:
        """A dense network trained on real data: the one that searches start with, or a child."""
        noise = self._seed("search", init) if role == "search" else self._seed("child", init, child)
        kept = (self.rewind_step,) if role == "search" else ()
        name = "search" if role == "search" else f"child {child}"
        return self._network(init, noise, f"dense network {init}, {name}", snapshots=kept)

    @_once
    def searched(self, arm: str, init: int, round: int) -> Unit:
        """The network whose magnitudes decide the mask of round ``round + 1``."""
        source, rewound = ARMS[arm]
        ticket = self.ticket(arm, init, round) if round else None
        if source == "real":
            if round == 0:
                return self.dense(init, "search")
            return self._network(init, self._seed("search", init), f"{arm} search {init}, round {round}", ticket=ticket,
                                 first_step=self.rewind_step if rewound else 0)
        images = self.small_set(source, init)
        return self._network(init, self._seed("search", init), f"{arm} search {init}, round {round}", images=images,
                             ticket=ticket)

    @_once
    def ticket(self, arm: str, init: int, round: int) -> Unit:
        """The subnetwork of an arm after ``round`` rounds, from 1."""
        study, (source, rewound) = self.study, ARMS[arm]
        spec: dict[str, Any] = {"prune": study.prune.to_dict() | {"rounds": 0}, "model": self.model, "round": round,
                                "init_seed": self._seed("init", init)}
        spec["prune"] = {k: v for k, v in spec["prune"].items() if k != "rounds"}
        parents: dict[str, Unit] = {}
        if source == "none":
            spec["mask_seed"] = self._seed("mask", init)
        else:
            parents["network"] = self.searched(arm, init, round - 1)
            if round > 1:
                parents["previous"] = self.ticket(arm, init, round - 1)
            if rewound:
                parents["start"] = self.dense(init, "search")
                spec["rewind_step"] = self.rewind_step
        return self._unit("ticket", spec, parents, f"{arm} ticket {init}, round {round}")

    @_once
    def child(self, arm: str, init: int, round: int, child: int) -> Unit:
        """Child ``child`` of a ticket (of the dense network for arm ``dense``, round 0), trained on real data."""
        if arm == "dense":
            return self.dense(init, "child", child)
        first = self.rewind_step if ARMS[arm][1] else 0
        return self._network(init, self._seed("child", init, child), f"{arm} {init}, round {round}, child {child}",
                             ticket=self.ticket(arm, init, round), first_step=first)

    def places(self) -> Iterable[tuple[str, int]]:
        """All (arm, round) that are trained on real data and measured."""
        yield "dense", 0
        for arm in self.study.arms:
            for round in sorted(set(self.study.at_rounds)):
                yield arm, round

    def _place(self, arm: str, round: int, init: int, **more: Any) -> dict[str, Any]:
        return {"arm": arm, "round": round, "percent": self.percent(round), "seed": init, **more}

    # --- chapters -------------------------------------------------------------------------------------------------------
    def data(self) -> list[Entry]:
        """The baseline: dense networks on all data."""
        return [Entry({"set": "all_data", "seed": init}, self.dense(init, "child")) for init in range(self.study.seeds)]

    def distillation(self) -> list[Entry]:
        """Each small set, evaluated by training fresh networks on it."""
        rows = []
        for name in self.study.sets:
            for seed in range(self.study.evaluation_seeds):
                images = self.small_set(name, seed)
                unit = self._network(seed, self._seed("evaluate", seed), f"evaluate {name}, seed {seed}", images=images)
                rows.append(Entry({"set": name, "seed": seed}, unit))
        return rows + self.data()

    def tickets(self) -> list[Entry]:
        """Every child of every ticket."""
        return [Entry(self._place(arm, round, init, child=child), self.child(arm, init, round, child))
                for arm, round in self.places() for init in range(self.study.seeds) for child in range(self.study.children)]

    def connectivity(self) -> list[Entry]:
        """The path between each pair of children of one ticket."""
        spec = PathSpec(points=self.study.points, statistics=self.study.statistics, precision=self.study.path_precision).to_dict()
        rows = []
        for arm, round in self.places():
            for init in range(self.study.seeds):
                for a, b in combinations(range(self.study.children), 2):
                    ends = {"a": self.child(arm, init, round, a), "b": self.child(arm, init, round, b)}
                    unit = self._unit("path", {"data": self.identity, "model": self.model, "path": spec}, ends,
                                      f"path {arm} {init}, round {round}, children {a}-{b}")
                    rows.append(Entry(self._place(arm, round, init, pair=f"{a}-{b}"), unit))
        return rows

    def landscape(self) -> list[Entry]:
        """The plane through three children of the first initialisation, at the last measured round."""
        spec = PlaneSpec(resolution=self.study.plane_resolution, images=min(self.study.plane_images, self.identity["test"]),
                         statistics="reestimate" if self.study.statistics == "reestimate" else "keep",
                         precision=self.study.path_precision).to_dict()
        rows = []
        for arm in self.study.plane_arms:
            round = 0 if arm == "dense" else max(self.study.at_rounds)
            corners = {name: self.child(arm, 0, round, c) for c, name in enumerate("abc")}
            unit = self._unit("plane", {"data": self.identity, "model": self.model, "plane": spec}, corners,
                              f"plane {arm}, round {round}")
            rows.append(Entry(self._place(arm, round, 0), unit))
        return rows

    def hessian(self) -> list[Entry]:
        """Curvature at the first child of each ticket, at the last measured round."""
        study = self.study
        spec = HessianSpec(images=min(study.hessian_images, self.identity["train"]), probes=study.probes,
                           lanczos_steps=study.lanczos_steps).to_dict()
        rows = []
        for arm in study.hessian_arms:
            round = 0 if arm == "dense" else max(study.at_rounds)
            for init in range(study.seeds):
                parents = {"network": self.child(arm, init, round, 0)}
                if arm != "dense":
                    parents["ticket"] = self.ticket(arm, init, round)
                unit = self._unit("hessian", {"data": self.identity, "model": self.model, "hessian": spec,
                                              "seed": self._seed("hessian", init)}, parents,
                                  f"hessian {arm} {init}, round {round}")
                rows.append(Entry(self._place(arm, round, init), unit))
        return rows

    def searches(self) -> list[Entry]:
        """Every network that a mask search trains, with its tickets' arm: the cost ledger."""
        last = max(self.study.at_rounds)
        return [Entry(self._place(arm, last, init, search_round=round), self.searched(arm, init, round))
                for arm in self.study.arms if ARMS[arm][0] != "none" for init in range(self.study.seeds)
                for round in range(last)]

    def chapter(self, name: str) -> list[Entry]:
        """The entries of one of :data:`CHAPTERS`."""
        return getattr(self, name)()

    def share(self, name: str, share: str = "1/1") -> list[Unit]:
        """The units of a chapter that share ``i/n`` has to make, split so that work on one ticket stays together."""
        part, of = parse_share(share)
        entries = self.chapter(name)
        groups = sorted({(str(e.place.get("arm", e.place.get("set"))), e.place["seed"]) for e in entries})
        mine = set(groups[part - 1::of])
        return [e.unit for e in entries if (str(e.place.get("arm", e.place.get("set"))), e.place["seed"]) in mine]


def parse_share(share: str) -> tuple[int, int]:
    """``"2/3"`` as (2, 3); raises ``ValueError`` unless it is i/n with 1 <= i <= n."""
    words = str(share).split("/")
    if len(words) == 2 and all(w.isdigit() for w in words) and 1 <= int(words[0]) <= int(words[1]):
        return int(words[0]), int(words[1])
    raise ValueError(f"share must be i/n with 1 <= i <= n, such as 2/3; got {share!r}")


def round_half_up(value: float) -> int:
    """The nearest whole number; halves go up, so names of numbers do not depend on the parity rule."""
    return int(value + 0.5)
