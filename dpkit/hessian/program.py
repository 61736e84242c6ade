"""A Hessian product as two compiled programs: what does not depend on the vector, and what does.

The product is traced as one graph, the transposed Jacobian of the gradient applied to the vector (for the other matrices of
:mod:`dpkit.hessian.matrices`: the logits' Jacobian and its transpose), and cut in two. The part that
does not need the vector (``prepare``: forward pass and gradient) runs once a chunk of images, and tensors on the cut are kept.
The part that does (``apply``) runs for each vector. The cut is the one with the fewest bytes, where elementwise operations and
views may be repeated behind it and nothing else: a minimum cut of the graph, as in Chen et al. 2016 (Training deep nets with
sublinear memory cost) and in PyTorch's own partitioning of a training graph. Reading fewer bytes for each vector also makes the
product faster.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from dpkit import models
from dpkit.hessian.bf16 import lower
from dpkit.hessian.matrices import inner
from dpkit.hessian.rules import Rules
from dpkit.hessian.weight_gradients import rewritten
from dpkit.models import ModelSpec
from dpkit.tree import Buffers, Params

aten = torch.ops.aten
# Besides elementwise operations and views: what may be repeated behind the cut because it computes nothing.
MOVES = (aten.clone.default, aten._unsafe_view.default, aten._to_copy.default, aten.full.default, aten.full_like.default,
         aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default, aten.scalar_tensor.default)


class Program(NamedTuple):
    """The two parts for one shape of chunk; tensors come one by one, those of a dictionary in its order.

    prepare  (weights, fixed, buffers, images, labels) -> tensors on the cut
    apply    (tensors on the cut, vector) -> product, a tensor for each weight, for the SUM of the losses over the chunk
    saved    bytes that the cut holds for each image
    """

    prepare: Callable[..., list[Tensor]]
    apply: Callable[..., list[Tensor]]
    saved: float


def arranged(tensor: Tensor) -> Tensor:
    """Channels last, where there are channels: the order in which convolutions run fastest once compiled."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


def program(model: ModelSpec, weights: Params, fixed: Params, buffers: Buffers, images: Tensor, labels: Tensor,
            compiled: bool = True, matrix: str = "hessian", train: bool = False, precision: str = "fp32",
            laid_out: bool = False) -> Program:
    """The program for tensors shaped like these; made once in a process for each model, names, shapes and dtype.

    Nothing but shapes enters: another network of the same model uses the same program. ``compiled`` False leaves the two
    graphs to be interpreted, for tests. precision: "bf16" lets ``apply`` multiply in it (:mod:`dpkit.hessian.bf16`), and with
    ``laid_out`` gradients to weights are matrix products there, for more bytes on the cut
    (:mod:`dpkit.hessian.weight_gradients`).
    """
    key = (model, tuple(weights), images.dtype, images.device, tuple(images.shape), labels.dtype, compiled, matrix, train,
           precision, laid_out)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = _build(model, weights, fixed, buffers, images, labels, compiled, matrix, train, precision,
                                laid_out)
    return _PROGRAMS[key]


_PROGRAMS: dict[tuple, Program] = {}


