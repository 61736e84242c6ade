"""What the commands share: their options, and opening what they work on."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

out = Console(soft_wrap=True, highlight=False)

Profile = Annotated[str, typer.Option("--profile", help="a profile's name (see `dpkit profiles`) or the path of a YAML file")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a parameter; repeatable")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda")]
Workers = Annotated[int, typer.Option(help="processes on a CPU; 0 is one a core", min=0)]


def settings_of(words: list[str] | None, option: str = "--set") -> dict[str, str]:
    """``key=value`` words, as an ``option`` takes them, as a dictionary."""
    found = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes key=value, got {word!r}")
        found[key.strip()] = value
    return found


def plan_of(profile: str, settings: dict[str, Any]):
    """The plan of a study; loads the data set, whose identity is part of every key."""
    from dpkit import data, project, stages

    study = stages.load_study(profile, settings)
    return stages.Plan(study, data.load(study.data, project.data_folder()).identity)


def open_store():
    """The store of this checkout."""
    from dpkit import project
    from dpkit.store import Store

    return Store(project.store_folder())


def short(path: Path) -> str:
    """A path as seen from here, when it lies below."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show_numbers(records: list[dict[str, Any]], as_json: bool) -> None:
    """Print numbers, as JSON lines or as a table."""
    from dpkit.report.format import number_text

    if as_json:
        for record in records:
            print(json.dumps(record))
        return
    table = Table("number", "value", "95% interval", "n", "key", box=None)
    for record in records:
        table.add_row(record["name"], number_text(record, "value"), number_text(record, "interval"), str(record["n"]),
                      record["key"][:12])
    # a name that is cut short leads nowhere
    out.width = max(out.width, 120, 70 + max((len(record["name"]) for record in records), default=0))
    out.print(table)
