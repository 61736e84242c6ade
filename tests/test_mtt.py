"""Trajectory matching: its gradient, its memory, what it improves, exact continuation, and refusals."""

from __future__ import annotations

import functools
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from tiny import BATCH_NORM, MEAN, MODEL, PLAIN, STD, coloured, start, train

from dpkit import models, tree
from dpkit.data import Split, apply, normalise
from dpkit.distill.interface import Task
from dpkit.distill.mtt import MTTSpec, Student, batches, mtt

REAL = coloured()
SMALL = MTTSpec(ipc=2, steps=13, student_steps=4, expert_epochs=1, max_start_epoch=2, lr=0.05, lr_img=50.0, lr_lr=1e-3)
WEAK = "color_flip"
BARE = MODEL.replace(norm="none")  # instance norm on a 2 x 2 image leaves little to learn


@functools.cache
def experts(model=MODEL):
    """Two networks of three epochs, with each epoch's snapshot."""
    found = []
    for p in range(2):
        fit = train(PLAIN, REAL, model=model, seeds=(p,), networks=start(model), snapshots=range(0, 10, 3))
        found.append([({n: t[0] for n, t in a.items()}, {n: t[0] for n, t in b.items()}) for a, b in fit.snapshots.values()])
    return found


def task(**changes):
    found = {"real": REAL, "mean": MEAN, "std": STD, "model": MODEL, "seed": 3} | changes
    return Task(**({"networks": experts(found["model"])} | found))


def double_student(model, spec, keep=True):
    """A student in float64, and what it is called with: images, lr, begin, end, batches."""
    (params, buffers), (later, _) = experts(model)[0][:2]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator)
    targets = F.one_hot(torch.arange(3).repeat_interleave(2), 3).double()
    begin, end = (tree.flatten(p, params).double() for p in (params, later))
    student = Student(spec, model, params, tree.to(buffers, dtype=torch.float64), targets, keep)
    return student, (images, torch.tensor(spec.lr, dtype=torch.float64), begin, end, batches(spec, 6, generator))


@functools.cache
def straight():
    return mtt(SMALL, task())


# --- the gradient ---
def exact_loss(model, params, buffers, images, targets, precision):
    """The training loss without its rounding of logits to float32."""
    logits, buffers = models.forward(model, params, buffers, images, train=True)
    return F.cross_entropy(logits, targets), buffers


@pytest.mark.parametrize("model", [BARE, MODEL, BATCH_NORM], ids=["none", "instance", "batch"])
def test_the_gradient_agrees_with_finite_differences(model, monkeypatch):
    monkeypatch.setattr(import_module("dpkit.distill.mtt"), "loss", exact_loss)  # the package has a function of that name
    student, (images, lr, *rest) = double_student(model, SMALL.replace(student_steps=3, batch=4, augment=WEAK))
    _, for_images, for_lr = student(images, lr, *rest)
    direction = for_images / for_images.norm()
    for (a, b), expected in (((direction, 0.0), for_images.norm()), ((0.0, 1.0), for_lr)):
        up, down = (student(images + h * a, lr + h * b, *rest)[0] for h in (1e-7, -1e-7))
        torch.testing.assert_close((up - down) / 2e-7, expected, rtol=1e-5, atol=1e-8)


