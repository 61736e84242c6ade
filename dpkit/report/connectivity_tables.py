"""Tables of linear connectivity as text: the barrier by every definition, what its interval rests on, where stability begins."""
from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from dpkit.report.arms import averages, called, ordered
from dpkit.report.connectivity import bootstrap, bootstrap_name, onsets, pairs_of
from dpkit.report.format import estimate_text, interval_text, value_text
from dpkit.report.numbers import LEVEL
from dpkit.statistics import attainable_coverage, share_interval


def _text(table: pd.DataFrame, column: str, kind: str, most: float = float("inf")) -> dict[tuple[str, int], str]:
    """Mean, interval and n of a measure that is 0 or more, as text, by (arm, percent)."""
    return {(row["arm"], int(row["percent"])):
            estimate_text(row["mean"], row["n"], *((max(0.0, row["low"]), min(most, row["high"])) if row["n"] > 1
                                                   else (None, None)), kind)
            for _, row in averages(table, ["arm", "percent"], column).iterrows()}


def _sheet(columns: Mapping[str, Mapping[tuple[str, int], str]]) -> pd.DataFrame:
    """Texts by (arm, percent) as a table, arms in their order."""
    places = {place for texts in columns.values() for place in texts}
    order = [place for arm in ordered(arm for arm, _ in places) for place in sorted(places) if place[0] == arm]
    names = [called(arm) + (f", {percent}% sparse" if percent else "") for arm, percent in order]
    return pd.DataFrame([[texts.get(place, "not measured") for texts in columns.values()] for place in order],
                        columns=list(columns), index=pd.Index(names, name="network", dtype=object))


def definitions(table: pd.DataFrame) -> pd.DataFrame:
    """The barrier by every definition, as text with intervals, a row an arm and sparsity: error and loss above the mean of the
    ends and above the straight line between them, and the share of pairs that are stable, with its binomial interval. Behind
    either kind stands by how much the mean barrier may be too low at the measured points (:func:`dpkit.barriers.possible_rise`).
    table: of :func:`dpkit.report.connectivity.paths`."""
    heads = {"error, above the ends' mean": ("error_barrier", "points", 1.0),
             "error, above the line": ("error_barrier_linear", "points", 1.0),
             "error: may be too low by": ("error_gap", "points", None),
             "stable: below 2 points": ("stable", "percent", None),
             "loss, above the ends' mean": ("loss_barrier", "number", float("inf")),
             "loss, above the line": ("loss_barrier_linear", "number", float("inf")),
             "loss: may be too low by": ("loss_gap", "number", None)}
    columns = {head: _text(table, *how) if len(table) and how[2] is not None else {} for head, how in heads.items()}
    for (arm, percent), part in table.groupby(["arm", "percent"], sort=False) if len(table) else ():
        place, good = (arm, int(percent)), part[part["failed"].isna()]
        for head in ("error: may be too low by", "loss: may be too low by"):
            column, kind, _ = heads[head]
            gap = good.groupby("seed")[column].mean().mean()
            if pd.notna(gap):
                columns[head][place] = value_text(float(gap), kind)
        if len(good):
            columns["stable: below 2 points"][place] = _share_text(good.assign(stable=good["stable"].astype(float)))
    return _sheet(columns)


def _share_text(part: pd.DataFrame) -> str:
    """How many initialisations' pairs are stable, with the interval of :func:`dpkit.statistics.share_interval`."""
    seeds = part.groupby("seed")["stable"].mean()
    share, low, high = share_interval(float(seeds.sum()), len(seeds), LEVEL)
    return estimate_text(share, len(seeds), *((low, high) if len(seeds) > 1 else (None, None)), "percent")


def onset_table(table: pd.DataFrame) -> pd.DataFrame:
    """Where stability begins, as text: a row an arm and sparsity, for each initialisation the epochs in which it does.

    ``(1, 2]``: not yet at 1 epoch, from 2 on; ``from the start``; ``not by 8``: not at the last measured step. table: of
    :func:`dpkit.report.connectivity.paths` with columns step and epochs.
    """
    found = onsets(table)
    good = table[table["failed"].isna()] if len(table) else table
    seeds = sorted(set(found["seed"]))
    columns: dict[str, dict[tuple[str, int], str]] = {f"initialisation {int(seed)}": {} for seed in seeds}
    for row in found.itertuples():
        steps = good[(good["arm"] == row.arm) & (good["percent"] == row.percent) & (good["seed"] == row.seed)]["epochs"]
        since, before = float(row.stable_from), float(row.unstable_at)
        if pd.isna(since):
            text = f"not by {steps.max():.3g}"
        elif since == steps.min():
            text = "from the start" if since == 0 else f"from {since:.3g} or before"
        else:
            text = f"({before:.3g}, {since:.3g}]"
        columns[f"initialisation {int(row.seed)}"][row.arm, int(row.percent)] = text
    return _sheet(columns)


def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """What a 95% interval of the barrier rests on, as text, a row an arm and sparsity.

    Columns: barrier; initialisations and pairs behind it; Student, the interval of normal means of initialisations; bootstrap,
    that of initialisations drawn anew and children within them (:func:`dpkit.statistics.hierarchical_pairs_interval`); at most,
    how often the bootstrap's interval of so few of them can hold the centre (:func:`dpkit.statistics.attainable_coverage`).
    Both intervals are those of the printed numbers. table: of :func:`dpkit.report.connectivity.paths`.
    """
    heads = ("barrier", "initialisations", "pairs", "Student", "bootstrap", "at most")
    columns: dict[str, dict[tuple[str, int], str]] = {head: {} for head in heads}
    for (arm, percent), part in table.groupby(["arm", "percent"], sort=False) if len(table) else ():
        groups = pairs_of(part)
        if not groups:
            continue
        found, row = bootstrap(bootstrap_name(arm, int(percent)), groups), averages(part, ["arm"], "error_barrier").iloc[0]
        several = found.initialisations > 1
        texts = (value_text(row["mean"], "points"), str(found.initialisations), str(found.values),
                 interval_text(row["mean"], max(0.0, row["low"]), min(1.0, row["high"]), "points") if several else "none",
                 interval_text(found.mean, found.low, found.high, "points") or "none",
                 f"{100 * attainable_coverage(found.initialisations):.3g}%" if several else "none")
        for head, text in zip(heads, texts, strict=True):
            columns[head][arm, int(percent)] = text
    return _sheet(columns)
