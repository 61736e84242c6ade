"""Tickets on other people's networks: any ``torch.nn.Module`` whose tensors have the ticket's shapes.

Two forms. ``prune`` is that of ``torch.nn.utils.prune``: the module keeps ``NAME_orig`` and ``NAME_mask`` and multiplies them
before each forward pass, so that removed weights stay zero in training, whatever the optimiser. ``bake`` writes zeros once:
nothing about the module changes, and training brings the weights back unless they are zeroed again after each step.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from dpkit.prune.files import TicketFile, load
from dpkit.prune.iterate import Ticket
from dpkit.prune.masks import listed
from dpkit.tree import Buffers, Mask, Params

FORMS = ("prune", "bake")
#: modules that read the weights of layers inside them without calling these, so that a hook there would not run
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
COUNTER = "num_batches_tracked"  # of torch's BatchNorm; the functions of dpkit.models count nothing

Source = TicketFile | Ticket | Mapping[str, Tensor] | str | Path
Names = Mapping[str, str | None] | Callable[[str], str | None]


@torch.no_grad()
def attach(module: nn.Module, source: Source, how: str = "prune", weights: bool = True, names: Names | None = None,
           strict: bool = True) -> tuple[str, ...]:
    """Give a module the mask of a ticket, and the weights that it starts from; returns the module's names of what is masked.

    source: a ticket, a file of one, its path, or a mask alone (bool by name). how: ``prune`` or ``bake``, see above. weights:
    also load parameters and buffers; False keeps the module's own. names: where the module calls things differently, the
    module's name for the ticket's, of tensors (``conv0.weight``) or of layers (``conv0``), or a function from name to name; None
    as a name leaves that out. strict: the module has no other parameters and buffers than the ticket's, and without ``weights``
    no other convolution or linear weights than the masked ones. Values take the module's device and type; ``NAME_orig`` is the
    module's own parameter, so an optimiser made before stays right. Nothing is changed where an error is raised: ``ValueError``,
    one line with both sides, where names or shapes differ, a weight is pruned already, or ``prune`` would not hold it: one that
    two layers share, or that a module reads without calling its layer (the output of ``nn.MultiheadAttention``).
    """
    if how not in FORMS:
        raise ValueError(f"how must be one of {', '.join(FORMS)}; got {how!r}")
    params, buffers, mask = _parts(source)
    if weights and not params:
        raise ValueError("attach loads a ticket's weights, but this one is a mask alone; pass weights=False to keep the module's")
    left_out = _check_names(names, params, (*params, *buffers, *mask))
    if not weights:
        params, buffers = {}, {}
    own = dict(module.named_parameters(remove_duplicate=False))
    running = {n: b for n, b in module.named_buffers() if not n.endswith(COUNTER)}
    if pruned := [n for n in own if n.endswith("_orig")]:
        raise ValueError(f"the module is pruned already (it has {pruned[0]}); use dpkit.prune.modules.strip on it first")
    kept = _matched("mask", mask, own, names)
    loaded, moved = _matched("parameters", params, own, names), _matched("buffers", buffers, running, names)
    if how == "prune":
        _check_hooks(module, own, kept)
    rest = _unspoken(module, own, running, {**loaded, **moved} if weights else None, kept)
    if strict and (rest := [n for n in rest if n not in left_out]):
        raise ValueError(f"the module has {listed(rest)}, the ticket has not; give names= if it is called otherwise, or "
                         "strict=False to leave it as it is")
    for found, have in ((loaded, own), (moved, running)):
        for name, value in found.items():
            have[name].copy_(value)
    for name, m in kept.items():
        m = m.to(own[name].device)
        if how == "bake":
            own[name].masked_fill_(~m, 0)
        else:
            layer, _, tensor = name.rpartition(".")
            prune.custom_from_mask(module.get_submodule(layer), tensor, m)
    return tuple(kept)


@torch.no_grad()
def strip(module: nn.Module) -> tuple[str, ...]:
    """Make all masks of ``torch.nn.utils.prune`` in a module permanent; returns the names of the parameters.

    Afterwards the module has its plain parameters again, with zeros where weights are removed (also where the product gave
    NaN or -0.0), and training would bring them back. A module without masks stays as it is.
    """
    done = []
    for prefix, layer in module.named_modules():
        hooks = [h for h in layer._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
        for tensor in [hook._tensor_name for hook in hooks]:
            kept = getattr(layer, f"{tensor}_mask").bool()
            prune.remove(layer, tensor)
            getattr(layer, tensor).masked_fill_(~kept, 0)
            done.append(f"{prefix}.{tensor}".lstrip("."))
    return tuple(done)


@torch.no_grad()
def revived(module: nn.Module, source: Source, names: Names | None = None) -> int:
    """How many removed weights are not zero in a module: 0 as long as the mask holds, in either form.

    Raises ``ValueError`` where the module lacks a masked weight or has it in another shape.
    """
    params, buffers, mask = _parts(source)
    _check_names(names, params, (*params, *buffers, *mask))
    have = dict(module.named_parameters(remove_duplicate=False))
    for prefix, layer in module.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):  # what the next forward pass will compute with
                have[f"{prefix}.{hook._tensor_name}".lstrip(".")] = hook.apply_mask(layer)
    return sum(int((have[n][~m.to(have[n].device)] != 0).sum()) for n, m in _matched("mask", mask, have, names).items())


# --- parts --------------------------------------------------------------------------------------------------------------------
def _parts(source: Source) -> tuple[Params, Buffers, Mask]:
    """Parameters, buffers and mask of whatever holds a ticket."""
    if isinstance(source, (str, Path)):
        source = load(source)
    ticket = source.ticket if isinstance(source, TicketFile) else source
    found = (ticket.params, ticket.buffers, ticket.mask) if isinstance(ticket, Ticket) else ({}, {}, dict(ticket))
    for name, m in found[2].items():
        if m.dtype != torch.bool:
            raise ValueError(f"mask of {name} must be bool, got {str(m.dtype).removeprefix('torch.')}; convert it")
    return found


def _renamed(names: Names | None, name: str) -> str | None:
    """The module's name of a tensor; None where it is left out."""
    if names is None:
        return name
    if callable(names):
        return names(name)
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if (start := ".".join(parts[:cut])) in names:
            to = names[start]
            return None if to is None else ".".join([to, *parts[cut:]]).lstrip(".")
    return name


