"""Error and loss over a surface or along lines: one batched job over the points that are not known yet."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpkit import models
from dpkit.landscape.checks import check_direction, check_ends, check_mask, check_model, check_soft, same_places
from dpkit.landscape.soft import evaluate_soft
from dpkit.landscape.spec import MeasureSpec, ProfileSpec, SquareSpec
from dpkit.landscape.surfaces import Surface, exact, lines
from dpkit.models import ModelSpec
from dpkit.training import evaluate_many
from dpkit.training.evaluation import pays
from dpkit.tree import Buffers, Mask, Params

POINTS = 121
"""Points by whose work it is decided whether networks are compiled where the specification leaves it open: a grid of 11 x 11."""

Evaluate = Callable[[int, Callable[[int], tuple[Params, Buffers]]], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Error (fraction) and mean cross-entropy (nats) on a surface; float64 tensors.

    x, y: (R,) grid lines: distances in weight space on a plane, ratios on a square, filters' norms around a network.
    errors, losses: (R, R), row i at y[i], column j at x[j], as contour plots expect.  coordinates: (K, 2), where the
    surface's own networks lie: three on a plane, four on a square, one of directions around it.
    """

    x: Tensor
    y: Tensor
    errors: Tensor
    losses: Tensor
    coordinates: Tensor


@dataclasses.dataclass(frozen=True)
class Profile:
    """Error (fraction) and mean cross-entropy (nats) along D lines through one network; float64 tensors.

    t: (T,), in units of the directions, the network itself at 0.  errors, losses: (D, T).
    """

    t: Tensor
    errors: Tensor
    losses: Tensor


@torch.no_grad()
def grid(spec: MeasureSpec, model: ModelSpec, plane: Surface, buffers: Buffers, images: Tensor, labels: Tensor,
         statistics_images: Tensor | None = None, *, threads: int = 1, known: Grid | None = None) -> Grid:
    """Error and loss over a surface in eval mode, at ``spec.resolution`` squared points.

    spec: a ``PlaneSpec``, ``SquareSpec`` or ``AroundSpec``, as the surface is.
    buffers: of one of the networks; their BatchNorm statistics are used under ``statistics == "keep"`` only.
    images: (N, C, S, S) normalised float32, of any set: test, training, or a small one.  labels: (N,) int64, or (N, K)
        probabilities: the loss is then -sum_k label_k log p_k, and an error is another largest logit than largest label.
    statistics_images: normalised training images (M, C, S, S), for re-estimating BatchNorm where the network
        has it.  threads: cores that share the points; the same bits for any number.
    known: a grid of the same surface, ends, images and settings. Points at its places, bit for bit, are taken over and only
        the others are evaluated; on a CPU both give the same bits. All of R lines are among 2 R - 1 lines: 11, 21, 41. On
        squares and around networks all fractions i / (R - 1) that are equal meet; on planes only those are sure to.
    Raises ``ValueError`` with one line on an empty evaluation set, lengths that differ, missing statistics images, a
    specification of another surface, networks or buffers of another model, buffers with NaN, labels that are no classes of the
    model, or known points with other ends. Values that are not finite stay in the grid: far away losses may overflow.
    """
    x, y = plane.grid_lines(spec)
    check_model(model, plane.like, "the networks of the surface")
    models.check_buffers(model, buffers, "the networks of the surface")
    for label, own in zip("abcd", getattr(plane, "buffers", None) or (), strict=False):
        models.check_buffers(model, own, f"network {label} of the square")
    evaluate = _evaluator(spec, model, images, labels, statistics_images, threads)
    there = plane.to(images.device)
    point = functools.partial(there.point, form=spec.form) if isinstance(spec, SquareSpec) else there.point
    interpolated = spec.statistics == "interpolate"
    if interpolated and there.buffers is None:
        raise ValueError("interpolated statistics need the buffers of all four networks, got none; pass buffers to square")
    errors, losses = (torch.full((len(y), len(x)), float("nan"), dtype=torch.float64) for _ in range(2))
    wanted = torch.ones(len(y), len(x), dtype=torch.bool)
    if known is not None:
        if not same_places(known.coordinates, plane.coordinates):
            raise ValueError(f"a known grid must be of the same networks to be refined, but its are at "
                             f"{known.coordinates.tolist()} and these at {plane.coordinates.tolist()}")
        check_ends("x", known.x, x)
        check_ends("y", known.y, y)
        (new_x, old_x), (new_y, old_y) = _shared(known.x, x), _shared(known.y, y)
        for values, old in ((errors, known.errors), (losses, known.losses)):
            values[new_y[:, None], new_x] = old[old_y[:, None], old_x]
        wanted[new_y[:, None], new_x] = False
    places = wanted.nonzero().tolist()

    def network(k: int) -> tuple[Params, Buffers]:
        row, column = places[k]
        at = float(x[column]), float(y[row])
        return point(*at), there.statistics(*at) if interpolated else buffers

    errors[wanted], losses[wanted] = evaluate(len(places), network)
    return Grid(x, y, errors, losses, plane.coordinates)


