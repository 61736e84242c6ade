"""Frames, numbers and tables of connectivity from made-up artifacts in a real store, against values worked out by hand."""
from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from dpkit import report
from dpkit.barriers import barrier
from dpkit.report import connectivity
from dpkit.report import format as formats
from dpkit.statistics import hierarchical_pairs_interval
from dpkit.store import Store, key_for
from dpkit.tree import generator_for

ALPHAS = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
#: curves: on one whose ends differ the two definitions differ, see test_a_path_has_both_definitions
FLAT, HILL, SLOPE = [0.1, 0.1, 0.1, 0.1], [0.1, 0.2, 0.4, 0.2], [0.1, 0.2, 0.4, 0.5]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, label: str, errors: list[float] | None, **tensors) -> str:
    """A path with these errors and ten times the losses; without any it failed."""
    spec = {"label": label, "errors": errors}
    key = key_for("path", 1, spec, {})
    result = {}
    if errors:
        values = torch.tensor(errors, dtype=torch.float64)
        tensors = {"alphas": ALPHAS, "errors": values, "losses": 10 * values} | tensors
        result = {"error_barrier": barrier(values), "loss_barrier": barrier(10 * values), "stable": barrier(values) < 0.02}
    store.put(key, stage="path", version=1, spec=spec, parents={}, tensors=tensors, result=result, seconds=1.0, label=label,
              failed=None if errors else "a child diverged")
    return key


def hill(height: float, end: float = 0.1) -> list[float]:
    """A path between equal ends with this barrier."""
    return [end, end + height / 2, end + height, end]


def rows(store: Store, measured: dict, **more) -> list[tuple[dict, str]]:
    """(arm, percent, seed) -> errors of each pair of children 0-1, 0-2, 1-2."""
    return [({"arm": arm, "round": 2 if percent else 0, "percent": percent, "seed": seed, "pair": f"{a}-{b}", **more},
             put(store, f"{arm} {percent} {seed} {a}{b} {more}", errors))
            for (arm, percent, seed), pairs in measured.items()
            for (a, b), errors in zip(combinations(range(3), 2), pairs, strict=False)]


MISSING = ({"arm": "ltr", "round": 2, "percent": 67, "seed": 0, "pair": "0-1"}, "0" * 64)
PAIRS = {("dense", 0, 0): [hill(0.3), hill(0.1), hill(0.2)], ("dense", 0, 1): [hill(0.4), None, hill(0.2)],
         ("imp", 67, 0): [hill(0.02), hill(0.04), hill(0.0)], ("imp", 67, 1): [hill(0.06)],
         ("distilled", 67, 0): [SLOPE], ("distilled", 67, 1): [None]}


def numbers(store: Store, **chapters) -> dict[str, report.Number]:
    found = connectivity.numbers(store, chapters)
    assert len({n.name for n in found}) == len(found)  # a name has one value
    return {n.name.removeprefix("connectivity."): n for n in found}


# --- frames -----------------------------------------------------------------------------------------------------------

def test_a_path_has_both_definitions(store):
    made = rows(store, {("imp", 67, 0): [FLAT, HILL, SLOPE], ("ltr", 67, 0): [None]})
    table = connectivity.paths(store, [*made, MISSING])
    assert table["error_barrier"].tolist()[:3] == pytest.approx([0.0, 0.25, 0.2])
    # at 0.5 the line between the ends is at 0.15 and 0.3, and at 0.25 it is not farther below the path
    assert table["error_barrier_linear"].tolist()[:3] == pytest.approx([0.0, 0.25, 0.1])
    assert table["loss_barrier_linear"].tolist()[:3] == pytest.approx([0.0, 2.5, 1.0])
    assert len(table) == 4
    assert math.isnan(table["error_barrier_linear"].tolist()[3])
    for none in ([], [MISSING], [made[3]]):
        empty = connectivity.paths(store, none)
        assert {"error_barrier", "error_barrier_linear", "loss_barrier_linear", "stable", "failed", "key"} <= set(empty)
        assert connectivity.numbers(store, {"connectivity": none, "train_paths": none, "layers": none}) == []
    parts = ("connectivity", "alignment", "train_paths", "statistics", "instability", "layers", "between")
    assert connectivity.numbers(store, {part: [MISSING] for part in parts}) == []


