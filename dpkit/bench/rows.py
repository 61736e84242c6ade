"""The rows of the table: which work, ours and the reference's, and the ratio that is asked for."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dpkit.bench import counts, spectra
from dpkit.bench.harness import Job
from dpkit.models import ModelSpec, Work

PAIRS = 5
JOBS = "dpkit.bench.jobs:"
NETWORKS: dict[str, dict[str, Any]] = {
    "ConvNet-3-16, 16 pixels": {"arch": "convnet3", "width": 16, "image_size": 16},
    "ConvNet-3-32": {"arch": "convnet3", "width": 32},
    "ConvNet-3-128": {"arch": "convnet3", "width": 128},
    "ResNet-10-32": {"arch": "resnet10", "width": 32},
    "ResNet-18-32": {"arch": "resnet18", "width": 32},
}
SMALL = "ConvNet-3-16, 16 pixels"  # the quick profile's network: it runs uncompiled in fp32, and --quick times it alone
PAPER = "the paper's loop"
CONTROL = "memory kept"
PYHESSIAN = ("PyHessian", "products_pyhessian")


@dataclass(frozen=True)
class Row:
    """One comparison.

    id: for ``--only``. reference: what the peer is. target: the least ratio asked for. controls: further peers, reported in rows
    of their own without a target. floor, precision: the work of one unit, and of which ceiling a share is taken. why: why it
    cannot be measured here (then there are no jobs). verdict: from both sides' results a note, and why the comparison fails.
    """

    id: str
    name: str
    unit: str
    reference: str
    target: float | None
    ours: Job | None = None
    peer: Job | None = None
    controls: Mapping[str, Job] = field(default_factory=dict)
    pairs: int = PAIRS
    floor: Work | None = None
    precision: str = "fp32"
    why: str = ""
    verdict: Callable[[Any, Any], tuple[str, str]] | None = None


def everywhere(function: str, work: float, share: bool = False, **arguments: Any) -> Job:
    """Ours: on every core a process with one thread and kept memory."""
    return Job(JOBS + function, work, arguments, everywhere=True, threads=1, keep=True, share=share)


def plain(function: str, work: float, keep: bool = False, **arguments: Any) -> Job:
    """A peer: one process as it comes."""
    return Job(JOBS + function, work, arguments, keep=keep)


def bytes_of(precision: str) -> int:
    """Size of one activation."""
    return 2 if precision == "bf16" else 4


def training_row(id: str, name: str, images: int, ours: int, quick: bool, pairs: int = PAIRS) -> Row:
    """Training with DSA and CutMix: ``images`` a run for the peer, ``ours`` in each of our processes."""
    model, precision = NETWORKS[name], "fp32" if quick else "bf16"
    return Row(id, f"training, {name}, DSA and CutMix", "images/s", PAPER, 4.0,
               everywhere("train", ours, model=model, images=ours, compile=not quick, precision=precision),
               plain("train_reference", images, model=model, images=images),
               {CONTROL: plain("train_reference", images, True, model=model, images=images)}, pairs,
               counts.work(counts.TRAINING, ModelSpec(**model), 1, bytes_of(precision)), precision)


def together_row(name: str, images: int, quick: bool, shared: bool, pairs: int = PAIRS) -> Row:
    """Eight networks in worker processes, and one after another on all cores as threads of one process, the same loop.

    shared: the eight are children of one initialisation's tickets, whose noise is equal, so that their batches are made once.
    """
    model, precision = NETWORKS[name], "fp32" if quick else "bf16"
    same = {"model": model, "images": images, "networks": 8, "compile": not quick, "precision": precision}
    noise = "equal noise" if shared else "each its own noise"
    return Row("together" if shared else "together-apart", f"eight {name} together, {noise}", "images/s",
               "one after another in our own loop, all cores as threads", 1.3 if shared else None,
               everywhere("train", 8 * images, share=True, shared=shared, **same), plain("train", 8 * images, True, **same),
               {"one after another, memory not kept": plain("train", 8 * images, **same)}, pairs,
               counts.work(counts.TRAINING, ModelSpec(**model), 1, bytes_of(precision)), precision)


def matching_row(name: str, quick: bool, pairs: int = PAIRS) -> Row:
    """A matching step of ten classes, 64 real and 4 x ipc synthetic images each."""
    model, precision, ipc = NETWORKS[name], "fp32" if quick else "bf16", 10
    same = {"model": model, "steps": 1, "ipc": ipc}
    return Row("matching", f"matching step, ipc {ipc}, factor 2, {name}", "steps/s", "the IDC loop", 3.0,
               everywhere("match", 1, **same, precision=precision, form="loop" if quick else "compiled"),
               plain("match_reference", 1, **same), {CONTROL: plain("match_reference", 1, True, **same)}, pairs,
               counts.matching(ModelSpec(**model), 64, 4 * ipc, 10, bytes_of(precision)), precision)


def path_row(id: str, name: str, points: int, images: int, precision: str, quick: bool, pairs: int) -> Row:
    """A path of 25 points. Work is linear in the images, so a share of the 6,000 is timed, compiled as all of them would be."""
    model = NETWORKS[name]
    same = {"model": model, "points": points, "images": images}
    ours = {**same, "precision": precision} | ({} if quick else {"compiled": True})
    title = f"path of {points} points, {name}, {precision}" + ("" if quick else f" ({images:,} of 6,000 images timed)")
    return Row(id, title, "images/s", PAPER, 3.0,
               Job(JOBS + "path", points * images, ours, True, 1, True, warm=1),
               Job(JOBS + "path_reference", points * images, same, warm=0), {}, pairs,
               counts.work(counts.FORWARD, ModelSpec(**model), 1, bytes_of(precision)), precision)


def passes_row(id: str, name: str, points: int, images: int, pairs: int) -> Row:
    """A path against as many plain evaluations of one network: what interpolating, checking and collecting cost.

    Both sides are the same forward passes, not compiled, in fp32, each in one process with one thread. Statistics of BatchNorm
    are interpolated: measuring them anew is more passes over other images, which this row does not count. 1 / 1.1: at most 10%
    on top.
    """
    same = {"model": NETWORKS[name], "points": points, "images": images}
    ours, peer = (Job(JOBS + function, points * images, same, threads=1, keep=True) for function in ("path", "passes"))
    return Row(id, f"path of {points} points, {name}, {images:,} images, against the same number of forward passes", "images/s",
               f"{points} evaluations of one network, our own", 1 / 1.1, ours, peer, {}, pairs)


def rounded(ours: Mapping[str, float], peer: Any) -> tuple[str, str]:
    """What to say of products that are rounded."""
    return f"products off by {ours['rounding']:.1e} of their length, corrected in the estimates", ""


def product_row(id: str, name: str, model: Mapping[str, Any], others: Mapping[str, dict[str, Any]], count: int, quick: bool,
                pairs: int = PAIRS, precision: str = "fp32") -> Row:
    """Hessian products on 200 images against PyHessian's, which are in fp32; others: further references."""
    (reference, function), low = PYHESSIAN, precision == "bf16"
    same, title = {"model": dict(model), "count": count}, f"Hessian product, {name}, 200 images" + ", bf16" * low
    return Row(id + "-bf16" * low, title, "products/s", f"{reference}, one batch", 4.0,
               everywhere("products", count, **same, compile=not quick, threads=1, precision=precision),
               plain(function, count, **same),
               {label: plain(**{"function": function, "work": count, **same, **extra}) for label, extra in others.items()},
               pairs, counts.work(counts.PRODUCT_KEPT, ModelSpec(**model), 200, bytes_of(precision)), precision,
               verdict=rounded if low else None)


