"""DM: dataset condensation with distribution matching (Zhao and Bilen, WACV 2023, arXiv 2110.04181).

No network is trained: each step draws a new one, and moves the images of each class so that the mean of their embeddings comes
nearer to that of real images. The images are optimised as the networks see them, normalised, and are not clamped, as published.
The augmentation is DSA's, one operation drawn for each class and step.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpkit import models, tree
from dpkit.data import AugmentSpec, Split, apply, draw, normalise
from dpkit.data.augment import Draw
from dpkit.distill.interface import Made, MethodSpec, Task
from dpkit.distill.matching import sent
from dpkit.models import ModelSpec
from dpkit.models.layers import Normaliser
from dpkit.models.network import family
from dpkit.tree import Buffers, Params

STARTS = ("real", "noise")
EVERY = 50  # steps between two checkpoints, each of which waits for the device
REAL_SHARE = 0.5  # peak memory of a forward pass without a graph, in that of a plain backward pass (measured 0.47, ConvNet-3)


@dataclass(frozen=True, kw_only=True)
class DMSpec(MethodSpec):
    """Distribution matching; defaults as published for CIFAR-10 (main_DM.py of VICO-UoE/DatasetCondensation).

    steps: image steps, each on a network of its own. lr: of the normalised images, for a loss that is a sum over classes and
    over the coordinates of the embedding; narrow networks have few coordinates and want a larger one. momentum: of the image
    steps. real_batch: real images a class and step, all of them where a class has fewer. augment: operations joined by ``_``,
    drawn once a class and step for real and synthetic images alike; empty for none. start: ``real`` images of the class or
    standard normal ``noise``.
    """

    method: ClassVar[str] = "dm"
    steps: int = 20000
    lr: float = 1.0
    momentum: float = 0.5
    real_batch: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    start: str = "real"

    def check(self) -> None:
        super().check()
        for name in ("steps", "real_batch"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        self.require(self.lr > 0 and math.isfinite(self.lr), f"lr must be > 0, got {self.lr:g}")
        self.between("momentum", 0, 1, open_high=True)
        self.one_of("start", STARTS)
        self.augmentation  # noqa: B018 - checks the names

    @property
    def augmentation(self) -> AugmentSpec:
        """What ``augment`` says, with the project's amounts."""
        return AugmentSpec(operations=self.augment, single=True)

    def held(self, classes: int) -> float:
        return classes * self.fewest(classes)

    def fewest(self, classes: int) -> float:
        return self.ipc + REAL_SHARE * self.real_batch

    def lower(self) -> str:
        return "ipc or real_batch"


def starting(task: Task, ipc: int, start: str) -> Tensor:
    """Normalised images to start from, (K * ipc, C, S, S) float32 on the CPU, class after class.

    start: ``real`` for real images of the class without repetition, ``noise`` for standard normal pixels. Raises ``ValueError``
    where a class has fewer than ``ipc`` images and real ones are asked for.
    """
    generator = tree.generator_for(task.seed, "start")
    if start == "noise":
        model = task.model
        return torch.randn(model.classes * ipc, model.channels, model.image_size, model.image_size, generator=generator)
    chosen = [place[torch.randperm(len(place), generator=generator)[:ipc]] for place in task.places(ipc)]
    return normalise(task.real.images[torch.cat(chosen).to(task.real.images.device)], task.mean, task.std).cpu()


def stored(task: Task, images: Tensor, ipc: int) -> Split:
    """Normalised images (K * ipc, C, S, S) as pixel values, not clamped, with their labels, on the CPU."""
    images = images.detach().cpu().float()
    pixels = images * task.std.view(1, -1, 1, 1).cpu() + task.mean.view(1, -1, 1, 1).cpu()
    return Split(pixels, torch.arange(task.model.classes).repeat_interleave(ipc))


def embedding(model: ModelSpec, params: Params, buffers: Buffers, x: Tensor) -> Tensor:
    """The classifier's input (N, D) in train mode: BatchNorm takes the statistics of the batch ``x`` (N, C, S, S)."""
    return family(model).features(model, params, x, Normaliser(model.norm_kind, params, buffers, train=True))


