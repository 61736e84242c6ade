"""Loss and gradient of a population of networks on its batches, in the form that is fastest where it runs.

- ``solo``: one network after another. The form for a processor, where vmap over small convolutional networks is 1.7 to 2 times
  slower (measured) and several networks are better trained by several processes, one thread each.
- ``vmap``: all networks in one pass of ``torch.func.vmap``; convolutions become grouped ones.
- ``graphs``: the solo computation of every network, recorded once as a CUDA graph with the networks on streams of their own and
  replayed each step, so that neither Python nor kernel launches are waited for. Without a GPU the recording is run as it is.

All forms return the same numbers: ``solo`` and ``graphs`` the same bits on a processor, ``vmap`` the same up to rounding.
"""
from __future__ import annotations

import functools
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models, tree
from dpkit.tree import Buffers, Params

STREAMS = 8  # networks whose kernels may run at the same time on a GPU


def loss(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, targets: Tensor,
         precision: str = "fp32") -> tuple[Tensor, Buffers]:
    """Mean cross-entropy of soft ``targets`` (B, K) on normalised ``images`` (B, C, H, W), and the new buffers."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits, buffers = models.forward(model, params, buffers, images, train=True)
    return F.cross_entropy(logits.float(), targets), buffers


def aligned(count: int, size: int, like: Tensor) -> Tensor:
    """An empty tensor (count, size) whose rows all begin at multiples of 64 bytes.

    Some matrix libraries round by where their operands lie in memory (MKL does), and a network among others must get the bits
    of one alone.
    """
    step = 64 // like.element_size()
    return like.new_empty(count, -(-size // step) * step)[:, :size]


@functools.lru_cache(maxsize=8)
def _loss_function(model: models.ModelSpec, precision: str, compiled: bool):
    function = functools.partial(loss, model, precision=precision)
    return torch.compile(function, dynamic=False) if compiled and can_compile() else function


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile can work here; says so once if not. Results differ from compiled ones by rounding only."""
    # a GPU's kernels are compiled by Triton, but started by code that a C compiler builds
    names = ("c++", "g++", "clang++", *((os.environ.get("CC", ""), "gcc", "clang") if torch.cuda.is_available() else ()))
    if any(shutil.which(name) for name in names):
        return True
    warnings.warn("no C++ compiler found: training runs uncompiled, slower, with the same mathematics", stacklevel=2)
    return False


def unbuilt(error: BaseException) -> bool:
    """Whether an error says that torch.compile could not build something; by name, as the home of these errors moves."""
    return type(error).__name__ in ("InductorError", "BackendCompilerFailed", "CppCompileError", "TritonMissing",
                                    "GPUTooOldForTriton")


