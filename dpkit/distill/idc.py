"""IDC: information-intensive dataset condensation by gradient matching (Kim et al. 2022, arXiv 2205.14959).

Departure from the published loop, with the same dynamics: there, one optimiser with momentum 0.5 steps once for each class
in turn, so between two gradients of a class its momentum has decayed ten times. Per class that is plain gradient descent
with twice the learning rate (to one part in a thousand for ten classes). Here all classes are matched on the same network
and stepped together, without momentum and with the doubled rate.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models, tree
from dpkit.data import AugmentSpec, Split, apply, augment, cutmix, draw, normalise, per_class_indices
from dpkit.distill.decode import decode_images, mosaic
from dpkit.distill.spec import DistillSpec
from dpkit.tree import Buffers, Params


def distance(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """Distance of two gradients of one convolution weight (out, in, h, w): a scalar.

    ``squared`` and ``l1`` sum over all entries; ``cosine`` is one minus the cosine, summed over output channels.
    """
    if kind == "squared":
        return ((a - b) ** 2).sum()
    if kind == "l1":
        return (a - b).abs().sum()
    return (1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)).sum()


def matched_names(model: models.ModelSpec) -> tuple[str, ...]:
    """The weights whose gradients are matched: convolutions, neither biases nor the classifier."""
    return tuple(n for n in models.prunable(model) if n != f"{models.classifier_name(model)}.weight")


def gradient(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
             *, keep_graph: bool, precision: str = "fp32") -> list[Tensor]:
    """Gradient of the mean cross-entropy with respect to the matched weights, in train mode."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits, _ = models.forward(model, params, buffers, images, train=True)
    # in the images' own precision, so that float64 stays float64
    loss = F.cross_entropy(logits.to(images.dtype), labels)
    return list(torch.autograd.grad(loss, [params[n] for n in matched_names(model)], create_graph=keep_graph))


def matching_loss(spec: DistillSpec, model: models.ModelSpec, params: Params, buffers: Buffers, real: Tensor,
                  synthetic: Tensor, label: int) -> Tensor:
    """Distance between the gradients of real and synthetic normalised images of one class (equation 2): a scalar.

    Differentiable with respect to ``synthetic``; the real gradient is a constant.
    """
    def labels(images: Tensor) -> Tensor:
        return torch.full((len(images),), label, device=images.device)

    target = gradient(model, params, buffers, real, labels(real), keep_graph=False, precision=spec.precision)
    found = gradient(model, params, buffers, synthetic, labels(synthetic), keep_graph=True, precision=spec.precision)
    return sum(distance(spec.distance, f, t) for f, t in zip(found, target, strict=True))


