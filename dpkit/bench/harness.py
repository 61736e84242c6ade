"""Processes that hold a task and run it on demand, so that two sides can alternate without starting anew.

Ours runs in as many processes as there are cores, one thread each, with memory kept (:mod:`dpkit.cores`), as `dpkit compute`
does; what counts is their sum. A peer runs in one plain process, with torch's own number of threads and the C library's own
allocator, as its users run it. A machine whose speed drifts moves both sides of a pair, so the ratio of a pair stands.
"""
from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from dpkit import cores

#: what would take away a peer's own number of threads
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """What a process does: ``build`` ("module:function") with ``arguments`` gives a function without arguments, the work.

    everywhere: on all cores, a process each (True), or in one process. threads: of each process; 0 for torch's own choice.
    keep: whether freed memory is kept. share: whether the processes share the work, each told its place as ``worker`` and
    ``workers``; otherwise each does all of it. work: units that one run of one process does (all of them together if shared).
    warm: runs before the first that counts, which compile, fill caches and let the heap grow.
    """

    build: str
    work: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    everywhere: bool = False
    threads: int = 0
    keep: bool = False
    share: bool = False
    warm: int = 2


class Failed(RuntimeError):
    """A task could not be built or run; the text is one line."""


class Team:
    """The processes of one :class:`Job`, built one after the other (the second finds the first one's compiled code)."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.size = cores.available() if job.everywhere else 1
        self.members = [_Member(job.threads, job.keep) for _ in range(self.size)]

    def __enter__(self) -> Team:
        try:
            self.begin()
            self.finish()
        except BaseException:
            self.end()
            raise
        return self

    def begin(self) -> None:
        """Let the first process build and warm up; does not wait."""
        self._build(0)

    def finish(self) -> None:
        """Wait for the first, then let the others do the same. Raises :class:`Failed` with one line if one cannot."""
        self.members[0].answer()
        for place in range(1, self.size):
            self._build(place)
        for member in self.members[1:]:
            member.answer()

    def _build(self, place: int) -> None:
        extra = {"worker": place, "workers": self.size} if self.job.share else {}
        self.members[place].ask("build", (self.job.build, {**self.job.arguments, **extra}, self.job.warm))

    def run(self) -> float:
        """Units of work a second, of all processes together, from the start of the first to the end of the last."""
        started = time.perf_counter()
        for member in self.members:
            member.ask("run", None)
        for member in self.members:
            member.answer()
        seconds = time.perf_counter() - started
        return self.job.work * (1 if self.job.share else self.size) / seconds

    def results(self, processes: int | None = None) -> list[Any]:
        """What each process, or the first few, return from a run of their own."""
        chosen = self.members[:processes]
        for what in ("run", "result"):
            for member in chosen:
                member.ask(what, None)
            found = [member.answer() for member in chosen]
        return found

    def last(self) -> Any:
        """What the first process's last run returned."""
        self.members[0].ask("result", None)
        return self.members[0].answer()

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the processes."""
        for member in self.members:
            member.pipe.close()
        for member in self.members:
            member.end()


def alternate(teams: Mapping[str, Team], pairs: int, tick: Callable[[int], None] = lambda pair: None) -> dict[str, list[float]]:
    """Rates of each team, in turn, ``pairs`` times; the order turns round from pair to pair."""
    rates: dict[str, list[float]] = {name: [] for name in teams}
    for pair in range(pairs):
        for name in (teams if pair % 2 == 0 else reversed(teams)):
            rates[name].append(teams[name].run())
        tick(pair + 1)
    return rates


class _Member:
    """One spawned process and the pipe to it."""

    def __init__(self, threads: int, keep: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads, keep), daemon=True)
        with _without(THREADS):
            self.process.start()
        other.close()

    def ask(self, what: str, argument: Any) -> None:
        try:
            self.pipe.send((what, argument))
        except OSError:
            raise Failed("a benchmark process ended, most likely out of memory") from None

    def answer(self) -> Any:
        try:
            good, value = self.pipe.recv()
        except (EOFError, OSError):
            raise Failed("a benchmark process ended, most likely out of memory") from None
        if not good:
            raise Failed(value)
        return value

    def end(self) -> None:
        self.process.join(2)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


@contextmanager
def _without(names: Sequence[str]):
    """The environment without some variables, while a process starts."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _serve(pipe: Connection, threads: int, keep: bool) -> None:
    """A process's life: build, run, run, ... until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # peers warn about their own code
    if keep:
        cores.keep_memory()
    if threads:
        torch.set_num_threads(threads)
    task: Callable[[], Any] | None = None
    result = None
    while True:
        try:
            what, argument = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if what == "build":
                task = None
                gc.collect()
                module, _, name = argument[0].partition(":")
                task = getattr(importlib.import_module(module), name)(**argument[1])
                for _ in range(argument[2]):
                    result = task()
            elif what == "run":
                result = task()
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            pipe.send((True, result if what == "result" else None))
        except Exception as error:
            text = str(error).strip().splitlines() or [traceback.format_exc().strip().splitlines()[-1]]
            pipe.send((False, f"{type(error).__name__}: {text[0]}"[:300]))
