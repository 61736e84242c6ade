"""Weights rounded to few bits, kept as floating-point numbers: what quantisation after training does to a network.

Symmetric uniform quantisation as in Krishnamoorthi 2018 (arXiv 1806.08342, sections 2.2 and 3.1) and Nagel et al. 2021 (arXiv
2106.08295, section 2.2): zero is exactly representable, so removed weights stay removed.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dpkit.tree import Params

LEAST_BITS, MOST_BITS = 2, 16


def fake_quantise(params: Params, names: Iterable[str], bits: int, per_channel: bool = True) -> Params:
    """The parameters with the tensors ``names`` rounded to ``bits`` bits; all others are passed on as they are.

    w -> s * round(w / s) with s = max |w| / (2^(bits - 1) - 1), ties to the even level: 2^bits - 1 levels from -max |w| to
    max |w|, zero among them. bits: 2 (three levels) to 16. per_channel: one s for each output channel (the first axis), else one
    for each tensor. Nothing that is passed in changes, and a channel of zeros stays zero.

    Raises ``ValueError`` on other bits, on a name that is not there, on a tensor that is not finite, and on a vector under
    ``per_channel``, which each of its entries would represent exactly.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"bits must be a whole number in [{LEAST_BITS}, {MOST_BITS}], got {bits!r}")
    result = dict(params)
    for name in names:
        if name not in params:
            raise ValueError(f"names must be parameters of the network, got {name!r}; it has {', '.join(params)}")
        if per_channel and params[name].dim() < 2:
            raise ValueError(f"per_channel needs an axis of output channels and several weights in each, got {name} of shape "
                             f"{tuple(params[name].shape)}; leave it out or quantise by tensor")
        if not bool(torch.isfinite(params[name]).all()):
            raise ValueError(f"weights must be finite to be quantised, {name} is not; leave the network out")
        result[name] = _rounded(params[name], bits, per_channel)
    return result


def _rounded(weight: Tensor, bits: int, per_channel: bool) -> Tensor:
    most = 2 ** (bits - 1) - 1
    largest = weight.detach().abs()
    if per_channel:
        largest = largest.amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    else:
        largest = largest.amax()
    step = largest / most
    # a subnormal maximum may have a step of zero: such a channel is kept, and so is one of zeros
    levels = torch.round(weight / torch.where(step > 0, step, torch.ones_like(step))).clamp(-most, most)
    return torch.where(step > 0, levels * step + 0.0, weight)  # + 0.0: a small negative weight becomes 0, not -0
