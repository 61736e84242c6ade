"""The CUDA branches, on a fake device: no tensors of two devices, no hidden waiting, the numbers of a processor."""
from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from fake_devices import FREE, fake_cuda
from small_study import contents, plan, units
from tiny import BATCH_NORM, FULL, MEAN, MODEL, STD, close, coloured, equal, learned, start, train

from dpkit import distill, models, training, tree
from dpkit.connectivity import STATISTICS
from dpkit.data import AugmentSpec, normalise
from dpkit.distill import matching
from dpkit.distill.matching import Matcher
from dpkit.models import ModelSpec
from dpkit.stages import forecast
from dpkit.stages.execute import make
from dpkit.stages.unit import Context, closure
from dpkit.store import Store
from dpkit.training import evaluation, gradient, loop

pytestmark = pytest.mark.filterwarnings("ignore:form .* does not work here")

#: where training waits: data and weights go to the device, and results come back, once; an epoch's losses are looked at; forms
#: are timed before the first step
BEGINS = {"batches.py:Batches.__init__", "loop.py:fit", "loop.py:_flat_mask", "loop.py:_unflat", "gradient.py:_seconds",
          "tree.py:to"}
AUGMENTS: set[str] = set()  # waits that augmenting may make
#: small sets: the images to start from, their checkpoints and what is looked at then
SETS = {"learn.py:_start", "learn.py:learn", "learn.py:_Step.__init__", "network.py:Trainer.__init__", "tree.py:to", "dm.py:dm",
        "dm.py:stored"}


@pytest.fixture(scope="module")
def split():
    return coloured()