def layered(store: Store, arm: str, seed: int, names: list[str], curves: dict[str, list]) -> tuple[dict, str]:
    spec = {"layers": arm, "seed": seed}
    key = key_for("layers", 1, spec, {})
    tensors = {"alphas": torch.tensor([0.0, 0.5, 1.0])}
    for name, values in curves.items():
        tensors[name] = torch.tensor(values, dtype=torch.float64)
        tensors[name.replace("errors", "losses")] = 10 * tensors[name]
    tensors |= {"end_errors": torch.tensor([0.1, 0.2]).double(), "end_losses": torch.tensor([1.0, 2.0]).double()}
    store.put(key, stage="layers", version=1, spec=spec, parents={}, tensors=tensors, result={"layers": names}, seconds=1.0,
              label=arm)
    return {"arm": arm, "round": 2, "percent": 67, "seed": seed, "pair": "0-1"}, key


def test_a_layers_barrier_is_over_the_mean_of_both_children(store):
    names = ["stem.conv.weight", "classifier.weight"]
    made = [layered(store, "imp", seed, names, {"errors": [[0.1, 0.1, high], [0.1, 0.4, 0.2]],
                                                "others_errors": [[0.1, 0.3, 0.2], [0.1, 0.05, 0.0]]})
            for seed, high in ((0, 0.3), (1, 0.7))]
    table = connectivity.layers(store, [*made, MISSING])
    assert table["layer"].tolist() == names * 2
    assert table["position"].tolist() == [0, 1] * 2
    assert table["barrier"].tolist() == pytest.approx([0.15, 0.25, 0.55, 0.25])
    assert table["loss_barrier"].tolist() == pytest.approx([1.5, 2.5, 5.5, 2.5])
    assert table["others_barrier"].tolist() == pytest.approx([0.15, -0.05] * 2)
    assert list(connectivity.layers(store, [MISSING]).columns) == list(table.columns)
    found = numbers(store, layers=made)
    assert {name: pytest.approx(n.value) for name, n in found.items()} == {
        "imp.highest_layer_barrier@67": 0.4, "imp.layer_stem_conv_barrier@67": 0.35, "imp.layer_classifier_barrier@67": 0.25}
    many = [f"blocks.{i}.weight" for i in range(7)]
    curves = [[0.1, 0.1, 0.1 + i / 10] for i in range(7)]
    deep = layered(store, "ltr", 0, many, {"errors": curves, "others_errors": curves})
    found = numbers(store, layers=[deep])
    assert {name: pytest.approx(n.value) for name, n in found.items()} == {"ltr.highest_layer_barrier@67": 0.55}


def spawned(store: Store, heights: dict) -> list[tuple[dict, str]]:
    """(arm, percent, seed) -> {step: heights of the pairs}; ten steps are an epoch."""
    return [row for place, steps in heights.items() for step, pairs in steps.items()
            for row in rows(store, {place: [h if h is None else hill(h) for h in pairs]}, step=step, epochs=step / 10)]


STEPS = {("dense", 0, 0): {0: [0.3], 5: [0.01], 10: [0.03, 0.02], 20: [0.03, 0.0], 40: [0.0]},
         ("dense", 0, 1): {0: [0.3], 10: [0.01], 20: [0.01], 40: [None]},
         ("imp", 67, 0): {0: [0.01], 10: [0.0]}, ("imp", 67, 1): {0: [0.01], 10: [0.05]}}


