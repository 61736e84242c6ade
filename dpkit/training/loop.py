"""One loop of stochastic gradient descent over a population of networks."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpkit import models, tree
from dpkit.data import Split
from dpkit.training.batches import Batches
from dpkit.training.gradient import aligned, build
from dpkit.training.spec import TrainSpec
from dpkit.tree import Buffers, Mask, Params


class Diverged(RuntimeError):
    """The loss of one network of a population became NaN or infinite."""

    def __init__(self, network: int, step: int):
        super().__init__(f"network {network} diverged: its loss is not finite at step {step}; lower lr or use fp32")
        self.network, self.step = network, step


@dataclass
class State:
    """Everything that the rest of a run depends on; a copy of it is a checkpoint.

    params, momentum, buffers: (P, ...). step: steps done. losses: (P, step) training losses so far. snapshots: the
    parameters and buffers after certain steps. No random state: each batch has a seed of its own.
    """

    params: Params
    buffers: Buffers
    momentum: Params
    step: int
    losses: Tensor
    snapshots: dict[int, tuple[Params, Buffers]] = field(default_factory=dict)


@dataclass
class Fit:
    """Result of :func:`fit`: a population (P, ...), its losses (P, steps), snapshots, the step each one diverged at.

    form: how the gradients were computed (``solo``, ``vmap`` or ``graphs``).
    """

    params: Params
    buffers: Buffers
    losses: Tensor
    snapshots: dict[int, tuple[Params, Buffers]]
    diverged: dict[int, int]
    form: str = "solo"

    def network(self, p: int) -> tuple[Params, Buffers]:
        """Parameters and buffers of network ``p``; raises :class:`Diverged` if it has no meaningful ones."""
        if p in self.diverged:
            raise Diverged(p, self.diverged[p])
        return {n: t[p] for n, t in self.params.items()}, {n: t[p] for n, t in self.buffers.items()}


def fit(spec: TrainSpec, model: models.ModelSpec, split: Split, mean: Tensor, std: Tensor, params: Params,
        buffers: Buffers, seeds: Sequence[int], *, masks: Mask | None = None, first_step: int = 0,
        snapshots: Sequence[int] = (), resume: State | None = None, checkpoint: Callable[[State], None] | None = None,
        progress: Callable[[int, int], None] | None = None, device: torch.device | str = "cpu",
        form: str = "auto") -> Fit:
    """Train P networks on one split.

    params, buffers: (P, ...) where to start; they are not changed. seeds: P seeds of the SGD noise (order, augmentation).
    masks: {name: (P, ...) bool}; entries that are False are zero from the start and stay so. first_step: position in the
    schedule and in the noise at which to start, for networks rewound to that step. snapshots: steps after which to keep
    a copy. checkpoint: called with the state after each epoch. resume: a state to go on from. progress: called with
    (step, steps) after each step. form: see :func:`dpkit.training.gradient.build`; ``auto`` takes what is fastest.

    Networks of equal seeds see the same batches, which are made once for all of them.
    Data stay on the device, batches are augmented many at a time, and inside an epoch nothing waits for a GPU: losses are
    looked at once an epoch. A network whose loss stops being finite is marked in ``diverged``; the others go on. Solo
    training of P networks gives the same bits as training each alone; vmap agrees within rounding. Raises ``ValueError`` on
    inconsistent arguments.
    """
    device = torch.device(device)
    count, steps = tree.population(params), spec.steps(len(split))
    if len(seeds) != count:
        raise ValueError(f"seeds must be as many as networks, {count}; got {len(seeds)}")
    if not 0 <= first_step < steps:
        raise ValueError(f"first_step must lie in [0, {steps}), the steps of this run; got {first_step}")
    late = [s for s in snapshots if not first_step <= s <= steps]
    if late:
        raise ValueError(f"snapshots must lie in [{first_step}, {steps}], got {late[0]}")
    source, different = Batches(spec, split, mean, std, model.classes, device), tuple(dict.fromkeys(seeds))
    state = resume or State(tree.detach(params), tree.detach(buffers), {n: torch.zeros_like(t) for n, t in params.items()},
                            first_step, torch.empty(count, 0))
    weights = _flat(state.params, count).to(device)
    velocity = _flat({name: state.momentum[name] for name in state.params}, count).to(device)
    keep = _flat_mask(masks, state.params, count, device)
    if keep is not None:
        weights.masked_fill_(~keep, 0.0)
    first = _dealt({seed: [source.step(seed, state.step)] for seed in different}, seeds)[0] if state.step < steps else []
    form, gradients = build(form if first else "solo", device, [x for x, _ in first], [y for _, y in first], model,
                            spec.precision, spec.compile, weights, state.params, tree.to(state.buffers, device))
    kept, history = dict(state.snapshots), [state.losses.to(device)] if state.losses.numel() else []

    def networks() -> tuple[Params, Buffers]:
        return _unflat(weights, state.params), tree.to(gradients.buffers(), "cpu")

    if state.step in snapshots and state.step not in kept:
        kept[state.step] = networks()
    recent: list[Tensor] = []
    ready: deque[tuple[tuple[Tensor, Tensor], ...]] = deque()  # batches made ahead, those of all networks for one step each
    for step in range(state.step, steps):
        epoch, position = divmod(step, source.per_epoch)
        if not ready:
            ready.extend(_dealt({seed: source.take(seed, epoch, position, source.together(len(different)))
                                 for seed in different}, seeds))
        losses, gradient = gradients(*map(list, zip(*ready.popleft(), strict=True)))
        with torch.no_grad():
            if keep is not None:
                gradient = torch.where(keep, gradient, 0.0)
            gradient = gradient.add(weights, alpha=spec.weight_decay)
            velocity.mul_(spec.momentum).add_(gradient)
            change = gradient.add_(velocity, alpha=spec.momentum) if spec.nesterov else velocity
            weights.sub_(change, alpha=spec.learning_rate(step, steps))
        recent.append(losses)
        if step + 1 in snapshots:
            kept[step + 1] = networks()
        if position + 1 == source.per_epoch or step + 1 == steps:
            history.append(torch.stack(recent, 1))
            recent = []
            if checkpoint is not None:
                checkpoint(State(*networks(), _unflat(velocity, state.params), step + 1, torch.cat(history, 1).cpu(), dict(kept)))
            if not bool(torch.isfinite(history[-1]).any(0).all()):
                break  # no network of the population is alive any more
        if progress is not None:
            progress(step + 1, steps)
    losses = torch.cat(history, 1).cpu() if history else torch.empty(count, 0)
    done, moved = networks()
    return Fit(done, moved, losses, kept, _diverged(losses, done, first_step), form)


def _dealt(made: dict[int, list[tuple[Tensor, Tensor]]], seeds: Sequence[int]) -> list[tuple[tuple[Tensor, Tensor], ...]]:
    """For each step the batches of all networks, from those of each seed."""
    return list(zip(*(made[seed] for seed in seeds), strict=True))


def _flat(population: Params, count: int) -> Tensor:
    rows = aligned(count, sum(t[0].numel() for t in population.values()), next(iter(population.values())))
    return torch.cat([t.reshape(count, -1) for t in population.values()], 1, out=rows)


def _unflat(flat: Tensor, like: Params) -> Params:
    """A copy on the CPU of the population stored in ``flat`` (P, n)."""
    sizes = [t[0].numel() for t in like.values()]
    parts = flat.detach().cpu().split(sizes, dim=1)
    return {name: part.reshape(t.shape).clone() for (name, t), part in zip(like.items(), parts, strict=True)}


def _flat_mask(masks: Mask | None, like: Params, count: int, device: torch.device) -> Tensor | None:
    if masks is None:
        return None
    unknown = [name for name in masks if name not in like]
    if unknown:
        raise ValueError(f"mask names {unknown[0]!r}, which the network does not have; it has {', '.join(like)}")
    wrong = [name for name, m in masks.items() if m.shape != like[name].shape]
    if wrong:
        raise ValueError(f"mask of {wrong[0]} must be {tuple(like[wrong[0]].shape)}, got {tuple(masks[wrong[0]].shape)}")
    full = {name: masks.get(name, torch.ones_like(t, dtype=torch.bool)) for name, t in like.items()}
    return _flat(full, count).to(device)


def _diverged(losses: Tensor, params: Params, first_step: int) -> dict[int, int]:
    """The first step with a loss that is not finite, for each network that has one, or whose weights are not finite."""
    failed = {}
    for p, row in enumerate(losses):
        bad = torch.nonzero(~torch.isfinite(row)).flatten()
        if len(bad):
            failed[p] = first_step + int(bad[0])
        elif not all(bool(torch.isfinite(t[p]).all()) for t in params.values()):
            failed[p] = first_step + len(row)
    return failed
