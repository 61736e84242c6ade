"""Curvature of the loss at a trained network: Hessian products, trace, diagonal, top and density of the spectrum.

What is measured by default: the Hessian of the mean cross-entropy over one fixed, un-augmented,
class-balanced subset of training images (500), in eval mode, with respect to the surviving prunable weights.
Every quantity comes with its standard error and the number of products it took.

The published protocol took the exact diagonal on one augmented mini-batch of 64 images in train mode, pruned
entries included, from one seed. Each of these choices bends the comparison between sparse and dense networks:

- A pruned entry has a row in that matrix although the network cannot move along it. Counting such entries, as
  zeros or not, averages over weights that do not exist: the sparser the network, the flatter it looks. Here
  rows and columns of pruned entries are left out, so two networks may also have different numbers of entries:
  compare means over entries (trace / size) beside sums.
- In train mode batch normalisation rescales with the batch it is given; the loss is then a function of 64
  images together, not the mean loss of the network that is tested.
- A drawn augmentation makes two measurements of one network differ by noise of unknown size, and an operator
  that changes between products has no eigenvalues. The operator refuses data whose loss differs between two
  passes.
- One seed has no error bar. Probe noise is reported here; noise between networks and between seeds is for the
  caller to measure.
"""
from dpkit.hessian import mixed
from dpkit.hessian.block_lanczos import block_eigenpairs
from dpkit.hessian.checks import subset
from dpkit.hessian.deflate import Deflated, deflated_trace_and_diagonal, hutch_plus_plus
from dpkit.hessian.density import Curve, Density, spectral_density
from dpkit.hessian.diagonal import Diagonal, diagonal, diagonal_and_sums, exact_diagonal, trace_and_diagonal
from dpkit.hessian.eigenspaces import Overlap, eigenspace_overlap, space_overlap
from dpkit.hessian.entries import Entries, entries
from dpkit.hessian.estimate import Estimate, LinearOperator
from dpkit.hessian.lanczos import Eigenpairs, top_eigenpairs, top_eigenvalue
from dpkit.hessian.last_layer import last_layer_diagonal
from dpkit.hessian.matrices import MATRICES
from dpkit.hessian.norms import Moments, moments
from dpkit.hessian.objective import NetworkLoss, fixed_loss
from dpkit.hessian.operator import Operator
from dpkit.hessian.sharpness import Sharpness, SharpnessSpec, average_sharpness, edge_ratio, fisher_rao, measure, sharpness
from dpkit.hessian.sparse import Answers, SparseSpec, answers, removal, removed_curvature
from dpkit.hessian.spec import HessianSpec
from dpkit.hessian.stopping import Targeted, to_error
from dpkit.hessian.summaries import EffectiveRank, NegativeMass, effective_dimension, effective_rank, negative_mass
from dpkit.hessian.trace import trace
from dpkit.hessian.xtrace import xtrace

__all__ = ["MATRICES", "Answers", "Curve", "Deflated", "Density", "Diagonal", "EffectiveRank", "Eigenpairs", "Entries",
           "Estimate", "HessianSpec", "LinearOperator", "Moments", "NegativeMass", "NetworkLoss", "Operator", "Overlap",
           "Sharpness", "SharpnessSpec", "SparseSpec", "Targeted", "answers", "average_sharpness", "block_eigenpairs",
           "deflated_trace_and_diagonal", "diagonal", "diagonal_and_sums", "edge_ratio", "effective_dimension", "effective_rank",
           "eigenspace_overlap", "entries", "exact_diagonal", "fisher_rao", "fixed_loss", "hutch_plus_plus",
           "last_layer_diagonal", "measure", "mixed", "moments", "negative_mass", "removal", "removed_curvature", "sharpness",
           "space_overlap", "spectral_density", "subset", "to_error", "top_eigenpairs", "top_eigenvalue", "trace",
           "trace_and_diagonal", "xtrace"]
