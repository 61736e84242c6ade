"""A traced product whose convolutions and matrix products multiply in bfloat16: what depends on the vector, and nothing else.

The point at which the Hessian is taken (weights, activations, which units of a ReLU are on) is computed in float32, once. What is
done for each vector is linear in it and made of convolutions and matrix products, with elementwise operations between. The former
take their operands rounded to bfloat16 and add up in float32, as processors with bfloat16 do; the latter compute in float32, and
what they give is stored in bfloat16 where it is an operand too. So the product is that of a matrix near the Hessian, a relative
0.002 to 0.02 away for the study's networks (:attr:`Operator.rounding` measures it); :mod:`dpkit.hessian.mixed` corrects for the
difference.
"""
from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

aten = torch.ops.aten

OPERANDS = {aten.convolution.default: 2, aten.convolution_backward.default: 3, aten.mm.default: 2, aten.bmm.default: 2,
            aten.addmm.default: 3}
"""Operations that multiply, and how many of their first arguments are tensors to be rounded."""


def lower(traced: fx.GraphModule, depends: set[fx.Node]) -> None:
    """Let the multiplications among ``depends`` take bfloat16 and give float32; the graph is changed in place.

    depends: nodes that depend on the vector. Every node must carry the tensor that it gives in ``meta["val"]``.
    """
    graph, rounded = traced.graph, {}

    def converted(node: fx.Node, dtype: torch.dtype, value: Tensor) -> fx.Node:
        with graph.inserting_after(node):
            copy = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        copy.meta["val"] = value
        return copy

    def low(node: fx.Node) -> fx.Node:
        if node not in rounded:
            rounded[node] = converted(node, torch.bfloat16, node.meta["val"].to(torch.bfloat16))
        return rounded[node]

    for node in list(graph.nodes):
        if node not in depends or node.target not in OPERANDS:
            continue
        count = OPERANDS[node.target]
        node.args = (*(low(argument) for argument in node.args[:count]), *node.args[count:])
        # a gradient of a convolution gives several tensors, of which some are not asked for
        several = not isinstance(node.meta["val"], Tensor)
        for result in list(node.users) if several else [node]:
            value = result.meta["val"]
            if not isinstance(value, Tensor):
                continue
            users = list(result.users)
            result.meta["val"] = value.to(torch.bfloat16)
            wide = converted(result, value.dtype, value)
            for user in users:
                user.replace_input_with(result, wide)
        if several:
            node.meta["val"] = tuple(v.to(torch.bfloat16) if isinstance(v, Tensor) else v for v in node.meta["val"])
    # What is stored in bfloat16 for the convolutions is not stored a second time for the rest.
    for node, copy in list(rounded.items()):
        others = [user for user in node.users if user is not copy]
        if node in depends and node.op != "placeholder" and others:
            wide = converted(copy, node.meta["val"].dtype, node.meta["val"])
            for user in others:
                user.replace_input_with(node, wide)
    # A number keeps its sign when it is rounded, so a ReLU's decisions can be read from what is kept for the convolutions.
    for node in graph.nodes:
        if node.target == aten.le.Scalar and node.args[1] == 0 and node.args[0] in rounded and node not in depends:
            node.replace_input_with(node.args[0], rounded[node.args[0]])
    graph.lint()
    traced.recompile()
