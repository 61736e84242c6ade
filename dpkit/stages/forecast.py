"""What a computation will take, before it starts: time, memory, disk; and how right such forecasts were in the past.

Time is that of the schedule that :mod:`dpkit.stages.run` will follow, played through with the seconds that
:mod:`dpkit.stages.costs` expects of each unit.
"""
from __future__ import annotations

import heapq
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

from dpkit import __version__, cores
from dpkit.stages import features, footprint, priors
from dpkit.stages.costs import Expected, Model, device_class
from dpkit.stages.unit import STAGES, Unit
from dpkit.store import Store, machine

FILE = "predictions.jsonl"
SHORT = 10.0  # seconds below which a computation says nothing about the model: starting takes most of it
WIDTH = 1.28  # standard deviations on each side of an interval that eight of ten should lie in


@dataclass(frozen=True)
class Forecast:
    """seconds, low, high: of the whole (eight of ten should end between). memory: bytes of all processes at the highest;
    disk: bytes that the store grows by. costs: expected seconds of each unit in a warm process, by key. guessed: no timings
    of this machine stand behind most of it."""

    units: int
    seconds: float
    low: float
    high: float
    memory: float
    disk: int
    device: str
    workers: int
    costs: Mapping[str, float]
    guessed: bool = False


def graph(todo: Mapping[str, Unit]) -> tuple[dict[str, set[str]], dict[str, list[str]]]:
    """For each unit the parents that are to be made first, and for each parent its children."""
    waiting = {key: {p.key for p in unit.parents.values() if p.key in todo} for key, unit in todo.items()}
    children: dict[str, list[str]] = {}
    for key, parents in waiting.items():
        for parent in sorted(parents):
            children.setdefault(parent, []).append(key)
    return waiting, children


def group_name(unit: Unit, device: str) -> str | None:
    """What units have in common that may be made together on a device; None for one that is made alone."""
    grouping = STAGES[unit.stage].group if unit.stage in STAGES else None
    return f"{unit.stage} {grouping(unit, device_class(device))}" if grouping else None


