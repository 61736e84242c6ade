"""Statistics, frames, numbers and verdicts from made-up artifacts in a real store, against values worked out by hand."""
from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from dpkit import report
from dpkit.report import frames, numbers
from dpkit.report.verdicts import CONTRADICTED, INCONCLUSIVE, NOT_TESTED, SUPPORTED
from dpkit.statistics import mean_interval, ratio_interval, student_quantile
from dpkit.store import Store, key_for

CLAIMS = Path(__file__).resolve().parents[1] / "book" / "claims.yml"
NAME = re.compile(r"[a-z]+\.[a-z0-9_]+\.[a-z_]+(@\d+)?")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, name: str, result: dict | None, *, cpu: float = 1.0, failed: str | None = None,
        parents: dict[str, str] | None = None, tensors: dict | None = None) -> str:
    """An artifact that looks like one of a stage; without a result it is a failed one."""
    spec, parents = {"name": name}, parents or {}
    key = key_for("fake", 1, spec, parents)
    store.put(key, stage="fake", version=1, spec=spec, parents=parents, tensors=tensors or {}, result=result or {},
              seconds=100.0, label=name, failed=None if result else failed or "diverged at step 3",
              extra={"device": "cpu", "cpu_seconds": cpu})
    return key


def networks(store: Store, errors: dict[tuple[str, int, int], list[float | None]]) -> list[tuple[dict, str]]:
    """Rows of the chapter on tickets: (arm, percent, seed) -> test error of each child, None for one that diverged."""
    return [({"arm": arm, "round": 2 if percent else 0, "percent": percent, "seed": seed, "child": child},
             put(store, f"{arm} {percent} {seed} {child}", None if error is None else {"error": error, "history": [1, 2]}))
            for (arm, percent, seed), children in errors.items() for child, error in enumerate(children)]


def found(store: Store, **chapters) -> dict[str, report.Number]:
    return {n.name: n for n in report.all_numbers(store, chapters)}


# --- intervals --------------------------------------------------------------------------------------------------------

# two-sided 95% points as printed in tables of Student's distribution
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 9: 2.262, 15: 2.131, 29: 2.045, 120: 1.980}


@pytest.mark.parametrize(("freedom", "value"), TABLE.items())
def test_student_quantile_agrees_with_printed_tables(freedom, value):
    assert student_quantile(0.95, freedom) == pytest.approx(value, rel=2e-3)


def test_student_quantile_at_other_levels():
    assert student_quantile(0.90, 1) == pytest.approx(6.314, abs=6e-4)
    assert student_quantile(0.99, 2) == pytest.approx(9.925, abs=6e-4)
    assert student_quantile(0.90, 10) == pytest.approx(1.812, abs=6e-4)


@pytest.mark.parametrize(("level", "freedom"), [(0.0, 3), (1.0, 3), (1.5, 3), (0.95, 0)])
def test_student_quantile_refuses_what_makes_no_sense(level, freedom):
    with pytest.raises(ValueError, match=r"must lie in|at least 2"):
        student_quantile(level, freedom)


def test_mean_interval_by_hand():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.1824 * math.sqrt(5 / 3) / 2
    assert (mean, low, high) == (2.5, pytest.approx(2.5 - half, abs=5e-3), pytest.approx(2.5 + half, abs=5e-3))
    assert mean_interval([0.25]) == (0.25, None, None)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_ratio_interval_by_hand():
    value, low, high = ratio_interval([1.0, 4.0])
    assert value == pytest.approx(2.0)
    # the logarithms 0 and log 4 have the standard error log(4) / 2
    assert math.log(high / value) == pytest.approx(12.7062 * math.log(4) / 2, rel=1e-4)
    assert low * high == pytest.approx(value**2)
    assert ratio_interval([3.0]) == (pytest.approx(3.0), None, None)


# --- frames -----------------------------------------------------------------------------------------------------------

def test_frame_has_a_row_for_each_artifact_and_keeps_failed_ones_visible(store):
    rows = networks(store, {("imp", 67, 0): [0.25, None]})
    missing = ({"arm": "imp", "round": 2, "percent": 67, "seed": 9, "child": 0}, "0" * 64)
    table = report.frame(store, [*rows, missing])
    assert table["seed"].tolist() == [0, 0]
    assert table["key"].tolist() == [key for _, key in rows]
    assert table["error"].tolist()[0] == 0.25
    assert math.isnan(table["error"].tolist()[1])
    assert table["failed"].isna().tolist() == [True, False]
    assert table["failed"].tolist()[1] == "diverged at step 3"
    assert "history" not in table  # lists stay in the artifact
    assert table["seconds"].tolist() == [1.0, 1.0]  # processor seconds, not the hundred of the wall clock


