"""The store: whole or not at all, found again by key, and every kind of damage noticed."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import dpkit
from dpkit.store import FORMAT, Missing, Store, key_for

ROOT = Path(dpkit.__file__).parents[1]
TENSORS = {"params/w": torch.arange(6.0).view(2, 3), "params/b": torch.tensor([1.5]), "mask/w": torch.tensor([True, False]),
           "step": torch.tensor(3)}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def add(store, number=0, parents=None, **options):
    """Put a small artifact; returns its key."""
    spec, parents = {"number": number, "rate": 0.5}, parents or {}
    key = key_for("test", 1, spec, parents)
    settings = {"tensors": TENSORS, "result": {"error": 0.25 + number}, "seconds": 1.23456, "label": f"artifact {number}"}
    store.put(key, stage="test", version=1, spec=spec, parents=parents, **(settings | options))
    return key


def entries(store):
    """Every file of a store but its marker, by path, with its bytes."""
    return {str(p.relative_to(store.root)): p.read_bytes() for p in store.root.rglob("*")
            if p.is_file() and p.name != "format.json"}


# --- keys ---
def test_keys_follow_everything_and_nothing_else():
    base = ("fit", 1, {"a": 1.0, "b": [1, 2]}, {"x": "k1", "y": "k2"})
    key = key_for(*base)
    assert key == key_for("fit", 1, {"b": (1, 2), "a": 1.0}, {"y": "k2", "x": "k1"})
    assert len(key) == 64
    others = [("fit2", *base[1:]), ("fit", 2, *base[2:]), (*base[:2], {"a": 2.0, "b": [1, 2]}, base[3]),
              (*base[:2], {"a": 1.0, "b": [2, 1]}, base[3]), (*base[:3], {"x": "k2", "y": "k1"}), (*base[:3], {"x": "k1"})]
    assert len({key, *(key_for(*other) for other in others)}) == 7
    # what is recorded in stores that exist
    assert key_for("network", 1, {"lr": 0.1}, {}) == "1453cb38d0d80e2eba1f508ce83136658a135ce4100ce8b71352cf5888af793d"


# --- writing and reading ---
def test_what_is_put_comes_back(store):
    key = add(store, result={"error": 0.25, "curve": [1, 2.5], "stable": True, "nothing": None})
    assert store.has(key)
    found = Store(store.root).get(key)
    assert found.result == {"error": 0.25, "curve": [1, 2.5], "stable": True, "nothing": None}
    assert found.failed is None
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[n], t) and found.tensors[n].dtype == t.dtype for n, t in TENSORS.items())
    assert found.group("params").keys() == {"w", "b"}
    assert found.meta["spec"] == {"number": 0, "rate": 0.5}
    assert found.meta["seconds"] == 1.235
    assert {"commit", "torch", "processor", "cores"} <= found.meta["machine"].keys()
    assert list(store.keys()) == [key]
    assert list(store.verify()) == []


def test_views_and_gradients_are_stored_as_plain_tensors(store):
    leaf = torch.arange(6.0).view(2, 3).requires_grad_()
    key = add(store, tensors={"turned": leaf.t(), "rows": leaf[1:]})
    assert torch.equal(store.get(key).tensors["turned"], leaf.detach().t())
    assert torch.equal(store.get(key).tensors["rows"], leaf.detach()[1:])


def test_a_failure_is_kept_with_its_reason(store):
    key = add(store, tensors={}, result={}, failed="diverged at step 3")
    assert store.get(key).failed == "diverged at step 3"
    assert store.get(key).tensors == {}


def test_a_missing_artifact_says_how_to_make_it(store):
    with pytest.raises(Missing, match=r"artifact 000000000000 is not in .*; make it with `dpkit compute`"):
        store.get("0" * 64)
    assert not store.has("0" * 64)


def test_what_is_there_first_stays(store):
    key = add(store)
    before = entries(store)
    add(store, result={"error": 99.0})
    assert entries(store) == before
    assert store.get(key).result["error"] == 0.25


def test_two_writers_of_one_key_leave_one_whole_artifact(store):
    barrier, keys, errors = threading.Barrier(4), [], []

    def write(number):
        try:
            mine = Store(store.root)
            barrier.wait()
            keys.append(add(mine, result={"writer": number}))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(keys)) == 1
    assert store.get(keys[0]).result["writer"] in range(4)
    assert list(store.verify()) == []
    assert len(entries(store)) == 2  # nothing left over


def test_a_writer_that_comes_second_takes_what_is_there(store, monkeypatch):
    first = Store(store.root)
    key = add(first)
    monkeypatch.setattr(Store, "has", lambda self, key: calls.append(key) or len(calls) > 1)
    calls = []  # the first question is answered "no", as if the other had not yet finished
    add(store, result={"error": 99.0})
    assert store.get(key).result["error"] == 0.25
    assert len(entries(store)) == 2


KILL = """
import os, sys, torch
from pathlib import Path
import dpkit.store as room
store = room.Store(sys.argv[1])
moment = sys.argv[2]
def die(*_, **__):
    os._exit(9)