# --- the fake itself: a check that cannot fail is none ---
def test_it_refuses_what_cuda_refuses():
    with fake_cuda() as fake:
        x = torch.ones(3, device="cuda")
        assert (x.device, x.is_cuda, (x + 1)[1:].device) == (torch.device("cuda:0"), True, torch.device("cuda:0"))
        assert torch.func.vmap(lambda row: torch.full((2,), 1.0, device=row.device) + row)(x).is_cuda
        for wrong in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(3)]), lambda: torch.ones(3).add_(x),
                      lambda: torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")],
                      lambda: torch.stack([x[0], torch.tensor(1.0)])):
            with pytest.raises(RuntimeError, match=r"device|cpu"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        for draw in (lambda g: torch.rand(3, generator=g, device="cuda"), lambda g: x.normal_(generator=g)):
            with pytest.raises(RuntimeError, match="generator"):
                draw(torch.Generator())
        assert torch.equal((x * torch.tensor(2.0)).cpu(), torch.full((3,), 2.0))  # a single number may come from anywhere
        assert not torch.ones(3).is_cuda
        assert fake.operations > 0
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("what, wait", [
    (lambda x: float(x.sum()), True), (lambda x: bool(x.any()), True), (lambda x: x.tolist(), True), (lambda x: x.cpu(), True),
    (lambda x: x[x > 0], True), (lambda x: x[[0, 1]], True), (lambda x: torch.equal(x, x), True), (lambda x: x.nonzero(), True),
    (lambda x: x.add_(torch.ones(3).to(x.device)), True), (lambda x: torch.tensor([1.0], device=x.device), True),
    (lambda x: x.add_(torch.ones(3).to(x.device, non_blocking=True)), False), (lambda x: torch.zeros(3, device=x.device), False),
    (lambda x: x[1:].mul_(2), False), (lambda x: torch.where(x > 0, x, 0.0), False), (lambda x: x.to("cuda"), False),
    (lambda x: torch.nn.functional.one_hot(x.long(), 3), False)])
def test_it_knows_what_waits(what, wait):
    with fake_cuda() as fake:
        x = torch.ones(3, device="cuda")
        what(x)
        assert bool(fake.waits) == wait


def test_a_recorded_graph_is_replayed_and_may_not_wait():
    with fake_cuda():
        x, y = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.add_(x * 2)
        x.fill_(3.0)
        graph.replay()
        assert y.tolist() == [8.0, 8.0]
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
            float(y.sum())


# --- training ---
RESNET, MLP = (ModelSpec(arch=arch, width=width, image_size=8, classes=3) for arch, width in (("resnet10", 2), ("mlp", 4)))


@pytest.mark.parametrize("model, form, changes", [
    (MODEL, "vmap", {"precision": "bf16"}), (BATCH_NORM, "vmap", {"cutmix": 0.5}), (RESNET, "graphs", {"cutmix": 0.5}),
    (BATCH_NORM, "graphs", {"augment": AugmentSpec(operations="color_crop_cutout_flip_scale_rotate", single=True)}),
    (MLP, "solo", {"alternating_flip": True, "nesterov": True, "label_smoothing": 0.1, "schedule": "onecycle"})],
    ids=["bf16", "batch", "resnet-graphs", "batch-graphs", "mlp"])
def test_training_waits_between_epochs_only(split, model, form, changes):
    spec, networks = FULL.replace(epochs=2, **changes), start(model, 2)
    masks = {n: torch.arange(networks[0][n].numel()).view(networks[0][n].shape) % 3 > 0 for n in models.prunable(model)}
    options = {"model": model, "seeds": (3, 4), "networks": networks, "masks": masks, "snapshots": [2]}
    expected = train(spec, split, form="solo", **options)
    with fake_cuda() as fake:
        found = train(spec, split, form=form, device="cuda", **options)
        assert not any(fake.on_device(t) for part in (found.params, found.buffers, *found.snapshots[2]) for t in part.values())
        steps = len(found.losses[0])
        assert fake.where() <= BEGINS | AUGMENTS
        assert sum(wait.where == "loop.py:fit" for wait in fake.waits) == 2 + spec.epochs + 1  # weights, epochs' losses, the end
        assert steps > spec.epochs
        assert form != "graphs" or fake.graphs == 2, "one for each size of batch"
    atol = 2e-2 if spec.precision == "bf16" else 1e-4
    close(found.params, expected.params, atol=atol)
    close(found.snapshots[2][1], expected.snapshots[2][1], atol=atol)
    assert all(not found.params[n][~m].any() for n, m in masks.items())
    if form == "graphs":
        assert equal(found.params, expected.params), "what is replayed is the same computation"


def test_a_wait_or_a_tensor_left_behind_is_found(split, monkeypatch):
    class Waits(gradient.Solo):
        def __call__(self, images, targets):
            losses, found = super().__call__(images, targets)
            assert float(losses.sum()) > 0
            return losses, found

    monkeypatch.setitem(gradient.FORMS, "solo", Waits)
    with fake_cuda() as fake:
        train(FULL, split, form="solo", device="cuda")
        assert sum(wait.what == "_local_scalar_dense" for wait in fake.waits) == 9 + 3, "each step, and the end of each epoch"
    monkeypatch.undo()
    monkeypatch.setattr(loop, "_flat_mask", lambda masks, like, count, device: loop._flat(masks, count))
    masks = {n: torch.ones_like(t, dtype=torch.bool) for n, t in start()[0].items()}
    with fake_cuda(), pytest.raises(RuntimeError, match="same device"):
        train(FULL, split, masks=masks, device="cuda")


def test_training_goes_on_uncompiled_where_nothing_can_be_built(split, monkeypatch):
    class InductorError(RuntimeError):
        pass

    def broken(*_):
        raise InductorError("no Python.h")

    with fake_cuda():
        monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
        monkeypatch.setattr(gradient, "can_compile", lambda: True)
        for cache in (gradient._loss_function, gradient._population_function):
            cache.cache_clear()
        with pytest.warns(UserWarning, match="nothing can be compiled here"):
            found = train(FULL.replace(compile=True), split, seeds=(3, 4), device="cuda")
    for cache in (gradient._loss_function, gradient._population_function):
        cache.cache_clear()
    close(found.params, train(FULL, split, seeds=(3, 4)).params, atol=1e-4)


def test_a_gpu_without_a_compiler_compiles_nothing(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    there = {"gcc"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    plain = gradient.can_compile.__wrapped__
    with fake_cuda():
        assert plain()
        there.clear()
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
            assert not plain()
    there.add("gcc")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert not plain()


# --- evaluation ---
def test_networks_are_evaluated_together_and_read_back_once(split, monkeypatch):
    images, labels = normalise(split.images, MEAN, STD), split.labels
    networks = [models.init(BATCH_NORM, torch.Generator().manual_seed(i)) for i in range(3)]
    expected = training.evaluate_many(BATCH_NORM, 3, lambda i: networks[i], images, labels, statistics_images=images)
    work = models.forward_work(BATCH_NORM).bytes * len(images)
    with fake_cuda() as fake:
        there = [tuple(tree.to(part, "cuda") for part in network) for network in networks]
        x, y = images.cuda(), labels.cuda()
        assert evaluation.fitting(BATCH_NORM, 10**9, x) == FREE // 2 // work
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 + FREE)  # kept of tensors that are gone
        assert evaluation.fitting(BATCH_NORM, 10**9, x) == FREE // work
        fake.waits.clear()
        found = training.evaluate_many(BATCH_NORM, 3, lambda i: there[i], x, y, statistics_images=x)
        assert [wait.where for wait in fake.waits] == ["evaluation.py:_evaluated"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_evaluation_goes_on_uncompiled_where_nothing_can_be_built(split, monkeypatch):
    class TritonMissing(RuntimeError):
        pass

    def broken(*_):
        raise TritonMissing

    images, network = normalise(split.images, MEAN, STD), models.init(MODEL, torch.Generator().manual_seed(0))
    expected = training.evaluate_many(MODEL, 1, lambda _: network, images, split.labels, compiled=False)
    monkeypatch.setattr(evaluation, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    evaluation._functions.cache_clear()
    with pytest.warns(UserWarning, match="networks cannot be compiled here"):
        found = training.evaluate_many(MODEL, 1, lambda _: network, images, split.labels, compiled=True)
    evaluation._functions.cache_clear()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- small sets ---
@pytest.mark.parametrize("spec, model", [
    (distill.IDCSpec(ipc=1, outer=1, inner=2, real_batch=5, network_images=8), MODEL),
    (distill.IDCSpec(ipc=1, outer=1, inner=2, real_batch=5, network_images=8, momentum=0.5), BATCH_NORM),
    (distill.DSASpec(ipc=1, outer=1, inner=2, real_batch=5, network_epochs=1, network_batch=2), MODEL),
    (distill.DMSpec(ipc=2, steps=2, real_batch=5), BATCH_NORM)], ids=["idc", "idc-batch", "dsa", "dm"])
def test_images_are_learned_without_waiting_for_a_step(split, spec, model):
    task = distill.Task(real=split, mean=MEAN, std=STD, model=model, seed=3)
    expected = distill.distil(spec, task)
    inner = "inner" if hasattr(spec, "inner") else "steps"
    counts = []
    for more in (0, 2):
        with fake_cuda() as fake:
            longer = spec.replace(**{inner: getattr(spec, inner) + more})
            found = distill.distil(longer, distill.Task(**vars(task) | {"device": "cuda"}))
        assert fake.where() <= SETS | AUGMENTS
        counts.append(sum(wait.where not in AUGMENTS for wait in fake.waits))
        if not more:
            torch.testing.assert_close(found.split.images, expected.split.images, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.history, expected.history, atol=1e-5, rtol=1e-3)
    assert counts[0] == counts[1], "more steps wait no more often"


def test_matching_takes_the_simpler_way_where_one_fails(monkeypatch):
    model, source = BATCH_NORM, torch.Generator().manual_seed(0)
    network = models.init(model, source)
    real, synthetic = torch.randn(3, 6, 3, 8, 8, generator=source), torch.randn(3, 2, 3, 8, 8, generator=source)
    # vmap has no rule here for batch norm in bfloat16 that is differentiated twice
    matcher, loop_ = (Matcher(distill.IDCSpec(precision="bf16"), model, form=form) for form in ("vmap", "loop"))
    with pytest.warns(UserWarning, match=r"convnet3 does not work as it is .*: class after class from here on"):
        found = matcher(*network, real, synthetic, [0, 1, 2])
    assert matcher.form == "loop"
    assert all(torch.equal(one, other) for one, other in zip(found, loop_(*network, real, synthetic, [0, 1, 2]), strict=True))

    class InductorError(RuntimeError):
        pass

    def broken(*_):
        raise InductorError("no compiler")

    real_function = matching._function
    monkeypatch.setattr(matching, "can_compile", lambda: True)
    monkeypatch.setattr(matching, "_function", lambda *a: broken if a[-1] else real_function(*a))
    matcher = Matcher(distill.IDCSpec(compile=True), model, form="vmap")
    with pytest.warns(UserWarning, match="InductorError: no compiler.*: uncompiled from here on"):
        found = matcher(*network, real, synthetic, [0, 1, 2])
    assert (matcher.form, matcher.compiled) == ("vmap", False)
    torch.testing.assert_close(found, Matcher(distill.IDCSpec(), model, form="loop")(*network, real, synthetic, [0, 1, 2]))


def test_the_network_between_two_steps_is_trained_uncompiled_where_it_must(split, monkeypatch):
    class InductorError(RuntimeError):
        pass

    def broken(*_):
        raise InductorError

    spec = distill.IDCSpec(ipc=1, outer=1, inner=2, real_batch=5, network_images=8, network_batch=8)
    expected, _ = learned(spec, MODEL, split, MEAN, STD, 3)
    monkeypatch.setattr(distill.network, "can_compile", lambda: True)
    monkeypatch.setattr(distill.network, "_compiled", lambda *_: broken)
    with pytest.warns(UserWarning, match="training of convnet3 cannot be compiled here"):
        found, _ = learned(spec.replace(compile=True), MODEL, split, MEAN, STD, 3, form="loop")
    assert torch.equal(found.images, expected.images)


# --- a whole study ---
ALL = {"sets": ("idc", "mtt", "k_center"), "arms": ("imp",), "rounds": 1, "at_rounds": (1,), "epochs": 2, "children": 4,
       "statistics_arms": ("imp",), "layer_arms": ("imp",), "between_arms": ("imp",), "plane_arms": ("imp",),
       "plane_sets": ("idc",), "trajectory_points": 2, "square_arms": ("imp",), "square_resolution": 3,
       "around_arms": ("imp",), "around_resolution": 3, "profile_arms": ("imp",), "profile_directions": 2, "profile_points": 5,
       "robust_arms": ("imp",), "hessian_arms": ("imp",), "sharpness_arms": ("imp",), "spectrum_arms": ("imp",),
       "eigenvalues": 2, "pair_products": 6, "density_probes": 3, "density_steps": 4, "trace_probes": 3, "other_probes": 3,
       "diagonal_arms": ("imp",), "diagonal_probes": 3, "removed_on": ("real",), "removed_probes": 3, "removed_draws": 2,
       "edge_arms": ("dense",), "edge_points": 2, "early_bird_sources": ("real",)}
#: units of a stage that are taken, and one of all others; with what they need
MOST = {"distill": 3, "path": 2, "plane": 2}
#: random directions and probes leave room for rounding to grow, and an error is a count of few images
LOOSE = {"errors": 0.05, "others_errors": 0.05, "end_errors": 0.05, "corruption_errors": 0.05, "quantised_errors": 0.05}


def made(folder, wanted, device):
    """The units in a store of their own, those that may be trained together at once."""
    store = Store(folder)
    context, left = Context(store, device), dict(wanted)
    while left:
        first = next(unit for unit in left.values() if all(store.has(p.key) for p in unit.parents.values()))
        name = forecast.group_name(first, device)
        alike = [unit for unit in left.values() if name and forecast.group_name(unit, device) == name]
        group = [first] + [u for u in alike if u is not first and all(store.has(p.key) for p in u.parents.values())]
        make(context, group)
        for unit in group:
            del left[unit.key]
    return store


@pytest.mark.filterwarnings("ignore")
def test_every_stage_gives_the_numbers_of_a_processor(tmp_path):
    few, chosen = Counter(), []
    for unit in units(plan(**ALL)):
        sort = unit.stage, unit.spec.get("path", {}).get("statistics")
        few[sort] += 1
        chosen += [unit] * (few[sort] <= MOST.get(unit.stage, 1))
    assert {statistics for stage, statistics in few if stage == "path"} == set(STATISTICS)
    wanted = closure(chosen)
    expected = contents(made(tmp_path / "cpu", wanted, "cpu"))
    with fake_cuda() as fake:
        store = made(tmp_path / "cuda", wanted, "cuda")
        assert fake.operations > 10_000
    found = contents(store)
    assert found.keys() == expected.keys()
    assert len({unit.stage for unit in wanted.values()}) == 20
    for key, (tensors, _, failed) in expected.items():
        assert found[key][2] == failed
        for name, tensor in tensors.items():
            where = f"{wanted[key].label}: {name}"
            worst = (found[key][0][name].double() - tensor.double()).abs().max() if tensor.numel() else torch.tensor(0.0)
            allowed = LOOSE.get(name, 1e-3 * max(1.0, float(tensor.double().abs().max()))) if tensor.numel() else 0.0
            assert float(worst) <= allowed, f"{where} is {float(worst):.2g} off"
