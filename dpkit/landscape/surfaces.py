"""Surfaces of networks: the plane through three, the square of four, directions around one; and where networks lie."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit import models, tree
from dpkit.landscape.checks import check_direction, check_mask
from dpkit.landscape.spec import AroundSpec, MeasureSpec, PlaneSpec, SquareSpec
from dpkit.tree import Buffers, Mask, Params, flatten, unflatten


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
        its longer side on every side. Of R and 2 R - 1 lines every second is the same, bit for bit.
        """
        low, high = self.coordinates.min(0).values, self.coordinates.max(0).values
        reach = margin * (high - low).max()
        x, y = (torch.linspace(float(low[i] - reach), float(high[i] + reach), resolution, dtype=torch.float64)
                for i in range(2))
        return x, y

    def grid_lines(self, spec: MeasureSpec) -> tuple[Tensor, Tensor]:
        """:meth:`axes` as ``spec`` asks for them."""
        return self.axes(_kind("a plane through three networks", spec, PlaneSpec).resolution, spec.margin)

    def to(self, device: torch.device) -> Plane:
        """The same plane on ``device``."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in ("origin", "u", "v")})


@dataclasses.dataclass(frozen=True)
class Square:
    """Four networks at the corners of the unit square, in units of the sides' ratio: x and y are alphas of paths.

    corners: parameters of networks a, b, c and d.  buffers: theirs, or None; only ``statistics == "interpolate"`` reads them.
    coordinates: (4, 2): a at (0, 0), b at (1, 0), c at (0, 1), d at (1, 1).
    twist: |a + d - b - c| over the mean length of the four sides. 0: the four lie on a plane, as a parallelogram.
    """

    corners: tuple[Params, ...]
    buffers: tuple[Buffers, ...] | None
    coordinates: Tensor
    twist: float

    @property
    def like(self) -> Params:
        """Parameters that give names, shapes and dtypes."""
        return self.corners[0]

    @staticmethod
    def weights(x: float, y: float, form: str = "bilinear") -> tuple[float, float, float, float]:
        """Weights of a, b, c and d at (x, y); their sum is 1.

        ``bilinear``: (1 - x)(1 - y), x (1 - y), (1 - x) y, x y. All four networks lie at their corners and each side is the
        straight path between its two networks. It is a plane only where a + d = b + c, and a curved surface otherwise, straight
        along x and along y alone.
        ``diagonals``: (2 - x - y)/2, (x - y)/2, (y - x)/2, (x + y)/2: what the code of the paper computes
        (luke-mcdermott-mi/SyntheticDataForIMP, ``distilled_loss_landscape.py``): the middle of a and d plus multiples of
        (d - a)/2 and (b - c)/2. A plane that holds a and d at their corners; b and c lie on it only where a + d = b + c.
        """
        if form == "bilinear":
            return (1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y
        return (2 - x - y) / 2, (x - y) / 2, (y - x) / 2, (x + y) / 2

    def point(self, x: float, y: float, form: str = "bilinear") -> Params:
        """Parameters at (x, y), summed in float64, in the dtypes of the networks; a network itself at its corner."""
        return _mean(self.corners, self.weights(x, y, form))

    def statistics(self, x: float, y: float) -> Buffers:
        """The networks' buffers averaged with the bilinear weights of (x, y)."""
        return _mean(self.buffers, self.weights(x, y))

    def axes(self, resolution: int, margin: float) -> tuple[Tensor, Tensor]:
        """Grid lines x (R,) and y (R,) from ``-margin`` to ``1 + margin``."""
        reach = exact(margin)
        both = lines(-reach, 1 + reach, resolution)
        return both, both.clone()

    def grid_lines(self, spec: MeasureSpec) -> tuple[Tensor, Tensor]:
        """:meth:`axes` as ``spec`` asks for them."""
        return self.axes(_kind("a square of four networks", spec, SquareSpec).resolution, spec.margin)

    def to(self, device: torch.device) -> Square:
        """The same square on ``device``."""
        buffers = None if self.buffers is None else tuple(tree.to(b, device) for b in self.buffers)
        return dataclasses.replace(self, corners=tuple(tree.to(c, device) for c in self.corners), buffers=buffers)


