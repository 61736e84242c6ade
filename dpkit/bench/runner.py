"""Running the rows: build both sides, let them alternate, report each as soon as it is done."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dpkit import cores
from dpkit.bench import ceilings as top
from dpkit.bench import checkout, floor
from dpkit.bench.gpu import WHOLE
from dpkit.bench.harness import Failed, Job, Team, alternate
from dpkit.bench.rows import Row, accelerator_rows, processor_rows
from dpkit.store import machine

Say = Callable[[str], None]
Record = dict[str, Any]
EXTRA = ("ceilings", "floor")  # what can be asked for besides rows


def names(quick: bool = False, long: bool = False, peer: Path | None = None) -> list[str]:
    """What ``only`` may name."""
    return [*EXTRA, *(row.id for row in _rows(quick, long, peer))]


def _rows(quick: bool, long: bool, peer: Path | None) -> list[Row]:
    return processor_rows(quick, long) + (checkout.rows(peer, quick) if peer else []) + accelerator_rows(long)


def run(*, only: Sequence[str] = (), quick: bool = False, long: bool = False, peer: Path | None = None,
        say: Say = lambda text: None) -> Iterator[Record]:
    """Records, each as soon as it is measured: the ceilings, the rows with their controls, the floors.

    only: names of rows, or ``floor`` (none: all). quick: one small network, two pairs, to see that it works. long: also what
    takes up to an hour on a GPU. peer: a checkout of the authors' scripts to be timed as well. say: told what is going on.

    Raises ``ValueError`` on an unknown name and on a checkout that cannot be used. What fails while it is measured becomes a
    record without a ratio that says why.
    """
    known = names(quick, long, peer)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"there is no benchmark called {unknown[0]}; there are {', '.join(known)}")
    rows = [row for row in _rows(quick, long, peer) if not only or row.id in only]
    here = machine()
    others = busy()
    if others > 0.15:
        say(f"other programs use {others:.0%} of this machine: ratios will be too good, as threads of a peer wait for each other")
    say(f"ceilings of {cores.available()} cores")
    limits = top.measure()
    yield {"kind": "ceilings", "name": "ceilings", **_empty(), **limits.to_dict(), "machine": here}
    for number, row in enumerate(rows, 1):
        for record in _measured(row, limits, lambda text, at=number: say(f"[{at}/{len(rows)}] {text}")):
            yield {**record, "machine": here}
    if not only or "floor" in only:
        for record in floor.measure(limits, quick, lambda text: say(f"[floor] {text}")):
            yield {**record, "machine": here}


def _empty() -> Record:
    return {"ours": None, "peer": None, "ratio": None, "target": None, "floor_fraction": None}


def _measured(row: Row, limits: top.Ceilings, say: Say) -> Iterator[Record]:
    """The row's record and one for each control."""
    frame = {"kind": "row", "id": row.id, "name": row.name, **_empty(), "target": row.target, "unit": row.unit,
             "reference": row.reference, "low": None, "high": None, "pairs": 0, "why": row.why}
    if row.why:
        say(f"{row.name}: not measured ({row.why})")
        yield frame
        return
    if row.id in WHOLE:
        say(f"{row.name}: running")
        try:
            yield frame | WHOLE[row.id]()
        except (ValueError, RuntimeError, OSError) as error:  # out of memory and a lost GPU are RuntimeErrors
            yield {**frame, "why": (str(error).splitlines() or [type(error).__name__])[0]}
        return
    jobs: dict[str, Job] = {"ours": row.ours, "peer": row.peer, **row.controls}
    teams: dict[str, Team] = {}
    try:
        say(f"{row.name}: building")
        for label, job in jobs.items():
            teams[label] = Team(job)
            teams[label].begin()
        for team in teams.values():
            team.finish()
        rates = alternate(teams, row.pairs, lambda pair: say(f"{row.name}: pair {pair} of {row.pairs}"))
        if row.verdict is not None:
            note, why = row.verdict(*(teams[label].last() for label in ("ours", "peer")))
            frame |= {"note": note}
            if why:
                raise Failed(why)
    except Failed as error:
        say(f"{row.name}: not measured ({error})")
        yield {**frame, "why": str(error)}
        return
    finally:
        for team in teams.values():
            team.end()
    for label in jobs:
        if label == "ours":
            continue
        ratios = sorted(a / b for a, b in zip(rates["ours"], rates[label], strict=True))
        found = {**frame, "ours": median(rates["ours"]), "peer": median(rates[label]), "ratio": median(ratios),
                 "low": ratios[0], "high": ratios[-1], "pairs": row.pairs,
                 "floor_fraction": _fraction(row, rates["ours"], limits)}
        if label != "peer":
            found |= {"kind": "control", "id": f"{row.id}+", "name": f"{row.name}; {label}", "reference": label, "target": None}
        yield found


def _fraction(row: Row, rates: list[float], limits: top.Ceilings) -> float | None:
    """Share of the floor of all cores; of a GPU's ceilings nothing is known here."""
    if row.floor is None or row.ours.arguments.get("device", "cpu") != "cpu":
        return None
    return floor.fraction(row.floor, median(rates), limits.all, row.precision)


def busy(seconds: float = 1.0) -> float:
    """Share of all cores that other programs use just now, or 0 where the system does not say."""
    def read() -> tuple[int, int]:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, and idle or waiting for a disk

    try:
        before = read()
        time.sleep(seconds)
        after = read()
    except (OSError, ValueError, IndexError):
        return 0.0
    return 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