@pytest.mark.parametrize(("stage", "column"), [("network", "error"), ("path", "error_barrier"), ("plane", "highest_error"),
                                               ("hessian", "trace")])
def test_frame_has_its_columns_when_nothing_came_out(store, stage, column):
    rows = networks(store, {("imp", 67, 0): [None, None]})
    diverged, nothing = report.frame(store, rows, stage), report.frame(store, [(rows[0][0], "0" * 64)], stage)
    assert diverged[column].isna().all()
    assert len(diverged) == 2
    assert nothing.empty
    assert {column, "arm", "percent", "seed", "failed", "key", "seconds"} <= set(nothing.columns) <= set(diverged.columns)


def test_curves_have_a_row_for_each_point_and_leave_failed_ones_out(store):
    good = put(store, "good", {"error": 0.5}, tensors={"alphas": torch.tensor([0.0, 0.5, 1.0]), "errors": torch.arange(3) / 4})
    bad = put(store, "bad", None)
    rows = [({"arm": "imp", "seed": 0}, good), ({"arm": "imp", "seed": 1}, bad), ({"arm": "imp", "seed": 2}, "0" * 64)]
    table = report.curves(store, rows, ("alphas", "errors"))
    assert table["errors"].tolist() == [0.0, 0.25, 0.5]
    assert table["seed"].tolist() == [0, 0, 0]
    assert list(report.curves(store, rows[1:], ("alphas", "errors")).columns) == ["alphas", "errors", "arm", "seed", "key"]


def test_summary_averages_children_before_seeds(store):
    table = report.frame(store, networks(store, {("imp", 67, 0): [0.4, 0.6], ("imp", 67, 1): [0.54, None],
                                                 ("ltr", 67, 0): [None], ("random", 67, 0): [0.5]}))
    stats = report.summary(table, ["arm", "percent"], "error").set_index("arm")
    assert stats.loc["imp", "mean"] == pytest.approx((0.5 + 0.54) / 2)
    assert stats.loc["imp", "n"] == 2
    assert stats.loc["imp", "high"] - stats.loc["imp", "mean"] == pytest.approx(12.7062 * 0.02, rel=1e-4)
    assert "ltr" not in stats.index  # failed seeds give no mean
    assert stats.loc["random", ["mean", "low", "high", "n"]].tolist() == [0.5, 0.5, 0.5, 1]


def test_costs_count_a_sets_networks_apart(store):
    def made(name, stage, result, seconds, parents=None, **more):
        key = key_for(stage, 1, {"name": name}, parents or {})
        store.put(key, stage=stage, version=1, spec={"name": name}, parents=parents or {}, tensors={}, result=result, seconds=0.0,
                  extra={"device": "cpu", "cpu_seconds": seconds, **more}, **({} if result else {"failed": "not finite"}))
        return key

    ticket = made("ticket", "ticket", {"round": 1}, 100.0)
    networks = [made(f"n{i}", "network", {"error": 0.5}, 4.0, {"ticket": ticket}) for i in range(2)]
    sizes = {"stored_images": 20, "training_images": 80, "history": [4.0, 2.0, 1.0]}
    hard = made("hard", "distill", sizes, 7.0, {"network0": networks[0], "network1": networks[1]}, peak_memory=5)
    soft = made("soft", "soften", sizes, 1.0, {"set": hard, "teacher": networks[0]}, peak_memory=3)
    alone, broken = made("alone", "distill", sizes, 2.0), made("broken", "distill", {}, 1.0)
    rows = [({"set": name, "seed": 0}, key) for name, key in (
        ("mtt", hard), ("mtt_soft", soft), ("dm", alone), ("dc", broken), ("herding", "0" * 64))]
    table = report.costs(store, rows).set_index("set")
    assert list(table.index) == ["mtt", "mtt_soft", "dm", "dc"]
    assert table["own_seconds"].tolist() == [7.0, 8.0, 2.0, 1.0]
    assert table["network_seconds"].tolist() == [8.0, 8.0, 0.0, 0.0]
    assert table["networks_of"].tolist() == [tuple(sorted(networks))] * 2 + [()] * 2
    assert table["memory"].tolist() == [5, 5, 0, 0]
    assert table.loc["dc", "failed"] == "not finite"
    assert list(report.costs(store, rows[-1:]).columns) == ["set", *table.columns]


