"""The command that runs a factorial design and says what each factor does."""
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dpkit.cli.look import stored_numbers
from dpkit.cli.make import make_artifacts
from dpkit.cli.shared import Device, Workers, open_store, out, plan_of, short, show_numbers

app = typer.Typer()


@app.command()
def effects(design: Annotated[Path, typer.Argument(metavar="FILE", help="a design: profile, settings, factors and runs")],
            compute: Annotated[bool, typer.Option("--compute", help="first make what the store lacks, run by run")] = False,
            chapter: Annotated[list[str] | None, typer.Option(help="with --compute: only this chapter; repeatable")] = None,
            run: Annotated[str, typer.Option(metavar="NAME", help="the numbers of one run instead, by its levels")] = "",
            as_json: Annotated[bool, typer.Option("--json", help="JSON lines")] = False,
            workers: Workers = 0, device: Device = "auto") -> None:
    """What each factor of a design does to every number, alone and with others: `dpkit effects book/search-noise/design.yml`."""
    from dpkit import report, stages

    found = stages.read_design(design)
    names = {found.name(signs): signs for signs in found.runs}
    if run and run not in names:
        raise stages.unknown("run", run, names)
    for settings in found.runs.values():
        plan_of(found.profile, settings)  # all that may be wrong with a run is said before any is made
    if compute:
        for name, signs in names.items():
            if not run or run == name:
                out.print(f"run {name}")
                make_artifacts(found.profile, found.runs[signs], chapter, workers=workers, device=device)
    store = open_store()
    numbers = {name: stored_numbers(store, found.profile, found.runs[signs]) for name, signs in names.items()
               if not run or run == name}
    _say_what_lacks(numbers)
    made = numbers[run] if run else report.effects(store, {names[name]: some for name, some in numbers.items()}, found.factors)
    if not made:
        raise ValueError(f"the store has no number of {f'run {run}' if run else 'all runs that differs between them'}; "
                         f"`dpkit effects {short(design)} --compute` makes what is missing")
    show_numbers([n.record() for n in made], as_json)


def _say_what_lacks(numbers: Mapping[str, Sequence[Any]]) -> None:
    """A line on standard error for each run that has fewer numbers than others."""
    most = max(len(some) for some in numbers.values())
    for name, some in numbers.items():
        if len(some) < most:
            print(f"dpkit: run {name} has {len(some)} numbers, others up to {most}: no effects on those that it lacks; "
                  "--compute makes them", file=sys.stderr)
