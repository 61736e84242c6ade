"""Agreement of masks: counted by sets, with chance levels by full enumeration, by scipy and by sampling."""
from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_networks import drawn, random_mask, small
from scipy.stats import hypergeom

from dpkit import prune, tree

SIZES = {"a": (3, 4), "b": (2, 2, 1), "c": (1,)}


def masks_of(seed, densities=(0.7, 0.4, 0.2, 0.0)):
    source = tree.generator_for(seed, "masks")
    return {f"arm{i}": {n: torch.rand(shape, generator=source) < share for n, shape in SIZES.items()}
            for i, share in enumerate(densities)}


def positions(mask, name=None):
    return {(n, i) for n, m in mask.items() if name in (None, n) for i in m.flatten().nonzero().flatten().tolist()}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_everything_counted_is_what_sets_say(seed):
    masks = masks_of(seed)
    found = prune.compare(masks)
    assert found.names == tuple(masks)
    assert found.tensors == tuple(SIZES)
    assert found.sizes.tolist() == [12, 4, 1]
    for (i, a), (j, b) in itertools.product(enumerate(masks.values()), repeat=2):
        for k, name in enumerate([*SIZES, None]):
            x, y = positions(a, name), positions(b, name)
            total = 17 if name is None else int(found.sizes[k])
            if name:
                assert int(found.kept[i, k]) == len(x)
                assert int(found.both[i, j, k]) == len(x & y)
            assert float(found.jaccard[i, j, k]) == pytest.approx(len(x & y) / len(x | y) if x | y else 1, abs=1e-15)
            assert float(found.hamming[i, j, k]) == pytest.approx(len(x ^ y) / total, abs=1e-15)
            others = set().union(*(positions(m, name) for n, m in enumerate(masks.values()) if n != i))
            assert int(found.unique[i, k]) == len(x - others)
        assert float(found.jaccard[i, j, -1]) == pytest.approx(prune.jaccard(a, b), abs=1e-15)


def test_many_positions_are_counted_in_pieces_exactly(monkeypatch):
    masks = masks_of(5)
    whole = prune.compare(masks)
    monkeypatch.setitem(prune.compare.__globals__, "COLUMNS", 5)
    pieces = prune.compare(masks)
    assert torch.equal(whole.both, pieces.both)
    assert torch.equal(whole.unique, pieces.unique)
    assert torch.equal(prune.distances(list(masks.values())), pieces.hamming[..., -1])


# --- chance ---
def subsets(size, kept):
    return [frozenset(c) for c in itertools.combinations(range(size), kept)]


def index(x, y):
    return len(x & y) / len(x | y) if x | y else 1.0


@pytest.mark.parametrize("size, left, right", [(6, 2, 3), (5, 5, 2), (7, 4, 4), (4, 0, 2), (3, 0, 0), (1, 1, 1), (6, 1, 6),
                                               (8, 7, 5)])
def test_chance_is_the_mean_over_all_masks(size, left, right):
    pairs = list(itertools.product(subsets(size, left), subsets(size, right)))
    full = {"x": torch.ones(size, dtype=torch.bool)}
    scores = {"x": torch.arange(size, dtype=torch.float32)}
    none = {"x": torch.zeros(size, dtype=torch.bool)}
    a, b = (prune.keep_highest(scores, full, n) if n else none for n in (left, right))
    found = prune.compare({"a": a, "b": b})
    for k in (0, -1):
        assert float(found.jaccard_chance[0, 1, k]) == pytest.approx(statistics.fmean(index(*pair) for pair in pairs), rel=1e-12)
        differ = statistics.fmean(len(x ^ y) / size for x, y in pairs)
        assert float(found.hamming_chance[0, 1, k]) == pytest.approx(differ, abs=1e-12)


