"""Learning images by gradient matching: the loop that IDC, DC and DSA share.

For outer iterations: draw a network; for inner steps: for each class, compare the gradients that a batch of its real images and
its synthetic images give, move the synthetic images against the gradient of that distance, and train the network a little.

Gradients of real images are not reused from step to step, since that would be exact in one corner only. The network moves
after every image step unless it is not trained at all; each step draws another batch, unless ``real_batch`` takes in the whole
class, and then another order; and each draws another augmentation, unless there is none. Where all three hold the real
gradient stays the same during the ``inner`` steps up to rounding, but no recipe of the literature is there. So it is computed
anew in each step, without a graph for second derivatives.
"""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit import cores, models, tree
from dpkit.data import AugmentSpec, Split, apply, draw, normalise
from dpkit.data.augment import Draw
from dpkit.distill.decode import decode_images, mosaic
from dpkit.distill.interface import Made, Task
from dpkit.distill.matching import Matcher, sent
from dpkit.distill.network import Trainer
from dpkit.distill.spec import MatchingSpec
from dpkit.tree import Buffers, Params


def learn(spec: MatchingSpec, task: Task, *, rate: float, form: str = "auto") -> Made:
    """Learn ``ipc`` images per class with image learning rate ``rate``; history: the matching distance of each outer iteration.

    Every outer iteration draws its random numbers from a seed of its own, so a run resumed from a checkpoint (images, momentum,
    history) continues exactly. form: see :class:`~dpkit.distill.matching.Matcher`. Raises ``ValueError`` when a class has too
    few images, when a pool is asked for and there is none, and ``FloatingPointError`` when the images stop being finite.

    task.threads: Python threads that share the classes, and the training of the network for the next step, each computing on
    one core; for a CPU. The result is the same bits for any number of them, those of a process with one, which torch's own
    threads do not give and which is as fast (measured); each thread holds the activations of a class of its own.
    """
    model, classes, device, threads = task.model, task.model.classes, task.device, task.threads
    need = spec.ipc * spec.factor**2
    for c, place in enumerate(places := task.places(1)):
        if len(place) < need:
            raise ValueError(f"ipc {spec.ipc} with factor {spec.factor} starts from {need} real images a class, class {c} "
                             f"has {len(place)}; lower ipc or factor")
    if threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    if spec.networks == "pool" and not task.networks:
        raise ValueError("networks from a pool need trained networks, got none; give some or set networks to fresh")
    at_once = None if task.room(spec) else max(1, int(task.held / spec.fewest(classes)))
    pixels = normalise(task.real.images, task.mean, task.std).to(device)
    step = _Step(spec, Matcher(spec, model, form=form, device=device, at_once=at_once), pixels, task.mean, task.std)
    train = Trainer(spec, model, task.real, pixels)
    labels = torch.arange(classes).repeat_interleave(spec.ipc)
    before = _start(spec, step, places, task.seed)
    if task.resume is None:
        images, velocity, history = before, None, []
    else:
        images, history = task.resume["images"].to(device).clone(), task.resume["history"].tolist()
        velocity = task.resume["velocity"].to(device).clone() if "velocity" in task.resume else None
    with _crew(threads) as submit:
        for outer in range(len(history), spec.outer):
            generator = tree.generator_for(task.seed, "outer", outer)
            params, buffers = _network(spec, task, generator)
            momenta = {n: torch.zeros_like(t) for n, t in params.items()}
            total = torch.zeros((), device=device)
            for inner in range(spec.inner):
                choice = _choose(spec, places, generator)
                groups = step.matcher.groups([len(rows) for rows in choice.real])
                # The network of the next step depends on this one's real images, not on its synthetic ones: it can be trained
                # while they are matched. After the last step a new one is drawn.
                after, again = tree.detach(params), inner + 1 < spec.inner
                trained = (submit(train, after, buffers, momenta, generator) if again and train.on_real else None)
                pending = [submit(step, params, buffers, images, choice, group) for group in groups]
                image_gradient, distances = torch.zeros_like(images), [total] * classes
                for group, future in zip(groups, pending, strict=True):
                    found, values = future.result()
                    image_gradient.view(classes, *found.shape[1:])[sent(group, found.device)] += found
                    for c, value in zip(group, values, strict=True):
                        distances[c] = value
                for value in distances:
                    total = total + value
                if spec.momentum > 0:
                    velocity = image_gradient if velocity is None else spec.momentum * velocity + image_gradient
                    image_gradient = velocity
                images = images - rate * image_gradient
                if trained is not None:
                    params, buffers = after, trained.result()
                elif again:
                    buffers = train(after, buffers, momenta, generator, step.shown(images), labels)
                    params = after
                task.tick(outer * spec.inner + inner + 1, spec.outer * spec.inner)
            if spec.space == "pixels":
                images = images.clamp(0, 1)
            if not bool(torch.isfinite(images).all()):
                raise FloatingPointError(f"the images are not finite after outer iteration {outer}; lower lr")
            history.append(float(total) / spec.inner / classes)
            state = {"images": images.cpu(), "history": torch.tensor(history, dtype=torch.float64)}
            task.keep(state if velocity is None else state | {"velocity": velocity.cpu()})
    return Made(Split(step.stored(images).cpu().float(), labels), tuple(history), before=step.stored(before).cpu().float())


