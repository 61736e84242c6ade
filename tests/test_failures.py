"""Memory that runs out, a process that is killed, a device that fails: what is finished stays, the rest is tried smaller."""
from __future__ import annotations

import contextlib
import threading
from multiprocessing import Pipe

import pytest
import torch
from fake_stages import FAKES, fake

from dpkit import cores
from dpkit.stages import STAGES, compute, pool, run
from dpkit.stages.execute import failure_kind
from dpkit.stages.unit import Context
from dpkit.store import Store


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The fake stages, for one test: others count what is registered."""
    for name, found in FAKES.items():
        monkeypatch.setitem(STAGES, name, found)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


class ThreadWorker(threading.Thread):
    """A worker in a thread, with what the pool asks of a process. A death ends it without an answer."""

    exitcode = -9

    def __init__(self, pipe, context):
        super().__init__(daemon=True)
        self.pipe, self.context = pipe, context

    def run(self):
        with contextlib.suppress(BaseException):
            pool.work(self.pipe, self.context)
        self.pipe.close()

    def terminate(self):
        pass


@pytest.fixture
def threads(store, monkeypatch):
    """Workers are threads: quick, and all that the pool knows of them comes through their pipes. Gives how many there were."""
    hired = []

    def hire(self):
        ours, theirs = Pipe()
        worker = ThreadWorker(theirs, Context(store))
        hired.append(worker)
        worker.start()
        return pool._Worker(worker, ours)

    monkeypatch.setattr(pool.Pool, "_hire", hire)
    return hired


def started(store, units, workers=2, population=1):
    """A run of the units in worker processes."""
    found = run._Run(store, run.missing(store, units), "cpu", "data", None)
    found.in_processes(workers, population)
    return found


def tries(folder, label):
    return len((folder / label).read_text().splitlines()) if (folder / label).exists() else 0


# --- several processes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("do, words", [("death", "its process was killed by signal 9 while computing this alone"),
                                       ("memory", "not enough memory to compute this alone"),
                                       ("allocator", "not enough memory to compute this alone")])
def test_a_unit_too_large_for_any_process_is_named_and_the_others_go_on(store, folder, threads, capsys, do, words):
    bad = fake(folder, "bad", do, **{"with": "slow"}, cost=9.0)
    slow = fake(folder, "slow", "wait", cost=5.0, **{"for": "bad"})
    below = fake(folder, "below", parents=[bad])
    good = [fake(folder, f"good {i}") for i in range(4)]
    report = started(store, [bad, slow, below, *good]).report
    assert sorted(report.made) == sorted(u.key for u in (slow, *good))
    assert list(report.errors) == [bad.key]
    assert report.errors[bad.key].startswith("bad: ")
    assert words in report.errors[bad.key]
    assert "lower batch_size, width" in report.errors[bad.key]
    assert tries(folder, "bad") == 2  # beside another, and alone
    assert tries(folder, "slow") == 1  # the other one was left alone
    assert tries(folder, "below") == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "while computing bad, most likely for want of memory; going on with 1 of 2 processes" in said[0]


def test_a_unit_that_dies_only_beside_others_is_made_alone(store, folder, threads):
    heavy = fake(folder, "heavy", "death", times=1, **{"with": "slow"}, cost=9.0)
    slow = fake(folder, "slow", "wait", cost=5.0, **{"for": "heavy"})
    found = started(store, [heavy, slow, *(fake(folder, f"good {i}") for i in range(3))])
    assert found.report.errors == {}
    assert len(found.report.made) == 5
    assert tries(folder, "heavy") == 2
    assert store.get(heavy.key).result == {"tries": 2}


def test_a_killed_process_costs_only_its_own_unit(store, folder, capsys, monkeypatch):
    monkeypatch.setattr(run, "SMALL", 0)
    bad, good = fake(folder, "bad", "kill", cost=9.0), [fake(folder, f"good {i}") for i in range(3)]
    report = compute(store, [bad, *good], device="cpu", workers=1)
    assert sorted(report.made) == sorted(u.key for u in good)
    assert "bad: its process was killed by signal 9 while computing this alone" in report.errors[bad.key]
    assert "killed by signal 9" in (store.root / "errors" / f"{bad.key}.txt").read_text()
    assert len({(folder / u.label).read_text() for u in good}) == 1  # one new process for all that was left


def test_an_error_in_one_unit_leaves_its_process_alone(store, folder, threads):
    bad, good = fake(folder, "bad", "error", cost=9.0), fake(folder, "good")
    report = started(store, [bad, good], workers=1).report
    assert report.made == [good.key]
    assert report.errors == {bad.key: "bad: ArithmeticError: no such luck"}
    assert len(threads) == 1


# --- a device that fails ----------------------------------------------------------------------------------------------

def test_a_device_error_is_tried_again_in_a_fresh_process_and_then_named(store, folder, threads, capsys):
    once, always = fake(folder, "once", "device", times=1, cost=9.0), fake(folder, "always", "device", cost=8.0)
    good = fake(folder, "good")
    report = started(store, [once, always, good], workers=1).report
    assert sorted(report.made) == sorted([once.key, good.key])
    assert "always: the device failed twice while computing this alone: RuntimeError: CUDA error" in report.errors[always.key]
    assert (tries(folder, "once"), tries(folder, "always")) == (2, 2)
    assert len(threads) == 4  # the first, and one after each failure
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("unfit", ["gpu memory", "device", "death"])
def test_a_population_that_fails_is_halved_until_it_fits(store, folder, threads, capsys, unfit):
    units = [fake(folder, f"unit {i}", stage="fakes", fits=3, unfit=unfit) for i in range(12)]
    report = started(store, units, workers=1, population=8).report
    assert report.errors == {}
    assert len(report.made) == 12
    assert (folder / "populations").read_text().split() == ["8", "4", "2", "2", "2", "2", "2", "2"]
    assert all(tries(folder, u.label) == 1 for u in units)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "with 8 networks at once; going on with 4" in said[0]


def test_an_error_in_a_population_is_pinned_to_its_unit(store, folder, threads):
    units = [fake(folder, f"unit {i}", "error" if i == 1 else "make", stage="fakes") for i in range(4)]
    report = started(store, units, workers=1, population=4).report
    assert list(report.errors) == [units[1].key]
    assert sorted(report.made) == sorted(u.key for i, u in enumerate(units) if i != 1)


def test_a_device_that_is_gone_names_everything_that_waits_for_it(store, folder):
    units = [fake(folder, "first"), fake(folder, "second")]
    below = fake(folder, "below", parents=units[:1])
    found = run._Run(store, run.missing(store, [*units, below]), "cuda:63", "data", None)
    found.in_processes(1, 4)
    assert found.report.made == []
    assert set(found.report.errors) == {u.key for u in units}
    for text in found.report.errors.values():
        assert "the device cuda:63 no longer answers" in text
        assert "the same command continues" in text


# --- in this process --------------------------------------------------------------------------------------------------

def test_in_this_process_a_population_is_halved_too_and_a_single_unit_named(store, folder, capsys):
    units = [fake(folder, f"unit {i}", "memory" if i == 0 else "make", stage="fakes", fits=2) for i in range(5)]
    found = run._Run(store, run.missing(store, units), "cpu", "data", None)
    found.here(8)
    assert sorted(found.report.made) == sorted(u.key for u in units[1:])
    assert "not enough memory to compute this alone; lower batch_size" in found.report.errors[units[0].key]
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("error, kind", [
    (MemoryError(), "memory"), (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), "memory"),
    (RuntimeError("CUDA error: out of memory"), "memory"), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "memory"),
    (RuntimeError("CUDA error: device-side assert triggered"), "device"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
    (getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure"), "device"),
    (RuntimeError("shapes do not fit"), "error"), (ValueError("out of memory"), "error"), (FloatingPointError("x"), "error"),
])
def test_what_kind_of_failure_an_error_is(error, kind):
    assert failure_kind(error) == kind


def test_workers_and_this_process_keep_their_memory(store, folder, monkeypatch):
    called = []
    monkeypatch.setattr(cores, "keep_memory", lambda: called.append(1))
    run._Run(store, run.missing(store, [fake(folder, "one")]), "cpu", "data", None).here(1)
    assert called == [1]
