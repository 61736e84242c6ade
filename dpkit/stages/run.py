"""Making units: in order, in parallel, with progress, and so that stopping at any moment loses little.

On a CPU each worker process computes on one thread, so results do not depend on the number of cores: one unit at a time, or a
few networks whose settings and noise are equal, whose batches are then made once. On a GPU one process trains units that share
their settings as one population; the process that asked never touches the GPU, so that a device error leaves it whole.
"""
from __future__ import annotations

import gc
import heapq
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dpkit import cores
from dpkit.stages import forecast
from dpkit.stages.execute import failure_kind, make
from dpkit.stages.pool import LOWER, Pool
from dpkit.stages.unit import Context, Unit, closure
from dpkit.store import Store

#: networks trained together, at most; fewer when memory runs out. On a CPU those are of equal noise, whose batches are made once
POPULATION = {"cuda": 16, "cpu": 4}
SMALL = 8.0  # seconds of work below which starting worker processes costs more than it saves
TRUST = 0.1  # how much of the work has to be done until its pace weighs as much as the prediction


@dataclass
class Progress:
    """State of a computation, given to its observer.

    work, total: predicted seconds of one process, done and in all. seconds: since the start. expected: seconds that the whole
    computation was predicted to take.
    """

    done: int
    units: int
    work: float
    total: float
    seconds: float
    running: tuple[str, ...]
    expected: float | None = None

    @property
    def left(self) -> float | None:
        """Seconds left: by the prediction at first, more and more by the pace so far; None where there is neither."""
        share = self.work / self.total if self.total > 0 else 1.0
        if self.expected is not None:
            return (1 - share) * (TRUST * self.expected + self.seconds) / (TRUST + share)
        return self.seconds * (1 - share) / share if share > 0 and self.seconds > 3 else None


