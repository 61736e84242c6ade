"""The command that says what a profile will take, and the line that other commands print before they begin."""
from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.table import Table

from dpkit.cli.shared import Device, Profile, Settings, Workers, open_store, out, plan_of, settings_of

app = typer.Typer()
WORKFLOW_MEMORY = 350e6  # the command and the workflow that wait for the jobs


@dataclass(frozen=True)
class Outlook:
    """A forecast with what it is of: ``compute`` or ``study``; units: the missing ones."""

    what: str
    forecast: Any
    units: Mapping[str, Any]

    def record(self, store, seconds: float) -> None:
        """Note how long it took in the end, against the part of the work that was done."""
        from dpkit.stages import forecast

        costs = self.forecast.costs
        left = sum(costs[key] for key in self.units if not store.has(key))
        total = sum(costs[key] for key in self.units)
        if total > 0:
            forecast.record(store, self.forecast, seconds, 1 - left / total, complete=left == 0, what=self.what)


def of_units(store, left: Mapping[str, Any], device: str, workers: int) -> Outlook:
    """What computing the missing units ``left`` will take."""
    from dpkit.stages import forecast
    from dpkit.stages.run import POPULATION, SMALL

    return Outlook("compute", forecast.of(store, left, device=device, workers=workers, small=SMALL, population=POPULATION), left)


def of_study(store, plan, device: str, workers: int) -> Outlook:
    """What a study will take: everything that is missing computed together, then its notebooks."""
    from dpkit import stages

    left = stages.missing(store, [e.unit for name in stages.CHAPTERS for e in plan.chapter(name)])
    return with_notebooks(of_units(store, left, device, workers), workers)


def with_notebooks(computed: Outlook, workers: int) -> Outlook:
    """What a study will take whose computation takes ``computed``: its notebooks come after it, some of them side by side."""
    from dpkit.notebooks import sources
    from dpkit.stages import priors
    from dpkit.studies import NOTEBOOK_MEMORY, side_by_side

    found, many, beside = computed.forecast, len(sources()), side_by_side(workers)
    around = (math.ceil((many - 1) / beside) + 1) * priors.NOTEBOOK  # the last one comes after the others
    times = {name: getattr(found, name) + around * factor for name, factor in (("seconds", 1.0), ("low", 0.75), ("high", 1.33))}
    memory = max(found.memory, beside * NOTEBOOK_MEMORY) + WORKFLOW_MEMORY
    return Outlook("study", replace(found, **times, memory=memory), computed.units)


def by_chapter(store, plan, device: str, workers: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """(chapter, forecast, units) in their order; each chapter has what the ones before it leave over."""
    from dpkit import stages
    from dpkit.stages import forecast
    from dpkit.stages.costs import Model
    from dpkit.stages.run import POPULATION, SMALL

    model, seen, found = Model.of(store, device), set(), []
    for name in stages.CHAPTERS:
        left = {k: u for k, u in stages.missing(store, [e.unit for e in plan.chapter(name)]).items() if k not in seen}
        seen.update(left)
        found.append((name, forecast.of(store, left, device=device, workers=workers, small=SMALL, population=POPULATION,
                                        model=model), left))
    return found


def announce(store, outlook: Outlook) -> None:
    """Print what comes, and on standard error what there is no room for; nothing where there is nothing to make."""
    from dpkit.progress import outlook as line
    from dpkit.stages import forecast

    if not outlook.units:
        return
    out.print(line(outlook.forecast, forecast.past(store, [outlook.what])))
    for text in forecast.shortages(store, outlook.forecast):
        print(f"dpkit: warning: this {text}", file=sys.stderr, flush=True)


@app.command()
def predict(profile: Profile = "quick", set: Settings = None, workers: Workers = 0, device: Device = "auto",
            coefficients: Annotated[bool, typer.Option("--coefficients", help="print the fitted coefficients as JSON")] = False,
            ) -> None:
    """What a profile will take before it starts: time, memory, disk; and how far past predictions were off."""
    from dpkit import stages
    from dpkit.progress import size, span
    from dpkit.stages import forecast
    from dpkit.stages.costs import Model

    device, plan = stages.choose_device(device), plan_of(profile, settings_of(set))
    store = open_store()
    model = Model.of(store, device)
    if coefficients:
        rounded = {kind: {name: float(f"{value:.3g}") for name, value in row.items()} for kind, row in model.coefficients.items()}
        print(json.dumps(rounded, indent=1))
        return
    chapters = by_chapter(store, plan, device, workers)
    table = Table("chapter", "missing", "time", "range", "memory", "disk", box=None)
    whole = of_units(store, {k: u for _, _, units in chapters for k, u in units.items()}, device, workers)
    rows = [(name, found) for name, found, _ in chapters]
    rows += [("dpkit compute", whole.forecast), ("dpkit study", with_notebooks(whole, workers).forecast)]
    for name, found in rows:
        time_, ends = span(found.seconds, found.low, found.high) if found.seconds else ("-", "-")
        table.add_row(name, str(found.units), time_, ends, size(found.memory) if found.units else "-",
                      size(found.disk) if found.units else "-")
    out.print(table)
    for text in forecast.shortages(store, rows[-1][1]) if whole.units else ():
        print(f"dpkit: warning: this {text}", file=sys.stderr, flush=True)
    if whole.forecast.guessed:
        out.print("from the library's table: the store has no timings of this machine for most of this yet")
    _errors(store, model)


def _errors(store, model) -> None:
    """Print how far predictions were off: of whole computations in the past, and of single units left out of the fit."""
    from dpkit.stages import forecast

    for what in ("compute", "study"):
        past = forecast.past(store, [what])
        if past:
            out.print(f"past predictions of `dpkit {what}`: off by {100 * past.median:.0f}% (median of {past.n}), "
                      f"at worst {100 * past.worst:.0f}%"
                      + (f"; in seconds of its units, whatever else the machine did: by {100 * past.work:.0f}%"
                         if past.work is not None else ""))
    if not forecast.past(store):
        out.print(f"past predictions: none yet of {forecast.SHORT:.0f} seconds or more")
    if model.settings:
        table = Table("units of a kind", "timings", "settings", "off by", box=None)
        for kind, several in model.settings.items():
            off = [abs(math.expm1(e)) for e in model.left_out.get(kind, [])]
            table.add_row(kind, str(sum(len(s.seconds) for s in several)), str(len(several)),
                          f"{100 * sorted(off)[len(off) // 2]:.0f}%" if off else "-")
        out.print(table)
        out.print("off by: the middle error of a setting that is predicted from the others")
