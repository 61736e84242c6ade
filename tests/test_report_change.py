"""What another setting changes, against differences worked out by hand."""
from __future__ import annotations

import math

import pytest

from dpkit import report
from dpkit.report import change, numbers
from dpkit.statistics import mean_interval, ratio_interval
from dpkit.store import Store, key_for


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def made(store: Store, name: str, values: dict[int, float], kind: str = "fraction", tag: str = "") -> report.Number:
    """A number of an artifact of its own."""
    key = key_for("fake", 1, {"name": name, "tag": tag}, {})
    if not store.has(key):
        store.put(key, stage="fake", version=1, spec={"name": name, "tag": tag}, parents={}, tensors={}, result={"x": 1},
                  seconds=0.0, label=name)
    return numbers.number(store, name, values, [key], kind)


def test_changes_are_paired_by_initialisation(store):
    after = made(store, "connectivity.imp.barrier@67", {0: 0.10, 1: 0.30, 2: 0.20}, tag="after")
    before = made(store, "connectivity.imp.barrier@67", {2: 0.15, 0: 0.02, 3: 0.9}, tag="before")
    (found,) = report.changes(store, [after], [before])
    differences = [0.10 - 0.02, 0.20 - 0.15]  # initialisations 0 and 2 have both
    mean, low, high = mean_interval(differences)
    assert found.name == "connectivity.imp.barrier_change@67"
    assert (found.value, found.n, found.low, found.high) == pytest.approx((mean, 2, low, high))
    assert set(store.get(found.key).meta["parents"].values()) == {after.key, before.key}
    (back,) = report.changes(store, [before], [after])
    assert back.value == pytest.approx(-mean)


def test_a_change_may_be_larger_than_its_measure_and_has_no_interval_for_one_initialisation(store):
    (found,) = report.changes(store, [made(store, "a.b.error", {0: 0.0}, tag="after")], [made(store, "a.b.error", {0: 1.0})])
    assert (found.value, found.n, found.low, found.high) == (-1.0, 1, None, None)
    after, before = made(store, "a.c.error", {0: 1.0, 1: 0.0}, tag="after"), made(store, "a.c.error", {0: 0.0, 1: 0.1})
    (wide,) = report.changes(store, [after], [before])
    assert wide.low < -1 < 1 < wide.high  # nothing is cut to [-1, 1], as nothing would be gained by it


def test_ratios_change_by_a_factor(store):
    after = made(store, "hessian.a_over_b.trace@50", {0: 2.0, 1: 9.0}, "ratio", "after")
    before = made(store, "hessian.a_over_b.trace@50", {0: 4.0, 1: 3.0}, "ratio", "before")
    (found,) = report.changes(store, [after], [before])
    value, low, high = ratio_interval([0.5, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high))
    assert found.value == pytest.approx(math.sqrt(1.5))


def test_only_what_differs_and_has_a_value_for_each_initialisation_is_compared(store):
    same = made(store, "tickets.dense.accuracy", {0: 0.9, 1: 0.8})
    share = [made(store, "connectivity.imp.stable@67", {0: 1.0, 1: value}, "share", str(value)) for value in (0.0, 1.0)]
    alone = made(store, "tickets.imp.accuracy@67", {0: 0.9})
    apart = [made(store, "tickets.ltr.accuracy@67", {seed: 0.9}, tag=str(seed)) for seed in (0, 1)]
    assert report.changes(store, [same, share[0], alone, apart[0]], [same, share[1], apart[1]]) == []


def test_names_of_changes_keep_their_sparsity():
    assert change.changed("tickets.distilled_minus_random.accuracy@89") == "tickets.distilled_minus_random.accuracy_change@89"