def test_stability_begins_where_all_later_steps_are_stable(store):
    table = connectivity.onsets(connectivity.paths(store, spawned(store, STEPS)))
    found = table.set_index(["arm", "percent", "seed"])
    # step 5 is stable, but step 10 is not; the pairs of step 20 count by their mean
    assert found["stable_from"].tolist()[:3] == [2.0, 1.0, 0.0]
    assert math.isnan(found["stable_from"].tolist()[3])
    assert found["unstable_at"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert found["stable_at_last"].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert len(connectivity.onsets(connectivity.paths(store, []))) == 0


def test_numbers_of_spawn_steps(store):
    found = numbers(store, instability=spawned(store, STEPS))
    assert set(found) == {"dense.barrier_k0", "dense.barrier_k5", "dense.barrier_k10", "dense.barrier_k20", "dense.barrier_k40",
                          "imp.barrier_k0@67", "imp.barrier_k10@67", "dense.stable_from", "dense.stable_at_last",
                          "imp.stable_at_last@67"}  # not where one initialisation never becomes stable
    assert (found["dense.barrier_k10"].value, found["dense.barrier_k10"].n) == (pytest.approx((0.025 + 0.01) / 2), 2)
    assert (found["dense.barrier_k5"].value, found["dense.barrier_k5"].n) == (pytest.approx(0.01), 1)
    assert (found["dense.stable_from"].value, found["dense.stable_from"].n) == (1.5, 2)
    # what is known of all initialisations, though both barriers fell at measured steps
    assert (found["dense.stable_from"].low, found["dense.stable_from"].high) == (0.0, 2.0)
    assert (found["dense.stable_at_last"].low, found["dense.stable_at_last"].high) == (pytest.approx(0.025 ** 0.5), 1.0)
    assert found["imp.stable_at_last@67"].value == 0.5
    used = {artifact.key for _, _, artifact in store.lineage(found["dense.stable_from"].key)}
    assert len(used) == 1 + 10  # itself and every path of the dense network that has a result


# --- numbers ----------------------------------------------------------------------------------------------------------

def test_numbers_of_children(store):
    found = numbers(store, connectivity=[*rows(store, PAIRS), MISSING])
    measures = {"barrier", "loss_barrier", "stable", "barrier_linear", "loss_barrier_linear", "barrier_bootstrap"}
    assert set(found) == {f"{arm}.{m}" + at for m in measures for arm, at in (("dense", ""), ("imp", "@67"),
                                                                             ("distilled", "@67"))} | {
        "distilled_minus_imp.barrier@67"}
    assert (found["dense.barrier"].value, found["dense.barrier"].n) == (pytest.approx((0.2 + 0.3) / 2), 2)
    assert found["imp.stable@67"].value == pytest.approx((1 / 3 + 0) / 2)
    assert found["distilled.barrier@67"].value == pytest.approx(0.2)
    assert found["distilled.barrier_linear@67"].value == pytest.approx(0.1)
    assert found["distilled.loss_barrier_linear@67"].value == pytest.approx(1.0)
    assert found["distilled_minus_imp.barrier@67"].value == pytest.approx(0.2 - 0.02)
    assert all(n.low >= 0 for name, n in found.items() if name.endswith("linear") and n.low is not None)
    kinds = {"barrier_linear": "points", "loss_barrier_linear": "number", "barrier_bootstrap": "points"}
    assert {m: formats.kind_of(f"connectivity.imp.{m}@67") for m in kinds} == kinds


def test_the_bootstraps_number_is_the_bootstrap_of_the_pairs(store):
    made = rows(store, PAIRS)
    found = numbers(store, connectivity=made)["dense.barrier_bootstrap"]
    groups = [{("0", "1"): 0.3, ("0", "2"): 0.1, ("1", "2"): 0.2}, {("0", "1"): 0.4, ("1", "2"): 0.2}]
    wanted = hierarchical_pairs_interval(groups, generator_for("connectivity.dense.barrier_bootstrap", "bootstrap"))
    assert (found.value, found.n) == (pytest.approx(wanted.mean), 2)
    assert (found.low, found.high) == (pytest.approx(wanted.low), pytest.approx(wanted.high))
    kept = store.get(found.key)
    assert kept.meta["spec"]["kind"] == "hierarchical bootstrap of pairs"
    assert len(kept.meta["parents"]) == 5  # not the pair whose child diverged
    assert kept.tensors["values"].tolist() == pytest.approx([0.3, 0.1, 0.2, 0.4, 0.2])
    keys = list(store.keys())
    assert numbers(store, connectivity=made[::-1])["dense.barrier_bootstrap"] == found
    assert list(store.keys()) == keys
    alone = numbers(store, connectivity=made[6:7])["imp.barrier_bootstrap@67"]
    assert (alone.value, alone.n, alone.low, alone.high) == (pytest.approx(0.02), 1, None, None)


def test_the_book_gets_them_with_all_others(store):
    made = rows(store, PAIRS)
    known = {n.name: n for n in report.all_numbers(store, {"connectivity": made, "train_paths": made})}
    own = {f"connectivity.{name}": n for name, n in numbers(store, connectivity=made, train_paths=made).items()}
    assert {name: n for name, n in known.items() if name.startswith("connectivity.")} == own


def test_differences_are_paired_pair_by_pair(store):
    test = rows(store, {("imp", 67, 0): [hill(0.1), hill(0.2)], ("imp", 67, 1): [hill(0.3)], ("imp", 67, 2): [hill(0.5)]})
    train = rows(store, {("imp", 67, 0): [hill(0.05), None], ("imp", 67, 1): [hill(0.1)]}, on="train")
    found = numbers(store, connectivity=test, train_paths=train)
    assert (found["imp.train_barrier@67"].value, found["imp.train_loss_barrier@67"].value) == (pytest.approx(0.075),
                                                                                               pytest.approx(0.75))
    change = found["imp.train_difference@67"]
    assert (change.value, change.n) == (pytest.approx((-0.05 - 0.2) / 2), 2)
    used = {artifact.key for _, _, artifact in store.lineage(change.key)} - {change.key}
    assert used == {key for _, key in (test[0], test[2], train[0], train[2])}
    lonely = numbers(store, train_paths=train)
    assert set(lonely) == {"imp.train_barrier@67", "imp.train_loss_barrier@67"}


def test_what_matching_changed_is_paired_too(store):
    before = rows(store, {("imp", 67, 0): [hill(0.1), hill(0.2)], ("imp", 67, 1): [hill(0.3)], ("imp", 67, 2): [None]})
    after = []
    for place, height in zip((place for place, _ in before), (0.05, None, 0.1, 0.1), strict=True):
        spec = {"place": place}
        result = {"aligned_barrier": height, "moved": 0.5, "l2": 2.0, "aligned_l2": 1.0, "cosine": -0.5, "disagreement": 0.25}
        key = key_for("alignment", 1, spec, {})
        store.put(key, stage="alignment", version=1, spec=spec, parents={}, tensors={}, result=result if height else {},
                  seconds=1.0, label="aligned", failed=None if height else "a child diverged")
        after.append((place, key))
    found = numbers(store, connectivity=before, alignment=after)
    assert {name: (found[f"imp.{name}@67"].value, found[f"imp.{name}@67"].n) for name in ("aligned_barrier", "cosine", "l2")} == {
        "aligned_barrier": (pytest.approx(0.25 / 3), 3), "cosine": (-0.5, 3), "l2": (2.0, 3)}
    change = found["imp.aligned_difference@67"]
    assert (change.value, change.n) == (pytest.approx((-0.05 - 0.2) / 2), 2)
    used = {artifact.key for _, _, artifact in store.lineage(change.key)} - {change.key}
    assert used == {before[0][1], before[2][1], after[0][1], after[2][1]}


def test_statistics_are_measured_side_by_side(store):
    made = [row for which, height in (("reestimate", 0.1), ("interpolate", 0.4), ("repair", 0.05))
            for row in rows(store, {("dense", 0, seed): [hill(height + seed / 100)] for seed in range(2)}, statistics=which)]
    found = numbers(store, statistics=made)
    assert {name: pytest.approx(n.value) for name, n in found.items()} == {
        "dense.reestimate_barrier": 0.105, "dense.interpolate_barrier": 0.405, "dense.repair_barrier": 0.055,
        "dense.interpolate_difference": 0.3, "dense.repair_difference": -0.05}


def unlike(store: Store) -> list[tuple[dict, str]]:
    """Pairs of the part ``between``."""
    found = []
    for seed in range(2):
        for relation, arm, other, before, after, percent, errors in (
                ("rounds", "imp", "imp", 0, 1, 20, hill(0.1)), ("rounds", "imp", "imp", 1, 2, 36, hill(0.2)),
                ("solution", "distilled", "distilled", 2, 2, 36, SLOPE), ("arms", "imp", "distilled", 2, 2, 36, HILL),
                ("arms", "imp", "random", 2, 2, 36, None if seed else HILL)):
            place = {"relation": relation, "arm": arm, "other": other, "round": before, "other_round": after, "percent": percent,
                     "seed": seed}
            found.append((place, put(store, str(place), errors)))
    return found


def test_numbers_between_unlike_networks(store):
    found = numbers(store, between=unlike(store))
    assert {name: (pytest.approx(n.value), n.n) for name, n in found.items()} == {
        "imp.rounds_barrier@20": (0.1, 2), "imp.rounds_barrier_linear@20": (0.1, 2), "imp.rounds_barrier@36": (0.2, 2),
        "imp.rounds_barrier_linear@36": (0.2, 2), "distilled.solution_barrier@36": (0.2, 2),
        "distilled.solution_barrier_linear@36": (0.1, 2), "imp_to_distilled.barrier@36": (0.25, 2),
        "imp_to_distilled.barrier_linear@36": (0.25, 2), "imp_to_random.barrier@36": (0.25, 1),
        "imp_to_random.barrier_linear@36": (0.25, 1)}
