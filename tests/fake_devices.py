"""A CUDA device without a GPU: tensors that compute on the processor and say that they lie on ``cuda:0``.

Where a tensor lies is written beside its storage, so views, saved tensors and those in ``torch.func`` carry it along. One mode
answers what Python code asks (``.device``, ``.to()``, factories), another sees every operation below autograd and does what CUDA
would: refuses tensors of two devices, notes where the processor waits for the device, and records graphs that are then replayed.
The numbers are real ones, so results can be compared with those of a processor.

Not told from a GPU: kernels' own rounding, streams, memory, what torch.compile builds (it is left out), and autocast's list of
operations (the processor's is used).
"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dpkit

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FREE = 2**31  # bytes that the device claims to have free
LIBRARY = str(Path(dpkit.__file__).parent)

aten = torch.ops.aten
#: operations after which the processor has waited for the device
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount,
           aten.unique_consecutive, aten._linalg_check_errors, aten._linalg_eigh, aten._linalg_svd, aten.linalg_lstsq}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_, aten._unsafe_index_put}
COPYING = {aten.copy_, aten._to_copy, aten.clone, aten.copy, aten.lift_fresh}
#: operations that take a single number from the processor beside tensors on the device, besides elementwise ones
WITH_NUMBER = {aten.where, aten.index_put, aten.index_put_, aten._index_put_impl_, aten.fill, aten.fill_, aten.masked_fill,
               aten.masked_fill_, aten._foreach_mul_, aten._foreach_add_, aten._foreach_mul, aten._foreach_div_}


@dataclass(frozen=True)
class Wait:
    """The processor waited for the device. what: operation. where: ``module.py:function`` of the library that asked."""

    what: str
    where: str
    line: int


class _Where:
    """Which storages lie on the device; of some nobody knows yet.

    Those are what an operation's own C++ code made beside a tensor that it took to be on the processor. They go where they are
    used.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[StorageWeakRef, bool]] = {}  # a reference held keeps an address from being used again
        self.most = 1000

    def put(self, tensor: Tensor, sure: bool = True) -> None:
        storage = _base(tensor).untyped_storage()
        self.known[storage._cdata] = StorageWeakRef(storage), sure
        if len(self.known) > self.most:
            self.known = {key: value for key, value in self.known.items() if not value[0].expired()}
            self.most = 2 * len(self.known) + 1000

    def of(self, tensor: Tensor) -> torch.device | None:
        """The device; None for nobody knows."""
        tensor = _base(tensor)
        if tensor.device.type != "cpu":  # a tensor without numbers, on its own device
            return tensor.device
        _, sure = self.known.get(tensor.untyped_storage()._cdata, (None, None))
        return CPU if sure is None else CUDA if sure else None


