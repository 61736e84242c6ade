"""The chapter on curvature: where it is measured, and how."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpkit.hessian import HessianSpec, SharpnessSpec, SparseSpec
from dpkit.hessian.spectrum import SpectrumSpec
from dpkit.stages.blocks import round_half_up
from dpkit.stages.places import Entry, Places
from dpkit.stages.unit import Unit

EARLY = 3
"""Ratio of neighbouring steps at which the first epoch of a training is watched."""


@dataclass
class Curvature(Places):
    """Curvature and sharpness at networks of a study, and of what masks remove."""

    def hessian(self) -> list[Entry]:
        """Trace, diagonal and top eigenvalue at the first child of each ticket."""
        study = self.study
        spec = HessianSpec(images=self._images, probes=study.probes, lanczos_steps=study.lanczos_steps,
                           precision=study.hessian_precision, target=study.trace_target).to_dict()
        return [Entry(place, self._measured("hessian", {"hessian": spec}, place, parents, "hessian"))
                for place, parents in self._networks(study.hessian_arms)]

    def sharpness(self) -> list[Entry]:
        """Plain and adaptive sharpness of the same networks."""
        study = self.study
        spec = SharpnessSpec(images=self._images, radius=study.sharpness_radius,
                             adaptive_radius=study.adaptive_radius).to_dict()
        return [Entry(place, self._measured("sharpness", {"sharpness": spec}, place, parents, "sharpness"))
                for place, parents in self._networks(study.sharpness_arms)]

    def spectra(self) -> list[Entry]:
        """The whole spectrum at the first child of each ticket of one round."""
        study = self.study
        spec = SpectrumSpec(images=self._images, eigenvalues=study.eigenvalues, pair_products=study.pair_products,
                            probes=study.density_probes, steps=study.density_steps, trace_probes=study.trace_probes,
                            other_probes=study.other_probes).to_dict()
        return [Entry(place, self._measured("spectrum", {"spectrum": spec}, place, parents, "spectrum"))
                for place, parents in self._networks(study.spectrum_arms, one=True)]

    def diagonals(self) -> list[Entry]:
        """The published protocol's diagonal: on one augmented batch, in train mode, pruned entries included."""
        study, rows = self.study, []
        spec = HessianSpec.published(probes=study.diagonal_probes).to_dict()
        how = {"hessian": spec, "augment": study.augment, "limit": study.diagonal_limit}
        for place, parents in self._networks(study.diagonal_arms, one=True):
            rows.append(Entry(place, self._measured("diagonal", how, place, parents, "published diagonal")))
        return rows

    def removed(self) -> list[Entry]:
        """What the arms' masks remove from the dense network's sharp directions, on real data or on small sets."""
        rows, study, round = [], self.study, self.spectrum_round
        for on in study.removed_on:
            for init in range(study.seeds):
                tickets = {arm: self.ticket(arm, init, round) for arm in study.arms if not study.arm(arm).control
                           and self.shared_with(arm, round) not in study.arms}
                if not tickets:
                    continue
                images = {} if on == "real" else {"images": self.small_set(on, init)}
                spec = SparseSpec(images=self._images, probes=study.removed_probes, directions=study.eigenvalues,
                                  lanczos_steps=study.pair_products, draws=study.removed_draws).to_dict()
                unit = self.unit("removed", {"data": self.identity, "model": self.model, "removed": spec, "arms": list(tickets),
                                             "seed": self.seed_at("removed", init)},
                                 {"network": self.dense(init, "search"), **tickets, **images}, f"removed weights {init}, on {on}")
                place = {"round": round, "percent": self.percent(round), "seed": init, "on": on}
                rows.append(Entry(place, unit))
        return rows

    def edge(self) -> list[Entry]:
        """The top eigenvalue along the training of the first child of each ticket."""
        rows, study = [], self.study
        spec = HessianSpec(images=self._images, lanczos_steps=study.lanczos_steps).to_dict()
        for place, parents in self._networks(study.edge_arms, one=True):
            way = self._watched_early(place["arm"], place["seed"], place["round"])
            how = {"hessian": spec, "train": study.train.to_dict()}
            rows.append(Entry(place, self._measured("edge", how, place, parents | {"network": way}, "top eigenvalue along")))
        return rows

    def _watched_early(self, arm: str, init: int, round: int) -> Unit:
        """The first child once more, kept at its start, on a logarithmic grid within the first epoch, where the learning rate of
        the next step is first highest, and at ``edge_points`` evenly spaced steps after.

        Curvature changes most at the beginning and is nearest to what a step allows where steps are largest; even steps alone
        miss both. As with :meth:`watched`, looking at a child must not change the key that its paths rest on.
        """
        train, count, points = self.study.train, self.identity["train"], self.study.edge_points
        first, last = 0 if arm == "dense" else self.first_step(arm), train.steps(count)
        even = {first + round_half_up(i * (last - first) / points) for i in range(points + 1)}
        epoch = min(train.steps_per_epoch(count), last - first)
        early = {first + EARLY**k for k in range(epoch.bit_length()) if EARLY**k < epoch}
        peak = max(range(first, last), key=lambda step: train.learning_rate(step, last))  # the first of equals
        return self.network(init, self.seed_at("child", init, 0), f"{arm} {init}, round {round}, child 0, watched from its start",
                            ticket=None if arm == "dense" else self.ticket(arm, init, round), first_step=first,
                            snapshots=tuple(sorted(even | early | {peak})))

    @property
    def spectrum_round(self) -> int:
        """The round at which whole spectra are measured."""
        return self.study.spectrum_round or max(self.study.at_rounds)

    @property
    def _images(self) -> int:
        return min(self.study.hessian_images, self.identity["train"])

    def _networks(self, arms: Iterable[str], one: bool = False) -> Iterable[tuple[dict[str, Any], dict[str, Unit]]]:
        """(place, the first child and its ticket) of each arm, at all ``hessian_rounds``, or at the one of the whole spectra."""
        study = self.study
        for arm in arms:
            rounds = [self.spectrum_round] if one else sorted(set(study.hessian_rounds)) or [max(study.at_rounds)]
            for round in [0] if arm == "dense" else rounds:
                for init in range(study.seeds):
                    ticket = {} if arm == "dense" else {"ticket": self.ticket(arm, init, round)}
                    yield self.place(arm, round, init), {"network": self.child(arm, init, round, 0), **ticket}

    def _measured(self, stage: str, how: dict[str, Any], place: dict[str, Any], parents: dict[str, Unit], word: str) -> Unit:
        spec = {"data": self.identity, "model": self.model, **how, "seed": self.seed_at("hessian", place["seed"])}
        return self.unit(stage, spec, parents, f"{word} {place['arm']} {place['seed']}, round {place['round']}")
