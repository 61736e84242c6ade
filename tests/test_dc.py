"""DC and DSA by hand, all classes at once against the published order of IDC's steps, and networks from a pool."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_distill import double_network, pictures
from tiny import MEAN, STD, learned

from dpkit import distill, models, tree
from dpkit.data import apply, draw, normalise
from dpkit.distill import DCSpec, DSASpec, IDCSpec
from dpkit.distill.learn import _choose
from dpkit.distill.matching import distance, matched_names, matching_loss
from dpkit.distill.network import Trainer
from dpkit.models import ModelSpec

MODEL = ModelSpec(width=3, image_size=8, classes=3)
DC = DCSpec(ipc=2, outer=2, inner=3, real_batch=5, network_batch=4, network_epochs=1)
DSA = DSASpec(ipc=2, outer=2, inner=3, real_batch=5, network_batch=4, network_epochs=1)


@pytest.fixture(scope="module")
def real():
    return pictures()


def test_published_settings():
    assert (DCSpec().distance, DCSpec().lr, DCSpec().momentum, DCSpec().real_batch) == ("cosine", 0.1, 0.5, 256)
    assert (DCSpec().start, DCSpec().matched, DCSpec().network_data) == ("noise", "weights", "synthetic")
    assert DCSpec().network_epochs == 50
    assert DCSpec().augment.names == ()
    assert DSASpec().start == "real"
    assert set(DSASpec().augment.names) == {"color", "crop", "cutout", "flip", "scale", "rotate"}
    assert {spec.to_dict()["method"] for spec in (DCSpec(), DSASpec(), IDCSpec())} == {"dc", "dsa", "idc"}


@pytest.mark.parametrize("spec", [DC, DSA, IDCSpec(ipc=3, factor=3, distance="l1"), distill.DMSpec(ipc=4)],
                         ids=lambda s: s.method)
def test_settings_come_back_from_their_record(spec):
    assert distill.spec_of(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="method must be one of idc, dc, dsa, dm, mtt, generator, random"):
        distill.spec_of({"method": "gan"})


def test_lower_precision_is_offered_where_it_was_measured():
    assert IDCSpec(precision="bf16").precision == "bf16"
    for spec in (DCSpec, DSASpec):
        with pytest.raises(ValueError, match="precision must be one of fp32; got 'bf16'"):
            spec(precision="bf16")


def test_all_weights_are_matched_and_nothing_else():
    assert matched_names(MODEL, "weights") == models.prunable(MODEL)
    assert set(matched_names(MODEL, "weights")) - set(matched_names(MODEL)) == {"classifier.weight"}


@pytest.mark.parametrize("kind", distill.spec.DISTANCES)
def test_the_pixel_gradient_with_the_classifier_equals_finite_differences(kind):
    spec, (params, buffers) = DCSpec(distance=kind), double_network()
    source = torch.Generator().manual_seed(2)
    real, images = (torch.randn(n, 3, 8, 8, generator=source, dtype=torch.float64) for n in (5, 2))

    def loss(pixels):
        return matching_loss(spec, MODEL, params, buffers, real, pixels, 1)

    gradient = torch.autograd.grad(loss(images.requires_grad_()), images)[0]
    for _ in range(5):
        way = torch.randn(images.shape, generator=source, dtype=torch.float64)
        step = 1e-6
        slope = (loss(images.detach() + step * way) - loss(images.detach() - step * way)) / (2 * step)
        assert float((gradient * way).sum().detach()) == pytest.approx(float(slope.detach()), rel=2e-5, abs=1e-9)


def by_hand(spec, real, seed):
    """DC as its algorithm 1 says, with torch's optimisers, on the random numbers of the library."""
    pixels = normalise(real.images, MEAN, STD)
    places = [torch.nonzero(real.labels == c).flatten() for c in range(3)]
    start = tree.generator_for(seed, "start")
    if spec.start == "noise":
        images = torch.randn(6, 3, 8, 8, generator=start)
    else:
        images = pixels[torch.cat([p[torch.randperm(len(p), generator=start)[:2]] for p in places])].clone()
    images.requires_grad_()
    optimiser = torch.optim.SGD([images], spec.lr, spec.momentum)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for outer in range(spec.outer):
        source = tree.generator_for(seed, "outer", outer)
        params, buffers = models.init(MODEL, source)
        for inner in range(spec.inner):
            leaves = {n: t.detach().requires_grad_() for n, t in params.items()}
            choice = _choose(spec, places, source)
            total = 0.0
            for c in range(3):
                x, s = pixels[choice.real[c]], images[2 * c:2 * c + 2]
                if spec.augment.names:
                    x, s = (apply(spec.augment, t, choice.shared.rows(torch.full((len(t),), c))) for t in (x, s))
                total = total + matching_loss(spec, MODEL, leaves, buffers, x, s, c)
            optimiser.zero_grad()
            images.grad = torch.autograd.grad(total, images)[0]
            optimiser.step()
            if inner + 1 < spec.inner:
                network = torch.optim.SGD(list(params.values()), spec.network_lr)
                for rows in torch.randperm(6, generator=source).split(spec.network_batch):
                    x = images.detach()[rows]
                    if spec.augment.names:
                        x = apply(spec.augment, x, draw(spec.augment, len(x), source))
                    leaves = {n: t.detach().requires_grad_() for n, t in params.items()}
                    loss = F.cross_entropy(models.forward(MODEL, leaves, buffers, x, train=True)[0], labels[rows])
                    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                        params[name].grad = gradient
                    network.step()
    return images.detach() * STD.view(1, 3, 1, 1) + MEAN.view(1, 3, 1, 1)


