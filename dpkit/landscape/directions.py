"""Directions in weight space whose length means the same in every network: filter-normalised (Li et al. 2018).

Li, Xu, Taylor, Studer & Goldstein 2018, "Visualizing the Loss Landscape of Neural Nets" (arXiv 1712.09913), section 4: a
network with ReLU and norms computes the same when a filter is scaled and the next layer is scaled back, but a step of fixed
length changes it more or less. So each filter d_ij of a random Gaussian direction is given the norm of the network's filter,
d_ij <- d_ij / |d_ij| |theta_ij| (Frobenius). A filter is what makes one output channel of a convolution, or one neuron of a
linear layer. Published code: github.com/tomgoldstein/loss-landscape.
"""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit import models
from dpkit.landscape.checks import check_direction, check_mask, check_model
from dpkit.landscape.spec import OTHERS, AroundSpec, ProfileSpec
from dpkit.models import ModelSpec
from dpkit.tree import Mask, Params


def filter_normalised(model: ModelSpec, params: Params, direction: Params, *, mask: Mask | None = None,
                      others: str = "zero") -> Params:
    """``direction`` with the norm of the network's filter in each of its filters; float64, on the device of ``params``.

    direction: tensors named and shaped like those of ``params``; what it does not name is 0.
    mask: of the network. Pruned entries are 0 in the result, and both norms are over surviving entries. A filter without
        survivors, or without an entry in the direction, is 0.
    others: biases, norms and a ViT's positions. ``zero`` leaves them where they are, the default of the published code (its
        ``biasbn``); ``tensor`` gives each of these tensors its own norm in the network as one filter. Where they are not left
        out, the published code moves them along themselves instead, the same way in all directions.
    Raises ``ValueError`` with one line when the parameters are not of ``model`` or not finite, when the direction does not fit
    them, or when the network has weights that the mask removes.
    """
    if others not in OTHERS:
        raise ValueError(f"others must be one of {', '.join(OTHERS)}; got {others!r}")
    check_model(model, params, "the network")
    models.check_same({"at the centre": params})
    check_direction(params, direction, "the direction")
    check_mask(mask, {"the network": params})
    filtered = set(models.prunable(model))
    found = {}
    for name, weight in params.items():
        step = direction.get(name)
        if step is None or (name not in filtered and others == "zero"):
            found[name] = torch.zeros_like(weight, dtype=torch.float64)
            continue
        step = step.to(weight.device).double()
        if mask is not None and name in mask:
            step = torch.where(mask[name].to(weight.device), step, 0.0)
        rows = len(weight) if name in filtered else 1
        norm, own = (t.reshape(rows, -1).norm(dim=1) for t in (weight.double(), step))
        scale = torch.where(own > 0, norm / own, 0.0)
        found[name] = (step.reshape(rows, -1) * scale[:, None]).reshape(weight.shape)
    return found


def random_directions(spec: AroundSpec | ProfileSpec, model: ModelSpec, params: Params, generator: torch.Generator, *,
                      mask: Mask | None = None) -> list[Params]:
    """``spec.directions`` random filter-normalised directions: Gaussian, then :func:`filter_normalised`.

    generator: on the CPU. All entries of all tensors are drawn, so that networks of one architecture see the same draws
    whatever their masks and ``spec.others``, and more directions begin with the same ones.
    """
    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    return [filter_normalised(model, params, {name: drawn(t) for name, t in params.items()}, mask=mask, others=spec.others)
            for _ in range(spec.directions)]
