"""Gradients to weights as matrix products, in the part of a compiled product that runs for every vector.

A convolution's gradient to its weight is a sum over images and pixels of products of what came in with what came back. In a
Hessian product one of the two depends on the vector and the other does not. The constant one is laid out once as a matrix with a
row for each of its channels and each position of the kernel, a column for each image and pixel (im2col), and is kept; then each
vector costs one matrix product. In bfloat16 that comes near the rate of the other passes, where oneDNN's gradients to weights
reach half to two thirds of it. It needs as many times the memory as the kernel has positions, and pays from 64 channels on:
measurements are in the book's page on speed.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

CHANNELS = 64
"""Channels that come out of a product from which it beats the direct convolution: with 32 it came out level, and larger."""


def rewritten(traced: fx.GraphModule, depends: set[fx.Node]) -> fx.Interpreter:
    """The graph as a callable that computes gradients to weights by matrix products, where they gain by it; to be traced again.

    depends: nodes that depend on the vector. Every node must carry the tensor that it gives in ``meta["val"]``.
    """
    return _Rewritten(traced, {node: form for node in traced.graph.nodes if node in depends and (form := _form(node, depends))})


class _Rewritten(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule, forms: dict[fx.Node, str]) -> None:
        super().__init__(traced)
        self._forms = forms

    def run_node(self, node: fx.Node):
        form = self._forms.get(node)
        if form is None:
            return super().run_node(node)
        (g, x, weight, *rest), _ = self.fetch_args_kwargs_from_env(node)
        _, stride, padding = rest[:3]
        kernel = list(weight.shape[2:])
        return None, (from_inputs if form == "inputs" else from_gradients)(g, x, kernel, stride, padding), None


def _form(node: fx.Node, depends: set[fx.Node]) -> str | None:
    """Which factor is laid out: "inputs" or "gradients"; None where the convolution stays as it is."""
    if node.target != aten.convolution_backward.default:
        return None
    g, x, weight, _, stride, _, dilation, transposed, _, groups, wanted = node.args
    (outs, ins, *kernel), low = weight.meta["val"].shape, x.meta["val"].dtype == torch.bfloat16
    plain = not transposed and groups == 1 and list(dilation) == [1, 1] and list(wanted) == [False, True, False]
    if not (plain and low) or kernel == [1, 1] or outs < CHANNELS:
        return None
    # The gradients' matrix has a column for each channel that comes in, and with a stride there are few pixels.
    wide = ins >= CHANNELS or list(stride) != [1, 1]
    return "inputs" if x not in depends else "gradients" if g not in depends and wide else None


def from_inputs(g: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """The gradient of <g, x * w> to w (K, C, *kernel) for g (N, K, H', W') and x (N, C, H, W), which is laid out."""
    made = _matrix(F.unfold(x, kernel, padding=padding, stride=stride)) @ _pixels(g)
    return made.view(x.shape[1], *kernel, g.shape[1]).permute(3, 0, 1, 2)


def from_gradients(g: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """As :func:`from_inputs`, with g laid out.

    With a stride s the pixels of x fall into s x s phases, of which each position of the kernel meets one.
    """
    found: list[Tensor | None] = [None] * (kernel[0] * kernel[1])
    rows, columns = (_phases(*axis) for axis in zip(kernel, stride, padding, x.shape[2:], g.shape[2:], strict=True))
    for row in rows:
        for column in columns:
            part = F.pad(g, (*column.padding, *row.padding))
            patches = F.unfold(part, (len(row.positions), len(column.positions)))
            made = _matrix(patches) @ _pixels(x[:, :, row.start::stride[0], column.start::stride[1]])
            made = made.view(g.shape[1], -1, x.shape[1])
            met = [i * kernel[1] + j for i in row.positions for j in column.positions]
            for index, position in enumerate(met):
                found[position] = made[:, index]
    return torch.stack(found, 1).view(g.shape[1], *kernel, x.shape[1]).permute(0, 3, 1, 2)


class _Phase(NamedTuple):
    """Every stride-th pixel of one axis, from ``start`` on; the kernel's positions that meet them, the last one first; and how
    far the axis of the gradient reaches beyond its own pixels, before and after, so that a window over it meets them in turn."""

    start: int
    positions: list[int]
    padding: tuple[int, int]


def _phases(kernel: int, stride: int, padding: int, pixels: int, gradients: int) -> list[_Phase]:
    # What came in at stride * q + start met position d on its way to q - (d - padding - start) / stride.
    phases = []
    for start in range(min(stride, pixels)):
        positions = [d for d in reversed(range(kernel)) if (d - padding - start) % stride == 0]
        if positions:
            before = (positions[0] - padding - start) // stride
            count = len(range(start, pixels, stride))
            phases.append(_Phase(start, positions, (before, count + len(positions) - 1 - before - gradients)))
    return phases


def _matrix(patches: Tensor) -> Tensor:
    """(N, rows, pixels) as (rows, N pixels)."""
    # The list of one makes it an operation of its own, which is no mere move and therefore not repeated for every vector.
    return torch.cat([patches.permute(1, 0, 2).flatten(1)])


def _pixels(image: Tensor) -> Tensor:
    """(N, C, H, W) as (N H W, C), which copies nothing where channels are last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])
