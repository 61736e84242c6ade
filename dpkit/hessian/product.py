"""Hessian products by the compiled programs of :mod:`dpkit.hessian.program`, chunk by chunk, on several cores."""
from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dpkit import cores, models
from dpkit.hessian.program import arranged, program
from dpkit.models import ModelSpec
from dpkit.tree import Buffers, Params

CHUNK = 100
"""Images a chunk: on a CPU 20, 50 and 100 came out within a tenth of each other, 100 first for ResNets in bfloat16."""

MEMORY = 2**31
"""Bytes that a product keeps at most between calls, unless it is told otherwise: 2 GiB."""

IGNORED = -100
"""The class number that cross-entropy leaves out."""

WORTH = 4e12
"""Floating-point operations of products from which compiling pays; see :func:`worthwhile`."""


def worthwhile(model: ModelSpec, images: int, products: int) -> bool:
    """Whether ``products`` products over ``images`` images are work enough to compile for, on a CPU.

    A product takes six times the operations of a forward pass. One core does about 70 billion a second of an eager product and
    140 of a compiled one, and compiling takes 20 seconds or more: break-even near 4e12 operations. The rule counts and does not
    time, so that it decides alike on every machine.
    """
    return 6 * models.forward_work(model).flops * images * products >= WORTH


class CompiledProduct:
    """H v (or another matrix's product) summed over the images; see :class:`dpkit.hessian.Operator`, which owns one.

    weights, fixed  the parameters that make up w, and the others
    images, labels  (N, C, H, W) and (N,) or (N, K)
    size            images a chunk; the last one is filled up with images that do not count
    memory          bytes that may be kept between products. Where the cut of all images is larger, each call computes it
                    anew, chunk by chunk, once for all its vectors
    laid_out        with precision "bf16", on a CPU: keep more, if ``memory`` holds it, and multiply faster
                    (:mod:`dpkit.hessian.weight_gradients`)
    threads         chunks computed side by side on a CPU, one core each; the sum is taken in the order of the chunks, so
                    that the result does not depend on it
    matrix, train   which matrix is multiplied by (:mod:`dpkit.hessian.matrices`), and whether BatchNorm takes the chunk's
                    statistics, which then must hold all images
    precision       "bf16": what is done for each vector multiplies in bfloat16

    Attributes: saved, bytes kept for each image; kept, whether they stay between products; laid_out, whether it came to that.
    What compiling raises comes out of the first call.
    """

    def __init__(self, model: ModelSpec, weights: Params, fixed: Params, buffers: Buffers, images: Tensor, labels: Tensor,
                 size: int, memory: float = MEMORY, threads: int = 1, compiled: bool = True, *, matrix: str = "hessian",
                 train: bool = False, precision: str = "fp32", laid_out: bool = True) -> None:
        count = math.ceil(len(images) / size)
        images, labels = _filled(images, labels, count * size)
        self._chunks = [(arranged(x), y) for x, y in zip(images.split(size), labels.split(size), strict=True)]
        groups = [{name: arranged(t.detach()) for name, t in group.items()} for group in (weights, fixed, buffers)]
        self._weights = groups[0]
        self._tensors = [t for group in groups for t in group.values()]
        with cores.used(1):
            may = laid_out and precision == "bf16" and images.device.type == "cpu"  # on a GPU nobody has measured it
            for self.laid_out in (True, False) if may else (False,):
                self._program = program(model, *groups, *self._chunks[0], compiled, matrix, train, precision, self.laid_out)
                self.kept = self._program.saved * count * size <= memory
                if self.kept:
                    break
        self.saved = self._program.saved
        self._saved: list[list[Tensor] | None] = [None] * count
        self._threads = min(threads, count) if images.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def __call__(self, vectors: Sequence[Params]) -> list[Params]:
        """H v for each of ``vectors`` (named and shaped like the weights), summed over the images and not averaged."""
        columns = [[arranged(t) for t in vector.values()] for vector in vectors]
        sums = [[torch.zeros_like(t) for t in self._weights.values()] for _ in vectors]
        run = self._pool.map if self._pool else map
        with cores.used(1):
            # In waves, so that no more results wait for their turn than there are threads.
            for start in range(0, len(self._chunks), self._threads):
                wave = range(start, min(start + self._threads, len(self._chunks)))
                for found in run(lambda index: self._multiply(index, columns), wave):
                    for total, parts in zip(sums, found, strict=True):
                        for t, part in zip(total, parts, strict=True):
                            t += part
        return [dict(zip(self._weights, total, strict=True)) for total in sums]

    @torch.no_grad()
    def _multiply(self, index: int, columns: list[list[Tensor]]) -> list[list[Tensor]]:
        saved = self._saved[index]
        if saved is None:
            saved = self._program.prepare(*self._tensors, *self._chunks[index])
            if self.kept:
                self._saved[index] = saved
        return [self._program.apply(*saved, *column) for column in columns]


def usual_chunk(images: int) -> int:
    """Images a chunk where nobody says: :data:`CHUNK`, but two chunks for two cores as soon as they hold half as many each."""
    return min(CHUNK, max(CHUNK // 2, math.ceil(images / 2)))


def chunk_size(images: int, chunk: int) -> int:
    """Images in each of as few equal chunks as hold ``images``, none larger than ``chunk``."""
    return math.ceil(images / math.ceil(images / chunk))


def _filled(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` images: those given, then copies of the first whose loss is 0 and so are its derivatives."""
    more = count - len(images)
    if not more:
        return images, labels
    left_out = 0.0 if labels.is_floating_point() else IGNORED
    return (torch.cat([images, images[:1].expand(more, *images.shape[1:])]),
            torch.cat([labels, labels.new_full((more, *labels.shape[1:]), left_out)]))
