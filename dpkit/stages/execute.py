"""Making units in this process, and telling what kind of failure an error is."""
from __future__ import annotations

import sys
import time

import torch

from dpkit.stages.features import features
from dpkit.stages.unit import STAGES, Context, Output, Unit

_made: set[str] = set()  # kinds of units that this process has made: their code is loaded and compiled

#: what the errors of an exhausted memory say, on a CPU and on a GPU
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
#: what the errors of a device say after which its process can compute nothing any more
_DEVICE = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "cuBLAS", "HIP error", "device-side assert", "NCCL error")


def failure_kind(error: BaseException) -> str:
    """``memory``: less at once may work; ``device``: a fresh process may; ``error``: neither will."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "memory"
    if isinstance(error, RuntimeError) and any(words in text for words in _MEMORY):
        return "memory"
    broken = getattr(torch, "AcceleratorError", ())
    if isinstance(error, broken) or (isinstance(error, RuntimeError) and any(words in text for words in _DEVICE)):
        return "device"
    return "error"


def peak_memory(device: str = "cpu") -> int:
    """Most bytes that this process has held so far: resident on a CPU, on the device otherwise; 0 where nobody knows."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make(context: Context, units: list[Unit]) -> dict[str, str | None]:
    """Compute units of one stage together and store each; returns why each has no result, or None. Parents must exist."""
    store, found = context.store, STAGES[units[0].stage]
    started = time.monotonic()
    context.start_clock()
    families = [{role: store.get(p.key) for role, p in unit.parents.items()} for unit in units]
    if found.tolerant:
        families = [{role: a for role, a in family.items() if not a.failed} or family for family in families]
    outputs: list[Output | None] = []
    for family in families:
        broken = next(((role, a) for role, a in family.items() if a.failed), None)
        outputs.append(Output({}, {}, f"parent {broken[0]} ({broken[1].meta['label']}): {broken[1].failed}")
                       if broken else None)
    todo = [i for i, output in enumerate(outputs) if output is None]
    if len(todo) > 1 and found.many:
        fresh = found.many(context, [units[i] for i in todo], [families[i] for i in todo])
    else:
        fresh = [found.function(context, units[i], families[i]) for i in todo]
    for i, output in zip(todo, fresh, strict=True):
        outputs[i] = output
    seconds = (time.monotonic() - started) / max(1, len(todo))
    cpu_seconds = context.cpu_seconds() / max(1, len(todo))
    first = _first(units[0]) if todo else False
    for unit, output in zip(units, outputs, strict=True):
        store.put(unit.key, stage=unit.stage, version=unit.version, spec=unit.spec, tensors=output.tensors,
                  parents={role: p.key for role, p in unit.parents.items()}, result=output.result, seconds=seconds,
                  label=unit.label, failed=output.failed,
                  extra={"device": context.device, "cpu_seconds": round(cpu_seconds, 3), "first": first,
                         "together": len(todo), "peak_memory": peak_memory(context.device),
                         "data": unit.data.to_dict() if unit.data else None})
    return {unit.key: output.failed for unit, output in zip(units, outputs, strict=True)}


def _first(unit: Unit) -> bool:
    """Whether this process makes units of this kind for the first time, which takes longer; asking makes it known."""
    found = features(unit.stage, unit.spec, {role: p.spec for role, p in unit.parents.items()})
    names = {found.kind, *found.compiled} if found else {unit.stage}
    fresh = not names <= _made
    _made.update(names)
    return fresh
