"""What a mask keeps of the top eigenspace, and what two eigenspaces share, beside chance."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.hessian.entries import Entries, in_deviations


class Chance(NamedTuple):
    """Mean and standard deviation over random masks; ``layerwise`` and ``uniform`` as in :mod:`dpkit.hessian.sparse`."""

    mean: float
    deviation: float


class Overlap(NamedTuple):
    """Share of the top eigenvectors' squared mass on the entries that a mask keeps, in [0, 1].

    share              of the whole space: the mean over its vectors, whatever basis it is given in
    layerwise, uniform its mean and deviation over random masks
    shares             (k,) of each vector; only whole clusters of equal eigenvalues mean something
    chances            (k, 2): layerwise mean and deviation of each
    """

    share: float
    layerwise: Chance
    uniform: Chance
    shares: Tensor
    chances: Tensor

    @property
    def score(self) -> float:
        """Share minus layerwise chance in deviations: below 0, the mask removes the sharp directions' weights."""
        return in_deviations(self.share - self.layerwise.mean, self.layerwise.deviation)


def eigenspace_overlap(vectors: Tensor, mask: Entries) -> Overlap:
    """:class:`Overlap` of orthonormal columns (n, k) with a mask, beside what random masks give, exactly.

    share = sum_{i kept} a_i with a_i = sum_j V_ij^2 / k. Under a random mask that keeps m_l of the n_l entries of each layer it
    has mean sum_l (m_l / n_l) A_l, A_l the layer's part of the mass, and variance sum_l m_l (1 - m_l / n_l) S_l^2, S_l^2 the
    variance of a_i in the layer with divisor n_l - 1 (sampling without replacement; Cochran 1977, theorem 2.2). uniform: the same
    with one layer. Raises ``ValueError`` on columns that are not orthonormal to 1e-3 or do not fit the mask.
    """
    if vectors.dim() != 2 or len(vectors) != len(mask.kept) or vectors.shape[1] == 0:
        raise ValueError(f"vectors must be ({len(mask.kept)}, k) with k >= 1, as the mask, got {tuple(vectors.shape)}")
    vectors = vectors.double().cpu()
    _check_orthonormal(vectors, "vectors")
    mass = vectors.square()
    columns = torch.cat([mass.mean(1, keepdim=True), mass], 1)
    shares = columns[mask.kept].sum(0)
    layerwise = _random_shares(columns, mask.kept, mask.layers)
    uniform = _random_shares(columns[:, :1], mask.kept, torch.zeros_like(mask.layers))
    return Overlap(float(shares[0]), Chance(*layerwise[0].tolist()), Chance(*uniform[0].tolist()), shares[1:], layerwise[1:])


def _random_shares(columns: Tensor, kept: Tensor, layers: Tensor) -> Tensor:
    """(c, 2): mean and deviation of the sum over kept entries of each column, over random masks with the same layer counts."""
    found = columns.new_zeros(2, columns.shape[1])
    for layer in layers.unique():
        here = layers == layer
        part, count = columns[here], int(kept[here].sum())
        found[0] += count / len(part) * part.sum(0)
        if len(part) > 1:
            found[1] += count * (1 - count / len(part)) * part.var(0)
    return torch.stack([found[0], found[1].sqrt()], 1)


class Shared(NamedTuple):
    """How much two spaces share, in [0, 1], with mean and deviation for independent random ones."""

    share: float
    chance: Chance


def space_overlap(one: Tensor, other: Tensor) -> Shared:
    """||A'B||^2 / min(k, m) of orthonormal columns (n, k) and (n, m), as between top eigenvectors on real and on distilled
    images (Gur-Ari et al. 2018, arXiv 1812.04754).

    1 where one space holds the other. For two independent uniformly random spaces the trace of the product of their projections
    has mean k m / n and variance 2 k m (n - k) (n - m) / (n^2 (n - 1) (n + 2)). Raises ``ValueError`` unless both are
    orthonormal to 1e-3 and of one dimension n >= 2.
    """
    if one.dim() != 2 or other.dim() != 2 or len(one) != len(other) or len(one) < 2 or not one.shape[1] or not other.shape[1]:
        raise ValueError(f"spaces must be (n, k) and (n, m) with one n >= 2, got {tuple(one.shape)} and {tuple(other.shape)}")
    one, other = one.double().cpu(), other.double().cpu()
    for name, columns in (("one", one), ("other", other)):
        _check_orthonormal(columns, name)
    (n, k), m = one.shape, other.shape[1]
    variance = 2 * k * m * (n - k) * (n - m) / (n**2 * (n - 1) * (n + 2))
    least = min(k, m)
    return Shared(float((one.T @ other).square().sum()) / least, Chance(k * m / n / least, math.sqrt(variance) / least))


def _check_orthonormal(columns: Tensor, name: str) -> None:
    worst = float((columns.T @ columns - torch.eye(columns.shape[1], dtype=columns.dtype)).abs().max())
    if not worst <= 1e-3:
        raise ValueError(f"{name} must be orthonormal columns, got inner products that are {worst:.2g} off; "
                         "take the vectors of top_eigenpairs")
