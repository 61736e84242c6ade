"""Frames, numbers and tables of linear connectivity: what lies between two networks, under every definition and condition.

A barrier of error is a fraction, one of loss is in nats; all are 0 or more. ``barrier`` alone means the highest value on the
path minus the mean of its ends; ``barrier_linear`` the largest excess over the line between the ends (:mod:`dpkit.barriers`).
They differ where the ends do: half the difference of the ends is in the first, nothing of it in the second.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch

from dpkit.barriers import barrier_linear, barrier_over, is_stable
from dpkit.report.arms import averages, called, ordered
from dpkit.report.format import estimate_text, interval_text, value_text
from dpkit.report.frames import frame
from dpkit.report.numbers import LEVEL, Collector, Number, by_seed, number, suffix
from dpkit.statistics import Bootstrap, attainable_coverage, hierarchical_pairs_interval
from dpkit.store import Artifact, Store, key_for
from dpkit.tree import generator_for

Rows = Iterable[tuple[Mapping[str, Any], str]]

#: how BatchNorm gets its statistics between two networks, the default first
STATISTICS = ("reestimate", "interpolate", "repair")
PAIR = ["arm", "percent", "seed", "pair"]
FEW_LAYERS = 6  # so many layers have a number each
DRAWS = 10_000  # of a bootstrap
PLAIN = {"barrier": ("error_barrier", "fraction"), "loss_barrier": ("loss_barrier", "length")}
LINEAR = {"barrier_linear": ("error_barrier_linear", "fraction"), "loss_barrier_linear": ("loss_barrier_linear", "length")}


# --- frames -----------------------------------------------------------------------------------------------------------

def paths(store: Store, rows: Rows) -> pd.DataFrame:
    """One row a path: the place, error_barrier, loss_barrier, stable, and from its curves error_barrier_linear and
    loss_barrier_linear; failed, key. A path without a result stays, with NaN; one that is not made is left out."""
    table = frame(store, rows, "path")
    found = {key: _linear(store.get(key)) for key in table.loc[table["failed"].isna(), "key"]}
    none = (float("nan"), float("nan"))
    columns = {name: [found.get(key, none)[i] for key in table["key"]]
               for i, name in enumerate(("error_barrier_linear", "loss_barrier_linear"))}
    return table.assign(**{name: pd.Series(values, index=table.index, dtype=float) for name, values in columns.items()})


def _linear(artifact: Artifact) -> tuple[float, float]:
    tensors = artifact.tensors
    if not {"alphas", "errors", "losses"} <= set(tensors):
        return float("nan"), float("nan")
    return barrier_linear(tensors["alphas"], tensors["errors"]), barrier_linear(tensors["alphas"], tensors["losses"])


def layers(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each pair and layer. Columns: the place, layer (its name), position (from the input, 0 first), barrier and
    loss_barrier of moving this layer alone, others_barrier and others_loss_barrier of moving all but this one; failed, key.

    Layers move one by one, as in Adilova et al. 2023, arXiv 2307.06966. The barrier is the highest value on the way minus the
    mean of both children (:func:`dpkit.barriers.barrier_over`), not of the way's ends, whose second one is a network of layers of
    both that nobody trained. It may be below 0. Pairs that are not made or have no result are left out.
    """
    rows, records = list(rows), []
    for place, key in rows:
        if not store.has(key) or store.get(key).failed:
            continue
        artifact = store.get(key)
        ends = {"errors": artifact.tensors["end_errors"], "losses": artifact.tensors["end_losses"]}
        values = {name: (artifact.tensors[tensor], ends[tensor.removeprefix("others_")]) for name, tensor in (
            ("barrier", "errors"), ("loss_barrier", "losses"), ("others_barrier", "others_errors"),
            ("others_loss_barrier", "others_losses"))}
        for i, layer in enumerate(artifact.result["layers"]):
            found = {name: barrier_over(curves[i], of) for name, (curves, of) in values.items()}
            records.append({**place, "layer": layer, "position": i, **found, "failed": None, "key": key})
    names = dict.fromkeys([*(name for place, _ in rows for name in place), "layer", "position", "barrier", "loss_barrier",
                           "others_barrier", "others_loss_barrier", "failed", "key"])
    return pd.DataFrame.from_records(records, columns=list(names))


