"""Coresets: small sets chosen from the real images."""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit.data import Split, per_class_indices


def _places(labels: Tensor, classes: int, ipc: int) -> list[Tensor]:
    places = per_class_indices(labels, classes)
    for c, place in enumerate(places):
        if len(place) < ipc:
            raise ValueError(f"ipc must be at most the images of a class; class {c} has {len(place)}, got {ipc}")
    return places


def _picked(real: Split, chosen: list[Tensor]) -> Split:
    subset = real.select(torch.cat(chosen))
    pixels = subset.images.float() / 255 if subset.images.dtype == torch.uint8 else subset.images
    return Split(pixels, subset.labels)


def random(real: Split, classes: int, ipc: int, generator: torch.Generator) -> Split:
    """``ipc`` images of each class, drawn without replacement: (classes * ipc, C, H, W) float32 in [0, 1]."""
    places = _places(real.hard_labels(), classes, ipc)
    return _picked(real, [place[torch.randperm(len(place), generator=generator)[:ipc]] for place in places])


def herding(real: Split, classes: int, ipc: int, features: Tensor) -> Split:
    """Herding (Welling 2009; as used by Rebuffi et al. 2017): greedily keep the mean feature of the chosen near the class's.

    features: (N, D), of a trained network; each is scaled to length one.
    """
    if len(features) != len(real):
        raise ValueError(f"features must be one row per image, {len(real)}; got {len(features)}")
    chosen = []
    for place in _places(real.hard_labels(), classes, ipc):
        own = torch.nn.functional.normalize(features[place].double(), dim=1)
        mean, total, free = own.mean(0), torch.zeros_like(own[0]), torch.ones(len(own), dtype=torch.bool)
        picks = []
        for count in range(1, ipc + 1):
            gap = ((total + own) / count - mean).norm(dim=1).masked_fill(~free, torch.inf)
            pick = int(gap.argmin())
            picks.append(pick)
            total, free[pick] = total + own[pick], False
        chosen.append(place[torch.tensor(picks)])
    return _picked(real, chosen)
