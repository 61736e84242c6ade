"""Trace, five largest eigenvalues and spectral density of one trained network's Hessian, to equal error, ours and PyHessian's.

The network is trained here, in seconds, on the built-in shapes, in one thread so that every process gets the same bits. Errors
are made equal in this way. Trace: the same estimator (Hutchinson's, signs) with the same number of probes has the same variance.
Density: both run stochastic Lanczos quadrature with the same number of directions and steps. Eigenvalues: PyHessian's power
iteration runs to its usual tolerance, ours takes a number of Lanczos steps, and :func:`verdict` compares both with a long Lanczos
run: if ours were off by more, the row would have no ratio.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkit import cores, data, hessian, models, training, tree
from dpkit.bench import reference
from dpkit.data import AugmentSpec, DataSpec, normalise
from dpkit.models import ModelSpec
from dpkit.training import TrainSpec

PROBES, TOP, STEPS, LONG, TOLERANCE = 20, 5, 20, 80, 1e-3
DIRECTIONS, DEPTH = 2, 20  # of the density
RECIPE = TrainSpec(epochs=3, lr=0.05, augment=AugmentSpec(operations=""), cutmix=0.0)


def problem(model: ModelSpec, images: int, recipe: TrainSpec = RECIPE,
            seed: int = 0) -> tuple[tree.Params, tree.Buffers, Tensor, Tensor]:
    """A trained network and the images of its loss: params, buffers, images (N, C, S, S), labels (N,)."""
    sets = data.load(DataSpec())
    threads = cores.use(1)
    try:
        start = (tree.stack([part]) for part in models.init(model, tree.generator_for("benchmark", "spectra", seed)))
        params, buffers = training.fit(recipe, model, sets.train, sets.mean, sets.std, *start, [seed]).network(0)
    finally:
        cores.use(threads)
    chosen = hessian.subset(sets.train.labels, images)
    return params, buffers, normalise(sets.train.images[chosen], sets.mean, sets.std), sets.train.labels[chosen]


def ours(model: dict, images: int, compile: bool = True, recipe: TrainSpec = RECIPE) -> Callable[[], dict[str, Any]]:
    """All three with the library; the result also holds the long run's eigenvalues, which are not timed."""
    spec = ModelSpec(**model)
    operator = hessian.Operator(spec, *problem(spec, images, recipe), keep=images, compile=compile, threads=1)
    truth = hessian.top_eigenpairs(operator, TOP, LONG, tree.generator_for("benchmark", "long")).values.tolist()

    def task() -> dict[str, Any]:
        generator = tree.generator_for("benchmark", "ours")
        found = hessian.trace(operator, PROBES, generator)
        top = hessian.top_eigenpairs(operator, TOP, STEPS, generator)
        density = hessian.spectral_density(operator, DIRECTIONS, DEPTH, generator)
        return {"trace": found.value, "error": found.standard_error, "top": top.values.tolist(), "truth": truth,
                "products": found.products + top.products + density.products}

    return task


def pyhessian(model: dict, images: int, recipe: TrainSpec = RECIPE) -> Callable[[], dict[str, Any]]:
    """All three with PyHessian, all images in one batch, whose graph it keeps."""
    from pyhessian import hessian as PyHessian

    spec = ModelSpec(**model)
    params, buffers, x, y = problem(spec, images, recipe)
    net = reference.network(spec).eval()
    net.load_state_dict({**params, **buffers}, strict=False)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in models.prunable(spec))
    torch.eig = _eig  # PyHessian calls what torch has dropped
    inner = sys.modules["pyhessian.hessian"]
    multiply, spent = inner.hessian_vector_product, [0]

    def counted(*arguments: Any) -> Any:
        spent[0] += 1
        return multiply(*arguments)

    inner.hessian_vector_product = counted
    computer = PyHessian(net, torch.nn.CrossEntropyLoss(), data=(x, y), cuda=False)

    def task() -> dict[str, Any]:
        spent[0] = 0
        samples = computer.trace(maxIter=PROBES, tol=-1.0)
        values, _ = computer.eigenvalues(maxIter=400, tol=TOLERANCE, top_n=TOP)
        computer.density(iter=DEPTH, n_v=DIRECTIONS)
        return {"trace": float(sum(samples) / len(samples)), "top": [float(v) for v in values], "products": spent[0]}

    return task


def _eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, 2: real and imaginary part) and vectors of a symmetric matrix, as ``torch.eig`` gave them."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def verdict(ours: dict[str, Any], peer: dict[str, Any]) -> tuple[str, str]:
    """What both found, as a note, and why the comparison does not hold, or nothing."""
    def off(values: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(values, ours["truth"], strict=True))

    mine, theirs = off(ours["top"]), off(peer["top"])
    note = (f"top-{TOP} off by {mine:.1e} (ours), {theirs:.1e} (reference); traces {ours['trace']:.4g} and {peer['trace']:.4g}, "
            f"standard error {ours['error']:.2g}; products {ours['products']} and {peer['products']}")
    return note, "" if mine <= theirs else f"our error is larger: {note}"