def onsets(table: pd.DataFrame) -> pd.DataFrame:
    """Where stability begins: one row for each arm, sparsity and initialisation.

    table: :func:`paths` with columns step and epochs, children that share their first steps. Columns: arm, percent, seed,
    stable_from, the first measured spawn step, in epochs, from which on the mean barrier of every measured step is below two
    points (NaN where that of the last one is not); stable_at_last, whether that of the last one is; failed. Stability begins
    somewhere after the measured step before this one, so stable_from is an upper bound by at most that distance.
    """
    found = []
    good = table[table["failed"].isna() & table["error_barrier"].notna()] if len(table) else table
    for place, part in good.groupby(["arm", "percent", "seed"], sort=False) if len(good) else ():
        means = part.groupby("epochs")["error_barrier"].mean().sort_index(ascending=False)
        since = float("nan")
        for epochs, value in means.items():
            if not is_stable(value):
                break
            since = float(epochs)
        found.append((*place, since, float(is_stable(means.iloc[0])), None))
    return pd.DataFrame(found, columns=["arm", "percent", "seed", "stable_from", "stable_at_last", "failed"])


def changes(before: pd.DataFrame, after: pd.DataFrame, column: str = "error_barrier") -> pd.DataFrame:
    """``column`` of ``after`` minus ``error_barrier`` of ``before`` for each pair of children that has both: rows of ``after``
    with columns change, before and key_before. Both: columns arm, percent, seed, pair, failed, key."""
    if not len(before) or not len(after):
        return pd.DataFrame(columns=[*after.columns, "before", "failed_before", "key_before", "change"])
    then = before[[*PAIR, "error_barrier", "failed", "key"]].rename(
        columns={"error_barrier": "before", "failed": "failed_before", "key": "key_before"})
    both = after.merge(then, on=PAIR)
    both = both[both["failed"].isna() & both["failed_before"].isna()]
    return both.assign(change=both[column] - both["before"])