@dataclass
class Report:
    """What :func:`compute` did: keys made, keys whose unit has no result (a diverged network), and errors by key."""

    made: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def choose_device(device: str = "auto") -> str:
    """``auto`` is a GPU where there is one. Raises ``ValueError`` on a device that torch does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available()):
        return device
    raise ValueError(f"device must be auto, cpu or cuda (where there is one), got {device!r}")


def missing(store: Store, units: Iterable[Unit]) -> dict[str, Unit]:
    """The units, with those ancestors that are needed to make them, that are not in the store."""
    needed: dict[str, Unit] = {}

    def visit(unit: Unit) -> None:
        if unit.key in needed or store.has(unit.key):
            return
        for parent in unit.parents.values():
            visit(parent)
        needed[unit.key] = unit

    for unit in units:
        visit(unit)
    return needed


def compute(store: Store, units: Iterable[Unit], *, device: str = "auto", workers: int = 0, data_root: str | Path = "data",
            observe: Callable[[Progress], None] | None = None) -> Report:
    """Make all units that are missing, and what they need. workers: processes on a CPU (0: one a core).

    An error in one unit leaves the others to go on; it is kept in the report and in the store's ``errors`` folder, and the
    unit is tried again next time. So it is with memory that runs out, a process that is killed and a GPU that fails, after
    less at once was tried. Ctrl-C stops the workers and passes on; finished units stay, and running ones keep their last
    checkpoint. How long it took against what was expected goes to the store's ``predictions.jsonl``.
    """
    device = choose_device(device)
    todo = missing(store, units)
    if not todo:
        return Report()
    expected = forecast.of(store, todo, device=device, workers=workers, small=SMALL, population=POPULATION)
    run = _Run(store, todo, device, Path(data_root), observe, expected)
    try:
        if device != "cpu":
            run.in_processes(1, POPULATION["cuda"])
        elif sum(expected.costs.values()) > SMALL:
            run.in_processes(min(workers or cores.available(), len(todo)), POPULATION["cpu"])
        else:
            with cores.used(1):  # as in a worker: the same bits
                run.here(POPULATION["cpu"])
    finally:
        forecast.record(store, expected, run.seconds, run.share, complete=not run.left_over,
                        made=run.report.made)
    return run.report


class _Run:
    """The state of one call of :func:`compute`."""

    def __init__(self, store: Store, todo: dict[str, Unit], device: str, data_root: Path, observe,
                 expected: forecast.Forecast | None = None):
        self.store, self.todo, self.device, self.data_root, self.observe = store, todo, device, data_root, observe
        self.expected = expected or forecast.of(store, todo, device=device, workers=1, small=SMALL,
                                                 population=POPULATION)
        self.costs = self.expected.costs
        self.report, self.started = Report(), time.monotonic()
        self.waiting, self.children = forecast.graph(todo)
        self.urgency = forecast.urgency(todo, self.children, self.costs)
        self.ready = [(-self.urgency[key], key) for key, parents in self.waiting.items() if not parents]
        heapq.heapify(self.ready)
        self.running: dict[str, float] = {}  # key -> share done
        self.names = {key: forecast.group_name(unit, device) for key, unit in todo.items()}
        self.workers = 1  # processes that share what is ready
        self.limits: dict[str | None, int] = {}  # most units of a group at once, after more were too many
        self.ended: set[str] = set()
        self.dropped: set[str] = set()
        self.total = sum(self.costs[key] for key in todo)
        self.finished = 0.0

    # --- what is where ------------------------------------------------------------------------------------------------
    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def share(self) -> float:
        """Share of the work that was done, units without any work left out: those that an error made impossible."""
        partial = sum(self.costs[key] * share for key, share in self.running.items())
        possible = self.total - sum(self.costs[key] for key in self.dropped)
        return min(1.0, (sum(self.costs[key] for key in self.ended) + partial) / possible) if possible > 0 else 1.0

    @property
    def left_over(self) -> bool:
        """Whether there is work that was not done."""
        return len(self.ended) + len(self.dropped) < len(self.todo)

    def group(self, limit: int) -> list[Unit]:
        """The most urgent ready unit with others that may be computed together with it, at most ``limit``."""
        limit = min(limit, self.limits.get(self.names[self.ready[0][1]], limit))
        return [self.todo[key] for key in forecast.take(self.ready, self.names, self.workers, limit)]

    def push(self, units: list[Unit]) -> None:
        """Back to those that are ready."""
        for unit in units:
            self.running.pop(unit.key, None)
            heapq.heappush(self.ready, (-self.urgency[unit.key], unit.key))

    def split(self, units: list[Unit], size: int) -> None:
        """Too many at once: they and their like go on in groups of at most ``size``; of size 1, they alone do."""
        if size > 1:
            self.limits[self.names[units[0].key]] = size
        else:
            self.names |= {unit.key: None for unit in units}
        self.push(units)

    def start(self, units: list[Unit]) -> None:
        """Note that units are being made."""
        self.running |= {unit.key: 0.0 for unit in units}
        self.show()

    def step(self, units: list[Unit], done: int, total: int) -> None:
        """Note how far units are that are made together."""
        for unit in units:
            self.running[unit.key] = done / max(total, 1)
        self.show()

    def settle(self, key: str, failed: str | None = None, error: str | None = None) -> None:
        """Note that a unit has ended, and free its children or drop them when there is nothing to build on."""
        self.running.pop(key, None)
        self.ended.add(key)
        errors = self.store.root / "errors" / f"{key}.txt"
        if error is None:
            errors.unlink(missing_ok=True)
            self.report.made.append(key)
            if failed:
                self.report.failed[key] = failed
            for child in self.children.get(key, ()):
                self.waiting[child].discard(key)
                if not self.waiting[child]:
                    self.push([self.todo[child]])
        else:
            errors.parent.mkdir(exist_ok=True)
            errors.write_text(f"{self.todo[key].label}\n{error}", encoding="utf-8")
            self.report.errors[key] = f"{self.todo[key].label}: {error.strip().splitlines()[-1]}"
            below = [key]
            while below:
                below = [c for k in below for c in self.children.get(k, ()) if c not in self.dropped]
                self.dropped.update(below)
        self.show()

    def show(self) -> None:
        """Tell the observer."""
        if self.observe is not None:
            gone = sum(self.costs[key] for key in self.ended | self.dropped)
            partial = sum(self.costs[key] * share for key, share in self.running.items())
            self.observe(Progress(len(self.report.made), len(self.todo), min(gone + partial, self.total), self.total,
                                  self.seconds, tuple(self.todo[key].label for key in self.running), self.expected.seconds))

    # --- computing ----------------------------------------------------------------------------------------------------
    def in_processes(self, workers: int, population: int) -> None:
        """Compute in worker processes, up to ``population`` networks at once in each."""
        self.workers = workers
        Pool(self, self.store.root, self.data_root, self.device, workers, population).run()

    def here(self, limit: int) -> None:
        """Compute in this process, up to ``limit`` networks at once."""
        cores.keep_memory()
        last, group = 0.0, []

        def progress(key: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 1:
                last = time.monotonic()
                self.step(group, done, total)

        context = Context(self.store, self.device, self.data_root, progress)
        said = False
        while self.ready:
            group = self.group(limit)
            self.start(group)
            try:
                outcome, what = make(context, group), None
            except Exception as error:
                what, text = failure_kind(error), traceback.format_exc()
            if what is None:
                for key, failed in outcome.items():
                    self.settle(key, failed)
                continue
            gc.collect()  # only now, when the error no longer holds on to what did not fit
            if len(group) > 1:
                smaller = 1 if what == "error" else len(group) // 2
                if what != "error" and not said:
                    said = True
                    print(f"dpkit: not enough memory with {len(group)} networks at once; going on with {smaller}",
                          file=sys.stderr)
                self.split(group, smaller)
            else:
                self.settle(group[0].key, error=text if what != "memory" else
                            f"{text}\nnot enough memory to compute this alone; {LOWER}")


__all__ = ["Progress", "Report", "choose_device", "closure", "compute", "make", "missing"]
