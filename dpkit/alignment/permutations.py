"""Orders of a network's channels that leave its function as it is: how they are drawn, checked, undone and applied."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpkit.models import ModelSpec
from dpkit.models.wiring import groups, take
from dpkit.tree import Buffers, Mask, Params

Permutations = dict[str, Tensor]
"""For each group of channels (:func:`dpkit.models.wiring.groups`) an order p (C,) int64 on the CPU: channel i of the permuted
network is channel p[i] of the network before. A group that is left out stays as it is."""


def identity(model: ModelSpec) -> Permutations:
    """The permutations that change nothing."""
    return {name: torch.arange(group.size) for name, group in groups(model).items()}


def draw(model: ModelSpec, generator: torch.Generator) -> Permutations:
    """Permutations drawn uniformly from all that leave the network's function as it is."""
    found: Permutations = {}
    sizes = groups(model)
    for names in bundles(model):
        group = sizes[names[0]]
        order = torch.randperm(group.blocks, generator=generator)
        for name in names:
            inner = [torch.randperm(group.size // group.blocks, generator=generator) for _ in range(group.blocks)]
            found[name] = joined(order, inner)
    return found


def inverse(permutations: Permutations) -> Permutations:
    """The permutations that undo these."""
    return {name: torch.argsort(order) for name, order in permutations.items()}


def permute(model: ModelSpec, tensors: Params | Buffers | Mask, permutations: Permutations) -> Params:
    """``tensors`` (parameters, buffers or a mask; any of them) of ``model`` with their channels in another order, as copies.

    The same permutations must be given to parameters, buffers and mask of one network, which then computes what it did.
    Raises ``ValueError`` with one line on what is no permutation of a group, or tears apart what must stay together, and
    on tensors of another network.
    """
    check(model, permutations)
    return take(model, tensors, permutations)


def transfer(model: ModelSpec, mask: Mask, permutations: Permutations) -> Mask:
    """The ``mask`` of network a in the order of network b's own channels, to train from b's start.

    permutations: those that bring b to a, as :func:`dpkit.alignment.weight_matching` of the two *trained* networks returns them.
    Adnan et al. 2025, "Sparse Training from Random Initialization" (arXiv 2505.05143), who match activations in place of
    weights. Each tensor keeps as many weights as before. Raises ``ValueError`` as :func:`permute` does, and on a mask that is
    not boolean.
    """
    for name, keep in mask.items():
        if keep.dtype != torch.bool:
            raise ValueError(f"the mask of network a must be boolean (True keeps a weight) to be moved to b, got {keep.dtype} "
                             f"for {name!r}; compare it with 0")
    return permute(model, mask, inverse(permutations))


def check(model: ModelSpec, permutations: Permutations) -> None:
    """Raise ``ValueError`` with one line unless ``permutations`` leave the function of every network of ``model`` as it is."""
    sizes = groups(model)
    whole = identity(model) | permutations
    for name, order in permutations.items():
        if name not in sizes:
            raise ValueError(f"permutations must be of groups of {model.arch}, such as {next(iter(sizes))!r}, got {name!r}; "
                             "see models.wiring.groups")
        size, blocks = sizes[name].size, sizes[name].blocks
        if order.shape != (size,) or order.dtype != torch.int64 or not torch.equal(order.sort().values.cpu(), torch.arange(size)):
            raise ValueError(f"the permutation of {name} must hold each of 0 to {size - 1} once (int64), got "
                             f"{tuple(order.shape)} {order.dtype}; see models.wiring.groups")
        places = order.cpu().reshape(blocks, -1) // (size // blocks)
        if not bool((places == places[:, :1]).all()):
            raise ValueError(f"the permutation of {name} must keep its {blocks} blocks of {size // blocks} channels together, "
                             "as they are normalised or attended to together; see models.wiring.groups")
    for names in bundles(model):
        orders = [whole[name].cpu().reshape(sizes[name].blocks, -1)[:, 0] // (sizes[name].size // sizes[name].blocks)
                  for name in names]
        for name, order in zip(names[1:], orders[1:], strict=True):
            if not torch.equal(order, orders[0]):
                raise ValueError(f"the permutations of {names[0]} and {name} must put their blocks in the same order, "
                                 f"got {orders[0].tolist()} and {order.tolist()}; see models.wiring.groups")


def bundles(model: ModelSpec) -> list[tuple[str, ...]]:
    """Names of groups that must be ordered together, in forward order."""
    found: dict[str, list[str]] = {}
    for name, group in groups(model).items():
        found.setdefault(group.order, []).append(name)
    return [tuple(names) for names in found.values()]


def joined(order: Tensor, inner: Sequence[Tensor]) -> Tensor:
    """Blocks in ``order`` (B,), with ``inner`` the order inside block i of the result: one permutation."""
    return torch.cat([start * len(p) + p for start, p in zip(order.tolist(), inner, strict=True)])
