"""Commands for tickets: make one, write it for other programs, look at it, compare two."""
from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dpkit.cli import foresee
from dpkit.cli.shared import Device, Profile, Settings, Workers, open_store, out, plan_of, settings_of, short

app = typer.Typer(no_args_is_help=True)

Arm = Annotated[str, typer.Argument(metavar="ARM", help="an arm of the study, such as imp or distilled")]
Round = Annotated[int | None, typer.Option(help="pruning rounds (default: the last that the profile measures)")]
Seed = Annotated[int, typer.Option(help="which initialisation")]
Any_ = "a file, a key's first digits, or an arm (of --profile, --round and --seed)"


@app.command()
def make(arm: Arm, profile: Profile = "quick", set: Settings = None, round: Round = None,
         seed: Annotated[int | None, typer.Option(help="which initialisation (default: all of the profile)")] = None,
         workers: Workers = 0, device: Device = "auto") -> None:
    """Make an arm's tickets and what they rest on: dpkit ticket make distilled --profile quick

    What is there already is not made again. Ctrl-C at any moment; the same command continues.
    """
    from dpkit import project, stages
    from dpkit.progress import observer

    device, plan = stages.choose_device(device), _planned(profile, set, arm)
    at = _round(plan, round)
    units = [_unit(plan, arm, at, s) for s in (range(plan.study.seeds) if seed is None else [seed])]
    store = open_store()  # after all that may be wrong: nothing is written then
    left = stages.missing(store, units)
    mine = [unit.label for unit in units if unit.key in left]
    before = len(left) - len(mine)
    said = [f"{before} unit{'s' * (before > 1)} before"] * bool(before)
    said += [f"{len(mine)} ticket{'s' * (len(mine) > 1)}"] * bool(mine)
    out.print(f"to make: {', then '.join(said) or 'nothing, all of it is in the store'}")
    foresee.announce(store, foresee.of_units(store, left, device, workers))
    report = stages.compute(store, units, device=device, workers=workers, data_root=project.data_folder(),
                            observe=observer("ticket"))
    for text in report.errors.values():
        raise RuntimeError(f"{text}; see {short(store.root / 'errors')}")
    for unit in units:
        artifact = _good(store.get(unit.key), unit.label)
        out.print(f"{escape(unit.label)}\n  key       {unit.key}\n  weights   {_weights(artifact.result)}")
    words = [arm, "--round", str(at), *(["--seed", str(seed)] if seed else []), "--out", f"tickets/{arm}.safetensors"]
    out.print(f"export it: {escape(_command('export', words, profile, set))}")


@app.command()
def export(arm: Arm, path: Annotated[Path, typer.Option("--out", metavar="FILE", help="a .safetensors file; its description goes "
                                                         "beside it as .json")],
           round: Round = None, seed: Seed = 0, profile: Profile = "quick", set: Settings = None,
           mask_only: Annotated[bool, typer.Option("--mask-only", help="without the weights that training starts from")] = False,
           overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False) -> None:
    """Write a ticket that was made, to be used elsewhere: dpkit ticket export imp --round 2 --out tickets/imp.safetensors"""
    from dpkit.prune import files

    found = _of_arm(arm, round, seed, profile, set)
    for written in files.save(path, found.ticket, found.model, found.about, what="mask" if mask_only else "ticket",
                              overwrite=overwrite):
        out.print(escape(short(written)))


@app.command("list")
def all_tickets(profile: Profile = "quick", set: Settings = None) -> None:
    """The arms of a profile, and which of their tickets are in this store."""
    from dpkit import report

    plan, store = plan_of(profile, settings_of(set)), open_store()
    study = plan.study
    rows = [(e.place, e.unit.key) for e in plan.tickets()]
    numbers = {n.name: n.record() for n in report.all_numbers(store, {"tickets": rows})}
    table = Table("arm", "round", "sparsity", "weights", "made", "empty layers", "accuracy", "key", box=None)
    for arm in study.arms:
        for round in range(1, max(study.at_rounds) + 1):
            units = [plan.ticket(arm, seed, round) for seed in range(study.seeds)]
            made = [store.get(unit.key) for unit in units if store.has(unit.key)]
            if not made and round not in study.at_rounds:
                continue
            good = [artifact for artifact in made if not artifact.failed]
            kept = good[0].result["surviving"] if good else plan.counts[round]
            number = numbers.get(f"tickets.{arm}.accuracy@{plan.percent(round)}") if round in study.at_rounds else None
            table.add_row(arm, str(round), f"{100 * (1 - kept / plan.counts[0]):.1f}%", f"{kept:,}",
                          f"{len(made)} of {len(units)}" + f" ({len(made) - len(good)} failed)" * (len(good) < len(made)),
                          str(max((len(artifact.result["collapsed"]) for artifact in good), default="-")),
                          report.number_text(number) if number else "-", good[0].key[:12] if good else "-")
    out.width = max(out.width, 130)
    out.print(table)
    out.print(f"make them: {escape(_command('make', ['ARM'], profile, set))}")


