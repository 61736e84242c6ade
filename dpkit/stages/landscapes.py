"""The chapter on landscapes: planes, squares and lines around networks of the first initialisation."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpkit.landscape import FORMS, AroundSpec, PlaneSpec, ProfileSpec, SquareSpec
from dpkit.stages.places import Entry, Places
from dpkit.stages.unit import Unit


@dataclass
class Landscapes(Places):
    """Loss and error around networks of a study, at one round. Pictures are of the first initialisation."""

    def seen(self, arm: str) -> int:
        """The round whose landscapes are measured: ``plane_round``, or the last measured one."""
        return 0 if arm == "dense" else self.study.plane_round or self.last(arm)

    def landscape(self) -> list[Entry]:
        """The plane through three children."""
        return [Entry(self.place(arm, self.seen(arm), 0), self._plane(arm)) for arm in self.study.plane_arms]

    def plane_sets(self) -> list[Entry]:
        """The same planes on the images of small sets."""
        return [Entry(self.place(arm, self.seen(arm), 0, set=name), self._plane(arm, name))
                for arm in self.study.plane_arms for name in self.study.plane_sets]

    def trajectory(self) -> list[Entry]:
        """How each of the three children went from its start to where it is, on their plane."""
        rows = []
        for arm in self.study.plane_arms if self.study.trajectory_points else ():
            round = self.seen(arm)
            ways = {f"way_{name}": self.tracked(arm, 0, round, c, self.study.trajectory_points) for c, name in enumerate("abc")}
            unit = self.unit("trajectory", {"model": self.model}, self._children(arm, "abc") | ways,
                             f"trajectories {arm}, round {round}")
            rows.append(Entry(self.place(arm, round, 0), unit))
        return rows

    def square(self) -> list[Entry]:
        """The square of four children, whose running statistics are averaged too where the study interpolates them."""
        return [self._square(arm, self.study.square_form) for arm in self.study.square_arms]

    def square_forms(self) -> list[Entry]:
        """The square of the first of these arms in both forms: through all four children, and the plane of the published code."""
        return [self._square(arm, form) for arm in self.study.square_arms[:1] for form in FORMS]

    def _square(self, arm: str, form: str) -> Entry:
        how = self._how()
        if how["statistics"] == "keep" and form == "bilinear":
            how["statistics"] = "interpolate"
        spec = SquareSpec(resolution=self.study.square_resolution, form=form, **how).to_dict()
        more = "" if form == "bilinear" else f", {form}"
        unit = self.unit("square", {"data": self.identity, "model": self.model, "square": spec}, self._children(arm, "abcd"),
                         f"square {arm}, round {self.seen(arm)}{more}")
        return Entry(self.place(arm, self.seen(arm), 0, form=form), unit)

    def around(self) -> list[Entry]:
        """The plane of two random filter-normalised directions around the first child."""
        rows = []
        for arm in self.study.around_arms:
            spec = AroundSpec(resolution=self.study.around_resolution, reach=self.study.reach, **self._how()).to_dict()
            unit = self.unit("around", {"data": self.identity, "model": self.model, "around": spec,
                                        "seed": self.seed_at("directions")}, self._centre(arm, 0), f"around {arm}")
            rows.append(Entry(self.place(arm, self.seen(arm), 0), unit))
        return rows

    def profile(self) -> list[Entry]:
        """Lines in random filter-normalised directions through the first child of every initialisation."""
        rows, study = [], self.study
        spec = ProfileSpec(points=study.profile_points, directions=study.profile_directions, reach=study.reach,
                           **self._how()).to_dict() if study.profile_arms else {}
        for arm in study.profile_arms:
            for init in range(study.seeds):
                unit = self.unit("profile", {"data": self.identity, "model": self.model, "profile": spec,
                                             "seed": self.seed_at("profiles", init)}, self._centre(arm, init),
                                 f"profiles {arm} {init}")
                rows.append(Entry(self.place(arm, self.seen(arm), init), unit))
        return rows

    def _plane(self, arm: str, on: str = "") -> Unit:
        spec = PlaneSpec(resolution=self.study.plane_resolution, **self._how()).to_dict()
        whole = {"data": self.identity, "model": self.model, "plane": spec}
        images = {"images": self.small_set(on, 0)} if on else {}
        label = f"plane {arm}, round {self.seen(arm)}" + (f", on {on}" if on else "")
        return self.unit("plane", whole, self._children(arm, "abc") | images, label)

    def _children(self, arm: str, names: str) -> dict[str, Unit]:
        return {name: self.child(arm, 0, self.seen(arm), c) for c, name in enumerate(names)}

    def _centre(self, arm: str, init: int) -> dict[str, Unit]:
        round = self.seen(arm)
        ticket = {} if arm == "dense" else {"ticket": self.ticket(arm, init, round)}
        return {"network": self.child(arm, init, round, 0), **ticket}

    def _how(self) -> dict[str, Any]:
        """What all these measurements have in common."""
        return {"images": min(self.study.plane_images, self.identity["test"]), "precision": self.study.path_precision,
                "compile": self.study.plane_compile,
                "statistics": "keep" if self.study.statistics == "interpolate" else "reestimate"}
