"""Gradients to weights as matrix products, and the rounded program that multiplies by them."""
import functools

import pytest
import torch
import torch.nn.functional as F
from test_hessian import problem as hessian_problem
from test_hessian_product import MODELS, RESNET

from dpkit import tree
from dpkit.hessian import product, program, weight_gradients
from dpkit.hessian.rules import Rules
from dpkit.models import ModelSpec

problem = functools.partial(hessian_problem, count=10)


@pytest.mark.parametrize("kernel, stride, padding, size", [
    (3, 1, 1, (8, 9)), (3, 2, 1, (8, 8)), (3, 2, 1, (9, 6)), (5, 1, 2, (7, 5)), (5, 2, 2, (9, 9)), (5, 3, 1, (9, 10)),
    (3, 2, 0, (9, 8)), (2, 3, 0, (8, 8)), (7, 2, 3, (12, 10)), (3, 1, 0, (6, 6))])
def test_both_layouts_give_the_gradient_of_autograd(kernel, stride, padding, size):
    generator = tree.generator_for("gradients", kernel, stride)
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4, kernel, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(y, weight, g)[0]
    for layout in (weight_gradients.from_inputs, weight_gradients.from_gradients):
        found = layout(g, x, [kernel] * 2, [stride] * 2, [padding] * 2)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def single(spec: ModelSpec, sparsity=0.0):
    """Weights, fixed ones, statistics, images and labels of a network in float32."""
    params, buffers, images, labels, _ = problem(spec, sparsity)
    return tree.to(params, dtype=torch.float32), {}, tree.to(buffers, dtype=torch.float32), images.float(), labels


@pytest.mark.parametrize("name", MODELS)
def test_a_rounded_product_by_matrices_is_as_near_as_one_by_convolutions(monkeypatch, name):
    monkeypatch.setattr(weight_gradients, "CHANNELS", 1)
    monkeypatch.setattr(program, "_PROGRAMS", {})
    given = single(MODELS[name], 0.4)
    vector = {n: torch.randn(t.shape, generator=tree.generator_for(n)) for n, t in given[0].items()}

    def flat(**options) -> torch.Tensor:
        made = product.CompiledProduct(MODELS[name], *given, 4, compiled=False, **options)
        return torch.cat([t.flatten() for t in made([vector])[0].values()])

    exact = flat()
    errors = [float((flat(precision="bf16", laid_out=way) - exact).norm() / exact.norm()) for way in (False, True)]
    print(name, errors)
    assert errors[1] <= 1.5 * errors[0]


def parts(precision: str, laid_out: bool) -> tuple[program.Program, list[str], list[str]]:
    """A program, and the operations of its two parts."""
    weights, fixed, buffers, images, labels = single(RESNET)
    made = program.program(RESNET, weights, fixed, buffers, images, labels, False, precision=precision, laid_out=laid_out)
    return made, *([str(node.target) for node in part.graph.nodes] for part in (made.prepare, made.apply))


def test_what_is_laid_out_is_laid_out_once(monkeypatch):
    monkeypatch.setattr(weight_gradients, "CHANNELS", 1)
    monkeypatch.setattr(program, "_PROGRAMS", {})
    plain, _, before = parts("bf16", False)
    made, prepare, apply = parts("bf16", True)
    assert "aten.im2col.default" in prepare
    assert "aten.im2col.default" not in apply
    # 12 convolutions, of which three shortcuts of one pixel: two gradients each, but one for the images' own layer.
    assert before.count("aten.convolution_backward.default") - apply.count("aten.convolution_backward.default") == 2 * 9 - 1
    assert apply.count("aten.mm.default") > before.count("aten.mm.default")
    assert plain.saved < made.saved < 20 * plain.saved


def test_nothing_is_laid_out_in_full_precision(monkeypatch):
    monkeypatch.setattr(weight_gradients, "CHANNELS", 1)
    monkeypatch.setattr(program, "_PROGRAMS", {})
    assert parts("fp32", True)[1:] == parts("fp32", False)[1:]


def test_memory_decides(monkeypatch):
    """What does not fit is not laid out, and is kept as it is if that fits."""
    monkeypatch.setattr(weight_gradients, "CHANNELS", 1)
    monkeypatch.setattr(program, "_PROGRAMS", {})
    made = functools.partial(product.CompiledProduct, RESNET, *single(RESNET), 5, compiled=False, precision="bf16")
    wide = made()
    assert (wide.laid_out, wide.kept) == (True, True)
    narrow = made(memory=wide.saved * 10 - 1)
    assert (narrow.laid_out, narrow.kept) == (False, True)
    assert narrow.saved < wide.saved
    none = made(memory=narrow.saved * 10 - 1)
    assert (none.laid_out, none.kept) == (False, False)


def test_a_relus_decisions_are_read_from_what_the_convolutions_keep(monkeypatch):
    """No mask is kept but the last one's, whose activations no convolution reads; and each tensor of activations once."""
    monkeypatch.setattr(program, "_PROGRAMS", {})
    made, _, apply = parts("bf16", False)
    output = next(node for node in made.prepare.graph.nodes if node.op == "output")
    kept = [node.meta["val"] for node in output.args[0] if "val" in node.meta and node.meta["val"].dim() == 4]
    assert sum(t.dtype == torch.bool for t in kept) <= 1
    assert not [t.shape for t in kept if t.dtype == torch.float32 and len(t) == 10 and t.shape[2] > 1]
    assert apply.count("aten.le.Scalar") >= 8


def test_batch_norm_behind_a_convolution_becomes_part_of_it():
    generator = tree.generator_for("folded")

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight, bias, mean, variance, scale, shift = (draw(2, 3, 5, 5), draw(4, 3, 3, 3), draw(4), draw(4), draw(4).square() + 1,
                                                     draw(4), draw(4))

    def layers(bias, other):
        y = F.conv2d(x, weight, bias, padding=1)
        return F.batch_norm(y + 1 if other else y, mean, variance, scale, shift)

    for given in (None, bias):
        for other in (False, True):
            with Rules() as rules:
                found = layers(given, other)
            assert len(rules._convolved) == 1
            torch.testing.assert_close(found, layers(given, other), rtol=1e-12, atol=1e-12)
