"""Linear mode connectivity: error and loss on the straight line between two networks, its barrier, and their distance.

Frankle, Dziugaite, Roy & Carbin 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv
1912.05671), section 2: two children of one start are linearly connected when the error does not rise between
them.
"""
from dpkit.barriers import barrier, barrier_linear, excess, is_stable, possible_rise
from dpkit.connectivity.checks import check_masks, check_networks, check_starts
from dpkit.connectivity.distances import Churn, Distances, churn, disagreement, distances, predict
from dpkit.connectivity.line import STATISTICS, PathSpec, all_pairs, path
from dpkit.connectivity.record import Path, along, refine
from dpkit.models import reestimate

__all__ = ["STATISTICS", "Churn", "Distances", "Path", "PathSpec", "all_pairs", "along", "barrier", "barrier_linear",
           "check_masks", "check_networks", "check_starts", "churn", "disagreement", "distances", "excess", "is_stable",
           "path", "possible_rise", "predict", "reestimate", "refine"]
