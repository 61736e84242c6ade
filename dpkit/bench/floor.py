"""How close each kernel comes, on each network of the study, to what its operations and bytes imply on this machine.

The floor of a kernel is the larger of two times: its operations (:mod:`dpkit.bench.counts`) over the measured ceiling of
operations, and its bytes over the measured ceiling of memory. The fraction reached is that time over the measured one, 1 at
best. Small networks whose activations stay in a cache could beat their time for bytes; none does. Each kernel is timed in one
process with one thread, against the ceilings of one core, in the form that the study uses there.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dpkit import cores
from dpkit.bench import counts
from dpkit.bench.ceilings import Ceilings
from dpkit.bench.harness import Failed, Job, Team
from dpkit.bench.rows import JOBS, NETWORKS, SMALL, bytes_of
from dpkit.models import ModelSpec, Work

REPEATS = 3
CLASSES, REAL, TILES = 10, 64, 40  # of a matching step: classes, real and synthetic images of each


@dataclass(frozen=True)
class Kernel:
    """One kernel on one network. job: how it is timed; per: what one unit of its work is; work: of one unit.

    form: ``compiled`` or ``eager``.
    """

    name: str
    network: str
    precision: str
    form: str
    per: str
    work: Work
    job: Job


def kernels(quick: bool = False) -> Iterator[Kernel]:
    """The four kernels on each network of the study; ``quick``: on the smallest alone."""
    for network, fields in NETWORKS.items():
        if quick and network != SMALL:
            continue
        model, compiled = ModelSpec(**fields), network != SMALL
        low, form = ("bf16", "compiled") if compiled else ("fp32", "eager")

        def one(function: str, units: float, model: dict[str, Any] = fields, **arguments: Any) -> Job:
            return Job(JOBS + function, units, {"model": model, **arguments}, threads=1, keep=True)

        images = 320 if compiled else 3200
        yield Kernel("training step", network, low, form, "image", counts.work(counts.TRAINING, model, 1, bytes_of(low)),
                     one("train", images, images=images, compile=compiled, precision=low))
        # distillation is done on ConvNets; compiling a step of a ResNet takes a minute and buys no row of the study anything
        fused = compiled and not model.is_resnet
        precise = low if fused else "fp32"
        yield Kernel("matching step", network, precise, "compiled" if fused else "eager", "step",
                     counts.matching(model, REAL, TILES, CLASSES, bytes_of(precise)),
                     one("match", 1, steps=1, precision=precise, form="compiled" if fused else "loop"))
        images = 500
        yield Kernel("path evaluation", network, low, form, "image", counts.work(counts.FORWARD, model, 1, bytes_of(low)),
                     one("path", 3 * images, points=3, images=images, precision=low, compiled=compiled))
        yield Kernel("Hessian product", network, "fp32", form, "image", counts.work(counts.PRODUCT_KEPT, model),
                     one("products", 200, count=1, images=200, compile=compiled, threads=1))


def seconds(work: Work, ceilings: dict[str, float], precision: str) -> tuple[float, float]:
    """The times that the operations and the bytes of ``work`` imply."""
    return work.flops / ceilings[precision], work.bytes / ceilings["memory"]


def fraction(work: Work, rate: float, ceilings: dict[str, float], precision: str) -> float:
    """Share of the floor reached by ``rate`` units a second of ``work`` each."""
    return max(seconds(work, ceilings, precision)) * rate


def measure(ceilings: Ceilings, quick: bool = False, say: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
    """One record a kernel and network; as many are built at a time as there are cores, and each is timed alone."""
    left = list(kernels(quick))
    while left:
        group, left = left[:cores.available()], left[cores.available():]
        say(f"{group[0].network}: " + ", ".join(kernel.name for kernel in group))
        teams = [Team(kernel.job) for kernel in group]
        try:
            for team in teams:
                team.begin()
            for kernel, team in zip(group, teams, strict=True):
                yield _record(kernel, team, ceilings.core)
        finally:
            for team in teams:
                team.end()


def _record(kernel: Kernel, team: Team, ceilings: dict[str, float]) -> dict[str, Any]:
    rate, why = None, ""
    try:
        team.finish()
        rate = sorted(team.run() for _ in range(REPEATS))[REPEATS // 2]
    except Failed as error:
        why = str(error)
    flops, moved = seconds(kernel.work, ceilings, kernel.precision)
    return {"kind": "floor", "name": f"{kernel.name}, {kernel.network}", "kernel": kernel.name, "network": kernel.network,
            "precision": kernel.precision, "form": kernel.form, "unit": f"{kernel.per}s/s",
            "flops": kernel.work.flops, "bytes": kernel.work.bytes,
            "seconds_flops": flops, "seconds_bytes": moved, "ours": rate, "peer": None, "ratio": None, "target": None,
            "floor_fraction": fraction(kernel.work, rate, ceilings, kernel.precision) if rate else None, "why": why}
