"""Tables of curvature as text, and a sentence on what the published protocol does to the order of arms."""
from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import pandas as pd

from dpkit.report.arms import averages, called, ordered
from dpkit.report.curvature import CORRELATED, PRINTED, at_highest, correlation, correlation_interval, without_one_arm
from dpkit.report.format import estimate_text, significant
from dpkit.report.numbers import RANGES
from dpkit.statistics import ratio_interval

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
    """Do two measures order the arms alike at the highest sparsity? A sentence or two, of means over initialisations with both;
    distilled pruning against IMP by the interval of their ratios.

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
        a, b = (_compared(good, name) for name in (first, second))
        text += f" Is distilled pruning flatter than IMP? By the published protocol: {a}; by the corrected one: {b}."
    return text


def _compared(table: pd.DataFrame, column: str) -> str:
    """Whether the interval of distilled pruning over IMP, by initialisation, lies below 1 or above it."""
    both = table[table["arm"].isin(("distilled", "imp")) & (table[column] > 0)].groupby(["seed", "arm"])[column].mean().unstack()
    ratios = (both["distilled"] / both["imp"]).dropna().tolist() if {"distilled", "imp"} <= set(both) else []
    if len(ratios) < 2:
        return f"not decided (n\u00a0=\u00a0{len(ratios)})"
    ratio, low, high = ratio_interval(ratios)
    word = "flatter" if high < 1 else "sharper" if low > 1 else "not decided"
    return f"{word} (ratio {estimate_text(ratio, len(ratios), low, high, 'number')})"


def convergence_text(table: pd.DataFrame) -> str:
    """How well the dense network's top eigenvectors are known, for each loss: the worst of the networks. table: of
    :func:`dpkit.report.curvature.removed`."""
    good = table[table["residual_share"].notna()] if len(table) else table
    if not len(good):
        return "How well the sharpest directions are known: not measured."
    parts = []
    for on, part in good.groupby("on", sort=False):
        worst = part.loc[part["residual_share"].idxmax()]
        last = (part["residual"] / part["eigenvalue"].abs()).max()
        where = "real images" if on == "real" else called(on)
        share = significant(100 * worst["residual_share"])
        parts.append(f"on {where} residuals of the {int(worst['directions'])} directions are at most {share}% of their "
                     f"eigenvalues, and {significant(100 * last)}% for the last (worst of "
                     f"n\u00a0=\u00a0{part['seed'].nunique()} networks)")
    return "How well the sharpest directions are known: " + "; ".join(parts) + "."


def error_text(table: pd.DataFrame, column: str = "trace", percent: int | None = None) -> str:
    """The standard error of probes at one network beside the deviation between initialisations, as shares of the mean: the
    root mean square over the arms of both. table: of ``networks``; percent: a sparsity, besides the dense network; None: all."""
    error = f"{column}_error"
    good = table[table[column].notna() & table[error].notna()]
    good = good if percent is None else good[good["percent"].isin((0, percent))]
    rows = [(part[error].pow(2).mean() / part[column].mean()**2, part[column].var() / part[column].mean()**2)
            for _, part in good.groupby(["arm", "percent"]) if len(part) > 1 and part[column].mean() != 0]
    if not rows:
        return "not measured"
    probes, spread = (math.sqrt(sum(values) / len(rows)) for values in zip(*rows, strict=True))
    return (f"{significant(100 * probes)}% from probes at one network, {significant(100 * spread)}% between initialisations "
            f"(standard deviations, root mean square of {len(rows)} arms, n\u00a0=\u00a0{good['seed'].nunique()} "
            "initialisations)")


def correlation_table(table: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations of each measure with test accuracy, as text; see :func:`dpkit.report.curvature.correlation`."""
    records = {}
    for column, word in CORRELATED.items():
        found, other = (correlation(table, column, method) for method in ("spearman", "kendall"))
        records[word] = ["not measured"] * 8 if found is None else [
            significant(found.value), _between(*correlation_interval(found)), _between(found.low, found.high),
            _between(found.fisher_low, found.fisher_high),
            _between(*(without_one_arm(table, column) or (None, None))), significant(other.value), str(found.points),
            str(found.initialisations)]
    columns = ["Spearman", "95%", "of it: initialisations drawn anew", "of it: Fisher's z", "one arm left out", "Kendall",
               "networks", "initialisations"]
    return pd.DataFrame.from_dict(records, orient="index", columns=columns).rename_axis("measure")


def _between(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"[{significant(low)}, {significant(high)}]"
