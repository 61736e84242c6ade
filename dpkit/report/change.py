"""What another setting changes: the numbers of two studies, compared initialisation by initialisation.

Two settings of one profile start from the same initialisations where their networks have the same layers, and see the same orders
of batches. What such pairs have in common cancels in a difference of the two, as it does between two arms of one study.
"""
from __future__ import annotations

from collections.abc import Sequence

from dpkit.report.numbers import RANGES, Number, number
from dpkit.store import Store

COMPARED = ("mean", "ratio", *RANGES)  # kinds of numbers with one value for each initialisation


def changed(name: str) -> str:
    """The name of a change.

    >>> changed("tickets.imp.accuracy@67"), changed("connectivity.dense.barrier")
    ('tickets.imp.accuracy_change@67', 'connectivity.dense.barrier_change')
    """
    measure, at, percent = name.partition("@")
    return f"{measure}_change{at}{percent}"


def changes(store: Store, after: Sequence[Number], before: Sequence[Number]) -> list[Number]:
    """Each number of ``after`` minus that of the same name of ``before``; ratios over each other.

    Paired by the number of the initialisation; those that lack either are left out, and n says so. Numbers that are no means over
    initialisations (shares, bootstraps) are left out, and so are those that are the same artifact in both. Each change is an
    artifact with the two numbers as its parents.
    """
    old, found = {n.name: n.key for n in before}, []
    for new in after:
        if old.get(new.name, new.key) == new.key:
            continue
        sides = [values_of(store, key) for key in (new.key, old[new.name])]
        if None in sides:
            continue
        (kind, a), (_, b) = sides
        ratio, both = kind == "ratio", sorted(set(a) & set(b))
        if both:
            values = {seed: a[seed] / b[seed] if ratio else a[seed] - b[seed] for seed in both}
            found.append(number(store, changed(new.name), values, [new.key, old[new.name]], "ratio" if ratio else "mean"))
    return found


def values_of(store: Store, key: str) -> tuple[str, dict[int, float]] | None:
    """The kind of a number and its value at each initialisation; None where it has another form."""
    artifact = store.get(key)
    kind = artifact.meta["spec"].get("kind")
    if kind not in COMPARED:
        return None
    return kind, dict(zip(artifact.meta["spec"]["seeds"], artifact.tensors["values"].tolist(), strict=True))
