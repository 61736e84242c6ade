"""Planes through three networks, and error and loss on a grid over them.

Garipov et al. 2018 (arXiv 1802.10026): u = (b - a) / |b - a|, v the part of c - a
orthogonal to u, normalised; a point of the plane is a + x u + y v. Distances on the plane are Euclidean
distances between weights.
"""
from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dpkit import models
from dpkit.models import ModelSpec
from dpkit.spec import Spec, later
from dpkit.training import evaluate_many
from dpkit.tree import Buffers, Params, flatten, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneSpec(Spec):
    """How a plane is measured.

    resolution: grid points a side, at least 2; the cost is its square in evaluations.
    margin: how far the grid reaches beyond the three networks, as a fraction of the longer side of their
    bounding box.
    images: how many evaluation images are used, evenly spaced over those passed; 0 for all.
    statistics: ``reestimate`` measures BatchNorm mean and variance anew at every point; ``keep`` uses the
    buffers passed.
    statistics_images: how many training images re-estimation uses, evenly spaced over those passed; at least
    2.
    precision: ``fp32``, or ``bf16`` for all of the forward pass but the classifier.
    """

    resolution: int = 21
    margin: float = 0.25
    images: int = 1000
    statistics: str = "reestimate"
    statistics_images: int = 500
    precision: str = later("fp32", before="fp32")

    def check(self) -> None:
        self.require(self.resolution >= 2, f"resolution must be at least 2 points, got {self.resolution}")
        self.between("margin", 0, float("inf"), open_high=True)
        self.require(self.images >= 0, f"images must be at least 0 (0 means all), got {self.images}")
        self.one_of("statistics", ("reestimate", "keep"))
        self.require(self.statistics_images >= 2,
                     f"statistics_images must be at least 2, got {self.statistics_images}")
        self.one_of("precision", ("fp32", "bf16"))


@dataclasses.dataclass(frozen=True)
class Plane:
    """A plane in weight space. n counts all parameters; everything is float64.

    origin: (n,), network a.  u, v: (n,), orthonormal.  coordinates: (3, 2), (x, y) of networks a, b and c:
    the first is (0, 0), the second (|b - a|, 0), the third has y > 0.  like: parameters that give names,
    shapes and dtypes.
    """

    origin: Tensor
    u: Tensor
    v: Tensor
    coordinates: Tensor
    like: Params

    def point(self, x: float, y: float) -> Params:
        """Parameters at ``origin + x u + y v``, in the dtypes of the networks."""
        tree = unflatten(self.origin + x * self.u + y * self.v, self.like)
        return {name: t.to(self.like[name].dtype) for name, t in tree.items()}

    def axes(self, resolution: int, margin: float) -> tuple[Tensor, Tensor]:
        """Grid lines x (R,) and y (R,): the bounding box of the three networks, widened by ``margin`` times
        its longer side on every side.
        """
        low, high = self.coordinates.min(0).values, self.coordinates.max(0).values
        reach = margin * (high - low).max()
        x, y = (torch.linspace(float(low[i] - reach), float(high[i] + reach), resolution, dtype=torch.float64)
                for i in range(2))
        return x, y


@dataclasses.dataclass(frozen=True)
class Grid:
    """Error (fraction) and mean cross-entropy (nats) on a plane; float64 tensors.

    x, y: (R,) distances in weight space.  errors, losses: (R, R), row i at y[i], column j at x[j], as contour
    plots expect.  coordinates: (3, 2), where networks a, b and c lie.
    """

    x: Tensor
    y: Tensor
    errors: Tensor
    losses: Tensor
    coordinates: Tensor


def plane(a: Params, b: Params, c: Params) -> Plane:
    """The plane through three networks, by Gram-Schmidt on b - a and c - a over all parameters (flat,
    float64).

    Raises ``ValueError`` with one line when the networks differ in names or shapes, have NaN weights, or lie
    on a line (equal networks included) within the rounding of float32.
    """
    models.check_same({"a": a, "b": b, "c": c})
    origin, first, second = (flatten(tree, list(a)).double() for tree in (a, b, c))
    along, across = first - origin, second - origin
    length = float(along.norm())
    # Weights are stored to one part in 10^7; a smaller distance from the line is rounding, not a direction.
    rounding = 1e-6 * max(float(t.norm()) for t in (origin, first, second))
    if length <= rounding:
        raise ValueError(f"networks a and b must differ to span a plane, got distance {length:.3g}; "
                         f"choose three networks that are not on one line")
    u = along / length
    x = float(across @ u)
    rest = across - x * u
    rest = rest - (rest @ u) * u  # A second pass removes what the first one's rounding left.
    height = float(rest.norm())
    if height <= rounding * max(1.0, abs(x) / length):
        raise ValueError(f"networks a, b and c must not lie on one line, got c at distance {height:.3g} "
                         f"from the line through a and b; choose three networks that are not on one line")
    coordinates = torch.tensor([[0.0, 0.0], [length, 0.0], [x, height]], dtype=torch.float64)
    return Plane(origin, u, rest / height, coordinates, dict(a))


@torch.no_grad()
def grid(spec: PlaneSpec, model: ModelSpec, plane: Plane, buffers: Buffers, images: Tensor, labels: Tensor,
         statistics_images: Tensor | None = None, *, threads: int = 1) -> Grid:
    """Error and loss over the plane in eval mode, at ``spec.resolution`` squared points.

    buffers: of one of the networks; their BatchNorm statistics are used under ``statistics == "keep"`` only.
    images: (N, C, S, S) normalised float32.  labels: (N,) int64.
    statistics_images: normalised training images (M, C, S, S), for re-estimating BatchNorm where the network
    has it.  threads: cores that share the points; the same bits for any number.
    Raises ``ValueError`` with one line on an empty evaluation set, lengths that differ, or missing
    statistics images.
    """
    models.check_evaluation(images, labels)
    source = None
    if spec.statistics == "reestimate":
        source = models.statistics_source(model, statistics_images, spec.statistics_images)
    if spec.images:
        chosen = models.spread(len(images), spec.images)
        images, labels = images[chosen], labels[chosen]
    x, y = plane.axes(spec.resolution, spec.margin)
    origin, u, v = (t.to(images.device) for t in (plane.origin, plane.u, plane.v))
    there = dataclasses.replace(plane, origin=origin, u=u, v=v)

    def network(k: int) -> tuple[Params, Buffers]:
        return there.point(float(x[k % len(x)]), float(y[k // len(x)])), buffers

    values = evaluate_many(model, len(x) * len(y), network, images, labels, statistics_images=source,
                           precision=spec.precision, threads=threads)
    errors, losses = (t.reshape(len(y), len(x)) for t in values)
    return Grid(x, y, errors, losses, plane.coordinates)
