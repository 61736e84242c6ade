"""Frames and numbers of curvature: of trained networks, of what masks remove, along training, and beside accuracy.

Curvature is that of the loss in nats, on surviving weights in eval mode unless a name begins with ``published``. What a measure
can say and cannot is in :mod:`dpkit.hessian`; here they are only put side by side.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from dpkit.report.arms import ordered
from dpkit.report.frames import curves, frame
from dpkit.report.numbers import LEVEL, RANGES, Collector, Number
from dpkit.statistics import Correlation, rank_correlation
from dpkit.store import Store, key_for
from dpkit.tree import generator_for

Rows = Iterable[tuple[Mapping[str, Any], str]]

PLACE = ("arm", "percent", "seed")
#: what each part of the chapter measures at a trained network; accuracies are those of the chapter on tickets
MEASURES = {
    "hessian": ("trace", "trace_error", "top_eigenvalue", "top_eigenvalue_error", "surviving", "trace_per_weight",
                "diagonal_negative"),
    "sharpness": ("sharpness", "sharpness_first", "adaptive_sharpness", "average_sharpness", "average_sharpness_error",
                  "adaptive_average", "adaptive_average_error", "fisher_rao", "fisher_rao_error"),
    "spectra": ("lowest_eigenvalue", "frobenius", "negative_fraction", "negative_low", "negative_high", "rank_entropy",
                "rank_participation", "gn_trace", "gn_top", "gn_share", "fisher_trace", "last_layer_mean", "deflated_trace",
                "deflated_trace_error"),
    "diagonals": ("exact", "published_mean", "published_mean_error", "published_surviving", "published_loose"),
    "tickets": ("accuracy",)}
PARTS = tuple(MEASURES)
ALONG = ("edge_highest", "edge_last")  # of a whole training
RENAMED = {"spectra": {"trace": "deflated_trace", "trace_error": "deflated_trace_error"}}  # others have the plain names

#: numbers of each part: measure -> kind; those of the chapter's first part are older and have their own function
PRINTED = {
    "sharpness": {"sharpness": "length", "adaptive_sharpness": "length", "average_sharpness": "mean", "fisher_rao": "length"},
    "spectra": {"lowest_eigenvalue": "mean", "frobenius": "length", "negative_fraction": "fraction", "rank_entropy": "length",
                "rank_participation": "length", "gn_trace": "length", "gn_top": "length", "gn_share": "mean",
                "fisher_trace": "length", "last_layer_mean": "length", "deflated_trace": "mean"},
    "diagonals": {"published_mean": "mean", "published_surviving": "mean", "published_loose": "mean"}}
RATIOS = {"sharpness": ("sharpness", "adaptive_sharpness"), "spectra": ("deflated_trace",),
          "diagonals": ("published_mean", "published_surviving")}
#: what is set against accuracy, and how it is called
CORRELATED = {"trace_per_weight": "trace per surviving weight", "top_eigenvalue": "top eigenvalue", "trace": "trace",
              "sharpness": "sharpness", "adaptive_sharpness": "adaptive sharpness", "average_sharpness": "average sharpness",
              "fisher_rao": "Fisher-Rao norm, squared"}
DRAWS = 10_000  # of a bootstrap

#: of one mask, at the dense network: numbers in the artifact's tensors, one an arm
REMOVED = ("removed", "removed_error", "kept", "kept_error", "all", "chance", "chance_error", "excess", "excess_error", "score",
           "overlap", "overlap_layerwise", "overlap_uniform", "overlap_score", "rise")
REMOVED_NUMBERS = {"removed_excess": ("excess", "mean"), "removed_score": ("score", "mean"), "overlap": ("overlap", "fraction"),
                   "overlap_excess": ("overlap_excess", "mean"), "removal_rise": ("rise", "mean"),
                   "removal_excess": ("rise_excess", "mean")}
CONVERGED = 0.01  # an eigenvalue is marked where its residual is within this share of it
CONVERGENCE = ("directions", "eigenvalue", "residual", "residual_share")
EDGE = ("steps", "epochs", "top", "top_error", "ratio", "lr")


# --- frames -----------------------------------------------------------------------------------------------------------

def measured(store: Store, rows: Rows, part: str) -> pd.DataFrame:
    """One row a network of one part (``edge``: a training): its place, the part's :data:`MEASURES`, failed, key. NaN where there
    is no result."""
    table = frame(store, rows).rename(columns=RENAMED.get(part, {}))
    if part == "tickets" and "error" in table:
        table = table.assign(accuracy=1 - table["error"])
        table = table[table["child"] == 0] if "child" in table else table
    if {"gn_trace", "deflated_trace"} <= set(table.columns):
        table = table.assign(gn_share=(table["gn_trace"] / table["deflated_trace"]).where(table["deflated_trace"] > 0))
    table = table if "percent" in table else table.assign(percent=0)
    return table.reindex(columns=[*PLACE, *MEASURES.get(part, ALONG), "failed", "key"])


def networks(store: Store, chapters: Mapping[str, Rows]) -> pd.DataFrame:
    """One row a network with everything that was measured at it. chapters: (place, key) rows of :data:`PARTS`, some or all.

    Columns: arm, percent, seed; all :data:`MEASURES`, NaN where the part lacks this network or it failed; accuracy, a fraction,
    of the first child, which is the network that was measured; ``key_PART``; failed (None). Networks without curvature are left
    out.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for part, columns in MEASURES.items():
        table = measured(store, list(chapters.get(part, ())), part)
        for row in table[table["failed"].isna()].to_dict("records"):
            place = (row["arm"], int(row["percent"]), int(row["seed"]))
            record = found.setdefault(place, {}) if part != "tickets" else found.get(place)
            if record is not None:
                record |= {name: row[name] for name in columns} | {f"key_{part}": row["key"]}
    names = [*(name for columns in MEASURES.values() for name in columns), *(f"key_{part}" for part in PARTS)]
    records = [dict(zip(PLACE, place, strict=True)) | record for place, record in found.items()]
    table = pd.DataFrame.from_records(records, columns=[*PLACE, *names])
    return table.astype({name: float for name in names if not name.startswith("key_")}).assign(failed=None)


