"""Commands for one small set at a time: make and evaluate it, take in what others published, write it for others."""
from __future__ import annotations

import json
import os
import shlex
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dpkit.cli import foresee
from dpkit.cli.shared import Device, Profile, Settings, Workers, open_store, out, plan_of, settings_of, short

app = typer.Typer(no_args_is_help=True)
FORMS = ("idc", "mtt", "dc", "png")
#: what a file is called in a folder, as the authors call it
FILES = {"idc": "data.pt", "mtt": "images_best.pt", "dc": "res.pt"}
#: where each method was published
PAPERS = {"idc": "arXiv 2205.14959", "dc": "arXiv 2006.05929", "dsa": "arXiv 2102.08259", "dm": "arXiv 2110.04181",
          "mtt": "arXiv 2203.11932", "generator": "arXiv 2006.11239", "herding": "Welling 2009", "k_center": "arXiv 1708.00489",
          "el2n": "arXiv 2107.07075"}

Name = Annotated[str, typer.Argument(metavar="NAME", help="a set (see `dpkit distill list`), with _soft for soft labels, or "
                                     "NAME=FILE for a published one")]
Evaluate = Annotated[bool, typer.Option(help="train fresh networks on it and measure them")]


@app.command()
def make(name: Name, profile: Profile = "quick", set: Settings = None, seed: Annotated[int | None, typer.Option(
        help="only the set of this seed (default: all that the evaluation takes)", min=0)] = None, workers: Workers = 0,
        device: Device = "auto", evaluate: Evaluate = True) -> None:
    """Make a small set and evaluate it by the study's protocol: dpkit distill make idc --profile quick

    What is there already is not made again. Ctrl-C at any moment; the same command continues.
    """
    chosen, plan = _planned(name, profile, set)
    artifact = _make(plan, chosen, seed, workers, device, evaluate)
    form = next(form for form in FORMS if not _misfit(chosen, form, artifact))
    more = ["--form", form, *(["--seed", str(seed)] if seed else [])]
    out.print(f"export it: {escape(_command('export', [name, f'sets/{chosen}', *more], profile, set))}")


@app.command("import")
def take_in(name: Annotated[str, typer.Argument(metavar="NAME=FILE", help="a name for it, and data.pt, images_best.pt or "
                                                 "res_*.pt; @FACTOR (IDC's mosaics) or @pixels, @normalised, @whitened behind")],
            profile: Profile = "quick", set: Settings = None, workers: Workers = 0, device: Device = "auto",
            evaluate: Evaluate = True) -> None:
    """Check a published set, store it and evaluate it: dpkit distill import theirs=data.pt@2 --profile cifar10-small"""
    chosen, plan = _planned(name, profile, set)
    if "=" not in name or chosen not in plan.study.published_files:
        raise ValueError(f"import takes NAME=FILE, such as theirs=data.pt@2; got {name!r}")
    found = plan.small_set(chosen, 0).spec["published"]
    out.print(f"{escape(name.partition('=')[2])}: form {found['form']}, {found['shape'][0]} images of {found['classes']} "
              f"classes, {found['space']}, factor {found['factor']}; SHA-256 of its values {found['sha256'][:12]}")
    _make(plan, chosen, None, workers, device, evaluate)
    words = ["--set", f"published={','.join(plan.study.published)}", "--set", f"sets=idc,random_real,{chosen}"]
    rest = [word for word in set or [] if word.partition("=")[0].strip() not in ("published", "sets")]
    out.print(f"use it in a study: {escape(_command('', words, profile, rest))}")


