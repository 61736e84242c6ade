"""The training loop against torch.optim, alone against together, stopped against straight, masked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    BATCH_NORM,
    FULL,
    MEAN,
    MODEL,
    PLAIN,
    STD,
    Plain,
    close,
    coloured,
    equal,
    member,
    some_masks,
    start,
    train,
)

from dpkit import models, prune, training, tree
from dpkit.data import Split, normalise
from dpkit.training import TrainSpec, evaluate


@pytest.fixture(scope="module")
def split():
    return coloured()


# --- against torch ---
def reference(spec, model, split, params, buffers, seed, mask=None):
    """Losses and state after a run with torch.optim.SGD and MultiStepLR."""
    module = Plain(model, params, buffers)
    optimiser = torch.optim.SGD(module.parameters(), spec.lr, spec.momentum, weight_decay=spec.weight_decay)
    steps = spec.epochs * math.ceil(len(split) / spec.batch_size)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimiser, [int(2 / 3 * steps), int(5 / 6 * steps)], spec.gamma
    )
    weights = dict(module.named_parameters())
    for name, keep in (mask or {}).items():
        weights[name].data[~keep[0]] = 0
    x, losses = normalise(split.images, MEAN, STD), []
    for epoch in range(spec.epochs):
        order = torch.randperm(len(split), generator=tree.generator_for(seed, "order", epoch))
        for rows in order.split(spec.batch_size):
            loss = F.cross_entropy(module(x[rows]), split.labels[rows])
            optimiser.zero_grad()
            loss.backward()
            for name, keep in (mask or {}).items():
                weights[name].grad[~keep[0]] = 0
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    return torch.tensor(losses), module.state_dict()


@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_steps_equal_those_of_torch(split, model):
    params, buffers = start(model)
    found = train(PLAIN, split, model=model, networks=(params, buffers))
    losses, state = reference(PLAIN, model, split, params, buffers, 7)
    torch.testing.assert_close(found.losses[0], losses, atol=1e-5, rtol=1e-4)
    close({n: t[0] for n, t in found.params.items()}, {n: state[n] for n in found.params}, atol=1e-5)
    for name in models.statistics(model):
        torch.testing.assert_close(found.buffers[name][0], state[name], atol=1e-5, rtol=1e-4)
    assert losses[-1] < losses[0]


def test_removed_weights_stay_zero_and_survivors_train_as_by_hand(split):
    params, buffers = start()
    mask = some_masks(params)
    found = train(PLAIN, split, networks=(params, buffers), masks=mask, snapshots=[0, 4])
    losses, state = reference(PLAIN, MODEL, split, params, buffers, 7, mask)
    torch.testing.assert_close(found.losses[0], losses, atol=1e-5, rtol=1e-4)
    for name, keep in mask.items():
        for weights in (found.params, found.snapshots[0][0], found.snapshots[4][0]):
            assert not weights[name][~keep].any()
        assert found.params[name][keep].all()
        torch.testing.assert_close(found.params[name][0], state[name], atol=1e-5, rtol=1e-4)


def test_a_removed_weight_may_be_anything_at_the_start(split):
    params, buffers = start()
    mask = some_masks(params)
    wild = {n: torch.where(mask[n], t, torch.nan) if n in mask else t for n, t in params.items()}
    assert equal(
        train(FULL, split, networks=(wild, buffers), masks=mask).params,
        train(FULL, split, networks=(params, buffers), masks=mask).params,
    )


# --- schedules and batches ---
def rates(schedule, steps, **options):
    spec = TrainSpec(lr=1.0, schedule=schedule, **options)
    return [spec.learning_rate(step, steps) for step in range(steps)]


def test_schedules_by_hand():
    assert rates("constant", 3) == [1.0] * 3
    assert rates("multistep", 12) == pytest.approx([1] * 8 + [0.2] * 2 + [0.04] * 2)
    assert rates("multistep", 4, milestones=[0.25], gamma=0.5) == [1, 0.5, 0.5, 0.5]
    assert rates("onecycle", 10) == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert rates("onecycle", 4, warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_each_epoch_sees_each_image_once(split):
    x, targets = torch.arange(20).float().view(20, 1, 1, 1), split.targets(3)
    batches = [training.batch(PLAIN, x, targets, 7, step) for step in range(6)]
    assert [len(b[0]) for b in batches] == [8, 8, 4, 8, 8, 4]
    epochs = [torch.cat([b[0].flatten() for b in batches[e : e + 3]]).long() for e in (0, 3)]
    for seen in epochs:
        assert seen.sort().values.tolist() == list(range(20))
    assert not torch.equal(*epochs)
    assert torch.equal(torch.cat([b[1] for b in batches[:3]]), targets[epochs[0]])
    assert not torch.equal(training.batch(PLAIN, x, targets, 8, 0)[0], batches[0][0])


def test_each_step_augments_anew():
    x, targets = torch.randn(8, 3, 8, 8)[:1].expand(8, -1, -1, -1), torch.eye(3)[[0] * 8]
    batches = [training.batch(FULL.replace(cutmix=0), x, targets, 7, step)[0] for step in range(8)]
    assert len(torch.unique(torch.cat(batches).flatten(1), dim=0)) == 64
    again = training.batch(FULL.replace(cutmix=0), x, targets, 7, 5)[0]
    assert torch.equal(again, batches[5])


def test_the_loop_uses_the_batches_that_can_be_asked_for(split):
    params, buffers = start()
    found = train(FULL, split, networks=(params, buffers))
    x, y = training.batch(FULL, normalise(split.images, MEAN, STD), split.targets(3), 7, 0)
    logits, _ = models.forward(MODEL, {n: t[0] for n, t in params.items()}, {}, x, train=True)
    torch.testing.assert_close(found.losses[0, 0], F.cross_entropy(logits, y))


def test_training_leaves_the_global_generator_and_its_arguments_alone(split):
    params, buffers = start(BATCH_NORM, 2)
    mask = some_masks(params)
    before = [tree.detach(t) for t in (params, buffers, mask)]
    state = torch.get_rng_state()
    train(FULL, split, model=BATCH_NORM, networks=(params, buffers), seeds=(1, 2), masks=mask)
    assert all(equal(a, b) for a, b in zip(before, (params, buffers, mask), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_soft_labels_that_are_hard_train_the_same(split):
    soft = Split(split.images, split.targets(3))
    assert equal(train(FULL, split).params, train(FULL, soft).params)


# --- precision, evaluation, refusals ---
def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(split):
    exact, rough = train(FULL, split), train(FULL.replace(precision="bf16"), split)
    assert rough.params["conv0.weight"].dtype == torch.float32
    assert not torch.equal(rough.losses, exact.losses)
    torch.testing.assert_close(rough.losses, exact.losses, atol=0.05, rtol=0.05)


def test_evaluation_equals_a_plain_computation(split):
    params, buffers = train(FULL, split, model=BATCH_NORM).network(0)
    x = normalise(split.images, MEAN, STD)
    module = Plain(
        BATCH_NORM, {n: t[None] for n, t in params.items()}, {n: t[None] for n, t in buffers.items()}
    ).eval()
    with torch.no_grad():
        logits = module(x)
    error = float((logits.argmax(1) != split.labels).double().mean())
    for batch_size in (500, 20, 7):
        found = evaluate(BATCH_NORM, params, buffers, x, split.labels, batch_size)
        assert found == pytest.approx((error, float(F.cross_entropy(logits, split.labels))), rel=1e-5)


def test_an_empty_evaluation_is_refused(split):
    params, buffers = (member(t, 0) for t in start())
    with pytest.raises(ValueError, match="evaluation set is empty; give at least one image"):
        evaluate(MODEL, params, buffers, torch.empty(0, 3, 8, 8), torch.empty(0).long())


@pytest.mark.parametrize(
    "options, line",
    [
        ({"seeds": [1, 2], "networks": start()}, "seeds must be as many as networks, 1; got 2"),
        ({"first_step": 9}, r"first_step must lie in \[0, 9\), the steps of this run; got 9"),
        ({"first_step": -1}, "first_step must lie in"),
        ({"snapshots": [10]}, r"snapshots must lie in \[0, 9\], got 10"),
        ({"snapshots": [2], "first_step": 3}, r"snapshots must lie in \[3, 9\], got 2"),
        (
            {"masks": {"conv7.weight": torch.ones(1, 4).bool()}},
            "mask names 'conv7.weight', .* it has conv0.weight",
        ),
        (
            {"masks": {"conv0.weight": torch.ones(4, 3, 3, 3).bool()}},
            r"mask of conv0.weight must be \(1, 4, 3, 3, 3\)",
        ),
    ],
)
def test_inconsistent_arguments_are_refused(split, options, line):
    with pytest.raises(ValueError, match=line):
        train(PLAIN, split, **options)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"lr": 0}, "lr must be > 0, got 0"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"momentum": 1}, r"momentum must lie in \[0, 1\), got 1"),
        ({"weight_decay": -1}, "weight_decay must be >= 0"),
        ({"schedule": "cosine"}, "schedule must be one of multistep, onecycle, constant"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16"),
        ({"milestones": [1.5]}, "milestones must lie in"),
        ({"cutmix": 2}, r"cutmix must lie in \[0, 1\], got 2"),
    ],
)
def test_wrong_settings_are_refused(change, line):
    with pytest.raises(ValueError, match=line):
        TrainSpec(**change)


def test_progress_is_told_after_each_step(split):
    seen = []
    train(PLAIN, split, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 9) for step in range(1, 10)]


def test_a_full_mask_changes_no_bit(split):
    params, buffers = start()
    full = {n: m[None] for n, m in prune.full(MODEL, {n: t[0] for n, t in params.items()}).items()}
    assert equal(
        train(FULL, split, networks=(params, buffers), masks=full).params,
        train(FULL, split, networks=(params, buffers)).params,
    )
