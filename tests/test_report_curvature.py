"""Frames, numbers and tables of curvature from made-up artifacts in a real store, against values worked out by hand."""
from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from dpkit import report
from dpkit.report import curvature, curvature_tables
from dpkit.report.format import significant
from dpkit.statistics import Correlation, rank_correlation
from dpkit.store import Store, key_for
from dpkit.tree import generator_for

MISSING = ({"arm": "ltr", "round": 2, "percent": 67, "seed": 0}, "0" * 64)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, stage: str, label: str, result: dict | None, **tensors) -> str:
    spec = {"label": label}
    key = key_for(stage, 1, spec, {})
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in tensors.items()}
    store.put(key, stage=stage, version=1, spec=spec, parents={}, tensors=tensors if result is not None else {},
              result=result or {}, seconds=1.0, label=label, failed=None if result is not None else "the loss is not finite")
    return key


def rows(store: Store, stage: str, results: dict, **more) -> list[tuple[dict, str]]:
    """(arm, percent, seed) -> plain results, None for a failure."""
    return [({"arm": arm, "round": 2 if percent else 0, "percent": percent, "seed": seed, **more},
             put(store, stage, f"{arm} {percent} {seed}", result)) for (arm, percent, seed), result in results.items()]


def numbers(store: Store, **chapters) -> dict[str, report.Number]:
    found = curvature.numbers(store, chapters)
    assert len({n.name for n in found}) == len(found)  # a name has one value
    return {n.name.removeprefix("hessian."): n for n in found}


TRACES = {("dense", 0, 0): 8.0, ("dense", 0, 1): 2.0, ("imp", 67, 0): 4.0, ("imp", 67, 1): 1.0, ("imp", 67, 2): None,
          ("distilled", 67, 0): 2.0, ("distilled", 67, 1): 2.0, ("distilled", 36, 0): 16.0}


def hessians(store: Store) -> list[tuple[dict, str]]:
    return rows(store, "hessian", {place: value and {"trace": value, "top_eigenvalue": value / 2, "trace_per_weight": value / 8,
                                                     "surviving": 8} for place, value in TRACES.items()})


# --- numbers ----------------------------------------------------------------------------------------------------------

def test_the_first_numbers_keep_names_values_and_keys(store):
    made = hessians(store)
    found = numbers(store, hessian=[*made, MISSING])
    assert list(found)[:3] == ["dense.trace", "dense.top_eigenvalue", "dense.trace_per_weight"]
    assert {name: pytest.approx(n.value) for name, n in found.items() if "trace" in name and "weight" not in name} == {
        "dense.trace": 5.0, "imp.trace@67": 2.5, "distilled.trace@67": 2.0, "distilled.trace@36": 16.0,
        "distilled_over_imp.trace@67": 1.0, "distilled_over_dense.trace@67": 0.5, "distilled_over_dense.trace@36": 2.0}
    assert found["distilled_over_imp.trace_per_weight@67"].value == pytest.approx(1.0)  # new: sqrt(1/2 * 2)
    parents = {str(i): key for i, key in enumerate(sorted([made[3][1], made[2][1]]))}
    spec = {"name": "hessian.imp.trace@67", "kind": "mean", "level": 0.95, "seeds": [0, 1]}
    assert found["imp.trace@67"].key == key_for("number", 1, spec, parents)


