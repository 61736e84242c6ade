"""What networks that are put together must share, and what they are evaluated with: one line that names both sides."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpkit.models.checks import check_same
from dpkit.models.network import family
from dpkit.models.spec import ModelSpec
from dpkit.tree import Buffers, Mask, Params


def check_masks(masks: Mapping[str, Mask], networks: Mapping[str, Params] | None = None) -> None:
    """Raise ``ValueError`` unless all ``masks`` (label -> mask) are boolean and keep the same weights.

    networks: label -> parameters; each must have the tensors of its mask, and be zero where it removes a weight.
    """
    for label, mask in masks.items():
        for name, keep in mask.items():
            if keep.dtype != torch.bool:
                raise ValueError(f"the mask of network {label} must be boolean (True keeps a weight), got {keep.dtype} for "
                                 f"{name!r}; compare it with 0")
    (first, reference), *others = masks.items()
    for label, mask in others:
        for name in [*reference, *mask]:
            if name not in mask or name not in reference:
                has, lacks = (first, label) if name in reference else (label, first)
                raise ValueError(f"networks {first} and {label} must have the same mask, but {name!r} is masked in {has} and not "
                                 f"in {lacks}; compare children of one ticket")
            left, right = reference[name], mask[name]
            if left.shape != right.shape:
                raise ValueError(f"networks {first} and {label} must have the same mask, but {name!r} is {tuple(left.shape)} in "
                                 f"{first} and {tuple(right.shape)} in {label}; compare children of one ticket")
            if not torch.equal(left, right.to(left.device)):
                raise ValueError(f"networks {first} and {label} must have the same mask, but of {name!r} {first} keeps "
                                 f"{int(left.sum())} weights and {label} {int(right.sum())}, "
                                 f"{int((left != right.to(left.device)).sum())} of {left.numel()} positions differ; compare "
                                 f"children of one ticket")
    for label, params in (networks or {}).items():
        for name, mask in masks[label].items():
            if name not in params or params[name].shape != mask.shape:
                has = f"is {tuple(params[name].shape)} there" if name in params else "is not there"
                raise ValueError(f"the mask of network {label} must be over its weights, but {name!r}, {tuple(mask.shape)} in "
                                 f"the mask, {has}; pass the mask that it was trained with")
            extra = int(((params[name] != 0) & ~mask.to(params[name].device)).sum())
            if extra:
                raise ValueError(f"network {label} must be zero where its mask removes weights, but {name!r} has {extra} others "
                                 f"there; pass the mask that it was trained with")


def check_starts(starts: Mapping[str, Params], networks: Mapping[str, Params] | None = None) -> None:
    """Raise ``ValueError`` unless all networks began with the same parameters, bit for bit (label -> initial parameters).

    networks: label -> parameters after training; each must have the tensors of its start.
    """
    check_same(dict(starts))
    (first, reference), *others = starts.items()
    for label, start in others:
        for name, tensor in reference.items():
            if not torch.equal(tensor, start[name].to(tensor.device)):
                raise ValueError(f"networks {first} and {label} must start from the same initialisation, but {name!r} differs in "
                                 f"{int((tensor != start[name].to(tensor.device)).sum())} of {tensor.numel()} entries; compare "
                                 f"children of one initialisation, or leave starts out")
    for label, params in (networks or {}).items():
        check_same({f"{label} at its start": starts[label], label: params})


def check_shared(networks: Mapping[str, Params], masks: Mapping[str, Mask] | None = None,
                 starts: Mapping[str, Params] | None = None) -> None:
    """:func:`check_masks` and :func:`check_starts` of ``networks`` (label -> parameters), where there are masks and starts.

    Raises ``ValueError`` also where these are of other networks than ``networks``.
    """
    for what, given in (("masks", masks), ("starts", starts)):
        if given is not None and set(given) != set(networks):
            raise ValueError(f"{what} must be given for networks {', '.join(networks)}, got {', '.join(given)}")
    if masks is not None:
        check_masks(masks, networks)
    if starts is not None:
        check_starts(starts, networks)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` are (N,) whole numbers of classes, int64, from 0 to ``classes`` - 1."""
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (N,) whole numbers (int64), one class an image, got {tuple(labels.shape)} "
                         f"{labels.dtype}")
    low, high = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie between 0 and {classes - 1}, as the network knows {classes} classes, got "
                         f"{low if low < 0 else high}; pass the specification of a network for these images")


def check_buffers(model: ModelSpec, buffers: Buffers, what: str) -> None:
    """Raise ``ValueError`` unless ``buffers`` are finite and have the names that ``model`` says. Shapes are free."""
    known = [name for layer in family(model).table(model) for name in layer.buffers()]
    wrong, missing = [n for n in buffers if n not in known], [n for n in known if n not in buffers]
    if wrong or missing:
        parts = [f"{name!r} is none of them" for name in wrong[:1]] + [f"{name!r} is missing" for name in missing[:1]]
        raise ValueError(f"{what} must have the buffers of {model.arch} with {model.norm_kind} norm, but {' and '.join(parts)}; "
                         f"pass those of the network that the parameters belong to")
    for name, tensor in buffers.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{what} must have finite buffers, but {name!r} has NaN or infinite entries; its training diverged")
