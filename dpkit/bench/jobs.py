"""The pieces of work themselves, ours and the reference's: each function here builds one and returns it, ready to run.

They run inside the processes of :mod:`dpkit.bench.harness`, so their arguments are plain values. Pixels are noise; what is
computed on them takes as long as on photographs.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkit import connectivity, distill, hessian, models, training, tree
from dpkit.bench import reference
from dpkit.data import Split, normalise
from dpkit.distill import IDCSpec
from dpkit.models import ModelSpec
from dpkit.training import TrainSpec
from dpkit.training.evaluation import evaluate_many

Task = Callable[[], Any]
HALF = torch.full((3,), 0.5)


def split_of(model: ModelSpec, count: int) -> Split:
    """``count`` images of noise (uint8) with labels in turn."""
    shape = (count, model.channels, model.image_size, model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=tree.generator_for("benchmark", "images"))
    return Split(images, torch.arange(count) % model.classes)


def floats(model: ModelSpec, count: int) -> tuple[Tensor, Tensor]:
    """The same images normalised, and their labels."""
    split = split_of(model, count)
    return normalise(split.images, HALF, HALF), split.labels


def start(model: ModelSpec, number: int = 0) -> tuple[tree.Params, tree.Buffers]:
    """A network at initialisation."""
    return models.init(model, tree.generator_for("benchmark", "init", number))


def module(model: ModelSpec, device: str, number: int = 0) -> torch.nn.Module:
    """The reference's module with the weights of :func:`start`."""
    net = reference.network(model)
    params, buffers = start(model, number)
    net.load_state_dict({**params, **buffers}, strict=False)
    return net.to(device)


# --- training ------------------------------------------------------------------------------------------------------------

def train(model: dict, images: int, compile: bool = True, networks: int = 1, device: str = "cpu", batch: int = 64,
          precision: str = "bf16", shared: bool = False, worker: int = 0, workers: int = 1) -> Task:
    """One pass of the library's loop over ``images`` images for each of ``networks`` networks, DSA and CutMix on.

    Networks are dealt out to the workers. On a CPU they are trained one after another, or together if they are ``shared``: of
    equal noise, as children of different tickets of one initialisation are in a study. On a GPU all together.
    """
    spec = ModelSpec(**model)
    recipe = TrainSpec(epochs=1, batch_size=batch, precision=precision, compile=compile)
    split = split_of(spec, images)
    mine = [start(spec, i) for i in range(worker, networks, workers)]
    together = [mine] if device != "cpu" or shared else [[one] for one in mine]
    form = "auto"

    def task() -> None:
        nonlocal form
        for group in together:
            params, buffers = tree.stack([p for p, _ in group]), tree.stack([b for _, b in group])
            found = training.fit(recipe, spec, split, HALF, HALF, params, buffers,
                                 [0] * len(group) if shared else list(range(len(group))), device=device, form=form)
            form = found.form  # chosen once, as in a long run

    return task


def train_reference(model: dict, images: int, device: str = "cpu") -> Task:
    """One pass of the paper's loop."""
    spec = ModelSpec(**model)
    net = module(spec, device)
    generator = tree.generator_for("benchmark", "reference")
    batches, optimiser = reference.loader(*floats(spec, images), generator), reference.sgd(net)
    return lambda: reference.train_epoch(net, batches, optimiser, generator)


# --- matching ------------------------------------------------------------------------------------------------------------

def match(model: dict, steps: int, ipc: int = 10, factor: int = 2, precision: str = "bf16", form: str = "compiled",
          device: str = "cpu") -> Task:
    """``steps`` matching steps of all classes, without the training of the network in between."""
    spec = ModelSpec(**model)
    recipe = IDCSpec(ipc=ipc, factor=factor, outer=1, inner=steps, network_images=0, precision=precision)
    real = split_of(spec, spec.classes * max(recipe.real_batch, ipc * factor**2))
    task = distill.Task(real=real, mean=HALF, std=HALF, model=spec, seed=0, device=device)
    return lambda: distill.idc(recipe, task, form)


def match_reference(model: dict, steps: int, ipc: int = 10, factor: int = 2, device: str = "cpu") -> Task:
    """The same steps in the shape of IDC's loop."""
    spec = ModelSpec(**model)
    net = module(spec, device)
    generator = tree.generator_for("benchmark", "reference")
    images, labels = floats(spec, spec.classes * max(64, ipc * factor**2))
    real = [images[labels == c].to(device) for c in range(spec.classes)]
    synthetic = torch.stack([part[:ipc] for part in real]).clone().requires_grad_()
    optimiser = torch.optim.SGD([synthetic], lr=5e-3, momentum=0.5)

    def task() -> None:
        for _ in range(steps):
            reference.match_classes(net, synthetic, optimiser, real, factor, generator)

    return task


