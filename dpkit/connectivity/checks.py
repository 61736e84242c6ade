"""Which networks may stand at the ends of a path: one line that names both sides where they may not."""
from __future__ import annotations

from collections.abc import Mapping

from dpkit.models import ModelSpec, check_masks, check_same, check_starts
from dpkit.models.network import family
from dpkit.tree import Params

__all__ = ["check_masks", "check_networks", "check_starts"]


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
        them = "they lack" if len(trees) > 1 else "it lacks"
        parts = [f"{name!r} is no tensor of it" for name in wrong[:1]] + [f"{them} {name!r}" for name in missing[:1]]
        who = f"network{'s' * (len(trees) > 1)} {' and '.join(trees)}"
        raise ValueError(f"{who} must be of {model.arch} with {model.norm_kind} norm, "
                         f"but {' and '.join(parts)}; pass the specification that they were made with")
