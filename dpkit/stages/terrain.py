"""Stages that measure landscapes: planes, squares, surroundings, lines, and ways across planes."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from dpkit import landscape, tree
from dpkit.data import Split, normalise
from dpkit.landscape import AroundSpec, Grid, MeasureSpec, PlaneSpec, Profile, ProfileSpec, SquareSpec
from dpkit.models import ModelSpec
from dpkit.stages.connect import children_of, nested, on_device, refined, shown, stored
from dpkit.stages.make import network_of
from dpkit.stages.sets import read_set
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact

APART = 1e-3  # of the distance between children: farther away a way does not end at its child


def _evaluation(context: Context, unit: Unit, spec: MeasureSpec, parents: Mapping[str, Artifact]):
    """The images to evaluate on, training images for statistics, and the specification: all images of a small set count."""
    split, few = shown(context, unit)
    if "images" not in parents:
        return split, few, spec
    dataset, small = context.dataset(unit.data), read_set(parents["images"])
    images = normalise(small.images, dataset.mean, dataset.std)
    return Split(images, small.labels).to(context.device), few, spec.replace(images=0)


def _known(context: Context, unit: Unit, group: str, field: str = "resolution") -> Artifact | None:
    counts = nested(unit.spec[group][field], least=2)
    return stored(context, unit, group, [{**unit.spec[group], field: n} for n in counts if group != "profile" or n % 2])


def _grid(context: Context, unit: Unit, parents: Mapping[str, Artifact], group: str, kind: type[MeasureSpec],
          surface: landscape.Plane | landscape.Square | landscape.Around, buffers) -> Output:
    split, few, spec = _evaluation(context, unit, kind(**unit.spec[group]), parents)
    known = None
    if before := _known(context, unit, group):
        known = Grid(*(before.tensors[name] for name in ("x", "y", "errors", "losses", "corners")))
    found = landscape.grid(spec, ModelSpec(**unit.spec["model"]), surface, buffers, split.images, split.labels,
                           statistics_images=few, known=known)
    return Output({"x": found.x, "y": found.y, "errors": found.errors, "losses": found.losses, "corners": found.coordinates},
                  {"highest_error": float(found.errors.max()), "lowest_error": float(found.errors.min()), **refined(before)})


@stage("plane", 1)
def measure_plane(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss on the plane through three children, on test images or on the small set ``images``.

    Tensors: x (R,), y (R,), errors and losses (R, R), corners (3, 2).
    """
    networks = [on_device(context.device, parents[name]) for name in "abc"]
    flat = landscape.plane(*(params for params, _ in networks), **children_of(context, unit, "abc"))
    return _grid(context, unit, parents, "plane", PlaneSpec, flat, networks[0][1])


@stage("square", 1)
def measure_square(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss on the square of four children. Tensors: as of a plane; x and y are ratios, corners (4, 2).

    Result: off, how far from a parallelogram the four are, in sides.
    """
    networks = [on_device(context.device, parents[name]) for name in "abcd"]
    surface = landscape.square(*(params for params, _ in networks), buffers=tuple(buffers for _, buffers in networks),
                               **children_of(context, unit, "abcd"))
    found = _grid(context, unit, parents, "square", SquareSpec, surface, networks[0][1])
    return Output(found.tensors, {**found.result, "off": surface.twist})


def _directions(unit: Unit, spec: AroundSpec | ProfileSpec, params, parents: Mapping[str, Artifact], device: str):
    mask = tree.to(parents["ticket"].group("mask"), device) if "ticket" in parents else None
    generator = tree.generator_for(unit.spec["seed"], "directions")
    return landscape.random_directions(spec, ModelSpec(**unit.spec["model"]), params, generator, mask=mask), mask


@stage("around", 1)
def measure_around(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss around a child, in two random filter-normalised directions. Tensors: as of a plane; corners (1, 2)."""
    params, buffers = on_device(context.device, parents["network"])
    (first, second), mask = _directions(unit, AroundSpec(**unit.spec["around"]), params, parents, context.device)
    return _grid(context, unit, parents, "around", AroundSpec, landscape.around(params, first, second, mask=mask), buffers)


@stage("profile", 1)
def measure_profile(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Error and loss on lines through a child, in random filter-normalised directions.

    Tensors: t (T,), errors and losses (D, T). Result: error and loss at the child; error_rise and loss_rise, by how much the
    mean over directions and both sides is higher half of the reach away.
    """
    params, buffers = on_device(context.device, parents["network"])
    split, few, spec = _evaluation(context, unit, ProfileSpec(**unit.spec["profile"]), parents)
    directions, mask = _directions(unit, spec, params, parents, context.device)
    known = None
    if before := _known(context, unit, "profile", "points"):
        known = Profile(*(before.tensors[name] for name in ("t", "errors", "losses")))
    found = landscape.profile(spec, ModelSpec(**unit.spec["model"]), params, buffers, directions, split.images, split.labels,
                              statistics_images=few, mask=mask, known=known)
    middle = spec.points // 2
    half = [middle - middle // 2, middle + middle // 2]  # the study asks for points there
    result = {}
    for name, values in (("error", found.errors), ("loss", found.losses)):
        result[name] = float(values[0, middle])
        result[f"{name}_rise"] = float(values[:, half].mean() - values[0, middle])
    return Output({"t": found.t, "errors": found.errors, "losses": found.losses}, result | refined(before))


@stage("trajectory", 1)
def project_ways(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Where three children went by, on the plane through where they ended.

    Tensors, of K = 3 children at S steps: steps (S,), positions (K, S, 2), outside and relative (K, S); see
    :class:`dpkit.landscape.Projection`. Result: the mean of ``relative`` at the start, and halfway; off, how far from the
    children the ways end, as a share of the largest distance between children.
    """
    flat = landscape.plane(*(network_of(parents[name])[0] for name in "abc"))
    ways = [parents[f"way_{name}"] for name in "abc"]
    steps = sorted(ways[0].meta["spec"]["snapshots"])
    found = [landscape.project(flat, [network_of(way, f"{step}/")[0] for step in steps]) for way in ways]
    positions, outside, relative = (torch.stack([getattr(p, name) for p in found]) for name in landscape.Projection._fields)
    off = float((positions[:, -1] - flat.coordinates).norm(dim=1).add(outside[:, -1]).max() / flat.coordinates.norm(dim=1).max())
    if off > APART:
        # trained once more to be watched, and on this device not to the same weights
        return Output({}, {"off": off}, failed=f"the watched children end {off:.2g} of their distance away from the children")
    return Output({"steps": torch.tensor(steps), "positions": positions, "outside": outside, "relative": relative},
                  {"off": off, "outside_start": float(relative[:, 0].mean()),
                   "outside_halfway": float(relative[:, len(steps) // 2].mean())})
