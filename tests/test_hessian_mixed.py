"""Products that multiply in bfloat16, and the estimates that correct for it."""
import functools

import pytest
import torch
from test_hessian import problem as hessian_problem
from torch import Tensor

from dpkit import tree
from dpkit.hessian import HessianSpec, Operator, mixed, operator, product, program, top_eigenpairs, trace_and_diagonal
from dpkit.hessian.bf16 import OPERANDS
from dpkit.hessian.lanczos import Eigenpairs
from dpkit.models import ModelSpec

CLASSES = 4
CONVNET = ModelSpec(arch="convnet3", width=4, image_size=8, channels=1, classes=CLASSES)
MODELS = {"convnet": CONVNET, "resnet": CONVNET.replace(arch="resnet10", width=2), "mlp": CONVNET.replace(arch="mlp", width=6),
          "vit": CONVNET.replace(arch="vit", width=16)}


def generator(*path) -> torch.Generator:
    return tree.generator_for("mixed", *path)


def problem(spec: ModelSpec, sparsity=0.0):
    """A network and images in float32."""
    params, buffers, images, labels, mask = hessian_problem(spec, sparsity, count=10)
    return tree.to(params, dtype=torch.float32), tree.to(buffers, dtype=torch.float32), images.float(), labels, mask


@pytest.fixture
def interpreted(monkeypatch):
    """Programs that are traced, rounded and cut as always and then run uncompiled."""
    monkeypatch.setattr(operator, "CompiledProduct", functools.partial(product.CompiledProduct, compiled=False))
    monkeypatch.setattr(operator, "can_compile", lambda: True)
    monkeypatch.setattr(program, "_PROGRAMS", {})


@pytest.mark.parametrize(("net", "matrix"), [*((net, "hessian") for net in MODELS), ("mlp", "gauss_newton")])
def test_only_what_depends_on_the_vector_is_rounded(interpreted, net, matrix):
    spec = MODELS[net]
    given = problem(spec, 0.4)
    op = Operator(spec, *given, compile=True, precision="bf16", matrix=matrix)
    assert 1e-4 < op.rounding < 0.03
    plain = Operator(spec, *given, matrix=matrix)
    vectors = torch.randn(op.size, 3, generator=generator("vectors"))
    found, expected = op.matmat(vectors), plain.matmat(vectors)
    assert (op.exact(vectors) - expected).norm() < 1e-6 * expected.norm()
    assert 1e-4 * expected.norm() < (found - expected).norm() < 0.03 * expected.norm()
    made = list(program._PROGRAMS.values())[-1]
    for part, dtype in ((made.prepare, torch.float32), (made.apply, torch.bfloat16)):
        kinds = {a.meta["val"].dtype for node in part.graph.nodes if node.target in OPERANDS
                 for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)}
        assert kinds <= {dtype}, kinds
    assert any(node.target in OPERANDS for node in made.apply.graph.nodes)


