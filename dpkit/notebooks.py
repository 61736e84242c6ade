"""Running notebooks: find them, check parameters against what they declare, execute with papermill, write them whole."""
from __future__ import annotations

import ast
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkit import project
from dpkit.spec import parse
from dpkit.stages import FIELDS, load_study, parse_share, unknown

#: parameters of every notebook that are not parameters of the study
COMMON = ("profile", "overrides", "store", "share", "out", "device", "workers")


class Failed(RuntimeError):
    """A notebook stopped with an error; the message is one line, the executed copy lies under ``results/failed``."""


def sources() -> dict[str, Path]:
    """The notebooks of the study by name, in reading order."""
    return {path.stem: path for path in sorted((project.root() / "notebooks").glob("[0-9]*.ipynb"))}


def find(name: str) -> Path:
    """A notebook by name (``03-tickets``, ``tickets``) or path. Raises ``ValueError`` with the nearest name."""
    known = sources()
    short = {stem.split("-", 1)[1]: path for stem, path in known.items()}
    stem = Path(name).name.removesuffix(".ipynb")
    if stem in known or stem in short:
        return known.get(stem) or short[stem]
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name)
    raise unknown("notebook", name, known)


def declared(path: Path) -> dict[str, Any]:
    """The parameters that a notebook's ``parameters`` cell assigns, with their defaults."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cell = next((c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])), None)
    if cell is None:
        raise ValueError(f"notebook {path.name} has no cell tagged `parameters`; tag the cell that sets them")
    found = {}
    for node in ast.parse("".join(cell["source"])).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def parameters(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values for papermill. Parameters of the study that the notebook does not list go into its ``overrides``.

    Raises ``ValueError`` on a name that is neither, and on a value of the wrong type or out of range.
    """
    own, values, overrides = declared(path), {}, dict(given.get("overrides") or {})
    for name, value in given.items():
        if name == "overrides":
            continue
        if name in COMMON:
            values[name] = parse(name, value, int) if name == "workers" else value
        elif name in FIELDS:
            (values if name in own else overrides)[name] = parse(name, value, FIELDS[name])
        else:
            raise unknown("parameter", name, [*own, *FIELDS])
    study = {k: v for k, v in values.items() if k in FIELDS and v is not None}
    load_study(values.get("profile", own.get("profile", "smoke")), overrides | study)
    parse_share(values.get("share", "1/1"))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | {
        "overrides": {k: list(v) if isinstance(v, tuple) else v for k, v in overrides.items()}}


def digest(path: Path) -> str:
    """SHA-256 of what a notebook's author wrote: cell types and sources, not outputs or editor's metadata."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = json.dumps([[c["cell_type"], "".join(c["source"])] for c in cells])
    return hashlib.sha256(text.encode()).hexdigest()


def execute(name: str, given: Mapping[str, Any], output: Path) -> Path:
    """Execute a notebook with parameters and write the executed copy to ``output``, whole or not at all.

    Raises :class:`Failed` with one line when a cell fails; the copy that shows where is kept under ``results/failed``.
    """
    path = find(name)
    values = parameters(path, given)
    # only now: importing papermill takes a second and a bare machine does not have it
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.stem}-{uuid.uuid4().hex}.ipynb")
    try:
        os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning of the kernel's debugger
        papermill.execute_notebook(str(path), str(temporary), parameters=values, kernel_name="python3", cwd=str(project.root()),
                                   progress_bar=False, log_output=False)
        _clean(temporary)
        os.replace(temporary, output)
    except (papermill.PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
        kept = project.root() / "results" / "failed" / output.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            os.replace(temporary, kept)
        reason = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error).strip().splitlines()[-1]
        reason = (reason.strip().splitlines() or ["no reason given"])[0]
        raise Failed(f"notebook {path.stem} failed: {reason}; the executed copy is {kept}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return output


def _clean(path: Path) -> None:
    """Take execution times, standard error and machine paths out, so that equal results give equal files."""
    import nbformat

    book = nbformat.read(path, as_version=4)
    book.metadata.pop("papermill", None)
    for cell in book.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags = [*cell.metadata.tags, "hide-input"]
            cell.id = "injected-parameters"  # papermill draws one
            cell.source = cell.source.replace(str(project.root()) + os.sep, "")
    nbformat.write(book, path)
