"""Where things stand in a study: the tickets that are trained and measured, and one row of a chapter's frame."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dpkit.stages.blocks import Blocks
from dpkit.stages.study import Study
from dpkit.stages.unit import Unit


@dataclass(frozen=True)
class Entry:
    """One row of a chapter's frame: where it stands in the study (plain values) and the unit that holds its numbers."""

    place: dict[str, Any]
    unit: Unit


@dataclass
class Places(Blocks):
    """The units of a study, and which of them are measured."""

    study: Study

    def places(self, arms: Iterable[str] | None = None) -> Iterable[tuple[str, int]]:
        """All (arm, round) that are trained on real data and measured; of ``arms`` only, where they are given."""
        rounds = sorted(set(self.study.at_rounds))
        for arm in ("dense", *self.study.arms) if arms is None else arms:
            yield from ((arm, round) for round in ([0] if arm == "dense" else rounds))

    def last(self, arm: str) -> int:
        """The last measured round of an arm."""
        return 0 if arm == "dense" else max(self.study.at_rounds)

    def place(self, arm: str, round: int, init: int, **more: Any) -> dict[str, Any]:
        """Where something stands: arm, round, sparsity in percent, initialisation, and ``more``."""
        return {"arm": arm, "round": round, "percent": self.percent(round), "seed": init, **more}

    def pairs(self, arms: Iterable[str] | None = None) -> Iterable[tuple[dict[str, Any], dict[str, Unit], str]]:
        """(place, both children, label) of each pair of children of one ticket."""
        for arm, round in self.places(arms):
            for init in range(self.study.seeds):
                for a, b in combinations(range(self.study.children), 2):
                    ends = {"a": self.child(arm, init, round, a), "b": self.child(arm, init, round, b)}
                    yield (self.place(arm, round, init, pair=f"{a}-{b}"), ends,
                           f"{arm} {init}, round {round}, children {a}-{b}")
