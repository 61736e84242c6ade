"""Controls share one property with a ticket and differ in all others."""
from __future__ import annotations

import pytest
import torch
from prune_networks import drawn, flat, random_mask, same, small

from dpkit import prune, tree
from dpkit.prune import Ticket

MODEL = small("convnet3", norm="batch")
START, FRESH = drawn(MODEL, 0), drawn(MODEL, 1)


def transplanted():
    """A ticket whose biases, norms and statistics are as trained, and its start."""
    trained = ({n: t + 0.25 for n, t in drawn(MODEL, 2)[0].items()}, {n: t + 0.25 for n, t in START[1].items()})
    mask = prune.keep_highest(prune.magnitude(trained[0], prune.full(MODEL, START[0])), prune.full(MODEL, START[0]), 150)
    return prune.rewind(trained, START, mask, 6, "weights")


def rest_is_untouched(made: Ticket, ticket: Ticket) -> bool:
    others = [n for n in ticket.params if n not in ticket.mask]
    return (made.round == ticket.round and list(made.params) == list(ticket.params) and same(made.buffers, ticket.buffers)
            and all(torch.equal(made.params[n], ticket.params[n]) for n in others))


def test_a_shuffled_ticket_keeps_each_density_and_starts_where_the_network_started():
    ticket = transplanted()
    made = prune.shuffled(ticket, START[0], tree.generator_for(0, "shuffle"))
    assert prune.density(made.mask) == prune.density(ticket.mask)
    assert list(made.mask) == list(ticket.mask)
    assert prune.jaccard(made.mask, ticket.mask) < 0.5
    for name, m in made.mask.items():
        assert torch.equal(made.params[name], torch.where(m, START[0][name], 0.0))
    assert rest_is_untouched(made, ticket)


def test_shuffles_follow_their_generator_and_are_uniform():
    mask = {"a": torch.tensor([[True, False, False], [False, False, True]]), "b": torch.tensor([True, False])}
    source = tree.generator_for(3, "shuffle")
    counts = torch.zeros(6)
    for _ in range(3000):
        made = prune.shuffle_mask(mask, source)
        assert made["a"].shape == (2, 3)
        assert int(made["a"].sum()) == 2
        assert int(made["b"].sum()) == 1
        counts += made["a"].flatten()
    # each place holds a survivor in a third of 3000 shuffles; the standard deviation is 26
    assert (counts - 1000).abs().max() < 130
    again = [prune.shuffle_mask(mask, tree.generator_for(3, "shuffle")) for _ in range(2)]
    assert same(*again)


def test_a_fresh_draw_keeps_the_mask_alone():
    ticket = transplanted()
    made = prune.reinit(ticket, FRESH[0])
    assert same(made.mask, ticket.mask)
    for name, m in ticket.mask.items():
        assert torch.equal(made.params[name], torch.where(m, FRESH[0][name], 0.0))
    assert rest_is_untouched(made, ticket)


def test_signs_survive_and_magnitudes_do_not():
    ticket = transplanted()
    made = prune.signs(ticket, FRESH[0])
    assert same(made.mask, ticket.mask)
    alive = flat(ticket.mask)
    values, start, fresh = (tree.flatten(p, ticket.mask) for p in (made.params, START[0], FRESH[0]))
    assert torch.equal(values[alive].sign(), start[alive].sign())
    assert torch.equal(values[alive].abs(), fresh[alive].abs())
    assert not values[~alive].any()
    assert not torch.signbit(values[~alive]).any()
    flipped = (start[alive].sign() != fresh[alive].sign()).float().mean()
    assert 0.3 < flipped < 0.7  # or the control would say nothing
    assert rest_is_untouched(made, ticket)


def test_controls_do_not_touch_the_ticket():
    ticket = transplanted()
    before = [tree.detach(t) for t in (ticket.params, ticket.buffers, ticket.mask)]
    prune.shuffled(ticket, START[0], tree.generator_for(0, "shuffle"))
    prune.reinit(ticket, FRESH[0])
    prune.signs(ticket, FRESH[0])
    assert all(same(a, b) for a, b in zip(before, (ticket.params, ticket.buffers, ticket.mask), strict=True))


def test_weights_of_another_network_are_refused():
    ticket = Ticket(*START, random_mask(MODEL, 0.5), 1)
    wide = drawn(MODEL.replace(width=5))[0]
    calls = [lambda: prune.shuffled(ticket, wide, tree.generator_for(0, "x")), lambda: prune.reinit(ticket, wide),
             lambda: prune.signs(ticket, wide)]
    for call in calls:
        with pytest.raises(ValueError, match=r"mask of conv0.weight is \(4, 3, 3, 3\), the weight is \(5, 3, 3, 3\); use a mask"):
            call()
