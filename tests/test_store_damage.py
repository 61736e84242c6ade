"""Damaged artifacts are found, and packed stores arrive whole or not at all."""
from __future__ import annotations

import io
import json
import shutil
import tarfile

import pytest
from test_store import add, entries

from dpkit.store import Damaged, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# --- damage ---
def flip(file, place=-1):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def rewrite(store, key, change):
    file = store.path(key) / "meta.json"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))


DAMAGE = {
    "tensor byte": (lambda s, k: flip(s.path(k) / "tensors.safetensors"), "not the bytes that were written"),
    "tensors gone": (lambda s, k: (s.path(k) / "tensors.safetensors").unlink(), "it cannot be read"),
    "specification": (lambda s, k: rewrite(s, k, lambda m: m["spec"].update(rate=0.75)), "not the one that was written"),
    "result": (lambda s, k: rewrite(s, k, lambda m: m["result"].update(error=0.01)), "not the one that was written"),
    "field gone": (lambda s, k: rewrite(s, k, lambda m: m.pop("sha256")), "it cannot be read"),
    "no description": (lambda s, k: (s.path(k) / "meta.json").write_text("[1]"), "unreadable meta.json"),
    "cut description": (lambda s, k: (s.path(k) / "meta.json").write_text('{"key": '), "unreadable meta.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(store, kind):
    good, bad = add(store, 0), add(store, 1)
    damage, complaint = DAMAGE[kind]
    damage(store, bad)
    found = dict(store.verify())
    assert found.keys() == {bad}
    assert complaint in found[bad]
    assert list(store.verify([good])) == []


def test_an_artifact_under_a_foreign_key_or_without_its_parent_is_found(store):
    parent = add(store, 0)
    child = add(store, 1, {"network": parent})
    other = "ab" + "0" * 62
    shutil.copytree(store.path(child), store.path(other))
    assert dict(store.verify()) == {other: "its description does not give its key"}
    shutil.rmtree(store.path(other))
    shutil.rmtree(store.path(parent))
    assert dict(store.verify()) == {child: "it lacks its parent network"}


def test_reading_a_damaged_artifact_says_what_to_do(store):
    key = add(store)
    (store.path(key) / "tensors.safetensors").write_bytes(b"short")
    with pytest.raises(Damaged, match=r"cannot be read .*; delete .* and compute it again"):
        _ = store.get(key).tensors
    (store.path(key) / "meta.json").write_text("{")
    with pytest.raises(Damaged, match=r"unreadable meta\.json; delete"):
        store.get(key)


# --- carrying ---
def test_packed_artifacts_arrive_and_merge(store, tmp_path):
    parent = add(store, 0)
    child = add(store, 1, {"network": parent})
    assert store.pack(tmp_path / "all.tar") == 2
    other = Store(tmp_path / "other")
    mine = add(other, 7)
    assert other.unpack(tmp_path / "all.tar") == 2
    assert set(other.keys()) == {parent, child, mine}
    assert list(other.verify()) == []
    assert entries(other).items() >= entries(store).items()
    assert other.unpack(tmp_path / "all.tar") == 0
    assert store.pack(tmp_path / "one.tar", [child]) == 1  # without its parent: it may be there already
    third = Store(tmp_path / "third")
    assert third.unpack(tmp_path / "one.tar") == 1
    assert dict(third.verify()) == {child: "it lacks its parent network"}


def cut(file):
    file.write_bytes(file.read_bytes()[:-12_000])


def spoil(file, change):
    """Unpack by hand, change something, pack again."""
    folder = file.parent / "by hand"
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    change(folder)
    with tarfile.open(file, "w") as archive:
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name)


def last(folder, name):
    return sorted(folder.glob(f"*/*/{name}"))[-1]


def escape(file):
    with tarfile.open(file, "w") as archive:
        for name in ("format.json", "../outside.txt"):
            info = tarfile.TarInfo(name)
            info.size = 13
            archive.addfile(info, io.BytesIO(b'{"format": 1}'))


BAD_PACKS = {
    "cut": (cut, "cannot be read .*; pack it again"),
    "text": (lambda f: f.write_text("hello"), "cannot be read .*; pack it again"),
    "empty": (lambda f: f.write_bytes(b""), "cannot be read .*; pack it again"),
    "absent": (lambda f: f.unlink(), "does not exist"),
    "foreign": (lambda f: spoil(f, lambda d: (d / "format.json").unlink()), "is not a packed store"),
    "newer": (lambda f: spoil(f, lambda d: (d / "format.json").write_text('{"format": 2}')), "has format 2, this dpkit"),
    "byte": (lambda f: spoil(f, lambda d: flip(last(d, "tensors.safetensors"))), "not the bytes that were written"),
    "half": (lambda f: spoil(f, lambda d: last(d, "tensors.safetensors").unlink()), "it cannot be read"),
    "no parents": (lambda f: spoil(f, lambda d: last(d, "meta.json").write_text(json.dumps(
        {k: v for k, v in json.loads(last(d, "meta.json").read_text()).items() if k not in ("parents", "meta_sha256")}))),
        "it cannot be read"),
    "outside": (escape, "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_PACKS)
def test_a_bad_pack_is_refused_and_nothing_is_added(store, tmp_path, kind):
    for number in range(3):
        add(store, number)
    file = tmp_path / "all.tar"
    store.pack(file)
    damage, line = BAD_PACKS[kind]
    damage(file)
    other = Store(tmp_path / "other")
    add(other, 7)
    before = entries(other)
    with pytest.raises(ValueError, match=line) as caught:
        other.unpack(file)
    assert "\n" not in str(caught.value)
    assert entries(other) == before
    assert not (tmp_path / "outside.txt").exists()


def test_a_pack_cut_anywhere_is_refused(store, tmp_path):
    for number in range(2):
        add(store, number)
    store.pack(tmp_path / "all.tar")
    whole = (tmp_path / "all.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in [*range(0, end - 511, 512), end // 2 + 3]:  # also between two members, where tar sees nothing wrong
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        other = Store(tmp_path / "other")
        with pytest.raises(ValueError, match="packed store"):
            other.unpack(tmp_path / "cut.tar")
        assert entries(other) == {}


def test_a_pack_that_fails_leaves_no_file(store, tmp_path):
    add(store)
    with pytest.raises(FileNotFoundError):
        store.pack(tmp_path / "all.tar", ["0" * 64])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
