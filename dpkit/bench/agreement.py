"""Trace and top eigenvalue of a trained ResNet-20 by dpkit and by PyHessian, on equal data, in minutes.

``python -m dpkit.bench.agreement DATA FILE`` trains ResNet-20 of width 16 for a few epochs on 2,000 images of DATA
(``npz:PATH`` and the like, see :class:`dpkit.data.DataSpec`), in bfloat16 and compiled, and measures the Hessian over *all* its
parameters on 200 training images in eval mode. PyHessian has a module of its own for the network (:mod:`dpkit.bench.reference`),
one batch, and as many probes; it has to be installed. Its published numbers for ResNet-20 are of other weights, which are not at
hand here, so values are compared on this network.

A row is a seed of probes, a quantity and a tool:

value, error  trace: of Hutchinson's estimate and its standard error over the probes; top eigenvalue: and ||H v - value v|| of the
              unit vector v that the tool gives, by the same product for both
products      spent on it
accuracy, loss, parameters, images  of the network: on test images, on the images measured on, and how many
"""
from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpkit import cores, data, hessian, models, training, tree
from dpkit.bench import reference
from dpkit.data import AugmentSpec, DataSpec, normalise
from dpkit.hessian import Operator
from dpkit.models import ModelSpec
from dpkit.training import TrainSpec

SEEDS, TRAIN, TEST, IMAGES, PROBES, STEPS, TOLERANCE = 1, 2000, 1000, 200, 30, 20, 1e-3
MODEL = ModelSpec(arch="resnet20", width=16)
RECIPE = TrainSpec(epochs=3, batch_size=100, lr=0.2, schedule="onecycle", augment=AugmentSpec(operations="flip_crop"), cutmix=0.0,
                   precision="bf16", compile=True)


def rows(spec: DataSpec, model: ModelSpec = MODEL, recipe: TrainSpec = RECIPE, seeds: Iterable[int] = range(SEEDS),
         images: int = IMAGES, probes: int = PROBES, steps: int = STEPS, compile: bool = True,
         tools: tuple[str, ...] = ("dpkit", "PyHessian")) -> Iterator[dict[str, Any]]:
    """One row a seed, quantity and tool, as the module's text says.

    Raises ``ImportError`` where PyHessian is asked for and not installed.
    """
    if "PyHessian" in tools:
        import pyhessian  # noqa: F401  before minutes of training
    sets = data.load(spec)
    start = (tree.stack([part]) for part in models.init(model, tree.generator_for("agreement", "init")))
    params, buffers = training.fit(recipe, model, sets.train, sets.mean, sets.std, *start, [0]).network(0)
    error, _ = training.evaluate(model, params, buffers, normalise(sets.test.images, sets.mean, sets.std), sets.test.labels)
    chosen = hessian.subset(sets.train.labels, images)
    x, y = normalise(sets.train.images[chosen], sets.mean, sets.std), sets.train.labels[chosen]
    op = Operator(model, params, buffers, x, y, names=tuple(params), keep=images, compile=compile)
    net = reference.network(model).eval()
    net.load_state_dict({**params, **buffers}, strict=False)
    about = {"parameters": op.size, "images": images, "loss": op.loss, "accuracy": 1 - error}
    for seed in seeds:
        for tool in tools:
            generator = tree.generator_for("agreement", tool, seed)
            found = _ours(op, probes, steps, generator) if tool == "dpkit" else _theirs(op, net, (x, y), probes, generator)
            for quantity, (value, error_bar, products) in found.items():
                yield {"seed": seed, "quantity": quantity, "tool": tool, "value": value, "error": error_bar, "products": products,
                       **about}


def _ours(op: Operator, probes: int, steps: int, generator: torch.Generator) -> dict[str, tuple[float, float, int]]:
    total = hessian.trace(op, probes, generator)
    pairs = hessian.top_eigenpairs(op, 1, steps, generator)
    value = float(pairs.values[0])
    return {"trace": (total.value, total.standard_error, total.products),
            "top eigenvalue": (value, _residual(op, pairs.vectors[:, 0], value), pairs.products)}


def _theirs(op: Operator, net: nn.Module, given: tuple[Tensor, Tensor], probes: int,
            generator: torch.Generator) -> dict[str, tuple[float, float, int]]:
    """PyHessian's methods as its examples call them, but for a trace that spends all its probes. It draws from torch's global
    generator, which is put back after."""
    from pyhessian import hessian as PyHessian

    try:
        with torch.random.fork_rng(devices=()), reference.products_counted() as spent:
            torch.set_rng_state(generator.get_state())
            computer = PyHessian(net, nn.CrossEntropyLoss(), data=given, cuda=False)
            # Its rule stops at a relative change below tol, which is negative where the trace is: no number above -inf will do.
            samples = torch.tensor(computer.trace(maxIter=probes, tol=-math.inf), dtype=torch.float64)
            first, spent[0] = spent[0], 0
            values, vectors = computer.eigenvalues(maxIter=400, tol=TOLERANCE, top_n=1)
    finally:
        net.zero_grad(set_to_none=True)  # what PyHessian leaves behind holds a graph
    names = [name for name, _ in net.named_parameters()]
    vector = op.flatten({name: part.detach() for name, part in zip(names, vectors[0], strict=True)})
    return {"trace": (float(samples.mean()), float(samples.std()) / math.sqrt(len(samples)), first),
            "top eigenvalue": (float(values[0]), _residual(op, vector / vector.norm(), float(values[0])), spent[0])}


def _residual(op: Operator, vector: Tensor, value: float) -> float:
    """||H v - value v|| for a unit vector (n,): some eigenvalue lies within it."""
    return float((op.matvec(vector) - value * vector).norm())


def main(spec: str, path: str) -> None:
    """Write the rows to ``path``, each as soon as it is known."""
    cores.keep_memory()
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows(DataSpec(dataset=spec, train=TRAIN, test=TEST)):
            shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            if writer is None:
                writer = csv.DictWriter(file, list(shown), lineterminator="\n")
                writer.writeheader()
            writer.writerow(shown)
            file.flush()
            print(shown, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m dpkit.bench.agreement DATA FILE.csv")
    main(*sys.argv[1:])