def half(tensors, path):
    Path(path).write_bytes(b"half a file")
    os._exit(9)
if moment == "tensors":
    room.save_file = half
elif moment == "description":
    room._write = die
elif moment == "rename":
    room.os.rename = die
else:
    room.save_file = half
    store.save_partial("a" * 64, {"step": torch.tensor(2)})
store.put("a" * 64, stage="s", version=1, spec={}, parents={}, tensors={"x": torch.ones(3)}, result={}, seconds=1)
"""


@pytest.mark.parametrize("moment", ["tensors", "description", "rename", "partial"])
def test_a_kill_in_the_middle_leaves_nothing_half(store, moment):
    store.save_partial("a" * 64, {"step": torch.tensor(1)})
    killed = subprocess.run([sys.executable, "-c", KILL, str(store.root), moment], cwd=ROOT, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    again = Store(store.root)
    assert not again.has("a" * 64)
    assert list(again.keys()) == []
    assert list(again.verify()) == []
    assert int(again.load_partial("a" * 64)["step"]) == 1
    add(again)
    assert len(list(again.keys())) == 1


# --- checkpoints ---
def test_a_checkpoint_is_replaced_in_one_step_and_goes_with_the_result(store):
    key = key_for("test", 1, {"number": 0, "rate": 0.5}, {})
    assert store.load_partial(key) is None
    store.save_partial(key, {"step": torch.tensor(1)})
    with open(store.partial(key), "rb") as reader:
        before = reader.read()
        store.save_partial(key, {"step": torch.tensor(2), "w": torch.ones(3)})
        reader.seek(0)
        assert reader.read() == before  # the old file is whole until the new one is
    assert int(store.load_partial(key)["step"]) == 2
    assert len(list((store.root / "partial").iterdir())) == 1
    assert add(store) == key
    assert store.load_partial(key) is None
    assert list((store.root / "partial").iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(store, monkeypatch):
    store.save_partial("a" * 64, {"step": torch.tensor(1)})

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("dpkit.store.save_file", full)
    with pytest.raises(OSError, match="no space"):
        store.save_partial("a" * 64, {"step": torch.tensor(2)})
    assert int(store.load_partial("a" * 64)["step"]) == 1
    assert len(list((store.root / "partial").iterdir())) == 1


def test_an_unreadable_checkpoint_is_no_checkpoint(store):
    store.save_partial("a" * 64, {"step": torch.tensor(1)})
    store.partial("a" * 64).write_bytes(b"garbage")
    assert store.load_partial("a" * 64) is None


# --- looking things up ---
def test_a_key_is_found_by_its_beginning(store):
    keys = [add(store, n) for n in range(3)]
    for key in keys:
        assert store.find(key[:10]) == key
        assert store.find(key) == key
    with pytest.raises(Missing, match=r"no artifact in .* has a key that begins with"):
        store.find("0123456")
    for bad in ("abc", "ABCDEF", "zzzzzz", ""):
        with pytest.raises(ValueError, match="at least 6 hexadecimal digits, got"):
            store.find(bad)
    twin = keys[0][:6] + "f" * 58
    shutil.copytree(store.path(keys[0]), store.path(twin))
    with pytest.raises(ValueError, match=f"2 keys begin with {keys[0][:6]}; give more digits"):
        store.find(keys[0][:6])


def test_lineage_walks_back_to_every_ancestor_once(store):
    data = add(store, 0)
    left, right = add(store, 1, {"data": data}), add(store, 2, {"data": data})
    last = add(store, 3, {"b": right, "a": left})
    found = list(store.lineage(last))
    assert [(depth, role, a.key) for depth, role, a in found] == [
        (0, "result", last), (1, "a", left), (2, "data", data), (1, "b", right)]


# --- opening ---
def test_a_newer_or_damaged_or_foreign_folder_is_refused(tmp_path):
    Store(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "format.json").read_text()) == {"format": FORMAT}
    Store(tmp_path / "a")  # and again
    for text, line in (('{"format": 99}', "has format 99, this dpkit reads up to 1; update dpkit"),
                       ("{", "unreadable format.json"), ('{"format": null}', "unreadable format.json")):
        (tmp_path / "a" / "format.json").write_text(text)
        with pytest.raises(ValueError, match=line):
            Store(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not a store .* use another folder"):
        Store(tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["notes.txt"]
    with pytest.raises(ValueError, match=r"notes.txt is not a store \(it is a file\)"):
        Store(tmp_path / "b" / "notes.txt")


def test_a_store_may_be_opened_while_another_process_makes_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".format.json.0123").write_text("")  # the other's marker, not yet renamed
    assert list(Store(tmp_path / "a").keys()) == []
