"""How a path is measured, and where its points lie."""
from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dpkit.spec import Spec, later

STATISTICS = ("reestimate", "interpolate", "repair")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathSpec(Spec):
    """How a path is measured.

    points: evaluation points, both ends included, evenly spaced; at least 3.
    statistics: what BatchNorm uses on the path. ``reestimate`` measures mean and variance anew at every
        point, ends included, so that all points are treated alike (Jordan et al. 2022, arXiv 2211.08403);
        ``interpolate`` takes the weighted average of both networks' running statistics, as the paper's own
        code does, which raises barriers; ``repair`` re-estimates and then gives activations the interpolated
        moments of the ends, in networks without BatchNorm too (:mod:`dpkit.connectivity.repair`).
    statistics_images: how many training images re-estimation uses, evenly spaced over those passed; at least
    2.
    precision: ``fp32``, or ``bf16`` for all of the forward pass but the classifier.
    error_tolerance (a fraction), loss_tolerance (nats): more points around the peak until the barriers are known this
        well, see :func:`refine`; 0 for none.  most_points: of a path after that.
    """

    points: int = 11
    statistics: str = "reestimate"
    statistics_images: int = 1000
    precision: str = later("fp32", before="fp32")
    error_tolerance: float = later(0.0, before=0.0)
    loss_tolerance: float = later(0.0, before=0.0)
    most_points: int = later(101, before=101)

    def check(self) -> None:
        self.require(self.points >= 3, f"points must be at least 3 (ends and middle), got {self.points}")
        self.one_of("statistics", STATISTICS)
        self.require(self.statistics_images >= 2,
                     f"statistics_images must be at least 2, got {self.statistics_images}")
        self.one_of("precision", ("fp32", "bf16"))
        self.between("error_tolerance", 0, 1, open_high=True)
        self.between("loss_tolerance", 0, float("inf"), open_high=True)
        refined = self.error_tolerance > 0 or self.loss_tolerance > 0
        self.require(not refined or self.most_points >= self.points,
                     f"most_points must be at least points, {self.points}, to refine a path; got {self.most_points}")


def evenly(points: int) -> Tensor:
    """``points`` alphas from 0 to 1, float64: i / (points - 1), each the nearest number to that fraction.

    So two grids agree to the last bit wherever they share a fraction (11 and 21 points, say), which those of
    ``torch.linspace`` do not. In float32 both give the same numbers (the tests compare all grids of up to 401 points), so
    float32 networks on a path are the same networks by either.
    """
    return torch.tensor([i / (points - 1) for i in range(points)], dtype=torch.float64)
