"""The exact diagonal at the last layer, without a product."""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit import models
from dpkit.hessian.checks import check_labels, check_mask
from dpkit.hessian.diagonal import Diagonal
from dpkit.models import ModelSpec
from dpkit.tree import Buffers, Mask, Params


@torch.no_grad()
def last_layer_diagonal(model: ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
                        mask: Mask | None = None, *, chunk: int = 100, bias: bool = False,
                        dtype: torch.dtype = torch.float64) -> Diagonal:
    """d2L/dw2 of every weight of the last linear layer, L the mean cross-entropy over the images, in eval mode.

    Logits z = W x + b are linear in W, so that the second derivative is that of the softmax alone,

        d2L / dW_cj^2 = 1/N sum_n s_n p_nc (1 - p_nc) x_nj^2,    with 1 in place of x_nj for b_c,

    p the probabilities that the network gives, x what its last layer reads, s the sum of an image's label probabilities (1 for
    a class number). It does not depend on which class is right, and equals the diagonal of the generalised Gauss-Newton matrix.
    One forward pass, exact for any size: it serves as it is, and as a check of sampled diagonals.

    model, params, buffers  the network; images (N, C, H, W) normalised; labels (N,) class numbers or (N, K) probabilities
    mask   True where an entry survives: pruned ones of the layer are left out; None: all entries
    chunk  images passed at once, at least 1
    bias   append the layer's biases
    dtype  of the computation

    Values (m,): W's surviving entries row by row, then b, in the order of an :class:`Operator` with
    ``names=(W,)`` or ``(W, b)``. Raises ``ValueError`` for no images, labels that do not fit, masks that do not fit,
    pruned entries that are not 0, nothing left of the layer, or values that are not finite.
    """
    check_labels(images, labels, model.classes)
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    name = models.classifier_name(model)
    weight = params[f"{name}.weight"]
    keep = check_mask(mask or {}, params).get(f"{name}.weight", torch.ones(weight.shape, dtype=torch.bool))
    if not keep.any():
        raise ValueError(f"mask of {name}.weight must keep at least one weight, got none kept")
    params, buffers = ({n: t.detach().to(dtype) for n, t in group.items()} for group in (params, buffers))
    total = torch.zeros(weight.shape[0], weight.shape[1] + 1, dtype=torch.float64, device=weight.device)
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        inputs = models.features(model, params, buffers, images[part].to(weight.device, dtype))
        chances = torch.nn.functional.linear(inputs, params[f"{name}.weight"], params[f"{name}.bias"]).double().softmax(1)
        spread = chances * (1 - chances)
        if labels.is_floating_point():
            spread = spread * labels[part].to(spread).sum(1, keepdim=True)
        squares = torch.cat([inputs.double().square(), torch.ones_like(inputs[:, :1], dtype=torch.float64)], dim=1)
        total += spread.T @ squares
    if not torch.isfinite(total).all():
        raise ValueError("second derivatives of the last layer must be finite, got NaN or infinity; the network has diverged "
                         "or the images are not finite")
    total = total.cpu() / len(images)
    values = total[:, :-1][keep.cpu()]
    if bias:
        values = torch.cat([values, total[:, -1]])
    return Diagonal(values, torch.zeros_like(values), 0)
