"""Numbers of pairs of networks: one for each place and measure, and what changed pair by pair."""
from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from dpkit.report.numbers import Collector, Number
from dpkit.store import Store

PAIR = ["arm", "percent", "seed", "pair"]


def has_result(table: pd.DataFrame) -> bool:
    """Whether any row of a frame has a result."""
    return bool(len(table)) and not table["failed"].notna().all()


def each_number(store: Store, table: pd.DataFrame, measures: Mapping[str, tuple[str, str]], label: str = "arm") -> list[Number]:
    """A number for each place and measure: name -> (column, kind). Rows in which a column is not defined are left out of it."""
    found: list[Number] = []
    for measure, (column, kind) in measures.items() if has_result(table) else ():
        chapter = Collector(store, "connectivity", table[table[column].notna()], label)
        for name, percent in chapter.places():
            chapter.add(name, percent, measure, column, kind)
        found += chapter.found
    return found


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


def changed_numbers(store: Store, both: pd.DataFrame, measure: str) -> list[Number]:
    """The mean ``change`` of :func:`changes` at each place."""
    # a row for each artifact that counts, so that the number leads back to both
    rows = pd.concat([both, both.assign(key=both["key_before"])], ignore_index=True)
    return each_number(store, rows, {measure: ("change", "mean")})