def at_once(alike: int, workers: int, population: int) -> int:
    """How many of so many units that are ready and alike one of the workers takes: its part of them, so that what is left is
    always enough for the others, and at most ``population``."""
    return max(1, min(population, -(-alike // workers)))


def urgency(todo: Mapping[str, Unit], children: Mapping[str, list[str]], costs: Mapping[str, float]) -> dict[str, float]:
    """Seconds on the longest chain from each unit on: the longest chain goes first, so that it does not end alone."""
    found: dict[str, float] = {}
    for key in reversed(todo):  # children come after parents in todo
        found[key] = costs[key] + max((found[child] for child in children.get(key, ())), default=0.0)
    return found


@dataclass(frozen=True)
class Played:
    """A schedule that was played through. seconds: until all is made; costs: seconds of each unit in its group; sizes: of the
    group."""

    seconds: float
    costs: dict[str, float]
    sizes: dict[str, int]


def simulate(todo: Mapping[str, Unit], expected: Callable[[Unit, int], float], workers: int, *, device: str = "cpu",
             population: int = 1, start: float = 0.0, load: float = 0.0,
             compiled: Mapping[str, tuple[str, ...]] | None = None, compile_seconds: float = 0.0) -> Played:
    """Play through how ``workers`` processes make all units: the most urgent ready one first, with those that go with it.

    expected: seconds of one unit where so many are made at once, up to ``population``. start: until a process takes its first
    unit; load: what its first unit waits for the images. compiled: names of what is compiled for each unit, once in every
    process.
    """
    waiting, children = graph(todo)
    urgent = urgency(todo, children, {key: expected(unit, 1) for key, unit in todo.items()})
    names = {key: group_name(unit, device) if population > 1 else None for key, unit in todo.items()}
    ready = [(-urgent[key], key) for key, parents in waiting.items() if not parents]
    heapq.heapify(ready)
    idle = [(start, w) for w in range(max(1, workers))]
    known: list[set[str]] = [set() for _ in idle]
    began = [False] * len(idle)
    running: list[tuple[float, int, list[str]]] = []
    now, costs, sizes = start, dict[str, float](), dict[str, int]()
    while ready or running:
        while ready and idle:
            free, worker = heapq.heappop(idle)
            group = take(ready, names, max(1, workers), population)
            fresh = {name for key in group for name in (compiled or {}).get(key, ())} - known[worker]
            known[worker] |= fresh
            costs |= {key: expected(todo[key], len(group)) for key in group}
            sizes |= dict.fromkeys(group, len(group))
            takes = sum(costs[key] for key in group) + compile_seconds * len(fresh) + (0.0 if began[worker] else load)
            began[worker] = True
            heapq.heappush(running, (max(free, now) + takes, worker, group))
        now, worker, group = heapq.heappop(running)
        heapq.heappush(idle, (now, worker))
        for child in [c for key in group for c in children.get(key, ())]:
            if waiting[child]:
                waiting[child] -= set(group)
                if not waiting[child]:
                    heapq.heappush(ready, (-urgent[child], child))
    return Played(now, costs, sizes)


def take(ready: list[tuple[float, str]], names: Mapping[str, str | None], workers: int, population: int) -> list[str]:
    """Take the most urgent key off the heap ``ready`` of (minus urgency, key), and others of its name; see :func:`at_once`."""
    first = heapq.heappop(ready)
    name = names[first[1]]
    if name is None or population <= 1:
        return [first[1]]
    alike = sorted(one for one in ready if names[one[1]] == name)
    group = [first, *alike[:at_once(1 + len(alike), workers, population) - 1]]
    if len(group) > 1:
        gone = set(group)
        ready[:] = [one for one in ready if one not in gone]
        heapq.heapify(ready)
    return [key for _, key in group]


def of(store: Store, todo: Mapping[str, Unit], *, device: str = "cpu", workers: int = 0, small: float = 0.0,
       population: Mapping[str, int] | None = None, model: Model | None = None) -> Forecast:
    """The forecast for making ``todo``, units by key with parents before children.

    workers: processes on a CPU (0: one a core). small: seconds of work up to which no processes are started. population:
    networks made at once, by device. model: what is known of speeds (default: fitted to the store).
    """
    model = model or Model.of(store, device)
    described = {key: features.features(unit.stage, unit.spec, _specs(unit)) for key, unit in todo.items()}
    sort = device_class(device)
    on_cpu, most = sort == "cpu", (population or {}).get(sort, 1)
    workers = max(1, min(workers or cores.available(), len(todo))) if on_cpu else 1
    pace = model.pace if on_cpu else 1.0
    compiled = {key: found.compiled for key, found in described.items() if found}
    images = max((_images(unit) for unit in todo.values()), default=0.0)

    @cache
    def expected(unit: Unit, together: int) -> Expected:
        return model.unit(unit, together)

    def play(workers: int, start: float) -> Played:
        return simulate(todo, lambda unit, many: expected(unit, many).seconds, workers, device=device, population=most,
                        start=start, load=priors.LOAD * pace * images / 1e9, compiled=compiled,
                        compile_seconds=model.compile_seconds)

    start = priors.START * pace
    played = play(workers, start) if todo else Played(0.0, {}, {})
    if on_cpu and sum(played.costs.values()) <= small and todo:
        workers, start = 1, 0.0
        played = play(workers, start)
    seconds, costs = played.seconds, played.costs
    each = {key: replace(expected(unit, 1), seconds=costs[key]) for key, unit in todo.items()}
    error, before = _error(each), past(store)
    if before is not None and before.n >= 3:
        error = max(error, before.median)
    memories = sorted((footprint.memory(u.stage, u.spec, _specs(u), played.sizes[key] if on_cpu else 1, in_turn=on_cpu)
                       for key, u in todo.items()), reverse=True)
    # one process more: the one that waits for the others
    memory = sum(memories[:workers]) + (footprint.BASE_MEMORY if start else 0.0)
    disk = sum(footprint.disk(u.stage, u.spec, _specs(u)) for u in todo.values())
    known = sum(costs[key] for key, found in described.items() if found and found.kind in model.settings)
    return Forecast(len(todo), seconds, seconds * math.exp(-WIDTH * error), seconds * math.exp(WIDTH * error), memory, disk,
                    device, workers, costs, guessed=bool(todo) and known < sum(costs.values()) / 2)


def _specs(unit: Unit) -> dict[str, Mapping]:
    return {role: parent.spec for role, parent in unit.parents.items()}


def _images(unit: Unit) -> float:
    """Bytes of the images that a unit's process loads, normalised."""
    data = unit.spec.get("data") if isinstance(unit.spec.get("data"), Mapping) else None
    return 4.0 * math.prod(data["shape"]) * (data["train"] + data["test"]) if data else 0.0


def _error(expected: Mapping[str, Expected]) -> float:
    """Error of a sum: errors of one kind go together, those of different kinds are independent."""
    total = sum(e.seconds for e in expected.values())
    parts: dict[str, float] = {}
    for e in expected.values():
        parts[e.kind] = parts.get(e.kind, 0.0) + e.seconds * e.error
    return math.sqrt(sum(part**2 for part in parts.values())) / total if total else 0.0


# --- what there is room for -----------------------------------------------------------------------------------------------
def free_memory() -> float | None:
    """Bytes that processes can still take, within the limits of a container; None where nobody says."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            found.append(float(limit) - float(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return min(found) if found else None


def free_disk(folder: Path) -> float | None:
    """Bytes free where ``folder`` is or will be."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return float(shutil.disk_usage(folder).free)
    except OSError:
        return None


def shortages(store: Store, found: Forecast) -> list[str]:
    """A line for memory and one for disk, where the forecast needs more than there is."""
    lines = []
    memory, disk = free_memory(), free_disk(store.root)
    if memory is not None and found.memory > memory:
        lines.append(f"needs about {found.memory / 1e9:.1f} GB of memory and {memory / 1e9:.1f} GB are free; lower workers, "
                     "batch_size or width")
    if disk is not None and found.disk > disk:
        lines.append(f"needs about {found.disk / 1e9:.2f} GB of disk and {disk / 1e9:.2f} GB are free at {store.root}; set "
                     "DPKIT_STORE to a folder with more")
    return lines


# --- the past -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Past:
    """Errors of past predictions, |expected - actual| / actual: how many, the middle one, the worst; work: the middle one of
    the seconds of all units together, processor seconds on a CPU, where they are known."""

    n: int
    median: float
    worst: float
    work: float | None = None


def record(store: Store, found: Forecast, actual: float, share: float = 1.0, *, complete: bool = True,
           what: str = "compute", made: Iterable[str] = ()) -> None:
    """Append what was expected and what came to the store's ``predictions.jsonl``; of stopped work, the part done.

    made: keys whose seconds are compared as well, summed: on a CPU processor seconds, which a machine that is busy with other
    things does not change. One write of one line to a file opened for appending, so that several processes do not mix
    theirs. Where the store cannot be written to, nothing is recorded.
    """
    if share <= 0.0:
        return
    here, made = machine(), [key for key in made if store.has(key)]
    line = {"what": what, "expected": round(found.seconds * share, 3), "actual": round(actual, 3), "share": round(share, 4),
            "complete": complete, "work_expected": round(sum(found.costs[key] for key in made), 3),
            "work": round(sum(_spent(store.get(key).meta) for key in made), 3), "units": found.units,
            "device": found.device, "workers": found.workers,
            "processor": here["processor"], "accelerator": here["accelerator"], "torch": here["torch"], "dpkit": __version__,
            "commit": here["commit"], "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        handle = os.open(store.root / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)
    except OSError:
        pass


def _spent(meta: Mapping) -> float:
    return meta.get("cpu_seconds", meta["seconds"]) if meta.get("device") == "cpu" else meta["seconds"]


def records(store: Store) -> list[dict]:
    """All lines of the store's ``predictions.jsonl`` that can be read."""
    try:
        lines = (store.root / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            one = json.loads(line)
            if isinstance(one, dict) and one["expected"] > 0 and one["actual"] > 0:
                found.append(one)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def past(store: Store, what: Iterable[str] = ("compute", "study"), shortest: float = SHORT) -> Past | None:
    """How far predictions made with this store were off, those of computations of some seconds left out."""
    chosen = [r for r in records(store) if r.get("what") in set(what) and max(r["actual"], r["expected"]) >= shortest]
    errors = [abs(r["expected"] - r["actual"]) / r["actual"] for r in chosen]
    work = [abs(r["work_expected"] - r["work"]) / r["work"] for r in chosen if r.get("work") and r.get("complete")]
    return Past(len(errors), median(errors), max(errors), median(work) if work else None) if errors else None
