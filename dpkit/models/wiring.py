"""Which channels each axis of each tensor speaks of: one table for taking channels out and for putting them in another order.

A *group* is a set of channels that stand in the same order wherever they are written and read: the outputs of one convolution or
linear layer with its bias, norm and running statistics, and the inputs of the layers behind it; a whole residual stream, as what
is added must be in one order. Pixels, colours, positions and classes belong to no group.

Putting the channels of a group in another order, everywhere alike, leaves a network's function what it was, up to the order in
which floating-point sums run. Not every group may take any order by itself:

- Behind group norm (:func:`dpkit.models.layers.groups`) channels that are normalised together must stay together: whole
  blocks may change places, and channels inside a block.
- Heads of attention may change places, queries, keys and values of a head together.
- Inside a head queries and keys share an order (their product is a sum over it), and values and the columns of the output map
  that read them share another.
- The dimensions of a ViT's tokens (patches' map, positions, norms, all that reads or writes the residual stream) have one order
  in all blocks; which token comes first cannot be changed.

More than permutations leave some of these layers as they were: any invertible map between queries and keys, scales between ReLU
layers. Those are no permutations and not described here.
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from dpkit.models import layers, resnet, vit
from dpkit.models.layers import Norm, Weight
from dpkit.models.network import family, prunable
from dpkit.models.spec import ModelSpec
from dpkit.tree import Buffers, Mask, Params

STREAM = "stream"
"""The group of a ViT's tokens."""


@dataclasses.dataclass(frozen=True)
class Group:
    """size: channels.  blocks: how many runs of equal length they are cut into, each of which stays together.

    order: groups with the same word have their blocks in the same order; the queries and the values of an attention do.
    """

    size: int
    blocks: int
    order: str


@dataclasses.dataclass(frozen=True)
class Axis:
    """Whose channels stand along one axis of a tensor: those of ``groups``, one group after the other.

    taps: neighbouring entries for each channel; more than one where a linear layer reads flattened maps.
    """

    groups: tuple[str, ...]
    taps: int = 1


def wiring(model: ModelSpec) -> dict[str, tuple[str | None, str | None]]:
    """For each prunable weight the group of channels that it reads and the one that it writes; None for images and logits.

    A residual stream is one group from the layer that begins it to the next change of width, as its channels are added. Norms do
    not matter here. Raises ``ValueError`` for a ViT, whose tokens are one stream that attention mixes.
    """
    if model.arch == "vit":
        raise ValueError("channels can be followed through convolutions and MLPs only, got vit, whose attention mixes them; "
                         "use another architecture")
    if not model.is_resnet:
        names = prunable(model)
        groups = [name.removesuffix(".weight") for name in names[:-1]]
        return dict(zip(names, zip([None, *groups], [*groups, None], strict=True), strict=True))
    found: dict[str, tuple[str | None, str | None]] = {"conv1.weight": (None, "layer1")}
    stream = "layer1"
    for name, into, out, stride in resnet.blocks(model):
        after = name.partition(".")[0]
        found[f"{name}.conv1.weight"] = (stream, f"{name}.conv1")
        found[f"{name}.conv2.weight"] = (f"{name}.conv1", after)
        if stride != 1 or into != out:
            found[f"{name}.downsample.0.weight"] = (stream, after)
        stream = after
    found["fc.weight"] = (stream, None)
    return found


def groups(model: ModelSpec) -> dict[str, Group]:
    """All groups of channels by name, in the order in which a forward pass can settle them.

    Every architecture has them: those of :func:`wiring`; of a ViT the ``stream`` and, in each block, ``attn.qk`` (of queries and
    of keys), ``attn.v`` (values) and ``mlp`` (hidden units).
    """
    found: dict[str, Group] = {}
    if model.arch == "vit":
        found[STREAM] = Group(model.width, 1, STREAM)
        for block in (f"blocks.{i}" for i in range(vit.DEPTH)):
            for part in ("qk", "v"):
                found[f"{block}.attn.{part}"] = Group(model.width, vit.heads(model.width), f"{block}.attn")
            found[f"{block}.mlp"] = Group(vit.EXPANSION * model.width, 1, f"{block}.mlp")
        return found
    sizes, wires = tensor_shapes(model), wiring(model)
    for name, (_, into) in wires.items():
        if into is not None and into not in found:
            size = sizes[name][0]
            found[into] = Group(size, layers.groups(size) if model.norm_kind == "group" else 1, into)
    return _settled(found, wires)


