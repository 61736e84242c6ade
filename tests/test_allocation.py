"""How many weights each tensor keeps: exact totals, hand-made cases, the published recipe for Erdos-Renyi-Kernel."""
from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_networks import drawn, flat, same, small

from dpkit import prune
from dpkit.prune import allocation

LAYERS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=8)  # (weight, cap)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.data())
def test_shares_fill_up_like_water_and_round_to_the_exact_total(layers, data):
    weights, caps = zip(*layers, strict=True)
    total = data.draw(st.integers(0, sum(caps)))
    found = prune.shares(total, weights, caps)
    assert sum(found) == total
    assert all(0 <= n <= cap for n, cap in zip(found, caps, strict=True))
    # the one level of the water, by bisection
    low, high = 0.0, float(max(caps))
    for _ in range(200):
        level = (low + high) / 2
        if sum(min(c, level * w) for w, c in layers) < total:
            low = level
        else:
            high = level
    for n, (weight, cap) in zip(found, layers, strict=True):
        assert abs(n - min(cap, high * weight)) < 1 + 1e-6


def test_remainders_by_hand():
    # 7 over 1 : 1 : 1 is 2 1/3 each: the first takes the one left over
    assert prune.shares(7, [1, 1, 1], [9, 9, 9]) == [3, 2, 2]
    # 10 over 3 : 2 : 1 with at most 4 in the first: 4, then 6 over 2 : 1
    assert prune.shares(10, [3, 2, 1], [4, 9, 9]) == [4, 4, 2]
    # 2.5, 1.25, 1.25: halves before quarters
    assert prune.shares(5, [2, 1, 1], [9, 9, 9]) == [3, 1, 1]
    assert prune.shares(0, [2, 1], [5, 5]) == [0, 0]
    assert prune.shares(5, [2, 7], [0, 5]) == [0, 5]
    for total in (-1, 11):
        with pytest.raises(ValueError, match=rf"total must lie in \[0, 10\], the sum of the caps; got {total}"):
            prune.shares(total, [1, 1], [5, 5])


def published_densities(shapes, density):
    """The densities of Evci et al. 2020 as their code finds them: the densest layer becomes dense, one at a time."""
    dense = set()
    while True:
        free = [s for i, s in enumerate(shapes) if i not in dense]
        rest = density * sum(map(math.prod, shapes)) - sum(math.prod(shapes[i]) for i in dense)
        epsilon = rest / sum(map(sum, free))
        raw = {i: epsilon * sum(s) / math.prod(s) for i, s in enumerate(shapes) if i not in dense}
        worst = max(raw, key=raw.__getitem__)
        if raw[worst] <= 1:
            return [raw.get(i, 1.0) for i in range(len(shapes))]
        dense.add(worst)


@pytest.mark.parametrize("arch", ["convnet3", "resnet10"])
@pytest.mark.parametrize("density", [0.8, 0.3, 0.1, 0.02])
def test_erk_densities_are_those_of_the_published_recipe(arch, density):
    full = prune.full(small(arch), drawn(small(arch))[0])
    count = round(density * prune.size(full))
    found = allocation.counts("erk", full, count)
    assert sum(found.values()) == count
    expected = published_densities([tuple(m.shape) for m in full.values()], count / prune.size(full))
    for (name, n), share in zip(found.items(), expected, strict=True):
        assert abs(n - share * full[name].numel()) < 1 + 1e-6, name


