"""Making units: in order, in parallel, with progress, and so that stopping at any moment loses little.

On a CPU each worker process computes one unit at a time on one thread, so results do not depend on the number of cores. On
a GPU one process trains units that share their settings as one population.
"""
from __future__ import annotations

import heapq
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dpkit.stages.unit import STAGES, Context, Output, Unit, closure
from dpkit.store import Store

POPULATION = 16  # networks trained together on a GPU; halved when memory runs out
SMALL = 20_000  # training images of work below which starting worker processes costs more than it saves


@dataclass
class Progress:
    """State of a computation, given to its observer. work is in the units' own cost, seconds since the start."""

    done: int
    units: int
    work: float
    total: float
    seconds: float
    running: tuple[str, ...]

    @property
    def left(self) -> float | None:
        """Seconds left at the pace so far, or None before there is one."""
        return self.seconds * (self.total - self.work) / self.work if self.work > 0 and self.seconds > 3 else None


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


def make(context: Context, units: list[Unit]) -> dict[str, str | None]:
    """Compute units of one stage together and store each; returns why each has no result, or None. Parents must exist."""
    store, found = context.store, STAGES[units[0].stage]
    started = time.monotonic()
    context.start_clock()
    families = [{role: store.get(p.key) for role, p in unit.parents.items()} for unit in units]
    outputs: list[Output | None] = []
    for family in families:
        broken = next(((role, a) for role, a in family.items() if a.failed), None)
        outputs.append(Output({}, {}, f"parent {broken[0]} ({broken[1].meta['label']}): {broken[1].failed}")
                       if broken else None)
    todo = [i for i, output in enumerate(outputs) if output is None]
    if len(todo) > 1 and found.many:
        fresh = found.many(context, [units[i] for i in todo], [families[i] for i in todo])
    else:
        fresh = [found.function(context, units[i], families[i]) for i in todo]
    for i, output in zip(todo, fresh, strict=True):
        outputs[i] = output
    seconds = (time.monotonic() - started) / max(1, len(todo))
    cpu_seconds = context.cpu_seconds() / max(1, len(todo))
    for unit, output in zip(units, outputs, strict=True):
        store.put(unit.key, stage=unit.stage, version=unit.version, spec=unit.spec, tensors=output.tensors,
                  parents={role: p.key for role, p in unit.parents.items()}, result=output.result, seconds=seconds,
                  label=unit.label, failed=output.failed,
                  extra={"device": context.device, "cpu_seconds": round(cpu_seconds, 3),
                         "data": unit.data.to_dict() if unit.data else None})
    return {unit.key: output.failed for unit, output in zip(units, outputs, strict=True)}


