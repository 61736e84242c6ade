"""Refusals in one clear line, shared by everything that puts networks together."""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit.models.spec import ModelSpec
from dpkit.tree import Params, is_finite


def check_images(spec: ModelSpec, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is a floating batch (N, channels, image_size, image_size)."""
    expected = (spec.channels, spec.image_size, spec.image_size)
    if x.dim() != 4 or tuple(x.shape[1:]) != expected:
        raise ValueError(f"images must have shape (N, {', '.join(map(str, expected))}) for this network, "
                         f"got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"images must be floating numbers, got {x.dtype}; normalise them first")


def check_evaluation(images: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless there is an image and one label for each."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"the evaluation set must have at least 1 image and one label for each, "
                         f"got {len(images)} images and {len(labels)} labels")


def check_same(networks: dict[str, Params]) -> None:
    """Raise ``ValueError`` unless all ``networks`` (label -> parameters) are finite and agree in names and
    shapes.

    The line names the two networks, the tensor, and what each of them has.
    """
    (first, reference), *others = networks.items()
    for label, params in others:
        for name in [*reference, *params]:
            if name not in params or name not in reference:
                has, lacks = (first, label) if name in reference else (label, first)
                raise ValueError(f"networks {first} and {label} must have the same tensors, "
                                 f"but {name!r} is in {has} and not in {lacks}")
            left, right = tuple(reference[name].shape), tuple(params[name].shape)
            if left != right:
                raise ValueError(f"networks {first} and {label} must have tensors of the same shapes, "
                                 f"but {name!r} is {left} in {first} and {right} in {label}")
    for label, params in networks.items():
        if not is_finite(params):
            name = next(n for n, t in params.items() if t.is_floating_point() and not torch.isfinite(t).all())
            raise ValueError(f"network {label} must have finite weights, but {name!r} has NaN or infinite "
                             f"entries; its training diverged")


def spread(total: int, count: int) -> Tensor:
    """``min(count, total)`` indices (int64) evenly spaced over ``range(total)``, ascending.

    Evenly spaced rather than the first ones, because data sets stored class by class are common.
    """
    count = min(count, total)
    return torch.arange(count) * total // max(count, 1)
