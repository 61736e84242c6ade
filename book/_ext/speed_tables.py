"""Tables of the performance page and of that on curvature, from what `dpkit bench --json` and modules beside it recorded.

``{speed}`` takes a kind of table and a file, from the book's source on: ``ratios``, ``floor``, ``absent`` or ``machine`` and
JSON lines; ``accuracy``, ``rounding`` or ``agreement`` and a csv file that the module of :mod:`dpkit.bench` of that name wrote.
A missing or malformed file is a warning, so that a build with warnings as errors never prints an empty table.
"""
from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from dpkit.statistics import mean_interval

logger = logging.getLogger(__name__)
EQUAL = "reference, an operation an image"  # the reference whose augmentation is ours, as dpkit.bench.accuracy names it
Rows = tuple[Sequence[str], list[Sequence[str]]]


def number(value: float | None) -> str:
    """Three digits, with separators from a thousand on; a dash for what was not measured."""
    return "\u2013" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: float | None) -> str:
    """A fraction in whole percent."""
    return "\u2013" if value is None else f"{100 * value:.0f}%"


def ratios(records: list[dict[str, Any]]) -> Rows:
    """One line a comparison that was measured, and below it those with other references."""
    lines = []
    for r in records:
        if r["kind"] in ("row", "control") and r["ratio"] is not None:
            control = r["kind"] == "control"
            asked = "" if r["target"] is None else f"{r['target']:.3g}\u00d7"
            name = r["name"] + (f" ({r['note']})" if r.get("note") else "")
            lines.append((f"\u2003the same; {r['reference']}" if control else name,
                          "" if control else number(r["ours"]), number(r["peer"]), r["unit"], f"{r['ratio']:.2f}\u00d7",
                          f"{r['low']:.2f} to {r['high']:.2f} (n\u00a0=\u00a0{r['pairs']})", asked, share(r["floor_fraction"])))
    return ("Work", "Ours", "Reference", "Unit", "Ratio", "Pairs, low to high", "Asked", "Of the floor"), lines


def floor(records: list[dict[str, Any]]) -> Rows:
    """One line a kernel and network."""
    lines = []
    for r in records:
        if r["kind"] == "floor":
            measured = None if r["ours"] is None else 1e3 / r["ours"]
            lines.append((r["kernel"], r["network"], ", ".join(filter(None, (r["precision"], r.get("form")))),
                          number(r["flops"] / 1e9), number(r["bytes"] / 1e6), number(1e3 * r["seconds_flops"]),
                          number(1e3 * r["seconds_bytes"]), number(measured), share(r["floor_fraction"])))
    return ("Kernel", "Network", "Form", "GFLOP", "MB", "ms by operations", "ms by bytes", "ms measured", "Reached"), lines


def absent(records: list[dict[str, Any]]) -> Rows:
    """One line a row without a ratio, and why."""
    return ("Work", "Asked", "Why not"), [(r["name"], "" if r["target"] is None else f"{r['target']:.3g}\u00d7", r["why"])
                                          for r in records if r.get("why")]


def machine(records: list[dict[str, Any]]) -> Rows:
    """The machine and its ceilings."""
    found = next((r for r in records if r["kind"] == "ceilings"), None)
    if found is None:
        raise ValueError("holds no ceilings; record it with `dpkit bench --json`")
    here = found["machine"]
    lines = [(name, f"{found['core'][key] / 1e9:,.0f} {unit}", f"{found['all'][key] / 1e9:,.0f} {unit}")
             for key, name, unit in (("fp32", "operations, fp32", "GFLOP/s"), ("bf16", "operations, bf16", "GFLOP/s"),
                                     ("memory", "memory", "GB/s"))]
    return (f"{here['processor']}, torch {here['torch']}", "one core", f"{found['cores']} cores at once"), lines


def accuracy(rows: list[dict[str, str]]) -> Rows:
    """One line a form: mean accuracy, and the difference from :data:`EQUAL` paired by seed, with 95% intervals."""
    by: dict[str, dict[str, float]] = {}
    for row in rows:
        by.setdefault(row["form"], {})[row["seed"]] = 100 * float(row["accuracy"])
    lines = []
    for form, values in by.items():
        mean = mean_interval(list(values.values()))
        gap = None if form == EQUAL else mean_interval([values[s] - by[EQUAL][s] for s in values])
        lines.append((form, _interval(*mean, "%"), "" if gap is None else _interval(*gap, " points"), str(len(values))))
    return ("Loop", "Accuracy", "Minus the second line's, paired by seed", "n"), lines


def rounding(rows: list[dict[str, str]]) -> Rows:
    """One line a network: means over its seeds, errors of the trace in units of its standard error."""
    by: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        by.setdefault(row["network"], []).append({k: float(v) for k, v in row.items() if k != "network"})
    lines = []
    for network, found in by.items():
        columns = ([r["rounding"] for r in found], [abs(r["shift"]) / r["error"] for r in found],
                   [r["left"] / r["error"] for r in found], [r["top"] for r in found], [r["top_left"] for r in found])
        lines.append((network, *(f"{sum(c) / len(c):.2g} (at most {max(c):.2g})" for c in columns), str(len(found))))
    return ("Network", "A product is off by", "Trace is off, in its standard errors", "What the correction adds, likewise",
            "Top five, relative", "with a product in fp32 each", "n"), lines


def agreement(rows: list[dict[str, str]]) -> Rows:
    """One line a quantity, tool and seed of probes: value, error and products."""
    order = list(dict.fromkeys(row["quantity"] for row in rows))
    found = sorted(rows, key=lambda row: (order.index(row["quantity"]), row["tool"], int(row["seed"])))
    lines = [(row["quantity"], row["tool"], row["seed"], number(float(row["value"])), number(float(row["error"])),
              row["products"]) for row in found]
    return ("Quantity", "Tool", "Seed", "Value", "Error", "Products"), lines


def _interval(mean: float, low: float | None, high: float | None, unit: str) -> str:
    text = f"{mean:.2f}{unit}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
    return text.replace("-", "\u2212")


TABLES = {"ratios": ratios, "floor": floor, "absent": absent, "machine": machine}
SHEETS = {"accuracy": accuracy, "rounding": rounding, "agreement": agreement}


class SpeedDirective(SphinxDirective):
    """``{speed} KIND FILE``"""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        kind, relative = self.arguments
        path = Path(self.env.srcdir, relative)
        self.env.note_dependency(str(path))
        try:
            if kind not in SHEETS and kind not in TABLES:
                raise ValueError(f"there is no table {kind!r}; there are {', '.join([*SHEETS, *TABLES])}")
            if not path.is_file():
                raise ValueError(f"{relative} is missing")
            head, lines = self.rows(kind, path)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: %s", relative, error, location=self.get_location(), type="dpkit", subtype="speed")
            return []
        return [table(head, lines)]

    def rows(self, kind: str, path: Path) -> Rows:
        """The table's head and lines."""
        text = path.read_text(encoding="utf-8")
        if kind in SHEETS:
            return SHEETS[kind](list(csv.DictReader(text.splitlines())))
        return TABLES[kind]([json.loads(line) for line in text.splitlines() if line.strip()])


def table(head: Iterable[str], lines: Iterable[Sequence[str]]) -> nodes.table:
    """A plain table."""
    head = list(head)
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    top, body = nodes.thead(), nodes.tbody()
    for part, rows in ((top, [head]), (body, lines)):
        for row in rows:
            part += nodes.row("", *(nodes.entry("", nodes.paragraph("", text)) for text in row))
    group += [top, body]
    found = nodes.table(classes=["dp-speed"])
    found += group
    return found


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("speed", SpeedDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
