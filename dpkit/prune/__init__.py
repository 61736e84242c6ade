"""Pruning: masks with exact counts, and the loop that finds them."""
from dpkit.prune.iterate import PruneSpec, Ticket, iterate, next_ticket, rewind
from dpkit.prune.masks import (
    apply,
    check_fraction,
    collapsed,
    density,
    full,
    jaccard,
    keep_highest,
    magnitude,
    prune,
    random_scores,
    size,
    sparsity,
    surviving,
    survivors,
)

__all__ = ["PruneSpec", "Ticket", "apply", "check_fraction", "collapsed", "density", "full", "iterate", "jaccard",
           "keep_highest", "magnitude", "next_ticket", "prune", "random_scores", "rewind", "size", "sparsity", "surviving",
           "survivors"]
