"""Showing how far a computation is: a live line in a terminal, plain lines elsewhere, a file for a watching process."""
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dpkit.stages import Progress
from dpkit.stages.forecast import Forecast, Past


def duration(seconds: float | None) -> str:
    """``75`` as ``1 min 15 s``; None as ``unknown``."""
    if seconds is None:
        return "unknown"
    seconds = int(seconds + 0.5)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def span(seconds: float, low: float, high: float) -> tuple[str, str]:
    """A forecast's time and its range in the same unit, roughly: ``("8 min", "6 to 10")``."""
    unit, size = ("s", 1) if seconds < 100 else ("min", 60) if seconds < 5400 else ("h", 3600)
    digits = int(unit != "s" and seconds / size < 10)
    time_, *ends = (f"{max(value / size, 1 if unit == 's' else 0):.{digits}f}" for value in (seconds, low, high))
    return f"{time_} {unit}", " to ".join(ends)


def size(amount: float) -> str:
    """Bytes as people say them: ``1.2 GB``, ``40 MB``, ``0.3 MB``."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.{0 if amount >= 1e7 else 1}f} MB"


def outlook(found: Forecast, past: Past | None) -> str:
    """One line about what comes: time with its range, memory, disk, and how far such lines were off in the past."""
    time_, ends = span(found.seconds, found.low, found.high)
    where = "the GPU" if found.device != "cpu" else f"{found.workers} core{'s' * (found.workers > 1)}"
    text = f"about {time_} on {where} ({ends}), {size(found.memory)} of memory, {size(found.disk)} on disk"
    if found.guessed:
        text += "; from a table, as this machine has no timings in the store yet"
    if past is not None:
        text += f"; past predictions were off by {100 * past.median:.0f}% (median of {past.n})"
    return text


def line(label: str, done: int, units: int, share: float, seconds: float, left: float | None, running: list[str]) -> str:
    """One line that says what is done, what is left, and what is being done."""
    what = "; ".join(running[:2]) + (f" and {len(running) - 2} more" if len(running) > 2 else "")
    return (f"{label}: {done} of {units} units, {100 * share:.0f}%, {duration(seconds)} so far, about {duration(left)} left"
            + (f"  [{what}]" if what else ""))


def observer(label: str, every: float | None = None) -> Callable[[Progress], None]:
    """A function for :func:`dpkit.stages.compute` to tell its progress to.

    With ``$DPKIT_PROGRESS`` set, the line goes to that file, from which ``dpkit study`` shows it. Otherwise it goes to
    standard error: rewritten in place in a terminal, a new line now and then elsewhere.
    """
    target = os.environ.get("DPKIT_PROGRESS")
    terminal = target is None and sys.stderr.isatty()
    pause = every if every is not None else (1.0 if target or terminal else 20.0)
    last = 0.0

    def observe(p: Progress) -> None:
        nonlocal last
        ended = p.done == p.units
        if time.monotonic() - last < pause and not ended:
            return
        last = time.monotonic()
        text = line(label, p.done, p.units, p.work / p.total, p.seconds, p.left, list(p.running))
        if target:
            Path(target).write_text(json.dumps({"line": text}), encoding="utf-8")
        elif terminal:
            sys.stderr.write(f"\r\x1b[2K{text[:os.get_terminal_size(2).columns - 1]}" + ("\n" if ended else ""))
            sys.stderr.flush()
        else:
            print(text, file=sys.stderr, flush=True)

    return observe