def _start(spec: MatchingSpec, step: _Step, places: Sequence[Tensor], seed: int) -> Tensor:
    """The images to begin with, in the space that they are learned in."""
    start, need, pixels = tree.generator_for(seed, "start"), spec.ipc * spec.factor**2, step.pixels
    if spec.start == "noise":
        noise = torch.randn(len(places) * spec.ipc, *pixels.shape[1:], generator=start).to(pixels)
        return noise if spec.space == "normalised" else (noise * step.std + step.mean).clamp(0, 1)
    chosen = torch.cat([place[torch.randperm(len(place), generator=start)[:need]] for place in places])
    images = mosaic(pixels[chosen.to(pixels.device)] * step.std + step.mean, spec.factor)
    return images if spec.space == "pixels" else (images - step.mean) / step.std


def _network(spec: MatchingSpec, task: Task, generator: torch.Generator) -> tuple[Params, Buffers]:
    """A network to match on: at initialisation, or one of the pool at one of its times."""
    if spec.networks == "fresh":
        found = models.init(task.model, generator)
    else:
        which = torch.randint(len(task.networks), (1,), generator=generator).item()
        times = task.networks[which]
        found = times[torch.randint(len(times), (1,), generator=generator).item()]
    return tree.to(found[0], task.device), tree.to(found[1], task.device)


@dataclass(frozen=True)
class _Choice:
    """What chance decides in a step, for each class: rows of the real images, of the decoded ones (all of them where None),
    and the augmentation (one row a class)."""

    real: list[Tensor]
    tiles: list[Tensor | None]
    shared: Draw


def _choose(spec: MatchingSpec, places: Sequence[Tensor], generator: torch.Generator) -> _Choice:
    shared, real, tiles = draw(spec.augment, len(places), generator), [], []
    count = spec.ipc * spec.factor**2
    for place in places:
        real.append(place[torch.randperm(len(place), generator=generator)[:spec.real_batch]])
        tiles.append(torch.randperm(count, generator=generator)[:spec.synthetic_batch] if count > spec.synthetic_batch else None)
    return _Choice(real, tiles, shared)


class _Step:
    """The gradient of one image step: decodes, normalises, augments and matches the images of a group of classes."""

    def __init__(self, spec: MatchingSpec, matcher: Matcher, pixels: Tensor, mean: Tensor, std: Tensor):
        self.spec, self.matcher, self.pixels = spec, matcher, pixels
        self.mean, self.std = (t.to(pixels.device).view(1, -1, 1, 1) for t in (mean, std))

    def __call__(self, params: Params, buffers: Buffers, images: Tensor, choice: _Choice,
                 group: list[int]) -> tuple[Tensor, Tensor]:
        """Gradient (G, ipc, C, H, W) with respect to the stored images of ``group``, and the distances (G,)."""
        spec, count, shape = self.spec, len(group), images.shape[1:]
        own = images.view(-1, spec.ipc, *shape)[sent(group, images.device)].flatten(0, 1).requires_grad_()
        tiles = self.shown(own)
        if choice.tiles[group[0]] is not None:
            each = len(tiles) // count
            tiles = tiles[sent(torch.cat([choice.tiles[c] + i * each for i, c in enumerate(group)]), images.device)]
        real = self.pixels[sent(torch.cat([choice.real[c] for c in group]), images.device)]
        real, tiles = (_same(spec.augment, x, choice.shared, group) for x in (real, tiles))
        gradient, distances = self.matcher(params, buffers, real.view(count, -1, *shape),
                                           tiles.detach().view(count, -1, *shape), group)
        found = torch.autograd.grad(tiles, own, gradient.reshape(tiles.shape))[0]
        return found.view(count, spec.ipc, *shape), distances

    def stored(self, images: Tensor) -> Tensor:
        """Images as pixel values, from the space that they are learned in."""
        return images if self.spec.space == "pixels" else images * self.std + self.mean

    def shown(self, images: Tensor) -> Tensor:
        """The normalised training images that stored ones decode into."""
        if self.spec.factor == 1 and self.spec.space == "normalised":
            return images
        return (decode_images(self.stored(images), self.spec.factor) - self.mean) / self.std


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
