"""Frames and numbers of compared masks, against sets of weights counted in Python."""
from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from masked import SHAPES, WORK, compared, drawn, watched
from test_report import NAME, found, put

from dpkit.report import overlap
from dpkit.store import Store

ARMS = ("imp", "distilled", "random_real", "random")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def masks(seed: int, count: int) -> dict:
    return {arm: drawn(10 * seed + i, count) for i, arm in enumerate(ARMS)}


def kept(mask, layer: str = "all") -> set:
    """The kept weights as (tensor, place)."""
    return {(name, i) for name, m in mask.items() for i, on in enumerate(m.flatten().tolist()) if on and layer in ("all", name)}


def test_every_pair_and_layer_has_its_row(store):
    rows = [compared(store, masks(seed, 16), seed, 50) for seed in range(2)]
    table = overlap.overlaps(store, [*rows, ({"round": 9, "percent": 9, "seed": 9}, "0" * 64)])
    assert list(table.columns) == overlap.PAIR
    assert len(table) == 2 * 6 * 3
    assert {(r.arm_a, r.arm_b) for r in table.itertuples()} == set(itertools.combinations(ARMS, 2))
    for row in table.itertuples():
        a, b = (kept(masks(row.seed, 16)[arm], row.layer) for arm in (row.arm_a, row.arm_b))
        size = sum(math.prod(shape) for name, shape in SHAPES.items() if row.layer in ("all", name))
        assert (row.size, row.kept_a, row.kept_b, row.both) == (size, len(a), len(b), len(a & b))
        assert row.jaccard == pytest.approx(len(a & b) / len(a | b))
        assert row.hamming == pytest.approx(len(a ^ b) / size)
        assert row.excess == pytest.approx((row.jaccard - row.jaccard_chance) / (1 - row.jaccard_chance))
        assert np.isnan(row.jaccard_within) == np.isnan(row.excess_within) == (row.layer != "all")
        assert row.key == rows[row.seed][1]


def test_excess_is_nothing_at_chance_one_for_equal_masks_and_undefined_where_all_is_kept():
    chance = np.array([0.25, 0.25, 0.25, 1.0])
    found_here = overlap.excess(np.array([0.25, 1.0, 0.1, 1.0]), chance)
    assert found_here[:3] == pytest.approx([0.0, 1.0, -0.2])
    assert np.isnan(found_here[3])


def test_layers_count_what_is_kept_alone_and_on_a_path(store):
    rows = [compared(store, masks(0, 16), 0, 50, dead={"imp": 2})]
    table = overlap.layers(store, rows)
    assert list(table.columns) == overlap.LAYER
    assert len(table) == 4 * 3
    for row in table.itertuples():
        mine = kept(masks(0, 16)[row.arm], row.layer)
        others = set().union(*(kept(mask) for arm, mask in masks(0, 16).items() if arm != row.arm))
        lost = 2 if row.arm == "imp" and row.layer in ("all", "conv0.weight") else 0
        assert (row.kept, row.unique, row.effective) == (len(mine), len(mine - others), len(mine) - lost)
        assert (row.density, row.sparsity) == (pytest.approx(len(mine) / row.size), pytest.approx(1 - len(mine) / row.size))
        assert row.unique_share == pytest.approx(len(mine - others) / len(mine))
        assert row.effective_sparsity == pytest.approx(1 - (len(mine) - lost) / row.size)
        assert row.dead_share == pytest.approx(lost / len(mine))
        part = [len(kept(masks(0, 16)[row.arm], name)) / math.prod(shape) for name, shape in SHAPES.items()]
        work = sum(w * share for w, share in zip(WORK, part, strict=True)) / sum(WORK)
        assert row.flops_kept == pytest.approx(work if row.layer == "all" else row.density)


def test_frames_of_nothing_have_their_columns(store):
    broken = ({"round": 1, "percent": 50, "seed": 0}, put(store, "broken", None))
    for make, columns in ((overlap.overlaps, overlap.PAIR), (overlap.layers, overlap.LAYER), (overlap.early_bird, overlap.STEPS)):
        assert list(make(store, [])) == list(make(store, [broken])) == columns
    assert overlap.last_distances(overlap.early_bird(store, [])).empty
    assert found(store, masks=[broken], early_bird=[]) == {}


def test_a_layer_in_which_nothing_is_kept_has_no_shares(store):
    one = drawn(0, 16)
    one["classifier.weight"][:] = False
    table = overlap.layers(store, [compared(store, {"imp": one, "random": drawn(1, 16)}, 0, 50)])
    row = table[(table["arm"] == "imp") & (table["layer"] == "classifier.weight")].iloc[0]
    assert (row["kept"], row["density"], row["effective_sparsity"]) == (0, 0, 1)
    assert np.isnan(row["unique_share"])