def test_each_part_has_its_numbers_and_ratios(store):
    places = {("dense", 0, 0): 1.0, ("imp", 67, 0): 4.0, ("distilled", 67, 0): 2.0, ("random", 67, 0): None}
    sharp = rows(store, "sharpness", {place: v and {"sharpness": v, "adaptive_sharpness": 2 * v, "average_sharpness": -v,
                                                    "fisher_rao": 3 * v} for place, v in places.items()})
    spectra = rows(store, "spectrum", {place: v and {
        "trace": 10 * v, "trace_error": 0.1, "frobenius": v, "negative_fraction": v / 10, "gn_trace": 9 * v,
        "rank_entropy": 5 * v, "rank_participation": 4 * v, "gn_top": v, "fisher_trace": v, "lowest_eigenvalue": -v,
        "last_layer_mean": v / 100, "top_eigenvalue": 99.0, "about": {"images": 1}} for place, v in places.items()})
    published = rows(store, "diagonal", {place: v and {"published_mean": v / 3, "published_surviving": v} for place, v in
                                         places.items()})
    found = numbers(store, sharpness=sharp, spectra=spectra, diagonals=published)
    assert {name: pytest.approx(n.value) for name, n in found.items() if name.startswith("imp.")} == {
        "imp.sharpness@67": 4, "imp.adaptive_sharpness@67": 8, "imp.average_sharpness@67": -4, "imp.fisher_rao@67": 12,
        "imp.lowest_eigenvalue@67": -4, "imp.frobenius@67": 4, "imp.negative_fraction@67": 0.4, "imp.rank_entropy@67": 20,
        "imp.rank_participation@67": 16, "imp.gn_trace@67": 36, "imp.gn_top@67": 4, "imp.gn_share@67": 0.9,
        "imp.fisher_trace@67": 4, "imp.last_layer_mean@67": 0.04, "imp.published_mean@67": 4 / 3, "imp.published_surviving@67": 4,
        "imp.deflated_trace@67": 40}
    ratios = {name: n.value for name, n in found.items() if "_over_" in name}
    assert ratios == pytest.approx({f"distilled_over_{arm}.{measure}@67": ratio for arm, ratio in (("imp", 0.5), ("dense", 2.0))
                                    for measure in ("sharpness", "adaptive_sharpness", "deflated_trace", "published_mean",
                                                    "published_surviving")})
    assert not [name for name in found if name.startswith("random.")]
    none = (MISSING, sharp[3])
    assert numbers(store, **dict.fromkeys(("sharpness", "spectra", "diagonals", "removed", "edge"), none)) == {}


def mask_rows(store: Store) -> list[tuple[dict, str]]:
    found = []
    for on, shift in (("real", 0.0), ("idc", 1.0)):
        for seed in range(2):
            values = {"removed": [1, 2], "kept": [3, 4], "chance": [2, 2], "excess": [-1 - shift, seed], "score": [-2, 1],
                      "overlap": [0.6, 0.4 + 0.2 * seed], "overlap_layerwise": [0.5, 0.5], "overlap_uniform": [0.3, 0.3],
                      "rise": [0.5, 1 + shift], "rise_random": [[1, 2, 3], [0, 1, 2]],
                      "eigenvalues": [8.0, 4.0, -2.0], "residuals": [0.8 + seed, 0.04, 0.1]}
            place = {"round": 2, "percent": 67, "seed": seed, "on": on}
            found.append((place, put(store, "removed", f"{on} {seed}", {"arms": ["imp", "distilled"]}, **values)))
    return found


def test_what_masks_remove_by_arm_and_loss(store):
    made = mask_rows(store)
    failed = ({"round": 2, "percent": 67, "seed": 2, "on": "real"}, put(store, "removed", "bad", None))
    table = curvature.removed(store, [*made, failed, MISSING])
    assert len(table) == 8
    first = table[(table["on"] == "real") & (table["seed"] == 1) & (table["arm"] == "distilled")].iloc[0]
    names = ["overlap_excess", "rise_random", "rise_least", "rise_most"]
    assert [first[name] for name in names] == pytest.approx([0.1, 1, 0, 2])
    assert math.isnan(first["all"])
    assert [first[name] for name in curvature.CONVERGENCE] == pytest.approx([3, -2, 0.1, 1.8 / 8])
    said = curvature_tables.convergence_text(table)
    each = ("residuals of the 3 directions are at most 22.5% of their eigenvalues, and 5.00% for the last (worst of "
            "n\u00a0=\u00a02 networks)")
    assert said == f"How well the sharpest directions are known: on real images {each}; on IDC {each}."
    assert "not measured" in curvature_tables.convergence_text(table[:0])
    assert list(curvature.removed(store, [MISSING]).columns)[-2:] == ["failed", "key"]
    found = numbers(store, removed=[*made, failed])
    assert {name: pytest.approx(n.value) for name, n in found.items() if name.startswith("distilled.")} == {
        "distilled.removed_excess@67": 0.5, "distilled.removed_score@67": 1, "distilled.overlap@67": 0.5,
        "distilled.overlap_excess@67": 0.0, "distilled.removal_rise@67": 1, "distilled.removal_excess@67": 0,
        "distilled.removed_excess_idc@67": 0.5, "distilled.removed_score_idc@67": 1, "distilled.overlap_idc@67": 0.5,
        "distilled.overlap_excess_idc@67": 0.0, "distilled.removal_rise_idc@67": 2, "distilled.removal_excess_idc@67": 1}
    assert found["imp.removed_excess_idc@67"].value == -2
    assert found["imp.removed_excess@67"].n == 2


