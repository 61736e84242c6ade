"""A unit: one artifact to be, known by its key before anything is computed."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dpkit.data import Dataset, DataSpec, load, zca
from dpkit.data.zca import Whitening
from dpkit.store import Artifact, Store, key_for


@dataclass(frozen=True, eq=False)
class Unit:
    """A stage, its specification and its parents. label: for people; cost: expected seconds by the shipped table.

    data: where the images come from; file: where something published lies. They are not part of the key; the identity of
    what is read, in ``spec``, is. held: how many images' activations a distillation may hold at once, None without a bound;
    that changes no result beyond rounding, and so no key.
    """

    stage: str
    spec: Mapping[str, Any]
    parents: Mapping[str, Unit] = field(default_factory=dict)
    label: str = ""
    cost: float = 1.0
    data: DataSpec | None = None
    file: str = ""
    held: float | None = None

    @property
    def version(self) -> int:
        """Version of the stage's mathematics; raising it makes old artifacts stale."""
        return STAGES[self.stage].version

    @cached_property
    def key(self) -> str:
        """Key of the artifact."""
        return key_for(self.stage, self.version, self.spec, {role: p.key for role, p in self.parents.items()})


def closure(units: Iterable[Unit]) -> dict[str, Unit]:
    """The units and all their ancestors by key, parents before children."""
    found: dict[str, Unit] = {}

    def visit(unit: Unit) -> None:
        if unit.key not in found:
            for parent in unit.parents.values():
                visit(parent)
            found[unit.key] = unit

    for unit in units:
        visit(unit)
    return found


@dataclass
class Output:
    """What a stage gives back: tensors by name, plain numbers, and why there is no result, if there is none."""

    tensors: dict[str, Tensor]
    result: dict[str, Any]
    failed: str | None = None


@dataclass
class Context:
    """What a stage may use besides its unit and its parents."""

    store: Store
    device: str = "cpu"
    data_root: Path = Path("data")
    progress: Callable[[str, int, int], None] | None = None
    cpu_before: float = 0.0
    cpu_started: float = 0.0

    def start_clock(self, before: float = 0.0) -> None:
        """Begin to count processor seconds; ``before`` were spent by an earlier process that was stopped."""
        self.cpu_before, self.cpu_started = before, time.process_time()

    def cpu_seconds(self) -> float:
        """Processor seconds spent since the start: unlike wall time, the same on a busy machine."""
        return self.cpu_before + time.process_time() - self.cpu_started

    def dataset(self, spec: DataSpec) -> Dataset:
        """The data set, loaded once in a process."""
        key = (spec, str(self.data_root))
        if key not in _LOADED:
            _LOADED.clear()  # one at a time: real sets are large
            _LOADED[key] = load(spec, self.data_root)
        return _LOADED[key]

    def whitening(self, spec: DataSpec) -> Whitening:
        """The ZCA whitening of a data set's training images, fitted once in a process."""
        key = (spec, str(self.data_root))
        if key not in _WHITENED:
            _WHITENED.clear()
            _WHITENED[key] = zca.fit(self.dataset(spec).train.images)
        return _WHITENED[key]

    def step(self, unit: Unit) -> Callable[[int, int], None] | None:
        """A progress callback for one unit."""
        if self.progress is None:
            return None
        return lambda done, total: self.progress(unit.key, done, total)


_LOADED: dict[tuple[DataSpec, str], Dataset] = {}
_WHITENED: dict[tuple[DataSpec, str], Whitening] = {}


@dataclass(frozen=True)
class Stage:
    """function: (context, unit, parents' artifacts) -> Output. version: see :attr:`Unit.version`.

    many: the same for several units at once, where that is faster; group: (unit, device) -> a name; units with equal ones may
    go together, and only where there is a reason to on that device. tolerant:
    parents that have no result are left out, and only where all have none there is none here.
    """

    name: str
    version: int
    function: Callable[[Context, Unit, Mapping[str, Artifact]], Output]
    many: Callable[[Context, list[Unit], list[Mapping[str, Artifact]]], list[Output]] | None = None
    group: Callable[[Unit, str], str] | None = None
    tolerant: bool = False


STAGES: dict[str, Stage] = {}


def stage(name: str, version: int, **options: Any):
    """Register a function as the stage ``name``."""
    def register(function):
        STAGES[name] = Stage(name, version, function, **options)
        return function
    return register
