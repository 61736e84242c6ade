"""Permutation alignment: put the channels of one network in the order that brings its weights closest to another's.

Ainsworth, Hayase & Srinivasa 2022, "Git Re-Basin" (arXiv 2209.04836), section 3.2, weight matching: networks that differ by the
order of their hidden units compute the same, so before two of them are interpolated one may be permuted. The search is coordinate
descent: with all orders but one fixed, the best order of a group of channels is a linear assignment problem, solved exactly.

What may be permuted, and what stands along each axis, is :mod:`dpkit.models.wiring`'s table, which covers every architecture:
group norm's groups and heads of attention stay together and are matched as wholes, with the best order inside each pair.
Permuted networks compute the same in exact arithmetic; floating-point sums run in another order and differ by rounding.
"""
from dpkit.alignment.assignment import assignment
from dpkit.alignment.matching import Masks, descend, objective, weight_matching
from dpkit.alignment.permutations import Permutations, check, draw, identity, inverse, permute, transfer

__all__ = ["Masks", "Permutations", "assignment", "check", "descend", "draw", "identity", "inverse", "objective", "permute",
           "transfer", "weight_matching"]
