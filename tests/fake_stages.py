"""Stages that fail as their units say. A worker process registers them when it reads a unit, whose class is of this module."""
from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch

from dpkit.stages.unit import STAGES, Output, Stage, Unit


class Death(BaseException):
    """Ends a worker as a signal would, without a word."""


ERRORS = {"memory": MemoryError(), "allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
          "gpu memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
          "device": RuntimeError("CUDA error: an illegal memory access was encountered"),
          "error": ArithmeticError("no such luck"), "death": Death()}


def one(context, unit, parents):
    """Note the attempt, and do what the unit's specification says."""
    folder, do = Path(unit.spec["folder"]), unit.spec["do"]
    with open(folder / unit.label, "a") as log:
        log.write(f"{os.getpid()}\n")
    tries = len((folder / unit.label).read_text().splitlines())
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "wait":  # until somebody else has failed, so that two are at work at once
        until = time.monotonic() + 90
        while not (folder / unit.spec["for"]).exists() and time.monotonic() < until:
            time.sleep(0.01)
    elif do in ERRORS and tries <= unit.spec.get("times", 10**9):
        if "with" in unit.spec:
            until = time.monotonic() + 90
            while not (folder / unit.spec["with"]).exists() and time.monotonic() < until:
                time.sleep(0.01)
        raise ERRORS[do]
    return Output({"x": torch.ones(1)}, {"tries": tries})


def many(context, units, parents):
    """As many as fit; an error of one is an error of all."""
    folder = Path(units[0].spec["folder"])
    with open(folder / "populations", "a") as log:
        log.write(f"{len(units)}\n")
    fits = units[0].spec.get("fits", 10**9)
    if len(units) > fits:
        raise ERRORS[units[0].spec.get("unfit", "gpu memory")]
    return [one(context, unit, family) for unit, family in zip(units, parents, strict=True)]


class FakeUnit(Unit):
    """A unit whose class is looked up in this module wherever it is read."""


FAKES = {"fake": Stage("fake", 1, one),
         "fakes": Stage("fakes", 1, lambda c, u, p: many(c, [u], [p])[0], many=many, group=lambda unit, device: "all")}
if multiprocessing.parent_process() is not None:  # in a worker; tests register them for as long as they last
    STAGES.update(FAKES)


def fake(folder: Path, label: str, do: str = "make", *, stage: str = "fake", parents=(), cost: float = 1.0, **spec) -> Unit:
    """A unit that does ``do``: make, wait, kill, or one of :data:`ERRORS` (``times`` times)."""
    return FakeUnit(stage, {"do": do, "folder": str(folder), "name": label, **spec}, {p.label: p for p in parents}, label, cost)
