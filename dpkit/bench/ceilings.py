"""What this machine can do at most, measured: operations a second in fp32 and bf16, and bytes a second to and from memory."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from dpkit import cores, tree
from dpkit.bench.harness import Job, Team

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = (*TYPES, "memory")


@dataclass(frozen=True)
class Ceilings:
    """fp32, bf16: floating-point operations a second; memory: bytes a second. core: of one core alone; all: of all at once."""

    core: dict[str, float]
    all: dict[str, float]
    cores: int

    def to_dict(self) -> dict:
        """As plain values."""
        return asdict(self)


def measure() -> Ceilings:
    """Both sets of ceilings of the processor, one thread a process, in about ten seconds."""
    with Team(Job("dpkit.bench.ceilings:task", 1.0, everywhere=True, threads=1, keep=True, warm=0)) as team:
        alone, together = team.results(1)[0], team.results()
    return Ceilings(alone, {kind: sum(one[kind] for one in together) for kind in KINDS}, cores.available())


def task(seconds: float = 0.3, device: str = "cpu") -> Callable[[], dict[str, float]]:
    """A task that runs each candidate for about ``seconds`` and returns the best rate (a second) of any run, by kind."""
    candidates = {kind: _compute(dtype, device) for kind, dtype in TYPES.items()} | {"memory": _memory(device)}

    def best() -> dict[str, float]:
        return {kind: max(_rate(amount, function, seconds) for amount, function in found)
                for kind, found in candidates.items()}

    return best


def _rate(amount: float, function: Callable[[], object], seconds: float) -> float:
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        best = max(best, amount / (time.perf_counter() - started))
    return best


def _compute(dtype: torch.dtype, device: str) -> list[tuple[float, Callable[[], object]]]:
    """Matrix products of two sizes, and a wide convolution in both layouts: (operations, function)."""
    generator = tree.generator_for("benchmark", "ceilings")
    found: list[tuple[float, Callable[[], object]]] = []
    for side in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
        found.append((2.0 * side**3, lambda a=a, b=b: a @ b))
    images, channels, side = (16, 256, 16) if device == "cpu" else (512, 256, 16)
    x = torch.randn(images, channels, side, side, generator=generator).to(device, dtype)
    w = torch.randn(channels, channels, 3, 3, generator=generator).to(device, dtype)
    operations = 2.0 * images * side**2 * channels**2 * 9
    for layout in (torch.contiguous_format, torch.channels_last):
        x_, w_ = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
        found.append((operations, lambda x=x_, w=w_: F.conv2d(x, w, padding=1)))
    return found


def _memory(device: str) -> list[tuple[float, Callable[[], object]]]:
    """c = a + s b and a copy on arrays of 256 MB, far beyond any cache: (bytes read and written, function)."""
    count = 2**26 if device == "cpu" else 2**30
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    return [(12.0 * count, lambda: torch.add(a, b, alpha=2.0, out=c)), (8.0 * count, lambda: c.copy_(a))]
