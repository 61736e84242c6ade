"""Masks with exact counts against torch.nn.utils.prune and by property, and the loop that finds them."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MODEL
from torch import nn
from torch.nn.utils import prune as torch_prune

from dpkit import models, prune
from dpkit.models import ModelSpec
from dpkit.prune import PruneSpec, Ticket

FRACTIONS = st.floats(0.01, 0.99)


def network(seed=0):
    return models.init(MODEL, torch.Generator().manual_seed(seed))


def flat(mask):
    return torch.cat([m.flatten() for m in mask.values()])


def two_tensors(values, alive):
    """Scores and mask as two tensors, cut in the middle."""
    half = len(values) // 2
    scores, keep = torch.tensor(values, dtype=torch.float32), torch.tensor(alive)
    return {"a": scores[:half], "b": scores[half:]}, {"a": keep[:half], "b": keep[half:]}


def sparse(seed=0, share=0.5):
    source = torch.Generator().manual_seed(seed)
    return {n: torch.rand(network()[0][n].shape, generator=source) < share for n in models.prunable(MODEL)}


# --- counts ---
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exactly_so_many_of_the_highest_survive(data):
    # few different values, so that ties are the rule
    rows = data.draw(st.lists(st.tuples(st.sampled_from([0.0, -0.0, 1.0, 2.5, -math.inf, math.inf]), st.booleans()),
                              min_size=2, max_size=40).filter(lambda rows: any(alive for _, alive in rows)))
    values, alive = zip(*rows, strict=True)
    count = data.draw(st.integers(1, sum(alive)))
    scores, mask = two_tensors(values, alive)
    kept = flat(prune.keep_highest(scores, mask, count)).tolist()
    assert sum(kept) == count
    assert all(a for k, a in zip(kept, alive, strict=True) if k)
    # the definition: by score, then by position
    ranked = sorted((i for i in range(len(values)) if alive[i]), key=lambda i: (-values[i], i))
    assert [i for i, k in enumerate(kept) if k] == sorted(ranked[:count])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6), FRACTIONS, st.integers(1, 12))
def test_survivors_follow_the_recurrence(total, fraction, rounds):
    counts = prune.survivors(total, fraction, rounds)
    assert len(counts) == rounds + 1
    assert counts[0] == total
    for before, after in itertools.pairwise(counts):
        assert 0 <= after <= before
        assert abs(after - (1 - fraction) * before) <= 0.5 + 1e-9  # 1 - 0.9 is not 0.1 to the last bit


@settings(max_examples=25, deadline=None)
@given(FRACTIONS, st.integers(0, 1000))
def test_each_round_keeps_part_of_the_one_before(fraction, seed):
    mask = prune.full(MODEL, network()[0])
    counts = prune.survivors(prune.size(mask), fraction, 4)
    for round in range(1, 5):
        if counts[round] == 0:
            break
        scores = prune.magnitude(network(seed + round)[0], mask)
        smaller = prune.prune(scores, mask, fraction)
        assert prune.surviving(smaller) == counts[round]
        assert not (flat(smaller) & ~flat(mask)).any()
        mask = smaller


def test_the_paper_s_sparsities():
    spec, total = PruneSpec(fraction=0.2, rounds=10), models.count_prunable(ModelSpec())
    assert total == 318_848
    percent = [round(100 * spec.sparsity(r, total), 2) for r in range(11)]
    assert percent == pytest.approx([0, 20, 36, 48.8, 59.04, 67.23, 73.79, 79.03, 83.22, 86.58, 89.26], abs=0.005)


def test_halves_round_to_even_as_in_torch():
    assert prune.survivors(25, 0.5, 1) == (25, 13)
    assert prune.survivors(27, 0.5, 1) == (27, 13)


@pytest.mark.parametrize("fraction", [0.2, 0.425, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_rounds_equal_those_of_torch(fraction, seed):
    params, _ = network(seed)
    module = nn.Module()
    for i, channels in enumerate((3, 4, 4)):
        module.add_module(f"conv{i}", nn.Conv2d(channels, 4, 3))
    module.add_module("classifier", nn.Linear(4, 3))
    targets = [(child, "weight") for child in module.children()]
    mask = prune.full(MODEL, params)
    for round in range(1, 4):
        trained = network(10 * seed + round)[0]  # other weights each round, as after training
        for name, child in module.named_children():
            weight = child.weight_orig if round > 1 else child.weight
            weight.data = trained[f"{name}.weight"].clone()
            if round > 1:
                child.weight = child.weight_orig * child.weight_mask
        torch_prune.global_unstructured(targets, torch_prune.L1Unstructured, amount=fraction)
        mask = prune.prune(prune.magnitude(trained, mask), mask, fraction)
        assert prune.surviving(mask) == sum(int(c.weight_mask.sum()) for c, _ in targets)
        for name, child in module.named_children():
            assert torch.equal(mask[f"{name}.weight"], child.weight_mask.bool())


# --- facts about masks ---
def test_masks_speak_of_the_prunable_weights_and_are_counted():
    mask = prune.full(MODEL, network()[0])
    assert tuple(mask) == models.prunable(MODEL)
    assert prune.size(mask) == prune.surviving(mask) == models.count_prunable(MODEL)
    assert prune.sparsity(mask) == 0
    mask = {"a": torch.tensor([True, False, False]), "b": torch.tensor([[False]]), "c": torch.tensor([True] * 4)}
    assert prune.sparsity(mask) == pytest.approx(3 / 8)
    assert prune.density(mask) == {"a": pytest.approx(1 / 3), "b": 0, "c": 1}
    assert prune.collapsed(mask) == ["b"]
    assert prune.collapsed(prune.full(MODEL, network()[0])) == []


def test_overlap_by_hand():
    a = {"x": torch.tensor([True, True, False]), "y": torch.tensor([True, False])}
    b = {"y": torch.tensor([True, True]), "x": torch.tensor([True, False, False])}  # another order of names
    assert prune.jaccard(a, b) == pytest.approx(2 / 4)
    assert prune.jaccard(a, a) == 1
    assert prune.jaccard(a, {n: ~m for n, m in a.items()}) == 0
    nothing = {n: torch.zeros_like(m) for n, m in a.items()}
    assert prune.jaccard(nothing, nothing) == 1


def test_applying_a_mask_leaves_true_zeros_and_its_input():
    params = {"w": torch.tensor([-1.0, math.nan, -2.0, 3.0]), "b": torch.tensor([5.0])}
    found = prune.apply(params, {"w": torch.tensor([False, False, True, True])})
    assert found["w"].tolist() == [0, 0, -2, 3]
    assert not torch.signbit(found["w"][:2]).any()
    assert found["b"] is params["b"]
    assert math.isnan(params["w"][1])


def test_random_masks_have_the_count_and_depend_on_the_generator():
    mask = prune.full(MODEL, network()[0])
    found = [prune.keep_highest(prune.random_scores(mask, torch.Generator().manual_seed(s)), mask, 100) for s in (1, 1, 2)]
    assert [prune.surviving(m) for m in found] == [100] * 3
    assert torch.equal(flat(found[0]), flat(found[1]))
    share = 100 / prune.size(mask)
    assert prune.jaccard(found[0], found[2]) == pytest.approx(share / (2 - share), abs=0.08)  # as chance has it


# --- the loop ---
@pytest.mark.parametrize("scope", ["all", "weights"])
def test_what_rewinding_resets(scope):
    start, trained, mask = network(0), network(1), sparse()
    trained = (trained[0], {"norm0.running_mean": torch.ones(4)})
    start = (start[0], {"norm0.running_mean": torch.zeros(4)})
    ticket = prune.rewind(trained, start, mask, 3, scope)
    assert ticket.round == 3
    for name, weight in ticket.params.items():
        if name in mask:
            assert torch.equal(weight, torch.where(mask[name], start[0][name], 0.0))
        else:
            assert torch.equal(weight, (start if scope == "all" else trained)[0][name])
    assert float(ticket.buffers["norm0.running_mean"][0]) == (0 if scope == "all" else 1)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope must be one of all, weights, norm_only; got 'nothing'"):
        prune.rewind(network(), network(), sparse(), 1, "nothing")


def test_the_loop_trains_each_ticket_and_yields_each_round():
    spec, start, seen = PruneSpec(fraction=0.3, rounds=4), network(0), []

    def fit(ticket: Ticket):
        seen.append(ticket)
        return network(50 + ticket.round)

    full = prune.full(MODEL, start[0])
    tickets = list(prune.iterate(spec, fit, start, full))
    assert [t.round for t in tickets] == [1, 2, 3, 4]
    assert [t.round for t in seen] == [0, 1, 2, 3]
    assert seen[1:] == tickets[:3]
    counts = prune.survivors(prune.size(full), 0.3, 4)
    assert [prune.surviving(t.mask) for t in tickets] == list(counts[1:])
    mask = full
    for ticket in tickets:
        trained = network(50 + ticket.round - 1)[0]
        mask = prune.keep_highest(prune.magnitude(trained, mask), mask, counts[ticket.round])
        assert torch.equal(flat(ticket.mask), flat(mask))
        for name, weight in ticket.params.items():
            expected = torch.where(mask[name], start[0][name], 0.0) if name in mask else start[0][name]
            assert torch.equal(weight, expected)


def test_the_loop_rewinds_as_it_is_told():
    spec, start = PruneSpec(fraction=0.3, rounds=3, scope="weights"), network(0)
    full = prune.full(MODEL, start[0])
    for ticket in prune.iterate(spec, lambda ticket: network(50 + ticket.round), start, full):
        trained = network(50 + ticket.round - 1)[0]
        assert torch.equal(ticket.params["conv0.bias"], trained["conv0.bias"])
        kept = ticket.mask["conv0.weight"]
        assert torch.equal(ticket.params["conv0.weight"][kept], start[0]["conv0.weight"][kept])


def test_the_loop_goes_on_from_a_sparse_mask():
    begin, start = sparse(), network(0)
    first = next(prune.iterate(PruneSpec(fraction=0.5, rounds=1), lambda ticket: network(1), start, begin))
    left = prune.surviving(begin)
    assert prune.surviving(first.mask) == left - round(left / 2)
    assert not (flat(first.mask) & ~flat(begin)).any()


def test_the_loop_computes_nothing_before_it_is_asked():
    calls = []
    loop = prune.iterate(PruneSpec(rounds=3), lambda t: calls.append(t.round) or network(1), network(), sparse())
    assert calls == []
    next(loop)
    assert calls == [0]


# --- refusals ---
@pytest.mark.parametrize("fraction, shown", [(0, "0.0"), (1, "1.0"), (1.0, "1.0"), (-0.2, "-0.2"), (20, "20.0")])
def test_a_fraction_outside_the_open_interval_is_refused(fraction, shown):
    with pytest.raises(ValueError) as caught:
        PruneSpec(fraction=fraction)
    assert str(caught.value) == f"fraction must lie in (0, 1), got {shown}"


@pytest.mark.parametrize("fraction", [0, 1.0, math.nan])
def test_survivors_refuse_the_same_fractions(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\)"):
        prune.survivors(100, fraction, 1)


@pytest.mark.parametrize("change, line", [
    ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ({"scope": "biases"}, "scope must be one of all, weights, norm_only; got 'biases'"),
    ({"allocation": "uniform"}, "allocation must be one of global, layerwise, erk; got 'uniform'"),
    ({"spare": ("first", "middle")}, "spare must name first or last, each at most once; got first, middle"),
    ({"spare": ("last", "last")}, "spare must name first or last, each at most once; got last, last"),
])
def test_wrong_settings_are_refused(change, line):
    with pytest.raises(ValueError, match=line):
        PruneSpec(**change)


def test_scores_that_are_no_numbers_are_refused_where_they_matter():
    params, mask = network()[0], sparse()
    for alive in (True, False):
        broken = {n: t.clone() for n, t in params.items()}
        broken["conv1.weight"][mask["conv1.weight"] == alive] = math.nan
        if alive:
            with pytest.raises(ValueError, match="scores must be numbers, got NaN; did the training diverge"):
                prune.prune(prune.magnitude(broken, mask), mask, 0.5)
        else:
            assert prune.surviving(prune.prune(prune.magnitude(broken, mask), mask, 0.5)) > 0


@pytest.mark.parametrize("count", [0, -1, 4])
def test_impossible_counts_are_refused(count):
    scores, mask = two_tensors([1.0, 2.0, 3.0, 4.0], [True, False, True, True])
    with pytest.raises(ValueError, match=rf"count must lie in \[1, 3\], the surviving weights; got {count}"):
        prune.keep_highest(scores, mask, count)


def test_a_mask_of_another_architecture_is_refused_naming_both():
    params = network()[0]
    other = ModelSpec(arch="resnet10", width=2, image_size=8)
    foreign = prune.full(other, models.init(other, torch.Generator())[0])
    with pytest.raises(ValueError) as caught:
        prune.apply(params, foreign)
    line = str(caught.value)
    assert line.startswith("mask names 'layer1.0.conv1.weight', 'layer1.0.conv2.weight', 'layer2.0.conv1.weight' and ")
    assert "which the network lacks, and leaves out 'conv0.weight', 'conv2.weight', 'classifier.weight'; use a mask of" in line
    wide = MODEL.replace(width=5)
    wider = prune.full(wide, models.init(wide, torch.Generator())[0])
    with pytest.raises(ValueError, match=r"conv0.weight is \(5, 3, 3, 3\), the weight is \(4, 3, 3, 3\); use a mask of"):
        prune.apply(params, wider)
