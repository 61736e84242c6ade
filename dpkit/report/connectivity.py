"""Frames and numbers of linear connectivity: what lies between two networks, under every definition and condition.

A barrier of error is a fraction, one of loss is in nats; all are 0 or more. ``barrier`` alone means the highest value on the
path minus the mean of its ends; ``barrier_linear`` the largest excess over the line between the ends (:mod:`dpkit.barriers`).
They differ where the ends do: half the difference of the ends is in the first, nothing of it in the second.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch

from dpkit.barriers import barrier_linear, barrier_over, excess, is_stable, possible_rise
from dpkit.report import apart
from dpkit.report.frames import frame
from dpkit.report.numbers import LEVEL, Collector, Number, by_seed, number, suffix
from dpkit.report.pairs import changed_numbers, changes, each_number, has_result
from dpkit.statistics import Bootstrap, hierarchical_pairs_interval
from dpkit.store import Artifact, Store, key_for
from dpkit.tree import generator_for

Rows = Iterable[tuple[Mapping[str, Any], str]]

#: how BatchNorm gets its statistics between two networks, the default first
STATISTICS = ("reestimate", "interpolate", "repair")
FEW_LAYERS = 6  # so many layers have a number each
DRAWS = 10_000  # of a bootstrap
PLAIN = {"barrier": ("error_barrier", "fraction"), "loss_barrier": ("loss_barrier", "length")}
LINEAR = {"barrier_linear": ("error_barrier_linear", "fraction"), "loss_barrier_linear": ("loss_barrier_linear", "length")}


# --- frames -----------------------------------------------------------------------------------------------------------

def paths(store: Store, rows: Rows) -> pd.DataFrame:
    """One row a path: the place, error_barrier, loss_barrier, stable, and from its curves error_barrier_linear,
    loss_barrier_linear, and error_gap and loss_gap, by how much either barrier may be too low at its points
    (:func:`dpkit.barriers.possible_rise`); points; failed, key. A path without a result stays, with NaN; one that is not made is
    left out."""
    table = frame(store, rows, "path")
    found = {key: _curves(store.get(key)) for key in table.loc[table["failed"].isna(), "key"]}
    columns = {name: [found.get(key, {}).get(name, float("nan")) for key in table["key"]]
               for name in ("error_barrier_linear", "loss_barrier_linear", "error_gap", "loss_gap", "points")}
    return table.assign(**{name: pd.Series(values, index=table.index, dtype=float) for name, values in columns.items()})


def _curves(artifact: Artifact) -> dict[str, float]:
    """What the points of a path say besides its stored results; nothing of one without finite values."""
    tensors = artifact.tensors
    if not {"alphas", "errors", "losses"} <= set(tensors):
        return {}
    alphas, found = tensors["alphas"], {"points": float(len(tensors["alphas"]))}
    for name in ("error", "loss"):
        values = tensors["errors" if name == "error" else "losses"]
        if bool(torch.isfinite(values).all()):
            found[f"{name}_barrier_linear"] = barrier_linear(alphas, values)
            found[f"{name}_gap"] = max(float(possible_rise(alphas, v).max()) for v in (values, excess(alphas, values)))
    return found


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
    points (NaN where that of the last one is not); unstable_at, the measured step before it, after which stability begins (the
    same one where it is the first); stable_at_last, whether the mean barrier of the last step is below two points; failed. So
    stability begins in the interval (unstable_at, stable_from], of which the end is an upper bound.
    """
    found = []
    good = table[table["failed"].isna() & table["error_barrier"].notna()] if len(table) else table
    for place, part in good.groupby(["arm", "percent", "seed"], sort=False) if len(good) else ():
        means = part.groupby("epochs")["error_barrier"].mean().sort_index(ascending=False)
        since = before = float("nan")
        for epochs, value in means.items():
            if not is_stable(value):
                before = float(epochs)
                break
            since = before = float(epochs)
        found.append((*place, since, before, float(is_stable(means.iloc[0])), None))
    return pd.DataFrame(found, columns=["arm", "percent", "seed", "stable_from", "unstable_at", "stable_at_last", "failed"])


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


def bootstrap_name(arm: str, percent: int) -> str:
    """The number of the barrier with the interval of :func:`bootstrap`."""
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
    """Numbers of the chapters ``connectivity``, ``alignment``, ``starts``, ``train_paths``, ``statistics``, ``instability``,
    ``layers`` and ``between``, all called ``connectivity.ARM.MEASURE@P``.

    ``barrier``, ``loss_barrier``, ``stable`` (share of pairs below two points), ``barrier_linear``, ``loss_barrier_linear``;
    ``barrier_bootstrap``, with the hierarchical bootstrap's interval; ``distilled_minus_ARM.barrier``, paired;
    those of matched channels, of distances and of churn (:func:`dpkit.report.apart.numbers`);
    ``train_barrier``, ``train_loss_barrier``, on training images, and ``train_difference`` (minus on test images);
    ``STATISTICS_barrier`` for each of :data:`STATISTICS`, and ``STATISTICS_difference`` (minus ``reestimate``);
    ``barrier_kSTEP`` of children that share their first STEP steps; ``stable_at_last``, the share of initialisations that are
    stable at the last measured step, and, where that is all of them, ``stable_from``, in epochs (:func:`onsets`), whose low and
    high hold what is known of all of them;
    ``highest_layer_barrier``, of the layer that costs most when it moves alone, pair by pair, and ``layer_LAYER_barrier`` in
    networks of up to six layers; ``rounds_barrier`` between networks of successive rounds and ``solution_barrier`` from what the
    small set trained to a child, ``A_to_B.barrier`` between two arms, each with ``_linear``.
    """
    part = {name: list(chapters.get(name, ())) for name in (
        "connectivity", "alignment", "starts", "train_paths", "statistics", "instability", "layers", "between")}
    plain = paths(store, part["connectivity"])
    found = _connectivity(store, plain) + apart.numbers(store, part["alignment"], plain) + apart.starts(store, part["starts"])
    found += _train(store, paths(store, part["train_paths"]), plain) + _statistics(store, paths(store, part["statistics"]))
    found += _instability(store, paths(store, part["instability"])) + _layers(store, layers(store, part["layers"]))
    return found + _between(store, paths(store, part["between"]))


