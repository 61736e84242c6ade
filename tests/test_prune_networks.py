"""All architectures: masks equal those of torch.nn.utils.prune; arms of the loop; which names belong to norms."""
from __future__ import annotations

import pytest
import torch
from prune_networks import drawn, flat, random_mask, same, small
from torch import nn
from torch.nn.utils import prune as torch_prune

from dpkit import models, prune, tree
from dpkit.models import ARCHITECTURES, ModelSpec
from dpkit.prune import PruneSpec, Ticket

SMALL = small("convnet3", norm="batch")


class Holder(nn.Module):
    """The prunable weights of a network as modules of torch, in forward order."""

    def __init__(self, params, names):
        super().__init__()
        self.weights = nn.ModuleList()
        for name in names:
            module = nn.Module()
            module.weight = nn.Parameter(params[name].clone())
            self.weights.append(module)

    def masks(self):
        return [module.weight_mask.bool() for module in self.weights]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_ranking_removes_what_torch_removes(arch):
    model = small(arch)
    params, _ = drawn(model)
    names = models.prunable(model)
    values = torch.cat([params[n].abs().reshape(-1) for n in names])
    full = prune.full(model, params)
    assert tuple(full) == names
    for fraction in (0.2, 0.9):
        cut = values.sort().values[round(fraction * len(values)) - 1:][:2]
        assert cut[0] < cut[1]  # no tie at the cut, where torch does not say which it takes
        holder = Holder(params, names)
        torch_prune.global_unstructured([(m, "weight") for m in holder.weights], torch_prune.L1Unstructured, amount=fraction)
        found = prune.prune(prune.magnitude(params, full), full, fraction)
        for name, theirs in zip(names, holder.masks(), strict=True):
            assert torch.equal(found[name], theirs), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layerwise_removes_what_torch_removes_from_each_layer(arch):
    model = small(arch)
    params, _ = drawn(model)
    full = prune.full(model, params)
    found = prune.select(PruneSpec(allocation="layerwise"), prune.magnitude(params, full), full, prune.size(full) * 3 // 10)
    assert prune.surviving(found) == prune.size(full) * 3 // 10
    holder = Holder(params, full)
    for module, (name, mask) in zip(holder.weights, found.items(), strict=True):
        left = int(mask.sum())
        assert abs(left - 0.3 * mask.numel()) < 1  # the same share of each, to a whole number
        torch_prune.l1_unstructured(module, "weight", amount=mask.numel() - left)
        assert torch.equal(mask, module.weight_mask.bool()), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_mask_is_that_of_one_architecture(arch):
    full = prune.full(small(arch), drawn(small(arch))[0])
    prune.check_model(full, small(arch))
    other = small("resnet10" if arch == "convnet3" else "convnet3")
    with pytest.raises(ValueError, match=rf"mask must cover the prunable weights of {other.arch}, but it (lacks|has) '"):
        prune.check_model(full, other)


def test_what_is_wrong_with_a_mask_is_said_in_a_line():
    full = prune.full(SMALL, drawn(SMALL)[0])
    without = {n: m for n, m in full.items() if n != "conv1.weight"}
    with pytest.raises(ValueError, match=r"of convnet3, but it lacks 'conv1.weight'; use a mask of this architecture"):
        prune.check_model(without, SMALL)
    with pytest.raises(ValueError, match=r"but it lacks 'conv1.weight' and has 'a', 'b', 'c' and 1 more, which convnet3 lacks"):
        prune.check_model(without | dict.fromkeys("abcd", full["conv1.weight"]), SMALL)
    with pytest.raises(ValueError, match=r"conv0.weight is \(4, 3, 3, 3\), the weight of convnet3 with width 5 is \(5, 3, 3, 3"):
        prune.check_model(full, SMALL.replace(width=5))
    with pytest.raises(ValueError, match=r"mask of conv0.weight must be boolean, got torch.float32; compare with zero first"):
        prune.check_model({n: m.float() for n, m in full.items()}, SMALL)


# --- what rewinding resets ---
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_are_told_from_biases(arch):
    model = small(arch)
    params, _ = drawn(model)
    # a scale begins at one everywhere, and nothing else does; its shift has its name
    scales = [n for n, t in params.items() if n.endswith(".weight") and bool((t == 1).all())]
    assert set(prune.norm_names(model)) == {f"{n.removesuffix('weight')}{what}" for n in scales for what in ("weight", "bias")}
    assert not set(prune.norm_names(model)) & set(models.prunable(model))
    assert bool(scales) == (model.norm_kind != "none")


def test_a_transplant_of_norms_takes_nothing_else():
    start, trained = drawn(SMALL, 0), drawn(SMALL, 1)
    trained = ({n: t + 0.5 for n, t in trained[0].items()}, {n: t + 0.5 for n, t in trained[1].items()})
    mask = random_mask(SMALL, 0.4)
    ticket = prune.rewind(trained, start, mask, 2, "norm_only", model=SMALL)
    for name, t in ticket.params.items():
        if name in mask:
            assert torch.equal(t, torch.where(mask[name], start[0][name], 0.0))
        elif name.startswith("norm"):
            assert torch.equal(t, trained[0][name])
        else:
            assert name.endswith("bias")
            assert torch.equal(t, start[0][name])
    assert list(ticket.params) == list(start[0])
    assert same(ticket.buffers, trained[1])


def test_a_transplant_needs_norms_and_the_architecture():
    start = drawn(SMALL)
    with pytest.raises(ValueError, match="scope norm_only needs the architecture to name layers, got none; pass model="):
        prune.rewind(start, start, random_mask(SMALL, 0.5), 1, "norm_only")
    bare = SMALL.replace(norm="none")
    start = drawn(bare)
    with pytest.raises(ValueError, match="scope norm_only needs a network with norms, got convnet3 with norm none; use all"):
        prune.rewind(start, start, random_mask(bare, 0.5), 1, "norm_only", model=bare)


# --- arms of the loop ---
def test_settings_that_were_always_so_leave_keys_alone():
    assert PruneSpec().to_dict() == {"fraction": 0.2, "rounds": 10, "scope": "all"}
    assert PruneSpec(allocation="erk", spare=("last", "first")).to_dict() == {
        "fraction": 0.2, "rounds": 10, "scope": "all", "allocation": "erk", "spare": ["first", "last"]}
    assert PruneSpec(spare=("last", "first")) == PruneSpec(spare=("first", "last"))


def ticket_of(model=SMALL, mask=None):
    start = drawn(model)
    return Ticket(*start, mask or prune.full(model, start[0]), 4), start


def test_a_round_prunes_by_any_score():
    ticket, start = ticket_of(mask=random_mask(SMALL, 0.5))
    trained, seen = drawn(SMALL, 3), []

    def gradients(network, mask):
        seen.append((network, mask))
        return {n: -t.abs() for n, t in network[0].items()}  # names beyond the mask are allowed

    found = prune.next_ticket(PruneSpec(fraction=0.3), ticket, trained, start, score=gradients)
    assert seen == [(trained, ticket.mask)]
    count = prune.survivors(prune.surviving(ticket.mask), 0.3, 1)[1]
    assert same(found.mask, prune.keep_highest({n: -trained[0][n].abs() for n in ticket.mask}, ticket.mask, count))
    assert found.round == 5
    assert same(found.params, prune.apply(start[0], found.mask))


def test_one_cut_reaches_the_count_of_many_rounds():
    ticket, start = ticket_of()
    trained = drawn(SMALL, 3)
    total = prune.size(ticket.mask)
    count = prune.survivors(total, 0.2, 7)[-1]
    found = prune.next_ticket(PruneSpec(), ticket, trained, start, count=count)
    assert prune.surviving(found.mask) == count
    # magnitudes of one network rank the same in one cut and in seven
    mask = ticket.mask
    for _ in range(7):
        mask = prune.prune(prune.magnitude(trained[0], mask), mask, 0.2)
    assert same(found.mask, mask)


@pytest.mark.parametrize("allocation", prune.ALLOCATIONS)
@pytest.mark.parametrize("spare", [(), ("first",), ("first", "last")])
def test_every_allocation_has_the_same_counts_and_nested_masks(allocation, spare):
    model = small("resnet10")
    spec, (ticket, start) = PruneSpec(fraction=0.3, rounds=5, allocation=allocation, spare=spare), ticket_of(model)
    found = list(prune.iterate(spec, lambda t: drawn(model, 10 + t.round), start, ticket.mask, model=model))
    total, before = prune.size(ticket.mask), ticket.mask
    for made in found:
        assert prune.surviving(made.mask) == prune.survivors(total, 0.3, made.round)[-1]
        assert prune.sparsity(made.mask) == pytest.approx(spec.sparsity(made.round, total), abs=1e-12)
        assert not (flat(made.mask) & ~flat(before)).any()
        assert all(bool(made.mask[name].all()) for name in prune.spared(model, spare))
        before = made.mask
    assert len(found) == 5


def test_spared_layers_are_the_first_and_the_classifier():
    assert prune.spared(small("resnet18"), ("last", "first")) == ("conv1.weight", "fc.weight")
    assert prune.spared(SMALL, ()) == ()
    with pytest.raises(ValueError, match="spare must name layers among first, last; got 'stem'"):
        prune.spared(SMALL, ("stem",))


def test_impossible_rounds_are_refused():
    ticket, start = ticket_of()
    one = prune.keep_highest(prune.magnitude(start[0], ticket.mask), ticket.mask, 1)
    with pytest.raises(ValueError, match=r"a round must leave at least 1 weight, but fraction 0.8 of 1 removes all; take fewer"):
        prune.next_ticket(PruneSpec(fraction=0.8), Ticket(*start, one, 9), start, start)
    with pytest.raises(ValueError, match="spare needs the architecture to name layers, got none; pass model="):
        prune.next_ticket(PruneSpec(spare=("first",)), ticket, start, start)
    spec, total = PruneSpec(fraction=0.9, spare=("first", "last")), prune.size(ticket.mask)
    held = 4 * 3 * 9 + 3 * 4 * 4
    with pytest.raises(ValueError, match=rf"count must lie in \[{held + 1}, {total}\], as {held} weights are spared and "
                                         rf"{total - held} others survive; got {total - round(0.9 * total)}; spare less"):
        prune.next_ticket(spec, ticket, start, start, model=SMALL)


def test_large_networks_keep_their_counts_in_other_units():
    # counts beyond float32's whole numbers must not be rounded: the recurrence works on Python's integers
    model = ModelSpec(arch="resnet18", width=32)
    total = models.count_prunable(model)
    shapes = [m.shape for m in prune.full(model, models.init(model, tree.generator_for(0, "x"))[0]).values()]
    for count in prune.survivors(total, 0.2, 3)[1:]:
        assert sum(prune.shares(count, [sum(s) for s in shapes], [s.numel() for s in shapes])) == count
