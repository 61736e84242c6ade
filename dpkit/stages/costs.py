"""How long a unit takes: a model of seconds, fitted to what the store's own units took on this machine.

For each kind of unit (a stage with its precision and execution, on one sort of device)

    seconds = a0 + a1 x steps + a2 x GFLOP + a3 x GB + ... ,   a >= 0,

where the amounts follow from the specification alone (:mod:`dpkit.stages.features`): a0 is the start, a1 what a step costs
however small the network, a2 and a3 the speeds of arithmetic and of memory. The coefficients minimise the squared relative
error over distinct settings, plus a weak pull towards the table shipped with the library (:mod:`dpkit.stages.priors`) times
one factor for this machine and kind. So a store without timings is predicted by the table, one with a few by the table at
this machine's pace, and one with many by its own. Non-negative least squares by coordinate descent; no random number.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

from dpkit.stages import priors
from dpkit.stages.features import Features, features, together
from dpkit.stages.unit import Unit
from dpkit.store import Damaged, Missing, Store, machine

BELIEF = 0.1  # weight of the pace of everything in the pace of one kind, in settings that take long
PULL = 0.03  # weight of the table's coefficients, in squared relative errors of one setting
BRIEF = 0.5  # seconds of a unit that counts half
RECENT = 12  # timings of one setting that count, the latest: code and machines change
KNOWN, UNKNOWN, GUESS = 0.10, 0.45, 0.9  # least error (of the logarithm) with timings, with the table only, and without one


@dataclass(frozen=True)
class Timing:
    """One unit that was made: seconds of this process (processor seconds on a CPU), by the clock on a GPU.

    first: whether its process had made none of its kind before, so that loading and compiling are in it.
    """

    features: Features
    seconds: float
    created: str = ""
    first: bool = False


def device_class(device: str) -> str:
    """``cpu`` or ``cuda``."""
    return "cuda" if device.startswith("cuda") else "cpu"


def timings(store: Store, device: str = "cpu") -> Iterator[Timing]:
    """What the store's units took on this machine's processor (on a GPU: accelerator) and this sort of device."""
    here, sort = machine(), device_class(device)
    same = "accelerator" if sort == "cuda" else "processor"
    metas: dict[str, dict] = {}
    for key in list(store.keys()):
        try:
            metas[key] = store.get(key).meta
        except (Missing, Damaged):
            continue  # `dpkit verify` says so
    for meta in metas.values():
        try:
            if meta["failed"] or meta["machine"][same] != here[same] or device_class(meta.get("device", "")) != sort:
                continue
            if "device" not in meta:
                continue
            parents = {role: metas[key]["spec"] for role, key in meta["parents"].items()}
            found = features(meta["stage"], meta["spec"], parents)
            clock = meta["seconds"]
            seconds = meta.get("cpu_seconds", clock) if sort == "cpu" else clock
            if found is not None:
                found = together(found, meta.get("together", 1), sort)
            if found is not None and seconds > 0:
                # compilers run in processes of their own, which processor seconds leave out
                first = bool(meta.get("first"))
                yield Timing(found, clock if first and found.compiled else seconds, meta["created"], first)
        except (KeyError, TypeError, ValueError):
            continue  # an artifact of another stage, or of a version that had other fields


def table(kind: str, device: str = "cpu") -> dict[str, float] | None:
    """The shipped coefficients of a kind: its own, or those of the nearest kind with allowance for how it runs."""
    found = priors.CUDA if device_class(device) == "cuda" else priors.CPU
    stage, _, ways = kind.partition("/")
    if kind in found or stage in found:
        return dict(found.get(kind) or found[stage])
    words = set(ways.split("+"))
    near = [name for name in found if name.partition("/")[0] == stage]
    if not near:
        return None
    best = min(near, key=lambda name: (len(words ^ set(name.partition("/")[2].split("+"))), name))
    have, coefficients = set(best.partition("/")[2].split("+")), dict(found[best])
    for word, change in priors.WAYS.items():
        power = (word in words) - (word in have)
        for name in coefficients:
            coefficients[name] *= change.get(name, 1.0) ** power
    return coefficients


@dataclass(frozen=True)
class Expected:
    """Seconds expected, the error of that (the standard deviation of its logarithm: 0.1 is about 10%), and of what kind."""

    seconds: float
    error: float
    kind: str = ""


@dataclass
class Setting:
    """Distinct amounts with what they took, the latest few."""

    amounts: Mapping[str, float]
    seconds: list[float]

    @property
    def typical(self) -> float:
        """Seconds: the middle of the latest."""
        return median(self.seconds)

    @property
    def weight(self) -> float:
        """In the fit, near 1 for seconds and small for milliseconds, which matter to nobody and scatter."""
        return math.sqrt(self.typical / (self.typical + BRIEF))


@dataclass
class Model:
    """The fitted model of one sort of device. found: timings of this machine; other: whether it is not the table's."""

    found: list[Timing] = field(default_factory=list)
    device: str = "cpu"
    other: bool = False

    @classmethod
    def of(cls, store: Store | None, device: str = "cpu") -> Model:
        """The model of what is in a store (None: of nothing)."""
        found = list(timings(store, device)) if store is not None else []
        return cls(found, device, priors.PROCESSOR not in str(machine()["processor"]))

    # --- fitting --------------------------------------------------------------------------------------------------------
    @cached_property
    def settings(self) -> dict[str, list[Setting]]:
        """Distinct settings by kind. Units that were the first of their process count only where there are no others."""
        groups: dict[str, dict[tuple, list[Timing]]] = {}
        for timing in sorted(self.found, key=lambda t: t.created):
            amounts = tuple(sorted(timing.features.amounts.items()))
            groups.setdefault(timing.features.kind, {}).setdefault(amounts, []).append(timing)
        result: dict[str, list[Setting]] = {}
        for kind, by_amounts in sorted(groups.items()):
            for amounts, several in sorted(by_amounts.items()):
                usable = [t for t in several if not t.first] or [t for t in several if not t.features.compiled]
                if usable:
                    result.setdefault(kind, []).append(Setting(dict(amounts), [t.seconds for t in usable][-RECENT:]))
        return result

    @cached_property
    def pace(self) -> float:
        """This machine's seconds for one of the table's, over all kinds; 1 as far as there are only milliseconds to go by."""
        return self._pace([(kind, s) for kind, several in self.settings.items() for s in several], 1.0)

    def _pace(self, several: list[tuple[str, Setting]], prior: float) -> float:
        """Mean ratio of seconds to the table's, in logarithms and by the settings' weights, drawn towards ``prior``."""
        total, weights = BELIEF * math.log(prior), BELIEF
        for kind, setting in several:
            shipped = table(kind, self.device)
            if shipped is not None:
                total += setting.weight**2 * math.log(setting.typical / _dot(shipped, setting.amounts))
                weights += setting.weight**2
        return math.exp(total / weights)

    @cached_property
    def coefficients(self) -> dict[str, dict[str, float]]:
        """The fitted coefficients of each kind that the store has timings of."""
        return {kind: self._fit(kind, several) for kind, several in self.settings.items()}

    def _fit(self, kind: str, several: list[Setting]) -> dict[str, float]:
        shipped = table(kind, self.device)
        if not several:
            return {name: value * self.pace for name, value in (shipped or {}).items()}
        if shipped is None:  # nothing to lean on: all of the cost is in proportion to the arithmetic, or to the units
            name = "gflop" if all(s.amounts.get("gflop") for s in several) else "unit"
            return {name: math.exp(median(math.log(s.typical / s.amounts.get(name, 1.0)) for s in several))}
        around = self._pace([(kind, s) for s in several], self.pace)
        names = [name for name in shipped if shipped[name] > 0]
        # unknowns are the coefficients over the table's at this pace; every row is divided by its seconds
        rows = [([s.weight * s.amounts.get(n, 0.0) * shipped[n] * around / s.typical for n in names], s.weight) for s in several]
        for i in range(len(names)):
            pull = math.sqrt(PULL)
            rows.append(([pull * (i == j) for j in range(len(names))], pull))
        solved = non_negative([row for row, _ in rows], [value for _, value in rows])
        return {name: x * shipped[name] * around for name, x in zip(names, solved, strict=True)}

    # --- predicting -----------------------------------------------------------------------------------------------------
    def unit(self, unit: Unit, population: int = 1) -> Expected:
        """Seconds of a unit in a process that is warm, its part where ``population`` are made at once.

        Units of stages that nothing is known about take their ``cost``.
        """
        found = features(unit.stage, unit.spec, {role: p.spec for role, p in unit.parents.items()})
        if found is not None and population > 1:
            found = together(found, population, device_class(self.device))
        return Expected(max(unit.cost, 1e-3), GUESS, unit.stage) if found is None else self.expected(found)

    def expected(self, asked: Features) -> Expected:
        """Seconds for what was asked, from the kind's coefficients or, without timings, the table at this machine's pace."""
        kind = asked.kind
        coefficients = self.coefficients.get(kind)
        if coefficients is None:
            shipped = table(kind, self.device)
            coefficients = {name: value * self.pace for name, value in (shipped or {"unit": 1.0}).items()}
        return Expected(max(_dot(coefficients, asked.amounts), 1e-3), self.error(kind), kind)

    def error(self, kind: str) -> float:
        """Error of the logarithm for a kind: that of settings left out in turn, or what the table alone deserves."""
        left_out = self.left_out.get(kind, [])
        if len(left_out) >= 2:
            weights = [s.weight**2 for s in self.settings[kind]]
            mean = sum(w * e * e for w, e in zip(weights, left_out, strict=True)) / sum(weights)
            return max(KNOWN, math.sqrt(mean))
        if kind in self.settings:
            return 2 * KNOWN
        measured = device_class(self.device) == "cpu" and (not self.other or bool(self.settings))
        return (UNKNOWN if self.settings else 0.7 * UNKNOWN) if measured and table(kind, self.device) else GUESS

    @cached_property
    def left_out(self) -> dict[str, list[float]]:
        """For each kind, the logarithm of predicted over taken for every setting, predicted from the others."""
        errors: dict[str, list[float]] = {}
        for kind, several in self.settings.items():
            if len(several) > 1:
                for i, one in enumerate(several):
                    coefficients = self._fit(kind, several[:i] + several[i + 1:])
                    errors.setdefault(kind, []).append(math.log(max(_dot(coefficients, one.amounts), 1e-6) / one.typical))
        return errors

    @cached_property
    def compile_seconds(self) -> float:
        """Seconds to compile one function: what first units took beyond the others, or the table's."""
        extra = [(t.seconds - self.expected(t.features).seconds) / len(t.features.compiled)
                 for t in self.found if t.first and t.features.compiled]
        return max(0.0, median(extra)) if extra else priors.COMPILE * (self.pace if device_class(self.device) == "cpu" else 1)


