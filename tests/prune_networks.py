"""A small network of every architecture, and masks for it, that the tests of pruning share."""
from __future__ import annotations

import torch

from dpkit import models, prune, tree
from dpkit.models import ModelSpec

torch.set_num_threads(1)


def small(arch: str, **changes) -> ModelSpec:
    """The architecture at 16 x 16 pixels in the least of a few widths that it allows."""
    for width in (4, 8, 16):
        try:
            return ModelSpec(arch=arch, width=width, image_size=16, classes=3, **changes)
        except ValueError:
            continue
    return ModelSpec(arch=arch, width=32, image_size=16, classes=3, **changes)


def drawn(model: ModelSpec, seed: int = 0):
    """Parameters and buffers of an initialisation."""
    return models.init(model, tree.generator_for(seed, "tests of pruning"))


def random_mask(model: ModelSpec, share: float, seed: int = 0):
    """A random mask that keeps this share of all weights."""
    full = prune.full(model, drawn(model)[0])
    scores = prune.random_scores(full, tree.generator_for(seed, "mask"))
    return prune.keep_highest(scores, full, max(1, round(share * prune.size(full))))


def flat(mask):
    return torch.cat([m.reshape(-1) for m in mask.values()])


def same(a, b):
    """Whether two masks, or two networks, have the same tensors in the same order."""
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
