"""Which networks may stand at the ends of a path: one line that names both sides where they may not."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from dpkit.models import ModelSpec, check_same
from dpkit.models.network import family
from dpkit.tree import Mask, Params


def check_networks(model: ModelSpec, trees: Mapping[str, Params]) -> None:
    """Raise ``ValueError`` unless all networks (label -> parameters and buffers) are finite, alike, and of ``model``.

    Shapes are compared among the networks only: what is left of a network after channels were removed is narrower than its
    specification says.
    """
    check_same(dict(trees))
    known = {name for layer in family(model).table(model) for name in (*layer.shapes(), *layer.buffers())}
    has = next(iter(trees.values()))
    wrong, missing = [n for n in has if n not in known], [n for n in sorted(known) if n not in has]
    if wrong or missing:
        parts = [f"{name!r} is no tensor of it" for name in wrong[:1]] + [f"they lack {name!r}" for name in missing[:1]]
        raise ValueError(f"networks {' and '.join(trees)} must be of {model.arch} with {model.norm_kind} norm, "
                         f"but {' and '.join(parts)}; pass the specification that they were made with")


def check_masks(masks: Mapping[str, Mask], networks: Mapping[str, Params] | None = None) -> None:
    """Raise ``ValueError`` unless all ``masks`` (label -> mask) keep the same weights.

    networks: label -> parameters; each must be zero where its mask removes a weight.
    """
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
            if not torch.equal(left, right):
                raise ValueError(f"networks {first} and {label} must have the same mask, but of {name!r} {first} keeps "
                                 f"{int(left.sum())} weights and {label} {int(right.sum())}, {int((left != right).sum())} of "
                                 f"{left.numel()} positions differ; compare children of one ticket")
    for label, params in (networks or {}).items():
        for name, mask in masks[label].items():
            extra = int(((params[name] != 0) & ~mask).sum())
            if extra:
                raise ValueError(f"network {label} must be zero where its mask removes weights, but {name!r} has {extra} others "
                                 f"there; pass the mask that it was trained with")


def check_starts(starts: Mapping[str, Params]) -> None:
    """Raise ``ValueError`` unless all networks began with the same parameters, bit for bit (label -> initial parameters)."""
    check_same(dict(starts))
    (first, reference), *others = starts.items()
    for label, start in others:
        for name, tensor in reference.items():
            if not torch.equal(tensor, start[name]):
                raise ValueError(f"networks {first} and {label} must start from the same initialisation, but {name!r} differs in "
                                 f"{int((tensor != start[name]).sum())} of {tensor.numel()} entries; compare children of one "
                                 f"initialisation, or leave starts out")
