"""What the four kernels compute and move, counted from the architecture.

Every convolution or linear layer y = W x appears in a kernel as a number of *passes*: the forward pass, the gradient with
respect to its input, the gradient with respect to its weight, and the derivatives of these. Each of them is a convolution
of the same size, 2 x multiply-adds operations, and reads one activation and writes the other. So a kernel's work is the sum
over layers of (passes x the layer's forward work), and three numbers describe it: the passes of the first layer, whose
input is data, of the classifier, and of the layers between.

Training step (gradient with respect to all weights)
    forward 1, gradient of the input 1, gradient of the weight 1. The first layer needs no gradient of its input. 2, 3, 3.
Path evaluation
    forward only. 1, 1, 1.
Hessian product (double backward on the weights)
    Write g for the gradient with respect to y. The gradient pass computes the input's gradient W'g and the weight's gradient
    of (x, g). Differentiating their inner product with a vector v in reverse needs, for each layer: from the weight's
    gradient, v'g for x and v x for g; from the input's gradient, a weight gradient of (its derivative, g) for W and a forward
    pass for g; from the forward pass, a weight gradient for W and an input gradient for x. Six passes; the first layer,
    without a gradient of its input, needs two (v x, and the weight gradient of the forward pass). With the gradient's graph
    kept a product is 2, 6, 6; without, forward and gradient come on top: 4, 9, 9.
Matching step (IDC: distance of gradients, differentiated with respect to the synthetic images)
    Real images: forward and gradient of the convolution weights, 2, 3 and for the classifier 2, whose weight is not matched.
    Synthetic images: the same, then double backward on the images: v'g for x, v x for g, a forward pass for g, an input
    gradient for x, and nothing for W. That is 4 passes; 3 for the first layer, which has no gradient of its input; 2 for the
    classifier, which has no gradient of its weight. Together 5, 7, 4.

These are the passes that the result needs. Autograd in eager mode does more: it differentiates each convolution's gradient
with respect to all of its inputs, so a product also computes v'g for the images, and a matching step a weight gradient for
every layer between; and it computes the second weight gradient of a strided layer on a border that it cuts off again. A test
accounts for the difference to the last operation.
"""
from __future__ import annotations

from dataclasses import dataclass

from dpkit.models import ModelSpec, Work, classifier_name, layer_work


@dataclass(frozen=True)
class Passes:
    """How often the work of the first layer, of the layers between and of the classifier is done."""

    first: int
    middle: int
    last: int


FORWARD = Passes(1, 1, 1)
TRAINING = Passes(2, 3, 3)
PRODUCT_KEPT = Passes(2, 6, 6)
PRODUCT = Passes(4, 9, 9)
MATCHING_REAL = Passes(2, 3, 2)
MATCHING_SYNTHETIC = Passes(5, 7, 4)


def work(passes: Passes, model: ModelSpec, images: float = 1.0, itemsize: int = 4) -> Work:
    """Work of ``images`` images under ``passes``, activations of ``itemsize`` bytes; see :func:`dpkit.models.forward_work`."""
    flops, numbers = 0.0, 0.0
    for index, layer in enumerate(layer_work(model)):
        times = passes.first if index == 0 else passes.last if layer.name == classifier_name(model) else passes.middle
        flops += times * layer.flops
        numbers += times * (layer.inputs + layer.outputs)
    return Work(images * flops, images * numbers * itemsize)


def add(*parts: Work) -> Work:
    """The sum."""
    return Work(sum(p.flops for p in parts), sum(p.bytes for p in parts))


def matching(model: ModelSpec, real: int, synthetic: int, classes: int, itemsize: int = 4) -> Work:
    """One matching step of ``classes`` classes, with ``real`` and ``synthetic`` images each."""
    return add(work(MATCHING_REAL, model, real * classes, itemsize),
               work(MATCHING_SYNTHETIC, model, synthetic * classes, itemsize))