def test_histories_start_at_one_and_are_averaged_over_parts(store):
    rows = [({"set": name, "seed": 0}, put(store, name, {"error": 1, "history": history})) for name, history in (
        ("idc", [4.0, 2.0, 1.0]), ("dm", [6.0, 2.0, 3.0, 1.0]), ("herding", []), ("dc", [0.0, 1.0]))]
    table = report.histories(store, rows, parts=3)
    idc = table[table["set"] == "idc"]
    assert idc["loss"].tolist() == [1.0, 0.5, 0.25]
    assert idc["share"].tolist() == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert set(table["set"]) == {"idc", "dm"}
    halves = report.histories(store, rows[1:2], parts=2)
    assert (halves["loss"].tolist(), halves["share"].tolist()) == ([1.0, 0.5], [0.5, 1.0])
    assert list(report.histories(store, []).columns) == ["share", "loss", "key"]


def test_every_set_belongs_to_one_group():
    from dpkit.stages.making import SETS
    assert sorted(name for names in report.GROUPS.values() for name in names) == sorted([*SETS, "all_data"])
    assert (report.group("idc_soft"), report.group("el2n"), report.group("theirs")) == ("learned", "chosen", "published")


# --- numbers ----------------------------------------------------------------------------------------------------------

def test_numbers_count_seeds_and_have_their_names(store):
    rows = networks(store, {("dense", 0, 0): [0.1, 0.2], ("dense", 0, 1): [0.2, 0.3],
                            ("imp", 67, 0): [0.3, 0.5], ("imp", 67, 1): [0.2, None], ("imp", 67, 2): [None, None],
                            ("distilled", 67, 0): [0.2, 0.2], ("distilled", 67, 1): [0.1, 0.1],
                            ("distilled", 67, 2): [0.9, 0.9]})
    known = found(store, tickets=rows)
    assert set(known) == {"tickets.dense.accuracy", "tickets.imp.accuracy@67", "tickets.distilled.accuracy@67",
                          "tickets.distilled_minus_imp.accuracy@67"}
    assert all(NAME.fullmatch(name) for name in known)
    imp = known["tickets.imp.accuracy@67"]
    assert (imp.value, imp.n) == (pytest.approx((0.6 + 0.8) / 2), 2)
    # seed 2 has a distilled ticket only, so the paired difference leaves it out
    difference = known["tickets.distilled_minus_imp.accuracy@67"]
    assert (difference.value, difference.n) == (pytest.approx(((0.8 - 0.6) + (0.9 - 0.8)) / 2), 2)
    assert difference.high - difference.value == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert known["tickets.distilled.accuracy@67"].n == 3
    assert set(imp.record()) == {"name", "value", "n", "low", "high", "key"}


def test_fractions_are_cut_to_the_unit_interval_and_differences_are_not(store):
    rows = networks(store, {("imp", 67, 0): [0.0], ("imp", 67, 1): [0.4], ("distilled", 67, 0): [0.4],
                            ("distilled", 67, 1): [0.0]})
    known = found(store, tickets=rows)
    assert (known["tickets.imp.accuracy@67"].low, known["tickets.imp.accuracy@67"].high) == (0.0, 1.0)
    assert known["tickets.distilled_minus_imp.accuracy@67"].low < -1


def test_each_arm_is_compared_with_imp_and_each_control_with_its_arm(store):
    rows = networks(store, {("imp", 67, 0): [0.3], ("dm", 67, 0): [0.4], ("dm_shuffled", 67, 0): [0.45],
                            ("imp_weights", 67, 0): [0.2], ("dense", 0, 0): [0.1]})
    known = found(store, tickets=rows)
    assert {name: pytest.approx(n.value) for name, n in known.items() if "_minus_" in name} == {
        "tickets.dm_minus_imp.accuracy@67": -0.1, "tickets.dm_shuffled_minus_imp.accuracy@67": -0.15,
        "tickets.imp_weights_minus_imp.accuracy@67": 0.1, "tickets.dm_shuffled_minus_dm.accuracy@67": -0.05}


def test_one_seed_has_no_interval(store):
    only = found(store, tickets=networks(store, {("imp", 67, 0): [0.1, 0.3]}))["tickets.imp.accuracy@67"]
    assert (only.value, only.n, only.low, only.high) == (pytest.approx(0.8), 1, None, None)


