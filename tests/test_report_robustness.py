"""Frames, numbers and figures of robustness from made-up artifacts in a real store, against values worked out by hand."""
from __future__ import annotations

import io
import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dpkit import report
from dpkit.report import format as formats
from dpkit.report import robustness, robustness_figures
from dpkit.store import Store, key_for

ASKED = {"corruptions": ["fog", "gaussian_noise"], "severities": [1, 5], "bits": [8, 2], "images": 0}
#: error of each (arm, percent, seed): clean, then at fog 1, fog 5, noise 1, noise 5, then with 8 and 2 bits; None: it diverged
MEASURED = {("dense", 0, 0): (0.10, 0.12, 0.20, 0.18, 0.30, 0.10, 0.50),
            ("dense", 0, 1): (0.14, 0.16, 0.24, 0.22, 0.34, 0.14, 0.54),
            ("imp", 67, 0): (0.20, 0.22, 0.40, 0.28, 0.50, 0.21, 0.80),
            ("imp", 67, 1): (0.24, 0.26, 0.44, 0.32, 0.54, 0.25, 0.84),
            ("imp", 67, 2): (0.30, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30),
            ("distilled", 67, 0): (0.20, 0.20, 0.30, 0.20, 0.50, 0.20, 0.60), ("distilled", 67, 1): None}


def put(store: Store, name: str, values: tuple | None) -> str:
    """An artifact of the stage ``robustness``."""
    spec = {"name": name, "robustness": ASKED}
    key = key_for("robustness", 1, spec, {})
    result, tensors = {}, {}
    if values:
        clean, *rest = values
        tensors = {"corruption_errors": torch.tensor(rest[:4], dtype=torch.float64).view(2, 2),
                   "quantised_errors": torch.tensor(rest[4:], dtype=torch.float64)}
        result = {"clean_error": clean, "mean_corruption_error": sum(rest[:4]) / 4, "error_8bit": rest[4], "error_2bit": rest[5]}
    store.put(key, stage="robustness", version=1, spec=spec, parents={}, tensors=tensors, result=result, seconds=1.0, label=name,
              failed=None if values else "diverged at step 3")
    return key


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def rows(store: Store, measured=MEASURED) -> list[tuple[dict, str]]:
    return [({"arm": arm, "round": 2 if percent else 0, "percent": percent, "seed": seed, "child": 0},
             put(store, f"{arm} {percent} {seed}", values)) for (arm, percent, seed), values in measured.items()]


MISSING = ({"arm": "ltr", "round": 2, "percent": 67, "seed": 0, "child": 0}, "0" * 64)


# --- frames -----------------------------------------------------------------------------------------------------------

def test_a_row_a_network_and_failed_ones_stay(store):
    table = robustness.networks(store, [*rows(store), MISSING])
    assert table["arm"].tolist() == [arm for arm, _, _ in MEASURED]
    assert table["rise"].tolist()[:2] == pytest.approx([0.1, 0.1])
    assert table["error_2bit"].tolist()[2] == 0.8
    assert table["failed"].tolist()[-1] == "diverged at step 3"
    assert math.isnan(table["rise"].tolist()[-1])
    for none in ([], [MISSING], [rows(store)[-1]]):
        empty = robustness.networks(store, none)
        assert {"mean_corruption_error", "clean_error", "rise", "failed", "key"} <= set(empty)
        assert empty["rise"].isna().all()


def test_a_row_a_corruption_and_severity(store):
    made = rows(store)
    table = robustness.corruptions(store, [*made, MISSING])
    assert len(table) == 6 * 4  # neither what diverged nor what is missing
    imp = table[(table["arm"] == "imp") & (table["seed"] == 0)]
    assert imp["corruption"].tolist() == ["fog", "fog", "gaussian_noise", "gaussian_noise"]
    assert imp["severity"].tolist() == [1, 5, 1, 5]
    assert imp["error"].tolist() == [0.22, 0.40, 0.28, 0.50]
    assert set(imp["clean_error"]) == {0.20}
    assert set(imp["key"]) == {made[2][1]}
    empty = robustness.corruptions(store, [MISSING])
    assert list(empty.columns) == list(table.columns)


