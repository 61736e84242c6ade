"""Writing files for other programs: whole or not at all."""
from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path


def place(files: Mapping[Path, bytes], overwrite: bool = False) -> list[Path]:
    """Write ``files`` (path -> content), each by one rename after all of them are on the disk; returns the paths.

    The last one is the file that the others stand beside. Raises ``ValueError`` with one line where one exists and ``overwrite``
    is not set, and where one cannot be written; nothing half-written is left then.
    """
    taken = [path for path in files if path.exists()]
    if taken and not overwrite:
        raise ValueError(f"{taken[-1]} exists; choose another path, or allow it with overwrite")
    temporary = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in files}
    path = next(iter(files))
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        for path in files:
            os.replace(temporary[path], path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another path") from None
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
    return list(files)
