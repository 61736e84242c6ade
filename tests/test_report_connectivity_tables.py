"""Tables of connectivity as text, and how far apart networks are, from made-up artifacts against values worked out by hand."""
from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from test_report_connectivity import ALPHAS, FLAT, HILL, MISSING, PAIRS, SLOPE, STEPS, hill, numbers, put, rows, spawned

from dpkit.connectivity import Path
from dpkit.report import apart, connectivity
from dpkit.report import format as formats
from dpkit.report.connectivity_tables import definitions, intervals, onset_table
from dpkit.report.tables import whole
from dpkit.statistics import attainable_coverage
from dpkit.store import Store, key_for


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


# --- tables -----------------------------------------------------------------------------------------------------------

def test_the_definitions_stand_side_by_side(store):
    table = definitions(connectivity.paths(store, rows(store, PAIRS)))
    assert list(table.index) == ["dense", "IMP, rewound to start, 67% sparse", "distilled pruning (IDC), 67% sparse"]
    # SLOPE is highest at its end: from 0.25 to 0.5 it rises by 0.2, so within the last half it may reach 0.8; over its line,
    # 0, 0, 0.1, 0, it may rise by a tenth more in the interval before its highest point
    assert table.iloc[2].tolist() == ["20.0 points (n = 1)", "10.0 points (n = 1)", "30.0 points", "0.0% (n = 1)", "2.00 (n = 1)",
                                      "1.00 (n = 1)", "3.00"]
    assert table.iloc[0, 0].startswith("25.0 points [0.0, ")  # no barrier is below zero
    # two initialisations, none stable: the exact limit is 1 - 0.025^(1/2)
    assert table.iloc[0, 3] == "0.0% [0.0, 84.2] (n = 2)"
    assert len(definitions(connectivity.paths(store, [MISSING]))) == 0


def test_what_may_be_missing_of_a_barrier_is_that_of_the_path(store):
    table = connectivity.paths(store, rows(store, {("imp", 67, 0): [FLAT, HILL, SLOPE], ("ltr", 67, 0): [None]}))
    for errors, error_gap, loss_gap, points in zip((FLAT, HILL, SLOPE), table["error_gap"], table["loss_gap"], table["points"],
                                                   strict=False):
        found = Path(ALPHAS, torch.tensor(errors).double(), 10 * torch.tensor(errors).double())
        assert (error_gap, loss_gap, points) == (pytest.approx(found.error_gap), pytest.approx(found.loss_gap), 4)
    assert math.isnan(table["error_gap"].iloc[3])


def test_a_stored_curve_that_is_not_finite_stops_no_table(store):
    place, key = rows(store, {("imp", 67, 0): [[0.1, 0.2, 0.3, 0.1]]})[0]
    broken = put(store, "overflown", [0.1, 0.2, 0.3, 0.1], losses=torch.tensor([1.0, math.inf, 1.0, 1.0]).double())
    table = connectivity.paths(store, [(place, key), (place | {"seed": 1}, broken)])
    assert table["error_barrier_linear"].notna().all()
    assert table["loss_barrier_linear"].isna().tolist() == [False, True]
    definitions(table)
    numbers(store, connectivity=[(place, key), (place | {"seed": 1}, broken)])


def test_where_stability_begins_is_an_interval_of_each_initialisation(store):
    table = onset_table(connectivity.paths(store, spawned(store, STEPS)))
    assert list(table.columns) == ["initialisation 0", "initialisation 1"]
    assert table.loc["dense"].tolist() == ["(1, 2]", "(0, 1]"]
    assert table.loc["IMP, rewound to start, 67% sparse"].tolist() == ["from the start", "not by 1"]
    assert len(onset_table(connectivity.paths(store, []))) == 0


def test_tables_show_all_their_rows_and_words():
    long = pd.DataFrame({"what": [f"row {i}, " + "a word " * 20 for i in range(88)]}, index=range(88))
    shown = whole(long)
    for text in (shown._repr_html_(), repr(shown)):
        assert "row 0," in text
        assert "row 43," in text
        assert "row 87," in text
        assert "..." not in text
        assert text.count("a word") == 88 * 20
    assert "overflow: auto" in shown._repr_html_()
    with pd.option_context("display.max_rows", 60):  # pandas' own default, whatever another test left behind
        assert "row 43," not in long._repr_html_()


