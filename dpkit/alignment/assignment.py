"""The linear assignment problem, exactly: scipy solves it too, but is not among the core dependencies."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assignment(scores: Tensor) -> Tensor:
    """The permutation p (n,) int64 with the largest sum of ``scores[i, p[i]]``; scores: (n, n), n at least 1, finite.

    Exact up to rounding in float64, in O(n^3): shortest augmenting paths on reduced costs (Jonker & Volgenant 1987, "A shortest
    augmenting path algorithm for dense and sparse linear assignment problems"), the method of scipy's
    ``linear_sum_assignment`` too. Equal scores give equal results. Raises ``ValueError`` unless scores are square and finite.
    """
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1] or not len(scores):
        raise ValueError(f"scores must be a square matrix, got shape {tuple(scores.shape)}; give one row and column a channel")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores must be finite numbers, got NaN or infinite ones; did the training diverge?")
    cost = -scores.detach().double().cpu().numpy()
    n = len(cost)
    # Duals u, v with cost >= u + v, equality on the pairs of the matching: first column minima, then row minima.
    v = cost.min(0)
    reduced = cost - v
    u = reduced.min(1)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for i in range(n):
        free = np.flatnonzero((reduced[i] == u[i]) & (row_of < 0))
        if len(free):
            column_of[i], row_of[free[0]] = free[0], i
    for i in np.flatnonzero(column_of < 0):
        _augment(cost, u, v, row_of, column_of, i)
    return torch.from_numpy(column_of)


def _augment(cost: np.ndarray, u: np.ndarray, v: np.ndarray, row_of: np.ndarray, column_of: np.ndarray, start: int) -> None:
    """Match row ``start``, in place: the cheapest path of alternating pairs to a free column, by Dijkstra on reduced costs."""
    n = len(cost)
    length, before, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, dtype=bool)
    row, low = start, 0.0
    while True:
        through = low + cost[row] - u[row] - v
        nearer = ~done & (through < length)
        length[nearer], before[nearer] = through[nearer], row
        column = int(np.where(done, np.inf, length).argmin())
        low = length[column]
        if row_of[column] < 0:
            break
        done[column] = True
        row = row_of[column]
    u[start] += low
    closed = np.flatnonzero(done)
    u[row_of[closed]] += low - length[closed]
    v[closed] -= low - length[closed]
    while True:  # back along the path: each column goes to the row before it, which gives its own up
        row = before[column]
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == start:
            return
