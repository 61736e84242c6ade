"""How a process uses the processor: how many threads, and what becomes of freed memory.

A training step allocates and frees the same few hundred megabytes again and again. glibc returns large blocks to the kernel when
they are freed, and the kernel hands them out anew page by page, zeroed; on two cores that took half the time of an eager
training step (ConvNet-3-128, batch 64: 280 ms, and 145 ms once the memory is kept; `dpkit bench` measures it). The numbers
computed do not change by a bit.
"""
from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# mallopt's parameters (glibc's malloc.h); a negative number names them
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, to use it again; returns whether the C library could be told.

    Its resident size then stays at its peak until it ends, which is why it is for processes that compute and not done on
    import. Without effect where the C library has no ``mallopt`` (macOS, musl); calling it twice does no harm.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # All blocks from one heap, none from mmap, which is unmapped when freed; and never give the heap's end back. One heap, since
    # those of further threads are small ones that fall back to mmap (matching on two threads: 1.39 s a step, and 0.95 with one).
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])


def available() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use(threads: int) -> int:
    """Let torch compute with so many threads in this process; returns how many it was before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return before


@contextmanager
def used(threads: int) -> Iterator[None]:
    """So many threads for what stands inside, and the former number again.

    One thread for each operation is what makes Python threads side by side worthwhile, and bits independent of the machine.
    """
    before = use(threads)
    try:
        yield
    finally:
        use(before)
