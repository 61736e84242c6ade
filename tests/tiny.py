"""Tiny networks, images and functions that the tests of training and of what builds on it share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dpkit import distill, models, tree
from dpkit.data import AugmentSpec, Split
from dpkit.models import ModelSpec
from dpkit.training import TrainSpec, fit

torch.set_num_threads(1)  # as in a worker: equal bits everywhere, and fast at this size

MODEL = ModelSpec(width=4, image_size=8, classes=3)
BATCH_NORM = MODEL.replace(norm="batch")
PLAIN = TrainSpec(epochs=3, batch_size=8, lr=0.05, augment=AugmentSpec(operations=""), cutmix=0)
FULL = TrainSpec(epochs=3, batch_size=8, lr=0.05)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])


def coloured() -> Split:
    """Twenty 8 x 8 images of three classes that differ in colour."""
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 3
    pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=source, dtype=torch.uint8) // 2
    pixels[torch.arange(20), labels] += 100  # each class has a colour, so that there is something to learn
    return Split(pixels, labels)


def start(model=MODEL, count=1):
    networks = [models.init(model, tree.generator_for(p, "init")) for p in range(count)]
    return tree.stack([n[0] for n in networks]), tree.stack([n[1] for n in networks])


def train(spec, split, *, model=MODEL, seeds=(7,), networks=None, **options):
    params, buffers = networks or start(model, len(seeds))
    return fit(spec, model, split, MEAN, STD, params, buffers, list(seeds), **options)


def member(population, p):
    return {n: t[p : p + 1] for n, t in population.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a, b, atol=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-4)


def some_masks(params, share=0.5):
    source = torch.Generator().manual_seed(9)
    return {n: torch.rand(params[n].shape, generator=source) > share for n in models.prunable(MODEL)}


class Plain(nn.Module):
    """The same network as a module, with parameters of the same names."""

    def __init__(self, model, params, buffers):
        super().__init__()
        for i, channels in enumerate((model.channels, model.width, model.width)):
            setattr(self, f"conv{i}", nn.Conv2d(channels, model.width, 3, padding=1))
            batch = model.norm_kind == "batch"
            setattr(
                self,
                f"norm{i}",
                nn.BatchNorm2d(model.width) if batch else nn.GroupNorm(model.width, model.width),
            )
        self.classifier = nn.Linear(model.width, model.classes)
        self.load_state_dict({n: t[0] for n, t in (params | buffers).items()}, strict=False)

    def forward(self, x):
        for i in range(3):
            x = F.avg_pool2d(F.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))), 2)
        return self.classifier(x.flatten(1))


def learned(spec, model, real, mean, std, seed, form="auto", **options):
    """Images and history that a matching method learns: (split, history)."""
    task = distill.Task(real=real, mean=mean, std=std, model=model, seed=seed, **options)
    made = getattr(distill, spec.method)(spec, task, form)
    return made.split, list(made.history)
