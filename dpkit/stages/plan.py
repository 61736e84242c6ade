"""From a study's settings to the units that it consists of, and to where each one stands in the study.

Nothing is computed here: keys follow from specifications, so the whole plan is known before the first step, which is what
`status`, shares of a study and the frames in the report rest on.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpkit.models import forward_work
from dpkit.stages.arms import SCORES
from dpkit.stages.blocks import Blocks
from dpkit.stages.curvature import Curvature
from dpkit.stages.features import BACKWARD, score_work
from dpkit.stages.landscapes import Landscapes
from dpkit.stages.lines import Lines
from dpkit.stages.places import Entry
from dpkit.stages.unit import Unit

#: the chapters that compute, and the frames that each one makes
PARTS: dict[str, tuple[str, ...]] = {"data": ("data",), "distillation": ("distillation", "transfer"), "tickets": ("tickets",),
                                     "masks": ("masks", "early_bird"), "robustness": ("robustness",),
                                     "connectivity": ("connectivity", "train_paths", "alignment", "starts", "statistics",
                                                      "instability", "layers", "between"),
                                     "landscape": ("landscape", "plane_sets", "trajectory", "square", "square_forms", "around",
                                                   "profile"),
                                     "hessian": ("hessian", "sharpness", "spectra", "diagonals", "removed", "edge")}
CHAPTERS = tuple(PARTS)
#: what tickets rest on has frames too: the networks of their searches, and the small sets of these
FRAMES = (*(name for names in PARTS.values() for name in names), "searches", "search_sets")


@dataclass
class Plan(Lines, Landscapes, Curvature):
    """The units of a study for one data set, by chapter. identity: ``Dataset.identity``; see :func:`dpkit.data.load`."""

    transferred: dict[str, Blocks] = field(default_factory=dict, repr=False)  # the units of each other architecture

    @property
    def robust_round(self) -> int:
        """The round whose tickets' robustness is measured."""
        return self.study.robust_round or max(self.study.at_rounds)

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
                unit = self.network(seed, self.seed_at("evaluate", seed), f"evaluate {name}, seed {seed}", images=images)
                rows.append(Entry({"set": name, "seed": seed}, unit))
        return rows + self.data()

    def transfer(self) -> list[Entry]:
        """Each small set, evaluated by training networks of the other architectures on it; and those on all data."""
        rows = []
        for arch, study in self.study.others.items():
            other = self.transferred.setdefault(arch, Blocks(study, self.identity))
            for name in self.study.sets:
                for seed in range(study.evaluation_seeds):
                    images = self.small_set(name, seed)
                    unit = other.network(seed, self.seed_at("evaluate", seed), f"evaluate {name} on {arch}, seed {seed}",
                                          images=images)
                    rows.append(Entry({"set": name, "arch": arch, "seed": seed}, unit))
            rows += [Entry({"set": "all_data", "arch": arch, "seed": init}, other.dense(init, "child"))
                     for init in range(study.seeds)]
        return rows

    def tickets(self) -> list[Entry]:
        """Every child of every ticket."""
        return [Entry(self.place(arm, round, init, child=child), self.child(arm, init, round, child))
                for arm, round in self.places() for init in range(self.study.seeds) for child in range(self.study.children)]

    def masks(self) -> list[Entry]:
        """The comparison of all arms' masks, one for each measured round and initialisation.

        Controls are left out, as their masks are those of their arm or its layers' densities with chance, which is computed;
        and so is ``combined`` while its masks are still those of the arm before: nothing would be unique to either.
        """
        rows = []
        for round in sorted(set(self.study.at_rounds)):
            for init in range(self.study.seeds):
                tickets: dict[str, Unit] = {}
                for arm in self.study.arms:
                    if not self.study.arm(arm).control and self.shared_with(arm, round) not in self.study.arms:
                        tickets[arm] = self.ticket(arm, init, round)
                if not tickets:
                    continue
                unit = self.unit("masks", {"model": self.model, "arms": list(tickets)}, tickets,
                                 f"masks {init}, round {round}")
                rows.append(Entry({"round": round, "percent": self.percent(round), "seed": init}, unit))
        return rows

    def early_bird(self) -> list[Entry]:
        """Masks along the training of dense networks on each source, at the sparsity of the last measured round."""
        last, rows = max(self.study.at_rounds), []
        for source in self.study.early_bird_sources:
            for init in range(self.study.seeds):
                unit = self.unit("early_bird", {"model": self.model, "count": self.counts[last]},
                                 {"network": self.watched(source, init)}, f"early bird {source} {init}")
                rows.append(Entry({"source": source, "percent": self.percent(last), "seed": init}, unit))
        return rows

    def robustness(self) -> list[Entry]:
        """The first child of each ticket of one round, under corruptions and in few bits."""
        spec, rows = self.study.robustness.to_dict(), []
        for arm in self.study.robust_arms:
            round = 0 if arm == "dense" else self.robust_round
            for init in range(self.study.seeds):
                unit = self.unit("robustness", {"data": self.identity, "model": self.model, "robustness": spec,
                                                "seed": self.seed_at("corruptions")},
                                 {"network": self.child(arm, init, round, 0)}, f"robustness {arm} {init}, round {round}")
                rows.append(Entry(self.place(arm, round, init, child=0), unit))
        return rows

    def searches(self) -> list[Entry]:
        """What each mask search is made of: the networks that it trains, or the ticket of a score at initialisation.

        Places say how many ``pieces`` the whole search has and how many ``networks`` are among them, which ``part`` of each
        one's training it needs, how many decoded images stand for a stored one, and the floating-point operations that one image
        takes, pruned weights counted (the machine multiplies by them); of a score also its ``points``, the images that it
        takes. A random mask costs nothing and has no row.
        """
        last, forward = max(self.study.at_rounds), forward_work(self.study.model(self.identity)).flops
        rows = []
        for arm in self.study.arms:
            found = self.study.arm(arm)
            for init in range(self.study.seeds):
                if found.score in SCORES:
                    points, passes = score_work(found.score, self.study.score_per_class * self.identity["classes"])
                    place = self.place(arm, last, init, search_round=0, pieces=1, networks=0, part=1.0, decoded=1,
                                        image_flops=passes * forward, points=points)
                    rows.append(Entry(place, self.ticket(found.of or arm, init, last)))
                units = [(unit, 1.0) for unit in self.searches_of(arm, init, last)]
                if found.pretrained:
                    whole = self.study.train.steps(self.identity["train"])
                    units.append((self.dense(init, "search"), self.rewind_step / whole))
                for number, (unit, part) in enumerate(units):
                    images = unit.parents.get("images")
                    decoded = images.spec["distill"].get("factor", 1) ** 2 if images else 1
                    place = self.place(arm, last, init, search_round=number, pieces=len(units), networks=len(units), part=part,
                                        decoded=decoded, image_flops=BACKWARD * forward)
                    rows.append(Entry(place, unit))
        return rows

    def search_sets(self) -> list[Entry]:
        """The small set that each arm's search trains on, once for each initialisation."""
        last, rows = max(self.study.at_rounds), []
        for arm in self.study.arms:
            for init in range(self.study.seeds):
                sets = {u.parents["images"].key: u.parents["images"] for u in self.searches_of(arm, init, last)
                        if "images" in u.parents}
                rows += [Entry(self.place(arm, last, init), images) for images in sets.values()]
        return rows

    def chapter(self, name: str) -> list[Entry]:
        """The entries of one of :data:`CHAPTERS`, of all its frames."""
        return [entry for part in PARTS[name] for entry in getattr(self, part)()]

    def share(self, name: str, share: str = "1/1") -> list[Unit]:
        """The units of a chapter that share ``i/n`` has to make, split so that work on one ticket stays together."""
        part, of = parse_share(share)
        entries = self.chapter(name)
        def group(place: Mapping[str, Any]) -> tuple[str, int]:
            return str(next((place[name] for name in ("arm", "set", "source") if name in place), "")), place["seed"]

        mine = set(sorted({group(e.place) for e in entries})[part - 1::of])
        return [e.unit for e in entries if group(e.place) in mine]


def parse_share(share: str) -> tuple[int, int]:
    """``"2/3"`` as (2, 3); raises ``ValueError`` unless it is i/n with 1 <= i <= n."""
    words = str(share).split("/")
    if len(words) == 2 and all(w.isdigit() for w in words) and 1 <= int(words[0]) <= int(words[1]):
        return int(words[0]), int(words[1])
    raise ValueError(f"share must be i/n with 1 <= i <= n, such as 2/3; got {share!r}")