def spectra_row(id: str, name: str, model: Mapping[str, Any], images: int, budget: Sequence[int], quick: bool,
                pairs: int) -> Row:
    """Trace, top five and density of a trained network, to equal error; in minutes, as the reference takes long.

    budget: our products, the fields of :class:`dpkit.bench.spectra.Budget`.
    """
    same = {"model": {**model, "image_size": 16}, "images": images}
    return Row(id, f"trace, top-5, density to equal error, {name} on shapes, {images} images", "runs/s",
               PYHESSIAN[0], 3.0,
               Job("dpkit.bench.spectra:ours", 1, {**same, "budget": budget, "compile": not quick}, True, 1, True, warm=1),
               Job("dpkit.bench.spectra:pyhessian", 1, same, warm=0), {}, pairs, verdict=spectra.verdict)


def processor_rows(quick: bool = False, long: bool = False) -> list[Row]:
    """The rows of a processor; ``long``: with some that tell less."""
    if quick:
        model = NETWORKS[SMALL]
        small = [training_row("train-convnet3", SMALL, 256, 256, True, 2), together_row(SMALL, 64, True, True, 2),
                 matching_row(SMALL, True, 2), path_row("path", SMALL, 25, 100, "fp32", True, 2),
                 product_row("product", SMALL, model, {CONTROL: {"keep": True}}, 2, True, 2),
                 spectra_row("spectra", "ConvNet-3-4", {"arch": "convnet3", "width": 4}, 20, (30, 5, 20, 20), True, 1)]
        small = [replace(row, target=None) for row in small]  # the targets are for other networks
        return [*small, passes_row("path-passes", SMALL, 25, 1000, 2)]  # but for this one, which holds on any
    middle, ten, eighteen = {"arch": "convnet3", "width": 64}, NETWORKS["ResNet-10-32"], NETWORKS["ResNet-18-32"]
    return [
        training_row("train-convnet3", "ConvNet-3-128", 960, 1920, False),
        training_row("train-resnet10", "ResNet-10-32", 960, 1280, False),
        training_row("train-resnet18", "ResNet-18-32", 640, 640, False),
        together_row("ConvNet-3-32", 1280, False, True),
        together_row("ConvNet-3-32", 1280, False, False),
        matching_row("ConvNet-3-128", False),
        path_row("path", "ConvNet-3-128", 25, 800, "bf16", False, 3),
        passes_row("path-passes", SMALL, 25, 6000, PAIRS),
        *([passes_row("path-passes-resnet10", "ResNet-10-32", 25, 200, 3)] if long else []),
        *([path_row("path-fp32", "ConvNet-3-128", 25, 800, "fp32", False, 3)] if long else []),
        product_row("product", "ConvNet-3-64", middle, {CONTROL: {"keep": True}, "loader of 100": {"batch": 100}}, 6, False),
        product_row("product", "ConvNet-3-64", middle, {}, 6, False, 5, "bf16"),
        product_row("product-resnet10", "ResNet-10-32", ten, {CONTROL: {"keep": True},
                                                              "curvlinops": {"function": "products_curvlinops"}}, 4, False, 3),
        product_row("product-resnet10", "ResNet-10-32", ten, {}, 4, False, 5, "bf16"),
        product_row("product-resnet18", "ResNet-18-32", eighteen, {}, 4, False, 3),
        product_row("product-resnet18", "ResNet-18-32", eighteen, {}, 4, False, 5, "bf16"),
        spectra_row("spectra", "ConvNet-3-64", middle, 100, (20, 5, 12, 16), False, 3),
        spectra_row("spectra-resnet10", "ResNet-10-32", ten, 100, (14, 5, 4, 8), False, 3),
        *([spectra_row("spectra-resnet18", "ResNet-18-32", eighteen, 100, (14, 5, 4, 8), False, 1)] if long else []),
    ]