def test_a_row_for_each_number_of_bits_the_trained_weights_first(store):
    table = robustness.quantised(store, rows(store))
    distilled = table[table["arm"] == "distilled"]
    assert distilled["bits"].tolist() == [robustness.FULL, 8, 2]
    assert distilled["error"].tolist() == [0.20, 0.20, 0.60]
    assert list(robustness.quantised(store, [MISSING]).columns) == list(table.columns)


def test_differences_to_dense_are_paired(store):
    table = robustness.to_dense(robustness.corruptions(store, rows(store)))
    found = table.set_index(["arm", "seed", "corruption"])["difference"]
    assert set(table["seed"]) == {0, 1}  # the third initialisation has no dense network
    assert found["imp", 0, "fog"] == pytest.approx((0.22 + 0.40) / 2 - (0.12 + 0.20) / 2)
    assert found["imp", 1, "gaussian_noise"] == pytest.approx((0.32 + 0.54) / 2 - (0.22 + 0.34) / 2)
    assert found["distilled", 0, "gaussian_noise"] == pytest.approx(0.35 - 0.24)


def test_the_overview_names_arms_in_order_with_intervals(store):
    table = robustness.overview(robustness.networks(store, rows(store)))
    assert list(table.index) == ["dense", "IMP, rewound to start, 67% sparse", "distilled pruning (IDC), 67% sparse"]
    assert table.loc["distilled pruning (IDC), 67% sparse"].tolist() == ["20.0% (n = 1)", "30.0% (n = 1)", "10.0 points (n = 1)"]
    assert table.loc["dense", "rise"] == "10.0 points [10.0, 10.0] (n = 2)"
    assert table.loc["dense", "clean"].startswith("12.0% [0.0, ")  # an error has no negative end
    assert list(robustness.overview(robustness.networks(store, [])).columns) == ["clean", "corrupted", "rise"]


# --- numbers ----------------------------------------------------------------------------------------------------------

def test_numbers_by_hand(store):
    known = {n.name: n for n in robustness.numbers(store, {"robustness": rows(store), "tickets": []})}
    places = {"dense": "", "imp": "@67", "distilled": "@67"}
    measures = ["clean_error", "corruption_error", "corruption_rise", "error_8bit", "error_2bit"]
    own = ["error_fog", "error_gaussian_noise"]
    expected = {f"robustness.{arm}.{measure}{at}" for arm, at in places.items() for measure in measures + own}
    expected |= {f"robustness.{pair}.{measure}@67" for pair in ("imp_minus_dense", "distilled_minus_dense", "distilled_minus_imp")
                 for measure in measures}
    assert set(known) == expected
    imp = known["robustness.imp.corruption_error@67"]
    assert (imp.value, imp.n) == (pytest.approx((0.35 + 0.39 + 0.30) / 3), 3)
    assert known["robustness.imp.error_fog@67"].value == pytest.approx((0.31 + 0.35 + 0.30) / 3)
    assert known["robustness.imp.corruption_rise@67"].value == pytest.approx((0.15 + 0.15 + 0.0) / 3)
    against = known["robustness.imp_minus_dense.corruption_error@67"]
    assert (against.value, against.n) == (pytest.approx(0.15), 2)
    assert against.low == pytest.approx(0.15)  # both pairs differ by the same
    alone = known["robustness.distilled_minus_imp.error_2bit@67"]
    assert (alone.value, alone.n, alone.low) == (pytest.approx(-0.2), 1, None)


@pytest.mark.parametrize("name, kind", [
    ("imp.corruption_error@67", "percent"), ("imp.error_4bit@67", "percent"), ("imp.error_gaussian_noise@67", "percent"),
    ("imp.corruption_rise@67", "points"), ("imp_minus_dense.corruption_error@67", "points"),
    ("distilled_minus_imp.error_4bit@67", "points"), ("distilled_minus_imp.clean_error@67", "points")])
def test_numbers_are_written_as_what_they_are(name, kind):
    assert formats.kind_of(f"robustness.{name}") == kind


def test_the_book_gets_them_with_all_others(store):
    known = {n.name for n in report.all_numbers(store, {"robustness": rows(store)})}
    assert "robustness.imp.corruption_error@67" in known
    for none in ({}, {"robustness": [MISSING]}, {"robustness": [rows(store)[-1]]}):
        assert robustness.numbers(store, none) == []