@dataclasses.dataclass(frozen=True)
class Around:
    """A network and two directions, which need not be orthogonal.

    like: its parameters.  first, second: the directions, all names of ``like``.  coordinates: (1, 2), the network at (0, 0).
    """

    like: Params
    first: Params
    second: Params
    coordinates: Tensor

    def point(self, x: float, y: float) -> Params:
        """Parameters at ``network + x first + y second``, summed in float64, in the dtypes of the network."""
        return {name: (t.double() + x * self.first[name].double() + y * self.second[name].double()).to(t.dtype)
                for name, t in self.like.items()}

    def axes(self, resolution: int, reach: float) -> tuple[Tensor, Tensor]:
        """Grid lines x (R,) and y (R,) from ``-reach`` to ``reach``."""
        both = lines(-exact(reach), exact(reach), resolution)
        return both, both.clone()

    def grid_lines(self, spec: MeasureSpec) -> tuple[Tensor, Tensor]:
        """:meth:`axes` as ``spec`` asks for them."""
        return self.axes(_kind("directions around a network", spec, AroundSpec).resolution, spec.reach)

    def to(self, device: torch.device) -> Around:
        """The same on ``device``."""
        return dataclasses.replace(self, **{name: tree.to(getattr(self, name), device) for name in ("like", "first", "second")})


Surface = Plane | Square | Around


def exact(value: float) -> Fraction:
    """The decimal number that ``value`` is written as: 0.1 is a tenth, so that grids meet 0 and 1 exactly."""
    return Fraction(repr(float(value)))


def lines(low: Fraction, high: Fraction, count: int) -> Tensor:
    """``count`` evenly spaced places (R,), float64, each the number nearest to low + (high - low) i / (R - 1).

    Equal fractions give equal bits, whatever the count: a finer grid shares places with a coarser one.
    """
    return torch.tensor([float(low + (high - low) * Fraction(i, count - 1)) for i in range(count)], dtype=torch.float64)


def plane(a: Params, b: Params, c: Params, *, mask: Mask | None = None, masks: tuple[Mask, Mask, Mask] | None = None,
          starts: tuple[Params, Params, Params] | None = None) -> Plane:
    """The plane through three networks, by Gram-Schmidt on b - a and c - a over all parameters (flat,
    float64).

    Garipov et al. 2018 (arXiv 1802.10026): u = (b - a) / |b - a|, v the part of c - a orthogonal to u, normalised; a point
    of the plane is a + x u + y v. Distances on the plane are Euclidean distances between weights.
    mask: which all three must share; nothing is checked without one.  masks: of each, where they must be the same.
    starts: initial parameters of each, where they must be the same.
    Raises ``ValueError`` with one line when the networks differ in names or shapes, have NaN weights, have weights
    that the mask removes, do not share mask or start where that is asked for, or lie on a line (equal networks included) within
    the rounding of float32.
    """
    models.check_same({"a": a, "b": b, "c": c})
    _check_shared({"a": a, "b": b, "c": c}, masks, starts)
    check_mask(mask, {"network a": a, "network b": b, "network c": c})
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


def square(a: Params, b: Params, c: Params, d: Params, *, buffers: tuple[Buffers, ...] | None = None,
           mask: Mask | None = None, masks: tuple[Mask, ...] | None = None,
           starts: tuple[Params, ...] | None = None) -> Square:
    """The square with networks a, b, c and d at (0, 0), (1, 0), (0, 1) and (1, 1); see :meth:`Square.weights`.

    buffers: of the four, in the same order, for ``statistics == "interpolate"``.  mask: which all four must share.
    masks, starts: of each, where they must be the same.
    Raises ``ValueError`` with one line when the networks differ in names or shapes, have NaN weights, have weights that the
    mask removes, do not share mask or start where that is asked for, or when two of them are equal.
    """
    named = dict(zip("abcd", (a, b, c, d), strict=True))
    models.check_same(named)
    _check_shared(named, masks, starts)
    check_mask(mask, {f"network {label}": params for label, params in named.items()})
    if buffers is not None:
        if len(buffers) != 4:
            raise ValueError(f"a square needs the buffers of its 4 networks, got {len(buffers)}")
        models.check_same(dict(zip("abcd", buffers, strict=True)))
    lengths = {pair: _distance(named[pair[0]], named[pair[1]]) for pair in ("ab", "ac", "bd", "cd", "ad", "bc")}
    for (one, other), length in lengths.items():
        if length == 0:
            raise ValueError(f"the four networks of a square must differ, but {one} and {other} are equal; choose another child")
    side = sum(lengths[pair] for pair in ("ab", "ac", "bd", "cd")) / 4
    off = sum(float((a[n].double() + d[n] - b[n] - c[n]).square().sum()) for n in a) ** 0.5
    places = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    return Square((a, b, c, d), buffers, places, off / side)