def compute(store: Store, units: Iterable[Unit], *, device: str = "auto", workers: int = 0, data_root: str | Path = "data",
            observe: Callable[[Progress], None] | None = None) -> Report:
    """Make all units that are missing, and what they need. workers: processes on a CPU (0: one a core).

    An error in one unit leaves the others to go on; it is kept in the report and in the store's ``errors`` folder, and the
    unit is tried again next time. Ctrl-C stops the workers and passes on; finished units stay, and running ones keep
    their last checkpoint.
    """
    device = choose_device(device)
    todo = missing(store, units)
    if not todo:
        return Report()
    run = _Run(store, todo, device, Path(data_root), observe)
    if device != "cpu":
        run.here(POPULATION)
    elif sum(unit.cost for unit in todo.values()) > SMALL:
        run.in_processes(min(workers or available_cores(), len(todo)))
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: the same bits
        try:
            run.here(1)
        finally:
            torch.set_num_threads(threads)
    return run.report


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Run:
    """The state of one call of :func:`compute`."""

    def __init__(self, store: Store, todo: dict[str, Unit], device: str, data_root: Path, observe):
        self.store, self.todo, self.device, self.data_root, self.observe = store, todo, device, data_root, observe
        self.report, self.started = Report(), time.monotonic()
        self.waiting = {key: {p.key for p in unit.parents.values() if p.key in todo} for key, unit in todo.items()}
        self.children: dict[str, list[str]] = {}
        for key, parents in self.waiting.items():
            for parent in parents:
                self.children.setdefault(parent, []).append(key)
        self.urgency = self._urgency()
        self.ready = [(-self.urgency[key], key) for key, parents in self.waiting.items() if not parents]
        heapq.heapify(self.ready)
        self.running: dict[str, float] = {}  # key -> share done
        self.finished = 0.0

    def _urgency(self) -> dict[str, float]:
        """Work on the longest chain from each unit on: the longest chain goes first, so that it does not end alone."""
        urgency: dict[str, float] = {}
        for key in reversed(self.todo):  # children come after parents in todo
            after = max((urgency[child] for child in self.children.get(key, ())), default=0.0)
            urgency[key] = self.todo[key].cost + after
        return urgency

    def pop(self) -> Unit:
        return self.todo[heapq.heappop(self.ready)[1]]

    def settle(self, key: str, failed: str | None = None, error: str | None = None) -> None:
        """Note that a unit has ended, and free its children or drop them when there is nothing to build on."""
        self.running.pop(key, None)
        self.finished += self.todo[key].cost
        errors = self.store.root / "errors" / f"{key}.txt"
        if error is None:
            errors.unlink(missing_ok=True)
            self.report.made.append(key)
            if failed:
                self.report.failed[key] = failed
            for child in self.children.get(key, ()):
                self.waiting[child].discard(key)
                if not self.waiting[child]:
                    heapq.heappush(self.ready, (-self.urgency[child], child))
        else:
            errors.parent.mkdir(exist_ok=True)
            errors.write_text(f"{self.todo[key].label}\n{error}", encoding="utf-8")
            self.report.errors[key] = f"{self.todo[key].label}: {error.strip().splitlines()[-1]}"
            for child in self.children.get(key, ()):
                self.finished += self.todo[child].cost
        self.show()

    def show(self) -> None:
        if self.observe is not None:
            partial = sum(self.todo[key].cost * share for key, share in self.running.items())
            total = sum(unit.cost for unit in self.todo.values())
            self.observe(Progress(len(self.report.made), len(self.todo), min(self.finished + partial, total), total,
                                  time.monotonic() - self.started, tuple(self.todo[key].label for key in self.running)))

    def step(self, key: str, done: int, total: int) -> None:
        if key in self.running:
            self.running[key] = done / total
            self.show()

    # --- one process, populations -------------------------------------------------------------------------------------
    def here(self, limit: int) -> None:
        """Compute in this process, up to ``limit`` networks at once."""
        last = 0.0

        def progress(key: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 1:
                last = time.monotonic()
                for name in list(self.running):
                    self.running[name] = done / total
                self.show()

        context = Context(self.store, self.device, self.data_root, progress)
        while self.ready:
            group = self._group(limit)
            self.running = {unit.key: 0.0 for unit in group}
            self.show()
            try:
                outcome = make(context, group)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                if len(group) > 1:
                    limit = len(group) // 2
                    for unit in group:
                        heapq.heappush(self.ready, (-self.urgency[unit.key], unit.key))
                    continue
                self.settle(group[0].key, error="out of GPU memory; lower batch_size or width")
                continue
            except Exception:
                text = traceback.format_exc()
                for unit in group:
                    self.settle(unit.key, error=text)
                continue
            for key, failed in outcome.items():
                self.settle(key, failed)

    def _group(self, limit: int) -> list[Unit]:
        """The most urgent ready unit with others that may be computed together with it."""
        first = self.pop()
        grouping = STAGES[first.stage].group
        if grouping is None:
            return [first]
        group, others = [first], []
        while self.ready and len(group) < limit:
            unit = self.pop()
            same = unit.stage == first.stage and grouping(unit) == grouping(first)
            (group if same else others).append(unit)
        for unit in others:
            heapq.heappush(self.ready, (-self.urgency[unit.key], unit.key))
        return group

    # --- several processes, one unit each -------------------------------------------------------------------------------
    def in_processes(self, workers: int) -> None:
        start = multiprocessing.get_context("spawn")
        steps = start.Queue()
        pool = ProcessPoolExecutor(workers, start, _prepare_worker, (str(self.store.root), str(self.data_root), steps))
        futures: dict[Future, str] = {}
        try:
            while self.ready or futures:
                while self.ready and len(futures) < workers:
                    unit = self.pop()
                    self.running[unit.key] = 0.0
                    futures[pool.submit(_work, unit)] = unit.key
                self.show()
                done, _ = wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
                while True:
                    try:
                        self.step(*steps.get_nowait())
                    except queue.Empty:
                        break
                for future in done:
                    key = futures.pop(future)
                    try:
                        failed, error = future.result()
                    except BrokenProcessPool:
                        raise RuntimeError(f"a worker process died while computing {self.todo[key].label}, most likely out "
                                           "of memory; try --workers 1") from None
                    self.settle(key, failed, error)
            pool.shutdown()
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_context: Context | None = None


def _prepare_worker(root: str, data_root: str, steps) -> None:
    """One thread for each worker: equal bits on any number of cores, and no oversubscription."""
    global _context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    last = 0.0

    def progress(key: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            steps.put((key, done, total))

    _context = Context(Store(root), "cpu", Path(data_root), progress)


def _end_with(parent: int) -> None:
    """End this process soon after its parent was killed, instead of computing on for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(unit: Unit) -> tuple[str | None, str | None]:
    try:
        return make(_context, [unit])[unit.key], None
    except Exception:
        return None, traceback.format_exc()


__all__ = ["Progress", "Report", "available_cores", "choose_device", "closure", "compute", "make", "missing"]
