"""Every number that the book prints: its name, value, n, interval, and the key that leads back to what made it.

Names are ``chapter.arm.measure`` with ``@sparsity`` in percent where there is one. Accuracies, errors and barriers are
fractions in [0, 1]. n counts independent initialisations; children and pairs of one initialisation are averaged first.
``A_minus_B`` are differences paired by initialisation, ``A_over_B`` ratios (geometric mean).
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from dpkit.report.arms import split
from dpkit.report.frames import frame
from dpkit.statistics import mean_interval, ratio_interval, share_interval
from dpkit.store import Store, key_for

LEVEL = 0.95
#: what means of a kind can be
RANGES = {"fraction": (0.0, 1.0), "cosine": (-1.0, 1.0), "length": (0.0, math.inf)}


@dataclass(frozen=True)
class Number:
    """A printed number. low, high: ends of its 95% interval, None when n is 1."""

    name: str
    value: float
    n: int
    low: float | None
    high: float | None
    key: str

    def record(self) -> dict[str, Any]:
        """The plain fields."""
        return asdict(self)

    def json(self) -> str:
        """One JSON line."""
        return json.dumps(self.record())


def number(store: Store, name: str, values: Mapping[int, float], keys: Sequence[str], kind: str = "mean") -> Number:
    """Summarise one value a seed and keep the summary in the store, with everything that went in as its parents.

    kind: ``mean``; a mean whose interval is cut to what the measure can be, ``fraction`` to [0, 1], ``cosine`` to [-1, 1] and
    ``length`` to 0 and more; ``ratio``, a geometric mean; ``share``, how many of the seeds hold something, each in [0, 1], with
    the exact binomial interval (:func:`dpkit.statistics.share_interval`).
    """
    ordered = [values[seed] for seed in sorted(values)]
    if kind == "share":
        value, low, high = share_interval(sum(ordered), len(ordered), LEVEL)
        low, high = (low, high) if len(ordered) > 1 else (None, None)
    else:
        value, low, high = (ratio_interval if kind == "ratio" else mean_interval)(ordered, LEVEL)
    if kind in RANGES and low is not None:
        low, high = max(RANGES[kind][0], low), min(RANGES[kind][1], high)
    spec = {"name": name, "kind": kind, "level": LEVEL, "seeds": sorted(values)}
    parents = {str(i): key for i, key in enumerate(sorted(set(keys)))}
    key = key_for("number", 1, spec, parents)
    if not store.has(key):
        store.put(key, stage="number", version=1, spec=spec, parents=parents, seconds=0.0, label=name,
                  tensors={"values": torch.tensor(ordered, dtype=torch.float64)},
                  result={"value": value, "n": len(ordered), "low": low, "high": high})
    return Number(name, value, len(ordered), low, high, key)


def by_seed(table: pd.DataFrame, column: str) -> tuple[dict[int, float], list[str]]:
    """The mean of ``column`` for each seed that has a result, and the keys of the rows used."""
    good = table[table["failed"].isna()] if len(table) else table
    if not len(good):
        return {}, []
    return good.groupby("seed")[column].mean().to_dict(), good["key"].tolist()


def suffix(percent: int) -> str:
    """``@67`` for a sparse arm, nothing for a dense one."""
    return f"@{percent}" if percent else ""


class Collector:
    """Collects the numbers of one chapter from its frame, whose rows are told apart by ``label`` and ``percent``."""

    def __init__(self, store: Store, prefix: str, table: pd.DataFrame, label: str = "arm"):
        self.store, self.prefix, self.label = store, prefix, label
        self.table = table if "percent" in table else table.assign(percent=0)
        self.found: list[Number] = []

    def places(self) -> list[tuple[str, int]]:
        """(label, percent) of all rows, in their order."""
        return list(dict.fromkeys(zip(self.table[self.label], self.table["percent"].astype(int), strict=True)))

    def rows(self, name: str, percent: int) -> pd.DataFrame:
        """The rows at one place."""
        return self.table[(self.table[self.label] == name) & (self.table["percent"] == percent)]

    def add(self, name: str, percent: int, measure: str, column: str, kind: str = "fraction") -> None:
        """The number of one place, unless no seed has a result."""
        values, keys = by_seed(self.rows(name, percent), column)
        if values:
            self.found.append(number(self.store, f"{self.prefix}.{name}.{measure}{suffix(percent)}", values, keys, kind))

    def compare(self, first: tuple[str, int], second: tuple[str, int], measure: str, column: str, *,
                ratio: bool = False) -> None:
        """First minus (or over) second, seed by seed. Seeds that lack either are left out, and n says so."""
        a, b = by_seed(self.rows(*first), column)[0], by_seed(self.rows(*second), column)[0]
        both = sorted(set(a) & set(b))
        if ratio:
            both = [s for s in both if a[s] > 0 and b[s] > 0]  # the logarithm of a ratio needs positive numbers
        if both:
            values = {s: a[s] / b[s] if ratio else a[s] - b[s] for s in both}
            keys_a, keys_b = (by_seed(t[t["seed"].isin(both)], column)[1] for t in (self.rows(*first), self.rows(*second)))
            name = f"{self.prefix}.{first[0]}_{'over' if ratio else 'minus'}_{second[0]}.{measure}{suffix(first[1])}"
            self.found.append(number(self.store, name, values, keys_a + keys_b, "ratio" if ratio else "mean"))


Rows = Iterable[tuple[Mapping[str, Any], str]]


def all_numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """Every number that can be computed from what is in the store. chapters: (place, key) rows by chapter.

    Chapters whose results are plain have a maker here, which takes their frame. What needs tensors, or several frames, has one
    beside its frames, which takes the store and all rows.
    """
    # they collect their numbers with what this file has
    from dpkit.report import connectivity, curvature, ledger, overlap, robustness, searching, set_masks

    chapters = {name: list(rows) for name, rows in chapters.items()}
    found: list[Number] = []
    for name, make in (("distillation", _distillation), ("transfer", _transfer), ("tickets", _tickets)):
        found += _from_frame(store, chapters.get(name, []), make)
    for room in (ledger, searching, overlap, robustness, connectivity):
        found += room.numbers(store, chapters)
    for name, make in (("landscape", _landscape), ("square", _square), ("profile", _profile)):
        found += _from_frame(store, chapters.get(name, []), make)
    return found + curvature.numbers(store, chapters) + set_masks.numbers(store, chapters)


def _from_frame(store: Store, rows: Rows, make: Callable[[Store, pd.DataFrame], list[Number]]) -> list[Number]:
    table = frame(store, rows)
    return make(store, table) if len(table) and not table["failed"].notna().all() else []


def _distillation(store: Store, table: pd.DataFrame) -> list[Number]:
    chapter = Collector(store, "distill", table.assign(accuracy=1 - table["error"]), "set")
    names = [name for name, _ in chapter.places()]
    for name in names:
        chapter.add(name, 0, "accuracy", "accuracy")
    for name in names:
        if name not in ("random_real", "all_data") and not name.endswith("_soft"):  # soft sets have a teacher
            chapter.compare((name, 0), ("random_real", 0), "accuracy", "accuracy")
        if f"{name}_soft" in names:
            chapter.compare((f"{name}_soft", 0), (name, 0), "accuracy", "accuracy")
    for other in ("idc_factor1", "herding"):
        chapter.compare(("idc", 0), (other, 0), "accuracy", "accuracy")
    return chapter.found


def _transfer(store: Store, table: pd.DataFrame) -> list[Number]:
    """The same on other architectures: ``distill.SET.ARCH.accuracy``."""
    table = table.assign(accuracy=1 - table["error"], set=table["set"] + "." + table["arch"])
    chapter = Collector(store, "distill", table, "set")
    for name, percent in chapter.places():
        chapter.add(name, percent, "accuracy", "accuracy")
    return chapter.found


def _tickets(store: Store, table: pd.DataFrame) -> list[Number]:
    """``tickets.ARM.accuracy@P``; distilled minus each arm, each arm minus IMP and minus the random mask, each control minus what
    it changes, and fresh weights with signs minus those without."""
    chapter = Collector(store, "tickets", table.assign(accuracy=1 - table["error"]))
    for name, percent in chapter.places():
        chapter.add(name, percent, "accuracy", "accuracy")
        if name not in ("dense", "distilled"):
            chapter.compare(("distilled", percent), (name, percent), "accuracy", "accuracy")
        if name not in ("dense", "distilled", "imp"):
            chapter.compare((name, percent), ("imp", percent), "accuracy", "accuracy")
        if name not in ("dense", "distilled", "random"):
            chapter.compare((name, percent), ("random", percent), "accuracy", "accuracy")
        if name.endswith("_signs"):
            chapter.compare((name, percent), (f"{name.removesuffix('_signs')}_reinit", percent), "accuracy", "accuracy")
        base, endings = split(name)
        if endings and base != "imp":
            chapter.compare((name, percent), (base, percent), "accuracy", "accuracy")
    return chapter.found


def _landscape(store: Store, table: pd.DataFrame) -> list[Number]:
    chapter = Collector(store, "landscape", table)
    for name, percent in chapter.places():
        chapter.add(name, percent, "highest_error", "highest_error")
    return chapter.found


def _square(store: Store, table: pd.DataFrame) -> list[Number]:
    """``landscape.ARM.square_twist@P``: how far the four children of the square are from a parallelogram, in sides."""
    chapter = Collector(store, "landscape", table)
    for name, percent in chapter.places():
        chapter.add(name, percent, "square_twist", "off", "length")
    return chapter.found


def _profile(store: Store, table: pd.DataFrame) -> list[Number]:
    """``landscape.ARM.error_rise@P`` and ``loss_rise``: half of the reach away on random lines; distilled minus each arm."""
    chapter = Collector(store, "landscape", table)
    for name, percent in chapter.places():
        for column in ("error_rise", "loss_rise"):
            chapter.add(name, percent, column, column, "mean")
            if name not in ("dense", "distilled"):
                chapter.compare(("distilled", percent), (name, percent), column, column)
    return chapter.found
