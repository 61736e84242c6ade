"""What small sets teach against what the masks do that they find: made-up artifacts in a real store, worked out by hand."""
from __future__ import annotations

import pandas as pd
import pytest
from test_report_curvature import put

from dpkit import report
from dpkit.report import connectivity, curvature, ledger, overlap, robustness, set_masks
from dpkit.report.curvature import correlation_interval
from dpkit.statistics import rank_correlation
from dpkit.store import Store
from dpkit.tree import generator_for

ARMS = ("herding", "random_real", "dm", "distilled")  # from the set that teaches least to the one that teaches most


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def made(store: Store, seeds: int = 3, arms: tuple[str, ...] = ARMS) -> dict[str, list]:
    """Within an initialisation a set that teaches more finds better and, at 89%, less stable tickets; later initialisations
    do worse in everything, so that over all of them together the order would be mixed."""
    sets, tickets, paths = [], [], []
    for seed in range(seeds):
        for i, arm in enumerate(arms):
            name = set_masks.set_of(arm)
            place = {"set": name, "seed": seed}
            sets.append((place, put(store, "network", f"on {place}", {"error": 0.5 - 0.02 * i + 0.1 * seed})))
        for i, arm in enumerate((*arms, "imp", "random")):
            for percent in (59, 89):
                where = {"arm": arm, "round": 2, "percent": percent, "seed": seed}
                for child in (0, 1):
                    place = {**where, "child": child}
                    error = 0.2 - 0.01 * i + 0.05 * seed + 0.003 * child
                    tickets.append((place, put(store, "network", f"{place}", {"error": error})))
                place = {**where, "pair": "0-1"}
                barrier = 0.05 * seed + 0.01 * (i if percent == 89 else -i) + 0.1
                paths.append((place, put(store, "path", f"{place}", {"error_barrier": barrier, "stable": False})))
    sets.append(({"set": "all_data", "seed": 0}, put(store, "network", "all data", {"error": 0.01})))
    return {"distillation": sets, "tickets": tickets, "connectivity": paths}


def test_sets_are_ranked_within_initialisations(store, monkeypatch):
    parts = made(store)
    found = {n.name: n for n in set_masks.numbers(store, parts)}
    assert {name: round(n.value, 9) for name, n in found.items()} == {
        "tickets.set_accuracy.rank_correlation@59": 1, "connectivity.set_accuracy.rank_correlation@59": -1,
        "tickets.set_accuracy.rank_correlation@89": 1, "connectivity.set_accuracy.rank_correlation@89": 1}
    assert {n.n for n in found.values()} == {3}
    for room in (connectivity, curvature, ledger, overlap, robustness):  # which want more of a ticket than these have
        monkeypatch.setattr(room, "numbers", lambda *_: [])
    assert set(found) <= {n.name for n in report.all_numbers(store, parts)}
    assert report.number_text(found["connectivity.set_accuracy.rank_correlation@59"].record(), "value") == "−1.00"
    used = {artifact.key for _, _, artifact in store.lineage(found["connectivity.set_accuracy.rank_correlation@59"].key)}
    theirs = {key for place, key in parts["connectivity"] if place["arm"] in ARMS and place["percent"] == 59}
    taught = {key for place, key in parts["distillation"] if place["set"] != "all_data"}
    assert used == theirs | taught | {found["connectivity.set_accuracy.rank_correlation@59"].key}
    assert {n.name: n for n in set_masks.numbers(store, parts)} == found


def test_sets_without_mosaics_are_ranked_by_themselves(store):
    parts = made(store, arms=("el2n", *ARMS))
    # of all five IDC's finds the tickets that are the least accurate
    parts["tickets"] = [(place, put(store, "network", f"worse {place}", {"error": 0.9}) if place["arm"] == "distilled" else key)
                        for place, key in parts["tickets"]]
    found = {n.name: n.value for n in set_masks.numbers(store, parts)}
    assert found["tickets.set_accuracy.rank_correlation_without_idc@89"] == pytest.approx(1)
    assert found["tickets.set_accuracy.rank_correlation@89"] < 0.5
    assert len(found) == 8


def test_interval_is_the_wider_of_two(store):
    parts = made(store)
    for i, (place, _) in enumerate(parts["connectivity"]):
        if place["arm"] == "dm":
            parts["connectivity"][i] = place, put(store, "path", f"moved {place}", {"error_barrier": 0.04 * place["seed"]})
    frames = [report.frame(store, rows) for rows in parts.values()]
    table = set_masks.matched(*frames)
    some = table[table["percent"] == 59]
    name = "connectivity.set_accuracy.rank_correlation@59"
    found = {n.name: n for n in set_masks.numbers(store, parts)}[name]
    asked = rank_correlation(some["set_accuracy"].tolist(), some["barrier"].tolist(), some["seed"].tolist(),
                             generator_for(name, "bootstrap"), strata=some["seed"].tolist())
    assert (found.value, (found.low, found.high)) == (asked.value, correlation_interval(asked))
    assert -1 < found.value < 0


def test_what_is_not_there_or_failed_is_left_out(store):
    parts = made(store)
    parts["tickets"] = [(place, put(store, "network", f"failed {place}", None) if place["arm"] == "dm" and place["seed"] == 1
                         else key) for place, key in parts["tickets"]]
    parts["distillation"] = [row for row in parts["distillation"] if row[0] != {"set": "herding", "seed": 2}]
    table = set_masks.matched(*(report.frame(store, rows) for rows in parts.values()))
    assert len(table) == 2 * (12 - 2)
    assert not len(table[(table["set"] == "dm") & (table["seed"] == 1)])
    first = table[(table["set"] == "herding") & (table["seed"] == 0) & (table["percent"] == 59)].iloc[0]
    assert first[["set_accuracy", "accuracy", "barrier"]].tolist() == pytest.approx([0.5, 0.8 - 0.0015, 0.1])
    assert set_masks.numbers(store, {**parts, "connectivity": []}) == []
    assert set_masks.numbers(store, {}) == []


def test_few_sets_or_equal_ones_give_no_correlation(store):
    assert set_masks.numbers(store, made(store, arms=ARMS[1:])) == []
    table = pd.DataFrame({"set": list("abcd"), "seed": 0, "percent": 59, "set_accuracy": [0.1, 0.2, 0.3, 0.4], "barrier": 0.2})
    assert set_masks.correlation(table, "barrier") is None
