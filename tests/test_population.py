"""Populations of networks: together against alone, stopped against straight, and one that diverges among others."""

from __future__ import annotations

import math
import time

import pytest
import torch
from tiny import (
    BATCH_NORM,
    FULL,
    MODEL,
    PLAIN,
    close,
    coloured,
    equal,
    member,
    some_masks,
    start,
    train,
)

from dpkit.training import Diverged, State, batches, gradient


@pytest.fixture(scope="module")
def split():
    return coloured()


# --- populations ---
@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_networks_together_equal_each_alone(split, model):
    seeds, networks = (3, 4, 3), start(model, 3)
    mask = some_masks(networks[0])
    together = train(FULL, split, model=model, seeds=seeds, networks=networks, masks=mask, snapshots=[2])
    for p, seed in enumerate(seeds):
        alone = train(
            FULL,
            split,
            model=model,
            seeds=[seed],
            networks=tuple(member(n, p) for n in networks),
            masks=member(mask, p),
            snapshots=[2],
        )
        assert equal(member(together.params, p), alone.params)
        assert equal(member(together.buffers, p), alone.buffers)
        assert torch.equal(together.losses[p], alone.losses[0])
        assert equal(member(together.snapshots[2][0], p), alone.snapshots[2][0])
    assert not torch.equal(together.losses[0], together.losses[1])


def test_networks_of_equal_noise_share_their_batches(split, monkeypatch):
    made, single = [], batches.Batches.take

    def counted(self, seed, *where):
        made.append((seed, where))
        return single(self, seed, *where)

    train(FULL, split, seeds=[3, 4, 3], networks=start(MODEL, 3))
    monkeypatch.setattr(batches.Batches, "take", counted)
    train(FULL, split, seeds=[3, 4, 3], networks=start(MODEL, 3))
    assert len(made) == len(set(made)), "a batch was made twice"
    assert {seed for seed, _ in made} == {3, 4}


def test_rows_of_a_population_begin_where_a_network_alone_does():
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bool)):
        rows = gradient.aligned(3, 21, like)
        assert (rows.shape, rows.dtype) == ((3, 21), like.dtype)
        assert {row.data_ptr() % 64 for row in rows} == {0}


@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_every_form_agrees_with_one_by_one(split, model):
    networks = start(model, 2)
    options = {"model": model, "seeds": (3, 4), "networks": networks, "masks": some_masks(networks[0]), "snapshots": [2]}
    solo, graphs, vmap = (train(FULL, split, form=form, **options) for form in ("solo", "graphs", "vmap"))
    assert (solo.form, graphs.form, vmap.form) == ("solo", "graphs", "vmap")
    # the recording, run as it is where there is no GPU, is the same computation
    assert equal(graphs.params, solo.params)
    assert equal(graphs.buffers, solo.buffers)
    assert equal(graphs.snapshots[2][0], solo.snapshots[2][0])
    assert equal(graphs.snapshots[2][1], solo.snapshots[2][1])
    torch.testing.assert_close(vmap.losses, solo.losses, atol=1e-4, rtol=1e-3)
    close(vmap.params, solo.params, atol=1e-4)
    close(vmap.buffers, solo.buffers, atol=1e-4)
    assert all(not vmap.params[n][~m].any() for n, m in options["masks"].items())


def test_the_fastest_form_is_found_by_timing_and_a_broken_one_left_out(split, monkeypatch):
    class Slow(gradient.Solo):
        def __call__(self, images, targets):
            time.sleep(0.05)
            return super().__call__(images, targets)

    class Broken(gradient.Solo):
        def __call__(self, images, targets):
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(gradient, "FORMS", {"slow": Slow, "broken": Broken, "solo": gradient.Solo})
    networks = start(BATCH_NORM, 2)
    options = {"model": BATCH_NORM, "seeds": (3, 4), "networks": networks}
    with pytest.warns(UserWarning, match=r"form broken does not work here and is left out \(no such kernel\)"):
        found = train(FULL, split, form="fastest", **options)
    assert found.form == "solo"
    assert equal(found.buffers, train(FULL, split, form="solo", **options).buffers), "the trial must leave no trace"
    with pytest.raises(ValueError, match="form must be auto, fastest, slow, broken, solo; got 'threads'"):
        train(FULL, split, form="threads", **options)