def around(params: Params, first: Params, second: Params, *, mask: Mask | None = None) -> Around:
    """Two directions around the network ``params``: those of :func:`random_directions`, or any others.

    first, second: tensors named and shaped like those of the network; what they do not name stays as it is.
    mask: of the network; the directions must be 0 where it removes weights.
    Raises ``ValueError`` with one line when a direction does not fit the network, is not finite or is zero, when both lie on one
    line, or when weights that the mask removes would move.
    """
    models.check_same({"at the centre": params})
    named = {"the first direction": first, "the second direction": second}
    for what, direction in named.items():
        check_direction(params, direction, what)
    both = [{name: direction[name].to(t.device) if name in direction else t.new_zeros(()).expand(t.shape)
             for name, t in params.items()}
            for direction in (first, second)]
    check_mask(mask, {"the network": params, **dict(zip(named, both, strict=True))})
    cosine = tree.dot(*both) / (tree.norm(both[0]) * tree.norm(both[1]))
    if 1 - abs(cosine) < 1e-9:
        raise ValueError(f"the two directions must not lie on one line, got cosine {cosine:.6g} between them; choose another one")
    return Around(dict(params), *both, torch.zeros(1, 2, dtype=torch.float64))


#: of the way from a plane's origin to the farthest network that it was laid through, or else of its longer direction
NEAR = 1e-4


class Projection(NamedTuple):
    """Where S networks lie on a plane; float64.

    positions: (S, 2), (x, y) of the nearest point of the plane.  outside: (S,), distance from it, over all parameters (L2).
    relative: (S,), ``outside`` over the distance from the plane's origin, in [0, 1]: 0 on the plane, 1 where the plane shows
        nothing of what separates the network from its origin. 0 at the origin itself, and within :data:`NEAR` of it, where
        rounding alone would decide.
    """

    positions: Tensor
    outside: Tensor
    relative: Tensor


def project(plane: Plane | Around, networks: Iterable[Params]) -> Projection:
    """The orthogonal projection of networks, such as the steps of a training, onto a plane.

    networks: parameters with the names and shapes of the plane's; they are read one at a time.
    What lies outside is no small remainder as a rule: directions of high dimension are nearly orthogonal (Li et al. 2018,
    arXiv 1712.09913, section 7). So ``outside`` belongs beside every drawn trajectory.
    Raises ``ValueError`` with one line on a square, which is no plane, and on networks that differ from the plane's in names or
    shapes or have NaN weights.
    """
    if isinstance(plane, Square):
        raise ValueError("networks are projected onto planes, got the square of four networks, which is curved; "
                         "project them onto the plane through three of them")
    if isinstance(plane, Plane):
        origin, axes = plane.origin, [plane.u, plane.v]
    else:
        origin, *axes = (flatten(t, list(plane.like)).double() for t in (plane.like, plane.first, plane.second))
    basis = torch.stack(axes)
    gram = basis @ basis.T
    corners = float((plane.coordinates.to(basis) @ basis).norm(dim=1).max())
    near = NEAR * (corners or float(basis.norm(dim=1).max()))
    positions, outside, relative = [], [], []
    for number, params in enumerate(networks):
        models.check_same({"plane": plane.like, f"number {number}": params})
        there = flatten(params, list(plane.like)).to(origin.device).double() - origin
        place = torch.linalg.solve(gram, basis @ there)
        rest = float((there - place @ basis).norm())
        away = float(there.norm())
        positions.append(place.cpu())
        outside.append(rest)
        relative.append(min(rest / away, 1.0) if away > near else 0.0)
    found = torch.stack(positions) if positions else torch.zeros(0, 2, dtype=torch.float64)
    return Projection(found, *(torch.tensor(values, dtype=torch.float64) for values in (outside, relative)))


def _check_shared(networks: dict[str, Params], masks: tuple[Mask, ...] | None, starts: tuple[Params, ...] | None) -> None:
    for what, given in (("masks", masks), ("starts", starts)):
        if given is not None and len(given) != len(networks):
            raise ValueError(f"{what} must be given for networks {', '.join(networks)}, one each in this order, got {len(given)}")
    models.check_shared(networks, *(given and dict(zip(networks, given, strict=True)) for given in (masks, starts)))


def _kind(what: str, spec: MeasureSpec, kind: type) -> MeasureSpec:
    if not isinstance(spec, kind):
        raise ValueError(f"{what} must be measured as a {kind.__name__} says, got a {type(spec).__name__}")
    return spec


def _mean(trees: tuple[Params, ...], weights: tuple[float, ...]) -> Params:
    parts = [(w, t) for w, t in zip(weights, trees, strict=True) if w]
    if len(parts) == 1:
        return dict(parts[0][1])  # a corner: the network itself
    return {name: sum(w * t[name].double() for w, t in parts).to(like.dtype) if like.is_floating_point() else like
            for name, like in trees[0].items()}


def _distance(a: Params, b: Params) -> float:
    return sum(float((a[name].double() - b[name]).square().sum()) for name in a) ** 0.5