def test_a_numbers_key_leads_to_exactly_what_went_in(store):
    root = put(store, "initialisation", {"error": 0.5})
    child = put(store, "child", {"error": 0.3}, parents={"start": root})
    place = {"arm": "imp", "round": 2, "percent": 67, "seed": 0, "child": 0}
    rows = networks(store, {("imp", 67, 1): [0.2, None], ("distilled", 67, 1): [0.1], ("distilled", 67, 5): [0.1]})
    known = found(store, tickets=[(place, child), *rows])
    used = {artifact.key for _, _, artifact in store.lineage(known["tickets.imp.accuracy@67"].key)}
    assert used == {known["tickets.imp.accuracy@67"].key, child, root, rows[0][1]}
    # neither a network that diverged nor a seed that only one arm has is behind the difference
    used = {artifact.key for _, _, artifact in store.lineage(known["tickets.distilled_minus_imp.accuracy@67"].key)}
    assert used == {known["tickets.distilled_minus_imp.accuracy@67"].key, rows[0][1], rows[2][1]}
    assert not list(store.verify())


def test_ratios_need_positive_numbers(store):
    place = {"round": 2, "percent": 67}
    traces = {("imp", 0): 4.0, ("imp", 1): -1.0, ("distilled", 0): 1.0, ("distilled", 1): 1.0}
    rows = [({"arm": arm, "seed": seed, **place}, put(store, f"{arm} {seed}", {
        "trace": trace, "top_eigenvalue": 2.0, "trace_per_weight": trace / 10})) for (arm, seed), trace in traces.items()]
    known = found(store, hessian=rows)
    ratio = known["hessian.distilled_over_imp.trace@67"]
    assert (ratio.value, ratio.n, ratio.low) == (pytest.approx(0.25), 1, None)
    assert known["hessian.imp.trace@67"].value == pytest.approx(1.5)  # the mean keeps the negative estimate
    assert known["hessian.distilled_over_imp.top_eigenvalue@67"].value == pytest.approx(1.0)


def test_a_chapter_without_results_has_no_numbers(store):
    assert found(store, tickets=networks(store, {("imp", 67, 0): [None, None]}), hessian=[], landscape=[({}, "0" * 64)]) == {}


def test_numbers_are_the_same_the_second_time(store):
    rows = networks(store, {("imp", 67, 0): [0.1, 0.3], ("imp", 67, 1): [0.2]})
    first = found(store, tickets=rows)
    keys = list(store.keys())
    assert found(store, tickets=list(reversed(rows))) == first
    assert list(store.keys()) == keys


# --- verdicts ---------------------------------------------------------------------------------------------------------

def measured(low: float | None, high: float | None, name: str = "a.b.c") -> report.Number:
    value = 0.5 if low is None else (low + high) / 2
    return report.Number(name, value, 1 if low is None else 3, low, high, "0" * 64)


@pytest.mark.parametrize(("low", "high", "at_least", "at_most"), [
    (0.6, 0.8, SUPPORTED, CONTRADICTED), (0.2, 0.4, CONTRADICTED, SUPPORTED), (0.4, 0.6, INCONCLUSIVE, INCONCLUSIVE),
    (0.5, 0.6, SUPPORTED, INCONCLUSIVE), (0.4, 0.5, INCONCLUSIVE, SUPPORTED), (0.5, 0.5, SUPPORTED, SUPPORTED),
    (None, None, INCONCLUSIVE, INCONCLUSIVE)])
def test_judge(low, high, at_least, at_most):
    assert report.judge(measured(low, high), at_least=0.5) == at_least
    assert report.judge(measured(low, high), at_most=0.5) == at_most


def test_judge_without_a_number_or_without_one_side():
    assert report.judge(None, at_least=0.5) == report.judge(None, at_most=0.5) == NOT_TESTED
    for limits in ({}, {"at_least": 0.1, "at_most": 0.2}):
        with pytest.raises(ValueError, match="exactly one"):
            report.judge(measured(0.1, 0.2), **limits)


