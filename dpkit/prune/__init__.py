"""Pruning: masks with exact counts, the loop that finds them, scores, controls, and how much masks agree."""
from dpkit.prune.allocation import ALLOCATIONS, SPARES, keep, shares, spared, spared_weights
from dpkit.prune.compare import Comparison, compare, distances, early_bird, jaccard
from dpkit.prune.controls import reinit, shuffle_mask, shuffled, signs
from dpkit.prune.effective import effective
from dpkit.prune.iterate import SCOPES, PruneSpec, Ticket, iterate, next_ticket, norm_names, rewind, select
from dpkit.prune.masks import (
    apply,
    check,
    check_fraction,
    check_model,
    collapsed,
    density,
    full,
    keep_highest,
    magnitude,
    prune,
    random_scores,
    size,
    sparsity,
    surviving,
    survivors,
)
from dpkit.prune.scores import grasp, snip, synflow, synflow_scores

__all__ = ["ALLOCATIONS", "SCOPES", "SPARES", "Comparison", "PruneSpec", "Ticket", "apply", "check", "check_fraction",
           "check_model", "collapsed", "compare", "density", "distances", "early_bird", "effective", "full", "grasp",
           "iterate", "jaccard", "keep", "keep_highest", "magnitude", "next_ticket", "norm_names", "prune", "random_scores",
           "reinit", "rewind", "select", "shares", "shuffle_mask", "shuffled", "signs", "size", "snip", "spared",
           "spared_weights", "sparsity", "surviving", "survivors", "synflow", "synflow_scores"]
