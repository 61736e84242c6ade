"""Comparisons of masks in a store, for tests of the report: real masks, compared by the library, and worked out by sets."""
from __future__ import annotations

import torch
from test_report import put

from dpkit import prune
from dpkit.store import Store
from dpkit.tree import Mask

SHAPES = {"conv0.weight": (4, 3), "classifier.weight": (5, 4)}
WORK = (300.0, 20.0)  # multiply-adds of the two layers


def drawn(seed: int, count: int) -> Mask:
    """A random mask that keeps ``count`` of the 32 weights."""
    generator = torch.Generator().manual_seed(seed)
    like = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    return prune.keep_highest(prune.random_scores(like, generator), like, count)


def compared(store: Store, masks: dict[str, Mask], seed: int, percent: int,
             dead: dict[str, int] | None = None) -> tuple[dict, str]:
    """The row of a comparison. dead: of an arm's first layer, kept weights that lie on no path."""
    found = prune.compare(masks)
    effective = found.kept.clone()
    for name, count in (dead or {}).items():
        effective[found.names.index(name), 0] -= count
    tensors = {name: getattr(found, name) for name in ("kept", "both", "jaccard", "hamming", "jaccard_chance", "hamming_chance",
                                                       "jaccard_within", "hamming_within", "unique")}
    key = put(store, f"masks {seed} {percent}", {"arms": list(found.names), "tensors": list(found.tensors),
                                                 "sizes": found.sizes.tolist()},
              tensors=tensors | {"effective": effective, "work": torch.tensor(WORK, dtype=torch.float64)})
    return {"round": 1, "percent": percent, "seed": seed}, key


def watched(store: Store, source: str, seed: int, steps: list[int], scale: float = 0.1) -> tuple[dict, str]:
    """The row of a training whose masks at steps i and j differ in ``scale * |i - j|`` of the weights, by place."""
    at = torch.arange(len(steps), dtype=torch.float64)
    key = put(store, f"early bird {source} {seed}", {"steps": steps, "percent": 50.0},
              tensors={"distance": scale * (at[:, None] - at).abs()})
    return {"source": source, "percent": 50, "seed": seed}, key
