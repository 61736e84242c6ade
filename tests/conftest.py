"""Fixtures for tests of the whole: a checkout of their own, so that nothing is left in this one, and one executed study."""
from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpkit import cli
from dpkit.store import Store

HERE = Path(__file__).resolve().parents[1]
NOT_OURS = ("DPKIT_STORE", "DPKIT_DATA", "DPKIT_PROGRESS")


def make_checkout(target: Path, *, recorded: bool = False) -> Path:
    """A copy of the book's sources and of the notebooks; the library takes the folder that it runs in as its checkout."""
    target.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(HERE / name, target / name)
    for name, left_out in (("notebooks", ()), ("book", ("runs",) if recorded else ("runs", "cifar10"))):
        shutil.copytree(HERE / name, target / name, ignore=shutil.ignore_patterns(*left_out, "__pycache__", ".*"))
    return target


def clean_environment() -> dict[str, str]:
    """The environment without what would point the library elsewhere."""
    return {name: value for name, value in os.environ.items() if name not in NOT_OURS}


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A fresh checkout, and the current folder."""
    for name in NOT_OURS:
        monkeypatch.delenv(name, raising=False)
    folder = make_checkout(tmp_path / "checkout")
    monkeypatch.chdir(folder)
    return folder


@dataclass(frozen=True)
class Answer:
    """What a call of the command gave: status, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def dpkit(monkeypatch, capsys) -> Callable[..., Answer]:
    """Call the command in this process, as its entry point does."""
    def call(*words: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["dpkit", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Answer(ended.value.code or 0, *capsys.readouterr())
    return call


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A checkout that the tests of one file share."""
    return make_checkout(tmp_path_factory.mktemp("shared") / "checkout")


@pytest.fixture
def here(root, monkeypatch) -> Store:
    """The store of that checkout, which is the current folder; some files have a ``here`` of their own."""
    for name in NOT_OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return Store(root / "results" / "store")


@dataclass(frozen=True)
class Smoke:
    """The smoke study, executed once for all test processes. root: its checkout."""

    root: Path

    @property
    def folder(self) -> Path:
        """Its executed notebooks, figures and numbers."""
        return self.root / "book" / "runs" / "smoke"

    @property
    def store(self) -> Path:
        """Its artifacts."""
        return self.root / "results" / "store"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other test processes out, while something is changed or copied."""
        with open(self.root.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Smoke:
    """Run ``dpkit study --profile smoke`` in a checkout of its own, once, however many processes share the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    found = Smoke(shared / "smoke" / "checkout")
    found.root.parent.mkdir(exist_ok=True)
    ready = found.root.parent / "ready"
    with found.alone():
        if not ready.exists():
            shutil.rmtree(found.root, ignore_errors=True)
            make_checkout(found.root, recorded=True)
            done = subprocess.run([sys.executable, "-m", "dpkit", "study", "--profile", "smoke"], cwd=found.root,
                                  env=clean_environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            ready.write_text(done.stdout, encoding="utf-8")
    return found


@pytest.fixture
def counted(monkeypatch):
    """Images of every forward pass in eval mode, pass by pass."""
    from dpkit import models

    seen, features = [], models.features

    def count(model, params, buffers, x):
        seen.append(len(x))
        return features(model, params, buffers, x)

    monkeypatch.setattr(models, "features", count)
    return seen
