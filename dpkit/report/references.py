"""Accuracies that papers report for small sets of CIFAR-10, with where each stands, to be shown beside ours."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from dpkit.report.frames import TITLES

#: where the numbers stand, by a short name
SOURCES = {"IDC code": "README of the IDC authors' code, github.com/snu-mllab/Efficient-Dataset-Condensation (arXiv 2205.14959)",
           "PAD": "Li et al. 2024, Prioritize Alignment in Dataset Distillation, arXiv 2408.03360, table 1"}
ARCH, WIDTH = "convnet3", 128  # the network of all of them


@dataclass(frozen=True)
class Reference:
    """A reported accuracy in percent. ipc: stored images per class; 0 for all data. source: of :data:`SOURCES`."""

    set: str
    ipc: int
    accuracy: float
    source: str


def _rows(name: str, source: str, **values: float) -> list[Reference]:
    return [Reference(name, int(word.removeprefix("ipc")), value, source) for word, value in values.items()]


#: CIFAR-10, ConvNet-3 of width 128, tested on the official test images
CIFAR10: tuple[Reference, ...] = (
    *_rows("idc", "IDC code", ipc1=50.6, ipc10=67.5, ipc50=74.5),
    *_rows("idc_factor1", "IDC code", ipc1=36.7, ipc10=58.3, ipc50=69.5),
    *_rows("dc", "PAD", ipc10=44.9, ipc50=53.9),
    *_rows("dsa", "PAD", ipc10=52.1, ipc50=60.6),
    *_rows("dm", "PAD", ipc10=48.9, ipc50=63.0),
    *_rows("mtt", "PAD", ipc10=65.4, ipc50=71.6),
    *_rows("datm", "PAD", ipc10=66.8, ipc50=76.1),
    *_rows("random_real", "PAD", ipc10=26.0, ipc50=43.4),
    *_rows("all_data", "PAD", ipc0=84.8),
)

# pixel mean and standard deviation of CIFAR-10's 50,000 training images, by channel
MEAN, STD, NEAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 0.005


def is_cifar10(identity: Mapping, mean: Tensor, std: Tensor) -> bool:
    """Whether a data set is CIFAR-10 or a large part of it, by its name or else by what it holds.

    A file says no name. It counts if it has ten classes of 32 x 32 colour images and each channel's mean and standard deviation
    lie within 0.005 of those of CIFAR-10: a random tenth of it does, SVHN (0.05 away) and CINIC-10 (0.016 away) do not.
    """
    if identity.get("kind") == "cifar10":
        return True
    fits = identity["classes"] == 10 and list(identity["shape"]) == [3, 32, 32] and identity.get("kind") == "npz"
    return fits and all(abs(float(a) - b) < NEAR for a, b in zip([*mean, *std], [*MEAN, *STD], strict=True))


def beside(ours: Mapping[str, str], ipc: int) -> pd.DataFrame:
    """The reported accuracies, a row a set, and ours (as text, by set) in the last column."""
    names = dict.fromkeys([r.set for r in CIFAR10])
    known = {(r.set, r.ipc): r for r in CIFAR10}
    sizes = sorted({r.ipc for r in CIFAR10 if r.ipc})
    rows = []
    for name in names:
        reported = [known.get((name, size), known.get((name, 0))) for size in sizes]
        rows.append({"set": "DATM" if name == "datm" else TITLES[name],
                     **{f"{size} a class": f"{r.accuracy:.1f}%" if r else "" for size, r in zip(sizes, reported, strict=True)},
                     "source": next(r.source for r in reported if r),
                     f"ours, {ipc} a class": ours.get(name, "not measured") if name in TITLES else "not made here"})
    return pd.DataFrame(rows).set_index("set")


def steps(spec: Any) -> int:
    """Image steps (or a generator's training steps) that a method's specification asks for; 0 where nothing is learned."""
    return getattr(spec, "outer", 1) * getattr(spec, "inner", 0) or getattr(spec, "steps", 0)


def departures(asked: Mapping[str, Any], arch: str, width: int, identity: Mapping) -> list[str]:
    """In what ours differs from the setting of the reported numbers, in words: network, images, steps of each method."""
    found = []
    if (arch, width) != (ARCH, WIDTH):
        found.append(f"network {arch} of width {width}; theirs is {ARCH} of width {WIDTH}")
    if (identity["train"], identity["test"]) != (50_000, 10_000):
        found.append(f"{identity['train']:,} training and {identity['test']:,} test images; theirs are 50,000 and 10,000")
    for name, spec in asked.items():
        taken, published = steps(spec), steps(type(spec)())
        if taken < published and not name.endswith("_soft"):
            found.append(f"{TITLES.get(name, name)} takes {taken:,} steps; the published settings have {published:,}")
    return found