@app.command()
def show(what: Annotated[str, typer.Argument(metavar="WHAT", help=Any_)], round: Round = None, seed: Seed = 0,
         profile: Profile = "quick", set: Settings = None) -> None:
    """What a ticket keeps, layer by layer, and what that saves: dpkit ticket show tickets/imp.safetensors"""
    from dpkit import prune
    from dpkit.prune.savings import counts

    found = _found(what, round, seed, profile, set)
    model, ticket = found.model, found.ticket
    saved = counts(model, ticket.mask, ticket.params or None, ticket.buffers)
    counted = {"surviving": saved.kept, "weights": saved.weights, "sparsity": 1 - saved.kept / saved.weights}
    out.print(f"{escape(found.label)}{'' if ticket.params else ', masks alone'}")
    out.print(f"  network   {model.arch}-{model.width}, norm {model.norm_kind}, images {model.channels} x {model.image_size} x "
              f"{model.image_size}, {model.classes} classes")
    out.print(f"  round     {ticket.round}")
    out.print(f"  weights   {_weights(counted)}")
    try:
        reached = prune.surviving(prune.effective(model, ticket.mask))
        out.print(f"  effective {reached:,} of these lie on a path from input to output, sparsity "
                  f"{100 * (1 - reached / saved.weights):.1f}%")
    except ValueError as error:
        out.print(f"  effective not known: {escape(str(error))}")
    out.print(f"  flops     {_amount(saved.kept_flops)} of {_amount(saved.flops)} for one image "
              f"({100 * saved.kept_flops / saved.flops:.1f}%) without any work on zeros")
    out.print(f"  remnant   {100 * saved.remnant:.1f}% of the dense flops when channels that cannot matter are taken out"
              if saved.remnant is not None else f"  remnant   no channel can be taken out exactly: {escape(saved.why)}")
    if empty := prune.collapsed(ticket.mask):
        out.print(f"  empty     {', '.join(empty)}: no signal passes there")
    for name, value in found.about.items():
        if isinstance(value, str | int | float):
            out.print(f"  {name:9s} {escape(str(value))}")
    table = Table("weight", "shape", "kept", "of", "density", "flops kept", "of", box=None)
    for layer in saved.layers:
        table.add_row(layer.name, " x ".join(map(str, layer.shape)), f"{layer.kept:,}", f"{layer.weights:,}",
                      f"{100 * layer.kept / layer.weights:.1f}%", _amount(2 * layer.kept_multiply_adds),
                      _amount(2 * layer.multiply_adds))
    out.width = max(out.width, 120)
    out.print(table)


@app.command()
def compare(a: Annotated[str, typer.Argument(metavar="A", help=Any_)],
            b: Annotated[str, typer.Argument(metavar="B", help="as A")], round: Round = None, seed: Seed = 0,
            profile: Profile = "quick", set: Settings = None) -> None:
    """How much two masks agree, layer by layer, beside what chance gives: dpkit ticket compare imp distilled"""
    from dpkit.prune import compare as compared

    left, right = (_found(word, round, seed, profile, set) for word in (a, b))
    names = (left.label, right.label if right.label != left.label else f"{right.label} (again)")
    found = compared({names[0]: left.ticket.mask, names[1]: right.ticket.mask})
    out.print(f"A: {escape(left.label)}\nB: {escape(right.label)}")
    table = Table("weight", "size", "kept by A", "by B", "by both", "Jaccard", "chance", "excess", "Hamming", "chance", box=None)

    for i, name in enumerate([*found.tensors, "all layers"]):
        part = slice(i, i + 1) if i < len(found.tensors) else slice(None)
        numbers = (found.sizes[part], found.kept[0, part], found.kept[1, part], found.both[0, 1, part])
        shares = (found.jaccard, found.jaccard_chance, found.excess, found.hamming, found.hamming_chance)
        table.add_row(name, *(f"{int(n.sum()):,}" for n in numbers), *(_share(s[0, 1, i]) for s in shares))
    out.width = max(out.width, 130)
    out.print(table)
    out.print(f"all layers, chance with each layer's counts given: Jaccard {_share(found.jaccard_within[0, 1])}, excess over it "
              f"{_share(found.excess_within[0, 1])}, Hamming {_share(found.hamming_within[0, 1])}")