def test_the_table_of_intervals_shows_those_of_the_numbers(store):
    made = rows(store, PAIRS)
    table, found = intervals(connectivity.paths(store, made)), numbers(store, connectivity=made)
    dense = table.loc["dense"]
    assert dense[["barrier", "initialisations", "pairs", "at most"]].tolist() == ["25.0 points", "2", "5", "50%"]
    assert attainable_coverage(2) == 0.5
    for column, name in (("Student", "dense.barrier"), ("bootstrap", "dense.barrier_bootstrap")):
        assert dense[column] == formats.number_text(found[name].record(), "interval")
    assert table.iloc[2].tolist() == ["20.0 points", "1", "1", "none", "none", "none"]
    assert len(intervals(connectivity.paths(store, []))) == 0


# --- how far apart ----------------------------------------------------------------------------------------------------

def matched(store: Store, place: dict, **result: float) -> tuple[dict, str]:
    """A pair of two layers whose channels were matched."""
    key = key_for("alignment", 2, {"place": place}, {})
    tensors = {"l2": torch.tensor([3.0, 4.0, 6.0]), "aligned_l2": torch.tensor([1.0, 2.0, 3.0]),
               "cosine": torch.tensor([0.5, 0.25, 0.4]), "sizes": torch.tensor([9, 4, 20])}
    plain = {"layers": ["conv0.weight", "classifier.weight"], "aligned_barrier": 0.1, "moved": 0.2, "l2": 6.0, "aligned_l2": 3.0,
             "cosine": 0.4, "sparsity_between": 0.3, "disagreement": 0.25, "churn_gains": 0.1, "churn_losses": 0.08,
             "churn_sideways": 0.07, "churn_needless": 0.23}
    store.put(key, stage="alignment", version=2, spec={"place": place}, parents={}, tensors=tensors, result=plain | result,
              seconds=1.0, label="alignment")
    return place, key


def test_distances_have_a_row_a_layer(store):
    made = [matched(store, {"arm": "imp", "round": 2, "percent": 67, "seed": seed, "pair": "0-1"}) for seed in range(2)]
    table = apart.layers(store, [*made, MISSING])
    assert table["layer"].tolist() == ["conv0.weight", "classifier.weight"] * 2
    assert table["l2"].tolist() == [3, 4] * 2
    assert table["step"].tolist() == [1, 2] * 2  # over the roots of 9 and 4 entries
    assert table["cosine"].tolist() == [0.5, 0.25] * 2
    assert list(apart.layers(store, [MISSING]).columns) == list(table.columns)
    found = numbers(store, alignment=made)
    assert {name: n.value for name, n in found.items()} == {f"imp.{name}@67": pytest.approx(value) for name, value in {
        "aligned_barrier": 0.1, "moved": 0.2, "l2": 6, "aligned_l2": 3, "cosine": 0.4, "sparsity_between": 0.3,
        "disagreement": 0.25, "churn_gains": 0.1, "churn_losses": 0.08, "churn_sideways": 0.07, "churn_needless": 0.23}.items()}
    assert {formats.kind_of(f"connectivity.imp.{name}@67") for name in apart.SAID} == {"percent"}


def test_networks_of_two_starts_have_numbers_before_and_after(store):
    made = []
    for seed, other in ((0, 1), (1, 2), (2, 0)):
        place = {"arm": "starts", "round": 0, "percent": 0, "seed": seed, "pair": f"{seed}-{other}"}
        made.append((place | {"matched": False}, put(store, f"starts {seed}", hill(0.5 + 0.1 * seed))))
        made.append(matched(store, place | {"matched": True}, aligned_cosine=0.6))
    found = numbers(store, starts=made)
    assert {name: (pytest.approx(n.value), n.n) for name, n in found.items()} == {
        f"starts.{name}": (value, 3) for name, value in {
            "barrier": 0.6, "aligned_barrier": 0.1, "aligned_difference": -0.5, "moved": 0.2, "l2": 6, "aligned_l2": 3,
            "cosine": 0.4, "aligned_cosine": 0.6, "disagreement": 0.25}.items()}
    assert numbers(store, starts=[]) == {}
