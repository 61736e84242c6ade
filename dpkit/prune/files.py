"""Tickets as files that other programs read.

A file is safetensors: ``params/NAME`` (the weights that training starts from, removed ones zero), ``buffers/NAME`` and
``mask/NAME`` (bool, True where a weight is kept), or the masks alone. The entry ``ticket`` of its metadata is a JSON
description; the same text lies beside it as ``NAME.json``, for people. Nothing in it runs when it is read.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from dpkit import __version__
from dpkit.files import place
from dpkit.models import ModelSpec
from dpkit.prune import masks
from dpkit.prune.iterate import Ticket
from dpkit.prune.savings import check_tensors, counts, shapes
from dpkit.spec import canonical_json
from dpkit.tree import Mask, is_finite

FORMAT = 1
KIND = "dpkit ticket"
CONTENTS = ("ticket", "mask")
SUFFIX = ".safetensors"
EXPORT = "a ticket is what `dpkit ticket export` writes"
AGAIN = "it was changed or damaged, export it again"


@dataclass(frozen=True)
class TicketFile:
    """What a file holds. ticket: its params and buffers are empty where ``what`` is ``mask``.

    about: what the writer noted, plain values. description: all of the JSON text.
    """

    ticket: Ticket
    model: ModelSpec
    what: str = "ticket"
    about: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def mask(self) -> Mask:
        """True where a weight is kept, by name."""
        return self.ticket.mask


def describe(ticket: Ticket, model: ModelSpec, about: Mapping[str, Any] | None = None, what: str = "ticket") -> dict[str, Any]:
    """The description of a ticket as plain values: network, round, sparsity, counts by layer, FLOPs of one image, notes."""
    found = counts(model, ticket.mask)
    return {"kind": KIND, "format": FORMAT, "what": what, "dpkit": __version__, "model": model.to_dict(), "round": ticket.round,
            "sparsity": masks.sparsity(ticket.mask), "surviving": found.kept, "weights": found.weights,
            "collapsed": list(masks.collapsed(ticket.mask)), "flops": {"dense": found.flops, "kept": found.kept_flops},
            "layers": [{"name": at.name, "shape": list(at.shape), "weights": at.weights, "surviving": at.kept,
                        "flops": {"dense": 2 * at.multiply_adds, "kept": 2 * at.kept_multiply_adds}} for at in found.layers],
            "about": dict(about or {})}


def save(path: str | Path, ticket: Ticket, model: ModelSpec, about: Mapping[str, Any] | None = None, *, what: str = "ticket",
         overwrite: bool = False) -> tuple[Path, Path]:
    """Write a ticket, or with ``what="mask"`` its masks alone; returns the file and the description beside it.

    path: with or without ``.safetensors``. about: plain values for whoever reads it, such as where it came from. Both files
    are written whole, each by one rename, the tensors last. Removed weights are written as zero, whatever they were.
    Raises ``ValueError`` in one line where files are there and ``overwrite`` is not set, and unless masks, parameters and
    buffers are exactly those of ``model``, the masks bool and the numbers finite.
    """
    if what not in CONTENTS:
        raise ValueError(f"what must be one of {', '.join(CONTENTS)}; got {what!r}")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}; name a file in it")
    file = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    beside = file.with_suffix(".json")
    groups = {"mask": ticket.mask} | ({"params": ticket.params, "buffers": ticket.buffers} if what == "ticket" else {})
    _check(groups, model, f"this {model.arch}")
    if what == "ticket":
        groups["params"] = masks.apply(ticket.params, ticket.mask)
    # copies, as safetensors stores no memory twice
    tensors = {f"{group}/{name}": t.detach().cpu().contiguous().clone() for group, content in groups.items()
               for name, t in content.items()}
    text = describe(ticket, model, about, what) | {"sha256": _digest(tensors)}
    try:
        canonical_json(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"about must hold plain finite values (text, numbers, lists, dictionaries); {error}") from None
    shown = json.dumps(text, indent=1, ensure_ascii=False)
    place({beside: f"{shown}\n".encode(), file: to_bytes(tensors, {"ticket": shown})}, overwrite)
    return file, beside


def load(path: str | Path) -> TicketFile:
    """Read a file that :func:`save` wrote, on the CPU, and check all of it.

    Raises ``ValueError`` in one line on a file that is not there, is no ticket, is cut off, is of a newer format or of a network
    that this version does not know, and where tensors, counts or checksum are not those of its description.
    """
    path = Path(path)
    text, tensors = _read(path)
    found = _description(path, text)
    try:
        model, what = ModelSpec(**found["model"]), found["what"]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is of a network that this version cannot build ({error}); read it with a newer dpkit") from None
    groups: dict[str, dict[str, Tensor]] = {"mask": {}} | ({"params": {}, "buffers": {}} if what == "ticket" else {})
    for name, tensor in tensors.items():
        group, _, inner = name.partition("/")
        if group not in groups:
            raise ValueError(f"{path} must hold {', '.join(f'{g}/NAME' for g in groups)} as a {what}, got {name!r}; {AGAIN}")
        groups[group][inner] = tensor
    _check(groups, model, str(path))
    ordered = {group: {name: groups[group][name] for name in names} for group, names in shapes(model).items() if group in groups}
    params, buffers, mask = (ordered.get(group, {}) for group in ("params", "buffers", "mask"))
    ticket = Ticket(params, buffers, mask, found["round"])
    said, true = _counted(found), _counted(describe(ticket, model))
    if wrong := next((name for name in true if said.get(name) != true[name]), None):
        raise ValueError(f"{path}: {wrong} is {_brief(said.get(wrong))} in its description, but {_brief(true[wrong])} in its "
                         f"masks; {AGAIN}")
    for name, kept in mask.items():
        if name in params and bool(params[name][~kept].any()):
            raise ValueError(f"{path}: removed weights must be zero, but {name} has others; {AGAIN}")
    if found.get("sha256") != _digest(tensors):
        raise ValueError(f"{path}: its values are not those that were written; {AGAIN}")
    return TicketFile(ticket, model, what, found["about"], found)


# --- parts --------------------------------------------------------------------------------------------------------------------
def _check(groups: Mapping[str, Mapping[str, Tensor]], model: ModelSpec, where: str) -> None:
    """Raise ``ValueError`` unless each group has the network's tensors, and finite ones."""
    wanted = shapes(model)
    for group, tensors in groups.items():
        check_tensors(group, tensors, wanted[group], where)
        if not is_finite(tensors):
            name = next(n for n, t in tensors.items() if not is_finite({n: t}))
            raise ValueError(f"{group} of {where}: {name} must be finite, it has NaN or infinity; its training diverged")


