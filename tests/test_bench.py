"""Benchmarks, the work itself: counts against torch's counter of operations on real runs, references against the library."""
from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpkit import hessian, models, training, tree
from dpkit.bench import accuracy, counts, jobs, reference, rounding, spectra
from dpkit.data import AugmentSpec, DataSpec
from dpkit.distill import IDCSpec
from dpkit.distill.matching import matching_loss
from dpkit.models import ModelSpec, layer_work
from dpkit.training import TrainSpec
from dpkit.training.gradient import loss

NETWORKS = [ModelSpec(width=8, image_size=16), ModelSpec(arch="resnet10", width=4), ModelSpec(arch="resnet18", width=4)]


def network(model: ModelSpec, images: int):
    params, buffers = models.init(model, tree.generator_for("bench"))
    x = torch.rand(images, 3, model.image_size, model.image_size, generator=tree.generator_for("bench", "images"))
    return {n: t.requires_grad_() for n, t in params.items()}, buffers, x, torch.arange(images) % 10


def operations(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: m.arch)
def test_training_step_is_counted_right(model):
    params, buffers, x, y = network(model, 4)
    found = operations(lambda: loss(model, params, buffers, x, torch.eye(10)[y])[0].backward())
    assert found == counts.work(counts.TRAINING, model, 4).flops


def second_weight_gradient(model: ModelSpec, params, border_only: bool = False) -> int:
    """Operations on one image of the weight gradients in double backward, all layers but the first and the classifier.

    Autograd computes each as a convolution with the output's gradient as kernel; where the layer has a stride the result is
    larger than the weight and cut. border_only: only what is cut.
    """
    total = 0
    for layer in list(layer_work(model))[1:-1]:
        out, into, kernel, _ = params[f"{layer.name}.weight"].shape
        before, after = math.isqrt(layer.inputs // into), math.isqrt(layer.outputs // out)
        result = before + 2 * (kernel // 2) - (before // after * (after - 1) + 1) + 1
        total += layer.flops * (result**2 - border_only * kernel**2) // kernel**2
    return total


@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: m.arch)
def test_hessian_product_is_counted_right(model):
    params, buffers, x, y = network(model, 4)
    weights = [params[n] for n in models.prunable(model)]
    vector = [torch.ones_like(w) for w in weights]

    def gradient():
        value = torch.nn.functional.cross_entropy(models.forward(model, params, buffers, x)[0], y)
        return torch.autograd.grad(value, weights, create_graph=True)

    def product(found):
        torch.autograd.grad(sum((g * v).sum() for g, v in zip(found, vector, strict=True)), weights, retain_graph=True)

    # eager autograd also derives by the images, and computes a border that it cuts
    spare = 4 * (next(layer_work(model)).flops + second_weight_gradient(model, params, border_only=True))
    kept = gradient()
    assert operations(lambda: product(kept)) == counts.work(counts.PRODUCT_KEPT, model, 4).flops + spare
    assert operations(lambda: product(gradient())) == counts.work(counts.PRODUCT, model, 4).flops + spare


@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: m.arch)
def test_matching_step_is_counted_right(model):
    params, buffers, x, _ = network(model, 4)
    tiles = x[:3].clone().requires_grad_()

    def step():
        torch.autograd.grad(matching_loss(IDCSpec(), model, params, buffers, x, tiles, 2), tiles)

    assert operations(step) == counts.matching(model, 4, 3, 1).flops + 3 * second_weight_gradient(model, params)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: m.arch)
def test_reference_networks_are_the_same_function(model, train):
    params, buffers, x, _ = network(model, 4)
    net = reference.network(model).train(train)
    missing = net.load_state_dict({**params, **buffers}, strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    torch.testing.assert_close(net(x), models.forward(model, params, buffers, x, train=train)[0])


def test_reference_training_takes_the_same_step():
    model, recipe = NETWORKS[1], TrainSpec(epochs=1, augment=AugmentSpec(operations=""), cutmix=0.0, schedule="constant")
    split = jobs.split_of(model, 64)  # one batch, whose order does not matter
    params, buffers = jobs.start(model)
    ours = training.fit(recipe, model, split, jobs.HALF, jobs.HALF, tree.stack([params]), tree.stack([buffers]), [0])
    net = jobs.module(model, "cpu")
    value, right = reference.train_epoch(net, reference.loader(*jobs.floats(model, 64)), reference.sgd(net), torch.Generator(),
                                         augment=False)
    theirs = net.state_dict()
    for name, tensor in ours.network(0)[0].items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)
    assert value == pytest.approx(float(ours.losses[0, 0]), rel=1e-5)
    assert 0 <= right <= 1


