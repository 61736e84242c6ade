"""How planes, squares, the surroundings of a network, and lines through it are measured."""
from __future__ import annotations

import dataclasses

from dpkit.spec import Spec, later

FORMS = ("bilinear", "diagonals")
OTHERS = ("zero", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureSpec(Spec):
    """What all of them share: on which images, with which statistics, and how exactly a network is evaluated.

    images: how many evaluation images are used, evenly spaced over those passed; 0 for all.
    statistics: ``reestimate`` measures BatchNorm mean and variance anew at every point; ``keep`` uses the
        buffers passed.
    statistics_images: how many training images re-estimation uses, evenly spaced over those passed; at least 2.
    precision: ``fp32``, or ``bf16`` for all of the forward pass but the classifier.
    compile: compile the forward pass; otherwise only where the work of 11 x 11 points pays for it, however many points are
        asked for, so that a refined result has the bits of one measured at once. Worth it for finer grids.
    """

    STATISTICS = ("reestimate", "keep")

    images: int = 1000
    statistics: str = "reestimate"
    statistics_images: int = 500
    precision: str = later("fp32", before="fp32")
    compile: bool = later(False, before=False)

    def check(self) -> None:
        self.require(self.images >= 0, f"images must be at least 0 (0 means all), got {self.images}")
        self.one_of("statistics", self.STATISTICS)
        self.require(self.statistics_images >= 2,
                     f"statistics_images must be at least 2, got {self.statistics_images}")
        self.one_of("precision", ("fp32", "bf16"))

    def check_resolution(self, resolution: int) -> None:
        """Raise unless a grid has a line at each end."""
        self.require(resolution >= 2, f"resolution must be at least 2 points, got {resolution}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneSpec(MeasureSpec):
    """How the plane through three networks is measured; other fields as in :class:`MeasureSpec`.

    resolution: grid points a side, at least 2; the cost is its square in evaluations.
    margin: how far the grid reaches beyond the three networks, as a fraction of the longer side of their
        bounding box.
    """

    resolution: int = 21
    margin: float = 0.25

    def check(self) -> None:
        self.check_resolution(self.resolution)
        self.between("margin", 0, float("inf"), open_high=True)
        super().check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareSpec(MeasureSpec):
    """How the square of four networks is measured; other fields as in :class:`MeasureSpec`.

    resolution: grid points a side, at least 2; the cost is its square in evaluations.
    margin: how far the grid reaches beyond the square, as a fraction of its side.
    form: which networks lie at (x, y), see :meth:`dpkit.landscape.Square.weights`. ``bilinear`` passes through all four;
        ``diagonals`` is the plane of the paper's code, which holds two of them.
    statistics: ``reestimate``; ``keep``; or ``interpolate``, the average of the four networks' running statistics
        with the weights of the point, as in the paper's code. Only where no weight is negative (``bilinear``, margin 0), since
        a variance must not be.
    """

    STATISTICS = ("reestimate", "keep", "interpolate")

    resolution: int = 21
    margin: float = 0.0
    form: str = "bilinear"

    def check(self) -> None:
        self.check_resolution(self.resolution)
        self.between("margin", 0, float("inf"), open_high=True)
        self.one_of("form", FORMS)
        super().check()
        self.require(self.statistics != "interpolate" or (self.margin == 0 and self.form == "bilinear"),
                     f"interpolated statistics need margin 0 and form bilinear, where no weight is negative; got margin "
                     f"{self.margin:g} and form {self.form}; choose statistics reestimate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AroundSpec(MeasureSpec):
    """How the surroundings of one network are measured; other fields as in :class:`MeasureSpec`.

    resolution: grid points a side, at least 2; the network itself is one of them where it is odd.
    reach: the grid runs from ``-reach`` to ``reach``, in units of the directions: 1 moves each filter by its own norm.
    others: what random directions do to biases, norms and positions, see :func:`dpkit.landscape.filter_normalised`.
    """

    resolution: int = 21
    reach: float = 1.0
    others: str = "zero"

    @property
    def directions(self) -> int:
        """Two span a plane."""
        return 2

    def check(self) -> None:
        self.check_resolution(self.resolution)
        self.between("reach", 0, float("inf"), open_low=True, open_high=True)
        self.one_of("others", OTHERS)
        super().check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSpec(MeasureSpec):
    """How lines through one network are measured; other fields as in :class:`MeasureSpec`.

    points: on each line, evenly spaced; odd and at least 3, so that the network itself is among them.
    reach: a line runs from ``-reach`` to ``reach``, in units of its direction: 1 moves each filter by its own norm.
    directions: how many random ones :func:`dpkit.landscape.random_directions` draws.
    others: what they do to biases, norms and positions, see :func:`dpkit.landscape.filter_normalised`.
    """

    points: int = 21
    reach: float = 1.0
    directions: int = 5
    others: str = "zero"

    def check(self) -> None:
        self.require(self.points >= 3 and self.points % 2 == 1,
                     f"points must be odd and at least 3, so that the network itself is one of them; got {self.points}")
        self.between("reach", 0, float("inf"), open_low=True, open_high=True)
        self.require(self.directions >= 1, f"directions must be at least 1, got {self.directions}")
        self.one_of("others", OTHERS)
        super().check()
