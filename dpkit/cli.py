"""The command line: `dpkit --help` teaches, every error is one line, Ctrl-C stops cleanly."""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpkit import __version__

HELP = """Distilled pruning, reproduced: distillation, iterative magnitude pruning, linear mode connectivity, Hessians.

A study is a list of parameters. A profile sets them (smoke: seconds, quick: minutes, cifar10-small: an hour or two); --set
changes any of them. Every network, ticket, path and spectrum is an artifact in a store under a key that says what made it,
so a command that is stopped continues, and what exists is never computed again.

\b
  dpkit study --profile quick                               all notebooks, as `make book` does
  dpkit run 03-tickets -p width 24 -p rounds 3              one notebook with other parameters
  dpkit compute --profile cifar10-small --device cuda       the same artifacts without notebooks
  dpkit numbers --profile quick                             every number with n and interval
  dpkit lineage tickets.imp.accuracy@67 --profile quick     where a number comes from
"""

#: base of all usage errors, whichever of its versions' homes typer keeps it in
UsageProblem = typer.BadParameter.__mro__[2]

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  add_completion=False)
store_app = typer.Typer(help="Carry artifacts between machines.", no_args_is_help=True)
app.add_typer(store_app, name="store")
out = Console(soft_wrap=True, highlight=False)

Profile = Annotated[str, typer.Option("--profile", help="a profile's name (see `dpkit profiles`) or the path of a YAML file")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a parameter; repeatable")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda")]
Workers = Annotated[int, typer.Option(help="processes on a CPU; 0 is one a core", min=0)]


def settings_of(words: list[str] | None) -> dict[str, str]:
    """``key=value`` words as a dictionary."""
    found = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, got {word!r}")
        found[key.strip()] = value
    return found


def plan_of(profile: str, settings: dict[str, Any]):
    """The plan of a study; loads the data set, whose identity is part of every key."""
    from dpkit import data, project, stages

    study = stages.load_study(profile, settings)
    return stages.Plan(study, data.load(study.data, project.data_folder()).identity)


def open_store():
    """The store of this checkout."""
    from dpkit import project
    from dpkit.store import Store

    return Store(project.store_folder())


@app.command()
def study(profile: Profile = "quick", set: Settings = None, out_folder: Annotated[Path | None, typer.Option(
        "--out", help="folder for executed notebooks, figures and numbers (default book/runs/PROFILE)")] = None,
        shares: Annotated[int, typer.Option(help="split each chapter into so many jobs, for a cluster", min=1)] = 1,
        workers: Workers = 0, device: Device = "auto",
        snakemake: Annotated[list[str] | None, typer.Argument(help="after --: options for Snakemake")] = None) -> None:
    """Run all notebooks of a profile through the workflow. What exists is not computed again."""
    from dpkit import studies

    folder = studies.run(profile, settings_of(set), out=out_folder, shares=shares, workers=workers, device=device,
                         snakemake=snakemake or [])
    out.print(f"executed notebooks, figures and numbers: {_short(folder)}")


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
    out.print(_short(notebooks.execute(notebook, given, target)))


@app.command()
def compute(profile: Profile = "quick", set: Settings = None, chapter: Annotated[list[str] | None, typer.Option(
        help="only this chapter; repeatable")] = None, share: Annotated[str, typer.Option(help="i/n: only this part")] = "1/1",
        workers: Workers = 0, device: Device = "auto") -> None:
    """Make a profile's artifacts without notebooks, for a bare GPU box. Carry them home with `dpkit store pack`."""
    from dpkit import project, stages
    from dpkit.progress import duration, observer

    for name in chapter or []:
        if name not in stages.CHAPTERS:
            raise stages.unknown("chapter", name, stages.CHAPTERS)
    device, plan = stages.choose_device(device), plan_of(profile, settings_of(set))
    units = [u for name in chapter or stages.CHAPTERS for u in plan.share(name, share)]
    store = open_store()  # after all that may be wrong: nothing is written then
    if not chapter and share == "1/1":
        units += [entry.unit for entry in plan.searches()]
    left = stages.missing(store, units)
    out.print(f"{len(stages.closure(units))} units, {len(left)} to make, device {device}")
    started = time.monotonic()
    report = stages.compute(store, units, device=device, workers=workers, data_root=project.data_folder(),
                            observe=observer("compute"))
    out.print(f"made {len(report.made)} in {duration(time.monotonic() - started)}, "
              f"{len(report.failed)} without a result, {len(report.errors)} errors")
    for text in list(report.failed.values())[:5]:
        out.print(f"  no result: {escape(text)}")
    if report.errors:
        raise RuntimeError(f"{len(report.errors)} units ended in an error, the first: {next(iter(report.errors.values()))}; "
                           f"see {_short(store.root / 'errors')}")


