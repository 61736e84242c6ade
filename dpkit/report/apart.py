"""How far apart two networks are: in their weights by layer, in what they say, before and after their channels are matched."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dpkit.report.frames import frame
from dpkit.report.numbers import Number
from dpkit.report.pairs import changed_numbers, changes, each_number, has_result
from dpkit.store import Store

Rows = Iterable[tuple[Mapping[str, Any], str]]

#: measures of a pair whose channels are matched: name of the number -> column, kind
MATCHED = {"aligned_barrier": ("aligned_barrier", "fraction"), "moved": ("moved", "fraction"), "l2": ("l2", "length"),
           "aligned_l2": ("aligned_l2", "length"), "cosine": ("cosine", "cosine"),
           "sparsity_between": ("sparsity_between", "fraction")}
#: what the share of images on which two networks disagree consists of, see :class:`dpkit.connectivity.Churn`
CHURN = {"churn_gains": "wrong first, right second", "churn_losses": "right first, wrong second",
         "churn_sideways": "wrong both times, differently"}
SAID = {name: (name, "fraction") for name in ("disagreement", *CHURN, "churn_needless")}
LAYERED = ("l2", "aligned_l2", "cosine", "sizes")  # tensors with a place a layer


def layers(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each pair and layer: the place, layer (name of its weight), position (from the input, 0 first), l2 and
    aligned_l2 (distance of the weights before and after matching), sizes (entries), step (the distance over the root of the
    entries), and cosine of the ways from the common start; failed, key. Pairs without a result are left out."""
    rows, records = list(rows), []
    for place, key in rows:
        if not store.has(key) or store.get(key).failed:
            continue
        artifact = store.get(key)
        for i, layer in enumerate(artifact.result["layers"]):
            found = {name: float(artifact.tensors[name][i]) for name in LAYERED}
            records.append({**place, "layer": layer, "position": i, **found, "step": found["l2"] / found["sizes"] ** 0.5,
                            "failed": None, "key": key})
    names = dict.fromkeys([*(name for place, _ in rows for name in place), "layer", "position", *LAYERED, "step", "failed",
                           "key"])
    return pd.DataFrame.from_records(records, columns=list(names))


def numbers(store: Store, rows: Rows, before: pd.DataFrame) -> list[Number]:
    """Pairs of children with their channels matched, how far they are apart, and what matching changed.

    ``connectivity.ARM.MEASURE@P`` for :data:`MATCHED`; ``aligned_difference``, the aligned barrier minus the one before;
    ``disagreement``, and of it ``churn_gains`` (wrong in the first child, right in the second), ``churn_losses``,
    ``churn_sideways``, and ``churn_needless``, what is more than the difference of both errors. before: of
    :func:`dpkit.report.connectivity.paths`, the same pairs.
    """
    table = frame(store, rows, "alignment")
    if not has_result(table):
        return []
    return each_number(store, table, MATCHED | SAID) + changed_numbers(
        store, changes(before, table, "aligned_barrier"), "aligned_difference")


def starts(store: Store, rows: Rows) -> list[Number]:
    """Dense networks of different initialisations, as ``connectivity.starts.MEASURE``: ``barrier``; those of :data:`MATCHED`;
    ``disagreement``; ``aligned_cosine``, of the weights once matched (``cosine`` is that before); ``aligned_difference``. Each
    initialisation is compared with the next one, so n counts pairs, and each start is in two of them."""
    rows = list(rows)
    plain = frame(store, [row for row in rows if not row[0]["matched"]], "path")
    table = frame(store, [row for row in rows if row[0]["matched"]], "alignment")
    found = each_number(store, plain, {"barrier": ("error_barrier", "fraction")})
    if not has_result(table):
        return found
    measures = MATCHED | {"aligned_cosine": ("aligned_cosine", "cosine"), "disagreement": SAID["disagreement"]}
    measures.pop("sparsity_between")  # there is no mask
    return found + each_number(store, table, measures) + changed_numbers(
        store, changes(plain, table, "aligned_barrier"), "aligned_difference")