# --- figures ----------------------------------------------------------------------------------------------------------

FRAMES = {"errors": robustness.networks, "differences": robustness.corruptions, "severities": robustness.corruptions,
          "bits": robustness.quantised}


def drawn(figure: Figure) -> bytes:
    """The figure as a picture, any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@pytest.mark.parametrize("name", FRAMES)
def test_a_figure_for_results_for_none_and_for_what_diverged(store, name):
    draw, table = getattr(robustness_figures, name), FRAMES[name](store, rows(store))
    assert drawn(draw(table)) == drawn(draw(table))
    for some in ([MISSING], [rows(store)[-1]]):
        empty = draw(FRAMES[name](store, some))
        assert len(empty.axes[0].texts) == 1
        drawn(empty)
    one = {place: values for place, values in MEASURED.items() if place[0] in ("dense", "imp") and place[2] == 0}
    drawn(draw(FRAMES[name](store, rows(store, one))))  # no intervals


def test_marks_and_lines_carry_the_means(store):
    axes = robustness_figures.errors(robustness.networks(store, rows(store))).axes[0]
    marks = [line.get_xydata()[0].tolist() for line in axes.lines
             if line.get_markersize() == 8 and len(line.get_xdata())]
    assert sorted(x for x, _ in marks) == pytest.approx(sorted([12, 100 * (0.20 + 0.24 + 0.30) / 3, 20, 22, 100 * 1.04 / 3, 30]))
    table = robustness.quantised(store, rows(store))
    found = {line.get_label(): line.get_ydata().tolist() for line in robustness_figures.bits(table).axes[0].lines}
    assert found["dense (n = 2)"] == pytest.approx([12, 12, 52])
    assert found["distilled pruning (IDC) (n = 1)"] == pytest.approx([20, 20, 60])
    levels = robustness_figures.severities(robustness.corruptions(store, rows(store))).axes[0]
    found = {line.get_label(): line.get_ydata().tolist() for line in levels.lines}
    assert found["dense (n = 2)"] == pytest.approx([12, 17, 27])
    assert [text.get_text() for text in levels.get_xticklabels()] == ["0", "1", "5"]


def test_the_table_of_differences_shows_them(store):
    axes = robustness_figures.differences(robustness.corruptions(store, rows(store))).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["IMP, rewound to start", "distilled pruning (IDC)"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["all corruptions", "fog", "gaussian noise"]
    assert [text.get_text() for text in axes.texts] == ["15", "15", "15", "10", "9.0", "11"]
    # without a dense network of the same initialisation there is nothing to compare with
    lonely = {place: values for place, values in MEASURED.items() if place[0] != "dense"}
    assert len(robustness_figures.differences(robustness.corruptions(store, rows(store, lonely))).axes[0].texts) == 1


def test_several_sparsities_are_told_apart(store):
    more = MEASURED | {("imp", 36, 0): (0.15, 0.15, 0.2, 0.2, 0.3, 0.15, 0.4)}
    for name, frame in FRAMES.items():
        figure = getattr(robustness_figures, name)(frame(store, rows(store, more)))
        drawn(figure)
        axes = figure.axes[0]
        words = [text.get_text() for text in [*axes.get_yticklabels(), *(axes.get_legend().texts if axes.get_legend() else [])]]
        assert {36, 67} <= {int(word.split("start, ")[1].split("%")[0]) for word in words if "start, " in word}


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_stand_in_rows_and_columns(channels):
    clean = torch.full((2, channels, 8, 8), 255, dtype=torch.uint8)
    corrupted = {(name, severity): clean // severity for name in ("fog", "gaussian_noise") for severity in (3, 5)}
    figure = robustness_figures.examples(clean, corrupted)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["fog", "gaussian noise"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["clean", "3", "5"]
    canvas = np.asarray(axes.images[0].get_array())
    assert canvas.shape == (17, 26, 3)
    assert [round(float(canvas[12, column, 0]), 3) for column in (4, 13, 22)] == [1.0, round(85 / 255, 3), 0.2]
    drawn(figure)
    assert len(robustness_figures.examples(clean, {}).axes[0].texts) == 1