@pytest.mark.parametrize("size, left, right", [(50, 20, 7), (1000, 900, 950), (20_000, 37, 19_000), (300_000, 30_000, 33_000)])
def test_chance_is_that_of_the_hypergeometric_distribution(size, left, right):
    law = hypergeom(size, left, right)
    found = prune.compare.__globals__["chance_jaccard"](left, right, size)
    assert found == pytest.approx(law.expect(lambda x: x / (left + right - x)), rel=1e-6)


def test_chance_with_given_layers_by_enumeration():
    shapes, kept = {"a": 6, "b": 4}, {"x": (5, 1), "y": (5, 1)}
    masks = {name: {t: torch.arange(n) < k for (t, n), k in zip(shapes.items(), counts, strict=True)}
             for name, counts in kept.items()}
    pairs = itertools.product(*(subsets(n, kept[arm][i]) for i, n in enumerate(shapes.values()) for arm in kept))
    exact_j, exact_h = [], []
    for x0, y0, x1, y1 in pairs:
        both, either = len(x0 & y0) + len(x1 & y1), len(x0 | y0) + len(x1 | y1)
        exact_j.append(both / either)
        exact_h.append((either - both) / 10)
    found = prune.compare(masks)
    assert float(found.hamming_within[0, 1]) == pytest.approx(statistics.fmean(exact_h), rel=1e-12)
    # to second order: so few survivors are the hardest case there is
    assert float(found.jaccard_within[0, 1]) == pytest.approx(statistics.fmean(exact_j), rel=0.02)
    assert float(found.jaccard_within[0, 1]) != pytest.approx(float(found.jaccard_chance[0, 1, -1]), rel=0.02)


def test_one_layer_within_is_the_layer_itself():
    masks = {name: {"a": m["a"]} for name, m in masks_of(2, (0.6, 0.5)).items()}
    found = prune.compare(masks)
    assert float(found.jaccard_within[0, 1]) == pytest.approx(float(found.jaccard_chance[0, 1, 0]), rel=0.02)
    assert float(found.hamming_within[0, 1]) == pytest.approx(float(found.hamming_chance[0, 1, 0]), rel=1e-12)


