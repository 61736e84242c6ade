"""Tables of curvature as text, and a sentence on what the published protocol does to the order of arms."""
from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import pandas as pd

from dpkit.report.arms import averages, called, ordered
from dpkit.report.curvature import CORRELATED, PRINTED, at_highest, correlation, without_one_arm
from dpkit.report.format import estimate_text, significant
from dpkit.report.numbers import RANGES

#: what a measure can be, see ``RANGES``
CAN_BE = {name: kind for measures in PRINTED.values() for name, kind in measures.items()} | {
    "negative_low": "fraction", "negative_high": "fraction"}

# columns of tables: heading -> measure, form
OVERVIEW = {"trace": ("trace", "number"), "per surviving weight": ("trace_per_weight", "number"),
            "top eigenvalue": ("top_eigenvalue", "number")}
SPECTRUM = {"most negative": ("lowest_eigenvalue", "number"), "negative mass": ("negative_fraction", "percent"),
            "at least": ("negative_low", "percent"), "at most": ("negative_high", "percent"),
            "effective rank (entropy)": ("rank_entropy", "number"), "(participation)": ("rank_participation", "number"),
            "Frobenius norm": ("frobenius", "number")}
MATRICES = {"trace of the Hessian": ("deflated_trace", "number"), "of Gauss-Newton": ("gn_trace", "number"),
            "its share": ("gn_share", "percent"), "its top eigenvalue": ("gn_top", "number"),
            "trace of the empirical Fisher": ("fisher_trace", "number"),
            "mean diagonal, last layer": ("last_layer_mean", "number")}
SHARPNESS = {"sharpness": ("sharpness", "number"), "average": ("average_sharpness", "number"),
             "adaptive": ("adaptive_sharpness", "number"), "adaptive, average": ("adaptive_average", "number"),
             "Fisher-Rao, squared": ("fisher_rao", "number")}
PROTOCOLS = {"published, removed as zeros": ("published_mean", "number"), "its error": ("published_mean_error", "number"),
             "exact": ("exact", "percent"), "published, surviving": ("published_surviving", "number"),
             "published, removed let loose": ("published_loose", "number"), "corrected": ("trace_per_weight", "number"),
             "surviving weights": ("surviving", "number")}


def sheet(table: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Mean, 95% interval over initialisations and n as text: a row an arm and sparsity.

    table: of :func:`dpkit.report.curvature.networks`; columns: heading -> (measure, form), such as :data:`SPECTRUM`.
    """
    texts = {head: _texts(table, *how) for head, how in columns.items()}
    places = {place for found in texts.values() for place in found}
    order = [place for arm in ordered(arm for arm, _ in places) for place in sorted(places) if place[0] == arm]
    names = [called(arm) + (f", {percent}% sparse" if percent else "") for arm, percent in order]
    return pd.DataFrame([[found.get(place, "not measured") for found in texts.values()] for place in order],
                        columns=list(columns), index=pd.Index(names, name="network", dtype=object))


def _texts(table: pd.DataFrame, column: str, form: str) -> dict[tuple[str, int], str]:
    """By (arm, percent). Intervals are cut to what the measure can be, as those of the printed numbers are."""
    least, most = RANGES.get(CAN_BE.get(column, "mean"), (-math.inf, math.inf))
    return {(row["arm"], int(row["percent"])): estimate_text(
        row["mean"], row["n"], *((max(least, row["low"]), min(most, row["high"])) if row["n"] > 1 else (None, None)), form)
        for _, row in averages(table, ["arm", "percent"], column).iterrows()}


def order_text(table: pd.DataFrame, first: str = "published_mean", second: str = "trace_per_weight") -> str:
    """Do two measures order the arms alike at the highest sparsity? A sentence or two, of means over initialisations with both.

    table: of :func:`dpkit.report.curvature.networks`.
    """
    good = at_highest(table[table[first].notna() & table[second].notna() & (table["arm"] != "dense")])
    means = good.groupby("arm")[[first, second]].mean()
    if len(means) < 2:
        return "Whether both protocols order the arms alike: not measured."
    pairs = list(combinations(ordered(means.index), 2))
    turned = [(a, b) for a, b in pairs
              if (means[first][a] - means[first][b]) * (means[second][a] - means[second][b]) < 0]
    ends = [called(name) for measure in (first, second) for name in (means[measure].idxmin(), means[measure].idxmax())]
    text = ("By the published protocol {} is flattest and {} sharpest; by the corrected one {} and {}. ".format(*ends)
            + f"{len(turned)} of {len(pairs)} pairs of arms {'changes' if len(turned) == 1 else 'change'} order (means of "
            f"{good['seed'].nunique()} initialisations, whatever their intervals).")
    if {"distilled", "imp"} <= set(means.index):
        a, b = ("flatter" if means[name]["distilled"] < means[name]["imp"] else "not flatter" for name in (first, second))
        text += f" Distilled pruning is {a} than IMP by the published protocol and {b} by the corrected one."
    return text


def correlation_table(table: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations of each measure with test accuracy, as text; see :func:`dpkit.report.curvature.correlation`."""
    records = {}
    for column, word in CORRELATED.items():
        found, other = (correlation(table, column, method) for method in ("spearman", "kendall"))
        records[word] = ["not measured"] * 7 if found is None else [
            significant(found.value), _between(found.low, found.high), _between(found.fisher_low, found.fisher_high),
            _between(*(without_one_arm(table, column) or (None, None))), significant(other.value), str(found.points),
            str(found.initialisations)]
    columns = ["Spearman", "95%, initialisations drawn anew", "95%, Fisher's z", "one arm left out", "Kendall", "networks",
               "initialisations"]
    return pd.DataFrame.from_dict(records, orient="index", columns=columns).rename_axis("measure")


def _between(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"[{significant(low)}, {significant(high)}]"
