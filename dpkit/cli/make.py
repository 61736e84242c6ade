"""Commands that make things: studies, single notebooks, artifacts without notebooks, the book, timings."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dpkit.cli import foresee
from dpkit.cli.shared import Device, Profile, Settings, Workers, open_store, out, plan_of, settings_of, short

app = typer.Typer()


@app.command()
def study(profile: Profile = "quick", set: Settings = None, out_folder: Annotated[Path | None, typer.Option(
        "--out", help="folder for executed notebooks, figures and numbers (default book/runs/PROFILE)")] = None,
        shares: Annotated[int, typer.Option(help="split each chapter into so many jobs, for a cluster", min=1)] = 1,
        workers: Workers = 0, device: Device = "auto",
        snakemake: Annotated[list[str] | None, typer.Argument(help="after --: options for Snakemake")] = None) -> None:
    """Run all notebooks of a profile through the workflow. What exists is not computed again."""
    from dpkit import stages, studies

    plan = plan_of(profile, settings_of(set))
    chosen, store = stages.choose_device(device), open_store()
    expected = foresee.of_study(store, plan, chosen, workers)
    foresee.announce(store, expected)
    started = time.monotonic()
    try:
        folder = studies.run(profile, settings_of(set), out=out_folder, shares=shares, workers=workers, device=device,
                             snakemake=snakemake or [])
    finally:
        expected.record(store, time.monotonic() - started)
    out.print(f"executed notebooks, figures and numbers: {short(folder)}")


@app.command()
def run(notebook: Annotated[str, typer.Argument(help="a notebook's name, such as 03-tickets")],
        parameter: Annotated[list[str] | None, typer.Option("-p", metavar="NAME VALUE", hidden=True)] = None,
        output: Annotated[Path | None, typer.Option("--output", "-o", help="where the executed copy goes")] = None,
        request: Annotated[Path | None, typer.Option(hidden=True)] = None,
        share: Annotated[str, typer.Option(help="i/n: make only this part of the work")] = "1/1") -> None:
    """Execute one notebook with other parameters: dpkit run 03-tickets -p width 24 -p rounds 3

    Any parameter of the study may be given (`dpkit profiles` lists them), and profile, store, out, device, workers.
    """
    from dpkit import notebooks, project

    given: dict[str, Any] = json.loads(request.read_text())["parameters"] if request else {}
    for word in parameter or []:
        name, _, value = word.partition("=")
        given[name] = value
    if share != "1/1":
        given["share"] = share
    path = notebooks.find(notebook)
    target = output or project.root() / "results" / "executed" / path.name
    with _marked(request, path.stem) if request and share == "1/1" else nullcontext():
        out.print(short(notebooks.execute(notebook, given, target)))


@contextmanager
def _marked(request: Path, name: str) -> Iterator[None]:
    """While the workflow executes a notebook that shows what is made: a file that says so, and one thread for its kernel.

    Others are executed beside it, and threads that wait for one another's cores take many times as long.
    """
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    mark = request.with_name(f"{name}.running")
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


@app.command()
def compute(profile: Profile = "quick", set: Settings = None, chapter: Annotated[list[str] | None, typer.Option(
        help="only this chapter; repeatable")] = None, share: Annotated[str, typer.Option(help="i/n: only this part")] = "1/1",
        workers: Workers = 0, device: Device = "auto", request: Annotated[Path | None, typer.Option(hidden=True)] = None) -> None:
    """Make a profile's artifacts without notebooks, for a bare GPU box. Carry them home with `dpkit store pack`."""
    if request:
        _for_notebooks(json.loads(request.read_text(encoding="utf-8")))
    else:
        make_artifacts(profile, settings_of(set), chapter, share=share, workers=workers, device=device)


def make_artifacts(profile: str, settings: dict[str, Any], chapter: list[str] | None = None, *, share: str = "1/1",
                   workers: int = 0, device: str = "auto") -> None:
    """Make what the store lacks of a study's chapters (all, if None), and say what it will take and what came of it."""
    from dpkit import project, stages
    from dpkit.progress import duration, observer

    for name in chapter or []:
        if name not in stages.CHAPTERS:
            raise stages.unknown("chapter", name, stages.CHAPTERS)
    device, plan = stages.choose_device(device), plan_of(profile, settings)
    units = [u for name in chapter or stages.CHAPTERS for u in plan.share(name, share)]
    store = open_store()  # after all that may be wrong: nothing is written then
    left = stages.missing(store, units)
    out.print(f"{len(stages.closure(units))} units, {len(left)} to make, device {device}")
    foresee.announce(store, foresee.of_units(store, left, device, workers))
    started = time.monotonic()
    report = stages.compute(store, units, device=device, workers=workers, data_root=project.data_folder(),
                            observe=observer("compute"))
    out.print(f"made {len(report.made)} in {duration(time.monotonic() - started)}, "
              f"{len(report.failed)} without a result, {len(report.errors)} errors")
    for text in list(report.failed.values())[:5]:
        out.print(f"  no result: {escape(text)}")
    if report.errors:
        raise RuntimeError(f"{len(report.errors)} units ended in an error, the first: {next(iter(report.errors.values()))}; "
                           f"see {short(store.root / 'errors')}")


def _for_notebooks(request: dict[str, Any]) -> None:
    """Make what a study's notebooks show, as a job of the workflow.

    A unit that ends in an error is no error here: the notebook that needs it tries once more and shows what happened.
    """
    from dpkit import project, stages, studies
    from dpkit.progress import observer
    from dpkit.store import Store

    os.chdir(project.root())  # where kernels run, too: paths of data may be relative
    given = request["parameters"]
    plan = plan_of(given["profile"], given["overrides"])
    stages.compute(Store(Path(given["store"])), [u for name in request["chapters"] for u in plan.share(name)],
                   device=given["device"], workers=given["workers"], data_root=project.data_folder(),
                   observe=observer(studies.TOGETHER))


@app.command()
def book(profile: Profile = "quick", out_folder: Annotated[Path | None, typer.Option(
        "--out", help="build OUT/_build/html (default: the checkout)")] = None) -> None:
    """Build the HTML book from executed notebooks, warnings as errors, and say where it lies."""
    from dpkit import book as builder

    front = builder.build(profile, out_folder)
    out.print(f"the book: {short(front)}\n          {front.resolve().as_uri()}")
