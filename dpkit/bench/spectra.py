"""Trace, five largest eigenvalues and spectral density of one trained network's Hessian, to equal error, ours and PyHessian's.

The network is trained here, in seconds, on the built-in shapes, in one thread so that every process gets the same bits.

PyHessian takes twenty probes for the trace (Hutchinson's), power iteration to its usual tolerance for the eigenvalues, and two
directions of twenty steps for the density. Ours spends a :class:`Budget`: Lanczos first, then trace and density of what is left
once the eigenpairs found are taken out (:mod:`dpkit.hessian.deflate`). Budgets were chosen so that no error is larger than
PyHessian's, and :func:`verdict` checks that on the runs that were timed, each with random numbers of its own:

eigenvalues  the largest relative error of the five, against a long Lanczos run
trace        the standard error: the deviation of one probe, over the root of their number; the deviation from sixty probes
moments      the mean over orders 1 to 4 of the relative error of the density's moments, tr(H^k) / n
curve        the mean difference of the curves' logarithms to base 10, as they are drawn, with each eigenvalue broadened by a
             hundredth of the spectrum's range and a floor at the height of one eigenvalue

Moments and curves are compared with a density from more directions and more steps around thirty eigenpairs. If any error of ours
is larger, the row has no ratio.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpkit import cores, data, hessian, models, training, tree
from dpkit.bench import reference
from dpkit.data import AugmentSpec, DataSpec, normalise
from dpkit.hessian import Density, Eigenpairs, Operator
from dpkit.hessian.deflate import Deflated
from dpkit.models import ModelSpec
from dpkit.training import TrainSpec

PROBES, TOP, TOLERANCE = 20, 5, 1e-3
DIRECTIONS, DEPTH = 2, 20  # of the density
LONG, KNOWN, MORE, DEEP, SPREAD = 80, 30, 6, 30, 60  # of what errors are measured against
ORDERS = (1, 2, 3, 4)
RECIPE = TrainSpec(epochs=3, lr=0.05, augment=AugmentSpec(operations=""), cutmix=0.0)


@dataclass(frozen=True)
class Budget:
    """Products of ours: Lanczos ``steps``, which give ``pairs`` eigenpairs (at least five) and cost a product each to take out;
    ``probes`` of the trace; ``depth`` Lanczos steps in each of two directions of the density."""

    steps: int
    pairs: int
    probes: int
    depth: int


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


def ours(model: dict, images: int, budget: Sequence[int], compile: bool = True,
         recipe: TrainSpec = RECIPE) -> Callable[[], dict[str, Any]]:
    """All three with the library; ``budget``: the fields of a :class:`Budget`. The result also holds what errors are measured
    against, which is not timed."""
    spec, spends = ModelSpec(**model), Budget(*budget)
    operator = Operator(spec, *problem(spec, images, recipe), keep=images, compile=compile, threads=1)
    truth, runs = _truth(operator, spends.pairs), []

    def task() -> dict[str, Any]:
        generator = tree.generator_for("benchmark", "ours", len(runs))
        pairs = hessian.top_eigenpairs(operator, spends.pairs, spends.steps, generator)
        rest = Deflated(operator, pairs.vectors)
        found = rest.completed(hessian.trace(rest, spends.probes, generator))
        density = hessian.spectral_density(operator, DIRECTIONS, spends.depth, generator, rest)
        runs.append({"trace": found.value, "top": pairs.values[:TOP].tolist(), "nodes": density.nodes, "weights": density.weights,
                     "products": pairs.products + found.products + density.products})
        return {"runs": runs, "error": truth["deviation"] / math.sqrt(spends.probes), "truth": truth}

    return task


def _truth(operator: Operator, pairs: int) -> dict[str, Any]:
    """Eigenvalues, density and trace from many products, and the deviation of one probe once ``pairs`` pairs are taken out."""
    generator = tree.generator_for("benchmark", "long")
    known = min(KNOWN, operator.size // 4)
    long = hessian.top_eigenpairs(operator, known, min(LONG, operator.size), generator)
    rest = Deflated(operator, long.vectors)
    density = hessian.spectral_density(operator, MORE, min(DEEP, operator.size - known), generator, rest)
    few = Eigenpairs(long.values[:pairs], long.vectors[:, :pairs], long.residuals[:pairs], 0)
    samples = hessian.trace(Deflated(operator, few.vectors), SPREAD, generator)
    return {"top": long.values[:TOP].tolist(), "nodes": density.nodes, "weights": density.weights, "size": operator.size,
            "trace": rest.completed(hessian.trace(rest, SPREAD, generator)).value,
            "deviation": samples.standard_error * math.sqrt(SPREAD)}


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
    computer = PyHessian(net, torch.nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    runs: list[dict[str, Any]] = []
    probes: list[float] = []

    def task() -> dict[str, Any]:
        with reference.products_counted() as spent:
            samples = [float(v) for v in computer.trace(maxIter=PROBES, tol=-math.inf)]
            values, _ = computer.eigenvalues(maxIter=400, tol=TOLERANCE, top_n=TOP)
            nodes, weights = computer.density(iter=DEPTH, n_v=DIRECTIONS)
        probes.extend(samples)
        weights = torch.tensor(weights, dtype=torch.float64)
        runs.append({"trace": sum(samples) / len(samples), "top": [float(v) for v in values], "products": spent[0],
                     "nodes": torch.tensor(nodes, dtype=torch.float64), "weights": weights / weights.sum(1, keepdim=True)})
        return {"runs": runs, "error": float(torch.tensor(probes, dtype=torch.float64).std()) / math.sqrt(PROBES)}

    return task


def _eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, 2: real and imaginary part) and vectors of a symmetric matrix, as ``torch.eig`` gave them."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def verdict(ours: dict[str, Any], peer: dict[str, Any]) -> tuple[str, str]:
    """What both found, as a note, and why the comparison does not hold, or nothing."""
    truth = ours["truth"]
    mine, theirs = ({"trace": side["error"], **_errors(side["runs"], truth)} for side in (ours, peer))
    larger = [name for name in mine if mine[name] > theirs[name]]
    note = (f"errors of ours and the reference's: top-{TOP} {mine['top']:.1e}, {theirs['top']:.1e}; trace "
            f"{mine['trace']:.2g}, {theirs['trace']:.2g} of {truth['trace']:.4g}; moments {mine['moments']:.1%}, "
            f"{theirs['moments']:.1%}; curve {mine['curve']:.2g}, {theirs['curve']:.2g} decades; products "
            f"{ours['runs'][0]['products']}, {peer['runs'][0]['products']}")
    return note, f"our error is larger ({', '.join(larger)}): {note}" if larger else ""


def _errors(runs: Sequence[dict[str, Any]], truth: dict[str, Any]) -> dict[str, float]:
    """The mean error over ``runs`` of eigenvalues, moments and curve; see the module's text."""
    size = truth["size"]
    exact = Density(truth["nodes"], truth["weights"], 0, size)
    low, high = (float(end) for end in exact.nodes.aminmax())
    width = (high - low) / 100
    grid, floor = torch.linspace(low - 4 * width, high + 4 * width, 2000, dtype=torch.float64), 0.4 / (width * size)
    total = {"top": 0.0, "moments": 0.0, "curve": 0.0}
    for run in runs:
        found = Density(run["nodes"], run["weights"], 0, size)
        total["top"] += max(abs(a - b) / abs(b) for a, b in zip(run["top"], truth["top"], strict=True))
        pairs = [(found.moment(k).value, exact.moment(k).value) for k in ORDERS]
        total["moments"] += sum(abs(a / b - 1) for a, b in pairs) / len(pairs)
        curves = [(density.curve(grid, width).values + floor).log10() for density in (found, exact)]
        total["curve"] += float((curves[0] - curves[1]).abs().mean())
    return {name: value / len(runs) for name, value in total.items()}
