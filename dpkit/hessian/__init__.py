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
from dpkit.hessian.density import Curve, Density, spectral_density
from dpkit.hessian.diagonal import Diagonal, diagonal, exact_diagonal, trace_and_diagonal
from dpkit.hessian.estimate import Estimate, LinearOperator
from dpkit.hessian.lanczos import Eigenpairs, top_eigenpairs, top_eigenvalue
from dpkit.hessian.operator import Operator, subset
from dpkit.hessian.spec import HessianSpec
from dpkit.hessian.trace import trace

__all__ = ["Curve", "Density", "Diagonal", "Eigenpairs", "Estimate", "HessianSpec", "LinearOperator", "Operator",
           "diagonal", "exact_diagonal", "spectral_density", "subset", "top_eigenpairs", "top_eigenvalue", "trace",
           "trace_and_diagonal"]
