"""Linear mode connectivity: error and loss on the straight line between two networks, its barrier, and their distance.

Frankle, Dziugaite, Roy & Carbin 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv
1912.05671), section 2: two children of one start are linearly connected when the error does not rise between
them.
"""
from dpkit.barriers import NotFinite, barrier, barrier_linear, barrier_over, excess, is_stable, possible_rise
from dpkit.connectivity.checks import check_masks, check_networks, check_starts
from dpkit.connectivity.distances import Churn, Distances, churn, disagreement, distances, predict
from dpkit.connectivity.layers import LayerPaths, layer_paths, layer_tensors
from dpkit.connectivity.line import all_pairs, path
from dpkit.connectivity.record import Path, along, refine
from dpkit.connectivity.spec import STATISTICS, PathSpec, evenly
from dpkit.models import reestimate

__all__ = ["STATISTICS", "Churn", "Distances", "LayerPaths", "NotFinite", "Path", "PathSpec", "all_pairs", "along", "barrier",
           "barrier_linear", "barrier_over", "check_masks", "check_networks", "check_starts", "churn", "disagreement",
           "distances", "evenly", "excess", "is_stable", "layer_paths", "layer_tensors", "path", "possible_rise", "predict",
           "reestimate", "refine"]
