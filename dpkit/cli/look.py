"""Commands that look at what is there: status, checks, numbers, lineage, profiles, and carrying artifacts."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dpkit.cli import foresee
from dpkit.cli.shared import Profile, Settings, Workers, open_store, out, plan_of, settings_of, short, show_numbers

app = typer.Typer()
store_app = typer.Typer(help="Carry artifacts between machines.", no_args_is_help=True)
app.add_typer(store_app, name="store")
app.add_typer(foresee.app)

#: what the scopes that a name may end in keep as trained
SCOPED = {"weights": "weights alone are rewound; biases, norms and statistics stay as trained (the authors' form)",
          "norm_only": "all is rewound but the norms, which stay as trained"}


@app.command()
def status(profile: Profile = "quick", set: Settings = None, workers: Workers = 0) -> None:
    """What of a profile is done, missing and failed, and how long the rest will take."""
    from dpkit import stages
    from dpkit.progress import span

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
    left = {key: unit for key, unit in everything.items() if not store.has(key)}
    if left:
        found = foresee.of_units(store, left, stages.choose_device("auto"), workers).forecast
        time_, ends = span(found.seconds, found.low, found.high)
        out.print(f"time left: about {time_} on this machine ({ends})")
    else:
        out.print("complete")
    for key, unit in everything.items():
        if store.has(key) and store.get(key).failed and "parent" not in store.get(key).failed:
            out.print(f"  no result: {escape(unit.label)}: {escape(store.get(key).failed)}")


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
            out.print(f"{short(folder)}: stale, {escape(reason)}")
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
            minus: Annotated[list[str] | None, typer.Option(
                metavar="KEY=VALUE", help="print changes from this setting, paired by initialisation; repeatable")] = None,
            as_json: Annotated[bool, typer.Option("--json", help="JSON lines")] = False) -> None:
    """Every number that the book prints, with n, 95% interval and key."""
    found = _changes(profile, settings_of(set), settings_of(minus, "--minus")) if minus else _numbers(profile, settings_of(set))
    if not found:
        raise ValueError(f"profile {profile} has no numbers yet; run `dpkit study --profile {profile}`")
    show_numbers(found, as_json)


def _changes(profile: str, settings: dict[str, str], instead: dict[str, str]) -> list[dict[str, Any]]:
    """Changes from ``settings`` with some of them set to ``instead`` to ``settings``, from the store alone."""
    from dpkit import report

    store = open_store()
    after, before = (stored_numbers(store, profile, which) for which in (settings, settings | instead))
    found = [n.record() for n in report.changes(store, after, before)]
    if not found:
        one, other = (" ".join(f"--set {name}={value}" for name, value in which.items()) or "no --set"
                      for which in (settings, settings | instead))
        raise ValueError(f"the store has no number that differs between the two settings; first run "
                         f"`dpkit compute --profile {profile}` with {one} and with {other}")
    return found


def stored_numbers(store, profile: str, settings: dict[str, Any]):
    """All numbers that can be computed from what is in the store."""
    from dpkit import report, stages

    plan = plan_of(profile, settings)
    return report.all_numbers(store, {part: [(e.place, e.unit.key) for e in getattr(plan, part)()] for part in stages.FRAMES})


def _numbers(profile: str, settings: dict[str, str]) -> list[dict[str, Any]]:
    """Numbers from the store; where the store lacks them, those recorded in the book, which is said."""
    from dpkit import project, stages

    reason = "the store has none of them"
    try:
        found = [n.record() for n in stored_numbers(open_store(), profile, settings)]
        if found:
            return found
    except ValueError as error:
        reason = str(error)
        if profile not in stages.profiles():
            raise
    for folder in project.recorded_folders():
        if json.loads((folder / "provenance.json").read_text())["profile"] == project.profile_name(profile):
            print(f"dpkit: numbers as recorded in {short(folder)} ({reason})", file=sys.stderr)
            return [json.loads(line) for line in (folder / "numbers.jsonl").read_text().splitlines() if line]
    return []


@app.command()
def arms() -> None:
    """The arms that a study can have: how each one finds its mask, and the suffixes that go with all of them."""
    from dpkit import stages
    from dpkit.stages.making import SETS

    width = max(map(len, stages.ARMS)) + 2
    for name, arm in stages.ARMS.items():
        out.print(f"{name:<{width}}{escape(arm.title)}")
    out.print(f"{'ltr_STEP':<{width}}IMP, rewound to another step of the dense run (parameter snapshots)")
    out.print(f"{'SET':<{width}}IMP that searches with a small set: {', '.join(SETS)}, each also with _soft, and published ones")
    out.print("\nbehind any arm that trains, what rewinding resets:")
    for scope in stages.SUFFIXES:
        out.print(f"{'_' + scope:<{width}}{SCOPED[scope]}")
    out.print("\nbehind any arm, a control:")
    for name, what in stages.CONTROLS.items():
        out.print(f"{'_' + name:<{width}}{escape(what)}")


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


@store_app.command("pack")
def store_pack(file: Path, profile: Annotated[str | None, typer.Option(help="only what this profile needs")] = None,
               set: Settings = None) -> None:
    """Write artifacts to one tar file."""
    from dpkit import stages

    store, keys = open_store(), None
    if profile:
        plan = plan_of(profile, settings_of(set))
        wanted = stages.closure(e.unit for part in stages.FRAMES for e in getattr(plan, part)())
        keys = [k for k in wanted if store.has(k)]
    count = store.pack(file, keys)
    out.print(f"{count} artifacts in {file}, {file.stat().st_size / 1e6:.1f} MB")


@store_app.command("unpack")
def store_unpack(file: Path) -> None:
    """Add the artifacts of a packed file, each checked before it appears."""
    out.print(f"{open_store().unpack(file)} new artifacts")
