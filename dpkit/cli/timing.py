"""The command that measures speed."""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dpkit.cli.shared import out

app = typer.Typer()


@app.command()
def bench(as_json: Annotated[bool, typer.Option("--json", help="JSON lines on standard output")] = False,
          peer: Annotated[Path | None, typer.Option(help="a checkout of the authors' own scripts, to be timed as well")] = None,
          only: Annotated[str, typer.Option(metavar="NAME,...", help="only these rows; `floor` for the four kernels alone")] = "",
          quick: Annotated[bool, typer.Option("--quick", help="a small network and two pairs: does it work?")] = False,
          long: Annotated[bool, typer.Option("--long", help="also rows of minutes, and on a GPU of an hour")] = False) -> None:
    """Ours against named references, in pairs, and against what this machine can do at best. About half an hour.

    Ratios are what counts: both sides run in turn, so they survive a machine whose speed drifts. Leave the machine alone
    meanwhile. References from PyPI need `pip install 'dpkit[peers]'`.
    """
    from dpkit import bench as benches

    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    chosen = [name.strip() for name in only.split(",") if name.strip()]
    records = []
    for record in benches.run(only=chosen, quick=quick, long=long, peer=peer, say=say):
        records.append(record)
        if as_json:
            print(json.dumps(record), flush=True)
    if not as_json:
        for part in _report(records):
            out.print(part)


def _report(records: list[dict[str, Any]]) -> list[Table | str]:
    """Two tables in the width of a terminal, and a line for each row without a ratio."""
    narrow = {"box": None, "padding": (0, 1, 0, 0)}
    rows = Table("", "ours", "ref.", "", "ratio", "n", "low to high", "asked", "floor", **narrow)
    floors = Table("", "", "GFLOP", "MB", "ms: flop", "bytes", "measured", "floor", **narrow)
    absent = []
    for r in records:
        if r["kind"] == "floor":
            name = escape(f"{r['kernel']}, {r['network'].split(',')[0]}")
            floors.add_row(name, f"{r['precision']} {r['form']}", _number(r["flops"] / 1e9), _number(r["bytes"] / 1e6),
                           _number(r["seconds_flops"] * 1e3), _number(r["seconds_bytes"] * 1e3),
                           _number(1e3 / r["ours"]) if r["ours"] else "", _share(r["floor_fraction"]))
        elif r["kind"] != "ceilings" and r["ratio"] is not None:
            control = r["kind"] == "control"  # the same work with another reference
            name, ours = (f"  {escape(r['reference'])}", "") if control else (r["id"], _number(r["ours"]))
            rows.add_row(name, ours, _number(r["peer"]), r["unit"], f"{r['ratio']:.2f}", str(r["pairs"]),
                         f"{r['low']:.2f} to {r['high']:.2f}", "" if r["target"] is None else f"{r['target']:g}",
                         _share(r["floor_fraction"]))
        if r.get("why"):
            absent.append(f"not measured: {escape(r['name'])}: {escape(r['why'])}")
    return [*(table for table in (rows, floors) if table.row_count), *absent]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