@torch.no_grad()
def profile(spec: ProfileSpec, model: ModelSpec, params: Params, buffers: Buffers, directions: Sequence[Params], images: Tensor,
            labels: Tensor, statistics_images: Tensor | None = None, *, mask: Mask | None = None, threads: int = 1,
            known: Profile | None = None) -> Profile:
    """Error and loss at ``params + t direction`` in eval mode, for ``spec.points`` values of t in [-reach, reach].

    directions: D of them, random ones (:func:`random_directions`) or any others, such as an eigenvector of the Hessian scaled by
        :func:`filter_normalised`; named and shaped like the parameters, and what they do not name stays.
    mask: of the network; the directions must be 0 where it removes weights.
    known: a profile of the same network, ends, images and settings along the first of the directions, or all of them. Its
        points are taken over and only the others are evaluated.
    The network itself is evaluated once for all directions. Other arguments and errors as of :func:`grid`.
    """
    if not directions:
        raise ValueError("a profile needs at least 1 direction, got none; draw some with random_directions")
    check_model(model, params, "the network")
    models.check_buffers(model, buffers, "the network")
    models.check_same({"at the centre": params})
    for number, direction in enumerate(directions):
        check_direction(params, direction, f"direction {number}")
        check_mask(mask and {n: keep for n, keep in mask.items() if n in direction}, {f"direction {number}": direction})
    check_mask(mask, {"the network": params})
    evaluate = _evaluator(spec, model, images, labels, statistics_images, threads)
    t = lines(-exact(spec.reach), exact(spec.reach), spec.points)
    errors, losses = (torch.full((len(directions), len(t)), float("nan"), dtype=torch.float64) for _ in range(2))
    wanted = torch.ones_like(errors, dtype=torch.bool)
    middle = spec.points // 2
    if known is not None:
        if len(known.errors) > len(directions):
            raise ValueError(f"a known profile must not have more directions than are asked for, got {len(known.errors)} and "
                             f"{len(directions)}; pass all its directions, new ones behind them")
        check_ends("t", known.t, t)
        new, old = _shared(known.t, t)
        rows = torch.arange(len(known.errors))[:, None]
        for values, found in ((errors, known.errors), (losses, known.losses)):
            values[rows, new] = found[rows, old]
        wanted[rows, new] = False
    if not wanted[0, middle]:  # known, and the same network in every direction
        errors[:, middle], losses[:, middle] = errors[0, middle].clone(), losses[0, middle].clone()
    wanted[1:, middle] = False
    places = wanted.nonzero().tolist()

    def network(k: int) -> tuple[Params, Buffers]:
        row, column = places[k]
        step, at = directions[row], float(t[column])
        moved = {n: (params[n].double() + at * d.to(params[n].device).double()).to(params[n].dtype) for n, d in step.items()}
        return {**params, **moved}, buffers

    errors[wanted], losses[wanted] = evaluate(len(places), network)
    errors[:, middle], losses[:, middle] = errors[0, middle].clone(), losses[0, middle].clone()
    return Profile(t, errors, losses)


def _shared(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into ``new`` and into ``old`` of the places that both have, bit for bit."""
    where = {value: i for i, value in enumerate(old.tolist())}
    pairs = [(i, where[value]) for i, value in enumerate(new.tolist()) if value in where]
    return tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))


def _evaluator(spec: MeasureSpec, model: ModelSpec, images: Tensor, labels: Tensor, statistics_images: Tensor | None,
               threads: int) -> Evaluate:
    """Errors and losses of networks on the images that ``spec`` chooses; each as if it were alone."""
    models.check_evaluation(images, labels)
    soft = labels.dim() != 1 or labels.is_floating_point()
    if soft:
        check_soft(labels, model.classes)
    else:
        models.check_labels(labels, model.classes)
    source = None
    if spec.statistics == "reestimate":
        source = models.statistics_source(model, statistics_images, spec.statistics_images)
    if spec.images:
        chosen = models.spread(len(images), spec.images)
        images, labels = images[chosen], labels[chosen]
    # by the work of a fixed number of points: what is computed at one must not depend on how many others are asked for
    compiled = spec.compile or pays(model, POINTS * (len(images) + (0 if source is None else len(source))))

    def evaluate(count: int, network: Callable[[int], tuple[Params, Buffers]]) -> tuple[Tensor, Tensor]:
        if count == 0:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        settings = {"statistics_images": source, "precision": spec.precision, "threads": threads}
        if soft:
            return evaluate_soft(model, count, network, images, labels, **settings)
        return evaluate_many(model, count, network, images, labels, compiled=compiled, **settings)

    return evaluate