def _connectivity(store: Store, table: pd.DataFrame) -> list[Number]:
    if not has_result(table):
        return []
    chapter = Collector(store, "connectivity", table.assign(stable=table["stable"].astype(float)))
    for name, percent in chapter.places():
        chapter.add(name, percent, "barrier", "error_barrier")
        chapter.add(name, percent, "loss_barrier", "loss_barrier", "mean")
        chapter.add(name, percent, "stable", "stable", "share")
        if name not in ("dense", "distilled"):
            chapter.compare(("distilled", percent), (name, percent), "barrier", "error_barrier")
    found = chapter.found + each_number(store, table, LINEAR)
    if "pair" in table:
        found += [n for name, percent in chapter.places()
                  if (n := bootstrap_number(store, bootstrap_name(name, percent), chapter.rows(name, percent)))]
    return found


def _train(store: Store, table: pd.DataFrame, test: pd.DataFrame) -> list[Number]:
    return (each_number(store, table, {f"train_{measure}": how for measure, how in PLAIN.items()})
            + changed_numbers(store, changes(test, table), "train_difference"))


def _statistics(store: Store, table: pd.DataFrame) -> list[Number]:
    found: list[Number] = []
    for name in STATISTICS if len(table) else ():
        part, default = (table[table["statistics"] == which] for which in (name, STATISTICS[0]))
        found += each_number(store, part, {f"{name}_barrier": PLAIN["barrier"]})
        if name != STATISTICS[0]:
            found += changed_numbers(store, changes(default, part), f"{name}_difference")
    return found


def _instability(store: Store, table: pd.DataFrame) -> list[Number]:
    found: list[Number] = []
    for step in sorted(set(table["step"])) if len(table) else ():
        found += each_number(store, table[table["step"] == step], {f"barrier_k{int(step)}": PLAIN["barrier"]})
    for (arm, percent), part in onsets(table).groupby(["arm", "percent"], sort=False):
        keys = by_seed(table[(table["arm"] == arm) & (table["percent"] == percent)], "error_barrier")[1]
        seeds = part.set_index("seed")
        found.append(number(store, f"connectivity.{arm}.stable_at_last{suffix(int(percent))}", seeds["stable_at_last"].to_dict(),
                            keys, "share"))
        if part["stable_from"].notna().all():  # the mean of those that become stable would say that all do
            found.append(_onset(store, f"connectivity.{arm}.stable_from{suffix(int(percent))}", seeds, keys))
    return found


def _onset(store: Store, name: str, seeds: pd.DataFrame, keys: list[str]) -> Number:
    """The mean of stable_from, which is known up to the step before: low and high hold what is known of all initialisations."""
    spec = {"name": name, "kind": "onset", "seeds": [int(seed) for seed in seeds.index]}
    parents = {str(i): key for i, key in enumerate(sorted(set(keys)))}
    key = key_for("number", 1, spec, parents)
    if not store.has(key):
        several = len(seeds) > 1
        store.put(key, stage="number", version=1, spec=spec, parents=parents, seconds=0.0, label=name,
                  tensors={"values": torch.tensor(seeds["stable_from"].tolist(), dtype=torch.float64)},
                  result={"value": float(seeds["stable_from"].mean()), "n": len(seeds),
                          "low": float(seeds["unstable_at"].min()) if several else None,
                          "high": float(seeds["stable_from"].max()) if several else None})
    return Number(name, *(store.get(key).result[field] for field in ("value", "n", "low", "high")), key)


def _layers(store: Store, table: pd.DataFrame) -> list[Number]:
    if not len(table):
        return []
    highest = table.loc[table.groupby("key", sort=False)["barrier"].idxmax()]
    found, names = each_number(store, highest, {"highest_layer_barrier": ("barrier", "mean")}), dict.fromkeys(table["layer"])
    for name in names if len(names) <= FEW_LAYERS else ():
        measure = f"layer_{name.removesuffix('.weight').replace('.', '_')}_barrier"
        found += each_number(store, table[table["layer"] == name], {measure: ("barrier", "mean")})
    return found


def _between(store: Store, table: pd.DataFrame) -> list[Number]:
    if not len(table):
        return []
    measures, found = {"barrier": PLAIN["barrier"], "barrier_linear": LINEAR["barrier_linear"]}, []
    for relation in ("rounds", "solution"):
        part = table[table["relation"] == relation]
        found += each_number(store, part, {f"{relation}_{name}": how for name, how in measures.items()})
    arms = table[table["relation"] == "arms"]
    return found + each_number(store, arms.assign(both=arms["arm"] + "_to_" + arms["other"]), measures, "both")

