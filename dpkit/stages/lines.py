"""The chapter on connectivity: what is measured between which networks."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

from dpkit.connectivity import STATISTICS
from dpkit.stages.places import Entry, Places
from dpkit.stages.unit import Unit


@dataclass
class Lines(Places):
    """Paths between networks of a study."""

    normed: dict[str, Lines] = field(default_factory=dict, repr=False)  # the units of this study with another network

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spawn_steps  # noqa: B018  what does not fit is better found now

    def connectivity(self) -> list[Entry]:
        """The path between each pair of children of one ticket."""
        return [Entry(place, self._path(ends, label)) for place, ends, label in self.pairs()]

    def train_paths(self) -> list[Entry]:
        """The same paths on training images."""
        count = min(self.study.train_path_images, self.identity["train"])
        if not count:
            return []
        return [Entry(place, self._path(ends, f"{label}, training images", on="train", images=count))
                for place, ends, label in self.pairs()]

    def alignment(self) -> list[Entry]:
        """The same pairs with the channels of the second child in the order that matches the first, and their distances."""
        rows = []
        for place, ends, label in self.pairs():
            arm, round, init = place["arm"], place["round"], place["seed"]
            spec = self._path_spec() | {"seed": self.seed_at("alignment", init), "init_seed": self.seed_at("init", init)}
            parents = ends if arm == "dense" else ends | {"ticket": self.ticket(arm, init, round)}
            rows.append(Entry(place, self.unit("alignment", spec, parents, f"alignment {label}")))
        return rows

    def starts(self) -> list[Entry]:
        """Dense networks of one initialisation and the next, before (``matched`` False) and after their channels are matched.

        What children of one start are compared with: how much of a barrier between networks that share nothing is the order of
        their channels. The last one is compared with the first where that is another pair.
        """
        rows, count = [], self.study.seeds
        for init in range(count if count > 2 else count - 1):
            other = (init + 1) % count
            ends = {"a": self.child("dense", init, 0, 0), "b": self.child("dense", other, 0, 1)}
            place, label = self.place("starts", 0, init, pair=f"{init}-{other}"), f"dense {init} and {other}"
            spec = self._path_spec() | {"seed": self.seed_at("alignment", "starts", init)}
            rows += [Entry(place | {"matched": False}, self._path(ends, label)),
                     Entry(place | {"matched": True}, self.unit("alignment", spec, ends, f"alignment {label}"))]
        return rows

    def statistics(self) -> list[Entry]:
        """Paths in a network with BatchNorm, maybe of another architecture, with each kind of statistics on the way."""
        study, network = self.study, self.study.measured_network
        if not study.statistics_arms:
            return []
        norm, name = network["norm"], ":".join(map(str, network.values()))
        if network == {"arch": study.arch, "width": study.width, "norm": study.norm}:
            other = self
        else:
            other = self.normed.setdefault(name, Lines(study.replace(**network, statistics_arch=""), self.identity))
        rows = []
        for place, ends, label in other.pairs(study.statistics_arms):
            for kind in STATISTICS:
                unit = other._path(ends, f"{label}, norm {norm}, {kind}", statistics=kind)
                rows.append(Entry(place | {"statistics": kind, "arch": network["arch"], "norm": norm}, unit))
        return rows

    @property
    def spawn_steps(self) -> dict[int, float]:
        """The steps at which children part, ascending, each once, with the epochs that they are."""
        per_epoch, last = self.study.train.steps_per_epoch(self.identity["train"]), self.study.train.steps(self.identity["train"])
        found: dict[int, float] = {}
        for epochs in self.study.spawn_epochs if self.study.spawn_arms else ():
            step = max(1, round(epochs * per_epoch))
            if step >= last:
                raise ValueError(f"spawn_epochs must lie at least half a step before the end ({last} steps, {per_epoch} in an "
                                 f"epoch), got {epochs:g}, which is step {step}")
            found[step] = step / per_epoch
        found = dict(sorted(found.items()))
        return found

    def instability(self) -> list[Entry]:
        """Paths between children that share their first steps (Frankle et al. 2020, arXiv 1912.05671, section 3).

        At step 0 they are the children that are there anyway. An arm that starts from a later step has no children before it.
        """
        rows, seeds = [], range(self.study.spawn_seeds or self.study.seeds)
        for arm, round in self.places(self.study.spawn_arms):
            first = 0 if arm == "dense" else self.first_step(arm)
            steps = {first: first / self.study.train.steps_per_epoch(self.identity["train"])} | self.spawn_steps
            for step, epochs in steps.items():
                for init in seeds if step >= first else ():
                    for a, b in combinations(range(self.study.children), 2):
                        ends = {"a": self._parted(arm, init, round, a, step), "b": self._parted(arm, init, round, b, step)}
                        label = f"{arm} {init}, round {round}, children {a}-{b} from step {step}"
                        rows.append(Entry(self.place(arm, round, init, step=step, epochs=epochs, pair=f"{a}-{b}"),
                                          self._path(ends, label)))
        return rows

    def _parted(self, arm: str, init: int, round: int, child: int, step: int) -> Unit:
        """The child that has shared its first ``step`` steps with the others."""
        first = 0 if arm == "dense" else self.first_step(arm)
        if step == first:
            return self.child(arm, init, round, child)
        return self.spawned(arm, init, round, child, step, tuple(s for s in self.spawn_steps if s > first))

    def layers(self) -> list[Entry]:
        """The first two children of each ticket, one layer moved at a time."""
        rows = []
        for place, ends, label in self.pairs(self.study.layer_arms):
            if place["pair"] == "0-1":
                rows.append(Entry(place, self.unit("layers", self._path_spec(error_tolerance=0.0), ends, f"layers {label}")))
        return rows

    def between(self) -> list[Entry]:
        """Paths between networks that share an initialisation but not a ticket.

        ``rounds``: the networks that one search trained in successive rounds (Paul et al. 2023, arXiv 2210.03044), all with the
        same batches and draws. ``solution``: what a search trained on its small set, and the first child, trained on real data
        from the same ticket. ``arms``: the first child of one arm and the second of another at one round, so that the noise
        differs as between two children of one arm. Searches on images of another space have no paths with others.
        """
        rows = []
        for relation, one, other, init, ends in self._relations():
            (arm, round), (to, to_round) = one, other
            place = self.place(arm, round, init, relation=relation, other=to, other_round=to_round)
            place["percent"] = self.percent(max(round, to_round))
            rows.append(Entry(place, self._path(dict(zip("ab", ends, strict=True)),
                                                f"{relation} {arm} {round} to {to} {to_round}, {init}")))
        return rows

    def _relations(self) -> Iterable[tuple[str, tuple[str, int], tuple[str, int], int, tuple[Unit, Unit]]]:
        study, rounds = self.study, sorted(set(self.study.at_rounds))
        for init in range(study.seeds):
            for arm in study.between_arms:
                if arm == "dense":
                    continue
                found = study.arm(arm)
                foreign = found.source.removesuffix("_soft") in study.published_files
                if found.trains and not (found.once or found.control or foreign):
                    for a, b in pairwise(range(study.rounds)):
                        yield "rounds", (arm, a), (arm, b), init, (self.searched(arm, init, a), self.searched(arm, init, b))
                if found.trains and found.source != "real" and not (found.control or foreign):
                    for round in (0, *(r for r in rounds if r < study.rounds)):
                        child = self.child(arm if round else "dense", init, round, 0)
                        yield "solution", (arm, round), (arm, round), init, (self.searched(arm, init, round), child)
            for round in rounds:
                for a, b in combinations([arm for arm in study.between_arms if arm != "dense"], 2):
                    # as two children of one arm: the noise differs
                    yield "arms", (a, round), (b, round), init, (self.child(a, init, round, 0), self.child(b, init, round, 1))

    def _path_spec(self, **changes: Any) -> dict[str, Any]:
        return {"data": self.identity, "model": self.model, "path": self.study.path.replace(**changes).to_dict()}

    def _path(self, ends: dict[str, Unit], label: str, *, statistics: str | None = None, **more: Any) -> Unit:
        changes = {"statistics": statistics} if statistics else {}
        return self.unit("path", self._path_spec(**changes) | more, ends, f"path {label}")
