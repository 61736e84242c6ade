"""How much the arms' masks agree: tidy frames from the comparisons in the store, and their numbers.

Overlap is the Jaccard index of the kept weights, |A and B| / |A or B|. Two random masks of these densities overlap as well, so
what is compared between arms is the excess over chance, (J - J_c) / (1 - J_c): 0 at the chance level, 1 for equal masks, negative
for masks that avoid one another (the form of Cohen's kappa, 1960).
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from dpkit.report.arms import called
from dpkit.report.numbers import Collector, Number, Rows
from dpkit.store import Artifact, Store

ALL = "all"  # in the column layer: all layers together
EARLY = 0.1  # share of the training after which an early-bird mask is looked at
PAIR = ["round", "percent", "seed", "arm_a", "arm_b", "layer", "size", "kept_a", "kept_b", "both", "jaccard", "jaccard_chance",
        "jaccard_within", "excess", "excess_within", "hamming", "hamming_chance", "hamming_within", "failed", "key"]
LAYER = ["round", "percent", "seed", "arm", "layer", "size", "kept", "density", "sparsity", "unique", "unique_share",
         "effective", "effective_sparsity", "dead_share", "flops_kept", "failed", "key"]
STEPS = ["source", "percent", "seed", "step_a", "step_b", "distance", "failed", "key"]


def excess(jaccard: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(J - J_c) / (1 - J_c); NaN where chance alone makes the masks equal, as where both keep everything."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1, (jaccard - chance) / (1 - chance), np.nan)


def _made(store: Store, rows: Rows) -> Iterator[tuple[Mapping[str, Any], Artifact]]:
    for place, key in rows:
        if store.has(key) and not store.get(key).failed:
            yield place, store.get(key)


def _table(parts: Iterable[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    parts = list(parts)
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _with_sum(counts: np.ndarray) -> np.ndarray:
    """(..., L) with the sum as one more entry: all layers together."""
    return np.concatenate([counts, counts.sum(-1, keepdims=True)], -1)


def overlaps(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each comparison, pair of arms (in the order of the comparison) and layer (``all``: the whole mask).

    Columns (:data:`PAIR`): the place; size, kept_a, kept_b and both, counts; jaccard and hamming (share of positions that
    differ), in [0, 1], and what chance gives at these densities; ``_within``, for the whole mask only: chance when each
    layer's density is given; excess and excess_within over these. Comparisons that are not made are left out.
    """
    return _table((_pairs(place, found) for place, found in _made(store, rows)), PAIR)


def _pairs(place: Mapping[str, Any], found: Artifact) -> pd.DataFrame:
    t = {name: tensor.double().numpy() for name, tensor in found.tensors.items()}
    names, layers = np.array(found.result["arms"], dtype=object), [*found.result["tensors"], ALL]
    a, b = np.triu_indices(len(names), 1)
    kept, both, every = _with_sum(t["kept"]), _with_sum(t["both"]), len(layers)
    values = {name: t[name][a, b].ravel() for name in ("jaccard", "hamming", "jaccard_chance", "hamming_chance")}
    for name in ("jaccard_within", "hamming_within"):
        whole = np.full((len(a), every), np.nan)
        whole[:, -1] = t[name][a, b]
        values[name] = whole.ravel()
    counts = {"size": np.tile(_with_sum(np.array(found.result["sizes"])), len(a)), "kept_a": kept[a].ravel(),
              "kept_b": kept[b].ravel(), "both": both[a, b].ravel()}
    return pd.DataFrame({
        "arm_a": np.repeat(names[a], every), "arm_b": np.repeat(names[b], every), "layer": np.tile(layers, len(a)),
        **{name: value.astype(np.int64) for name, value in counts.items()}, **values,
        "excess": excess(values["jaccard"], values["jaccard_chance"]),
        "excess_within": excess(values["jaccard"], values["jaccard_within"])}).assign(**place, failed=None, key=found.key)


