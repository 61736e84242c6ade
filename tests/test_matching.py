"""The forms of the matching step against each other and against finite differences, and IDC's loop written out."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_distill import MODEL, QUICK, double_network, first_images, pictures
from tiny import BATCH_NORM, MEAN, STD, learned

from dpkit import distill, models, tree
from dpkit.data import AugmentSpec, Split, apply, augment, cutmix, draw, normalise
from dpkit.distill import IDCSpec, decode_images, matching
from dpkit.distill.matching import FORMS, Matcher, matching_loss
from dpkit.models import ModelSpec

KINDS = distill.spec.DISTANCES
RESNET = ModelSpec(arch="resnet10", width=2, image_size=8, classes=3)


@pytest.fixture(scope="module")
def real():
    return pictures()


@pytest.fixture
def uncompiled(monkeypatch):
    """The code around torch.compile without its half minute: what is compiled is called as it is, and counted."""
    shapes = []

    def as_it_is(function, **_):
        def call(*arguments):
            # (matched, rest, buffers, real, synthetic, label), or the network's (params, buffers, images, targets)
            shapes.append(tuple(arguments[3 if len(arguments) == 6 else 2].shape))
            return function(*arguments)

        return call

    caches = (matching._function, distill.network._compiled)
    monkeypatch.setattr(torch, "compile", as_it_is)
    for module in (matching, distill.network):
        monkeypatch.setattr(module, "can_compile", lambda: True)
    for cache in caches:
        cache.cache_clear()
    yield shapes
    for cache in caches:
        cache.cache_clear()


def images(group, count, dtype=torch.float32, seed=3, side=8):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(group, count, 3, side, side, generator=source, dtype=dtype)


def small_network(model=MODEL):
    return models.init(model, torch.Generator().manual_seed(1))


# --- one contract for every form ---
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_gradient_of_the_matching_loss(uncompiled, form, kind):
    params, buffers = double_network()
    spec = IDCSpec(distance=kind, real_batch=5)
    x, s, labels = images(3, 5, torch.float64), images(3, 4, torch.float64, seed=4), [2, 0, 1]
    found, values = Matcher(spec, MODEL, form=form)(params, buffers, x, s, labels)
    assert found.shape == s.shape
    assert not found.requires_grad
    for row, label in enumerate(labels):
        own = s[row].clone().requires_grad_()
        loss = matching_loss(spec, MODEL, params, buffers, x[row], own, label)
        torch.testing.assert_close(values[row], loss.detach())
        torch.testing.assert_close(found[row], torch.autograd.grad(loss, own)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_pixel_gradient_of_every_form_equals_finite_differences(uncompiled, form, kind):
    params, buffers = double_network()
    matcher = Matcher(IDCSpec(distance=kind, real_batch=5), MODEL, form=form)
    x, s, source = images(2, 5, torch.float64), images(2, 3, torch.float64, seed=4), torch.Generator().manual_seed(5)
    gradient, _ = matcher(params, buffers, x, s, [1, 2])
    assert float(gradient.abs().max()) > 0
    for _ in range(3):
        way = torch.randn(s.shape, generator=source, dtype=torch.float64)
        ahead, behind = (matcher(params, buffers, x, s + step * way, [1, 2])[1] for step in (1e-6, -1e-6))
        for row in range(2):
            slope = float(ahead[row] - behind[row]) / 2e-6
            assert float((gradient[row] * way[row]).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("model", [MODEL, BATCH_NORM, RESNET], ids=["instance", "batch", "resnet"])
@pytest.mark.parametrize("form", ["compiled", "vmap"])
def test_the_forms_agree_in_single_precision_and_change_nothing(uncompiled, form, model):
    params, buffers = small_network(model)
    before = tree.detach(params), tree.detach(buffers)
    x, s = images(3, 6), images(3, 4, seed=4)
    spec = IDCSpec(real_batch=6)
    expected, values = Matcher(spec, model, form="loop")(params, buffers, x, s, [0, 1, 2])
    found, other = Matcher(spec, model, form=form)(params, buffers, x, s, [0, 1, 2])
    torch.testing.assert_close(other, values, rtol=1e-4, atol=1e-6)
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
    for old, now in zip(before, (params, buffers), strict=True):
        assert all(torch.equal(old[n], now[n]) for n in now)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_points_the_same_way_in_every_form(uncompiled, form):
    model = MODEL.replace(width=8, image_size=16)
    params, buffers = small_network(model)
    x, s = images(3, 12, side=16), images(3, 8, seed=4, side=16)
    exact = Matcher(IDCSpec(), model, form="loop")(params, buffers, x, s, [0, 1, 2])[0]
    found = Matcher(IDCSpec(precision="bf16", real_batch=12), model, form=form)(params, buffers, x, s, [0, 1, 2])[0]
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert float(F.cosine_similarity(found.flatten(), exact.flatten(), dim=0)) > 0.97


@pytest.mark.parametrize("form", FORMS)
def test_a_class_with_fewer_real_images_than_the_batch(uncompiled, real, form):
    keep = torch.ones(len(real), dtype=torch.bool)
    keep[[0, 3, 6]] = False  # class 0 has five images, the others eight
    few = Split(real.images[keep], real.labels[keep])
    spec = QUICK.replace(ipc=1, real_batch=7, outer=1, lr=0.005, network_images=0)
    assert Matcher(spec, MODEL, form=form).groups([5, 7, 7]) == ([[1, 2], [0]] if form == "vmap" else [[0], [1], [2]])
    start = first_images(few, spec, 3)
    expected, history = learned(spec, MODEL, few, MEAN, STD, 3, form="loop")
    found, other = learned(spec, MODEL, few, MEAN, STD, 3, form=form)
    moved, size = found.images - start, float((expected.images - start).norm())
    assert size > 1e-4
    assert float((moved - (expected.images - start)).norm()) < 1e-3 * size
    assert other == pytest.approx(history, rel=1e-4)
    if form == "compiled":
        assert {shape[0] for shape in uncompiled} == {7}  # the short class is not worth a compilation


@pytest.mark.parametrize("form", ["compiled", "vmap"])
@pytest.mark.parametrize("model", [MODEL, BATCH_NORM], ids=["instance", "batch"])
def test_a_distillation_in_other_forms(uncompiled, real, model, form):
    spec = QUICK.replace(outer=2, ipc=4, factor=1, synthetic_batch=3, network_images=10)
    expected, history = learned(spec, model, real, MEAN, STD, 3)
    found, other = learned(spec.replace(compile=True), model, real, MEAN, STD, 3, form=form)
    torch.testing.assert_close(found.images, expected.images, atol=2e-4, rtol=1e-3)
    assert other == pytest.approx(history, rel=1e-3)
    # whole batches of the network went through the compiled function, the last one of two images did not
    assert (4, 3, 8, 8) in uncompiled
    assert (2, 3, 8, 8) not in uncompiled


def test_classes_are_matched_in_smaller_groups_when_memory_runs_out(monkeypatch):
    params, buffers = small_network()
    x, s, sizes, function = images(3, 6), images(3, 4, seed=4), [], matching._function

    def scarce(*arguments):
        def call(matched, rest, buffers, real, synthetic, labels):
            sizes.append(len(real))
            if len(real) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*arguments)(matched, rest, buffers, real, synthetic, labels)

        return call

    matcher = Matcher(IDCSpec(), MODEL, form="vmap")
    expected = matcher(params, buffers, x, s, [0, 1, 2])
    monkeypatch.setattr(matching, "_function", scarce)
    with pytest.warns(UserWarning, match="not enough memory to match 3 classes at once: 1 at a time from here on"):
        found = matcher(params, buffers, x, s, [0, 1, 2])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matcher(params, buffers, x, s, [0, 1, 2])
    assert sizes == [3, 1, 1, 1, 1, 1, 1]

    def never(*_):
        def call(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    monkeypatch.setattr(matching, "_function", never)
    with pytest.raises(torch.OutOfMemoryError):
        matcher(params, buffers, x, s, [0, 1, 2])


# --- which form ---
def test_the_form_is_chosen_by_the_device_and_the_specification(monkeypatch):
    monkeypatch.setattr(matching, "can_compile", lambda: True)
    plain, asks = IDCSpec(), IDCSpec(compile=True)
    for spec, device, form, expected in (
        (plain, "cpu", "auto", ("loop", False)),
        (asks, "cpu", "auto", ("compiled", True)),
        (plain, "cpu", "compiled", ("compiled", True)),
        (asks, "cpu", "loop", ("loop", False)),
        (plain, "cuda", "auto", ("vmap", False)),
        (asks, "cuda", "auto", ("vmap", True)),
    ):
        matcher = Matcher(spec, MODEL, form=form, device=device)
        assert (matcher.form, matcher.compiled) == expected
    monkeypatch.setattr(matching, "can_compile", lambda: False)
    for form, expected in (("auto", "loop"), ("compiled", "loop"), ("vmap", "vmap")):
        matcher = Matcher(asks, MODEL, form=form)
        assert (matcher.form, matcher.compiled) == (expected, False)


def test_wrong_arguments_are_refused(real):
    with pytest.raises(ValueError, match="form must be one of auto, loop, compiled, vmap; got 'fast'"):
        Matcher(QUICK, MODEL, form="fast")
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        learned(QUICK, MODEL, real, MEAN, STD, 3, threads=0)


# --- bits ---
def plain_idc(spec, model, real, seed):
    """IDC as one plain loop: class after class, the graph from the distance to the stored images, then the network."""
    x, places = normalise(real.images, MEAN, STD), [torch.nonzero(real.labels == c).flatten() for c in range(3)]
    mean, std = MEAN.view(1, -1, 1, 1), STD.view(1, -1, 1, 1)
    history: list[float] = []
    source = tree.generator_for(seed, "start")
    chosen = torch.cat([p[torch.randperm(len(p), generator=source)[: spec.ipc * spec.factor**2]] for p in places])
    pixels = distill.mosaic(x[chosen] * std + mean, spec.factor)
    for outer in range(spec.outer):
        source, total = tree.generator_for(seed, "outer", outer), torch.zeros(())
        params, buffers = models.init(model, source)
        params = {n: t.requires_grad_() for n, t in params.items()}
        velocity = {n: torch.zeros_like(t) for n, t in params.items()}
        for _ in range(spec.inner):
            shared, step = draw(spec.augment, 3, source), torch.zeros_like(pixels)
            pixels.requires_grad_()
            for c, place in enumerate(places):
                batch = x[place[torch.randperm(len(place), generator=source)[: spec.real_batch]]]
                tiles = (decode_images(pixels[c * spec.ipc : (c + 1) * spec.ipc], spec.factor) - mean) / std
                if len(tiles) > spec.synthetic_batch:
                    tiles = tiles[torch.randperm(len(tiles), generator=source)[: spec.synthetic_batch]]
                pair = [apply(spec.augment, b, shared.rows(torch.full((len(b),), c))) for b in (batch, tiles)]
                loss = matching_loss(spec, model, params, buffers, *pair, c)
                step += torch.autograd.grad(loss, pixels)[0]
                total += loss.detach()
            pixels = pixels.detach() - 2 * spec.lr * spec.ipc / 10 * step
            for rows in torch.randperm(len(real), generator=source)[: spec.network_images].split(spec.network_batch):
                batch = augment(AugmentSpec(), x[rows], source)
                batch, targets = cutmix(batch, real.targets(3)[rows], source)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spec.precision == "bf16"):
                    logits, buffers = models.forward(model, params, buffers, batch, train=True)
                gradients = torch.autograd.grad(F.cross_entropy(logits.float(), targets), list(params.values()))
                buffers = {n: b.detach() for n, b in buffers.items()}
                with torch.no_grad():
                    for (name, weight), g in zip(params.items(), gradients, strict=True):
                        velocity[name].mul_(0.9).add_(g.add(weight, alpha=5e-4))
                        weight.sub_(velocity[name], alpha=spec.network_lr)
        pixels = pixels.clamp(0, 1)
        history.append(float(total) / spec.inner / 3)
    return pixels, history


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "change, model",
    [
        ({}, MODEL),
        ({"synthetic_batch": 5, "distance": "l1"}, BATCH_NORM),
        ({"precision": "bf16", "distance": "cosine"}, MODEL),
        ({"ipc": 1}, RESNET),
    ],
    ids=["instance", "batch", "bf16", "resnet"],
)
def test_the_bits_are_those_of_the_plain_loop_for_any_number_of_threads(real, change, model, threads):
    spec = QUICK.replace(outer=2, inner=3, network_images=10, **change)
    expected, history = plain_idc(spec, model, real, 3)
    found, other = learned(spec, model, real, MEAN, STD, 3, threads=threads)
    assert torch.equal(found.images, expected)
    assert other == history


def test_threads_give_back_the_setting_and_pass_on_errors(real, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        learned(QUICK.replace(outer=1, inner=1), MODEL, real, MEAN, STD, 3, threads=2)
        assert torch.get_num_threads() == 2

        def broken(*_):
            raise RuntimeError("no memory left")

        monkeypatch.setattr(Matcher, "__call__", broken)
        with pytest.raises(RuntimeError, match="no memory left"):
            learned(QUICK.replace(outer=1, inner=1), MODEL, real, MEAN, STD, 3, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- compiled code itself ---
@pytest.mark.slow
@pytest.mark.parametrize("form", ["compiled", "vmap"])
def test_compiled_code_agrees(real, form):
    spec = QUICK.replace(outer=2)
    expected, history = learned(spec, MODEL, real, MEAN, STD, 3)
    for threads in (2, 1):  # compiling while two threads want it comes first
        found, other = learned(spec.replace(compile=True), MODEL, real, MEAN, STD, 3, form=form, threads=threads)
        torch.testing.assert_close(found.images, expected.images, atol=1e-3, rtol=1e-3)
        assert other == pytest.approx(history, rel=1e-3)


def test_a_step_that_cannot_be_compiled_is_computed_without(monkeypatch):
    class InductorError(RuntimeError):
        pass

    def unbuilt(*arguments):
        raise InductorError("C++ compile error")

    params, buffers = small_network()
    spec = IDCSpec(ipc=2, factor=1, real_batch=5)
    real, synthetic = images(3, 5), images(3, 2, seed=4)
    expected = Matcher(spec, MODEL, form="loop")(params, buffers, real, synthetic, [0, 1, 2])
    monkeypatch.setattr(matching, "_function", lambda *what: unbuilt)
    matcher = Matcher(spec, MODEL, form="compiled")
    with pytest.warns(UserWarning, match="the matching step of convnet3 cannot be compiled here .* same mathematics") as said:
        found = matcher(params, buffers, real, synthetic, [0, 1, 2])
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