def _check_names(names: Names | None, params: Params, known: Collection[str]) -> set[str]:
    """The ticket's names that are left out; raises ``ValueError`` on a renaming that says nothing or one thing twice.

    A mask alone does not know the network's other names, so one renaming may serve both.
    """
    if isinstance(names, Mapping) and params:
        idle = [n for n in names if not any(k == n or k.startswith(f"{n}.") for k in known)]
        if idle:
            raise ValueError(f"names has {idle[0]!r}, the ticket has {listed(known)}; correct it or take it out")
    found: dict[str, str] = {}
    for name in dict.fromkeys(known):
        if new := _renamed(names, name):
            if new in found:
                raise ValueError(f"names makes {new} of both {found[new]} and {name}; give each its own")
            found[new] = name
    return set(known) - set(found.values())


def _matched(what: str, tensors: Mapping[str, Tensor], have: Mapping[str, Tensor], names: Names | None) -> dict[str, Tensor]:
    """The ticket's tensors by the module's names; raises ``ValueError`` where the module lacks one or has another shape."""
    found = {}
    for name, tensor in tensors.items():
        new, shape = _renamed(names, name), tuple(tensor.shape)
        if not new:
            continue
        called = name if new == name else f"{name} (there {new})"
        if new not in have:
            raise ValueError(f"{what} of the ticket: {called} {shape} is not in the module, which has {listed(have) or 'none'}; "
                             "say with names= what it is called there")
        if tuple(have[new].shape) != shape:
            raise ValueError(f"{what} of the ticket: {called} is {shape}, in the module it is {tuple(have[new].shape)}; use a "
                             "ticket of this architecture and size")
        found[new] = tensor
    if what == "mask" and not found:
        raise ValueError("the mask must speak of at least one weight, but it is empty, or names leaves all of it out")
    return found


def _check_hooks(module: nn.Module, own: Params, kept: Collection[str]) -> None:
    """Raise ``ValueError`` where a hook before a layer's forward pass would not do: shared weights, layers never called."""
    for name in kept:
        if sum(p is own[name] for p in own.values()) > 1:
            raise ValueError(f"{name} is shared by several layers, and how='prune' takes weights of one layer; use how='bake'")
        parts = name.split(".")[:-1]
        for cut in range(len(parts)):
            reader = module.get_submodule(".".join(parts[:cut]))
            if isinstance(reader, READERS):
                raise ValueError(f"{name} is read by {type(reader).__name__} without calling its layer, and how='prune' needs "
                                 "that call; use how='bake'")


def _unspoken(module: nn.Module, own: Params, running: Buffers, loaded: Mapping[str, Tensor] | None,
              kept: Mapping[str, Tensor]) -> list[str]:
    """What the module has beside the ``loaded`` tensors; where none are, its dense convolution and linear weights."""
    if loaded is None:
        loaded = kept
        layers = {f"{prefix}.weight".lstrip(".") for prefix, layer in module.named_modules()
                  if isinstance(layer, (nn.Linear, _ConvNd))}
        own, running = {n: p for n, p in own.items() if n in layers or n in kept}, {}
    reached = {id(own[n]) for n in loaded if n in own}  # a shared weight has several names
    return [n for n, p in own.items() if id(p) not in reached] + [n for n in running if n not in loaded]
