"""MTT: dataset distillation by matching training trajectories (Cazenavette et al., CVPR 2022, arXiv 2203.11932).

A student starts where an expert was after some epochs on real data, takes a few steps on the synthetic images, and should arrive
where the expert was some epochs later. The images, and the learning rate of the student's steps, follow the gradient of the
distance that is left, back through all of these steps. Weights are one flat vector. The images are optimised as the networks see
them, normalised (no ZCA), and are not clamped, as published.

The gradient is written out step by step (the adjoint of gradient descent) instead of leaving one graph of all steps to autograd:
each step then is a graph of its own, which is either kept from the way there or built again on the way back, with the same bits.

The augmentation is DSA's; departure: one operation is drawn for each image, in the published code for each batch. Experts are
drawn at random, as there when all are in memory.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import tree
from dpkit.data import AugmentSpec, apply, draw
from dpkit.data.augment import Draw
from dpkit.distill.dm import STARTS, starting, stored
from dpkit.distill.interface import Made, MethodSpec, Task
from dpkit.models import ModelSpec
from dpkit.training.gradient import loss
from dpkit.tree import Buffers, Params

EVERY = 10  # steps between two checkpoints, each of which waits for the device
LEAST = 1e-3  # the learned rate stays above this share of where it started: at or below zero the student would not learn
# Peak memory in that of a plain backward pass over as many images (measured, ConvNet-3, up to four steps kept)
KEPT = 1.2  # of each further student step whose graph is kept
ONE = 2.0  # of one student step and its way back


@dataclass(frozen=True, kw_only=True)
class MTTSpec(MethodSpec):
    """Trajectory matching. Defaults: the lengths used for CIFAR-10 at ipc 10, and the default rates of the published
    code (distill.py of GeorgeCazenavette/mtt-distillation). The best published numbers add ZCA whitening, with other rates.

    steps: image steps, each from an expert and an epoch in [0, ``max_start_epoch``) drawn uniformly. student_steps: steps of
    plain SGD on synthetic images. expert_epochs: how many epochs later the student should arrive. batch: images of a student
    step, 0 for all; they pass in shuffled order, a new one after all had their turn. lr_img: of the normalised images. lr:
    of the student at first. lr_lr: of that rate. momentum: of both. augment: operations joined by ``_``, drawn for each image
    and student step, empty for none. start: ``real`` images of the class or standard normal ``noise``.
    """

    method: ClassVar[str] = "mtt"
    steps: int = 5000
    student_steps: int = 30
    expert_epochs: int = 2
    max_start_epoch: int = 20
    batch: int = 0
    lr_img: float = 1000.0
    lr: float = 0.01
    lr_lr: float = 1e-5
    momentum: float = 0.5
    augment: str = "color_crop_cutout_flip_scale_rotate"
    start: str = "real"

    def check(self) -> None:
        super().check()
        for name in ("steps", "student_steps", "expert_epochs", "max_start_epoch"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        self.require(self.batch >= 0, f"batch must be >= 0 (0: all images), got {self.batch}")
        for name in ("lr_img", "lr"):
            value = getattr(self, name)
            self.require(value > 0 and math.isfinite(value), f"{name} must be > 0, got {value:g}")
        self.require(self.lr_lr >= 0 and math.isfinite(self.lr_lr), f"lr_lr must be >= 0, got {self.lr_lr:g}")
        self.between("momentum", 0, 1, open_high=True)
        self.one_of("start", STARTS)
        self.augmentation  # noqa: B018 - checks the names

    @property
    def augmentation(self) -> AugmentSpec:
        """What ``augment`` says, with the project's amounts."""
        return AugmentSpec(operations=self.augment, single=True)

    @property
    def epochs(self) -> int:
        """The epochs that an expert must have been trained for."""
        return self.max_start_epoch - 1 + self.expert_epochs

    def size(self, classes: int) -> int:
        """Images of a student step."""
        return min(self.batch or classes * self.ipc, classes * self.ipc)

    def held(self, classes: int) -> float:
        return (KEPT * (self.student_steps - 1) + ONE) * self.size(classes)

    def fewest(self, classes: int) -> float:
        return ONE * self.size(classes)

    def lower(self) -> str:
        return "batch or ipc"


@dataclass(frozen=True)
class Batch:
    """What chance decides for one student step: the rows of the images, and their augmentation."""

    rows: Tensor
    shared: Draw


def batches(spec: MTTSpec, count: int, generator: torch.Generator) -> list[Batch]:
    """The batches of all student steps over ``count`` images."""
    size, rows, found = min(spec.batch or count, count), torch.zeros(0, dtype=torch.int64), []
    for _ in range(spec.student_steps):
        if len(rows) == 0:
            rows = torch.randperm(count, generator=generator)
        found.append(Batch(rows[:size], draw(spec.augmentation, len(rows[:size]), generator)))
        rows = rows[size:]
    return found