@pytest.mark.parametrize(("tests", "verdict"), [
    ([], NOT_TESTED), ([SUPPORTED], SUPPORTED), ([SUPPORTED, SUPPORTED], SUPPORTED), ([SUPPORTED, INCONCLUSIVE], INCONCLUSIVE),
    ([SUPPORTED, NOT_TESTED], NOT_TESTED), ([INCONCLUSIVE, NOT_TESTED], NOT_TESTED), ([CONTRADICTED, NOT_TESTED], CONTRADICTED),
    ([SUPPORTED, CONTRADICTED], CONTRADICTED), ([INCONCLUSIVE, CONTRADICTED], CONTRADICTED), ([INCONCLUSIVE], INCONCLUSIVE)])
def test_combine(tests, verdict):
    assert report.combine(tests) == report.combine(tests[::-1]) == verdict


def test_a_verdict_shows_the_test_that_it_hangs_on():
    claims = [{"id": "C1", "claim": "words", "chapter": "03-tickets", "tests": [
        {"number": "tickets.a.accuracy@{percent}", "at_least": 0.5}, {"number": "tickets.b.accuracy@{percent}", "at_most": 0.5}]},
        {"id": "C2", "claim": "more", "chapter": "03-tickets", "tests": []}]
    known = [measured(0.6, 0.8, "tickets.a.accuracy@67"), measured(0.6, 0.7, "tickets.b.accuracy@67")]
    first, second = report.verdicts(claims, known, 67)
    assert (first["verdict"], first["measure"], first["threshold"]) == (CONTRADICTED, "tickets.b.accuracy@67", 0.5)
    assert [t["verdict"] for t in first["tests"]] == [SUPPORTED, CONTRADICTED]
    assert (second["verdict"], second["measure"], second["tests"]) == (NOT_TESTED, None, [])
    # at another sparsity these numbers do not exist
    assert report.verdicts(claims, known, 89)[0]["verdict"] == NOT_TESTED


def test_the_claims_of_the_book_name_numbers_that_can_be_made(store):
    claims = report.read_claims(CLAIMS)
    assert [claim["id"] for claim in claims] == [f"C{i}" for i in range(1, 8)]
    arms = [("dense", 0), *((arm, 67) for arm in ("imp", "ltr", "distilled", "combined", "random_real", "random"))]
    whole = {"error": 0.2, "error_barrier": 0.1, "loss_barrier": 0.1, "stable": True, "trace": 1.0, "top_eigenvalue": 1.0,
             "trace_per_weight": 1.0, "highest_error": 0.5, "points": 10}
    rows = [({"arm": arm, "round": 1, "percent": percent, "seed": 0, "pieces": 1, "search_round": 0, "networks": 1, "part": 1.0,
              "decoded": 1, "image_flops": 2.0},
             put(store, arm, whole)) for arm, percent in arms]
    known = set(found(store, **dict.fromkeys(("tickets", "searches", "connectivity", "hessian"), rows)))
    wanted = {test["number"].format(percent=67) for claim in claims for test in claim["tests"]}
    assert wanted
    assert wanted <= known
    assert all(NAME.fullmatch(name) for name in known)


@pytest.mark.parametrize("text", ["- {id: C1, claim: words, tests: []}",
                                  "- {id: C1, claim: words, chapter: c, tests: [{number: a.b.c}]}",
                                  "- {id: C1, claim: words, chapter: c, tests: [{number: a.b.c, at_least: 1, at_most: 2}]}"])
def test_claims_that_lack_something_are_refused(tmp_path, text):
    (tmp_path / "claims.yml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="C1"):
        report.read_claims(tmp_path / "claims.yml")


def test_every_arm_and_set_has_a_name_for_people():
    from dpkit.stages import ARMS
    from dpkit.stages.making import SETS
    assert {"dense", *ARMS, *SETS} <= set(frames.TITLES)
    assert numbers.suffix(0) == ""
    assert numbers.suffix(67) == "@67"


@pytest.mark.parametrize("kind, values, low, high", [("fraction", (0.0, 1.0), 0.0, 1.0), ("cosine", (0.2, 1.0), -1.0, 1.0),
                                                     ("length", (1.0, 9.0), 0.0, None), ("mean", (0.0, 1.0), None, None)])
def test_intervals_are_cut_to_what_a_measure_can_be(store, kind, values, low, high):
    found = numbers.number(store, f"tickets.imp.{kind}", dict(enumerate(values)), [], kind)
    plain = numbers.number(store, f"tickets.imp.{kind}_uncut", dict(enumerate(values)), [], "mean")
    assert found.value == plain.value
    assert found.low == (plain.low if low is None else low)
    assert found.high == (plain.high if high is None else high)
