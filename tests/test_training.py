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

import dpkit.training.batches
from dpkit import models, prune, tree
from dpkit.data import AugmentSpec, Split, normalise
from dpkit.training import Batches, TrainSpec, evaluate


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


def batches(spec, split, count, seed=7, **changes):
    source = Batches(spec.replace(**changes), split, MEAN, STD, 3)
    return [source.step(seed, step) for step in range(count)]


def test_each_epoch_sees_each_image_once():
    numbered = Split(torch.arange(20.0).view(20, 1, 1, 1) / 20, torch.arange(20) % 3)
    source = Batches(PLAIN, numbered, torch.zeros(1), torch.full((1,), 1 / 20), 3)
    seen = [source.step(7, step) for step in range(6)]
    assert [len(x) for x, _ in seen] == [8, 8, 4, 8, 8, 4]
    epochs = [torch.cat([x.flatten() for x, _ in seen[e:e + 3]]).round().long() for e in (0, 3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(20))
    assert not torch.equal(*epochs)
    assert torch.equal(torch.cat([y for _, y in seen[:3]]), numbered.targets(3)[epochs[0]])
    assert not torch.equal(source.step(8, 0)[0], seen[0][0])


def test_each_step_augments_anew(split):
    one = Split(split.images[:1].expand(8, -1, -1, -1), split.labels[:1].expand(8))
    seen = [x for x, _ in batches(FULL, one, 8, cutmix=0)]
    assert len(torch.unique(torch.cat(seen).flatten(1), dim=0)) == 64
    assert torch.equal(batches(FULL, one, 6, cutmix=0)[5][0], seen[5])


@pytest.mark.parametrize("operations", ["", "color_crop_flip_scale_rotate", "color_flip_cutout"])
def test_batches_made_together_are_the_same_bits(split, operations):
    spec = FULL.replace(cutmix=0.5, augment=AugmentSpec(operations=operations), batch_size=6)
    source = Batches(spec, split, MEAN, STD, 3)
    together = source.take(7, 2, 1, 9)
    assert [len(x) for x, _ in together] == [6, 6, 2], "an epoch's end is an end"
    for i, (x, y) in enumerate(together):
        alone = source.step(7, 2 * 4 + 1 + i)
        assert torch.equal(x, alone[0])
        assert torch.equal(y, alone[1])


def test_training_does_not_depend_on_how_many_batches_are_made_together(split, monkeypatch):
    runs = []
    for values in (1, 10**9):
        monkeypatch.setitem(dpkit.training.batches.TOGETHER, "cpu", values)
        runs.append(train(FULL, split, seeds=(3, 4), networks=start(MODEL, 2)).params)
    assert equal(*runs)


def test_the_loop_uses_the_batches_that_can_be_asked_for(split):
    params, buffers = start()
    found = train(FULL, split, networks=(params, buffers))
    (x, y), = batches(FULL, split, 1)
    logits, _ = models.forward(MODEL, {n: t[0] for n, t in params.items()}, {}, x, train=True)
    torch.testing.assert_close(found.losses[0, 0], F.cross_entropy(logits, y))


# --- options of short schedules ---
def test_label_smoothing_is_that_of_torch(split):
    params, buffers = start()
    found = train(PLAIN.replace(label_smoothing=0.2), split, networks=(params, buffers))
    (x, _), = batches(PLAIN, split, 1)
    order = torch.randperm(20, generator=tree.generator_for(7, "order", 0))[:8]
    logits, _ = models.forward(MODEL, {n: t[0] for n, t in params.items()}, {}, x, train=True)
    torch.testing.assert_close(found.losses[0, 0], F.cross_entropy(logits, split.labels[order], label_smoothing=0.2))


def test_nesterov_steps_equal_those_of_torch(split):
    params, buffers = start()
    spec = PLAIN.replace(nesterov=True, schedule="constant")
    found = train(spec, split, networks=(params, buffers))
    module = Plain(MODEL, params, buffers)
    optimiser = torch.optim.SGD(module.parameters(), spec.lr, spec.momentum, weight_decay=spec.weight_decay, nesterov=True)
    for x, y in batches(spec, split, 9):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
    close({n: t[0] for n, t in found.params.items()}, dict(module.named_parameters()), atol=1e-5)
    assert not equal(found.params, train(PLAIN.replace(schedule="constant"), split, networks=(params, buffers)).params)


def test_alternating_flip_mirrors_every_image_in_every_second_epoch(split):
    spec = PLAIN.replace(augment=AugmentSpec(operations="flip"), alternating_flip=True, batch_size=20)
    source, x = Batches(spec, split, MEAN, STD, 3), normalise(split.images, MEAN, STD)
    mirrored = []
    for epoch in range(4):
        (images, _), = source.take(7, epoch, 0, 1)
        order = torch.randperm(20, generator=tree.generator_for(7, "order", epoch))
        flags = torch.empty(20, dtype=torch.bool)
        for row, i in enumerate(order):
            flags[i] = torch.equal(images[row], x[i].flip(2))
            assert flags[i] or torch.equal(images[row], x[i])
        mirrored.append(flags)
    assert 0 < mirrored[0].sum() < 20
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0])
    assert torch.equal(mirrored[3], mirrored[1])


def test_options_that_were_added_leave_old_keys_alone():
    assert not {"label_smoothing", "nesterov", "alternating_flip"} & set(TrainSpec().to_dict())
    found = TrainSpec(label_smoothing=0.1).to_dict()
    assert found["label_smoothing"] == 0.1
    assert TrainSpec(**found) == TrainSpec(label_smoothing=0.1)


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
        ({"label_smoothing": 1}, r"label_smoothing must lie in \[0, 1\), got 1"),
        ({"nesterov": True, "momentum": 0}, "nesterov needs momentum > 0, got 0"),
        ({"alternating_flip": True, "augment": {"operations": "crop"}}, "alternating_flip needs flip .* got 'crop'"),
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
