"""The matrices that an operator multiplies by: what each is, and its product on one chunk of images.

L is the mean of l(z_n, y_n) over N images, l cross-entropy, z_n the logits (K,), J_n = dz_n/dw (K, n), p_n = softmax(z_n), and
s_n the sum of the label's entries (1 for a class and for probabilities).

- ``hessian``: d2L/dw2 = (1/N) sum_n J_n' A_n J_n + (1/N) sum_n sum_k (dl/dz_nk) d2z_nk/dw2, with A_n as below. May have
  negative eigenvalues.
- ``gauss_newton``: the first sum alone, A_n = s_n (diag(p_n) - p_n p_n') the Hessian of l in the logits (Schraudolph 2002, Fast
  curvature matrix-vector products for second-order gradient descent). Positive semi-definite. For a softmax with
  cross-entropy and labels that sum to 1 it IS the (true) Fisher information matrix, E over images and over labels drawn from
  p_n of g g' with g the gradient of that image's loss (Martens 2020, arXiv 1412.1193, section 9.2): it does not depend on the
  labels given, and there is no separate matrix of that name here.
- ``empirical_fisher``: (1/N) sum_n g_n g_n' with g_n the gradient of the loss of image n with the label GIVEN, not centred; as
  g_n = J_n' r_n with r_n = s_n p_n - y_n, it is the same sum with A_n = r_n r_n'. Positive semi-definite, of rank at most N. Not
  the Fisher matrix: it shrinks to 0 where every image is fitted, whatever the curvature (Kunstner et al. 2019, arXiv
  1905.12558).

In train mode with batch statistics z_n depends on the other images too; the formulas hold with J_n = dz_n/dw of that function.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MATRICES = ("hessian", "gauss_newton", "empirical_fisher")

Multiply = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A vector, as tensors shaped like the weights, to the chunk's share of its product in the same form."""


def inner(matrix: str, logits: Tensor, labels: Tensor, tangent: Tensor) -> Tensor:
    """A_n t_n for each image, (B, K), with A_n of the module's text; a label of all zeros or below 0 counts for nothing.

    logits  (B, K)
    labels  (B,) class numbers or (B, K)
    tangent (B, K), usually J_n v
    """
    if not labels.is_floating_point():
        labels = (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
    total, chances = labels.sum(1, keepdim=True), logits.softmax(1)
    if matrix == "gauss_newton":
        return total * chances * (tangent - (chances * tangent).sum(1, keepdim=True))
    rest = total * chances - labels
    return rest * (rest * tangent).sum(1, keepdim=True)


def multiplier(matrix: str, logits: Tensor, labels: Tensor, weights: Sequence[Tensor], images: int) -> Multiply:
    """The product on a chunk whose ``logits`` carry a graph, as its share of a mean over ``images``; keeps its graphs alive.

    The Hessian differentiates the inner product of the gradient with the vector (Pearlmutter 1994, Fast exact multiplication by
    the Hessian). For the other two, J v is the derivative of J'u to u, which is linear in u, and J' A J v one more backward
    pass: in reverse throughout, because group normalisation has no forward-mode derivative of its backward pass, and without a
    new forward pass for each vector.
    """
    def derivative(of, to, along, **options):
        return torch.autograd.grad(of, to, along, materialize_grads=True, **options)

    if matrix == "hessian":
        gradient = derivative(F.cross_entropy(logits, labels, reduction="sum") / images, weights, None, create_graph=True)
        return lambda vector: derivative(gradient, weights, vector, retain_graph=True)
    dual = torch.zeros_like(logits, requires_grad=True)
    transposed = derivative(logits, weights, dual, create_graph=True)

    def multiply(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        tangent, = derivative(transposed, (dual,), vector, retain_graph=True)
        return derivative(logits, weights, inner(matrix, logits.detach(), labels, tangent) / images, retain_graph=True)

    return multiply