@app.command()
def export(name: Name, path: Annotated[Path, typer.Argument(help="a folder (one for each set), or a file")],
           form: Annotated[str, typer.Option(help=", ".join(FORMS) + ": the layout of those authors' code, or pictures")] = "idc",
           profile: Profile = "quick", set: Settings = None,
           seed: Annotated[int, typer.Option(help="which of the sets of this name", min=0)] = 0,
           overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False) -> None:
    """Write a set that was made in a published layout, with recipe.json beside it: dpkit distill export idc sets/idc"""
    from dpkit.data import Split
    from dpkit.distill import export as writing

    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    chosen, plan = _planned(name, profile, set)
    unit, store = _sets(plan, chosen, seed)[seed], open_store()
    if not store.has(unit.key):
        more = ["--seed", str(seed)] if seed else []
        raise ValueError(f"set {chosen} is not made yet; `{_command('make', [name, *more], profile, set)}` makes it")
    artifact = store.get(unit.key)
    if artifact.failed:
        raise ValueError(f"set {chosen} has no result: {artifact.failed}")
    recipe, tensors = artifact.result["recipe"], artifact.tensors
    if misfit := _misfit(chosen, form, artifact):
        raise ValueError(misfit)
    if form == "png" and path.suffix.lower() not in ("", ".png"):
        raise ValueError(f"form png writes a .png or a folder of them, got {path}")
    file = path / FILES[form] if form in FILES and (path.is_dir() or not path.suffix) else path
    images, stored = tensors["images"], {"form": form, "space": "whitened" if recipe.get("space") == "whitened" else "pixels"}
    folder = file if form == "png" and file.suffix.lower() != ".png" else file.parent
    record = _Recipe(folder / "recipe.json", _described(chosen, seed, artifact), overwrite)
    if form == "png":
        files = writing.write_sheet(_as_pixels(images, recipe, unit), tensors["labels"], file, overwrite=overwrite)
        stored = {"form": form, "space": "pixels, clipped to [0, 1]"}
    else:
        mean, std = _statistics(form, plan.study.dataset, recipe)
        if form != "idc" and stored["space"] == "pixels":
            stored |= {"space": "normalised", "mean": mean.tolist(), "std": std.tolist()}
        files = writing.write(Split(images, tensors["labels"]), file, form, mean, std, factor=recipe["factor"],
                              overwrite=overwrite)
    record.write({written.name: stored for written in files})
    for written in (*files, record.path):
        out.print(escape(short(written)))


@app.command("list")
def show(profile: Profile = "quick", set: Settings = None) -> None:
    """The sets that can be made, what each needs, and which of them are in this store."""
    from dpkit import report, stages
    from dpkit.progress import duration
    from dpkit.stages.making import SETS, SOFT

    settings = settings_of(set)
    study = stages.load_study(profile, settings)
    names = [*SETS, *study.published_files, *(name for name in study.sets if name.endswith(SOFT))]
    plan, store = plan_of(profile, settings | {"sets": tuple(names)}), open_store()
    table = Table("set", "method", "source", "needs", "made", "time", "accuracy", box=None)
    rows = [(e.place, e.unit.key) for e in plan.distillation() if e.place["set"] in names]
    numbers = {n.name: n.record() for n in report.all_numbers(store, {"distillation": rows})}
    for name in names:
        base = name.removesuffix(SOFT)
        units = _sets(plan, name).values()
        made = [store.get(u.key) for u in units if store.has(u.key)]
        needed = {p.key: p for u in units for p in u.parents.values()}
        needs = [f"{len(needed)} networks" if len(needed) > 1 else "1 network"] if needed else []
        needs += ["diffusers"] * (SETS.get(base) == "generator")
        if name != base:
            needs = ["a set and a teacher"]
        there = sum(store.has(key) for key in needed)
        number = numbers.get(f"distill.{name}.accuracy")
        source = study.published_files[base][0] if base in study.published_files else PAPERS.get(SETS[base], "")
        table.add_row(name, report.TITLES.get(base, base), escape(source), ", ".join(needs) + f" ({there} there)" * bool(there),
                      f"{len(made)} of {len(units)}", duration(sum(report.spent(a) for a in made)) if made else "-",
                      report.number_text(number) if number else "-")
    out.width = max(out.width, 140)
    out.print(table)
    out.print(f"make one: {escape(_command('make', ['NAME'], profile, set))}")


# --- what they share ------------------------------------------------------------------------------------------------------
def _command(verb: str, words: Iterable[str], profile: str, set: list[str] | None) -> str:
    """A command as one would type it, with the profile and settings of this one."""
    start = ["dpkit", "distill", verb] if verb else ["dpkit", "study"]
    settings = [part for word in set or [] for part in ("--set", word)]
    return shlex.join([*start, *words, "--profile", profile, *settings])