def distil(spec: DistillSpec, model: models.ModelSpec, real: Split, mean: Tensor, std: Tensor, seed: int, *,
           resume: tuple[Tensor, list[float]] | None = None,
           checkpoint: Callable[[Tensor, list[float]], None] | None = None,
           progress: Callable[[int, int], None] | None = None,
           device: torch.device | str = "cpu") -> tuple[Split, list[float]]:
    """Learn ``ipc`` images per class; returns the split and the matching distance of each outer iteration.

    Every outer iteration draws its random numbers from a seed of its own, so a run resumed from a ``checkpoint`` (images,
    history) continues exactly. Raises ``ValueError`` when a class has too few images, and ``FloatingPointError`` when the
    images stop being finite.
    """
    classes = model.classes
    places = per_class_indices(real.hard_labels(), classes)
    need = spec.ipc * spec.factor**2
    for c, place in enumerate(places):
        if len(place) < need:
            raise ValueError(f"ipc {spec.ipc} with factor {spec.factor} starts from {need} real images a class, class {c} "
                             f"has {len(place)}; lower ipc or factor")
    pixels = normalise(real.images, mean, std).to(device)
    mean, std = mean.to(device).view(1, -1, 1, 1), std.to(device).view(1, -1, 1, 1)
    labels = torch.arange(classes).repeat_interleave(spec.ipc)
    if resume is None:
        start = tree.generator_for(seed, "start")
        chosen = torch.cat([place[torch.randperm(len(place), generator=start)[:need]] for place in places])
        images = mosaic(pixels[chosen.to(device)] * std + mean, spec.factor)
        history: list[float] = []
    else:
        images, history = resume[0].to(device).clone(), list(resume[1])
    rate = 2 * spec.lr * spec.ipc / 10  # doubled: see the head of this file
    for outer in range(len(history), spec.outer):
        generator = tree.generator_for(seed, "outer", outer)
        params, buffers = models.init(model, generator)
        params, buffers = tree.to(params, device), tree.to(buffers, device)
        velocity = {n: torch.zeros_like(t) for n, t in params.items()}
        params = {n: t.requires_grad_() for n, t in params.items()}
        total = torch.zeros((), device=device)
        for inner in range(spec.inner):
            shared = draw(spec.augment, classes, generator)
            images.requires_grad_()
            image_gradient = torch.zeros_like(images)
            for c, place in enumerate(places):
                batch = place[torch.randperm(len(place), generator=generator)[:spec.real_batch]].to(device)
                own = images[c * spec.ipc:(c + 1) * spec.ipc]
                tiles = (decode_images(own, spec.factor) - mean) / std
                if len(tiles) > spec.synthetic_batch:
                    tiles = tiles[torch.randperm(len(tiles), generator=generator)[:spec.synthetic_batch].to(device)]
                loss = matching_loss(spec, model, params, buffers, _same(spec.augment, pixels[batch], shared, c),
                                     _same(spec.augment, tiles, shared, c), c)
                image_gradient += torch.autograd.grad(loss, images)[0]
                total += loss.detach()
            with torch.no_grad():
                images = images.detach() - rate * image_gradient
            buffers = _train(spec, model, params, buffers, velocity, pixels, real, generator)
            if progress is not None:
                progress(outer * spec.inner + inner + 1, spec.outer * spec.inner)
        images = images.clamp(0, 1)
        if not bool(torch.isfinite(images).all()):
            raise FloatingPointError(f"the images are not finite after outer iteration {outer}; lower lr")
        history.append(float(total) / spec.inner / classes)
        if checkpoint is not None:
            checkpoint(images.cpu(), history)
    return Split(images.detach().cpu().float(), labels), history


def _same(spec: AugmentSpec, images: Tensor, shared, row: int) -> Tensor:
    """All images of a class augmented by the same row of random numbers."""
    if not spec.names:
        return images
    return apply(spec, images, shared.rows(torch.full((len(images),), row)))


def _train(spec: DistillSpec, model: models.ModelSpec, params: Params, buffers: Buffers, velocity: Params, pixels: Tensor,
           real: Split, generator: torch.Generator) -> Buffers:
    """Train the matching network, in place, on ``network_images`` random real images; returns the new buffers."""
    count = min(spec.network_images, len(real))
    if count == 0:
        return buffers
    order = torch.randperm(len(real), generator=generator)[:count]
    full = AugmentSpec()
    for rows in order.split(spec.network_batch):
        part = real.select(rows)
        x = augment(full, pixels[rows.to(pixels.device)], generator)
        x, y = cutmix(x, part.targets(model.classes).to(pixels.device), generator)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=spec.precision == "bf16"):
            logits, buffers = models.forward(model, params, buffers, x, train=True)
        gradients = torch.autograd.grad(F.cross_entropy(logits.float(), y), list(params.values()))
        with torch.no_grad():
            for (name, weight), g in zip(params.items(), gradients, strict=True):
                velocity[name].mul_(0.9).add_(g.add(weight, alpha=5e-4))
                weight.sub_(velocity[name], alpha=spec.network_lr)
        buffers = {n: b.detach() for n, b in buffers.items()}
    return buffers