# --- stopping and going on ---
@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_stopped_and_resumed_equals_straight(split, model):
    states: list[State] = []
    networks = start(model, 2)
    options = {
        "model": model,
        "seeds": (3, 4),
        "networks": networks,
        "masks": some_masks(networks[0]),
        "snapshots": [0, 2, 5, 9],
    }
    straight = train(FULL, split, checkpoint=states.append, **options)
    assert [s.step for s in states] == [3, 6, 9]
    assert [sorted(s.snapshots) for s in states] == [[0, 2], [0, 2, 5], [0, 2, 5, 9]]
    for state in states:
        # a checkpoint read from disk may list its tensors in another order
        state.momentum = dict(sorted(state.momentum.items()))
        resumed = train(FULL, split, resume=state, **options)
        assert equal(resumed.params, straight.params)
        assert equal(resumed.buffers, straight.buffers)
        assert torch.equal(resumed.losses, straight.losses)
        assert sorted(resumed.snapshots) == sorted(straight.snapshots)
        for step, (params, buffers) in straight.snapshots.items():
            assert equal(resumed.snapshots[step][0], params)
            assert equal(resumed.snapshots[step][1], buffers)


def test_a_snapshot_is_the_network_at_that_step(split):
    params, buffers = start()
    full = train(PLAIN.replace(schedule="constant"), split, networks=(params, buffers), snapshots=[0, 3, 9])
    short = train(PLAIN.replace(schedule="constant", epochs=1), split, networks=(params, buffers))
    assert equal(full.snapshots[0][0], params)
    assert equal(full.snapshots[3][0], short.params)
    assert equal(full.snapshots[9][0], full.params)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_starting_from_a_snapshot_repeats_the_straight_run(split, step):
    spec = FULL.replace(momentum=0)  # a rewound network starts without momentum
    straight = train(spec, split, snapshots=[step])
    again = train(spec, split, networks=straight.snapshots[step], first_step=step)
    assert equal(again.params, straight.params)
    assert torch.equal(again.losses, straight.losses[:, step:])


# --- divergence ---
def test_only_the_network_that_diverges_is_marked(split):
    params, buffers = start(BATCH_NORM, 3)
    params["classifier.weight"][1] = 3e38
    found = train(FULL, split, model=BATCH_NORM, networks=(params, buffers), seeds=(3, 4, 5))
    assert found.diverged == {1: 0}
    with pytest.raises(
        Diverged, match="network 1 diverged: its loss is not finite at step 0; lower lr"
    ) as caught:
        found.network(1)
    assert (caught.value.network, caught.value.step) == (1, 0)
    for p, seed in ((0, 3), (2, 5)):
        alone = train(
            FULL, split, model=BATCH_NORM, seeds=[seed], networks=(member(params, p), member(buffers, p))
        )
        assert equal({n: t[None] for n, t in found.network(p)[0].items()}, alone.params)


def test_training_ends_early_when_no_network_is_left(split):
    found = train(FULL.replace(lr=1e9, epochs=50), split, seeds=(3, 4))
    assert sorted(found.diverged) == [0, 1]
    assert found.losses.shape[1] < 50 * 3
    assert all(not math.isfinite(found.losses[p, step]) for p, step in found.diverged.items())
    assert all(torch.isfinite(found.losses[p, :step]).all() for p, step in found.diverged.items())


def test_weights_that_overflow_in_the_last_step_are_found(split):
    found = train(PLAIN.replace(lr=1e35, weight_decay=1e10, epochs=1, batch_size=20), split)
    assert torch.isfinite(found.losses).all()
    assert found.diverged == {0: 1}
