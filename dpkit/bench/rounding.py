"""What bfloat16 does to a Hessian's trace and top eigenvalues, beside the estimators' own errors, in minutes.

``python -m dpkit.bench.rounding FILE`` trains small networks on the built-in shapes and measures each with products in bfloat16
and in full precision, from the same probes and the same start. A row is a network and a seed:

rounding      length of the difference of two products, over the product's
trace, error  Hutchinson's estimate in full precision and its standard error
shift         the estimate with products in bfloat16, minus that: the bias of rounding, as the probes are the same
left          standard error of what :mod:`dpkit.hessian.mixed` takes off
top, top_left largest relative error of the five largest eigenvalues, before and after a product in full precision for each
"""
from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dpkit import cores, tree
from dpkit.bench import spectra
from dpkit.hessian import Operator, mixed, top_eigenpairs, trace
from dpkit.models import ModelSpec
from dpkit.training import TrainSpec

SEEDS, IMAGES, PROBES, TOP, STEPS, LONG = 3, 200, 20, 5, 30, 80
NETWORKS = {"ConvNet-3-32": ModelSpec(arch="convnet3", width=32, image_size=16),
            "ResNet-10-16": ModelSpec(arch="resnet10", width=16, image_size=16)}


def rows(networks: Mapping[str, ModelSpec], seeds: Iterable[int] = range(SEEDS), images: int = IMAGES,
         recipe: TrainSpec = spectra.RECIPE, compile: bool = True, steps: int = STEPS,
         long: int = LONG) -> Iterator[dict[str, Any]]:
    """One row a network and seed, as the module's text says."""
    for name, model in networks.items():
        for seed in seeds:
            given = spectra.problem(model, images, recipe, seed)
            low, high = (Operator(model, *given, compile=compile, precision=p) for p in ("bf16", "fp32"))

            exact, rounded = (trace(op, PROBES, tree.generator_for("rounding", "probes", seed)) for op in (high, low))
            rest = trace(mixed.Difference(low), mixed.CORRECTIONS, tree.generator_for("rounding", "corrections", seed))
            found = top_eigenpairs(low, TOP, steps, tree.generator_for("rounding", "start", seed))
            truth = top_eigenpairs(high, TOP, long, tree.generator_for("rounding", "long", seed)).values
            yield {"network": name, "seed": seed, "rounding": low.rounding, "trace": exact.value, "error": exact.standard_error,
                   "shift": rounded.value - exact.value, "left": rest.standard_error, "top": _off(found.values, truth),
                   "top_left": _off(mixed.refined(low, found).values, truth)}


def _off(values: Tensor, truth: Tensor) -> float:
    return float(((values - truth) / truth).abs().max())


def main(path: str) -> None:
    """Write the rows to ``path``."""
    cores.keep_memory()
    found = []
    for row in rows(NETWORKS):
        found.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        print(found[-1], file=sys.stderr, flush=True)
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dpkit.bench.rounding FILE.csv")
    main(sys.argv[1])