def _planned(word: str, profile: str, set: list[str] | None):
    """The name in NAME or NAME=FILE, and the plan of a study of that one set."""
    from dpkit import stages
    from dpkit.stages.making import SETS, SOFT

    name, equals, place = word.partition("=")
    base, settings = name.removesuffix(SOFT), settings_of(set)
    study = stages.load_study(profile, settings)
    published = study.published
    if equals and f"{base}={place}" not in published:
        published = (*published, f"{base}={place}")
    elif base not in (*SETS, *study.published_files):
        raise stages.unknown("set", name, (*SETS, *study.published_files))
    return name, plan_of(profile, settings | {"published": published, "sets": (name,)})


def _sets(plan, name: str, seed: int | None = None) -> dict[int, Any]:
    """The units of all sets of this name that the study evaluates, by their first seed; with ``seed`` only that one."""
    units: dict[int, Any] = {}
    known = []
    for at in range(plan.study.evaluation_seeds):
        unit = plan.small_set(name, at)
        if unit.key not in known:
            known.append(unit.key)
            units[at] = unit
    if seed is not None and seed not in units:
        raise ValueError(f"seed must be 0{f' to {max(units)}' if max(units) else ''} for {name}, of which this study has "
                         f"{len(units)}, got {seed}; set_seeds says how often a learned set is made, evaluation_seeds how "
                         "many random ones there are")
    return units if seed is None else {seed: units[seed]}


def _make(plan, name: str, seed: int | None, workers: int, device: str, evaluate: bool):
    """Say what it takes, make what is missing, say what came of it; returns the artifact of the first set."""
    from dpkit import project, stages
    from dpkit.progress import observer

    device, sets = stages.choose_device(device), _sets(plan, name, seed)
    keys = [unit.key for unit in sets.values()]
    parts = {part: [e for e in getattr(plan, part)() if e.place["set"] == name and e.unit.parents["images"].key in keys]
             for part in ("distillation", "transfer")}
    units = [*sets.values(), *(e.unit for entries in parts.values() for e in entries if evaluate)]
    store = open_store()  # after all that may be wrong: nothing is written then
    left = stages.missing(store, units)
    out.print(f"to make: {_missing(left, keys, name)}")
    foresee.announce(store, foresee.of_units(store, left, device, workers))
    report = stages.compute(store, units, device=device, workers=workers, data_root=project.data_folder(),
                            observe=observer("distill"))
    for key, text in report.errors.items():
        hint = ""
        if left[key].stage == "distill" and ("not enough memory" in text or "for want of memory" in text):
            hint = "; --set distill_memory=GIGABYTES has it done in smaller parts, more slowly"
        raise RuntimeError(f"{text}{hint}; see {short(store.root / 'errors')}")
    for unit in sets.values():
        _shown(store, unit)
    if evaluate:
        _evaluated(store, plan, parts)
    return store.get(keys[0])


def _missing(left: Mapping[str, Any], keys: list[str], name: str) -> str:
    """What is to be made, in words."""
    from dpkit import stages

    sets = sum(key in left for key in keys)
    before = [u.label for key, u in stages.closure(u for k, u in left.items() if k in keys).items() if key in left
              and key not in keys]
    after = len(left) - len(before) - sets
    more = f"; and {len(before) - 3} more" if len(before) > 3 else ""
    said = [f"{len(before)} unit{'s' * (len(before) > 1)} before it ({escape('; '.join(before[:3]))}{more})"] if before else []
    said += [f"set {name}" if sets == 1 else f"{sets} sets {name}"] if sets else []
    said += [f"{after} network{'s' * (after > 1)} to evaluate it"] if after else []
    return ", ".join(said) or "nothing, all of it is in the store"


def _shown(store, unit) -> None:
    """The facts of a set; raises ``RuntimeError`` where it has no result."""
    from dpkit.progress import duration, size
    from dpkit.stages.making import PREFIXES

    artifact = store.get(unit.key)
    if artifact.failed:
        method = unit.spec["distill"]["method"]
        raise RuntimeError(f"{unit.label} has no result: {artifact.failed} (here these options begin with "
                           f"{PREFIXES.get(method, method)}_)")
    meta, found = artifact.meta, artifact.result
    decoded = f"decoded into {found['training_images']}" if found["factor"] > 1 else "each one training image"
    learned = ", ".join(f"{k} {v:.3g}" for k, v in found["recipe"].get("learned", {}).items())
    out.print(f"{escape(unit.label)}\n  key       {artifact.key}\n  images    {found['stored_images']} stored, {decoded}"
              f"{f'; learned with them: {learned}' if learned else ''}")
    peak = f", at most {size(meta['peak_memory'])} of memory" if meta.get("peak_memory") else ""
    out.print(f"  made in   {duration(meta['seconds'])} on {meta.get('device', 'cpu')}{peak}")