class Rounded:
    """A dense H (n, n) whose products are by another matrix, A."""

    def __init__(self, matrix: Tensor, rounded: Tensor) -> None:
        self.matrix, self.rounded, self.size, self.dtype, self.device = matrix, rounded, len(matrix), matrix.dtype, matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self.rounded @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.rounded @ vectors

    def exact(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


def symmetric(size: int, *path) -> Tensor:
    found = torch.randn(size, size, generator=generator(*path), dtype=torch.float64)
    return (found + found.T) / 2


def test_trace_and_diagonal_have_no_bias_of_the_rounding():
    """A is off by far more than bfloat16 would be, so that without the correction most intervals miss."""
    matrix = symmetric(40, "matrix") + 3 * torch.eye(40, dtype=torch.float64)
    op = Rounded(matrix, matrix + 0.02 * symmetric(40, "error") + 0.5 * torch.eye(40, dtype=torch.float64))
    truth, held, plain, entries = float(matrix.trace()), 0, 0, []
    for seed in range(100):
        total, diagonal = mixed.trace_and_diagonal(op, 30, generator("probes", seed))
        low, high = total.interval()
        held += low <= truth <= high
        low, high = trace_and_diagonal(op, 30, generator("probes", seed))[0].interval()
        plain += low <= truth <= high
        entries.append(diagonal.values - matrix.diagonal())
        assert total.products == 30 + 2 * mixed.CORRECTIONS
    assert held >= 90
    assert plain <= 70
    assert float(torch.stack(entries).mean(0).abs().max()) < 0.35  # 40 entries, 3000 probes: about 0.1 each
    with pytest.raises(ValueError, match="corrections must be >= 2"):
        mixed.trace_and_diagonal(op, 30, generator(), corrections=1)


def test_a_ritz_value_is_off_by_the_square_of_the_rounding():
    values = torch.cat([torch.tensor([9.0, 7.5, -8.0]), torch.linspace(-1, 1, 57)]).double()
    turn = torch.linalg.qr(torch.randn(60, 60, generator=generator("turn"), dtype=torch.float64))[0]
    matrix, errors, before = turn @ torch.diag(values) @ turn.T, [], []
    for size in (1e-2, 1e-3):
        op = Rounded(matrix, matrix + size * symmetric(60, "noise"))
        found = top_eigenpairs(op, 2, 40, generator("start"))
        better = mixed.refined(op, found)
        errors.append(float((better.values - values[:2]).abs().max()))
        before.append(float((found.values - values[:2]).abs().max()))
        for theta, y, bound in zip(better.values, better.vectors.T, better.residuals, strict=True):
            assert float((matrix @ y - theta * y).norm()) == pytest.approx(float(bound), rel=1e-6)
            assert float((values - theta).abs().min()) <= float(bound)
        assert better.products == found.products + 2
    assert errors[0] < 0.1 * before[0]
    assert errors[1] < 0.03 * errors[0]  # ten times the accuracy, a hundred times the value's
    top = mixed.top_eigenvalue(op, 40, generator("start"))
    assert top.value == pytest.approx(9.0, abs=1e-4)
    assert top.products == 41


def test_pairs_ordered_by_size_stay_so():
    matrix = torch.diag(torch.tensor([9.0, -8.0, 7.5, 1.0], dtype=torch.float64))
    pairs = Eigenpairs(torch.tensor([9.1, -8.1, 7.4], dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:, :3],
                       torch.zeros(3, dtype=torch.float64), 3)
    found = mixed.refined(Rounded(matrix, matrix), pairs)
    assert found.values.tolist() == pytest.approx([9.0, -8.0, 7.5])
    assert found.vectors.abs().argmax(0).tolist() == [0, 1, 2]


def test_on_a_network_the_rounding_is_far_below_the_estimator_s_error(interpreted):
    given = problem(CONVNET, 0.5)
    op, plain = Operator(CONVNET, *given, compile=True, precision="bf16"), Operator(CONVNET, *given)
    low, _ = mixed.trace_and_diagonal(op, 16, generator("probes"))
    high, _ = mixed.trace_and_diagonal(Rounded.__new__(Plain).over(plain), 16, generator("probes"))
    assert abs(low.value - high.value) < 0.1 * high.standard_error
    top = mixed.top_eigenvalue(op, 30, generator("start"))
    assert top.value == pytest.approx(top_eigenpairs(plain, 1, 60, generator("start")).values[0].item(), rel=1e-3)


class Plain(Rounded):
    """An operator whose products are not rounded."""

    def over(self, op: Operator):
        self._op, self.size, self.dtype, self.device = op, op.size, op.dtype, op.device
        return self

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._op.matmat(vectors)

    exact = matmat


def test_uncompiled_products_are_not_rounded():
    given = problem(CONVNET)
    op, plain = Operator(CONVNET, *given, precision="bf16"), Operator(CONVNET, *given)
    vector = torch.ones(op.size)
    assert op.rounding == 0.0
    assert torch.equal(op.matvec(vector), plain.matvec(vector))
    assert op.about["precision"] == "bf16"
    assert "precision" not in plain.about


def test_what_cannot_be_is_refused():
    given = hessian_problem(CONVNET)
    with pytest.raises(ValueError, match=r"precision bf16 rounds products of dtype float32, got dtype torch\.float64"):
        Operator(CONVNET, *given, precision="bf16")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16; got 'fp16'"):
        Operator(CONVNET, *given, precision="fp16")
    with pytest.raises(ValueError, match="precision bf16 rounds products of dtype float32"):
        HessianSpec(precision="bf16", dtype="float64")
    assert "precision" not in HessianSpec().to_dict()  # keys of what exists
    assert HessianSpec(precision="bf16").to_dict()["precision"] == "bf16"