def edge_rows(store: Store, ratios: dict) -> list[tuple[dict, str]]:
    found = []
    for (arm, percent, seed), values in ratios.items():
        count = range(len(values))
        key = put(store, "edge", f"{arm} {seed}", {"edge_highest": max(values[:2])}, steps=list(count), top=values, ratio=values,
                  epochs=[i / 2 for i in count], top_error=[0.0 for _ in count], lr=[0.1 for _ in count])
        found.append(({"arm": arm, "round": 2, "percent": percent, "seed": seed}, key))
    return found


def test_the_highest_ratio_along_training(store):
    made = edge_rows(store, {("dense", 0, 0): [0.1, 1.2, 0.9], ("dense", 0, 1): [0.8, 0.2, math.nan], ("imp", 67, 0): [0.5]})
    table = curvature.edges(store, [*made, MISSING])
    assert len(table) == 6
    found = numbers(store, edge=made)
    assert {name: pytest.approx(n.value) for name, n in found.items()} == {"dense.edge_highest": 1.0, "imp.edge_highest@67": 0.5}
    assert found["dense.edge_highest"].n == 2


# --- correlation with accuracy ----------------------------------------------------------------------------------------

def study(store: Store, seeds: int = 3) -> dict[str, list]:
    """Within a sparsity error rises with the trace, and both are higher at the higher one; two children of each ticket."""
    curved, errors = {("dense", 0, s): {"trace": 99.0, "trace_per_weight": 9.9, "top_eigenvalue": 7.0} for s in range(seeds)}, []
    for percent, shift in ((36, 0.0), (67, 10.0)):
        for i, arm in enumerate(("imp", "distilled", "random")):
            for seed in range(seeds):
                trace = shift + i + seed / 10
                curved[arm, percent, seed] = {"trace": trace, "trace_per_weight": trace * (2 if percent == 67 else 1),
                                              "top_eigenvalue": 7.0}
                for child, error in enumerate((0.1 + trace / 100 - shift / 50, 0.9)):
                    place = {"arm": arm, "round": 2, "percent": percent, "seed": seed, "child": child}
                    errors.append((place, put(store, "network", f"{place}", {"error": error})))
    for seed in range(seeds):
        place = {"arm": "dense", "round": 0, "percent": 0, "seed": seed, "child": 0}
        errors.append((place, put(store, "network", f"{place}", {"error": 0.01})))
    return {"hessian": rows(store, "hessian", curved), "tickets": errors}


def test_accuracy_falls_with_curvature_at_equal_sparsity(store):
    parts = study(store)
    table = curvature.networks(store, parts)
    assert len(table) == 3 * 7
    assert table["accuracy"].tolist()[0] == pytest.approx(0.99)
    found = numbers(store, **parts)
    # over all sparsities together the order would be mixed, and the dense network would count
    assert (found["correlation.trace"].value, found["correlation.trace"].n) == (pytest.approx(-1.0), 3)
    assert found["correlation.trace_kendall"].value == pytest.approx(-1.0)
    assert "correlation.top_eigenvalue" not in found  # it is the same everywhere
    assert "correlation.sharpness" not in found
    good = table[table["arm"] != "dense"]
    moved = table.assign(accuracy=np.where(table["arm"] == "imp", 0.5, table["accuracy"]))
    asked = rank_correlation(good["trace"].tolist(), moved[moved["arm"] != "dense"]["accuracy"].tolist(), good["seed"].tolist(),
                             generator_for("hessian.correlation.trace", "bootstrap"), strata=good["percent"].tolist())
    found_again = curvature.correlation(moved, "trace")
    assert found_again == asked
    assert asked.low < asked.high
    low, high = curvature.correlation_interval(found_again)
    assert low == min(asked.low, asked.fisher_low)
    assert high == max(asked.high, asked.fisher_high)
    shown = curvature_tables.correlation_table(moved).loc["trace"]
    assert shown["95%"] == f"[{significant(low)}, {significant(high)}]"
    used = {artifact.key for _, _, artifact in store.lineage(found["correlation.trace"].key)}
    measured = {key for place, key in parts["hessian"] if place["arm"] != "dense"}
    first = {key for place, key in parts["tickets"] if place["arm"] != "dense" and place["child"] == 0}
    assert used == {found["correlation.trace"].key} | measured | first
    again = numbers(store, **parts)
    assert again["correlation.trace"] == found["correlation.trace"]