def test_reference_augmentation_keeps_what_it_must():
    x = torch.rand(6, 3, 16, 16, generator=tree.generator_for("bench", "dsa"))
    same = reference.dsa(x[:1].expand(6, -1, -1, -1), tree.generator_for("bench", 1), shared=True)
    assert torch.equal(same, same[:1].expand_as(same))
    each = reference.dsa(x[:1].expand(6, -1, -1, -1), tree.generator_for("bench", 1))
    assert not torch.equal(each[0], each[1])
    assert all(reference.dsa(x, tree.generator_for("bench", k)).isfinite().all() for k in range(9))  # each of the three kinds


def test_reference_path_is_our_path():
    model = {"arch": "resnet10", "width": 4, "image_size": 16}
    ours = jobs.path(model, points=3, images=70)()
    theirs = jobs.path_reference(model, points=3, images=70)()
    assert [e for e, _ in theirs] == pytest.approx(ours.errors.tolist())
    assert [v for _, v in theirs] == pytest.approx(ours.losses.tolist(), rel=1e-4)
    errors, losses = jobs.path(model, points=3, images=70, compiled=False)()
    assert torch.equal(errors, ours.errors)
    assert torch.equal(losses, ours.losses)


def test_passes_are_what_a_path_costs_at_least(monkeypatch):
    model = {"arch": "resnet10", "width": 4, "image_size": 16}
    seen, forward = [], models.features
    monkeypatch.setattr(models, "features", lambda *given: seen.append(len(given[3])) or forward(*given))
    found = jobs.passes(model, points=3, images=70)()
    assert sum(seen) == 3 * 70
    seen.clear()
    line = jobs.path(model, points=3, images=70)()
    assert sum(seen) == 3 * 70
    assert found == [(float(line.errors[0]), float(line.losses[0]))] * 3  # the first network, three times


def test_reference_matching_goes_our_way():
    """One class without augmentation: the reference's step is along our gradient of the same distance."""
    model = ModelSpec(width=4, image_size=16)
    params, buffers, x, _ = network(model, 8)
    synthetic = x[None, :2].clone().requires_grad_()
    net = reference.network(model)
    net.load_state_dict({n: t.detach() for n, t in params.items()})
    step = torch.optim.SGD([synthetic], lr=1.0)
    before = synthetic.detach().clone()
    plain, reference.dsa = reference.dsa, lambda images, generator, shared=False: images
    try:
        value = reference.match_classes(net, synthetic, step, [x], 1, tree.generator_for("bench"))
    finally:
        reference.dsa = plain
    leaf = before[0].clone().requires_grad_()
    distance = matching_loss(IDCSpec(), model, params, buffers, x, leaf, 0)
    torch.testing.assert_close(before[0] - synthetic.detach()[0], torch.autograd.grad(distance, leaf)[0], rtol=1e-3, atol=1e-5)
    assert value == pytest.approx(float(distance.detach()), rel=1e-4)


