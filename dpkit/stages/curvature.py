"""The chapter on curvature: where the Hessian is measured."""
from __future__ import annotations

from dataclasses import dataclass

from dpkit.hessian import HessianSpec
from dpkit.stages.places import Entry, Places


@dataclass
class Curvature(Places):
    """Curvature at networks of a study."""

    def hessian(self) -> list[Entry]:
        """Curvature at the first child of each ticket, at the last measured round."""
        study = self.study
        spec = HessianSpec(images=min(study.hessian_images, self.identity["train"]), probes=study.probes,
                           lanczos_steps=study.lanczos_steps).to_dict()
        rows = []
        for arm in study.hessian_arms:
            round = self.last(arm)
            for init in range(study.seeds):
                parents = {"network": self.child(arm, init, round, 0)}
                if arm != "dense":
                    parents["ticket"] = self.ticket(arm, init, round)
                unit = self.unit("hessian", {"data": self.identity, "model": self.model, "hessian": spec,
                                              "seed": self.seed_at("hessian", init)}, parents,
                                  f"hessian {arm} {init}, round {round}")
                rows.append(Entry(self.place(arm, round, init), unit))
        return rows