@app.command()
def status(profile: Profile = "quick", set: Settings = None, workers: Workers = 0) -> None:
    """What of a profile is done, missing and failed, and how long the rest will take."""
    from dpkit import stages
    from dpkit.progress import duration
    from dpkit.stages.run import available_cores

    plan, store = plan_of(profile, settings_of(set)), open_store()
    table = Table("chapter", "units", "done", "missing", "no result", "errors", box=None)
    everything = {}
    for name in stages.CHAPTERS:
        units = stages.closure(e.unit for e in plan.chapter(name))
        everything |= units
        done = [k for k in units if store.has(k)]
        failed = sum(1 for k in done if store.get(k).failed)
        errors = sum(1 for k in units if not store.has(k) and (store.root / "errors" / f"{k}.txt").exists())
        table.add_row(name, str(len(units)), str(len(done)), str(len(units) - len(done)), str(failed), str(errors))
    out.print(table)
    left = sum(u.cost for k, u in everything.items() if not store.has(k))
    pace = _pace(store, everything)
    if not left:
        out.print("complete")
    elif pace is None:
        out.print("time left: unknown until a first unit is done")
    else:
        out.print(f"time left: about {duration(left * pace / (workers or available_cores()))} on this machine")
    for key, unit in everything.items():
        if store.has(key) and store.get(key).failed and "parent" not in store.get(key).failed:
            out.print(f"  no result: {escape(unit.label)}: {escape(store.get(key).failed)}")


def _pace(store, units) -> float | None:
    """Seconds for each unit of cost, from the artifacts of this plan that are done."""
    done = [(u.cost, store.get(k).meta["seconds"]) for k, u in units.items() if store.has(k)]
    work = sum(cost for cost, _ in done)
    return sum(seconds for _, seconds in done) / work if work else None


@app.command()
def verify() -> None:
    """Check every artifact's bytes, key and parents, and whether recorded results still follow from the sources."""
    from dpkit import project, studies

    store = open_store()
    count = len(list(store.keys()))
    wrong = list(store.verify())
    for key, complaint in wrong:
        out.print(f"{key[:12]}: {escape(complaint)}")
    stale = 0
    for folder in project.recorded_folders():
        reasons = studies.stale(folder)
        stale += bool(reasons)
        for reason in reasons:
            out.print(f"{_short(folder)}: stale, {escape(reason)}")
    out.print(f"{count} artifacts, {len(wrong)} wrong; {len(project.recorded_folders())} recorded results, {stale} stale")
    if wrong or stale:
        raise typer.Exit(1)


@app.command()
def lineage(name: Annotated[str, typer.Argument(metavar="KEY", help="a key's first digits, or a number's name")],
            profile: Profile = "quick", set: Settings = None,
            full: Annotated[bool, typer.Option("--full", help="all ancestors, not only three levels")] = False) -> None:
    """From a number or an artifact back to its parameters, seeds, parents, commit, machine and seconds."""
    store = open_store()
    key = _number_key(store, name, profile, settings_of(set)) if "." in name else store.find(name)
    for depth, role, artifact in store.lineage(key):
        if depth > 2 and not full:
            continue
        meta = artifact.meta
        machine = meta["machine"]
        seeds = {k: v for k, v in meta["spec"].items() if "seed" in k}
        out.print(f"{'  ' * depth}{role}: {escape(meta['label'] or meta['stage'])}  {artifact.key[:12]}  "
                  f"{meta['seconds']:.1f} s  {meta['created']}  commit {machine['commit']}")
        if seeds:
            out.print(f"{'  ' * depth}    seeds {json.dumps(seeds)}")
        if depth == 0:
            out.print(f"    key {artifact.key}\n    result {escape(json.dumps(meta['result']))}")
            out.print(f"    machine {escape(json.dumps(machine))}")
        if depth == 0 or full:
            out.print(f"{'  ' * depth}    parameters {escape(json.dumps(meta['spec']))}")


def _number_key(store, name: str, profile: str, settings: dict[str, str]) -> str:
    from dpkit.stages import unknown

    found = {n["name"]: n["key"] for n in _numbers(profile, settings)}
    if name not in found:
        raise unknown("number", name, found or ["none yet; run `dpkit study` first"])
    return store.find(found[name])


@app.command()
def numbers(profile: Profile = "quick", set: Settings = None,
            as_json: Annotated[bool, typer.Option("--json", help="JSON lines")] = False) -> None:
    """Every number that the book prints, with n, 95% interval and key."""
    from dpkit.report.format import number_text

    found = _numbers(profile, settings_of(set))
    if not found:
        raise ValueError(f"profile {profile} has no numbers yet; run `dpkit study --profile {profile}`")
    if as_json:
        for record in found:
            print(json.dumps(record))
        return
    table = Table("number", "value", "95% interval", "n", "key", box=None)
    for record in found:
        table.add_row(record["name"], number_text(record, "value"), number_text(record, "interval"), str(record["n"]),
                      record["key"][:12])
    out.width = max(out.width, 120)  # a name that is cut short leads nowhere
    out.print(table)


