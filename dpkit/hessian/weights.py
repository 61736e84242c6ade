"""The entries of a network that an operator's rows stand for, and vectors over them."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dpkit import models, tree
from dpkit.hessian.checks import check_mask
from dpkit.models import ModelSpec
from dpkit.tree import Mask, Params


class Weights:
    """A network's tensors and the vectors (n,) over those entries of ``names`` that count.

    The entries of ``names`` in their order, each tensor row by row. Pruned ones are skipped, or counted too with
    ``include_pruned``: then a vector may point along entries that the network cannot move along.

    Attributes: size n; dtype; device; names. Raises ``ValueError`` for unknown names, another dtype than float32 and float64,
    masks that do not fit, pruned entries that are not 0, and no entries.
    """

    def __init__(self, model: ModelSpec, params: Params, mask: Mask | None, names: Iterable[str] | None,
                 dtype: torch.dtype | None, include_pruned: bool) -> None:
        self.model = model
        self.names = tuple(models.prunable(model) if names is None else names)
        unknown = [name for name in self.names if name not in params]
        if unknown or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be distinct parameters of {model.arch}, "
                             f"got {', '.join(unknown or self.names)}")
        first = next(iter(params.values()))
        self.dtype, self.device = dtype or first.dtype, first.device
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {self.dtype}")
        self._fixed = tree.to(tree.detach(params), dtype=self.dtype)
        self._weights = {name: self._fixed.pop(name).requires_grad_() for name in self.names}
        masks = check_mask(mask or {}, {**self._weights, **self._fixed})
        self.pruned = "none" if all(bool(keep.all()) for keep in masks.values()) else "included" if include_pruned else "left out"
        # Places of the entries that count in each flattened tensor; None where all do.
        self._entries = {name: masks[name].reshape(-1).nonzero().squeeze(1) if name in masks and not include_pruned else None
                         for name in self.names}
        self._counts = [w.numel() if entries is None else len(entries)
                        for w, entries in zip(self._weights.values(), self._entries.values(), strict=True)]
        self.size = sum(self._counts)
        if self.size == 0:
            raise ValueError("the Hessian needs surviving weights, got a mask that prunes all of them")

    def flatten(self, values: Params) -> Tensor:
        """The surviving entries of tensors named and shaped like the weights, as one vector (n,)."""
        parts = ((values[name].reshape(-1), entries) for name, entries in self._entries.items())
        return torch.cat([part if entries is None else part[entries] for part, entries in parts])

    def unflatten(self, vector: Tensor) -> Params:
        """Inverse of :meth:`flatten`: tensors named and shaped like the weights, 0 at pruned entries.

        Raises ``ValueError`` unless ``vector`` is (n,).
        """
        self._check_shape(vector, 1)
        tensors = {}
        for (name, weight), part in zip(self._weights.items(), vector.split(self._counts), strict=True):
            entries = self._entries[name]
            full = part if entries is None else part.new_zeros(weight.numel()).index_copy(0, entries, part)
            tensors[name] = full.view(weight.shape)
        return tensors

    def _check_shape(self, vectors: Tensor, dimensions: int) -> None:
        if vectors.dim() != dimensions or len(vectors) != self.size:
            expected = f"({self.size},)" if dimensions == 1 else f"({self.size}, k)"
            raise ValueError(f"vectors must be {expected}, one row for each surviving weight, "
                             f"got {tuple(vectors.shape)}")
