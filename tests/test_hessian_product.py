"""The traced, cut and compiled product against the eager one, and when it is used."""
import functools

import pytest
import torch
from test_hessian import problem as hessian_problem
from torch import Tensor

from dpkit import tree
from dpkit.hessian import HessianSpec, Operator, operator, product, program, trace_and_diagonal
from dpkit.models import ModelSpec

CLASSES = 4
CONVNET = ModelSpec(arch="convnet3", width=3, image_size=8, channels=1, classes=CLASSES)
RESNET = ModelSpec(arch="resnet10", width=2, image_size=8, channels=1, classes=CLASSES)
MODELS = {"convnet, instance": CONVNET, "convnet, batch": CONVNET.replace(norm="batch"),
          "convnet, none": CONVNET.replace(norm="none"),
          "resnet, batch": RESNET.replace(norm="batch"), "resnet, instance": RESNET.replace(norm="instance", image_size=16),
          "resnet, imagenet stem": RESNET.replace(stem="imagenet", image_size=32)}


problem = functools.partial(hessian_problem, count=10)  # chunks of which the last is not whole


@pytest.fixture
def interpreted(monkeypatch):
    """Programs that are traced and cut as always and then run uncompiled: the same mathematics without the wait."""
    monkeypatch.setattr(operator, "CompiledProduct", functools.partial(product.CompiledProduct, compiled=False))
    monkeypatch.setattr(operator, "can_compile", lambda: True)
    monkeypatch.setattr(program, "_PROGRAMS", {})


def vectors(op: Operator, columns=3) -> Tensor:
    return torch.randn(op.size, columns, generator=tree.generator_for("vectors"), dtype=torch.float64).to(op.dtype)


def agree(spec: ModelSpec, given, tolerance: float, **options) -> Operator:
    """Asserts that compiled and eager operators multiply alike; returns the compiled one."""
    names, dtype = options.pop("names", None), options.pop("dtype", None)
    eager = Operator(spec, *given, names, dtype=dtype)
    op = Operator(spec, *given, names, dtype=dtype, compile=True, **options)
    for _ in range(2):
        expected = eager.matmat(vectors(op))
        found = op.matmat(vectors(op))
        assert op._compiled is not None
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(op.matvec(vectors(op)[:, 1]), found[:, 1])
    return op


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS.keys())
def test_the_cut_program_is_the_product(interpreted, spec):
    agree(spec, problem(spec, 0.4), 1e-12, chunk=4)


def test_scopes_soft_labels_and_chunks(interpreted):
    agree(CONVNET, problem(CONVNET, soft=True), 1e-12, chunk=4, names=tuple(problem(CONVNET)[0]))
    agree(CONVNET, problem(CONVNET, 0.5), 1e-12, names=("conv1.weight", "norm2.bias", "norm0.weight", "classifier.bias"))
    kept = agree(CONVNET, problem(CONVNET), 1e-12, chunk=3)
    rebuilt = agree(CONVNET, problem(CONVNET), 1e-12, chunk=3, keep=0)
    assert kept._compiled.kept
    assert not rebuilt._compiled.kept
    assert all(s is None for s in rebuilt._compiled._saved)
    # Equal chunks of at most three images: four of three, the last with two images that do not count.
    assert [len(images) for images, _ in kept._compiled._chunks] == [3] * 4
    assert product.chunk_size(500, 60) == 56


def test_threads_do_not_change_a_bit(interpreted):
    given = problem(CONVNET, 0.3)
    one, two, three = (Operator(CONVNET, *given, chunk=3, dtype=torch.float32, compile=True, threads=t) for t in (1, 2, 3))
    before = torch.get_num_threads()
    expected = one.matmat(vectors(one))
    assert torch.equal(two.matmat(vectors(one)), expected)
    assert torch.equal(three.matmat(vectors(one)), expected)
    assert two._compiled._threads == 2
    assert torch.get_num_threads() == before


def test_the_cut_keeps_little(interpreted):
    """What the eager graph keeps is ten times as much; a cut at the wrong place would keep every activation twice."""
    spec = CONVNET.replace(width=16, image_size=32, channels=3)
    op = agree(spec, problem(spec), 1e-12, chunk=5)
    activations = 8 * 16 * (32**2 + 16**2 + 8**2)  # the outputs of the convolutions, of 8 bytes a number
    assert activations <= op._compiled.saved <= 1.8 * activations
    found = product.CompiledProduct(spec, *_parts(op), 5, memory=op._compiled.saved * (10 - 1), compiled=False)
    assert not found.kept


def _parts(op: Operator):
    return op._weights, op._fixed, op._buffers, op._images, op._labels


