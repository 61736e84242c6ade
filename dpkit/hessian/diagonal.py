"""Diagonal, exactly (small networks) or by random probes."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.hessian.checks import check_memory, check_whole
from dpkit.hessian.estimate import Estimate, LinearOperator, probed
from dpkit.hessian.trace import mean_estimate


class Diagonal(NamedTuple):
    """values (n,) and standard_errors (n,): float64 on the CPU, in the order of the operator's entries."""

    values: Tensor
    standard_errors: Tensor
    products: int


def diagonal(op: LinearOperator, probes: int, generator: torch.Generator) -> Diagonal:
    """Hutchinson's estimate of the diagonal: the mean of v * Hv (elementwise) over sign vectors v.

    Each entry is unbiased; one probe gives entry i the variance sum_{j != i} H_ij^2 (Bekas, Kokiopoulou and
    Saad 2007, An estimator for the diagonal of a matrix, with signs for the vectors). One entry is thus known
    no better than the length of its row allows: use the values for distributions over many entries and the
    standard error for single ones.

    op symmetric (n, n); probes at least 2; CPU generator. Raises ``ValueError`` for fewer than 2 probes.
    """
    return trace_and_diagonal(op, probes, generator)[1]


def trace_and_diagonal(op: LinearOperator, probes: int,
                       generator: torch.Generator) -> tuple[Estimate, Diagonal]:
    """:func:`trace` and :func:`diagonal` from the same products, at the cost of one of them.

    The trace is the sum of the diagonal's values, but its standard error is not the root of the sum of
    squares: errors of entries i and j share the term H_ij. It is taken over the probes' own sums. Raises as
    :func:`diagonal`.
    """
    count, quadratic = 0, []
    mean = torch.zeros(op.size, dtype=torch.float64, device=op.device)
    spread = torch.zeros_like(mean)
    for samples in probed(op, probes, generator):
        quadratic.append(samples.sum(0, dtype=torch.float64).cpu())
        # Merge of two means and sums of squares (Chan, Golub and LeVeque 1983, Algorithms for computing the
        # sample variance): no cancellation, and memory for one block only.
        block, centre = samples.shape[1], samples.mean(1, dtype=torch.float64)
        shift = centre - mean
        spread += (samples - centre[:, None]).square().sum(1)
        spread += shift.square() * (count * block / (count + block))
        mean += shift * (block / (count + block))
        count += block
    errors = (spread / (count * (count - 1))).sqrt()
    return mean_estimate(torch.cat(quadratic)), Diagonal(mean.cpu(), errors.cpu(), count)


def diagonal_and_sums(op: LinearOperator, groups: Tensor, probes: int,
                      generator: torch.Generator) -> tuple[list[Estimate], Diagonal]:
    """:func:`diagonal`, and the sum of its entries over each of the ``groups`` (g, n) bool, from the same products.

    A group's error is that of the probes' own sums over it, as for a trace (:func:`trace_and_diagonal`). Raises as
    :func:`diagonal`, and ``ValueError`` where the groups are not of the operator's size.
    """
    if groups.dim() != 2 or groups.shape[1] != op.size:
        raise ValueError(f"groups must be (g, {op.size}), a row of the operator's entries each, got {tuple(groups.shape)}")
    blocks = [samples.double().cpu() for samples in probed(op, probes, generator)]
    samples = torch.cat(blocks, 1)
    sums = [mean_estimate(samples[group].sum(0)) for group in groups.cpu().bool()]
    return sums, Diagonal(samples.mean(1), samples.std(1) / math.sqrt(probes), probes)


def exact_diagonal(op: LinearOperator, *, limit: int = 5000, block: int = 64, entries: Tensor | None = None,
                   memory: int | None = None) -> Diagonal:
    """The diagonal by one product an entry, ``block`` of them at a time; standard errors are 0.

    This is the published protocol's estimator (it spends one double backward a parameter).

    op       symmetric operator (n, n)
    limit    most entries that are taken this way
    block    products taken together, at least 1
    entries  (m,) places in [0, n) wanted, in this order; None: all. A random sample of them gives the mean of the diagonal,
             and a layer's share of it, where all of it is too much
    memory   bytes that the vectors of a block and their products may take; narrower blocks follow. None: no bound

    Values are (m,) or (n,). Raises ``ValueError`` when there are more entries than ``limit``, when one lies outside the
    operator, or when ``memory`` does not hold one vector and its product.
    """
    places = torch.arange(op.size) if entries is None else entries.cpu().to(torch.int64)
    if places.dim() != 1 or len(places) == 0 or int(places.min()) < 0 or int(places.max()) >= op.size:
        raise ValueError(f"entries must be a vector of places in [0, {op.size}), got {tuple(places.shape)}"
                         + (f" from {places.min()} to {places.max()}" if places.numel() else ""))
    if len(places) > limit:
        raise ValueError(f"exact_diagonal takes one product an entry and at most {limit}, "
                         f"got {len(places)} entries; use diagonal or raise limit")
    check_whole(block=block)
    check_memory(memory)
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    if memory is not None:
        each = 2 * op.size * torch.empty(0, dtype=op.dtype).element_size()
        if memory < each:
            raise ValueError(f"memory must hold one vector and its product, {each} bytes, got {memory}")
        block = min(block, int(memory // each))
    values = torch.empty(len(places), dtype=torch.float64)
    for start in range(0, len(places), block):
        rows = places[start:start + block].to(op.device)
        order = torch.arange(len(rows), device=op.device)
        columns = torch.zeros(op.size, len(rows), dtype=op.dtype, device=op.device)
        columns[rows, order] = 1.0
        values[start:start + len(rows)] = op.matmat(columns)[rows, order].double().cpu()
    return Diagonal(values, torch.zeros_like(values), len(places))
