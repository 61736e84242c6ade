"""Building the book: a staged copy of the sources and of one profile's executed notebooks, then Jupyter Book."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from dpkit import project
from dpkit.store import Missing


class Broken(ValueError):
    """The book cannot be built, or was built with a warning; the message says why."""


def check_notebook(path: Path) -> None:
    """Raise ``Broken`` unless the notebook is executed, not empty, and free of errors (Jupyter Book notices none of these)."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError):
        raise Broken(f"{path.name} is no whole notebook; execute it again with `dpkit study`") from None
    code = [c for c in cells if c["cell_type"] == "code"]
    if not any(c.get("outputs") for c in code):
        raise Broken(f"{path.name} has no outputs; execute it with `dpkit study`")
    for cell in code:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                raise Broken(f"{path.name} carries an error ({output['ename']}: {output['evalue']}); execute it again")


def stage(profile: str, target: Path) -> None:
    """Copy what the book is made of to ``target``, with the profile's notebooks where the table of contents has ``quick``'s."""
    root = project.root()
    executed = project.run_folder(profile)
    if not any(executed.glob("*.ipynb")):
        raise Missing(f"profile {profile} has no executed notebooks; make them with `dpkit study --profile {profile}`")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, target / name)
    shutil.copytree(root / "book", target / "book", ignore=shutil.ignore_patterns("runs", "__pycache__", ".*"))
    shutil.copytree(executed, target / "book" / "runs" / "quick", ignore=shutil.ignore_patterns(".*"))
    for path in (target / "book").rglob("*.ipynb"):
        check_notebook(path)


def build(profile: str = "quick", out: Path | None = None) -> Path:
    """Build the HTML book, warnings as errors, under ``out/_build/html``; returns its front page. Raises :class:`Broken`."""
    out = (out or project.root()).resolve()
    source = out / "_build" / "source"
    stage(profile, source)
    # jupyter_book 1 has no __main__; going through this interpreter needs no PATH
    program = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "build", str(source), "--path-output", str(out), "--all", "-W",
                           "--keep-going", "-q"], capture_output=True, text=True)
    front = out / "_build" / "html" / "index.html"
    if done.returncode or not front.is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line or "ERROR" in line]
        shown = "\n  ".join(lines[:20]) or (done.stderr or done.stdout).strip()[-2000:]
        raise Broken(f"the book was not built without warnings:\n  {shown}")
    return front
