"""Worker processes: one group of units each at a time, and what to do when one of them fails or dies.

A process of the standard library's pool that dies takes the pool with it, and nobody learns what it was computing. Here each
worker has a pipe of its own, so that the end of one is seen as that, and the others go on.
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import torch

from dpkit import cores
from dpkit.stages.execute import failure_kind, make
from dpkit.stages.unit import Context, Unit
from dpkit.store import Store

LOWER = "lower batch_size, width, ipc or hessian_images, set distill_memory, or take a machine with more memory"


class Schedule(Protocol):
    """What the pool asks of the run that it works for."""

    ready: list

    def group(self, limit: int) -> list[Unit]: ...
    def push(self, units: list[Unit]) -> None: ...
    def start(self, units: list[Unit]) -> None: ...
    def step(self, units: list[Unit], done: int, total: int) -> None: ...
    def settle(self, key: str, failed: str | None = None, error: str | None = None) -> None: ...
    def split(self, units: list[Unit], size: int) -> None: ...
    def show(self) -> None: ...


@dataclass(eq=False)
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    ready: bool = False
    group: list[Unit] = field(default_factory=list)
    shared: bool = False  # another group was in memory at some time while this one was made


class Pool:
    """Up to ``workers`` processes on one ``device``, each with up to ``population`` units at once. See :meth:`run`."""

    def __init__(self, schedule: Schedule, root: Path, data_root: Path, device: str, workers: int, population: int):
        self.schedule, self.device, self.population = schedule, device, population
        self.arguments = (str(root), str(data_root), device)
        self.wanted = self.limit = workers
        self.workers: list[_Worker] = []
        self.tries: dict[str, int] = {}
        self.said: set[str] = set()

    def run(self) -> None:
        """Work until nothing is ready or running.

        Memory: a population is halved; several processes become fewer; a unit that alone is too large is named in the
        report. A device error, after which its process is of no use: the group is halved, or a single unit tried once
        more, in a fresh process, and then named. An error in a population: its units are made one by one, so that only
        the one with the error is named. What is finished stays in any case.
        """
        try:
            while self.schedule.ready or self._busy():
                self._supply()
                self.schedule.show()
                heard = wait([worker.pipe for worker in self.workers], timeout=1.0)
                for worker in [w for w in self.workers if w.pipe in heard]:
                    self._hear(worker)
            for worker in list(self.workers):
                self._dismiss(worker)
        except BaseException:
            for worker in self.workers:
                worker.process.terminate()
            for worker in self.workers:
                worker.process.join(timeout=5)
            raise

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.group]

    def _supply(self) -> None:
        """Start processes up to the limit while there is work for them, and hand it to those that are ready."""
        idle = [worker for worker in self.workers if not worker.group]
        for worker in idle[max(0, self.limit - len(self._busy())):]:
            self._dismiss(worker)  # it would hold on to its memory
        idle = [worker for worker in self.workers if not worker.group]
        for _ in range(min(len(self.schedule.ready) - len(idle), self.limit - len(self.workers))):
            self.workers.append(self._hire())
        for worker in idle:
            if worker.ready and self.schedule.ready:
                group = self.schedule.group(self.population)
                try:
                    worker.pipe.send(group)
                except OSError:  # it has ended while it was idle; its pipe says so next
                    self.schedule.push(group)
                    continue
                worker.group, worker.shared = group, False
                if len(busy := self._busy()) > 1:
                    for other in busy:
                        other.shared = True
                self.schedule.start(group)

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self.arguments))
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Worker(process, ours)

    def _dismiss(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.join(timeout=10)
        if worker.process.is_alive():
            worker.process.terminate()

    def _hear(self, worker: _Worker) -> None:
        try:
            what, *rest = worker.pipe.recv()
        except (EOFError, OSError):
            self._lost(worker)
            return
        if what == "step":
            self.schedule.step(worker.group, *rest)
        elif what == "ready":
            worker.ready = True
        elif what == "made":
            worker.group = []
            for key, failed in rest[0].items():
                self.schedule.settle(key, failed)
        elif what == "no device":
            self._dismiss(worker)
            self._give_up(rest[0])
        else:
            group, worker.group = worker.group, []
            if what != "error":
                self._dismiss(worker)
            self._failed(what, group, worker.shared, rest[0])

    def _lost(self, worker: _Worker) -> None:
        """A process has ended that should not have."""
        self._dismiss(worker)
        worker.process.join(timeout=10)
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        if worker.group:
            self._failed("died", worker.group, worker.shared, how)
        elif worker.ready or self._busy():
            self.limit = max(1, len(self.workers))
            self._say("fewer", f"a worker process {how} before it computed anything; going on with {self.limit} of {self.wanted}")
        else:
            raise RuntimeError(f"a worker process {how} before it began; a script that computes needs "
                               "`if __name__ == \"__main__\":` around its calls")

    def _failed(self, what: str, group: list[Unit], shared: bool, text: str) -> None:
        label = group[0].label
        for unit in group:
            self.tries[unit.key] = self.tries.get(unit.key, 0) + 1
        if len(group) > 1:
            smaller = 1 if what == "error" else len(group) // 2
            reason = {"error": "an error", "memory": "not enough memory", "device": "the device failed",
                      "died": f"the process {text}"}[what]
            if what != "error":
                self._say("split", f"{reason} with {len(group)} networks at once; going on with {smaller}")
            self.schedule.split(group, smaller)
        elif what == "error":
            self.schedule.settle(group[0].key, error=text)
        elif what == "device":
            if self.tries[group[0].key] < 2:
                self._say("device", f"the device failed while computing {label}; trying again in a fresh process")
                self.schedule.push(group)
            else:
                self.schedule.settle(group[0].key, error=f"{text}\nthe device failed twice while computing this alone: "
                                                         f"{text.strip().splitlines()[-1]}")
        elif shared:  # not "busy now": what ran beside it may have ended in the same moment
            self.limit = max(1, (len(self._busy()) + 1) // 2)
            reason = "ran out of memory" if what == "memory" else text
            self._say("fewer", f"a worker process {reason} while computing {label}, most likely for want of memory; going on "
                               f"with {self.limit} of {self.wanted} processes")
            self.schedule.push(group)
        else:
            reason = "not enough memory to compute this alone" if what == "memory" else (
                f"its process {text} while computing this alone, most likely for want of memory")
            self.schedule.settle(group[0].key, error=f"{text}\n{reason}; {LOWER}")
            self.limit = self.wanted  # it was this one

    def _give_up(self, text: str) -> None:
        """The device is gone: name everything that waits for it."""
        while self.schedule.ready:
            unit, = self.schedule.group(1)
            self.schedule.settle(unit.key, error=f"the device {self.device} no longer answers ({text}); finished units are kept, "
                                                 "and the same command continues")

    def _say(self, once: str, text: str) -> None:
        if once not in self.said:
            self.said.add(once)
            print(f"\ndpkit: {text}" if sys.stderr.isatty() else f"dpkit: {text}", file=sys.stderr, flush=True)


# --- in the worker ----------------------------------------------------------------------------------------------------------
def _serve(pipe: Connection, root: str, data_root: str, device: str) -> None:
    """Make groups as they come, until the pipe ends. One thread on a CPU: equal bits on any number of cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if device == "cpu":
        cores.use(1)
    cores.keep_memory()
    last = 0.0

    def progress(key: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            pipe.send(("step", done, total))

    context = Context(Store(root), device, Path(data_root), progress)
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        pipe.send(("no device", str(error).strip().splitlines()[0]))
        return
    work(pipe, context)


def work(pipe: Connection, context: Context) -> None:
    """Answer groups of units with what became of them, until the pipe ends or a failure leaves this process of no use."""
    pipe.send(("ready",))
    while True:
        try:
            units = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = "made", make(context, units)
        except Exception as error:
            answer = failure_kind(error), traceback.format_exc()
        pipe.send(answer)
        if answer[0] in ("memory", "device"):
            return  # a new process starts with nothing in memory and a device that answers


def _end_with(parent: int) -> None:
    """End this process soon after its parent was killed, instead of computing on for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