def test_pairs_are_seen_from_one_arm(store):
    table = overlap.overlaps(store, [compared(store, masks(0, 16), 0, 50)])
    side = overlap.with_arm(table[table["layer"] == "all"], "distilled")
    assert sorted(side["arm"]) == ["imp", "random", "random_real"]


def test_the_early_mask_is_the_first_that_is_not_before_a_tenth(store):
    rows = [watched(store, "real", seed, [0, 4, 10, 50, 100], scale=0.1 * (seed + 1)) for seed in range(2)]
    rows += [watched(store, "idc", 0, [0, 9, 11, 100]), watched(store, "dm", 0, [0, 100]), watched(store, "mtt", 0, [7])]
    table = overlap.early_bird(store, rows)
    assert table[(table["source"] == "idc") & (table["step_a"] == 9) & (table["step_b"] == 100)]["distance"].tolist() == [0.2]
    last = overlap.last_distances(table)
    assert list(zip(last["source"], last["seed"], last["step_a"], last["step_b"], strict=True)) == [
        ("real", 0, 10, 100), ("real", 1, 10, 100), ("idc", 0, 11, 100)]
    known = found(store, early_bird=rows)
    assert {name: (pytest.approx(n.value), n.n) for name, n in known.items()} == {
        "masks.early_bird.real.last_distance@50": ((0.2 + 0.4) / 2, 2), "masks.early_bird.idc.last_distance@50": (0.1, 1)}


def test_numbers_of_masks_are_named_and_lead_back(store):
    rows = [compared(store, masks(seed, count), seed, percent, dead={"imp": 2})
            for seed in range(2) for count, percent in ((16, 50), (8, 75))]
    known = found(store, masks=rows)
    pairs = {name.split(".")[1] for name in known if ".jaccard@" in name}
    # overlap has no direction: distilled with IMP is not there a second time
    assert pairs == {"chance", "distilled_with_imp", "random_real_with_imp", "random_with_imp", "random_real_with_distilled",
                     "random_with_distilled"}
    table = overlap.overlaps(store, rows)
    whole = table[(table["layer"] == "all") & (table["percent"] == 75)]
    mine = whole[(whole["arm_a"] == "imp") & (whole["arm_b"] == "distilled")]
    for measure, column in (("jaccard", "jaccard"), ("jaccard_excess", "excess"),
                            ("jaccard_excess_within", "excess_within"), ("hamming", "hamming")):
        number = known[f"masks.distilled_with_imp.{measure}@75"]
        assert (number.value, number.n) == (pytest.approx(mine[column].mean()), 2)
    assert known["masks.chance.jaccard@75"].value == pytest.approx(mine["jaccard_chance"].mean())
    other = whole[(whole["arm_a"] == "imp") & (whole["arm_b"] == "random_real")]
    difference = known["masks.distilled_with_imp_minus_random_real_with_imp.jaccard_excess@75"]
    assert difference.value == pytest.approx(mine["excess"].mean() - other["excess"].mean())
    assert known["masks.imp.effective_sparsity@75"].value == pytest.approx(1 - 6 / 32)
    assert known["masks.random.effective_sparsity@75"].value == pytest.approx(0.75)
    each = overlap.layers(store, rows)
    each = each[(each["layer"] == "all") & (each["percent"] == 75) & (each["arm"] == "imp")]
    assert known["masks.imp.unique@75"].value == pytest.approx(each["unique_share"].mean())
    assert known["masks.imp.flops_kept@75"].value == pytest.approx(each["flops_kept"].mean())
    assert all(NAME.fullmatch(name) for name in known)
    used = {artifact.key for _, _, artifact in store.lineage(known["masks.imp.unique@75"].key)}
    assert used == {known["masks.imp.unique@75"].key, rows[1][1], rows[3][1]}


def test_what_is_not_defined_has_no_number(store):
    everything = {arm: drawn(0, 32) for arm in ("imp", "distilled")}
    known = found(store, masks=[compared(store, everything, 0, 1)])
    assert known["masks.distilled_with_imp.jaccard@1"].value == 1
    assert "masks.distilled_with_imp.jaccard_excess@1" not in known


def test_a_collapsed_layer_is_named():
    rows = [{"arm": arm, "percent": 90, "seed": seed, "layer": layer, "kept": kept}
            for arm, counts in (("snip", (0, 5)), ("imp", (3, 2))) for seed in range(2)
            for layer, kept in zip(("conv0", "classifier"), counts if seed == 0 else (1, 4), strict=True)]
    table = pd.DataFrame([*rows, {"arm": "snip", "percent": 90, "seed": 0, "layer": "all", "kept": 5}])
    assert overlap.collapsed(table) == ("Layer collapse, layers that lost all their weights: SNIP at 90% (conv0; 1 of 2 "
                                        "initialisations).")
    assert overlap.collapsed(table[table["arm"] == "imp"]).startswith("Layer collapse: no arm lost all weights")