def _dot(coefficients: Mapping[str, float], amounts: Mapping[str, float]) -> float:
    return sum(value * amounts.get(name, 0.0) for name, value in coefficients.items())


def non_negative(rows: list[list[float]], values: list[float], sweeps: int = 500) -> list[float]:
    """The x >= 0 that minimises sum (row . x - value)^2, by coordinate descent; the minimum is unique if the rows span."""
    count = len(rows[0])
    square = [[sum(row[i] * row[j] for row in rows) for j in range(count)] for i in range(count)]
    mixed = [sum(row[i] * value for row, value in zip(rows, values, strict=True)) for i in range(count)]
    x = [1.0] * count
    for _ in range(sweeps):
        moved = 0.0
        for i in range(count):
            if square[i][i] > 0:
                rest = mixed[i] - sum(square[i][j] * x[j] for j in range(count) if j != i)
                after = max(0.0, rest / square[i][i])
                moved, x[i] = max(moved, abs(after - x[i])), after
        if moved < 1e-9:
            break
    return x


def shipped_seconds(unit: Unit) -> float:
    """Seconds by the shipped table alone, on the machine that it was measured on: the cost that a plan gives its units."""
    found = features(unit.stage, unit.spec, {role: p.spec for role, p in unit.parents.items()})
    shipped = table(found.kind) if found else None
    return max(1e-3, _dot(shipped, found.amounts)) if shipped else 1.0