class Gradients(Protocol):
    """What every form offers for a population whose weights are the rows of one flat tensor (P, n)."""

    def __call__(self, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Losses (P,) and flat gradient (P, n) for one batch of each network; the buffers move on."""

    def buffers(self) -> Buffers:
        """The buffers (P, ...) after the last call, as copies."""


class Solo:
    """Gradients of P networks in turn, written into views of one flat gradient."""

    def __init__(self, model: models.ModelSpec, precision: str, compiled: bool, weights: Tensor, like: Params, buffers: Buffers):
        self.function = _loss_function(model, precision, compiled)
        # compiled convolutions are fastest with the channels last (measured: 6.2 and 7.8 ms, ConvNet-3-32); eager ones are not
        self.layout = torch.channels_last if compiled and can_compile() else torch.contiguous_format
        self.gradient = aligned(*weights.shape, weights).zero_()
        self.state = [{name: b[p].clone() for name, b in buffers.items()} for p in range(len(weights))]
        self.networks = []
        for row, gradient in zip(weights, self.gradient, strict=True):
            views = {}
            for name, part, piece in _pieces(like, row, gradient):
                leaf = part.detach().requires_grad_()
                leaf.grad = piece  # backward accumulates in place, so the flat gradient fills without a copy
                views[name] = leaf
            self.networks.append(views)

    def __call__(self, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See :class:`Gradients`."""
        self.gradient.zero_()
        losses = []
        laid: dict[int, Tensor] = {}  # networks may share a batch
        for p, params in enumerate(self.networks):
            if (batch := id(images[p])) not in laid:
                laid[batch] = images[p].contiguous(memory_format=self.layout)
            x = laid[batch]
            value, new = self.function(params, self.state[p], x, targets[p])
            value.backward()
            losses.append(value.detach())
            self.state[p] = tree.detach(new)
        return torch.stack(losses), self.gradient

    def buffers(self) -> Buffers:
        """See :class:`Gradients`."""
        return {name: torch.stack([state[name] for state in self.state]) for name in self.state[0]}


class Graphed(Solo):
    """Gradients of P networks as one recorded graph; batches are copied to where the recording reads them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.recorded: dict[int, tuple[Callable[[], None], Tensor, Tensor, Tensor]] = {}  # by batch size

    def __call__(self, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See :class:`Gradients`; all batches must have one size."""
        size = len(images[0])
        if size not in self.recorded:
            self.recorded[size] = self._record(torch.stack(images), torch.stack(targets))
        replay, x, y, losses = self.recorded[size]
        torch.stack(images, out=x)
        torch.stack(targets, out=y)
        replay()
        return losses.clone(), self.gradient

    def _record(self, x: Tensor, y: Tensor):
        losses = torch.zeros(len(self.networks), device=x.device)
        streams = [torch.cuda.Stream(x.device) for _ in range(STREAMS)] if x.is_cuda else []

        def run() -> None:
            main = torch.cuda.current_stream(x.device) if streams else None
            for p, params in enumerate(self.networks):
                with torch.cuda.stream(streams[p % STREAMS] if streams else None):
                    if streams and p < STREAMS:
                        streams[p].wait_stream(main)
                    value, new = self.function(params, self.state[p], x[p].contiguous(memory_format=self.layout), y[p])
                    # not backward(): a leaf's accumulation would run on the stream of its first use, outside the recording
                    for leaf, part in zip(params.values(), torch.autograd.grad(value, list(params.values())), strict=True):
                        leaf.grad.copy_(part)
                    losses[p].copy_(value.detach())
                    for name, b in new.items():
                        self.state[p][name].copy_(b.detach())
            for stream in streams[:len(self.networks)]:
                main.wait_stream(stream)

        if not streams:
            return run, x, y, losses
        before = [{name: b.clone() for name, b in state.items()} for state in self.state]
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels, and compiled functions compile, before anything is recorded
                run()
        torch.cuda.current_stream(x.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for state, old in zip(self.state, before, strict=True):
            for name, b in old.items():
                state[name].copy_(b)
        return graph.replay, x, y, losses


@functools.lru_cache(maxsize=8)  # a function made anew for each population would be compiled anew
def _population_function(model: models.ModelSpec, precision: str, compiled: bool):
    def one(params, buffers, images, targets):
        return loss(model, params, buffers, images, targets, precision)

    function = torch.func.vmap(torch.func.grad_and_value(one, has_aux=True))
    return torch.compile(function, dynamic=False) if compiled and can_compile() else function


class Vmapped:
    """Gradients of P networks in one pass of ``torch.func.vmap`` over ``torch.func.grad_and_value``."""

    def __init__(self, model: models.ModelSpec, precision: str, compiled: bool, weights: Tensor, like: Params, buffers: Buffers):
        self.function = _population_function(model, precision, compiled)
        sizes = [t[0].numel() for t in like.values()]
        self.views = {name: part.view(t.shape)
                      for (name, t), part in zip(like.items(), weights.split(sizes, dim=1), strict=True)}
        self.state = tree.detach(buffers)

    def __call__(self, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See :class:`Gradients`; all batches must have one size."""
        gradients, (losses, updated) = self.function(self.views, self.state, torch.stack(images), torch.stack(targets))
        self.state = tree.detach(updated)
        return losses.detach(), torch.cat([gradients[name].reshape(len(losses), -1) for name in self.views], 1)

    def buffers(self) -> Buffers:
        """See :class:`Gradients`."""
        return {name: b.clone() for name, b in self.state.items()}


FORMS: dict[str, type] = {"solo": Solo, "vmap": Vmapped, "graphs": Graphed}


def build(form: str, device: torch.device, images: list[Tensor], targets: list[Tensor], *arguments) -> tuple[str, Gradients]:
    """The gradients of a population in ``form``, and that form's name.

    ``auto``: solo on a processor or for one network, else as ``fastest``: each form is timed on the batches given (images,
    targets: one of each network) and the fastest is taken; one that fails there is left out with a line that says so. Where all
    that are to be compiled fail, all run uncompiled. arguments: what a form is made from. Raises ``ValueError`` on an unknown
    form.
    """
    if form not in (*FORMS, "auto", "fastest"):
        raise ValueError(f"form must be auto, fastest, {', '.join(FORMS)}; got {form!r}")
    if form == "auto":
        form = "fastest" if device.type == "cuda" else "solo"
    if form == "fastest":
        times, failed = _timed(images, targets, *arguments)
        model, precision, compiled, *others = arguments
        if compiled and not times and failed and all(unbuilt(error) for error in failed):
            warnings.warn("nothing can be compiled here: training runs uncompiled, with the same mathematics", stacklevel=2)
            arguments = (model, precision, False, *others)
            times, _ = _timed(images, targets, *arguments)
        form = min(times, key=times.__getitem__) if times else "solo"
    return form, FORMS[form](*arguments)


def _timed(images: list[Tensor], targets: list[Tensor], *arguments) -> tuple[dict[str, float], list[RuntimeError]]:
    """Seconds of each form that works, and the errors of those that do not."""
    times, failed = {}, []
    for name in FORMS:
        try:
            times[name] = _seconds(FORMS[name](*arguments), images, targets)
        except torch.cuda.OutOfMemoryError:
            continue  # a form that needs less may fit; if none does, the one that is built then says so
        except RuntimeError as error:
            failed.append(error.with_traceback(None))  # which would keep the form and its memory
            warnings.warn(f"form {name} does not work here and is left out ({str(error).splitlines()[0]})", stacklevel=3)
    return times, failed


def _seconds(gradients: Gradients, images: list[Tensor], targets: list[Tensor], repeats: int = 3) -> float:
    """Seconds of ``repeats`` calls, after one that may compile or record."""
    def wait() -> None:
        if images[0].is_cuda:
            torch.cuda.synchronize(images[0].device)

    gradients(images, targets)
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        gradients(images, targets)
    wait()
    return time.perf_counter() - started


def _pieces(like: Params, row: Tensor, gradient: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight view and gradient view of each tensor of one network; ``like`` carries the leading axis P."""
    start = 0
    for name, tensor in like.items():
        shape, size = tensor.shape[1:], tensor[0].numel()
        yield name, row[start:start + size].view(shape), gradient[start:start + size].view(shape)
        start += size