def _build(model, weights, fixed, buffers, images, labels, compiled, matrix, train, precision, laid_out) -> Program:
    def outputs(weights, fixed, buffers, images):
        return models.forward(model, {**fixed, **weights}, buffers, images, train)[0]

    def loss(weights, fixed, buffers, images, labels):
        return F.cross_entropy(outputs(weights, fixed, buffers, images), labels, reduction="sum")

    def second_derivative(vectors, weights, *given):
        _, transposed = torch.func.vjp(lambda weights: torch.func.grad(loss)(weights, *given), weights)
        return list(transposed(vectors)[0].values())

    def outer(vectors, weights, fixed, buffers, images, labels):
        logits, transposed = torch.func.vjp(lambda weights: outputs(weights, fixed, buffers, images), weights)
        # J v as the derivative of J'u to u, as in the uncompiled product
        _, forwards = torch.func.vjp(lambda dual: transposed(dual)[0], torch.zeros_like(logits))
        return list(transposed(inner(matrix, logits, labels, forwards(vectors)[0]))[0].values())

    product = second_derivative if matrix == "hessian" else outer

    like = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    given = (like, weights, fixed, buffers, images, labels)
    # On tensors without storage: tracing computes nothing and takes no memory.
    trace = functools.partial(make_fx, tracing_mode="fake")
    with Rules():
        traced = trace(product)(*given)
    # A second time, without operations in place, which a cut may not separate, and with the elementary ones spelt out.
    traced = trace(torch.func.functionalize(traced), decomposition_table=_decompositions())(*given)
    traced = _tidied(traced)
    if precision == "bf16":
        lower(traced, _downstream(traced.graph, _inputs(traced)[:len(weights)]))
        if laid_out:
            found = rewritten(traced, _downstream(traced.graph, _inputs(traced)[:len(weights)]))
            traced = _tidied(trace(found.run)(*tree_leaves(given)))
    graph, inputs = traced.graph, _inputs(traced)
    vectors, others = inputs[:len(weights)], inputs[len(weights):]
    output = next(node for node in graph.nodes if node.op == "output")
    depends = _downstream(graph, vectors)
    cut = _cut(graph, depends)
    prepare, apply = _part(traced, others, cut), _part(traced, [*cut, *vectors], output.all_input_nodes)
    kept = [node for node in cut if node.op != "placeholder"]
    saved = sum(_bytes(node) for node in kept) / len(images)
    if compiled:
        # Called through C++ on a CPU, a program lets go of Python's lock, so that threads run side by side.
        options = {"cpp_wrapper": images.device.type == "cpu"}
        prepare, apply = (torch.compile(part, dynamic=False, options=options) for part in (prepare, apply))
    return Program(prepare, apply, saved)


@functools.cache
def _decompositions() -> dict:
    """Loss and linear layers in elementary operations, so that the cut sees which of them are elementwise."""
    from torch._decomp import core_aten_decompositions

    table = dict(core_aten_decompositions())
    return {op: rule for op, rule in table.items() if "convolution" not in str(op) and "pool" not in str(op)}


def _tidied(traced: fx.GraphModule) -> fx.GraphModule:
    """Without what nobody asks for and what is computed twice: otherwise a cut keeps a ReLU's decisions once for each pass."""
    traced.graph.eliminate_dead_code()
    return fx.GraphModule(traced, fx_graph_cse(traced.graph))


def _inputs(traced: fx.GraphModule) -> list[fx.Node]:
    return [node for node in traced.graph.nodes if node.op == "placeholder"]


def _downstream(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in graph.nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _weight(node: fx.Node) -> int:
    """What keeping a tensor costs: its bytes. A mask is read so slowly by compiled code (products took 1.4 times as long) that it
    counts as much as the float32 it was made of."""
    return _bytes(node) * (4 if node.meta["val"].dtype == torch.bool else 1)


def _repeatable(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.is_view or target in MOVES


def _cut(graph: fx.Graph, depends: set[fx.Node]) -> list[fx.Node]:
    """The nodes to keep: fewest bytes from which the rest follows by repeatable operations (a minimum cut)."""
    import networkx  # comes with torch

    net = networkx.DiGraph()
    for node in graph.nodes:
        if node in depends or node.op == "output":
            continue
        tensor = isinstance(node.meta.get("val"), Tensor)
        # One more byte each, so that of two cuts of equal size the one with fewer tensors is taken.
        size = 0 if node.op == "placeholder" else _weight(node) + 1 if tensor else math.inf
        net.add_edge((node, "in"), (node, "out"), capacity=size)
        if not _repeatable(node) and tensor:
            net.add_edge("given", (node, "in"))
        for source in node.all_input_nodes:
            net.add_edge((source, "out"), (node, "in"))
        if any(user in depends for user in node.users):
            net.add_edge((node, "out"), "wanted")
    _, (above, _) = networkx.minimum_cut(net, "given", "wanted")
    return [node for node in graph.nodes if (node, "in") in above and (node, "out") not in above]


def _part(traced: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """The piece of a graph that computes ``outputs`` from ``inputs``."""
    needed, stack = set(), list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [] if node in inputs else node.all_input_nodes
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in traced.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in outputs])
    return fx.GraphModule(traced, part)
