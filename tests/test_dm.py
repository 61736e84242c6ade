"""Distribution matching: its gradient, what it improves, the batch of BatchNorm, exact continuation, and refusals."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny import BATCH_NORM, MEAN, MODEL, STD, coloured

from dpkit import models, tree
from dpkit.data import Split, normalise
from dpkit.distill.dm import DMSpec, distances, dm, embedding, starting
from dpkit.distill.interface import Task

REAL = coloured()
SMALL = DMSpec(ipc=2, steps=60, lr=1.0, real_batch=4)


def task(**changes):
    return Task(**({"real": REAL, "mean": MEAN, "std": STD, "model": MODEL, "seed": 3} | changes))


@functools.cache
def straight():
    return dm(SMALL, task())


def network(model=MODEL, dtype=torch.float64):
    params, buffers = models.init(model, tree.generator_for(5, "init"))
    return tree.to(params, dtype=dtype), tree.to(buffers, dtype=dtype)


def some_images(*shape, seed=1):
    return torch.randn(*shape, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the loss ---
@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_the_gradient_agrees_with_finite_differences(model):
    params, buffers = network(model)
    real, images = list(some_images(2, 5)), some_images(2, 3, seed=2).requires_grad_()
    function = functools.partial(distances, model, params, buffers, real)
    assert torch.autograd.gradcheck(function, (images,), eps=1e-7, atol=1e-7, rtol=1e-4, fast_mode=True)


def test_the_distance_by_hand():
    params, buffers = network()
    real, images = some_images(2, 5), some_images(2, 3, seed=2)
    found = distances(MODEL, params, buffers, list(real), images)
    for c in range(2):
        means = [models.features(MODEL, params, buffers, x[c]).mean(0) for x in (real, images)]
        torch.testing.assert_close(found[c], (means[0] - means[1]).square().sum())


def test_classes_may_have_different_numbers_of_real_images():
    params, buffers = network()
    real, images = [some_images(5), some_images(2, seed=4)], some_images(2, 3, seed=2)
    found = distances(MODEL, params, buffers, real, images)
    alone = [distances(MODEL, params, buffers, [real[c]], images[c : c + 1]) for c in range(2)]
    torch.testing.assert_close(found, torch.cat(alone))


def test_batch_norm_takes_the_statistics_of_all_classes_together_and_changes_none():
    params, buffers = network(BATCH_NORM)
    before = tree.detach(buffers)
    images = some_images(6)
    together = embedding(BATCH_NORM, params, buffers, images)
    assert not torch.allclose(together[:3], embedding(BATCH_NORM, params, buffers, images[:3]))
    assert not torch.allclose(together, models.features(BATCH_NORM, params, buffers, images))
    assert all(torch.equal(buffers[n], before[n]) for n in before)


# --- the method ---
def test_the_set_has_the_budget_and_keeps_pixel_values():
    made = straight()
    assert made.split.images.shape == (6, 3, 8, 8)
    assert made.split.images.dtype == torch.float32
    assert made.split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(made.history) == SMALL.steps
    assert made.learned == {}


def test_it_starts_from_real_images_and_stores_pixels():
    found = dm(SMALL.replace(steps=1, lr=1e-12), task()).split
    pixels = REAL.images.float() / 255
    for image, label in zip(found.images, found.labels, strict=True):
        own = pixels[REAL.labels == label]
        assert float((own - image).abs().amax((1, 2, 3)).min()) < 1e-6


def test_it_starts_from_standard_normal_noise():
    images = starting(task(), 100, "noise")
    assert images.shape == (300, 3, 8, 8)
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_mean_embeddings_come_nearer_in_networks_never_seen():
    # instance norm on a 2 x 2 image leaves little to learn; without it embeddings and their gradients are small
    model, spec = MODEL.replace(norm="none"), SMALL.replace(steps=100, lr=2000.0, real_batch=20, augment="")

    def gap(split):
        total = 0.0
        for seed in range(5):
            params, buffers = models.init(model, tree.generator_for(seed, "new"))
            real = [normalise(REAL.images[REAL.labels == c], MEAN, STD) for c in range(3)]
            fake = normalise(split.images, MEAN, STD).view(3, 2, 3, 8, 8)
            total += float(distances(model, params, buffers, real, fake).sum())
        return total

    before, after = (gap(dm(spec.replace(**changes), task(model=model)).split) for changes in ({"steps": 1, "lr": 1e-12}, {}))
    assert after < 0.7 * before


def test_the_first_steps_are_gradient_descent_with_momentum():
    spec = SMALL.replace(augment="", real_batch=20, steps=2)
    own, velocity, values = starting(task(), 2, "real"), torch.zeros(6, 3, 8, 8), []
    real = [normalise(REAL.images[REAL.labels == c], MEAN, STD) for c in range(3)]
    for step in range(2):
        params, buffers = models.init(MODEL, tree.generator_for(3, "dm", step))
        leaf = own.requires_grad_()
        loss = distances(MODEL, params, buffers, real, leaf.view(3, 2, 3, 8, 8)).sum()
        velocity = 0.5 * velocity + torch.autograd.grad(loss, leaf)[0]
        own = (leaf - velocity).detach()
        values.append(float(loss.detach()) / 3)
    made = dm(spec, task())
    torch.testing.assert_close(normalise(made.split.images, MEAN, STD), own, atol=1e-5, rtol=1e-4)
    assert made.history == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(model):
    kept = []
    made = dm(SMALL, task(model=model))
    dm(SMALL.replace(steps=50), task(model=model, checkpoint=kept.append))
    ticks = []
    state = {name: t.clone() for name, t in kept[-1].items()}
    again = dm(SMALL, task(model=model, resume=kept[-1], progress=lambda *at: ticks.append(at)))
    assert torch.equal(again.split.images, made.split.images)
    assert again.history == made.history
    assert ticks[0] == (51, 60)
    assert all(torch.equal(kept[-1][name], t) for name, t in state.items())


def test_other_seeds_and_augmentations_give_other_images():
    spec = SMALL.replace(steps=2)
    first = dm(spec, task()).split.images
    assert torch.equal(dm(spec, task()).split.images, first)
    assert not torch.equal(dm(spec, task(seed=4)).split.images, first)
    assert not torch.equal(dm(spec.replace(augment=""), task()).split.images, first)


# --- refusals ---
@pytest.mark.parametrize(
    "changes, line",
    [
        ({"ipc": 0}, "ipc must be >= 1, got 0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"real_batch": 0}, "real_batch must be >= 1, got 0"),
        ({"lr": -1}, "lr must be > 0, got -1"),
        ({"momentum": 1}, r"momentum must lie in \[0, 1\), got 1"),
        ({"start": "black"}, "start must be one of real, noise; got 'black'"),
        ({"augment": "blur"}, "operations must be joined by _ from .* got 'blur'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_out_of_range_are_refused(changes, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        DMSpec(**changes)


def test_the_method_is_written_with_its_settings():
    assert DMSpec(ipc=3).to_dict()["method"] == "dm"


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match=r"^ipc must be at most the images of a class; class 2 has 6, got 7$"):
        dm(SMALL.replace(ipc=7), task())


def test_memory_is_one_class_at_least():
    spec = SMALL.replace(steps=1)
    least = spec.fewest(3)
    assert torch.equal(dm(spec, task(held=least)).split.images, dm(spec, task()).split.images)
    with pytest.raises(ValueError, match=r"^dm needs the activations of .* raise distill_memory, or lower ipc or real_batch$"):
        dm(spec, task(held=least - 1))
    with pytest.raises(ValueError, match=r"^dm with batch norm needs the activations of .* or lower ipc or real_batch$"):
        dm(spec, task(model=BATCH_NORM, held=least))


def test_images_that_explode_stop_the_run():
    bad = Split(torch.full((3, 3, 8, 8), float("nan")), torch.arange(3))
    with pytest.raises(FloatingPointError, match=r"^the images are not finite after step 1; lower lr$"):
        dm(SMALL.replace(ipc=1, steps=1), task(real=bad))