def test_value_and_gradient_equal_one_graph_of_all_steps(monkeypatch):
    monkeypatch.setattr(import_module("dpkit.distill.mtt"), "loss", exact_loss)
    spec = SMALL.replace(batch=4)
    student, (images, lr, begin, end, chosen) = double_student(MODEL, spec)
    found = student(images, lr, begin, end, chosen)
    leaf, rate, weights = images.clone().requires_grad_(), lr.clone().requires_grad_(), begin.clone().requires_grad_()
    like, labels = experts()[0][0][0], torch.arange(3).repeat_interleave(2)
    for batch in chosen:
        x = apply(spec.augmentation, leaf[batch.rows], batch.shared)
        logits, _ = models.forward(MODEL, tree.unflatten(weights, like), {}, x, train=True)
        value = F.cross_entropy(logits, labels[batch.rows])
        weights = weights - rate * torch.autograd.grad(value, weights, create_graph=True)[0]
    value = (weights - end).square().sum() / (begin - end).square().sum()
    for got, expected in zip(found, (value.detach(), *torch.autograd.grad(value, (leaf, rate))), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_computing_again_on_the_way_back_gives_the_same_bits(model):
    spec = SMALL.replace(steps=3)
    least = spec.fewest(3)
    assert least < spec.held(3)
    rich, poor = (mtt(spec, task(model=model, held=held)) for held in (None, least))
    assert torch.equal(rich.split.images, poor.split.images)
    assert (rich.history, rich.learned) == (poor.history, poor.learned)


def test_graphs_are_kept_only_where_there_is_room(monkeypatch):
    built = []
    inner = Student._gradient
    monkeypatch.setattr(Student, "_gradient", lambda *given: built.append(1) or inner(*given))
    for held, count in ((None, 4), (SMALL.fewest(3), 8)):
        built.clear()
        mtt(SMALL.replace(steps=1), task(held=held))
        assert len(built) == count


def test_the_buffers_of_experts_stay():
    before = [[tree.detach(b) for _, b in expert] for expert in experts(BATCH_NORM)]
    mtt(SMALL.replace(steps=2), task(model=BATCH_NORM))
    for old, expert in zip(before, experts(BATCH_NORM), strict=True):
        assert all(torch.equal(b[n], a[n]) for a, (_, b) in zip(old, expert, strict=True) for n in a)


# --- batches ---
def test_batches_pass_over_all_images_before_any_comes_again():
    found = batches(SMALL.replace(batch=4, student_steps=4), 6, torch.Generator().manual_seed(0))
    assert [len(b.rows) for b in found] == [4, 2, 4, 2]
    for a, b in (found[:2], found[2:]):
        assert sorted([*a.rows.tolist(), *b.rows.tolist()]) == list(range(6))
    assert all(len(b.shared.hole) == len(b.rows) for b in found)
    whole = batches(SMALL, 6, torch.Generator().manual_seed(0))
    assert all(sorted(b.rows.tolist()) == list(range(6)) for b in whole)


# --- the method ---
def test_the_set_has_the_budget_and_a_learned_rate():
    made = straight()
    assert made.split.images.shape == (6, 3, 8, 8)
    assert made.split.images.dtype == torch.float32
    assert made.split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(made.history) == SMALL.steps
    assert made.learned.keys() == {"lr"}
    assert made.learned["lr"] != pytest.approx(SMALL.lr)


def test_students_come_nearer_to_where_experts_went():
    spec = SMALL.replace(steps=60, max_start_epoch=1, augment="", lr_img=10.0)
    history = torch.tensor(mtt(spec, task(model=BARE, networks=experts(BARE)[:1])).history)
    assert float(history[-10:].mean()) < 0.6 * float(history[0])


def test_without_learning_nothing_changes():
    spec = SMALL.replace(steps=3, lr_img=1e-12, lr_lr=0)
    made = mtt(spec, task())
    assert made.learned["lr"] == pytest.approx(0.05)
    pixels = REAL.images.float() / 255
    for image, label in zip(made.split.images, made.split.labels, strict=True):
        assert float((pixels[REAL.labels == label] - image).abs().amax((1, 2, 3)).min()) < 1e-6


def test_the_learned_rate_stays_positive():
    reached = [mtt(SMALL.replace(steps=1, lr=lr, lr_lr=1e4, lr_img=1e-6), task()).learned["lr"] / lr for lr in (1e-4, 50.0)]
    assert min(reached) == pytest.approx(1e-3, rel=1e-5)  # too large a rate is lowered, down to the floor and no further
    assert max(reached) > 1


def test_images_have_momentum():
    def velocity(**changes):
        kept = []
        mtt(SMALL.replace(lr_img=1e-9, lr_lr=0, **changes), task(checkpoint=kept.append))
        return kept[-1]["velocity"]

    first, second = velocity(steps=1), velocity(steps=2, momentum=0)
    torch.testing.assert_close(velocity(steps=2), 0.5 * first + second, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(model):
    kept, ticks = [], []
    made = mtt(SMALL, task(model=model))
    mtt(SMALL.replace(steps=10), task(model=model, checkpoint=kept.append))
    state = {name: t.clone() for name, t in kept[-1].items()}
    again = mtt(SMALL, task(model=model, resume=kept[-1], progress=lambda *at: ticks.append(at)))
    assert torch.equal(again.split.images, made.split.images)
    assert (again.history, again.learned) == (made.history, made.learned)
    assert ticks == [(11, 13), (12, 13), (13, 13)]
    assert all(torch.equal(kept[-1][name], t) for name, t in state.items())


def test_other_seeds_give_other_images():
    spec = SMALL.replace(steps=2)
    first = mtt(spec, task()).split.images
    assert torch.equal(mtt(spec, task()).split.images, first)
    assert not torch.equal(mtt(spec, task(seed=4)).split.images, first)


# --- refusals ---
@pytest.mark.parametrize(
    "changes, line",
    [
        ({"ipc": 0}, "ipc must be >= 1, got 0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"student_steps": 0}, "student_steps must be >= 1, got 0"),
        ({"expert_epochs": 0}, "expert_epochs must be >= 1, got 0"),
        ({"max_start_epoch": 0}, "max_start_epoch must be >= 1, got 0"),
        ({"batch": -1}, r"batch must be >= 0 \(0: all images\), got -1"),
        ({"lr": 0}, "lr must be > 0, got 0"),
        ({"lr_img": -2}, "lr_img must be > 0, got -2"),
        ({"lr_lr": -1}, "lr_lr must be >= 0, got -1"),
        ({"momentum": 1}, r"momentum must lie in \[0, 1\), got 1"),
        ({"start": "black"}, "start must be one of real, noise; got 'black'"),
        ({"augment": "blur"}, "operations must be joined by _ from .* got 'blur'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_out_of_range_are_refused(changes, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        MTTSpec(**changes)


def test_experts_must_be_there_and_long_enough():
    needs = r"^mtt needs trajectories with at least 4 epochs \(max_start_epoch - 1 \+ expert_epochs\); got "
    spec = SMALL.replace(max_start_epoch=4)
    with pytest.raises(ValueError, match=needs + r"none; train longer, or lower max_start_epoch or expert_epochs$"):
        mtt(spec, task(networks=()))
    with pytest.raises(ValueError, match=needs + r"2, the shortest with 3; train longer, or lower .*$"):
        mtt(spec, task())
    assert len(mtt(SMALL.replace(steps=1, max_start_epoch=3), task()).history) == 1  # three epochs are just enough


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match=r"^ipc must be at most the images of a class; class 2 has 6, got 7$"):
        mtt(SMALL.replace(ipc=7), task())


def test_memory_is_one_student_step_at_least():
    with pytest.raises(ValueError, match=r"^mtt needs the activations of .* raise distill_memory, or lower batch or ipc$"):
        mtt(SMALL, task(held=SMALL.fewest(3) - 1))


def test_images_that_explode_stop_the_run():
    bad = Split(torch.full((6, 3, 8, 8), float("nan")), torch.arange(6) % 3)
    with pytest.raises(FloatingPointError, match=r"^the images are not finite after step 1; lower lr_img, lr_lr or lr$"):
        mtt(SMALL.replace(steps=1), task(real=bad))


def test_noise_and_defaults():
    assert MTTSpec().to_dict()["method"] == "mtt"
    assert MTTSpec().epochs == 21
    images = normalise(mtt(SMALL.replace(steps=1, lr_img=1e-9, start="noise"), task()).split.images, MEAN, STD)
    assert abs(float(images.std()) - 1) < 0.1
