"""Files for other programs: whole or not at all, and nothing that exists is lost."""
from __future__ import annotations

import os

import pytest

from dpkit.files import place


def test_files_are_placed_and_their_folders_made(tmp_path):
    wanted = {tmp_path / "a" / "one.json": b"1", tmp_path / "b" / "two.bin": b"22"}
    assert place(wanted) == list(wanted)
    assert {path: path.read_bytes() for path in wanted} == wanted
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["one.json", "two.bin"]


def test_what_exists_stays_unless_it_may_be_replaced(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ValueError, match="exists; choose another path, or allow it with overwrite"):
        place({tmp_path / "new": b"1", tmp_path / "x": b"2"})
    assert (tmp_path / "x").read_bytes() == b"old"
    assert not (tmp_path / "new").exists()
    place({tmp_path / "x": b"2"}, overwrite=True)
    assert (tmp_path / "x").read_bytes() == b"2"


def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
        place({tmp_path / "x": b"1"})
    assert list(tmp_path.iterdir()) == []