def _numbers(profile: str, settings: dict[str, str]) -> list[dict[str, Any]]:
    """Numbers from the store; where the store lacks them, those recorded in the book, which is said."""
    from dpkit import project, report, stages

    reason = "the store has none of them"
    try:
        plan, store = plan_of(profile, settings), open_store()
        parts = {part: [(e.place, e.unit.key) for e in getattr(plan, part)()] for part in (*stages.CHAPTERS, "searches")}
        found = [n.record() for n in report.all_numbers(store, parts)]
        if found:
            return found
    except ValueError as error:
        reason = str(error)
        if profile not in stages.profiles():
            raise
    for folder in project.recorded_folders():
        if json.loads((folder / "provenance.json").read_text())["profile"] == project.profile_name(profile):
            print(f"dpkit: numbers as recorded in {_short(folder)} ({reason})", file=sys.stderr)
            return [json.loads(line) for line in (folder / "numbers.jsonl").read_text().splitlines() if line]
    return []


@app.command()
def book(profile: Profile = "quick", out_folder: Annotated[Path | None, typer.Option(
        "--out", help="build OUT/_build/html (default: the checkout)")] = None) -> None:
    """Build the HTML book from executed notebooks, warnings as errors, and say where it lies."""
    from dpkit import book as builder

    front = builder.build(profile, out_folder)
    out.print(f"the book: {_short(front)}\n          {front.resolve().as_uri()}")


@app.command()
def profiles(name: Annotated[str | None, typer.Argument(help="show all parameters of one profile")] = None) -> None:
    """The profiles, or all parameters of one."""
    from dpkit import stages

    if name is None:
        for known, path in stages.profiles().items():
            out.print(f"{known:16s}{path.read_text().splitlines()[0].lstrip('# ')}")
        out.print("\nAll parameters of one: dpkit profiles quick")
        return
    for key, value in stages.load_study(name).to_dict().items():
        out.print(f"{key:24s}{escape(json.dumps(value))}")


@app.command()
def bench(as_json: Annotated[bool, typer.Option("--json", help="JSON lines")] = False) -> None:
    """Time the hot loops against a named reference in the same run; ratios, not seconds, are what counts."""
    from dpkit import benchmark

    rows = benchmark.run()
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table("work", "ours", "reference", "ratio", "spread", "unit", box=None)
    for row in rows:
        table.add_row(row["name"], f"{row['ours']:.4g}", f"{row['peer']:.4g}", f"{row['ratio']:.2f}",
                      f"{row['low']:.2f} to {row['high']:.2f}", row["unit"])
    out.print(table)


@store_app.command("pack")
def store_pack(file: Path, profile: Annotated[str | None, typer.Option(help="only what this profile needs")] = None,
               set: Settings = None) -> None:
    """Write artifacts to one tar file."""
    from dpkit import stages

    store, keys = open_store(), None
    if profile:
        plan = plan_of(profile, settings_of(set))
        wanted = stages.closure(e.unit for part in (*stages.CHAPTERS, "searches") for e in getattr(plan, part)())
        keys = [k for k in wanted if store.has(k)]
    count = store.pack(file, keys)
    out.print(f"{count} artifacts in {file}, {file.stat().st_size / 1e6:.1f} MB")


@store_app.command("unpack")
def store_unpack(file: Path) -> None:
    """Add the artifacts of a packed file, each checked before it appears."""
    out.print(f"{open_store().unpack(file)} new artifacts")


def _version(value: bool) -> None:
    if value:
        out.print(f"dpkit {__version__}")
        raise typer.Exit()


@app.callback()
def top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Options of all commands."""


top.__doc__ = HELP


def _short(path: Path) -> str:
    """A path as seen from here, when it lies below."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def joined(arguments: list[str]) -> list[str]:
    """``-p NAME VALUE``, as papermill has it, as one word ``NAME=VALUE``; ``-p NAME=VALUE`` stays."""
    words, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest]
        if word in ("-p", "--parameter") and rest:
            name = rest.pop(0)
            if "=" not in name:
                if not rest:
                    raise ValueError(f"-p takes a name and a value; {name} has no value")
                name = f"{name}={rest.pop(0)}"
            words += ["-p", name]
        else:
            words.append(word)
    return words


def main() -> None:
    """Entry point: errors that a person can mend are one line on standard error and a status that is not 0."""
    from dpkit.store import Missing

    try:
        sys.exit(app(args=joined(sys.argv[1:]), prog_name="dpkit", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        print("dpkit: stopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)
    except UsageProblem as error:
        text = error.format_message().strip().rstrip(".")
        where = error.ctx.command_path if error.ctx else "dpkit"
        # a command that needs a subcommand and gets none says its whole help
        print(text if "\n" in text else f"dpkit: {text}; see `{where} --help`", file=sys.stderr)
        sys.exit(error.exit_code)
    except (ValueError, RuntimeError, Missing, OSError, ImportError) as error:
        if not str(error).strip():
            raise
        print(f"dpkit: {str(error).strip()}", file=sys.stderr)
        sys.exit(2)