def _leaves(*values) -> Iterator:
    """What tuples, lists and dictionaries hold, however deep."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(*value)
        elif isinstance(value, dict):
            yield from _leaves(*value.values())
        else:
            yield value


def _tensors(*values) -> list[Tensor]:
    return [value for value in _leaves(*values) if isinstance(value, Tensor)]


def _base(tensor: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class _Graph:
    """What ``torch.cuda.CUDAGraph`` is: operations as they were recorded, run again in place."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        with torch.no_grad(), _disable_current_modes():
            for func, args, kwargs, recorded in self.calls:
                given = {t.untyped_storage()._cdata for t in _tensors(args, kwargs)}
                for old, new in zip(_tensors(recorded), _tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage()._cdata not in given:
                        old.detach().copy_(new)


class _Stream:
    def __init__(self, *_) -> None: ...
    def wait_stream(self, stream: _Stream) -> None: ...


@dataclass
class Fake:
    """The device. waits: where the processor waited for it, in order. operations: how many ran on it. graphs: recorded ones."""

    places: _Where = field(default_factory=_Where)
    waits: list[Wait] = field(default_factory=list)
    operations: int = 0
    graphs: int = 0
    recording: _Graph | None = None

    def waited(self, what: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} at {_caller()})")
        self.waits.append(Wait(what, *_caller()))

    def where(self) -> set[str]:
        """Functions of the library that waited."""
        return {wait.where for wait in self.waits}

    def on_device(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on it."""
        return self.places.of(tensor) == CUDA

    @contextlib.contextmanager
    def record(self, graph: _Graph, *_, **__) -> Iterator[None]:
        self.recording, self.graphs = graph, self.graphs + 1
        try:
            yield
        finally:
            self.recording = None


def _caller() -> tuple[str, int]:
    """Innermost function of the library on the stack, and the line there."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(LIBRARY):
            return f"{Path(code.co_filename).name}:{code.co_qualname.partition('.<locals>')[0]}", frame.f_lineno
        frame = frame.f_back
    return "test", 0


class _Asked(TorchFunctionMode):
    """What Python code asks of tensors and of factories."""

    def __init__(self, fake: Fake, ops: _Operations) -> None:
        super().__init__()
        self.fake, self.ops = fake, ops
        tensor = torch.Tensor
        self.answers = {
            tensor.device.__get__: lambda t: fake.places.of(t) or CPU,
            tensor.is_cuda.__get__: lambda t: fake.on_device(t),
            tensor.is_cpu.__get__: lambda t: not fake.on_device(t),
            tensor.to: self._to,
            tensor.cpu: lambda t, **options: self._move(t, CPU, **options),
            tensor.cuda: lambda t, device=CUDA, **options: self._move(t, CUDA, **options),
            tensor.numpy: self._numpy,
            tensor.__array__: self._numpy,
            tensor.tolist: self._tolist,
            torch.nn.functional.one_hot: self._one_hot,
            torch._C._nn.one_hot: self._one_hot,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.answers:
            return self.answers[func](*args, **kwargs)
        if kwargs.get("device") is not None:
            return self._made(func, args, kwargs)
        before, self.ops.plain = self.ops.plain, not _tensors(args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self.ops.plain = before

    def _made(self, func, args, kwargs):
        """A factory on a device that is named."""
        target = _meant(kwargs["device"])
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            raise RuntimeError(f"Expected a '{target.type}' device type for generator but found '{generator.device.type}'")
        if target.type != "cuda":
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            self.fake.waited(func.__name__)
        result = func(*args, **(kwargs | {"device": CPU}))
        for leaf in _tensors(result):
            self.fake.places.put(leaf)
        return result

    def _to(self, tensor: Tensor, *args, **kwargs):
        copy = kwargs.pop("copy", False)
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        if other is not None:
            args = (self.fake.places.of(other), other.dtype, *args[1:])
        names = ("device", "dtype", "non_blocking")
        if args and isinstance(args[0], torch.dtype):
            names = names[1:]
        return self._move(tensor, copy=copy, **dict(zip(names, args, strict=False)) | kwargs)

    def _move(self, tensor: Tensor, device=None, *, dtype=None, non_blocking=False, copy=False, memory_format=None):
        here = self.fake.places.of(tensor)
        target = here if device is None else _meant(device)
        options = {} if memory_format is None else {"memory_format": memory_format}
        dtype = tensor.dtype if dtype is None else dtype
        if target == here:
            return tensor.to(dtype=dtype, copy=copy, **options)
        if target == CPU or not non_blocking or self.fake.recording is not None:
            self.fake.waited(f"copy to {target.type}")
        self.ops.target = target
        try:
            return tensor.to(dtype=dtype, copy=True, **options)
        finally:
            self.ops.target = None

    def _numpy(self, tensor: Tensor, *args, **kwargs):
        if self.fake.on_device(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        return tensor.numpy(*args, **kwargs)

    def _tolist(self, tensor: Tensor):
        if self.fake.on_device(tensor) and tensor.dim():
            self.fake.waited("tolist")
        return tensor.tolist()

    def _one_hot(self, tensor: Tensor, num_classes: int = -1) -> Tensor:
        # on a processor it looks at the classes; on a GPU only where it has to find their number
        self.ops.quiet = num_classes > 0
        try:
            return torch._C._nn.one_hot(tensor, num_classes)
        finally:
            self.ops.quiet = False


def _meant(device) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return CUDA if device == torch.device("cuda") else device


class _Operations(TorchDispatchMode):
    """Every operation, below autograd and ``torch.func``."""

    def __init__(self, fake: Fake) -> None:
        super().__init__()
        self.fake = fake
        self.quiet = False  # nobody waits in what is called
        self.plain = False  # code of a study calls a factory, and means the processor
        self.target: torch.device | None = None  # of the copy that is being made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, places, packet = kwargs or {}, self.fake.places, func.overloadpacket
        with torch._C.DisableTorchFunction():
            given = _tensors(args, kwargs)
            there = [t for t in given if places.of(t) == CUDA]
            if there:
                self.fake.operations += 1
                self._check(func, packet, args, kwargs, given)
            result = func(*args, **kwargs)
            if packet in COPYING and self.target is not None:
                if self.target == CUDA:
                    places.put(result)
                return result
            shared = {t.untyped_storage()._cdata for t in given}
            unsure = [t for t in given if places.of(t) is None]
            fresh = [t for t in _tensors(result) if t.untyped_storage()._cdata not in shared]
            if there or (unsure if given else not self.plain):
                for tensor in (*fresh, *unsure):
                    places.put(tensor, sure=bool(there))
            if self.fake.recording is not None:
                if any(places.of(t) == CPU for t in given):
                    raise RuntimeError(f"{func} on the processor while a graph is recorded would not be replayed ({_caller()})")
                self.fake.recording.calls.append((func, args, kwargs, result))
            return result

    def _check(self, func, packet, args, kwargs, given: list[Tensor]) -> None:
        """What CUDA would refuse, and where it would make the processor wait."""
        fake, of = self.fake, self.fake.places.of
        generator = kwargs.get("generator") or next((a for a in args if isinstance(a, torch.Generator)), None)
        if generator is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if packet == aten.copy_ and {of(args[0]), of(args[1])} == {CPU, CUDA}:
            if args[1].dim() or of(args[0]) == CPU:  # a number is passed on as an argument of the kernel
                fake.waited("copy_")
            return
        if packet in COPYING and self.target is not None:
            return
        if packet in INDEXING:
            given = [t for t in given if not any(t is index for index in args[1])]
            for index in (i for i in args[1] if i is not None):
                if of(index) not in (None, of(args[0])):
                    if of(args[0]) == CPU:
                        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu); "
                                           f"got cuda:0 at {_caller()}")
                    fake.waited("index from the processor")
                masked = packet in (aten.index_put_, aten._index_put_impl_) and args[2].numel() == 1 and len(args[1]) == 1
                if index.dtype in (torch.bool, torch.uint8) and not masked:
                    fake.waited("index by a mask")
        numbers = packet in WITH_NUMBER or torch.Tag.pointwise in func.tags
        wrong = [t for t in given if of(t) == CPU and (t.dim() > 0 or not numbers)]
        changed = func._schema.is_mutable and args and isinstance(args[0], Tensor) and of(args[0]) == CPU
        if wrong or (changed and any(of(t) == CUDA for t in given)):
            shapes = [(*t.shape, str(of(t))) for t in given]
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                               f"({func} at {_caller()}, of shapes {shapes})")
        if packet in WAITING and not self.quiet:
            fake.waited(str(packet).removeprefix("aten."))
        if packet == aten.repeat_interleave and kwargs.get("output_size") is None:
            fake.waited("repeat_interleave")


@contextlib.contextmanager
def fake_cuda() -> Iterator[Fake]:
    """A device ``cuda:0`` for what stands inside; see :class:`Fake`."""
    fake, stream = Fake(), _Stream()
    ops, autocast = _Operations(fake), torch.autocast
    cuda = {"is_available": lambda: True, "device_count": lambda: 1, "mem_get_info": lambda device=None: (FREE, 2 * FREE),
            "synchronize": lambda device=None: fake.waited("synchronize"), "empty_cache": lambda: None,
            "max_memory_allocated": lambda device=None: 1, "memory_allocated": lambda device=None: 1,
            "memory_reserved": lambda device=None: 1, "get_device_name": lambda device=None: "fake", "Stream": _Stream,
            "current_stream": lambda device=None: stream, "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": _Graph, "graph": fake.record}
    others = {"autocast": lambda device_type, **options: autocast(device_type.replace("cuda", "cpu"), **options),
              "compile": lambda function, **_: function}
    with contextlib.ExitStack() as stack:
        for module, changes in ((torch.cuda, cuda), (torch, others)):
            for name, value in changes.items():
                stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(ops)
        stack.enter_context(_Asked(fake, ops))
        yield fake