def accelerator_rows(long: bool = False) -> list[Row]:
    """The rows of a GPU; without one, or without ``long`` for the two that take up to an hour, they say why."""
    here = torch.cuda.is_available()
    absent = "" if here else "no CUDA GPU on this machine"
    hours = absent or ("" if long else "takes up to an hour: give --long")
    model = NETWORKS["ConvNet-3-128"]

    def cuda(function: str, work: float, **arguments: Any) -> Job:
        return Job(JOBS + function, work, {**arguments, "device": "cuda"}, keep=True)

    count, images = 32, 6400
    rows = [
        Row("gpu-population", f"GPU: {count} ConvNet-3-128 together, DSA and CutMix", "images/s", f"{PAPER}, same GPU", 20.0,
            cuda("train", count * images, model=model, images=images, networks=count),
            cuda("train_reference", images, model=model, images=images), why=absent, precision="bf16",
            floor=counts.work(counts.TRAINING, ModelSpec(**model), 1, 2)),
        Row("gpu-matching", "GPU: matching step, ipc 10, factor 2, ConvNet-3-128", "steps/s", "the IDC loop, same GPU", 10.0,
            cuda("match", 20, model=model, steps=20, form="auto"), cuda("match_reference", 5, model=model, steps=5),
            why=absent, precision="bf16", floor=counts.matching(ModelSpec(**model), 64, 40, 10, 2)),
    ]
    for id, name in (("gpu-idc", "GPU: IDC, ipc 10, CIFAR-10 to at least 65%, in 15 minutes"),
                     ("gpu-study", "GPU: study of CIFAR-10 with ConvNet-3-128 in 60 minutes, as predicted to 25%")):
        rows.append(Row(id, name, "minutes", "the time allowed", 1.0, why=hours))
    return rows