def test_erk_by_hand():
    # sums of shapes 4 + 5 = 9 and 2 + 2 = 4; sizes 20 and 4: of 13, nine and four
    mask = {"a": torch.ones(4, 5, dtype=torch.bool), "b": torch.ones(2, 2, dtype=torch.bool)}
    assert allocation.counts("erk", mask, 13) == {"a": 9, "b": 4}
    # of 20 the second would have 6 of its 4: it is dense and the first has 16
    assert allocation.counts("erk", mask, 20) == {"a": 16, "b": 4}
    with pytest.raises(ValueError, match="allocation must be layerwise or erk to fix the count of each tensor; got 'global'"):
        allocation.counts("global", mask, 3)


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.sampled_from(prune.ALLOCATIONS), st.data())
def test_masks_are_exact_nested_and_stable_in_ties(sizes, kind, data):
    mask = {f"t{i}": torch.ones(n, 1, dtype=torch.bool) for i, n in enumerate(sizes)}
    values = st.sampled_from([0.0, 1.0, 2.0])  # ties are the rule
    spare = [name for name in mask if data.draw(st.booleans())] if len(sizes) > 1 else []
    held = sum(mask[name].numel() for name in spare)
    before = mask
    for _ in range(3):
        scores = {n: torch.tensor([[data.draw(values)] for _ in range(len(m))]) for n, m in mask.items()}
        left = prune.surviving(before)
        if left - held < 1:
            break
        count = data.draw(st.integers(held + 1, left))
        found = prune.keep(scores, before, count, kind, spare)
        assert prune.surviving(found) == count
        assert list(found) == list(before)
        assert not (flat(found) & ~flat(before)).any()
        for name in before:
            assert name not in spare or torch.equal(found[name], before[name])
            # within a tensor the highest survive, and of equal ones the first
            ranked = sorted((i for i in range(len(before[name])) if before[name][i]), key=lambda i: (-scores[name][i].item(), i))
            kept = [i for i in range(len(before[name])) if found[name][i]]
            assert kept == sorted(ranked[:len(kept)])
        assert prune.collapsed(found) == [name for name, m in found.items() if int(m.sum()) == 0]
        before = found


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 1000), st.data())
def test_layerwise_takes_the_same_share_of_each(sizes, seed, data):
    source = torch.Generator().manual_seed(seed)
    mask = {f"t{i}": torch.rand(n, generator=source) < 0.8 for i, n in enumerate(sizes)}
    left = prune.surviving(mask)
    count = data.draw(st.integers(0, left))
    found = allocation.counts("layerwise", mask, count)
    assert sum(found.values()) == count
    for name, n in found.items():
        exact = Fraction(int(mask[name].sum()) * count, max(left, 1))
        assert math.floor(exact) <= n <= math.ceil(exact)


def test_one_ranking_of_all_is_what_it_was():
    model = small("convnet3")
    params, _ = drawn(model)
    full = prune.full(model, params)
    scores = prune.magnitude(params, full)
    for count in (1, 100, prune.size(full)):
        assert same(prune.keep(scores, full, count), prune.keep_highest(scores, full, count))


def test_sparing_without_allocation_is_one_ranking_of_the_others():
    model = small("convnet3")
    params, _ = drawn(model)
    full = prune.full(model, params)
    found = prune.keep(prune.magnitude(params, full), full, 200, spare=("conv0.weight",))
    others = {n: m for n, m in full.items() if n != "conv0.weight"}
    expected = prune.keep_highest(prune.magnitude(params, others), others, 200 - full["conv0.weight"].numel())
    assert bool(found["conv0.weight"].all())
    assert same({n: m for n, m in found.items() if n in others}, expected)


def test_wrong_wishes_are_refused():
    mask = {"a": torch.ones(3, 2, dtype=torch.bool), "b": torch.ones(2, 2, dtype=torch.bool)}
    scores = {n: torch.rand(m.shape, generator=torch.Generator()) for n, m in mask.items()}
    with pytest.raises(ValueError, match="allocation must be one of global, layerwise, erk; got 'even'"):
        prune.keep(scores, mask, 3, "even")
    with pytest.raises(ValueError, match="spare must name tensors of the mask, got 'c'; it has 'a', 'b'"):
        prune.keep(scores, mask, 3, spare=("c",))
    with pytest.raises(ValueError, match="spare must leave weights to prune, but all 10 that survive are in 'a', 'b'"):
        prune.keep(scores, mask, 10, spare=("a", "b"))
    for kind in ("layerwise", "erk"):
        with pytest.raises(ValueError, match=r"count must lie in \[1, 10\]"):
            prune.keep(scores, mask, 0, kind)
    scores["b"][0, 0] = math.nan
    for kind in prune.ALLOCATIONS:
        with pytest.raises(ValueError, match="scores must be numbers, got NaN; did the training diverge"):
            prune.keep(scores, mask, 1, kind)
