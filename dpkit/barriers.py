"""What a curve between two networks says: its barrier by each definition, and how well its points know it."""
from __future__ import annotations

import torch
from torch import Tensor


class NotFinite(ValueError):
    """A curve, or a network on it, whose values are no finite numbers: it has no barrier."""


def barrier(values: Tensor) -> float:
    """Highest value on the path minus the mean of both ends (Frankle et al. 2020, section 2: linear
    interpolation instability).

    values: (T,), T at least 2, in path order. Never negative: it is half the difference of the ends on a
    monotone path. :func:`barrier_linear` is zero there. Raises ``ValueError`` on fewer points, and :class:`NotFinite`, one of
    these, on NaN and infinite values, of which no difference can be taken.
    """
    values = checked(values)
    return float(values.max() - (values[0] + values[-1]) / 2)


def barrier_linear(alphas: Tensor, values: Tensor) -> float:
    """Largest excess of the path over the straight line between its end values: max over alpha of
    L(alpha) - [(1 - alpha) L(0) + alpha L(1)] (Entezari et al. 2022, arXiv 2110.06296, definition 2.1).

    alphas, values: (T,), alphas ascending from 0 to 1. At least 0. Raises ``ValueError`` as :func:`barrier` does, and on alphas
    that are not so.
    """
    return float(excess(alphas, values).max())


def barrier_over(values: Tensor, ends: Tensor) -> float:
    """Highest value of a curve minus the mean of two networks that need not lie at its ends, as where one layer of one of them is
    moved towards the other (Adilova et al. 2023, arXiv 2307.06966).

    values: (T,), at least 2.  ends: (2,), values of both networks. Negative where the curve stays below their mean. Raises
    ``ValueError`` as :func:`barrier` does, and unless there are two ends.
    """
    ends = checked(ends)
    if len(ends) != 2:
        raise ValueError(f"a barrier lies between 2 networks, got values of {len(ends)}; pass those of both")
    return float(checked(values).max() - ends.mean())


def is_stable(error_barrier: float, threshold: float = 0.02) -> bool:
    """Whether an error barrier (fraction) lies below ``threshold``; two points is Frankle et al.'s rule."""
    return error_barrier < threshold


def excess(alphas: Tensor, values: Tensor) -> Tensor:
    """Height of the path above the straight line between its end values, (T,) float64; 0 at both ends.

    alphas, values: (T,), alphas ascending from 0 to 1. Raises ``ValueError`` as :func:`barrier_linear` does.
    """
    values, alphas = checked(values), torch.as_tensor(alphas, dtype=torch.float64)
    if alphas.shape != values.shape or alphas[0] != 0 or alphas[-1] != 1:
        raise ValueError(f"alphas must run from 0 to 1 with one entry a value, got {alphas.tolist()} for "
                         f"{values.numel()} values")
    alphas = _ascending(alphas, values)
    return values - ((1 - alphas) * values[0] + alphas * values[-1])


def possible_rise(alphas: Tensor, values: Tensor) -> Tensor:
    """(T - 1,): how far the curve can rise above its highest point between two neighbouring points; 0 where it cannot.

    alphas, values: (T,), alphas ascending. Right for every curve that is concave between the neighbours of its highest points,
    as a smooth peak is once its points are close: the line through the two points on one side of an interval then stays above
    the curve in it. So only intervals next to a highest point count. Of a peak between other points nothing is known. Raises
    ``ValueError`` as :func:`barrier` does, and unless there is one alpha a value, each larger than the one before.
    """
    values = checked(values)
    alphas = _ascending(alphas, values)
    width = alphas.diff()
    slope, last = values.diff() / width, len(values) - 1
    rise = torch.zeros_like(width)
    for i in (values == values.max()).nonzero().flatten().tolist():
        if 0 < i < last:
            rise[i] = torch.maximum(rise[i], slope[i - 1] * width[i])
            rise[i - 1] = torch.maximum(rise[i - 1], -slope[i] * width[i - 1])
        elif i == 0 and last > 1:
            rise[0] = torch.maximum(rise[0], values[1] - slope[1] * width[0] - values[0])
        elif last > 1:
            rise[-1] = torch.maximum(rise[-1], values[-2] + slope[-2] * width[-1] - values[-1])
    return rise


def checked(values: Tensor) -> Tensor:
    """The ``values`` (T,) of a path, float64. Raises ``ValueError`` unless there are at least 2, all of them finite."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 1 or values.numel() < 2:
        raise ValueError(f"a path must have at least 2 values in one row, got shape {tuple(values.shape)}")
    if not values.isfinite().all():
        at = int((~values.isfinite()).nonzero()[0])
        what = "NaN" if values[at].isnan() else f"{float(values[at]):g}"
        raise NotFinite(f"a path must have finite values, got {what} at point {at}; check the networks and the evaluation images")
    return values


def _ascending(alphas: Tensor, values: Tensor) -> Tensor:
    alphas = torch.as_tensor(alphas, dtype=torch.float64)
    if alphas.shape != values.shape or not bool((alphas.diff() > 0).all()):
        raise ValueError(f"alphas must ascend with one entry a value, each once, got {alphas.tolist()} for "
                         f"{values.numel()} values; sort the points of the path")
    return alphas
