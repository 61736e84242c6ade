"""Small sets and the masks that they find: does a set that teaches more find tickets that are better, or more stable?

One row is a small set of one initialisation: the accuracy of a network trained on the set, and what the tickets do that searches
with this set find. Sets are compared within an initialisation only, where all tickets start from the same weights.
"""
from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from dpkit.report.curvature import DRAWS, kept_correlation
from dpkit.report.frames import frame
from dpkit.report.numbers import LEVEL, Number, Rows, suffix
from dpkit.statistics import Correlation, rank_correlation
from dpkit.store import Store
from dpkit.tree import generator_for

FEWEST = 4  # sets of which a ranking says anything
#: what is ranked against a set's accuracy, by the chapter that it is a number of
RANKED = {"tickets": "accuracy", "connectivity": "barrier"}
MOSAICS = ("idc", "idc_soft")  # their images decode into several, so that they see more than the other sets


def set_of(arm: str) -> str:
    """The set that an arm's search trains on, as far as a name can say: IDC's for ``distilled``, else the arm's own."""
    return "idc" if arm == "distilled" else arm


def matched(sets: pd.DataFrame, tickets: pd.DataFrame, paths: pd.DataFrame) -> pd.DataFrame:
    """One row for each small set, initialisation and sparsity that has all three.

    sets: columns set, seed, error. tickets: arm, percent, seed, error, a row a child. paths: arm, percent, seed, error_barrier, a
    row a pair of children. All have ``failed``, and rows with a reason in it are left out. Columns: set, seed, percent,
    set_accuracy, accuracy and barrier, fractions, children and pairs averaged.
    """
    sets, tickets, paths = (table[table["failed"].isna()] for table in (sets, tickets, paths))
    taught = (1 - sets.groupby(["set", "seed"])["error"].mean()).rename("set_accuracy").reset_index()
    place = ["set", "percent", "seed"]
    accuracy, barrier = ((table.assign(set=table["arm"].map(set_of)).groupby(place)[column].mean())
                         for table, column in ((tickets, "error"), (paths, "error_barrier")))
    both = pd.concat({"accuracy": 1 - accuracy, "barrier": barrier}, axis=1, join="inner").reset_index()
    found = both.merge(taught, on=["set", "seed"])
    return found[["set", "seed", "percent", "set_accuracy", "accuracy", "barrier"]]


def correlation(table: pd.DataFrame, column: str, name: str = "") -> Correlation | None:
    """Spearman's correlation of ``set_accuracy`` with a column of :func:`matched` at one sparsity, within initialisations.

    name: of the number, whose draws these are. None with fewer than :data:`FEWEST` sets, or where nothing differs.
    """
    spread = table.groupby("seed")[["set_accuracy", column]].nunique()
    if table["set"].nunique() < FEWEST or not (spread.max() > 1).all():
        return None
    seeds = table["seed"].tolist()
    return rank_correlation(table["set_accuracy"].tolist(), table[column].tolist(), seeds, generator_for(name, "bootstrap"),
                            strata=seeds, level=LEVEL, draws=DRAWS)


def numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """``tickets.set_accuracy.rank_correlation@P`` and ``connectivity.set_accuracy.rank_correlation@P``: of what a network learns
    from a small set with the accuracy and the barrier of the tickets that the set finds; see :func:`correlation`. And
    ``rank_correlation_without_idc``, without :data:`MOSAICS`, where there are any."""
    parts = {part: frame(store, chapters.get(part, ()), stage) for part, stage in
             (("distillation", "network"), ("tickets", "network"), ("connectivity", "path"))}
    if not all(len(table) for table in parts.values()):
        return []
    table = matched(*parts.values())
    found = []
    for percent, some in table.groupby("percent"):
        rest = some[~some["set"].isin(MOSAICS)]
        for chapter, column in RANKED.items():
            name, at = f"{chapter}.set_accuracy.rank_correlation", suffix(int(percent))
            made = [_number(store, f"{name}{at}", some, column, parts, chapter)]
            if len(rest) < len(some):
                made.append(_number(store, f"{name}_without_idc{at}", rest, column, parts, chapter))
            found += [number for number in made if number is not None]
    return found


def _number(store: Store, name: str, table: pd.DataFrame, column: str, parts: Mapping[str, pd.DataFrame],
            chapter: str) -> Number | None:
    keys = _keys(table, parts["distillation"]) | _keys(table, parts[chapter])
    networks = [f"{one} {seed}" for one, seed in table[["set", "seed"]].itertuples(index=False)]
    return kept_correlation(store, name, "spearman correlation within initialisations", networks, keys,
                            table[["set_accuracy", column]], lambda: correlation(table, column, name))


def _keys(table: pd.DataFrame, part: pd.DataFrame) -> set[str]:
    """The keys of a chapter's rows that went into ``table``."""
    label = part["set"] if "set" in part else part["arm"].map(set_of)
    percent = part["percent"] if "percent" in part else pd.Series(0, index=part.index)
    wanted = set(zip(table["set"], table["seed"], table["percent"] if "percent" in part else [0] * len(table), strict=True))
    rows = pd.Series([place in wanted for place in zip(label, part["seed"], percent, strict=True)], index=part.index)
    return set(part[rows & part["failed"].isna()]["key"])