@pytest.mark.parametrize("spec", [DC, DSA], ids=["dc", "dsa"])
def test_the_images_are_those_of_the_published_algorithm(spec, real):
    found, history = learned(spec, MODEL, real, MEAN, STD, 3)
    assert found.images.shape == (6, 3, 8, 8)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(history) == spec.outer
    expected = by_hand(spec, real, 3)
    torch.testing.assert_close(found.images, expected, atol=2e-4, rtol=1e-3)
    still = learned(spec.replace(lr=1e-12), MODEL, real, MEAN, STD, 3)[0].images
    assert float((found.images - still).norm()) > 1e-2


MOMENTUM = IDCSpec(ipc=2, outer=2, inner=2, lr=0.05, real_batch=5, network_images=8, momentum=0.5)


@pytest.mark.parametrize("spec", [DC, DSA, MOMENTUM], ids=["dc", "dsa", "idc with momentum"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_resumed_run_equals_a_straight_one(spec, threads, real):
    saved = []
    straight, history = learned(spec, MODEL, real, MEAN, STD, 3, threads=threads,
                                checkpoint=lambda state: saved.append({n: t.clone() for n, t in state.items()}))
    assert len(saved) == 2
    assert "velocity" in saved[0]
    again, other = learned(spec, MODEL, real, MEAN, STD, 3, resume=saved[0])
    assert torch.equal(again.images, straight.images)
    assert other == history


# --- IDC: all classes at once against one class after another ---
def test_matching_all_classes_at_once_is_the_published_loop_with_momentum():
    """One optimiser with momentum 0.5 that steps after each class, as published, against one step of all without it."""
    classes, model = 10, MODEL.replace(classes=10)
    real = pictures(12, 10)
    spec = IDCSpec(ipc=10, factor=1, outer=1, inner=8, lr=2e-3, real_batch=6, network_images=0)
    found, _ = learned(spec, model, real, MEAN, STD, 3)

    pixels = normalise(real.images, MEAN, STD)
    places = [torch.nonzero(real.labels == c).flatten() for c in range(classes)]
    start = tree.generator_for(3, "start")
    chosen = torch.cat([p[torch.randperm(len(p), generator=start)[:10]] for p in places])
    images = (pixels[chosen] * STD.view(1, 3, 1, 1) + MEAN.view(1, 3, 1, 1)).requires_grad_()
    before = images.detach().clone()
    optimiser = torch.optim.SGD([images], spec.lr, momentum=0.5)
    source = tree.generator_for(3, "outer", 0)
    params, buffers = models.init(model, source)
    leaves = {n: t.requires_grad_() for n, t in params.items()}
    for _ in range(spec.inner):
        choice = _choose(spec, places, source)
        for c in range(classes):
            s = (images[10 * c:10 * c + 10] - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
            x, s = (apply(spec.augment, t, choice.shared.rows(torch.full((len(t),), c))) for t in (pixels[choice.real[c]], s))
            images.grad = torch.autograd.grad(matching_loss(spec, model, leaves, buffers, x, s, c), images)[0]
            optimiser.step()
    moved, expected = found.images - before, images.detach().clamp(0, 1) - before
    assert float(expected.norm()) > 1e-3
    assert float((moved - expected).norm() / expected.norm()) < 0.05  # the last class's momentum has not run out yet
    first = slice(0, 50)  # classes whose momentum has decayed by 2^-5 and more
    assert float((moved[first] - expected[first]).norm() / expected[first].norm()) < 0.01


# --- a pool of trained networks ---
def test_networks_come_from_the_pool(real):
    pool = [[models.init(MODEL, torch.Generator().manual_seed(10 * i + t)) for t in range(2)] for i in range(2)]
    spec = IDCSpec(ipc=2, factor=1, outer=4, inner=1, lr=0.05, real_batch=5, network_images=0, networks="pool")
    found, history = learned(spec, MODEL, real, MEAN, STD, 3, networks=pool)
    one, alone = learned(spec, MODEL, real, MEAN, STD, 3, networks=[[pool[0][0]]])
    assert history != alone
    assert not torch.equal(found.images, one.images)
    again, _ = learned(spec, MODEL, real, MEAN, STD, 3, networks=pool)
    assert torch.equal(found.images, again.images)
    with pytest.raises(ValueError, match="networks from a pool need trained networks, got none"):
        learned(spec, MODEL, real, MEAN, STD, 3)


def test_a_memory_bound_is_checked_before_anything_is_computed(real):
    with pytest.raises(ValueError, match="idc needs the activations of 64 images at once, the memory bound allows 3; raise "
                                         "distill_memory, or lower real_batch, synthetic_batch or network_batch"):
        learned(IDCSpec(ipc=2, real_batch=6), MODEL, real, MEAN, STD, 3, held=3.0)


def test_a_network_is_not_trained_where_no_epochs_are_asked(real):
    params, buffers = models.init(MODEL, torch.Generator().manual_seed(4))
    before, x = tree.detach(params), normalise(real.images, MEAN, STD)
    Trainer(DC.replace(network_epochs=0), MODEL, real, x)(params, buffers, before, tree.generator_for(0), x[:6],
                                                          torch.arange(3).repeat_interleave(2))
    assert all(torch.equal(params[n], before[n]) for n in params)


def test_distances_of_a_linear_weight():
    a, b = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sum(1 - (x @ y) / (x.norm() * y.norm()) for x, y in zip(a, b, strict=True))
    assert float(distance("cosine", a, b)) == pytest.approx(float(expected))
