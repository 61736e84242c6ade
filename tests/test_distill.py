"""IDC against finite differences, by hand, and against the published order of its steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import BATCH_NORM, MEAN, STD, Plain, equal, learned

from dpkit import distill, models, tree
from dpkit.data import AugmentSpec, Split, apply, augment, cutmix, draw, normalise, shapes
from dpkit.distill import IDCSpec, decode_images
from dpkit.distill.matching import distance, matched_names, matching_loss
from dpkit.distill.network import Trainer
from dpkit.models import ModelSpec

MODEL = ModelSpec(width=3, image_size=8, classes=3)
QUICK = IDCSpec(
    ipc=2, factor=2, outer=3, inner=2, lr=0.05, real_batch=6, network_images=8, network_batch=4
)


def pictures(per_class=8, classes=3, seed=0):
    """Images of mid brightness, so that small steps stay inside [0, 1], with a colour for each class."""
    labels = torch.arange(per_class * classes) % classes
    pixels = torch.randint(60, 120, (len(labels), 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    pixels[torch.arange(len(labels)), labels % 3] += 8 * (1 + labels // 3)[:, None, None]
    return Split(pixels.to(torch.uint8), labels)


@pytest.fixture(scope="module")
def real():
    return pictures()


def double_network(model=MODEL):
    params, buffers = models.init(model, torch.Generator().manual_seed(1))
    return {n: t.double().requires_grad_() for n, t in params.items()}, tree.to(buffers, dtype=torch.float64)


def gap(kind, a, b):
    """The distances by their definitions, for gradients (out, in, h, w)."""
    if kind == "cosine":
        rows = zip(a.flatten(1), b.flatten(1), strict=True)
        return sum(1 - (x @ y) / (x.norm() * y.norm()) for x, y in rows)
    return (a - b).square().sum() if kind == "squared" else (a - b).abs().sum()


def expected_loss(kind, model, params, buffers, real, synthetic, label):
    """The matching loss by torch.func, on convolution weights alone."""
    weights = {n: t.detach() for n, t in params.items()}

    def loss(weights, images):
        logits, _ = models.forward(model, weights, buffers, images, train=True)
        return F.cross_entropy(logits, torch.full((len(images),), label))

    target, found = (torch.func.grad(loss)(weights, images) for images in (real, synthetic))
    return sum(
        gap(kind, found[n], target[n]) for n in weights if n.startswith("conv") and n.endswith("weight")
    )


# --- the matching loss ---
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("kind", distill.spec.DISTANCES)
def test_the_pixel_gradient_equals_finite_differences(kind, factor):
    spec = IDCSpec(distance=kind)
    params, buffers = double_network()
    source = torch.Generator().manual_seed(2)
    real = torch.randn(5, 3, 8, 8, generator=source, dtype=torch.float64)
    stored = torch.rand(2, 3, 8, 8, generator=source, dtype=torch.float64)

    def loss(pixels):
        return matching_loss(
            spec, MODEL, params, buffers, real, (decode_images(pixels, factor) - 0.5) / 0.25, 1
        )

    gradient = torch.autograd.grad(loss(stored.requires_grad_()), stored)[0]
    assert float(gradient.abs().max()) > 0
    for _ in range(6):
        direction = torch.randn(stored.shape, generator=source, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = stored + 1e-6 * direction, stored - 1e-6 * direction
        slope = float((loss(ahead) - loss(behind)).detach()) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", distill.spec.DISTANCES)
def test_the_matching_loss_by_its_definition(kind):
    params, buffers = double_network()
    source = torch.Generator().manual_seed(3)
    real, synthetic = (torch.randn(n, 3, 8, 8, generator=source, dtype=torch.float64) for n in (5, 2))
    found = matching_loss(IDCSpec(distance=kind), MODEL, params, buffers, real, synthetic, 2)
    torch.testing.assert_close(found, expected_loss(kind, MODEL, params, buffers, real, synthetic, 2))
    same = matching_loss(IDCSpec(distance=kind), MODEL, params, buffers, real, real, 2)
    assert abs(float(same.detach())) < 1e-12


def test_distances_by_hand():
    a, b = torch.tensor([[[[3.0, 4.0]]], [[[1.0, 0.0]]]]), torch.tensor([[[[4.0, 3.0]]], [[[0.0, 2.0]]]])
    assert float(distance("squared", a, b)) == 1 + 1 + 1 + 4
    assert float(distance("l1", a, b)) == 1 + 1 + 1 + 2
    assert float(distance("cosine", a, b)) == pytest.approx((1 - 24 / 25) + 1)


def test_what_is_matched():
    assert matched_names(MODEL) == ("conv0.weight", "conv1.weight", "conv2.weight")


# --- one step, and many ---
def first_images(real, spec, seed, classes=3):
    """The start: real images drawn without replacement, packed."""
    source = tree.generator_for(seed, "start")
    need, chosen = spec.ipc * spec.factor**2, []
    for c in range(classes):
        place = torch.nonzero(real.labels == c).flatten()
        chosen.append(place[torch.randperm(len(place), generator=source)[:need]])
    return distill.mosaic(real.images[torch.cat(chosen)] / 255, spec.factor)


@pytest.mark.parametrize(
    "factor, ipc, operations", [(1, 2, ""), (2, 2, "color_crop_cutout"), (1, 3, "color_flip")]
)
def test_one_step_by_hand(real, factor, ipc, operations):
    spec = IDCSpec(
        ipc=ipc,
        factor=factor,
        outer=1,
        inner=1,
        lr=0.03,
        real_batch=4,
        network_images=0,
        augment=AugmentSpec(operations=operations),
    )
    split, history = learned(spec, MODEL, real, MEAN, STD, 5)

    source = tree.generator_for(5, "outer", 0)
    params, buffers = models.init(MODEL, source)
    shared = draw(spec.augment, 3, source)
    images = first_images(real, spec, 5).requires_grad_()
    x, total = normalise(real.images, MEAN, STD), 0
    for c in range(3):
        place = torch.nonzero(real.labels == c).flatten()
        batch = x[place[torch.randperm(len(place), generator=source)[:4]]]
        tiles = normalise(decode_images(images[c * ipc : (c + 1) * ipc], factor), MEAN, STD)
        pair = [apply(spec.augment, b, shared.rows(torch.full((len(b),), c))) for b in (batch, tiles)]
        total = total + expected_loss("squared", MODEL, params, buffers, *pair, c)
    step = 2 * 0.03 * ipc / 10 * torch.autograd.grad(total, images)[0]
    assert float(step.abs().max()) > 1e-5
    moved = split.images - images.detach()
    torch.testing.assert_close(moved, -step, atol=2e-6, rtol=1e-3)
    assert history == pytest.approx([float(total.detach()) / 3], rel=1e-4)


def test_doubled_rate_equals_the_published_momentum():
    """One optimiser with momentum 0.5 that steps once for each of ten classes in turn.

    When a class comes round again its momentum has decayed ten times, so its images have moved by
    2 (1 - 2^-10) of rate times gradient: the doubled rate to one part in a thousand.
    """
    classes, rounds = 10, 6
    model, shown = MODEL.replace(classes=classes, image_size=16), shapes.make("train", 60)
    real = Split(64 + shown.images // 2, shown.labels)  # so that no step leaves [0, 1]
    spec = IDCSpec(
        ipc=1,
        factor=1,
        outer=1,
        inner=rounds,
        lr=0.003,
        real_batch=60,
        network_images=0,
        augment=AugmentSpec(operations=""),
    )
    images = first_images(real, spec, 1, classes)
    found = learned(spec, model, real, MEAN, STD, 1)[0].images - images

    params, buffers = models.init(model, tree.generator_for(1, "outer", 0))
    params = {n: t.requires_grad_() for n, t in params.items()}
    pixels, x = images.clone().requires_grad_(), normalise(real.images, MEAN, STD)
    optimiser = torch.optim.SGD([pixels], lr=spec.lr * spec.ipc / 10, momentum=0.5)
    published = torch.zeros_like(images)
    for _ in range(rounds + 1):
        for c in range(classes):
            published[c] = (pixels[c] - images[c]).detach()  # as it comes round again
            optimiser.zero_grad()
            own = normalise(pixels[c : c + 1], MEAN, STD)
            matching_loss(spec, model, params, buffers, x[real.labels == c], own, c).backward()
            optimiser.step()
    for c in range(classes):
        size = float(published[c].norm())
        assert size > 1e-3
        assert float((found[c] - published[c]).norm()) < 1e-3 * size


@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_the_network_step_is_that_of_torch(model, real):
    spec = IDCSpec(network_images=10, network_batch=4, network_lr=0.05)
    params, buffers = models.init(model, torch.Generator().manual_seed(4))
    module = Plain(model, {n: t[None] for n, t in params.items()}, {n: t[None] for n, t in buffers.items()})
    trained = tree.detach(params)
    velocity = {n: torch.zeros_like(t) for n, t in params.items()}
    x = normalise(real.images, MEAN, STD)
    updated = Trainer(spec, model, real, x)(trained, buffers, velocity, tree.generator_for(0, "network"))

    source = tree.generator_for(0, "network")
    optimiser = torch.optim.SGD(module.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for rows in torch.randperm(len(real), generator=source)[:10].split(4):
        batch, targets = cutmix(augment(AugmentSpec(), x[rows], source), real.targets(3)[rows], source)
        optimiser.zero_grad()
        F.cross_entropy(module(batch), targets).backward()
        optimiser.step()
    state = module.state_dict()
    for name, weight in trained.items():
        assert not torch.equal(weight, params[name])
        torch.testing.assert_close(weight, state[name], atol=1e-5, rtol=1e-4)
    for name in models.statistics(model):
        torch.testing.assert_close(updated[name], state[name], atol=1e-5, rtol=1e-4)


def test_at_most_so_many_decoded_images_are_matched(real):
    spec = QUICK.replace(ipc=4, factor=1, outer=1, inner=1, synthetic_batch=3, network_images=0)
    moved = learned(spec, MODEL, real, MEAN, STD, 0)[0].images - first_images(real, spec, 0)
    changed = (moved.abs().flatten(1).amax(1) > 1e-7).view(3, 4).sum(1)
    assert changed.tolist() == [3, 3, 3]


# --- the whole run ---
@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_a_resumed_run_equals_a_straight_one(real, model):
    saved = []

    def keep(state):
        saved.append({name: t.clone() for name, t in state.items()})

    straight, history = learned(QUICK, model, real, MEAN, STD, 3, checkpoint=keep)
    assert [len(state["history"]) for state in saved] == [1, 2, 3]
    assert torch.equal(saved[-1]["images"], straight.images)
    for state in saved:
        again, other = learned(QUICK, model, real, MEAN, STD, 3, resume=state)
        assert torch.equal(again.images, straight.images)
        assert other == history


def test_what_comes_out(real):
    seen, pixels = [], real.images.clone()
    split, history = learned(QUICK, MODEL, real, MEAN, STD, 3, progress=lambda *at: seen.append(at))
    assert split.images.shape == (6, 3, 8, 8)  # exactly ipc for each class
    assert split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert float(split.images.min()) >= 0
    assert float(split.images.max()) <= 1
    assert len(history) == QUICK.outer
    assert all(h > 0 for h in history)
    assert seen == [(step, 6) for step in range(1, 7)]
    assert torch.equal(real.images, pixels)
    assert not torch.allclose(split.images, first_images(real, QUICK, 3), atol=1e-4)
    other = learned(QUICK, MODEL, real, MEAN, STD, 4)[0]
    assert not torch.allclose(other.images, split.images, atol=1e-3)


def test_bf16_moves_the_images_the_same_way():
    model, real = MODEL.replace(image_size=16, classes=10), shapes.make("train", 300)
    spec = QUICK.replace(outer=1, inner=1, network_images=0)
    before, steps = first_images(real, spec, 3, 10), []
    for precision in ("fp32", "bf16"):
        found, _ = learned(spec.replace(precision=precision), model, real, MEAN, STD, 3)
        steps.append((found.images - before).flatten())
    assert not torch.equal(*steps)
    assert float(F.cosine_similarity(*steps, dim=0)) > 0.97


def test_images_that_overflow_are_reported(real):
    with pytest.raises(FloatingPointError, match="images are not finite after outer iteration 0; lower lr"):
        learned(QUICK.replace(lr=1e38), MODEL, real, MEAN, STD, 3)


def test_too_few_images_for_the_start_are_refused(real):
    with pytest.raises(
        ValueError, match="ipc 3 with factor 2 starts from 12 real images a class, class 0 has 8"
    ):
        learned(QUICK.replace(ipc=3), MODEL, real, MEAN, STD, 0)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"start": "zeros"}, "start must be one of real, noise; got 'zeros'"),
        ({"networks": "old"}, "networks must be one of fresh, pool; got 'old'"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"distance": "l2"}, "distance must be one of squared, l1, cosine; got 'l2'"),
        ({"ipc": 0}, "ipc must be >= 1, got 0"),
        ({"factor": 0}, "factor must be >= 1, got 0"),
        ({"network_images": -1}, "network_images must be >= 0"),
        ({"lr": 0}, "lr and network_lr must be > 0"),
    ],
)
def test_wrong_settings_are_refused(change, line):
    with pytest.raises(ValueError, match=line):
        IDCSpec(**change)


def test_nothing_is_drawn_from_the_global_generator(real):
    state = torch.get_rng_state()
    first = learned(QUICK.replace(outer=1), MODEL, real, MEAN, STD, 3)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = learned(QUICK.replace(outer=1), MODEL, real, MEAN, STD, 3)[0]
    assert equal({"images": first.images}, {"images": again.images})