def axes(model: ModelSpec) -> dict[str, tuple[Axis | None, ...]]:
    """For each parameter and each buffer what stands along each of its axes; None where that is no group's channels."""
    links = _links(model)
    found: dict[str, tuple[Axis | None, ...]] = {}
    written: Axis | None = None
    for layer in family(model).table(model):
        if isinstance(layer, Weight):
            read, written = links[layer.name]
            for name, shape in layer.shapes().items():
                found[name] = (written, read, *[None] * (len(shape) - 2))[:len(shape)]
        elif isinstance(layer, Norm):
            # a ViT normalises what attention and MLP read, the others what a layer wrote
            along = Axis((STREAM,)) if model.arch == "vit" else written
            found |= dict.fromkeys([*layer.shapes(), *layer.buffers()], (along,))
        else:  # a ViT's positions
            found[layer.name] = (*[None] * (len(layer.shape) - 1), Axis((STREAM,)))
    return found


def take(model: ModelSpec, tensors: Params | Buffers | Mask, channels: Mapping[str, Tensor]) -> Params:
    """The ``tensors`` (parameters, buffers or a mask; any of them) with the given channels only, in the given order, as copies.

    channels: for each group that changes, the indices (n,) int64 of the channels to take. Nothing else is done: whether the
    result is a network that computes the same is for the caller to know.
    Raises ``ValueError`` with one line on a tensor that the network does not have, or of another shape.
    """
    table, sizes, shapes = axes(model), groups(model), tensor_shapes(model)
    result = {}
    for name, tensor in tensors.items():
        if name not in table:
            raise ValueError(f"{name!r} belongs to no layer of {model.arch}; pass parameters, buffers or a mask of this network")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name!r} must be {shapes[name]} in {model.arch} with width {model.width}, got "
                             f"{tuple(tensor.shape)}; pass tensors of this network")
        taken = tensor
        for place, axis in enumerate(table[name]):
            if axis is not None and not channels.keys().isdisjoint(axis.groups):
                taken = taken.index_select(place, entries(axis, sizes, channels).to(tensor.device))
        result[name] = tensor.clone() if taken is tensor else taken
    return result


def entries(axis: Axis, sizes: Mapping[str, Group], channels: Mapping[str, Tensor]) -> Tensor:
    """Indices (n,) int64 along an axis that take ``channels`` of its groups, and all channels of the others."""
    found, start = [], 0
    for name in axis.groups:
        chosen = channels[name].cpu() if name in channels else torch.arange(sizes[name].size)
        found.append(start + (chosen[:, None] * axis.taps + torch.arange(axis.taps)).flatten())
        start += sizes[name].size * axis.taps
    return torch.cat(found)


def norm_of(model: ModelSpec, layer: str) -> str:
    """Name of the norm right behind the weight layer called ``layer``; raises ``ValueError`` where there is none."""
    for entry, behind in itertools.pairwise(family(model).table(model)):
        if entry.name == layer and isinstance(behind, Norm):
            return behind.name
    raise ValueError(f"layer must have a norm behind it, got {layer!r} of {model.arch} with norm {model.norm_kind}")


def _links(model: ModelSpec) -> dict[str, tuple[Axis | None, Axis | None]]:
    """What each weight layer reads and writes."""
    if model.arch == "vit":
        stream = Axis((STREAM,))
        found: dict[str, tuple[Axis | None, Axis | None]] = {"patch_embed.proj": (None, stream), vit.CLASSIFIER: (stream, None)}
        for block in (f"blocks.{i}" for i in range(vit.DEPTH)):
            qk, v, hidden = f"{block}.attn.qk", f"{block}.attn.v", Axis((f"{block}.mlp",))
            found |= {f"{block}.attn.qkv": (stream, Axis((qk, qk, v))), f"{block}.attn.proj": (Axis((v,)), stream),
                      f"{block}.mlp.fc1": (stream, hidden), f"{block}.mlp.fc2": (hidden, stream)}
        return found
    shapes, sizes, linked = tensor_shapes(model), groups(model), {}
    for name, (source, into) in wiring(model).items():
        read = None if source is None else Axis((source,), shapes[name][1] // sizes[source].size)
        linked[name.removesuffix(".weight")] = (read, None if into is None else Axis((into,)))
    return linked


def tensor_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in family(model).table(model):
        found |= layer.shapes() | {name: tuple(t.shape) for name, t in layer.buffers().items()}
    return found


def _settled(found: dict[str, Group], wires: Mapping[str, tuple[str | None, str | None]]) -> dict[str, Group]:
    """``found`` so ordered that some layer that writes a group reads images or a group before it."""
    order: list[str] = []
    while len(order) < len(found):
        known = {None, *order}
        order += [next(into for source, into in wires.values() if source in known and into not in known)]
    return {name: found[name] for name in order}
