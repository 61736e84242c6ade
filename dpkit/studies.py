"""Running a whole study: requests for each notebook, the workflow that executes them, and the record of what was run."""
from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkit import __version__, cores, data, notebooks, project, stages
from dpkit.stages.forecast import free_memory
from dpkit.store import Store, machine

SNAKEFILE = Path(__file__).parent / "workflow" / "Snakefile"
NOTEBOOK_MEMORY = 1e9  # bytes of a kernel and of the process that runs it; 0.7e9 on the built-in images, 1.1e9 on CIFAR-10
TOGETHER = "artifacts"  # what the progress line of the job that computes for all notebooks begins with


def library_digest() -> str:
    """SHA-256 of the library's own source and profiles: a chapter is executed again when it changes."""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".yml") or path.name == "Snakefile":
            text.update(path.relative_to(Path(__file__).parent).as_posix().encode() + path.read_bytes())
    return text.hexdigest()


def side_by_side(workers: int = 0) -> int:
    """How many notebooks are executed at once: one a core (or ``workers``), fewer where memory is short.

    The last one comes after the others.
    """
    free = free_memory()
    room = len(notebooks.sources()) if free is None else int(free / NOTEBOOK_MEMORY)
    return max(1, min(workers or cores.available(), len(notebooks.sources()) - 1, room))