def distances(model: ModelSpec, params: Params, buffers: Buffers, real: Sequence[Tensor],
              images: Tensor) -> Tensor:
    """Squared distance between the mean embeddings of each class, (G,), differentiable in ``images`` (the paper's loss).

    real: G tensors (B_g, C, S, S); images: (G, M, C, S, S); all normalised and augmented. BatchNorm sees the real images of all
    G classes as one batch and the others as a second one, as published.
    """
    with torch.no_grad():
        parts = embedding(model, params, buffers, torch.cat(list(real))).split([len(x) for x in real])
        target = torch.stack([part.mean(0) for part in parts])
    found = embedding(model, params, buffers, images.flatten(0, 1)).view(*images.shape[:2], -1).mean(1)
    return (found - target).square().sum(1)


def dm(spec: DMSpec, task: Task) -> Made:
    """Learn ``ipc`` images a class by ``steps`` steps of gradient descent with momentum on the sum of :func:`distances`.

    history: the mean over classes of the distance, at each step. On a CPU, and on a GPU without room for all, one class after
    another; BatchNorm networks need all classes at once. Raises ``ValueError`` when a class has too few images or memory does
    not suffice, ``FloatingPointError`` when the images stop being finite.
    """
    model, device = task.model, torch.device(task.device)
    groups = _groups(spec, task)
    places = task.places(spec.ipc if spec.start == "real" else 1)
    real, mean, std = (t.to(device) for t in (task.real.images, task.mean, task.std))
    before = starting(task, spec.ipc, spec.start)
    if task.resume is None:
        images, history = before.to(device), torch.zeros(0, dtype=torch.float64)
        velocity = torch.zeros_like(images)
    else:
        images, velocity = (task.resume[name].to(device).clone() for name in ("images", "velocity"))
        history = task.resume["history"].clone()
    recent: list[Tensor] = []
    for step in range(len(history), spec.steps):
        generator = tree.generator_for(task.seed, "dm", step)
        params, buffers = ({name: t.to(device, non_blocking=True) for name, t in part.items()}
                           for part in models.init(model, generator))
        shared = draw(spec.augmentation, model.classes, generator)
        rows = [place[torch.randperm(len(place), generator=generator)[:spec.real_batch]] for place in places]
        gradient, total = torch.empty_like(images), torch.zeros((), device=device)
        for group in groups:
            at = sent(group, device)
            own = images.view(model.classes, spec.ipc, *images.shape[1:])[at].requires_grad_()
            sizes = [len(rows[c]) for c in group]
            batch = normalise(real[sent(torch.cat([rows[c] for c in group]), device)], mean, std)
            batch = _same(spec, batch, shared, group, sizes).split(sizes)
            fake = _same(spec, own.flatten(0, 1), shared, group, [spec.ipc] * len(group)).view(own.shape)
            loss = distances(model, params, buffers, batch, fake).sum()
            found, = torch.autograd.grad(loss, own)
            gradient.view(model.classes, spec.ipc, *images.shape[1:])[at] = found
            total = total + loss.detach()
        velocity = spec.momentum * velocity + gradient
        images = images - spec.lr * velocity
        recent.append(total / model.classes)
        if (step + 1) % EVERY == 0 or step + 1 == spec.steps:
            history, recent = torch.cat([history, torch.stack(recent).double().cpu()]), []
            if not bool(torch.isfinite(images).all()):
                raise FloatingPointError(f"the images are not finite after step {step + 1}; lower lr")
            task.keep({"images": images.cpu(), "velocity": velocity.cpu(), "history": history})
        task.tick(step + 1, spec.steps)
    return Made(stored(task, images, spec.ipc), tuple(history.tolist()), before=stored(task, before, spec.ipc).images)


def _groups(spec: DMSpec, task: Task) -> list[list[int]]:
    """The classes that are worked on at the same time."""
    room, classes = task.room(spec), list(range(task.model.classes))
    batch_norm = task.model.norm_kind == "batch"
    if batch_norm and not room:
        raise ValueError(f"dm with batch norm needs the activations of {spec.held(len(classes)):,.0f} images at once, the memory "
                         f"bound allows {task.held:,.0f}; raise distill_memory, or lower {spec.lower()}")
    if batch_norm or (room and torch.device(task.device).type != "cpu"):
        return [classes]
    return [[c] for c in classes]


def _same(spec: DMSpec, images: Tensor, shared: Draw, group: list[int], sizes: list[int]) -> Tensor:
    """The images of several classes (N, C, S, S), so many of each, those of a class all augmented by its row."""
    if not spec.augment:
        return images
    index = torch.tensor(group).repeat_interleave(torch.tensor(sizes))
    return apply(spec.augmentation, images, shared.rows(index))