def layers(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each comparison, arm and layer (``all``: the whole mask).

    Columns (:data:`LAYER`): the place; size, kept, unique (weights that no other arm of the comparison keeps) and effective
    (kept weights on a path from input to output), counts; density = kept / size, sparsity = 1 - density, unique_share =
    unique / kept, effective_sparsity = 1 - effective / size, dead_share = 1 - effective / kept; flops_kept, the share of the
    dense forward pass's multiply-adds that the kept weights do. All in [0, 1].
    """
    return _table((_arms(place, found) for place, found in _made(store, rows)), LAYER)


def _arms(place: Mapping[str, Any], found: Artifact) -> pd.DataFrame:
    t = {name: tensor.double().numpy() for name, tensor in found.tensors.items()}
    names, every = found.result["arms"], [*found.result["tensors"], ALL]
    size, kept, effective = _with_sum(np.array(found.result["sizes"])), _with_sum(t["kept"]), _with_sum(t["effective"])
    density = kept / size
    work = (density[:, :-1] * t["work"]).sum(1, keepdims=True) / t["work"].sum()
    with np.errstate(invalid="ignore"):  # a layer in which nothing is kept has no shares
        values = {"size": np.broadcast_to(size, kept.shape).astype(np.int64), "kept": kept.astype(np.int64), "density": density,
                  "sparsity": 1 - density, "unique": t["unique"].astype(np.int64), "unique_share": t["unique"] / kept,
                  "effective": effective.astype(np.int64), "effective_sparsity": 1 - effective / size,
                  "dead_share": 1 - effective / kept, "flops_kept": np.concatenate([density[:, :-1], work], 1)}
    return pd.DataFrame({"arm": np.repeat(np.array(names, dtype=object), len(every)), "layer": np.tile(every, len(names)),
                         **{name: value.ravel() for name, value in values.items()}}).assign(**place, failed=None, key=found.key)


def early_bird(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each pair of kept steps of each watched training. Columns (:data:`STEPS`): the place (source, percent, seed),
    step_a, step_b, and distance, the share of weights in which the two magnitude masks differ, in [0, 1]."""
    parts = []
    for place, found in _made(store, rows):
        steps = found.result["steps"]
        parts.append(pd.DataFrame({"step_a": np.repeat(steps, len(steps)), "step_b": np.tile(steps, len(steps)),
                                   "distance": found.tensors["distance"].double().numpy().ravel()}).assign(
                                       **place, failed=None, key=found.key))
    return _table(parts, STEPS)


def last_distances(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`early_bird` that compare an early mask with the last: those of the first kept step that is not before
    10% of the last step, against the last step. A training of which no step before the last is kept from there on has none."""
    parts = []
    for _, part in table.groupby(["source", "percent", "seed"], sort=False):
        last = part["step_a"].max()
        early = part.loc[part["step_a"] >= EARLY * last, "step_a"].min()
        parts.append(part[(part["step_a"] == early) & (part["step_b"] == last) & (early < last)])
    return pd.concat(parts, ignore_index=True) if parts else table.iloc[:0]


def with_arm(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The pairs of ``overlaps`` that ``arm`` is in, from its side: column ``arm`` is the other one."""
    mine = table[(table["arm_a"] == arm) | (table["arm_b"] == arm)]
    return mine.assign(arm=mine["arm_a"].where(mine["arm_b"] == arm, mine["arm_b"]))


def collapsed(table: pd.DataFrame) -> str:
    """Which arms lost whole layers, in a sentence: no signal passes a layer without weights, unless a shortcut leads round it.

    table: of :func:`layers`.
    """
    gone = table[(table["layer"] != ALL) & (table["kept"] == 0)]
    if not len(gone):
        return "Layer collapse: no arm lost all weights of a layer at any measured sparsity."
    parts = []
    for (arm, percent), part in gone.groupby(["arm", "percent"], sort=False):
        of = table[(table["arm"] == arm) & (table["percent"] == percent)]["seed"].nunique()
        parts.append(f"{called(arm)} at {percent}% ({', '.join(sorted(set(part['layer'])))}; {part['seed'].nunique()} of {of} "
                     "initialisations)")
    return f"Layer collapse, layers that lost all their weights: {'; '.join(parts)}."


def numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """Numbers of the chapters ``masks`` and ``early_bird``.

    ``masks.A_with_B.jaccard@P``, with ``_excess`` and ``_excess_within``, and ``.hamming@P``, for B of ``imp`` and ``distilled``;
    ``masks.chance.jaccard@P``, what two random masks of this sparsity share; ``A_with_imp_minus_random_real_with_imp``, paired;
    ``masks.ARM.effective_sparsity@P``, ``.unique@P`` (share of its kept weights), ``.flops_kept@P``; and
    ``masks.early_bird.SOURCE.last_distance@P`` (:func:`last_distances`).
    """
    rows = list(chapters.get("masks", ()))
    pairs, arms = overlaps(store, rows), layers(store, rows)
    pairs, arms = pairs[pairs["layer"] == ALL], arms[arms["layer"] == ALL]
    sides = [with_arm(pairs, to).assign(to=to) for to in ("imp", "distilled")]
    sides[1] = sides[1][sides[1]["arm"] != "imp"]  # overlap has no direction
    named = pd.concat(sides, ignore_index=True)
    found = Collector(store, "masks", named.assign(pair=named["arm"] + "_with_" + named["to"]), "pair")
    measures = {"jaccard": ("jaccard", "fraction"), "jaccard_excess": ("excess", "mean"),
                "jaccard_excess_within": ("excess_within", "mean"), "hamming": ("hamming", "fraction")}
    whole = found.table
    for measure, (column, kind) in measures.items():
        found.table = whole[whole[column].notna()]
        for name, percent in found.places():
            found.add(name, percent, measure, column, kind)
            if measure == "jaccard_excess" and name.endswith("_with_imp") and name != "random_real_with_imp":
                found.compare((name, percent), ("random_real_with_imp", percent), measure, column)
    # all arms keep as many weights, so the level is one for all pairs
    chance = Collector(store, "masks", pairs.drop_duplicates(["percent", "seed"]).assign(pair="chance"), "pair")
    for name, percent in chance.places():
        chance.add(name, percent, "jaccard", "jaccard_chance")
    each = Collector(store, "masks", arms)
    for name, percent in each.places():
        for measure, column in (("effective_sparsity", "effective_sparsity"), ("unique", "unique_share"),
                                ("flops_kept", "flops_kept")):
            each.add(name, percent, measure, column)
    watched = early_bird(store, list(chapters.get("early_bird", ())))
    early = Collector(store, "masks.early_bird", last_distances(watched), "source")
    for name, percent in early.places():
        early.add(name, percent, "last_distance", "distance")
    return found.found + chance.found + each.found + early.found
