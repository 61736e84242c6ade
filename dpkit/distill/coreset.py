"""Coresets: small sets chosen from the real images, class by class.

Herding and k-center look at the features of the network that ``task.networks[0]`` ends with, the classifier's input in eval mode,
each scaled to length one; EL2N at the predictions of the networks that the trajectories begin with.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models, tree
from dpkit.data import Split, normalise
from dpkit.distill.interface import Made, MethodSpec, Task
from dpkit.tree import Buffers, Params

CHUNK = 500  # images a forward pass


@dataclass(frozen=True, kw_only=True)
class CoresetSpec(MethodSpec):
    """``ipc`` real images of each class. Nothing is learned: no activations are held for a backward pass."""


@dataclass(frozen=True, kw_only=True)
class RandomSpec(CoresetSpec):
    """Real images drawn at random."""

    method: ClassVar[str] = "random"


@dataclass(frozen=True, kw_only=True)
class HerdingSpec(CoresetSpec):
    """Herding (Welling, ICML 2009; as used for exemplars by Rebuffi et al. 2017, arXiv 1611.07725, algorithm 4)."""

    method: ClassVar[str] = "herding"


@dataclass(frozen=True, kw_only=True)
class KCenterSpec(CoresetSpec):
    """Greedy k-center (Sener and Savarese 2018, arXiv 1708.00489, algorithm 1), in each class on its own.

    Departure: features have length one, as for herding; the paper takes them as they are.
    """

    method: ClassVar[str] = "k_center"


@dataclass(frozen=True, kw_only=True)
class EL2NSpec(CoresetSpec):
    """The images of lowest EL2N score (Paul et al. 2021, arXiv 2107.07075, section 2).

    Departure: the paper removes the lowest scores, as it keeps most of the images. A set of a few images a class learns more from
    the easiest ones (Sorscher et al. 2022, arXiv 2206.14486).
    """

    method: ClassVar[str] = "el2n"


def random(spec: RandomSpec, task: Task) -> Made:
    """``ipc`` images of each class, drawn without replacement. Raises ``ValueError`` where a class has fewer."""
    generator = tree.generator_for(task.seed, "random")
    return _made(task, [place[torch.randperm(len(place), generator=generator)[:spec.ipc]] for place in task.places(spec.ipc)])


def herding(spec: HerdingSpec, task: Task) -> Made:
    """:func:`herd` in each class. Raises ``ValueError`` where a class has too few images or without a trained network."""
    return _made(task, _by_features(spec, task, herd))


def k_center(spec: KCenterSpec, task: Task) -> Made:
    """:func:`farthest_first` in each class. Raises ``ValueError`` where a class has too few images or without a network."""
    return _made(task, _by_features(spec, task, farthest_first))


def el2n(spec: EL2NSpec, task: Task) -> Made:
    """The ``ipc`` images of each class with the lowest mean score over the networks, the lowest first; ties by position.

    Raises ``ValueError`` where a class has too few images or when there are no networks.
    """
    places = task.places(spec.ipc)
    score = torch.stack([el2n_scores(task, *network[0]) for network in _networks(spec, task)]).mean(0)
    return _made(task, [place[score[place].argsort(stable=True)[:spec.ipc]] for place in places])


def herd(features: Tensor, count: int) -> Tensor:
    """Positions (count,) that greedily keep the mean feature of the chosen near the mean of all ``features`` (N, D)."""
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free, picks = torch.ones(len(features), dtype=torch.bool), []
    for size in range(1, count + 1):
        gap = ((total + features) / size - mean).norm(dim=1).masked_fill(~free, torch.inf)
        picks.append(int(gap.argmin()))
        total, free[picks[-1]] = total + features[picks[-1]], False
    return torch.tensor(picks)


def farthest_first(features: Tensor, count: int) -> Tensor:
    """Positions (count,): the row of ``features`` (N, D) nearest to their mean, then each time the farthest from all chosen.

    At most twice the smallest possible largest distance of any row to its nearest chosen one, given the first. The paper starts
    from labelled images; as there are none, the first centre is the most typical image.
    """
    picks = [int((features - features.mean(0)).norm(dim=1).argmin())]
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype)
    while len(picks) < count:
        nearest = torch.minimum(nearest, (features - features[picks[-1]]).norm(dim=1))
        nearest[picks[-1]] = -1.0  # below zero: equal images may still be chosen, the same one may not
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


@torch.no_grad()
def el2n_scores(task: Task, params: Params, buffers: Buffers) -> Tensor:
    """``||softmax(f(x)) - y||`` of each real image, in eval mode: (N,) float64 in [0, sqrt 2]."""
    target = F.one_hot(task.real.hard_labels().cpu(), task.model.classes)
    logits = _forward(task, params, buffers, lambda *at: models.forward(task.model, *at)[0])
    return (logits.softmax(1) - target).norm(dim=1)


def _by_features(spec: CoresetSpec, task: Task, choose: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    places = task.places(spec.ipc)
    found = F.normalize(_forward(task, *_networks(spec, task)[0][-1], lambda *at: models.features(task.model, *at)), dim=1)
    return [place[choose(found[place], spec.ipc)] for place in places]


def _networks(spec: CoresetSpec, task: Task):
    if not task.networks:
        raise ValueError(f"{spec.method} needs networks trained on real data, got none; give at least one trajectory")
    return task.networks


@torch.no_grad()
def _forward(task: Task, params: Params, buffers: Buffers, function: Callable[[Params, Buffers, Tensor], Tensor]) -> Tensor:
    """``function`` of all normalised real images, float64 on the CPU."""
    params, buffers = tree.to(params, task.device), tree.to(buffers, task.device)
    return torch.cat([function(params, buffers, normalise(x.to(task.device), task.mean, task.std)).cpu().double()
                      for x in task.real.images.split(CHUNK)])


def _made(task: Task, chosen: list[Tensor]) -> Made:
    subset = task.real.select(torch.cat(chosen)).to("cpu")
    pixels = subset.images.float() / 255 if subset.images.dtype == torch.uint8 else subset.images
    return Made(Split(pixels, subset.labels))
