"""The store: artifacts on disk under keys that say what made them.

An artifact is a folder ``KEY[:2]/KEY`` with ``tensors.safetensors`` and ``meta.json``. The key is SHA-256 over the stage, its
version, the canonical specification (defaults included) and the parents' keys, so "it exists" means "it is what you ask
for", equal requests share work, and stores of several machines merge by copying. A folder appears by one rename, complete,
or not at all.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpkit.spec import canonical_json

FORMAT = 1
MISSING_PARENT = "it lacks its parent"


class Missing(LookupError):
    """An artifact that is not in the store; the message says how to make it."""


class Damaged(ValueError):
    """An artifact whose files are not the ones that were written."""


def key_for(stage: str, version: int, spec: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """The key (64 hexadecimal digits) of the artifact that ``stage`` makes from ``spec`` and its parents' keys."""
    text = canonical_json({"stage": stage, "version": version, "spec": spec, "parents": parents})
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """One stored result. meta: the facts of ``meta.json``; tensors: read from disk at first use."""

    key: str
    path: Path
    meta: dict = field(repr=False)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        try:
            return load_file(str(self.path / "tensors.safetensors"))
        except (SafetensorError, OSError) as error:
            raise Damaged(f"artifact {self.key[:12]} cannot be read ({error}); delete {self.path} and compute it again") from None

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named ``prefix/NAME``, by NAME."""
        return {n[len(prefix) + 1:]: t for n, t in self.tensors.items() if n.startswith(prefix + "/")}

    @property
    def failed(self) -> str | None:
        """Why this artifact has no result (a diverged network, a failed parent), or None."""
        return self.meta.get("failed")

    @property
    def result(self) -> dict:
        """The plain numbers that the stage measured."""
        return self.meta["result"]


@lru_cache(maxsize=1)
def machine() -> dict:
    """Where and with what code results are made: processor, cores, versions, commit."""
    commit = "unknown"
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True,
                               text=True, timeout=10)
        if found.returncode == 0:
            commit = found.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    return {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
            "processor": processor, "cores": os.cpu_count(),
            "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}


class Store:
    """A folder of artifacts. Raises ``ValueError`` when it was written by a newer version of the format."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        marker = self.root / "format.json"
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is not a store (it is a file); use a folder")
        if not marker.exists():
            # another process may be making the same store: its marker is there at the latest when anything else is
            foreign = self.root.exists() and any(not p.name.startswith(".format.json") for p in self.root.iterdir())
            if foreign and not marker.exists():
                raise ValueError(f"{self.root} is not a store (it has files but no format.json); use another folder")
            self.root.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                _write(marker, canonical_json({"format": FORMAT}))
        _check_format(marker, f"store {self.root}")

    # --- reading ------------------------------------------------------------------------------------------------------
    def path(self, key: str) -> Path:
        """The folder of the artifact with this key, whether it exists or not."""
        return self.root / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether the artifact is there, complete."""
        return (self.path(key) / "meta.json").is_file()

    def get(self, key: str) -> Artifact:
        """The artifact; raises :class:`Missing`, or :class:`Damaged` when its description is not readable."""
        path = self.path(key)
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if not isinstance(meta, dict):
                raise ValueError("not a description")
            return Artifact(key, path, meta)
        except FileNotFoundError:
            raise Missing(f"artifact {key[:12]} is not in {self.root}; make it with `dpkit compute` or `dpkit study`") from None
        except ValueError:
            raise Damaged(f"artifact {key[:12]} has an unreadable meta.json; delete {path} and compute it again") from None

    def keys(self) -> Iterator[str]:
        """All keys, sorted."""
        for folder in sorted(self.root.glob("[0-9a-f][0-9a-f]/*/meta.json")):
            yield folder.parent.name

    def find(self, prefix: str) -> str:
        """The one key that begins with ``prefix`` (at least 6 digits); raises ``Missing`` or ``ValueError``."""
        if len(prefix) < 6 or any(c not in "0123456789abcdef" for c in prefix):
            raise ValueError(f"a key is at least 6 hexadecimal digits, got {prefix!r}")
        found = [p.parent.name for p in self.root.glob(f"{prefix[:2]}/{prefix}*/meta.json")]
        if not found:
            raise Missing(f"no artifact in {self.root} has a key that begins with {prefix}")
        if len(found) > 1:
            raise ValueError(f"{len(found)} keys begin with {prefix}; give more digits")
        return found[0]

    def lineage(self, key: str) -> Iterator[tuple[int, str, Artifact]]:
        """The artifact and all its ancestors as (depth, role, artifact), each once, parents after children."""
        seen, stack = set(), [(0, "result", key)]
        while stack:
            depth, role, current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            artifact = self.get(current)
            yield depth, role, artifact
            stack += [(depth + 1, name, parent) for name, parent in sorted(artifact.meta["parents"].items(), reverse=True)]

    # --- writing ------------------------------------------------------------------------------------------------------
    def put(self, key: str, *, stage: str, version: int, spec: Mapping, parents: Mapping[str, str],
            tensors: Mapping[str, Tensor], result: Mapping, seconds: float, label: str = "", failed: str | None = None,
            extra: Mapping | None = None) -> Artifact:
        """Write an artifact whole. If another process wrote the same key first, its artifact stays and is returned."""
        path = self.path(key)
        if self.has(key):
            return self.get(key)
        temporary = self.root / "tmp" / f"{key[:12]}-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        try:
            file = temporary / "tensors.safetensors"
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(file))
            _sync(file)
            meta = {"key": key, "stage": stage, "version": version, "spec": dict(spec), "parents": dict(parents), "label": label,
                    "result": dict(result), "failed": failed, "seconds": round(seconds, 3), "machine": machine(),
                    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "sha256": _digest(file), **(extra or {})}
            meta["meta_sha256"] = _description_digest(meta)
            _write(temporary / "meta.json", json.dumps(meta, indent=1, sort_keys=True))
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(temporary, path)
            except OSError:
                if not self.has(key):
                    raise
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.partial(key).unlink(missing_ok=True)
        return self.get(key)

    def partial(self, key: str) -> Path:
        """Where an unfinished computation of this key keeps its last checkpoint."""
        return self.root / "partial" / f"{key}.safetensors"

    def save_partial(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint of ``key`` in one step."""
        target = self.partial(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{key}-{uuid.uuid4().hex}.tmp")
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(temporary))
            _sync(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def load_partial(self, key: str) -> dict[str, Tensor] | None:
        """The checkpoint of ``key``, or None when there is none or it cannot be read."""
        try:
            return load_file(str(self.partial(key)))
        except (SafetensorError, OSError):
            return None

    # --- care ---------------------------------------------------------------------------------------------------------
    def verify(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, str]]:
        """(key, complaint) for each artifact whose bytes, key or parents are not right."""
        for key in self.keys() if keys is None else keys:
            try:
                artifact = self.get(key)
                meta = artifact.meta
                if _digest(artifact.path / "tensors.safetensors") != meta["sha256"]:
                    yield key, "its tensors are not the bytes that were written"
                elif _description_digest(meta) != meta.get("meta_sha256", _description_digest(meta)):
                    yield key, "its description is not the one that was written"
                elif key_for(meta["stage"], meta["version"], meta["spec"], meta["parents"]) != key:
                    yield key, "its description does not give its key"
                else:
                    absent = [name for name, parent in meta["parents"].items() if not self.has(parent)]
                    if absent:
                        yield key, f"{MISSING_PARENT} {absent[0]}"
            except (Missing, Damaged, KeyError, TypeError, AttributeError, OSError) as error:
                yield key, f"it cannot be read ({error})"

    def pack(self, file: str | Path, keys: Iterable[str] | None = None) -> int:
        """Write the artifacts (default all) to one uncompressed tar file, whole or not at all; returns how many."""
        file, keys = Path(file), list(self.keys() if keys is None else keys)
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        index = json.dumps(keys).encode()  # a tar file that ends early between two members would look whole
        entry = tarfile.TarInfo("index.json")
        entry.size = len(index)
        try:
            with tarfile.open(temporary, "w") as archive:
                archive.addfile(entry, io.BytesIO(index))
                archive.add(self.root / "format.json", "format.json")
                for key in keys:
                    archive.add(self.path(key), f"{key[:2]}/{key}")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        return len(keys)

    def unpack(self, file: str | Path) -> int:
        """Add the artifacts of a packed file; each is checked before it appears. Returns how many were new."""
        staging, count = self.root / "tmp" / f"unpack-{uuid.uuid4().hex}", 0
        try:
            try:
                with tarfile.open(file) as archive:
                    archive.extractall(staging, filter="data")
            except FileNotFoundError:
                raise ValueError(f"packed store {file} does not exist") from None
            except (tarfile.TarError, EOFError, OSError) as error:
                reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
                raise ValueError(f"packed store {file} cannot be read ({reason}); pack it again") from None
            if not (staging / "format.json").is_file():
                raise ValueError(f"{file} is not a packed store (no format.json in it)")
            _check_format(staging / "format.json", f"packed store {file}")
            incoming = Store(staging)
            new = sorted(set(incoming.keys()) - set(self.keys()))
            index = staging / "index.json"
            if index.is_file() and len(absent := set(json.loads(index.read_text())) - set(incoming.keys())):
                raise ValueError(f"packed store {file} is cut off ({len(absent)} artifacts are not in it); pack it again")
            for key, text in incoming.verify(new):  # all of them before the first one is added
                if not text.startswith(MISSING_PARENT):
                    raise ValueError(f"packed store {file}: artifact {key[:12]}: {text}; pack it again")
            for key in new:
                self.path(key).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.rename(incoming.path(key), self.path(key))
                    count += 1
                except OSError:
                    if not self.has(key):  # another process may have added it
                        raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return count


def _check_format(marker: Path, name: str) -> None:
    """Raise ``ValueError`` unless the marker says a format that this version reads."""
    try:
        version = int(json.loads(marker.read_text(encoding="utf-8"))["format"])
    except (ValueError, KeyError, TypeError, OSError):
        raise ValueError(f"{name} has an unreadable format.json; restore it or use another one") from None
    if version > FORMAT:
        raise ValueError(f"{name} has format {version}, this dpkit reads up to {FORMAT}; update dpkit or use another one")


def _description_digest(meta: Mapping) -> str:
    """SHA-256 of a description without its own digest, as it reads after a round trip through JSON."""
    plain = json.loads(json.dumps({name: value for name, value in meta.items() if name != "meta_sha256"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    """Write a text file in one step."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