def _counted(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a description counts in the masks: by layer, then in all."""
    try:
        layers = {f"surviving of {at['name']}": [at["surviving"], at["weights"]] for at in description["layers"]}
    except (KeyError, TypeError):
        layers = {}
    return layers | {name: description.get(name) for name in ("surviving", "weights", "sparsity", "collapsed")}


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        total.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The description's text and all tensors."""
    if not path.is_file():
        raise ValueError(f"ticket file {path} does not exist; `dpkit ticket export` writes one")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("ticket")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as safetensors ({reason}); {EXPORT}") from None
    if text is None:
        raise ValueError(f"{path} is no ticket (its metadata has no entry 'ticket'); {EXPORT}")
    return text, tensors


def _description(path: Path, text: str) -> dict[str, Any]:
    """The description as values, of a format that this version reads."""
    try:
        found = json.loads(text)
        version = int(found["format"])
        good = found["kind"] == KIND
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path} is no ticket (its description is of something else); {EXPORT}")
    if version > FORMAT:
        raise ValueError(f"{path} is of format {version}, this dpkit reads formats up to {FORMAT}; read it with a newer dpkit")
    kinds = {"what": str, "model": dict, "round": int, "about": dict}
    wrong = next((n for n, kind in kinds.items() if not isinstance(found.get(n), kind)), None)
    if wrong is None and found["what"] not in CONTENTS:
        wrong = "what"
    if wrong:
        raise ValueError(f"{path}: its description has no valid {wrong!r} (got {_brief(found.get(wrong))}); export it again")
    return found