def test_shuffled_masks_agree_by_chance_within_layers_and_by_more_overall():
    model = small("resnet10")
    params, _ = drawn(model)
    full = prune.full(model, params)
    # a mask with very unequal layers, and shuffles of it: equal densities are all that they share
    mask = prune.keep_highest(prune.magnitude(params, full), full, prune.size(full) // 10)
    masks = {"found": mask} | {f"s{i}": prune.shuffle_mask(mask, tree.generator_for(i, "s")) for i in range(12)}
    found = prune.compare(masks)
    pairs = [(i, j) for i, j in itertools.combinations(range(13), 2)]
    within = torch.stack([found.excess_within[i, j] for i, j in pairs])
    overall = torch.stack([found.excess[i, j, -1] for i, j in pairs])
    error = float(within.std()) / math.sqrt(12)  # the pairs share twelve shuffles
    assert abs(float(within.mean())) < 4 * error
    assert float(overall.mean()) > 0.02
    partial = [k for k in range(len(full)) if 0 < found.kept[0, k] < found.sizes[k]]
    assert len(partial) > 5
    for k in partial:  # and layer by layer by chance
        excess = torch.stack([found.excess[i, j, k] for i, j in pairs])
        assert abs(float(excess.mean())) < 4 * float(excess.std()) / math.sqrt(12)


def test_excess_is_one_for_equal_masks_and_undefined_where_chance_is_one():
    mask = random_mask(small("convnet3"), 0.3)
    found = prune.compare({"a": mask, "b": {n: m.clone() for n, m in mask.items()}})
    assert found.excess[0, 1].tolist() == pytest.approx([1.0] * 5)
    assert float(found.excess_within[0, 1]) == pytest.approx(1)
    full = {n: torch.ones_like(m) for n, m in mask.items()}
    assert all(math.isnan(v) for v in prune.compare({"a": full, "b": full}).excess.flatten().tolist())
    nothing = {n: torch.zeros_like(m) for n, m in mask.items()}
    found = prune.compare({"a": nothing, "b": nothing})
    assert found.jaccard.min() == 1
    assert found.hamming.max() == 0
    assert found.jaccard_within.min() == 1


def test_large_masks_are_compared_at_once():
    source = tree.generator_for(1, "large")
    masks = {f"m{i}": {"w": torch.rand(1200, 1000, generator=source) < 0.1} for i in range(6)}  # two pieces of columns
    found = prune.compare(masks)
    apart = found.excess[..., -1][~torch.eye(6, dtype=torch.bool)]
    assert apart.abs().max() < 0.002
    assert found.both[0, 0, 0] == masks["m0"]["w"].sum()


# --- distances along a training ---
def test_early_bird_distances_by_hand():
    like = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    times = [{"a": torch.tensor([3.0, -2.0, 1.0]), "b": torch.tensor([0.5, 0.1]), "bias": torch.ones(1)},
             {"a": torch.tensor([-3.0, 0.2, 1.0]), "b": torch.tensor([0.5, -4.0]), "bias": torch.ones(1)},
             {"a": torch.tensor([0.1, 0.2, 1.0]), "b": torch.tensor([0.5, -4.0]), "bias": torch.ones(1)}]
    # kept: a0 a1; a0 b1; a2 b1
    assert prune.early_bird(times, like, 2).tolist() == [[0, 0.4, 0.8], [0.4, 0, 0.4], [0.8, 0.4, 0]]


def test_early_bird_obeys_the_mask_it_is_given():
    like = {"a": torch.tensor([True, False, True, True])}
    times = [{"a": torch.tensor([1.0, 9.0, 2.0, 3.0])}, {"a": torch.tensor([3.0, 9.0, 2.0, 1.0])}]
    assert prune.early_bird(times, like, 1).tolist() == [[0, 0.5], [0.5, 0]]
    with pytest.raises(ValueError, match=r"count must lie in \[1, 3\], the surviving weights; got 4"):
        prune.early_bird(times, like, 4)


# --- refusals ---
def test_masks_that_cannot_be_compared_are_refused_naming_both():
    one = {"x": torch.ones(2, dtype=torch.bool), "y": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="comparing needs at least 1 mask, got none"):
        prune.compare({})
    with pytest.raises(ValueError, match="comparing needs at least 1 mask, got none"):
        prune.distances([])
    with pytest.raises(ValueError, match="masks imp and dm must have the same tensors, but 'y' is in imp and not in dm; compare"):
        prune.compare({"imp": one, "dm": {"x": one["x"]}})
    with pytest.raises(ValueError, match="but 'z' is in dm and not in imp; compare masks of one architecture"):
        prune.compare({"imp": one, "dm": one | {"z": one["x"]}})
    with pytest.raises(ValueError, match="but 'y' is in imp and not in dm and 'z' in dm and not in imp; compare masks of"):
        prune.compare({"imp": one, "dm": {"x": one["x"], "z": one["y"]}})
    with pytest.raises(ValueError, match=r"the same shapes, but y is \(3,\) in imp and \(1,\) in dm; compare masks of one"):
        prune.compare({"imp": one, "dm": {"x": one["x"], "y": torch.ones(1, dtype=torch.bool)}})
    with pytest.raises(ValueError, match="masks number 0 and number 1 must have the same tensors"):
        prune.distances([one, {"x": one["x"]}])


def test_one_mask_can_be_compared_and_stored(tmp_path):
    from safetensors.torch import save_file

    mask = {"a": torch.tensor([True, False, True])}
    found = prune.compare({"only": mask})
    # refuses tensors that share memory
    save_file({"kept": found.kept, "both": found.both, "unique": found.unique}, str(tmp_path / "x.safetensors"))
    assert found.unique.tolist() == [[2, 2]]