def _evaluated(store, plan, parts: Mapping[str, list]) -> None:
    """Accuracy on the test images, as the study's numbers, by architecture."""
    from dpkit import report

    study = plan.study
    rows = {part: [(e.place, e.unit.key) for e in entries] for part, entries in parts.items()}
    for number in report.all_numbers(store, rows):
        arch = number.name.split(".")[2]
        arch, width = (study.arch, study.width) if arch == "accuracy" else (arch, study.others[arch].width)
        out.print(f"  accuracy  {report.number_text(number.record())} on {arch}-{width}, {number.name}")
    networks = [store.get(key) for places in rows.values() for _, key in places]
    failed = [a.failed for a in networks if a.failed]
    if failed:
        out.print(f"  no result from {len(failed)} of {len(networks)} networks: {escape(failed[0])}")


# --- writing a set ----------------------------------------------------------------------------------------------------------
def _misfit(name: str, form: str, artifact) -> str:
    """Why a layout cannot hold a set, in one line; nothing where it can."""
    recipe, tensors = artifact.result["recipe"], artifact.tensors
    factor = recipe["factor"]
    if form == "png":
        return ""
    if "soft" in tensors or tensors["labels"].dim() > 1:
        hard = f"export {name.removesuffix('_soft')}, or " if "soft" in tensors else ""
        return f"set {name} has soft labels, and form {form} holds class numbers only; {hard}look at it with --form png"
    if recipe.get("space") == "whitened" and form != "mtt":
        return f"set {name} is whitened, which only form mtt holds (as after --zca); use --form mtt, or png to look at it"
    if factor > 1 and form != "idc":
        return (f"set {name} stores mosaics of {factor} x {factor} images, which only form idc holds; use --form idc, or make it "
                "with --set factor=1")
    return ""


def _statistics(form: str, dataset: str, recipe: Mapping[str, Any]):
    """What normalised images are normalised with, (C,) and (C,): as it is for reading them; nothing for whitened ones."""
    import torch

    from dpkit.distill import published

    mean, std = torch.tensor(recipe["mean"]), torch.tensor(recipe["std"])
    if recipe.get("space") == "whitened":
        return torch.zeros_like(mean), torch.ones_like(std)
    return published.authors_statistics(form, dataset) or (mean, std)


def _as_pixels(images, recipe: Mapping[str, Any], unit):
    """Stored images as pixels to look at."""
    if recipe.get("space") != "whitened":
        return images
    from dpkit import data, project
    from dpkit.data import zca

    return zca.fit(data.load(unit.data, project.data_folder()).train.images).invert(images)


def _described(name: str, seed: int, artifact) -> dict[str, Any]:
    """All that somebody needs to train on a set as it was meant, and to make it again."""
    from dpkit import __version__

    meta = artifact.meta
    return {"set": name, "seed": seed, "key": artifact.key, "recipe": artifact.result["recipe"],
            "stored_images": artifact.result["stored_images"], "training_images": artifact.result["training_images"],
            "made": {name: meta.get(name) for name in ("stage", "version", "spec", "parents", "seconds", "created")},
            "commit": meta["machine"]["commit"], "dpkit": __version__}


class _Recipe:
    """recipe.json of a folder, which holds the files of one set. Raises ``ValueError`` where there is another set's."""

    def __init__(self, path: Path, content: dict[str, Any], overwrite: bool):
        self.path, self.content, self.files = path, content, {}
        if not path.exists():
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            same = before["key"] == content["key"]
            self.files = dict(before["files"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same and not overwrite:
            raise ValueError(f"{path} exists and is of another set; choose another folder, or --overwrite")

    def write(self, files: Mapping[str, Any]) -> None:
        """In one step, with what each of the files holds."""
        text = json.dumps(self.content | {"files": self.files | dict(files)}, indent=1, sort_keys=True) + "\n"
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            with open(temporary, "w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
