"""IDC: information-intensive dataset condensation by gradient matching (Kim et al. 2022, arXiv 2205.14959).

Departure from the published loop, with the same dynamics: there, one optimiser with momentum 0.5 steps once for each class
in turn, so between two gradients of a class its momentum has decayed ten times. Per class that is plain gradient descent
with twice the learning rate (to one part in a thousand for ten classes). Here all classes are matched on the same network
and stepped together, without momentum and with the doubled rate.

Gradients of real images are not reused from step to step, since that would be exact in one corner only. The network moves
after every image step unless ``network_images`` is 0; each step draws another batch, unless ``real_batch`` takes in the whole
class, and then another order; and each draws another augmentation, unless there is none. Where all three hold the real
gradient stays the same during the ``inner`` steps up to rounding, but no recipe of the literature is there. So it is computed
anew in each step, without a graph for second derivatives.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit import cores, models, tree
from dpkit.data import AugmentSpec, Split, apply, draw, normalise, per_class_indices
from dpkit.data.augment import Draw
from dpkit.distill.decode import decode_images, mosaic
from dpkit.distill.matching import Matcher
from dpkit.distill.network import Trainer
from dpkit.distill.spec import DistillSpec
from dpkit.tree import Buffers, Params


def distil(spec: DistillSpec, model: models.ModelSpec, real: Split, mean: Tensor, std: Tensor, seed: int, *,
           resume: tuple[Tensor, list[float]] | None = None,
           checkpoint: Callable[[Tensor, list[float]], None] | None = None,
           progress: Callable[[int, int], None] | None = None,
           device: torch.device | str = "cpu", form: str = "auto", threads: int = 1) -> tuple[Split, list[float]]:
    """Learn ``ipc`` images per class; returns the split and the matching distance of each outer iteration.

    Every outer iteration draws its random numbers from a seed of its own, so a run resumed from a ``checkpoint`` (images,
    history) continues exactly. form: see :class:`~dpkit.distill.matching.Matcher`. Raises ``ValueError`` when a class has too
    few images, and ``FloatingPointError`` when the images stop being finite.

    threads: Python threads that share the classes, and the training of the network for the next step, each computing on one
    core; for a CPU. The result is the same bits for any number of them, those of a process with one, which torch's own
    threads do not give and which is as fast (measured); each thread holds the activations of a class of its own.
    """
    classes = model.classes
    places = per_class_indices(real.hard_labels(), classes)
    need = spec.ipc * spec.factor**2
    for c, place in enumerate(places):
        if len(place) < need:
            raise ValueError(f"ipc {spec.ipc} with factor {spec.factor} starts from {need} real images a class, class {c} "
                             f"has {len(place)}; lower ipc or factor")
    if threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    pixels = normalise(real.images, mean, std).to(device)
    step = _Step(spec, Matcher(spec, model, form=form, device=device), pixels, mean, std)
    train = Trainer(spec, model, real, pixels)
    labels = torch.arange(classes).repeat_interleave(spec.ipc)
    if resume is None:
        start = tree.generator_for(seed, "start")
        chosen = torch.cat([place[torch.randperm(len(place), generator=start)[:need]] for place in places])
        images = mosaic(pixels[chosen.to(device)] * step.std + step.mean, spec.factor)
        history: list[float] = []
    else:
        images, history = resume[0].to(device).clone(), list(resume[1])
    rate = 2 * spec.lr * spec.ipc / 10  # doubled: see the head of this file
    with _crew(threads) as submit:
        for outer in range(len(history), spec.outer):
            generator = tree.generator_for(seed, "outer", outer)
            params, buffers = models.init(model, generator)
            params, buffers = tree.to(params, device), tree.to(buffers, device)
            velocity = {n: torch.zeros_like(t) for n, t in params.items()}
            total = torch.zeros((), device=device)
            for inner in range(spec.inner):
                choice = _choose(spec, places, generator)
                groups = step.matcher.groups([len(rows) for rows in choice.real])
                # The network of the next step depends on this one's real images, not on its synthetic ones: it can be trained
                # while they are matched. After the last step a new one is drawn.
                after = tree.detach(params)
                trained = (submit(train, after, buffers, velocity, generator) if inner + 1 < spec.inner else None)
                pending = [submit(step, params, buffers, images, choice, group) for group in groups]
                image_gradient, distances = torch.zeros_like(images), [total] * classes
                for group, future in zip(groups, pending, strict=True):
                    found, values = future.result()
                    image_gradient.view(classes, *found.shape[1:])[group] += found
                    for c, value in zip(group, values, strict=True):
                        distances[c] = value
                for value in distances:
                    total = total + value
                images = images - rate * image_gradient
                if trained is not None:
                    params, buffers = after, trained.result()
                if progress is not None:
                    progress(outer * spec.inner + inner + 1, spec.outer * spec.inner)
            images = images.clamp(0, 1)
            if not bool(torch.isfinite(images).all()):
                raise FloatingPointError(f"the images are not finite after outer iteration {outer}; lower lr")
            history.append(float(total) / spec.inner / classes)
            if checkpoint is not None:
                checkpoint(images.cpu(), history)
    return Split(images.cpu().float(), labels), history


@dataclass(frozen=True)
class _Choice:
    """What chance decides in a step, for each class: rows of the real images, of the decoded ones (all of them where None),
    and the augmentation (one row a class)."""

    real: list[Tensor]
    tiles: list[Tensor | None]
    shared: Draw


def _choose(spec: DistillSpec, places: Sequence[Tensor], generator: torch.Generator) -> _Choice:
    shared, real, tiles = draw(spec.augment, len(places), generator), [], []
    count = spec.ipc * spec.factor**2
    for place in places:
        real.append(place[torch.randperm(len(place), generator=generator)[:spec.real_batch]])
        tiles.append(torch.randperm(count, generator=generator)[:spec.synthetic_batch] if count > spec.synthetic_batch else None)
    return _Choice(real, tiles, shared)


class _Step:
    """The gradient of one image step: decodes, normalises, augments and matches the images of a group of classes."""

    def __init__(self, spec: DistillSpec, matcher: Matcher, pixels: Tensor, mean: Tensor, std: Tensor):
        self.spec, self.matcher, self.pixels = spec, matcher, pixels
        self.mean, self.std = (t.to(pixels.device).view(1, -1, 1, 1) for t in (mean, std))

    def __call__(self, params: Params, buffers: Buffers, images: Tensor, choice: _Choice,
                 group: list[int]) -> tuple[Tensor, Tensor]:
        """Gradient (G, ipc, C, H, W) with respect to the stored images of ``group``, and the distances (G,)."""
        spec, count, shape = self.spec, len(group), images.shape[1:]
        own = images.view(-1, spec.ipc, *shape)[group].flatten(0, 1).requires_grad_()
        tiles = (decode_images(own, spec.factor) - self.mean) / self.std
        if choice.tiles[group[0]] is not None:
            each = len(tiles) // count
            tiles = tiles[torch.cat([choice.tiles[c] + i * each for i, c in enumerate(group)]).to(images.device)]
        real = self.pixels[torch.cat([choice.real[c] for c in group]).to(images.device)]
        real, tiles = (_same(spec.augment, x, choice.shared, group) for x in (real, tiles))
        gradient, distances = self.matcher(params, buffers, real.view(count, -1, *shape),
                                           tiles.detach().view(count, -1, *shape), group)
        found = torch.autograd.grad(tiles, own, gradient.reshape(tiles.shape))[0]
        return found.view(count, spec.ipc, *shape), distances


def _same(spec: AugmentSpec, images: Tensor, shared: Draw, group: list[int]) -> Tensor:
    """The images of several classes, equally many of each, augmented by the same row of random numbers in each class."""
    if not spec.names:
        return images
    return apply(spec, images, shared.rows(torch.tensor(group).repeat_interleave(len(images) // len(group))))


@contextmanager
def _crew(threads: int):
    """A function that submits work to so many threads of one core each; with one thread it is done at once, right here."""
    if threads == 1:
        def here(function, *arguments) -> Future:
            future: Future = Future()
            future.set_result(function(*arguments))
            return future

        yield here
        return
    with cores.used(1):
        pool = ThreadPoolExecutor(threads)
        try:
            yield pool.submit
        finally:
            pool.shutdown(cancel_futures=True)
