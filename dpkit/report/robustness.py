"""Frames and numbers of what networks stand: corrupted images, and weights of few bits."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dpkit.report.arms import averages, called, ordered
from dpkit.report.format import estimate_text
from dpkit.report.frames import frame
from dpkit.report.numbers import Collector, Number
from dpkit.store import Store

#: the bits that stand for weights as they were trained, in 32-bit floating point
FULL = 32

Rows = Iterable[tuple[Mapping[str, Any], str]]


def networks(store: Store, rows: Rows) -> pd.DataFrame:
    """One row a network: place, ``clean_error``, ``mean_corruption_error``, ``rise`` (the second minus the first), ``failed``,
    ``key``. A network without a result stays, with NaN."""
    table = frame(store, rows)
    wanted = dict.fromkeys([*table.columns, "clean_error", "mean_corruption_error"])
    table = table.reindex(columns=list(wanted))
    return table.assign(rise=table["mean_corruption_error"] - table["clean_error"])


def corruptions(store: Store, rows: Rows) -> pd.DataFrame:
    """One row a network, corruption and severity. Columns: place, corruption, severity, error, clean_error, failed, key.

    Networks that are not made or have no result are left out.
    """
    return _tidy(store, rows, ["corruption", "severity", "error"], lambda asked, tensors, clean: [
        {"corruption": name, "severity": severity, "error": float(tensors["corruption_errors"][i, j])}
        for i, name in enumerate(asked["corruptions"]) for j, severity in enumerate(asked["severities"])])


def quantised(store: Store, rows: Rows) -> pd.DataFrame:
    """One row a network and number of bits; :data:`FULL` are its weights as trained. Columns: place, bits, error, clean_error,
    failed, key. Networks that are not made or have no result are left out."""
    return _tidy(store, rows, ["bits", "error"], lambda asked, tensors, clean: [
        {"bits": bits, "error": float(error)}
        for bits, error in zip([FULL, *asked["bits"]], [clean, *tensors["quantised_errors"]], strict=True)])


def _tidy(store: Store, rows: Rows, columns: list[str], parts) -> pd.DataFrame:
    rows, records = list(rows), []
    for place, key in rows:
        if not store.has(key) or store.get(key).failed:
            continue
        artifact = store.get(key)
        clean = artifact.result["clean_error"]
        records += [{**place, **part, "clean_error": clean, "failed": None, "key": key}
                    for part in parts(artifact.meta["spec"]["robustness"], artifact.tensors, clean)]
    names = dict.fromkeys([*(name for place, _ in rows for name in place), *columns, "clean_error", "failed", "key"])
    return pd.DataFrame.from_records(records, columns=list(names))


def to_dense(table: pd.DataFrame) -> pd.DataFrame:
    """By how much an arm errs more than the dense network of the same initialisation, corruption by corruption.

    table: of :func:`corruptions`; severities are averaged first, and so are several networks of one initialisation. Columns: arm,
    percent, corruption, seed, difference, failed (None: initialisations that lack either are left out).
    """
    means = table.groupby(["arm", "percent", "corruption", "seed"], sort=False)["error"].mean().rename("value").reset_index()
    dense = means[means["arm"] == "dense"].rename(columns={"value": "dense"})[["corruption", "seed", "dense"]]
    both = means[means["arm"] != "dense"].merge(dense, on=["corruption", "seed"])
    return both.assign(difference=both["value"] - both["dense"], failed=None)[
        ["arm", "percent", "corruption", "seed", "difference", "failed"]]


def overview(table: pd.DataFrame) -> pd.DataFrame:
    """A row an arm and sparsity, as text with intervals: clean error, mean corruption error, and by how much it is higher.

    table: of :func:`networks`; arms of which no network has a result are left out.
    """
    texts = {}
    for column, head, kind in (("clean_error", "clean", "percent"), ("mean_corruption_error", "corrupted", "percent"),
                               ("rise", "rise", "points")):
        for _, row in (averages(table, ["arm", "percent"], column).iterrows() if len(table) else ()):
            ends = (row["low"], row["high"]) if row["n"] > 1 else (None, None)
            if kind == "percent" and row["n"] > 1:
                ends = max(0.0, row["low"]), min(1.0, row["high"])
            texts.setdefault((row["arm"], row["percent"]), {})[head] = estimate_text(row["mean"], row["n"], *ends, kind)
    order = [place for arm in ordered(arm for arm, _ in texts) for place in sorted(texts) if place[0] == arm]
    names = [called(arm) + (f", {percent}% sparse" if percent else "") for arm, percent in order]
    return pd.DataFrame([texts[place] for place in order], columns=["clean", "corrupted", "rise"],
                        index=pd.Index(names, name="network", dtype=object))


def numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """Numbers of the chapter ``robustness``.

    ``robustness.ARM.clean_error@P``, ``.corruption_error@P`` (mean over corruptions and severities), ``.corruption_rise@P`` (that
    minus the clean error), ``.error_CORRUPTION@P`` (mean over severities) and ``.error_4bit@P`` for each number of bits; the
    first, second, third and last also as ``distilled_minus_ARM`` and ``ARM_minus_dense``, paired by initialisation.
    """
    rows = list(chapters.get("robustness", ()))
    table = networks(store, rows)
    if not len(table) or table["failed"].notna().all():
        return []
    by_name = corruptions(store, rows).groupby(["key", "corruption"], sort=False)["error"].mean().unstack()
    named = {f"error_{name}": table["key"].map(by_name[name]) for name in by_name}
    bits = [name for name in table if name.startswith("error_") and name.endswith("bit")]
    chapter = Collector(store, "robustness", table.assign(**named))
    compared = {"clean_error": "clean_error", "corruption_error": "mean_corruption_error", "corruption_rise": "rise",
                **{name: name for name in bits}}
    measures = compared | {name: name for name in named}
    for measure, column in measures.items():
        for name, percent in chapter.places():
            chapter.add(name, percent, measure, column, "mean" if measure == "corruption_rise" else "fraction")
            if measure in compared and name != "dense":
                chapter.compare((name, percent), ("dense", 0), measure, column)
                if name != "distilled":
                    chapter.compare(("distilled", percent), (name, percent), measure, column)
    return chapter.found