@pytest.mark.parametrize("batch", [0, 50])
def test_pyhessian_multiplies_the_same_matrix(batch):
    pyhessian = pytest.importorskip("pyhessian")
    model, images = ModelSpec(width=3, image_size=8), 100
    jobs.products_pyhessian(model.to_dict(), 1, images, batch)()
    x, y = jobs.floats(model, images)
    params, buffers = jobs.start(model)
    operator = hessian.Operator(model, params, buffers, x, y, names=tuple(params))
    vector = torch.linspace(-1, 1, operator.size)
    net = jobs.module(model, "cpu").eval()
    order = [n for n, _ in net.named_parameters()]
    pieces = operator.unflatten(vector)
    computer = pyhessian.hessian(net, torch.nn.CrossEntropyLoss(), cuda=False, data=(x, y))
    theirs = pyhessian.utils.hessian_vector_product(computer.gradsH, computer.params, [pieces[n] for n in order])
    torch.testing.assert_close(operator.flatten(dict(zip(order, theirs, strict=True))), operator.matvec(vector),
                               rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("task", [
    lambda m: jobs.train(m, 128, compile=False, networks=3, precision="fp32", worker=1, workers=2),
    lambda m: jobs.train_reference(m, 128), lambda m: jobs.match(m, 1, ipc=1, precision="fp32", form="loop"),
    lambda m: jobs.match_reference(m, 1, ipc=1), lambda m: jobs.products(m, 2, images=20)],
    ids=("train", "train reference", "match", "match reference", "products"))
def test_every_job_runs_more_than_once(task):
    work = task({"arch": "convnet3", "width": 2, "image_size": 8})
    work()
    work()


@pytest.mark.parametrize("shared, sizes", [(False, [1] * 8), (True, [3, 3, 2])])
def test_workers_share_all_networks(shared, sizes):
    model = {"arch": "convnet3", "width": 2, "image_size": 8}
    seen, noises = [], []
    original = training.fit

    def fit(*arguments, **options):
        seen.append(tree.population(arguments[5]))
        noises.append(set(arguments[7]))
        return original(*arguments, **options)

    training.fit = fit
    try:
        for worker in range(3):
            jobs.train(model, 64, compile=False, networks=8, precision="fp32", shared=shared, worker=worker,
                       workers=3)()
    finally:
        training.fit = original
    assert seen == sizes
    assert all(len(noise) == 1 for noise in noises)


def test_accuracy_is_paired_by_seed():
    found = list(accuracy.rows([0, 1], TrainSpec(epochs=1), ModelSpec(width=2, image_size=16), DataSpec(train=100, test=100),
                               forms=accuracy.FORMS[:3]))
    assert [(r["seed"], r["form"]) for r in found] == [(s, f) for s in (0, 1) for f in accuracy.FORMS[:3]]
    assert all(0 <= r["accuracy"] <= 1 for r in found)
    made = [{"seed": s, "form": f, "accuracy": a} for s, f, a in
            ((0, accuracy.EQUAL, 0.5), (0, "fp32", 0.6), (1, accuracy.EQUAL, 0.9), (1, "fp32", 1.0))]
    mean, low, high = accuracy.differences(made)["fp32"]
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))


def test_rounding_is_measured_from_equal_probes():
    """Uncompiled products are not rounded, so nothing is off; the estimates themselves are those of two operators."""
    row, = rounding.rows({"N": ModelSpec(arch="convnet3", width=2, image_size=16)}, [3], 20,
                         spectra.RECIPE.replace(epochs=1), compile=False, steps=30, long=60)
    assert (row["network"], row["seed"], row["rounding"], row["shift"], row["left"]) == ("N", 3, 0.0, 0.0, 0.0)
    assert row["error"] > 0
    assert row["top"] < 1e-3
    assert row["top_left"] < 1e-3


def test_spectra_agree_with_pyhessian_and_judge_errors():
    pytest.importorskip("pyhessian")
    model, recipe = {"arch": "convnet3", "width": 2, "image_size": 16}, spectra.RECIPE.replace(epochs=1)
    # means over a few runs: in one run two directions may be unlucky
    task = spectra.ours(model, 20, (30, 5, 20, 20), compile=False, recipe=recipe)
    ours = [task() for _ in range(4)][-1]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)  # PyHessian draws from the global generator, whose state depends on what was tested before
        task = spectra.pyhessian(model, 20, recipe=recipe)
        theirs = [task() for _ in range(3)][-1]
    truth, run, other = ours["truth"], ours["runs"][0], theirs["runs"][0]
    assert run["top"] == pytest.approx(truth["top"], rel=1e-4)
    assert other["top"][0] == pytest.approx(truth["top"][0], rel=0.05)
    # Lanczos, the five pairs' images, probes, two directions; PyHessian's power iteration takes what it takes
    assert run["products"] == 30 + 5 + 20 + 2 * 20
    assert other["products"] > 2 * spectra.DEPTH + spectra.PROBES
    assert abs(run["trace"] - truth["trace"]) < 5 * ours["error"]
    assert abs(other["trace"] - truth["trace"]) < 5 * theirs["error"]
    note, why = spectra.verdict(ours, theirs)
    assert f"products {run['products']}, {other['products']}" in note
    assert not why
    # the same runs with one error made larger: no ratio, and the row says which. By much, since a power iteration that finds a
    # negative eigenvalue is far off itself
    doubled = ours | {"runs": [r | {"top": [9 * v for v in r["top"]]} for r in ours["runs"]]}
    assert spectra.verdict(doubled, theirs)[1].startswith("our error is larger (top)")
    assert spectra.verdict(ours | {"error": 2 * theirs["error"]}, theirs)[1].startswith("our error is larger (trace)")
    moved = ours | {"runs": [r | {"nodes": 2 * r["nodes"]} for r in ours["runs"]]}
    assert spectra.verdict(moved, theirs)[1].startswith("our error is larger (moments")