# --- what they share ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Found:
    """A ticket from wherever it came, with what to call it."""

    label: str
    ticket: Any
    model: Any
    about: Mapping[str, Any] = field(default_factory=dict)


def _found(word: str, round: int | None, seed: int, profile: str, set: list[str] | None) -> _Found:
    """The ticket that a word names: a file, else a key of the store, else an arm."""
    from dpkit.prune import files

    if word.endswith(files.SUFFIX) or "/" in word or Path(word).is_file():
        read = files.load(word)
        return _Found(word, read.ticket, read.model, read.about)
    if re.fullmatch(r"[0-9a-f]{6,64}", word):
        store = open_store()
        return _stored(store.get(store.find(word)))
    return _of_arm(word, round, seed, profile, set)


def _of_arm(arm: str, round: int | None, seed: int, profile: str, set: list[str] | None) -> _Found:
    """The stored ticket of an arm; raises ``ValueError`` with the command that makes it where there is none."""
    plan = _planned(profile, set, arm)
    at = _round(plan, round)
    unit, store = _unit(plan, arm, at, seed), open_store()
    if not store.has(unit.key):
        words = [arm, "--round", str(at), *(["--seed", str(seed)] if seed else [])]
        raise ValueError(f"{unit.label} is not made yet; `{_command('make', words, profile, set)}` makes it")
    found = _stored(store.get(unit.key))
    return _Found(found.label, found.ticket, found.model, {"arm": arm, "seed": seed, **found.about, "data": plan.identity})


def _stored(artifact) -> _Found:
    """The ticket in an artifact; raises ``ValueError`` where it is of another kind or has no result."""
    from dpkit import __version__
    from dpkit.models import ModelSpec
    from dpkit.prune import Ticket

    meta = artifact.meta
    label = meta["label"] or meta["stage"]
    if meta["stage"] != "ticket":
        raise ValueError(f"artifact {artifact.key[:12]} is no ticket but a {meta['stage']} ({label}); give a ticket's key")
    _good(artifact, label)
    mask, start = artifact.group("mask"), artifact.group("params")
    ticket = Ticket(start, artifact.group("buffers"), {n: mask[n] for n in start if n in mask}, meta["spec"]["round"])
    about = {"label": label, "key": artifact.key, "created": meta["created"], "commit": meta["machine"]["commit"],
             "dpkit": __version__, "made": {name: meta[name] for name in ("stage", "version", "spec", "parents", "seconds")}}
    return _Found(label, ticket, ModelSpec(**meta["spec"]["model"]), about)


def _good(artifact, label: str):
    if artifact.failed:
        raise ValueError(f"{label} has no result: {artifact.failed}")
    return artifact


def _planned(profile: str, set: list[str] | None, arm: str):
    """The plan of a study that has this arm; raises ``ValueError`` on an arm that there cannot be."""
    from dpkit import stages

    settings = settings_of(set)
    arms = stages.load_study(profile, settings).arms
    if arm == "dense":
        raise ValueError(f"arm must be one that prunes, got dense; this profile has {', '.join(arms)}")
    return plan_of(profile, settings | ({} if arm in arms else {"arms": (*arms, arm)}))


def _round(plan, round: int | None) -> int:
    last = plan.study.rounds
    if round is not None and not 1 <= round <= last:
        raise ValueError(f"round must lie in [1, {last}], the rounds of this study, got {round}; --set rounds={max(round, 1)} "
                         "changes them")
    return round or max(plan.study.at_rounds)


def _unit(plan, arm: str, round: int, seed: int):
    last = plan.study.seeds - 1
    if not 0 <= seed <= last:
        raise ValueError(f"seed must lie in [0, {last}], the initialisations of this study, got {seed}; --set "
                         f"seeds={max(seed, 0) + 1} changes them")
    return plan.ticket(arm, seed, round)


def _command(verb: str, words: Iterable[str], profile: str, set: list[str] | None) -> str:
    """A command as one would type it, with the profile and settings of this one."""
    settings = [part for word in set or [] for part in ("--set", word)]
    return shlex.join(["dpkit", "ticket", verb, *words, "--profile", profile, *settings])


def _weights(result: Mapping[str, Any]) -> str:
    return f"{result['surviving']:,} of {result['weights']:,} are kept, sparsity {100 * result['sparsity']:.1f}%"


def _share(value: Any) -> str:
    """Three digits; a dash where chance leaves no room."""
    return "-" if math.isnan(float(value)) else f"{float(value):.3f}"


def _amount(value: float) -> str:
    """Operations as people say them: ``1.82 G``, ``40.1 M``, ``312 k``."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 1000 * size else f"{value / size:.0f}{letter}"
    return str(int(value))
