"""Hot loops against named references, alternating in one run, so that the ratio survives a machine whose speed drifts.

The references are written here in the shape of the published scripts: one ``nn.Module``, batches of 64 in fp32, the loss
read back with ``.item()`` every step; and the textbook Hessian product, which builds the gradient's graph anew each time.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from dpkit import hessian, models, training, tree
from dpkit.data import AugmentSpec, Split, augment, cutmix, normalise
from dpkit.models import ModelSpec
from dpkit.stages import choose_device
from dpkit.store import machine
from dpkit.training import TrainSpec

PAIRS = 5


def run(width: int = 32, batches: int = 20) -> list[dict[str, Any]]:
    """One row a loop: name, unit, ours and the reference's median, the median ratio and its range over pairs."""
    device = choose_device()
    images = torch.randint(0, 256, (64 * batches, 3, 32, 32), dtype=torch.uint8, generator=tree.generator_for("benchmark"))
    split = Split(images, torch.arange(len(images)) % 10)
    return [_row(f"training, ConvNet-3-{width}, DSA and CutMix, {device}", "images/s", len(split),
                 _our_training(width, split, device), _reference_training(width, split, device)),
            _row(f"Hessian product, ConvNet-3-{width}, 200 images, {device}", "products/s", 3,
                 *_products(width, split, device))]


def _row(name: str, unit: str, work: int, ours: Callable[[], None], reference: Callable[[], None]) -> dict[str, Any]:
    for warm in (ours, reference):
        warm()
    times: list[tuple[float, float]] = [(_seconds(ours), _seconds(reference)) for _ in range(PAIRS)]
    ratios = sorted(b / a for a, b in times)
    return {"name": name, "unit": unit, "ours": work / median(a for a, _ in times), "peer": work / median(b for _, b in times),
            "ratio": median(ratios), "low": ratios[0], "high": ratios[-1], "pairs": PAIRS, "machine": machine()}


def _seconds(function: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _our_training(width: int, split: Split, device: str) -> Callable[[], None]:
    model = ModelSpec(arch="convnet3", width=width)
    spec = TrainSpec(epochs=1, precision="bf16", compile=True)
    params, buffers = models.init(model, tree.generator_for("benchmark", "init"))
    half = torch.full((3,), 0.5)

    def once() -> None:
        training.fit(spec, model, split, half, half, tree.stack([params]), tree.stack([buffers]), [0], device=device)

    return once


def _reference_training(width: int, split: Split, device: str) -> Callable[[], None]:
    blocks: list[nn.Module] = []
    for channels in (3, width, width):
        blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
    network = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width * 16, 10)).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    half, spec, generator = torch.full((3,), 0.5), AugmentSpec(), tree.generator_for("benchmark", "reference")

    def once() -> None:
        for rows in torch.randperm(len(split), generator=generator).split(64):
            part = split.select(rows)
            images = augment(spec, normalise(part.images, half, half).to(device), generator)
            images, targets = cutmix(images, part.targets(10).to(device), generator)
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(network(images), targets)
            loss.backward()
            optimiser.step()
            loss.item()

    return once


def _products(width: int, split: Split, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    model = ModelSpec(arch="convnet3", width=width)
    params, buffers = models.init(model, tree.generator_for("benchmark", "init"))
    params, half = tree.to(params, device), torch.full((3,), 0.5)
    images, labels = normalise(split.images[:200], half, half).to(device), split.labels[:200].to(device)
    op = hessian.Operator(model, params, buffers, images, labels, keep=200)
    vector = torch.ones(op.size, device=device)
    names = models.prunable(model)
    leaves = {n: t.clone().requires_grad_(n in names) for n, t in params.items()}

    def ours() -> None:
        for _ in range(3):
            op.matvec(vector)

    def reference() -> None:
        for _ in range(3):
            loss = nn.functional.cross_entropy(models.forward(model, leaves, buffers, images)[0], labels)
            wanted = [leaves[n] for n in names]
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted, create_graph=True)])
            torch.autograd.grad(gradient @ vector, wanted)

    return ours, reference