@pytest.mark.parametrize(("initialisations", "between"), [(2, 0.5), (3, 0.1), (3, 0.5), (5, 0.5)])
def test_intervals_of_correlations_hold_about_what_they_say(initialisations, between):
    """Studies of eight arms, ranks correlated by one half: a third of the variance is the arms', some the initialisations'.

    What is asked for is the correlation of these arms over endless initialisations, which a large sample has."""
    generator, arms, studies, held = generator_for("coverage", initialisations, str(between)), 8, 200, [0, 0, 0]

    def drawn(count, of_arms):
        pairs = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((1, count), (arms, count))]
        parts = [of_arms, *(torch.stack([x, x / 2 + math.sqrt(0.75) * y]) for x, y in pairs)]
        shares = (1 / 3, between, 2 / 3 - between)
        return sum(math.sqrt(share) * part for share, part in zip(shares, parts, strict=True)).reshape(2, -1)

    for study in range(studies):
        x, y = torch.randn(2, arms, 1, generator=generator, dtype=torch.float64)
        of_arms = torch.stack([x, x / 2 + math.sqrt(0.75) * y])
        ranks = drawn(200, of_arms).argsort(1).argsort(1).double()
        truth = float(torch.corrcoef(ranks)[0, 1])
        points, labels = drawn(initialisations, of_arms), list(range(initialisations)) * arms
        found = rank_correlation(*points.tolist(), labels, generator_for("coverage", study), draws=200)
        for place, (low, high) in enumerate(((found.low, found.high), (found.fisher_low, found.fisher_high),
                                             curvature.correlation_interval(found))):
            held[place] += low <= truth <= high
    print(initialisations, between, [h / studies for h in held])
    assert held[0] < 0.92 * studies  # what the bootstrap alone is short of
    assert 0.88 * studies <= held[2]
    assert held[2] >= max(held[:2])


def test_an_interval_of_a_correlation_needs_two_initialisations():
    single = Correlation(0.5, None, None, 0.1, 0.8, 1, 9, 1)
    assert curvature.correlation_interval(single) == (None, None)
    perfect = Correlation(1.0, 0.9, 1.0, None, None, 3, 9, 1)
    assert curvature.correlation_interval(perfect) == (0.9, 1.0)


def test_too_few_networks_have_no_correlation(store):
    one = study(store, seeds=1)
    assert numbers(store, **one)["correlation.trace"].low is None
    single = {"hessian": one["hessian"][:2], "tickets": one["tickets"]}  # dense, and one arm at one sparsity
    assert not [name for name in numbers(store, **single) if "correlation" in name]
    text = curvature_tables.correlation_table(curvature.networks(store, single))
    assert set(text.to_numpy().ravel()) == {"not measured"}
    assert "not measured" in curvature_tables.order_text(curvature.networks(store, single))
    assert not len(curvature.networks(store, {"tickets": one["tickets"]}))  # without curvature there is no row
    assert not len(curvature.networks(store, {}))


# --- tables -----------------------------------------------------------------------------------------------------------

def test_the_order_of_arms_by_both_protocols():
    flat = {"dense": (9.0, 1.0), "imp": (1.0, 3.0), "distilled": (2.0, 2.0), "random": (3.0, 9.0)}
    table = pd.DataFrame([{"arm": arm, "percent": 67 if arm != "dense" else 0, "seed": seed, "published_mean": published + seed,
                           "trace_per_weight": corrected + seed} for arm, (published, corrected) in flat.items()
                          for seed in range(2)])
    assert curvature_tables.order_text(table) == (
        "By the published protocol IMP, rewound to start is flattest and random mask sharpest; by the corrected one distilled "
        "pruning (IDC) and random mask. 1 of 3 pairs of arms changes order (means of 2 initialisations, whatever their "
        "intervals). Is distilled pruning flatter than IMP? By the published protocol: not decided (ratio 1.73 [0.278, 10.8] "
        "(n = 2)); by the corrected one: not decided (ratio 0.707 [0.335, 1.49] (n = 2)).")