def test_programs_are_shared_by_networks_of_a_shape(interpreted):
    first, second = problem(CONVNET), problem(CONVNET)
    second[0]["conv1.weight"].mul_(1.5)
    agree(CONVNET, first, 1e-12, chunk=5)
    agree(CONVNET, second, 1e-12, chunk=5)
    assert len(program._PROGRAMS) == 1


def test_the_estimators_take_a_compiled_operator(interpreted):
    given = problem(CONVNET, 0.5)
    spec = HessianSpec(images=8, dtype="float64", probes=4)
    runs = [trace_and_diagonal(Operator.from_spec(spec, CONVNET, *given, compile=c), 4, tree.generator_for("p"))[0]
            for c in (False, True)]
    assert abs(runs[0].value - runs[1].value) <= 1e-10 * abs(runs[0].value)


# When it is used


def test_auto_counts_the_work():
    wide = ModelSpec(arch="convnet3", width=64)
    assert product.worthwhile(wide, images=500, products=60)
    assert not product.worthwhile(wide, images=500, products=30)
    assert not product.worthwhile(CONVNET, images=500, products=1000)
    assert not Operator(CONVNET, *problem(CONVNET), compile="auto")._compile
    with pytest.raises(ValueError, match=r'compile must be True, False or "auto", got \'yes\''):
        Operator(CONVNET, *problem(CONVNET), compile="yes")


def test_without_a_compiler_the_product_is_the_eager_one(monkeypatch):
    monkeypatch.setattr(operator, "can_compile", lambda: False)
    op, eager = (Operator(CONVNET, *problem(CONVNET), compile=c) for c in (True, False))
    assert torch.equal(op.matmat(vectors(op)), eager.matmat(vectors(op)))


@pytest.mark.parametrize("broken, reason", [("raises", "no such compiler"), ("lies", "its product differs")])
def test_a_compiler_that_fails_is_left_alone(interpreted, monkeypatch, broken, reason):
    class Broken(product.CompiledProduct):
        def __call__(self, columns):
            if broken == "raises":
                raise RuntimeError("no such compiler\nand a long story")
            return [{name: 1.05 * t for name, t in v.items()} for v in super().__call__(columns)]

    monkeypatch.setattr(operator, "CompiledProduct", functools.partial(Broken, compiled=False))
    op, eager = (Operator(CONVNET, *problem(CONVNET), compile=c) for c in (True, False))
    with pytest.warns(UserWarning, match=reason) as caught:
        found = op.matmat(vectors(op))
    assert "\n" not in str(caught[0].message)
    assert torch.equal(found, eager.matmat(vectors(op)))
    assert torch.equal(op.matmat(vectors(op)), found)


def conditioning(spec: ModelSpec, given, dtype: torch.dtype, draws=30) -> float:
    """How far float64 products move, relatively and at most, when every weight and pixel is moved by up to half a unit in its
    last place of ``dtype``: rounding the inputs alone does that, so no computation in ``dtype`` can be expected to be closer."""
    generator, unit = tree.generator_for("half a unit"), torch.finfo(dtype).eps / 2

    def moved(t: Tensor) -> Tensor:
        return t * (1 + unit * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1))

    params, buffers, images, labels, mask = given
    exact = Operator(spec, *given).matmat(vectors(Operator(spec, *given)))
    found = []
    for _ in range(draws):
        op = Operator(spec, {n: moved(t) for n, t in params.items()}, buffers, moved(images), labels, mask)
        found.append(float((op.matmat(vectors(op)) - exact).norm() / exact.norm()))
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_for_real(name):
    """In float64 to 1e-12. In float32 as close to float64 as rounding of the inputs allows, up to ten times for the rounding of
    what is done with them. Of the ResNet with instance norm the last maps have 2 x 2 pixels, for one image nearly equal: there
    half a unit in the last place of the inputs is 1e-4 of the product, compiled or not, and 1e-6 or less for the others."""
    spec, given = MODELS[name], problem(MODELS[name], 0.4)
    agree(spec, given, 1e-12, chunk=5, dtype=torch.float64, threads=2)
    bound = 10 * conditioning(spec, given, torch.float32)
    exact = Operator(spec, *given).matmat(vectors(Operator(spec, *given)))
    for compiled in (False, True):
        op = Operator(spec, *given, dtype=torch.float32, compile=compiled, chunk=5, threads=2)
        error = float((op.matmat(vectors(op)).double() - exact).norm() / exact.norm())
        print(f"{name}, compiled {compiled}: error {error:.1e}, bound {bound:.1e}")
        assert error <= bound
        assert (op._compiled is not None) == compiled


def test_compiled_for_real_once():
    """Without norms there is least to compile; the others are in the slow test above."""
    spec = CONVNET.replace(norm="none")
    op = agree(spec, problem(spec, 0.2), 1e-5, chunk=5, dtype=torch.float32, threads=2)
    assert torch.equal(op.matvec(vectors(op)[:, 0]), op.matvec(vectors(op)[:, 0]))