class Student:
    """One student's steps from ``begin`` (n,), and the gradient of where they lead.

    like: parameters whose names and shapes the flat vector has. buffers: of the expert where the student starts; BatchNorm takes
    the statistics of each batch, and its running ones are left alone. keep: whether the graphs of all steps are kept from the
    way there, or each is built again on the way back; the result is the same.
    """

    def __init__(self, spec: MTTSpec, model: ModelSpec, like: Params, buffers: Buffers, targets: Tensor, keep: bool):
        self.spec, self.model, self.like, self.buffers, self.targets, self.keep = spec, model, like, buffers, targets, keep

    def __call__(self, images: Tensor, lr: Tensor, begin: Tensor, end: Tensor,
                 chosen: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and its gradients with respect to ``images`` (N, C, S, S) and ``lr`` ().

        With w_0 = begin and w_{t+1} = w_t - lr g(w_t, x_t) the loss is |w_T - end|^2 / |begin - end|^2, as in the paper.
        Its gradient a_T with respect to w_T travels back by a_t = a_{t+1} - lr H_t a_{t+1}, with H_t the derivative of g
        with respect to w_t; the images get - lr (dg/dx_t)^T a_{t+1} and the learning rate - g . a_{t+1} from each step.
        """
        weights, graphs = begin, []
        visited = []
        for batch in chosen:
            visited.append(weights)
            graph = self._gradient(images, weights, batch)
            graphs.append(graph if self.keep else None)
            weights = weights - lr * graph[-1].detach()
            del graph
        scale = (begin - end).square().sum()
        value = (weights - end).square().sum() / scale
        adjoint = 2 * (weights - end) / scale
        for_images, for_lr = torch.zeros_like(images), torch.zeros_like(lr)
        for batch in reversed(chosen):
            at, graph = visited.pop(), graphs.pop()
            leaf, source, x, gradient = graph or self._gradient(images, at, batch)
            for_lr = for_lr - torch.dot(gradient.detach(), adjoint)
            hessian, pixels = torch.autograd.grad(gradient, (leaf, x), adjoint)
            for_images = for_images - lr * torch.autograd.grad(source[1], source[0], pixels)[0]
            adjoint = adjoint - lr * hessian
        return value, for_images, for_lr

    def _gradient(self, images: Tensor, weights: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """The weights as a leaf; the images as a leaf with the augmented batch that hangs on it; that batch as a leaf of its
        own; and the gradient of the training loss with respect to the weights, with its graph."""
        own = images.detach().requires_grad_()
        rows = batch.rows.to(images.device, non_blocking=True)
        x = own[rows]
        if self.spec.augment:
            x = apply(self.spec.augmentation, x, batch.shared)
        leaf, entry = weights.detach().requires_grad_(), x.detach().requires_grad_()
        value, _ = loss(self.model, tree.unflatten(leaf, self.like), self.buffers, entry, self.targets[rows], "fp32")
        gradient, = torch.autograd.grad(value, leaf, create_graph=True)
        return leaf, (own, x), entry, gradient


def mtt(spec: MTTSpec, task: Task) -> Made:
    """Learn ``ipc`` images a class and the learning rate to train on them with, by ``steps`` steps of gradient descent.

    task.networks: experts, each (params, buffers) at initialisation and after each epoch. history: the loss at each step; 1 is
    a student that does not come nearer. learned: ``lr``, kept above a thousandth of where it started. Without room for all
    student steps each is computed again on the way back. Raises ``ValueError`` when there is no expert, one has too few epochs
    or a class too few images, ``FloatingPointError`` when the images or the rate stop being finite.
    """
    model, device = task.model, torch.device(task.device)
    _check_experts(spec, task)
    keep = task.room(spec)
    targets = F.one_hot(torch.arange(model.classes).repeat_interleave(spec.ipc), model.classes).float().to(device)
    before = starting(task, spec.ipc, spec.start)
    if task.resume is None:
        images = before.to(device)
        lr = torch.tensor(spec.lr, device=device)
        speed, lr_speed, history = torch.zeros_like(images), torch.zeros_like(lr), torch.zeros(0, dtype=torch.float64)
    else:
        images, speed, lr, lr_speed = (task.resume[n].to(device).clone() for n in ("images", "velocity", "lr", "lr_velocity"))
        history = task.resume["history"].clone()
    recent: list[Tensor] = []
    for step in range(len(history), spec.steps):
        generator = tree.generator_for(task.seed, "mtt", step)
        expert = task.networks[int(torch.randint(len(task.networks), (), generator=generator))]
        first = int(torch.randint(spec.max_start_epoch, (), generator=generator))
        (params, buffers), (later, _) = expert[first], expert[first + spec.expert_epochs]
        begin, end = (tree.flatten(p, params).to(device, non_blocking=True) for p in (params, later))
        student = Student(spec, model, params, tree.to(buffers, device), targets, keep)
        value, for_images, for_lr = student(images, lr, begin, end, batches(spec, len(images), generator))
        speed, lr_speed = spec.momentum * speed + for_images, spec.momentum * lr_speed + for_lr
        images = images - spec.lr_img * speed
        lr = (lr - spec.lr_lr * lr_speed).clamp_min(LEAST * spec.lr)
        recent.append(value)
        if (step + 1) % EVERY == 0 or step + 1 == spec.steps:
            history, recent = torch.cat([history, torch.stack(recent).double().cpu()]), []
            if not bool(torch.isfinite(images).all() & torch.isfinite(lr)):
                raise FloatingPointError(f"the images are not finite after step {step + 1}; lower lr_img, lr_lr or lr")
            task.keep({"images": images.cpu(), "velocity": speed.cpu(), "lr": lr.cpu(), "lr_velocity": lr_speed.cpu(),
                       "history": history})
        task.tick(step + 1, spec.steps)
    return Made(stored(task, images, spec.ipc), tuple(history.tolist()), {"lr": float(lr)},
                stored(task, before, spec.ipc).images)


def _check_experts(spec: MTTSpec, task: Task) -> None:
    lengths = [len(trajectory) - 1 for trajectory in task.networks]
    if not lengths or min(lengths) < spec.epochs:
        there = f"{len(lengths)}, the shortest with {min(lengths)}" if lengths else "none"
        raise ValueError(f"mtt needs trajectories with at least {spec.epochs} epochs (max_start_epoch - 1 + expert_epochs); got "
                         f"{there}; train longer, or lower max_start_epoch or expert_epochs")
