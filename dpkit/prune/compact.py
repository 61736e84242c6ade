"""What is left of a masked network when the channels that no longer matter are taken out, exactly.

Unstructured masks leave the tensors their shapes, so a masked network costs what the dense one does. Two kinds of channels can be
removed without changing what the network computes or how it trains:

- *Unread*: no surviving weight reads the channel. Its gradient is zero, so forward pass and training of the rest are exact where
  the norm treats each channel by itself (batch, instance, none). Group and layer norm mix channels, and a network with them,
  a ViT among them, has no exact remnant: it is refused.
- *Silent*: no surviving weight writes the channel. Before the norm it is then one number everywhere, the convolution's bias or
  zero. Instance norm, and batch norm in train mode, turn that into their shift, and a shift of zero, as at initialisation, has no
  gradient behind ReLU and stays (weight decay leaves zero at zero). Batch norm in eval mode does so where its running mean is
  that number. Any other constant is not a bias for the next layer, whose zero padding makes a pattern of it: such
  channels are kept. One reservation for training: where the number is not zero, the norm returns rounding noise in place of
  zero, and ReLU's gradient at noise may wake the channel in the masked network; the remnant does not follow that.

ReLU and either kind of pool leave zero at zero, so both hold for all networks here, whatever stands between two convolutions. A
hidden unit of an MLP is a channel of one position.

Both spread: what only removed channels read is unread, what only removed channels write is silent. Results are equal in exact
arithmetic; floating-point sums run over fewer terms and differ by rounding. Removed weights would have decayed without being
read; a later pruning round that compares magnitudes must know that they are gone.
"""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit.models import ModelSpec, layer_work
from dpkit.models.wiring import norm_of, take, wiring
from dpkit.prune.masks import check
from dpkit.tree import Buffers, Mask, Params

Channels = dict[str, Tensor]
MIXING = ("group", "layer")
"""Norms whose result for a channel depends on other channels."""


def remnant(model: ModelSpec, mask: Mask, params: Params, buffers: Buffers, silent: bool = True) -> Channels:
    """The channels that must stay, (C,) bool for each group of :func:`dpkit.models.wiring.wiring`.

    params, buffers: of the ticket; they decide whether a silent channel is zero. silent: False removes unread channels only.
    The mask must cover all prunable weights. Raises ``ValueError`` as :func:`dpkit.prune.masks.check` does, and for a network in
    which a channel cannot be removed exactly (norm ``group`` or ``layer``).
    """
    if model.norm_kind in MIXING:
        raise ValueError(f"norm must be batch, instance or none, so that removing a channel is exact; got {model.norm_kind}, "
                         f"which mixes the channels of {model.arch}; keep its tensors whole")
    check(mask, params)
    wires = wiring(model)
    missing = [name for name in wires if name not in mask]
    if missing:
        raise ValueError(f"mask must cover all prunable weights, but {missing[0]} is not in it; use prune.full to begin with")
    # (out, in, taps); a linear layer after flattened maps has a tap for each position
    alive = {}
    for name, (source, _) in wires.items():
        channels = mask[name].shape[1] if source is None else mask[_writer(wires, source)].shape[0]
        alive[name] = mask[name].reshape(len(mask[name]), channels, -1).any(2)
    keep = {group: torch.ones(len(mask[_writer(wires, group)]), dtype=torch.bool, device=mask[name].device)
            for _, group in wires.values() if group is not None}
    zero = {group: _zero_when_silent(model, wires, group, params, buffers) & silent for group in keep}
    while True:
        left = {name: _restrict(a, *(keep.get(group) for group in wires[name])) for name, a in alive.items()}
        changed = False
        for group, kept in keep.items():
            read = torch.stack([left[n].any(0) for n, (source, _) in wires.items() if source == group]).any(0)
            written = torch.stack([left[n].any(1) for n, (_, into) in wires.items() if into == group]).any(0)
            now = kept & read & (written | ~zero[group])
            changed |= bool((now != kept).any())
            keep[group] = now
        if not changed:
            return keep


def share(model: ModelSpec, keep: Channels) -> float:
    """Share of the dense forward pass's multiply-adds that the remnant needs, in [0, 1]."""
    wires, part = wiring(model), {group: float(k.sum()) / len(k) for group, k in keep.items()} | {None: 1.0}
    work = [(layer.flops, wires[f"{layer.name}.weight"]) for layer in layer_work(model)]
    return sum(flops * part[source] * part[into] for flops, (source, into) in work) / sum(flops for flops, _ in work)


def compact(model: ModelSpec, keep: Channels, tensors: Params | Buffers | Mask) -> Params:
    """The ``tensors`` (parameters, buffers or a mask) without the channels that are not in ``keep``, as copies.

    ``models.forward`` takes the result as it is: the functions read all widths from the tensors. Where a group loses every
    channel the network is cut through and its first channel is kept, so that shapes stay valid; its running statistics, which
    reach no output, then are its own.
    """
    wiring(model)  # refuses what has no remnant
    keep = {group: k if bool(k.any()) else torch.arange(len(k), device=k.device) == 0 for group, k in keep.items()}
    return take(model, tensors, {group: k.nonzero().flatten() for group, k in keep.items()})


def _restrict(alive: Tensor, source: Tensor | None, into: Tensor | None) -> Tensor:
    """``alive`` (out, in) with what removed channels read or write switched off."""
    if source is not None:
        alive = alive & source
    return alive if into is None else alive & into[:, None]


def _writer(wires: dict, group: str) -> str:
    return next(name for name, (_, into) in wires.items() if into == group)


def _zero_when_silent(model: ModelSpec, wires: dict, group: str, params: Params, buffers: Buffers) -> Tensor:
    """(C,) bool: whether each channel is zero, and stays so in training, once nothing writes it.

    Each summand of a residual stream must be zero by itself.
    """
    zeros = []
    for layer in (name.removesuffix(".weight") for name, (_, into) in wires.items() if into == group):
        weight = params[f"{layer}.weight"]
        constant = params.get(f"{layer}.bias", weight.new_zeros(len(weight)))
        if model.norm_kind == "none":
            zeros.append(constant == 0)
            continue
        norm = norm_of(model, layer)
        same = buffers[f"{norm}.running_mean"] == constant if model.norm_kind == "batch" else True
        zeros.append((params[f"{norm}.bias"] == 0) & same)
    return torch.stack(zeros).all(0)