def _write_if_changed(path: Path, text: str) -> None:
    """Leave the file's time alone when nothing changed: the workflow goes by times."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def run(profile: str, settings: Mapping[str, Any], *, out: Path | None = None, shares: int = 1, workers: int = 0,
        device: str = "auto", snakemake: Sequence[str] = ()) -> Path:
    """Run every notebook of a profile through the workflow; returns the folder of the executed notebooks.

    shares: jobs that each chapter is split into. With 1, everything that is missing is computed first and the notebooks are then
    executed side by side (:func:`side_by_side`). workers: processes on a CPU (0: one a core). snakemake: further options for it.
    Raises ``ValueError`` on a bad setting before anything is written, and ``notebooks.Failed`` with one line when a
    notebook fails. What is finished stays; the next call continues.
    """
    study = stages.load_study(profile, settings)
    stages.choose_device(device)
    data.load(study.data, project.data_folder())  # a missing file is better found now than in the first notebook
    Store(project.store_folder())  # and so is a store from a newer version
    out = (out or project.run_folder(profile)).resolve()
    # one working folder for each combination of settings, so that two studies never mix their stamps
    name = hashlib.sha256(json.dumps([study.to_dict(), str(out)]).encode()).hexdigest()[:12]
    work = project.root() / "results" / "runs" / f"{project.profile_name(profile)}-{name}"
    store = project.store_folder().resolve()
    claims = project.root() / "book" / "claims.yml"
    if profile.endswith((".yml", ".yaml")):
        profile = str(Path(profile).resolve())  # jobs start in another folder
    parameters = {"profile": profile, "overrides": dict(settings), "store": str(store), "out": str(out), "workers": workers,
                  "device": device}
    behind = {"library": library_digest(), "claims": hashlib.sha256(claims.read_bytes()).hexdigest()}
    for stem, path in notebooks.sources().items():
        request = {"parameters": parameters, "notebook": notebooks.digest(path)} | behind
        asked, done = work / f"{stem}.request.json", work / f"{stem}.done"
        _write_if_changed(asked, json.dumps(request, indent=1, sort_keys=True))
        if not (out / f"{stem}.ipynb").is_file() or not _newer(done, asked):
            done.unlink(missing_ok=True)
    for path in (work / "artifacts.done", work / "progress.json", *work.glob("*.running")):
        path.unlink(missing_ok=True)  # of a run before
    # Named here, as Snakemake executes all that wait for a job that runs, and that of the artifacts runs if any notebook does.
    pending = [stem for stem in notebooks.sources() if not (work / f"{stem}.done").is_file()]
    request = {"notebooks": list(notebooks.sources()), "out": str(out), "work": str(work), "shares": shares,
               "chapters": _chapters(), "pending": pending, "parameters": parameters}
    _write_if_changed(work / "study.json", json.dumps(request))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--directory", str(work),
               "--cores", str(side_by_side(workers) if shares == 1 else 1), "--rerun-triggers", "mtime", "--rerun-incomplete",
               "--nolock", "--quiet", "all", "--config", f"request={work / 'study.json'}", *snakemake]
    code, errors = _watched(command, work)
    if code:
        raise notebooks.Failed(errors or f"the workflow ended with status {code}; its log is under {work / '.snakemake'}")
    _write_if_changed(out / "provenance.json", json.dumps(provenance(profile, study, out), indent=1, sort_keys=True))
    return out


def _newer(path: Path, other: Path) -> bool:
    return path.is_file() and path.stat().st_mtime_ns >= other.stat().st_mtime_ns


def _chapters() -> list[str]:
    """The chapters whose artifacts the notebooks show, which their names say; the verdicts need all."""
    shown = [stem.split("-", 1)[1] for stem in notebooks.sources()]
    return [name for name in stages.CHAPTERS if name in shown or "verdicts" in shown]


def _watched(command: list[str], work: Path) -> tuple[int, str]:
    """Run the workflow, show its progress, and return its status and the line that a job complained with."""
    # in the working folder: a job may run on another machine that shares it
    environment = os.environ | {"DPKIT_PROGRESS": str(work / "progress.json"), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, cwd=project.root(), env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    stop = threading.Event()
    shower = threading.Thread(target=_show, args=(work, stop), daemon=True)
    shower.start()
    lines = []
    try:
        for text in process.stdout:
            lines.append(text.rstrip())
        code = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        stop.set()
        shower.join(timeout=2)
        (work / "progress.json").unlink(missing_ok=True)
    return code, _complaint(lines) if code else ""


def _complaint(lines: Sequence[str]) -> str:
    """The line that says why a workflow failed: of failed notebooks the first in reading order, else what a job said last."""
    said = [text.removeprefix("dpkit: ") for text in lines if text.startswith("dpkit: ")]
    failed = sorted(text for text in said if text.startswith("notebook "))
    if failed or said:
        return failed[0] if failed else said[-1]
    return next((text for text in lines if re.search(r"error|exception", text, re.IGNORECASE)), "")


def _show(work: Path, stop: threading.Event) -> None:
    """Repeat the progress line on standard error whenever it changes, at most once a second (ten where nobody watches)."""
    last = ""
    terminal = sys.stderr.isatty()
    while not stop.wait(1.0 if terminal else 10.0):
        text = _line(work)
        if text and text != last:
            print(f"\r\x1b[2K{text}"[:160] if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
            last = text
    if terminal and last:
        print(file=sys.stderr)


def _line(work: Path) -> str:
    """How far a study is: what is computed for all notebooks together, then how many are executed and which are being so.

    What a notebook itself computes, as its share or because it failed before, is said as its own. Empty before anything runs.
    """
    names = list(notebooks.sources())
    done = sum((work / f"{name}.done").is_file() for name in names)
    try:
        computed = json.loads((work / "progress.json").read_text(encoding="utf-8"))["line"]
    except (OSError, ValueError):
        computed = ""
    if computed and not computed.startswith(TOGETHER):
        return f"notebook {min(done + 1, len(names))} of {len(names)}, {computed}"
    running = [name for name in names if (work / f"{name}.running").is_file()]
    if running or (work / "artifacts.done").is_file():
        return f"notebooks: {done} of {len(names)} executed" + (f"  [{'; '.join(running)}]" if running else "")
    return computed


def provenance(profile: str, study: stages.Study, out: Path) -> dict[str, Any]:
    """What a folder of executed notebooks was made with, so that it can be told when it has gone stale."""
    return {"profile": project.profile_name(profile), "settings": study.to_dict(), "dpkit": __version__,
            "notebooks": {stem: notebooks.digest(path) for stem, path in notebooks.sources().items()},
            "stages": {name: found.version for name, found in sorted(stages.STAGES.items())},
            "machine": {k: v for k, v in machine().items() if k != "commit"}}


def stale(folder: Path) -> list[str]:
    """Why the recorded results in ``folder`` no longer follow from the sources; empty when they still do."""
    record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    reasons = []
    for stem, path in notebooks.sources().items():
        if record["notebooks"].get(stem) != notebooks.digest(path):
            reasons.append(f"notebook {stem} has changed since")
        if not (folder / f"{stem}.ipynb").is_file():
            reasons.append(f"the executed {stem} is missing")
    now = {name: found.version for name, found in stages.STAGES.items()}
    reasons += [f"stage {name} is now version {now.get(name)}, recorded with {version}"
                for name, version in record["stages"].items() if now.get(name) != version]
    if record["profile"] in stages.profiles():
        settings = stages.load_study(record["profile"], {"dataset": record["settings"]["dataset"]}).to_dict()
        reasons += [f"{name} of profile {record['profile']} is now {settings.get(name)!r}, recorded with {value!r}"
                    for name, value in record["settings"].items() if settings.get(name) != value]
    return reasons