def removed(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each initialisation, loss (``on``: real, or a small set) and arm: what its mask does to the *dense* network.

    Columns: the place, arm, directions (how many top eigenvectors; the same for all arms, like the next three), eigenvalue and
    residual of the last of them, residual_share, the largest residual over its eigenvalue; :data:`REMOVED` (mean curvature of
    removed and kept weights, of all, and what random masks with the same layer counts remove; their difference, and in standard
    deviations; share of the top eigenvectors on surviving weights and what is expected of random masks; rise of the loss in
    nats), overlap_excess (minus layerwise chance), rise_random, rise_least and rise_most of random masks, rise_excess (minus
    their mean); failed (None), key. What is not made or failed is left out.
    """
    rows, records = list(rows), []
    for place, key in rows:
        if not store.has(key) or store.get(key).failed:
            continue
        artifact = store.get(key)
        found = {name: artifact.tensors[name].double() for name in (*REMOVED, "rise_random") if name in artifact.tensors}
        for i, arm in enumerate(artifact.result["arms"]):
            values = {name: float(found[name][i]) if name in found else math.nan for name in REMOVED}
            random = found["rise_random"][i] if "rise_random" in found else torch.empty(0)
            mean, least, most = (float(f(random)) if len(random) else math.nan for f in (torch.mean, torch.min, torch.max))
            records.append({**place, "arm": arm, **_convergence(artifact.tensors), **values,
                            "overlap_excess": values["overlap"] - values["overlap_layerwise"], "rise_random": mean,
                            "rise_least": least, "rise_most": most, "rise_excess": values["rise"] - mean,
                            "failed": None, "key": key})
    names = dict.fromkeys([*(name for place, _ in rows for name in place), "on", "arm", "percent", "seed", *CONVERGENCE, *REMOVED,
                           "overlap_excess", "rise_random", "rise_least", "rise_most", "rise_excess", "failed", "key"])
    return pd.DataFrame.from_records(records, columns=list(names))


def _convergence(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How well the top eigenvectors are known, as :func:`removed` names it; NaN where that is not stored."""
    if not {"eigenvalues", "residuals"} <= set(tensors):
        return dict.fromkeys(CONVERGENCE, math.nan)
    values, residuals = tensors["eigenvalues"].double(), tensors["residuals"].double()
    worst = float((residuals / values.abs().clamp_min(1e-300)).max())
    return dict(zip(CONVERGENCE, (len(values), float(values[-1]), float(residuals[-1]), worst), strict=True))


def edges(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each network and measured step of its training: the place, steps, epochs, top (eigenvalue), top_error, ratio
    (1: the edge of stability), lr; failed (None), key. Points without a ratio are left out."""
    table = curves(store, rows, EDGE).assign(failed=None)
    return table[table["ratio"].notna()]


@dataclass(frozen=True)
class Density:
    """A network's spectral density: values per unit of eigenvalue on a grid, with standard errors, of which the integral is 1;
    those of its largest eigenvalues that converged; size, how many eigenvalues there are."""

    arm: str
    percent: int
    seed: int
    grid: np.ndarray
    curve: np.ndarray
    error: np.ndarray
    eigenvalues: np.ndarray
    size: int


def densities(store: Store, rows: Rows) -> list[Density]:
    """The stored densities, arms in their order. What is not made or failed is left out."""
    found = []
    for place, key in rows:
        if store.has(key) and not store.get(key).failed and {"grid", "curve"} <= set(store.get(key).tensors):
            t = {name: tensor.double().numpy() for name, tensor in store.get(key).tensors.items()}
            size = int(t["size"].ravel()[0]) if "size" in t else int(store.get(key).result["size"])
            values = t.get("eigenvalues", np.empty(0))
            known = values[t.get("residuals", np.zeros_like(values)) <= CONVERGED * np.abs(values)]
            found.append(Density(place["arm"], int(place["percent"]), int(place["seed"]), t["grid"], t["curve"],
                                 t.get("curve_error", np.zeros_like(t["curve"])), known, size))
    order = ordered(entry.arm for entry in found)
    return sorted(found, key=lambda entry: (order.index(entry.arm), entry.percent, entry.seed))


def at_highest(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the highest sparsity, and those of the dense network."""
    return table[table["percent"].isin((0, table["percent"].max()))] if len(table) else table


# --- correlation with accuracy ----------------------------------------------------------------------------------------

def comparable(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Networks that have both ``column`` and an accuracy; without the dense one, which has no peer at its sparsity."""
    return table[(table["arm"] != "dense") & table[column].notna() & table["accuracy"].notna()]


def _correlation_name(column: str, method: str) -> str:
    return f"hessian.correlation.{column}" + ("" if method == "spearman" else f"_{method}")


def correlation(table: pd.DataFrame, column: str, method: str = "spearman") -> Correlation | None:
    """How test accuracy goes with ``column`` over the networks of all arms, compared at equal sparsity only.

    Below 0: flatter networks are more accurate. Its bootstrap draws whole initialisations, and its draws belong to the number of
    this name; what is printed is :func:`correlation_interval`. None unless two networks of one sparsity differ in both. See
    :func:`dpkit.statistics.rank_correlation`.
    """
    good = comparable(table, column)
    spread = good.groupby("percent")[[column, "accuracy"]].nunique()
    if not len(good) or not (spread.max() > 1).all():
        return None
    return rank_correlation(good[column].tolist(), good["accuracy"].tolist(), good["seed"].tolist(),
                            generator_for(_correlation_name(column, method), "bootstrap"), strata=good["percent"].tolist(),
                            method=method, level=LEVEL, draws=DRAWS)


def correlation_interval(found: Correlation) -> tuple[float | None, float | None]:
    """What is printed around a correlation: from the lower of two lower ends to the higher of two upper ends, of the bootstrap
    over initialisations and of Fisher's z. None for a single initialisation.

    From three initialisations a bootstrap has ten different draws, and where two agree an end may be the value itself; Fisher's
    takes networks of one initialisation for independent. Each fails where the other does not. In simulations of 8 to 15 arms with
    more or less of the variance between arms or initialisations, 300 studies each, the bootstrap held the truth in 51 to 65%, 78
    to 86% and 85 to 90% with 2, 3 and 5 initialisations, Fisher's interval in 69 to 99%, and both together in 89 to 99%, or 86 to
    95% where arms are drawn anew in each study as well.
    """
    if found.low is None:
        return None, None
    ends = [(found.low, found.high)] + ([] if found.fisher_low is None else [(found.fisher_low, found.fisher_high)])
    return min(low for low, _ in ends), max(high for _, high in ends)


def without_one_arm(table: pd.DataFrame, column: str) -> tuple[float, float] | None:
    """The lowest and highest :func:`correlation` with each arm left out in turn: what hangs on one arm alone. None for fewer
    than three arms. The interval above is over initialisations and knows nothing of arms that were not tried."""
    good, found = comparable(table, column), []
    arms = list(dict.fromkeys(good["arm"]))
    for arm in arms if len(arms) > 2 else ():
        rest = good[good["arm"] != arm]
        if (rest.groupby("percent")[[column, "accuracy"]].nunique().max() > 1).all():
            found.append(rank_correlation(rest[column].tolist(), rest["accuracy"].tolist(), rest["seed"].tolist(),
                                          generator_for(column, "bootstrap"), strata=rest["percent"].tolist(), draws=1).value)
    return (min(found), max(found)) if found else None


def _correlation_number(store: Store, table: pd.DataFrame, part: str, column: str, method: str) -> Number | None:
    good, name = comparable(table, column), _correlation_name(column, method)
    keys = {*good[f"key_{part}"], *good["key_tickets"]}
    places = [f"{arm} {percent} {seed}" for arm, percent, seed in good[list(PLACE)].itertuples(index=False)]
    return kept_correlation(store, name, f"{method} correlation within sparsities", places, keys, good[[column, "accuracy"]],
                            lambda: correlation(table, column, method))


def kept_correlation(store: Store, name: str, kind: str, networks: Sequence[str], keys: Iterable[str], values: pd.DataFrame,
                     compute: Callable[[], Correlation | None]) -> Number | None:
    """The number of a correlation, kept in the store with all that went in as its parents; None where there is none.

    kind: of what, within what. networks: what was ranked, by name; values: their two columns. keys: of the artifacts that these
    come from. compute: finds the correlation; what is printed around it is :func:`correlation_interval`.
    """
    spec = {"name": name, "kind": kind, "level": LEVEL, "draws": DRAWS,
            "interval": "bootstrap over initialisations and Fisher's z together", "networks": list(networks)}
    parents = {str(i): key for i, key in enumerate(sorted(keys))}
    key = key_for("number", 1, spec, parents)
    if not store.has(key):
        found = compute()
        if found is None:
            return None
        low, high = correlation_interval(found)
        store.put(key, stage="number", version=1, spec=spec, parents=parents, seconds=0.0, label=name,
                  tensors={"values": torch.tensor(values.to_numpy(), dtype=torch.float64)},
                  result={"value": found.value, "n": found.initialisations, "low": low, "high": high})
    return Number(name, *(store.get(key).result[field] for field in ("value", "n", "low", "high")), key)


# --- numbers ----------------------------------------------------------------------------------------------------------

def numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """Numbers of the chapters ``hessian``, ``sharpness``, ``spectra``, ``diagonals``, ``removed`` and ``edge``.

    ``hessian.ARM.MEASURE@P`` for ``trace``, ``top_eigenvalue``, ``trace_per_weight`` and all of :data:`PRINTED`;
    ``hessian.distilled_over_ARM.MEASURE@P``, geometric mean of ratios by initialisation, for ``trace``, ``top_eigenvalue``,
    ``trace_per_weight`` and :data:`RATIOS`; ``hessian.ARM.removed_excess@P`` and the others of :data:`REMOVED_NUMBERS`, on the
    real loss, and ``removed_excess_SET@P`` on that of a small set; ``hessian.ARM.edge_highest@P``, before the end of training;
    ``hessian.correlation.MEASURE`` (and ``MEASURE_kendall``) with test accuracy, see :func:`correlation`.
    """
    part = {name: list(chapters.get(name, ())) for name in (*PARTS, "removed", "edge")}
    tables = {name: measured(store, part[name], name) for name in ("hessian", *PRINTED)}
    found = _hessian(store, tables["hessian"])
    for name, measures in PRINTED.items():
        found += _each(store, tables[name], measures) + _ratios(store, tables[name], RATIOS.get(name, ()), dense=True)
    found += _ratios(store, tables["hessian"], ("trace_per_weight",), dense=False)
    masks = removed(store, part["removed"])
    for on in dict.fromkeys(masks["on"]):
        for measure, (column, kind) in REMOVED_NUMBERS.items():
            name = measure if on == "real" else f"{measure}_{on}"
            found += _each(store, masks[masks["on"] == on].rename(columns={column: name}), {name: kind})
    found += _each(store, measured(store, part["edge"], "edge"), {"edge_highest": "mean"})
    table = networks(store, part)
    for name in ("hessian", "sharpness"):
        for column in (c for c in CORRELATED if c in MEASURES[name]):
            made = (_correlation_number(store, table, name, column, method) for method in ("spearman", "kendall"))
            found += [n for n in made if n is not None]
    return found


def _has_result(table: pd.DataFrame) -> bool:
    return bool(len(table)) and not table["failed"].notna().all()


def _each(store: Store, table: pd.DataFrame, measures: Mapping[str, str]) -> list[Number]:
    """A number for each place and measure (column -> kind). Rows in which a column is not defined are left out of it."""
    assert set(measures.values()) <= {"mean", *RANGES}
    found: list[Number] = []
    for column, kind in measures.items() if _has_result(table) else ():
        chapter = Collector(store, "hessian", table[table[column].notna()])
        for name, percent in chapter.places():
            chapter.add(name, percent, column, column, kind)
        found += chapter.found
    return found


def _ratios(store: Store, table: pd.DataFrame, columns: Sequence[str], *, dense: bool) -> list[Number]:
    """Distilled pruning over each arm at equal sparsity, and over the dense network if asked for."""
    found: list[Number] = []
    for column in columns if _has_result(table) else ():
        chapter = Collector(store, "hessian", table[table[column].notna()])
        for name, percent in chapter.places():
            if name not in ("dense", "distilled"):
                chapter.compare(("distilled", percent), (name, percent), column, column, ratio=True)
            elif name == "distilled" and dense:
                chapter.compare((name, percent), ("dense", 0), column, column, ratio=True)
        found += chapter.found
    return found


def _hessian(store: Store, table: pd.DataFrame) -> list[Number]:
    if not _has_result(table):
        return []
    chapter = Collector(store, "hessian", table)
    for name, percent in chapter.places():
        for column in ("trace", "top_eigenvalue", "trace_per_weight"):
            chapter.add(name, percent, column, column, "mean")
        if name not in ("dense", "distilled"):
            chapter.compare(("distilled", percent), (name, percent), "trace", "trace", ratio=True)
            chapter.compare(("distilled", percent), (name, percent), "top_eigenvalue", "top_eigenvalue", ratio=True)
    dense = [p for n, p in chapter.places() if n == "distilled"]
    for percent in dense:
        chapter.compare(("distilled", percent), ("dense", 0), "trace", "trace", ratio=True)
        chapter.compare(("distilled", percent), ("dense", 0), "trace_per_weight", "trace_per_weight", ratio=True)
    return chapter.found