def test_flatter_is_said_where_the_interval_says_it():
    table = pd.DataFrame([{"arm": arm, "percent": 67, "seed": seed, "trace_per_weight": (5 + seed) / factor,
                           "published_mean": factor * (5 + seed) * (1 + wobble * seed / 100)}
                          for arm, factor, wobble in (("imp", 1.0, 0), ("distilled", 0.5, 1)) for seed in range(4)])
    said = curvature_tables.order_text(table)
    assert "By the published protocol: flatter (ratio 0.507 [0.497, 0.518] (n = 4))" in said
    assert "by the corrected one: sharper (ratio 2.00" in said
    table.loc[(table["arm"] == "imp") & (table["seed"] > 0), "published_mean"] = math.nan
    assert "By the published protocol: not decided (n\u00a0=\u00a01)" in curvature_tables.order_text(table)


def test_errors_of_probes_beside_those_between_initialisations():
    table = pd.DataFrame([{"arm": arm, "percent": percent, "seed": seed, "trace": 10.0 + seed, "trace_error": 1.1}
                          for arm, percent in (("dense", 0), ("imp", 67), ("imp", 36)) for seed in range(3)])
    assert curvature_tables.error_text(table, "trace", 67) == (
        "10.0% from probes at one network, 9.09% between initialisations (standard deviations, root mean square of 2 arms, "
        "n\u00a0=\u00a03 initialisations)")
    assert curvature_tables.error_text(table[table["seed"] == 0]) == "not measured"


def test_only_eigenvalues_that_converged_are_marked(store):
    key = put(store, "spectrum", "s", {"size": 9}, grid=[0.0, 1.0], curve=[1.0, 1.0], eigenvalues=[5.0, -4.0, 2.0],
              residuals=[0.05, 0.05, 0.0])
    found, = curvature.densities(store, [({"arm": "imp", "percent": 67, "seed": 0}, key)])
    assert found.eigenvalues.tolist() == [5.0, 2.0]


def test_sheets_say_what_was_not_measured(store):
    parts = {"hessian": hessians(store)}
    text = curvature_tables.sheet(curvature.networks(store, parts), curvature_tables.PROTOCOLS)
    assert text.index.tolist() == ["dense", "IMP, rewound to start, 67% sparse", "distilled pruning (IDC), 36% sparse",
                                   "distilled pruning (IDC), 67% sparse"]
    assert text["corrected"].tolist()[2] == "2.00 (n = 1)"
    assert set(text["published, removed as zeros"]) == {"not measured"}
    for columns in (curvature_tables.OVERVIEW, curvature_tables.SPECTRUM, curvature_tables.MATRICES, curvature_tables.SHARPNESS):
        assert {measure for measure, _ in columns.values()} <= set(curvature.networks(store, {}))
        assert not len(curvature_tables.sheet(curvature.networks(store, {}), columns))


def test_sheets_cut_intervals_as_the_numbers_do():
    table = pd.DataFrame([{"arm": "imp", "percent": 67, "seed": seed, "failed": None, "sharpness": value, "negative_low": value,
                           "average_sharpness": value} for seed, value in enumerate((0.1, 0.9))])
    columns = {"a": ("sharpness", "number"), "b": ("average_sharpness", "number"), "c": ("negative_low", "percent")}
    assert curvature_tables.sheet(table, columns).iloc[0].tolist() == [
        "0.500 [0, 5.58] (n = 2)", "0.500 [−4.58, 5.58] (n = 2)", "50.0% [0.0, 100.0] (n = 2)"]


def test_one_arm_left_out_says_what_hangs_on_it():
    table = pd.DataFrame([{"arm": arm, "percent": 67, "seed": seed, "trace": trace + seed / 10,
                           "accuracy": accuracy + seed / 1000}
                          for arm, trace, accuracy in (("imp", 1.0, 0.5), ("dm", 2.0, 0.6), ("random", 9.0, 0.1))
                          for seed in range(2)])
    low, high = curvature.without_one_arm(table, "trace")
    assert low == pytest.approx(curvature.correlation(table[table["arm"] != "dm"], "trace").value)
    assert high == pytest.approx(curvature.correlation(table[table["arm"] != "random"], "trace").value)
    assert low < 0 < high
    assert curvature.without_one_arm(table[table["arm"] != "dm"], "trace") is None