# --- paths ---------------------------------------------------------------------------------------------------------------

def path(model: dict, points: int, images: int, precision: str = "fp32", compiled: bool | None = None,
         device: str = "cpu") -> Task:
    """Error and loss at ``points`` between two networks on ``images`` images, statistics interpolated.

    compiled: as a path on enough images to pay for it would be (True), or not; None: as this path is, with all its checks.
    """
    spec = ModelSpec(**model)
    recipe = connectivity.PathSpec(points=points, statistics="interpolate", precision=precision)
    x, y = (t.to(device) for t in floats(spec, images))
    a, b = ([tree.to(part, device) for part in start(spec, i)] for i in (0, 1))
    if compiled is None:
        return lambda: connectivity.path(recipe, spec, a, b, x, y)

    def between(i: int) -> tuple[tree.Params, tree.Buffers]:
        return tuple(tree.lerp(one, other, i / (points - 1)) for one, other in zip(a, b, strict=True))

    return lambda: evaluate_many(spec, points, between, x, y, precision=precision, compiled=compiled)


def passes(model: dict, points: int, images: int, device: str = "cpu") -> Task:
    """``points`` evaluations of one network on the same images as :func:`path`, and nothing else: what a path costs at least."""
    spec = ModelSpec(**model)
    x, y = (t.to(device) for t in floats(spec, images))
    params, buffers = (tree.to(part, device) for part in start(spec))
    return lambda: [training.evaluate(spec, params, buffers, x, y) for _ in range(points)]


def path_reference(model: dict, points: int, images: int, device: str = "cpu") -> Task:
    """The same path as the paper's scripts walk it, in batches of 32."""
    spec = ModelSpec(**model)
    net = module(spec, device)
    batches = reference.loader(*floats(spec, images), batch=32)
    a, b = ({**net.state_dict(), **tree.to({**p, **q}, device)} for p, q in (start(spec, i) for i in (0, 1)))
    a, b = ({n: t.clone() for n, t in state.items()} for state in (a, b))
    return lambda: reference.walk(net, a, b, batches, points)


# --- Hessian products ----------------------------------------------------------------------------------------------------

def products(model: dict, count: int, images: int = 200, device: str = "cpu", **options: Any) -> Task:
    """``count`` products of the library's operator, the gradient's graph kept between them; gives the products' rounding."""
    spec = ModelSpec(**model)
    params, buffers = (tree.to(part, device) for part in start(spec))
    x, y = (t.to(device) for t in floats(spec, images))
    operator = hessian.Operator(spec, params, buffers, x, y, **{"names": tuple(params), "keep": images, **options})
    vector = torch.ones(operator.size, device=device)

    def task() -> dict[str, float]:
        for _ in range(count):
            operator.matvec(vector)
        return {"rounding": operator.rounding}

    return task


def products_pyhessian(model: dict, count: int, images: int = 200, batch: int = 0, device: str = "cpu") -> Task:
    """``count`` products of PyHessian: all images in one batch (its graph is kept), or a loader of ``batch`` (it is rebuilt)."""
    from pyhessian import hessian as PyHessian
    from pyhessian.utils import hessian_vector_product

    spec = ModelSpec(**model)
    net = module(spec, device).eval()
    x, y = (t.to(device) for t in floats(spec, images))
    data = {"dataloader": list(zip(x.split(batch), y.split(batch), strict=True))} if batch else {"data": (x, y)}
    computer = PyHessian(net, torch.nn.CrossEntropyLoss(), cuda=device != "cpu", **data)
    vector = [torch.ones_like(p) for p in computer.params]

    def task() -> None:
        for _ in range(count):
            if batch:
                computer.dataloader_hv_product(vector)
            else:
                hessian_vector_product(computer.gradsH, computer.params, vector)

    return task


def products_curvlinops(model: dict, count: int, images: int = 200, batch: int = 100, device: str = "cpu") -> Task:
    """``count`` products of curvlinops; fails on group normalisation, whose backward pass has no forward-mode derivative."""
    from curvlinops import HessianLinearOperator

    spec = ModelSpec(**model)
    net = module(spec, device).eval()
    x, y = (t.to(device) for t in floats(spec, images))
    operator = HessianLinearOperator(net, torch.nn.CrossEntropyLoss(), list(net.parameters()),
                                     list(zip(x.split(batch), y.split(batch), strict=True)), check_deterministic=False)
    vector = torch.ones(operator.shape[1], device=device)

    def task() -> None:
        for _ in range(count):
            operator @ vector

    return task