# --- tables -----------------------------------------------------------------------------------------------------------

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
    ends and above the straight line between them, and the share of pairs that are stable. table: of :func:`paths`."""
    table = table.assign(stable=table["stable"].astype(float)) if len(table) else table
    heads = {"error, above the ends' mean": ("error_barrier", "points", 1.0),
             "error, above the line": ("error_barrier_linear", "points", 1.0),
             "stable: below 2 points": ("stable", "percent", 1.0),
             "loss, above the ends' mean": ("loss_barrier", "number", float("inf")),
             "loss, above the line": ("loss_barrier_linear", "number", float("inf"))}
    return _sheet({head: _text(table, *how) if len(table) else {} for head, how in heads.items()})


def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """What a 95% interval of the barrier rests on, as text, a row an arm and sparsity.

    Columns: barrier; initialisations and pairs behind it; Student, the interval of normal means of initialisations; bootstrap,
    that of initialisations drawn anew and children within them (:func:`dpkit.statistics.hierarchical_pairs_interval`); at most,
    how often the bootstrap's interval of so few of them can hold the centre (:func:`dpkit.statistics.attainable_coverage`).
    Both intervals are those of the printed numbers. table: of :func:`paths`.
    """
    heads = ("barrier", "initialisations", "pairs", "Student", "bootstrap", "at most")
    columns: dict[str, dict[tuple[str, int], str]] = {head: {} for head in heads}
    for (arm, percent), part in table.groupby(["arm", "percent"], sort=False) if len(table) else ():
        groups = pairs_of(part)
        if not groups:
            continue
        found, row = bootstrap(_bootstrap_name(arm, int(percent)), groups), averages(part, ["arm"], "error_barrier").iloc[0]
        several = found.initialisations > 1
        texts = (value_text(row["mean"], "points"), str(found.initialisations), str(found.values),
                 interval_text(row["mean"], max(0.0, row["low"]), min(1.0, row["high"]), "points") if several else "none",
                 interval_text(found.mean, found.low, found.high, "points") or "none",
                 f"{100 * attainable_coverage(found.initialisations):.3g}%" if several else "none")
        for head, text in zip(heads, texts, strict=True):
            columns[head][arm, int(percent)] = text
    return _sheet(columns)


# --- bootstrap --------------------------------------------------------------------------------------------------------

def pairs_of(table: pd.DataFrame, column: str = "error_barrier") -> dict[int, dict[tuple[str, str], float]]:
    """For each initialisation with a result ``column`` of each pair of children, ``0-1`` as (0, 1), both in their order."""
    good = table[table["failed"].isna() & table[column].notna()]
    sides = {seed: sorted(zip(part["pair"], part[column], strict=True)) for seed, part in good.groupby("seed")}
    return {int(seed): {tuple(pair.split("-")): float(value) for pair, value in values} for seed, values in sides.items()}


def bootstrap(name: str, groups: Mapping[int, Mapping[tuple[str, str], float]]) -> Bootstrap:
    """The mean over initialisations with its hierarchical bootstrap interval; draws belong to the number called ``name``."""
    return hierarchical_pairs_interval([groups[seed] for seed in sorted(groups)], generator_for(name, "bootstrap"), level=LEVEL,
                                       draws=DRAWS)


def _bootstrap_name(arm: str, percent: int) -> str:
    return f"connectivity.{arm}.barrier_bootstrap{suffix(percent)}"


def bootstrap_number(store: Store, name: str, table: pd.DataFrame, column: str = "error_barrier") -> Number | None:
    """As :func:`dpkit.report.numbers.number`, with the interval of :func:`bootstrap`; None where no pair has a result."""
    groups, keys = pairs_of(table, column), by_seed(table[table[column].notna()], column)[1]
    if not groups:
        return None
    spec = {"name": name, "kind": "hierarchical bootstrap of pairs", "level": LEVEL, "draws": DRAWS, "seeds": sorted(groups)}
    parents = {str(i): key for i, key in enumerate(sorted(set(keys)))}
    key = key_for("number", 1, spec, parents)
    if not store.has(key):
        found = bootstrap(name, groups)
        values = [value for seed in sorted(groups) for value in groups[seed].values()]
        store.put(key, stage="number", version=1, spec=spec, parents=parents, seconds=0.0, label=name,
                  tensors={"values": torch.tensor(values, dtype=torch.float64)},
                  result={"value": found.mean, "n": found.initialisations, "low": found.low, "high": found.high})
    return Number(name, *(store.get(key).result[field] for field in ("value", "n", "low", "high")), key)


# --- numbers ----------------------------------------------------------------------------------------------------------

def numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """Numbers of the chapters ``connectivity``, ``alignment``, ``train_paths``, ``statistics``, ``instability``, ``layers`` and
    ``between``, all called ``connectivity.ARM.MEASURE@P``.

    ``barrier``, ``loss_barrier``, ``stable`` (share of pairs below two points), ``barrier_linear``, ``loss_barrier_linear``;
    ``barrier_bootstrap``, with the hierarchical bootstrap's interval; ``distilled_minus_ARM.barrier``, paired;
    ``aligned_barrier``, ``moved``, ``l2``, ``aligned_l2``, ``cosine``, ``disagreement``; ``aligned_difference``, minus before;
    ``train_barrier``, ``train_loss_barrier``, on training images, and ``train_difference`` (minus on test images);
    ``STATISTICS_barrier`` for each of :data:`STATISTICS`, and ``STATISTICS_difference`` (minus ``reestimate``);
    ``barrier_kSTEP`` of children that share their first STEP steps; ``stable_at_last``, the share of initialisations that are
    stable at the last measured step, and, where that is all of them, ``stable_from``, in epochs (:func:`onsets`);
    ``highest_layer_barrier``, of the layer that costs most when it moves alone, pair by pair, and ``layer_LAYER_barrier`` in
    networks of up to six layers; ``rounds_barrier`` between networks of successive rounds and ``solution_barrier`` from what the
    small set trained to a child, ``A_to_B.barrier`` between two arms, each with ``_linear``.
    """
    part = {name: list(chapters.get(name, ())) for name in (
        "connectivity", "alignment", "train_paths", "statistics", "instability", "layers", "between")}
    plain = paths(store, part["connectivity"])
    found = _connectivity(store, plain) + _alignment(store, part["alignment"], plain)
    found += _train(store, paths(store, part["train_paths"]), plain) + _statistics(store, paths(store, part["statistics"]))
    found += _instability(store, paths(store, part["instability"])) + _layers(store, layers(store, part["layers"]))
    return found + _between(store, paths(store, part["between"]))


def _has_result(table: pd.DataFrame) -> bool:
    return bool(len(table)) and not table["failed"].notna().all()


def _each(store: Store, table: pd.DataFrame, measures: Mapping[str, tuple[str, str]], label: str = "arm") -> list[Number]:
    """A number for each place and measure: name -> (column, kind). Rows in which a column is not defined are left out of it."""
    found: list[Number] = []
    for measure, (column, kind) in measures.items() if _has_result(table) else ():
        chapter = Collector(store, "connectivity", table[table[column].notna()], label)
        for name, percent in chapter.places():
            chapter.add(name, percent, measure, column, kind)
        found += chapter.found
    return found


def _connectivity(store: Store, table: pd.DataFrame) -> list[Number]:
    if not _has_result(table):
        return []
    chapter = Collector(store, "connectivity", table.assign(stable=table["stable"].astype(float)))
    for name, percent in chapter.places():
        chapter.add(name, percent, "barrier", "error_barrier")
        chapter.add(name, percent, "loss_barrier", "loss_barrier", "mean")
        chapter.add(name, percent, "stable", "stable")
        if name not in ("dense", "distilled"):
            chapter.compare(("distilled", percent), (name, percent), "barrier", "error_barrier")
    found = chapter.found + _each(store, table, LINEAR)
    if "pair" in table:
        found += [n for name, percent in chapter.places()
                  if (n := bootstrap_number(store, _bootstrap_name(name, percent), chapter.rows(name, percent)))]
    return found


def _alignment(store: Store, rows: Rows, before: pd.DataFrame) -> list[Number]:
    """Pairs of children with their channels matched, how far they are apart, and what matching changed."""
    table = frame(store, rows, "alignment")
    if not _has_result(table):
        return []
    chapter = Collector(store, "connectivity", table)
    for name, percent in chapter.places():
        for column, kind in (("aligned_barrier", "fraction"), ("moved", "fraction"), ("l2", "length"),
                             ("aligned_l2", "length"), ("cosine", "cosine"), ("disagreement", "fraction")):
            chapter.add(name, percent, column, column, kind)
    return chapter.found + _changed(store, changes(before, table, "aligned_barrier"), "aligned_difference")


def _changed(store: Store, both: pd.DataFrame, measure: str) -> list[Number]:
    # a row for each artifact that counts, so that the number leads back to both
    return _each(store, pd.concat([both, both.assign(key=both["key_before"])], ignore_index=True), {measure: ("change", "mean")})


def _train(store: Store, table: pd.DataFrame, test: pd.DataFrame) -> list[Number]:
    return (_each(store, table, {f"train_{measure}": how for measure, how in PLAIN.items()})
            + _changed(store, changes(test, table), "train_difference"))


def _statistics(store: Store, table: pd.DataFrame) -> list[Number]:
    found: list[Number] = []
    for name in STATISTICS if len(table) else ():
        part, default = (table[table["statistics"] == which] for which in (name, STATISTICS[0]))
        found += _each(store, part, {f"{name}_barrier": PLAIN["barrier"]})
        if name != STATISTICS[0]:
            found += _changed(store, changes(default, part), f"{name}_difference")
    return found


def _instability(store: Store, table: pd.DataFrame) -> list[Number]:
    found: list[Number] = []
    for step in sorted(set(table["step"])) if len(table) else ():
        found += _each(store, table[table["step"] == step], {f"barrier_k{int(step)}": PLAIN["barrier"]})
    for (arm, percent), part in onsets(table).groupby(["arm", "percent"], sort=False):
        keys = by_seed(table[(table["arm"] == arm) & (table["percent"] == percent)], "error_barrier")[1]
        for measure, kind in (("stable_at_last", "fraction"), ("stable_from", "length")):
            if part[measure].notna().all():  # the mean of those that become stable would say that all do
                found.append(number(store, f"connectivity.{arm}.{measure}{suffix(int(percent))}",
                                    part.set_index("seed")[measure].to_dict(), keys, kind))
    return found


def _layers(store: Store, table: pd.DataFrame) -> list[Number]:
    if not len(table):
        return []
    highest = table.loc[table.groupby("key", sort=False)["barrier"].idxmax()]
    found, names = _each(store, highest, {"highest_layer_barrier": ("barrier", "mean")}), list(dict.fromkeys(table["layer"]))
    for name in names if len(names) <= FEW_LAYERS else ():
        measure = f"layer_{name.removesuffix('.weight').replace('.', '_')}_barrier"
        found += _each(store, table[table["layer"] == name], {measure: ("barrier", "mean")})
    return found


def _between(store: Store, table: pd.DataFrame) -> list[Number]:
    if not len(table):
        return []
    measures, found = {"barrier": PLAIN["barrier"], "barrier_linear": LINEAR["barrier_linear"]}, []
    for relation in ("rounds", "solution"):
        found += _each(store, table[table["relation"] == relation], {f"{relation}_{name}": how for name, how in measures.items()})
    arms = table[table["relation"] == "arms"]
    return found + _each(store, arms.assign(both=arms["arm"] + "_to_" + arms["other"]), measures, "both")

