"""Layers whose second derivatives are written out, for a product that is traced and compiled.

PyTorch differentiates a derivative by general formulas. Two of them cost more than the layer itself: the weight's part of a
convolution differentiated twice is a convolution with a kernel as large as the image, and group normalisation becomes dozens of
small operations. Here convolution, its gradient to the input and its gradient to the weight are three bilinear maps, each the
derivative of the others, and normalisation has its second derivative in one formula. The results differ by rounding only.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class Convolution(Function):
    """y = x * w; ``how`` is (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, how: tuple) -> Tensor:
        stride, padding, dilation, groups = how
        return aten.convolution(x, w, None, stride, padding, dilation, False, [0, 0], groups)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, w, ctx.how = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, w = ctx.saved_tensors
        return (ToInput.apply(g, w, x, ctx.how) if ctx.needs_input_grad[0] else None,
                ToWeight.apply(g, x, w, ctx.how) if ctx.needs_input_grad[1] else None, None)


class ToInput(Function):
    """The gradient of <g, x * w> to x; bilinear in g and w. ``like`` gives the shape of x only."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, like: Tensor, how: tuple) -> Tensor:
        return _backward(g, like, w, how, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        g, w, _, ctx.how = inputs
        ctx.save_for_backward(g, w)

    @staticmethod
    def backward(ctx, x: Tensor):
        g, w = ctx.saved_tensors
        return (Convolution.apply(x, w, ctx.how) if ctx.needs_input_grad[0] else None,
                ToWeight.apply(g, x, w, ctx.how) if ctx.needs_input_grad[1] else None, None, None)


class ToWeight(Function):
    """The gradient of <g, x * w> to w; bilinear in g and x. ``like`` gives the shape of w only."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, like: Tensor, how: tuple) -> Tensor:
        return _backward(g, x, like, how, [False, True, False])[1]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        g, x, _, ctx.how = inputs
        ctx.save_for_backward(g, x)

    @staticmethod
    def backward(ctx, w: Tensor):
        g, x = ctx.saved_tensors
        return (Convolution.apply(x, w, ctx.how) if ctx.needs_input_grad[0] else None,
                ToInput.apply(g, w, x, ctx.how) if ctx.needs_input_grad[1] else None, None, None)


def _backward(g: Tensor, x: Tensor, w: Tensor, how: tuple, wanted: list[bool]):
    stride, padding, dilation, groups = how
    return aten.convolution_backward(g, x, w, None, stride, padding, dilation, False, [0, 0], groups, wanted)


class Standardise(Function):
    """xhat = (x - mean) / sqrt(variance + eps) over the pixels of each image and channel, and the two statistics."""

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        return (x - mean) * scale, mean, scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(inputs[0], mean, scale)

    @staticmethod
    def backward(ctx, g: Tensor, *_):
        return StandardiseBack.apply(g, *ctx.saved_tensors), None


class StandardiseBack(Function):
    """P g = scale (g - mean(g) - xhat mean(g xhat)), the symmetric derivative of :class:`Standardise` at x, applied to g.

    Its own derivative to x along u, with a = mean(g xhat), b = mean(u xhat) and c = mean(g u) - mean(g) mean(u), is
    scale^2 (xhat (3 a b - c) - b (g - mean(g)) - a (u - mean(u))).
    """

    @staticmethod
    def forward(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        xhat = (x - mean) * scale
        return scale * (g - _mean(g) - xhat * _mean(g * xhat))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, u: Tensor):
        g, x, mean, scale = ctx.saved_tensors
        xhat = (x - mean) * scale
        g_mean, u_mean = _mean(g), _mean(u)
        a, b, c = _mean(g * xhat), _mean(u * xhat), _mean(g * u) - g_mean * u_mean
        squared = scale * scale
        to_g = scale * (u - u_mean - xhat * b)
        to_x = (squared * (3 * a * b - c)) * xhat - (squared * b) * (g - g_mean) - (squared * a) * (u - u_mean)
        return to_g, to_x, None, None


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


class Rules(TorchFunctionMode):
    """While active, the layers of a network in eval mode are computed by the rules of this file where they apply.

    Batch normalisation right behind a convolution becomes part of it: weights w * scale and a bias. Then nothing of the size of
    the activations is multiplied by the scale, in any of the six passes, and its derivatives are taken among the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        # What came out of a convolution, by identity, and how it was made. Tensors are held, so that no other gets their place.
        self._convolved: dict[int, tuple[Tensor, _Made]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = RULES.get(func)
        made = rule(self, *args, **(kwargs or {})) if rule else NotImplemented
        return func(*args, **(kwargs or {})) if made is NotImplemented else made

    def conv2d(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if isinstance(padding, str):
            return NotImplemented
        pair = [[value] * 2 if isinstance(value, int) else list(value) for value in (stride, padding, dilation)]
        if tuple(weight.shape[2:]) == (1, 1) and pair[1] == [0, 0] and pair[0] != [1, 1]:
            # A shortcut reads one pixel in four. Taken out first, they pass through a smaller convolution each time.
            x, pair[0] = x[:, :, ::pair[0][0], ::pair[0][1]], [1, 1]
        how = (*pair, groups)
        y = Convolution.apply(x, weight, how)
        y = y if bias is None else y + bias[:, None, None]
        self._convolved[id(y)] = y, _Made(x, weight, bias, how)
        return y

    def batch_norm(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if x.dim() != 4 or training or weight is None or bias is None:
            return NotImplemented
        scale = weight * torch.rsqrt(running_var + eps)
        shift = bias - running_mean * scale
        if id(x) not in self._convolved:
            return x * scale[:, None, None] + shift[:, None, None]
        made = self._convolved[id(x)][1]
        shift = shift if made.bias is None else shift + made.bias * scale
        return Convolution.apply(made.x, made.weight * scale[:, None, None, None], made.how) + shift[:, None, None]

    def group_norm(self, x, num_groups, weight=None, bias=None, eps=1e-5):
        if x.dim() != 4 or num_groups != x.shape[1] or weight is None or bias is None:
            return NotImplemented
        return Standardise.apply(x, eps)[0] * weight[:, None, None] + bias[:, None, None]

    def avg_pool2d(self, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
        height, width = x.shape[-2:]
        if (kernel_size, stride, padding, divisor_override) != (2, None, 0, None) or height % 2 or width % 2:
            return NotImplemented
        return x.view(*x.shape[:2], height // 2, 2, width // 2, 2).mean((3, 5))


class _Made(NamedTuple):
    """The arguments of a convolution."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    how: tuple


RULES = {torch.conv2d: Rules.conv2d, F.conv2d: Rules.conv2d, F.group_norm: Rules.group_norm, F.batch_norm: Rules.batch_norm,
         F.avg_pool2d: Rules.avg_pool2d}
