"""Hessian, Gauss-Newton and empirical Fisher of every architecture against dense float64 matrices; modes and the memory bound."""
import functools

import pytest
import torch
import torch.nn.functional as F
from test_hessian import CLASSES, CONVNET, CONVNET_BATCH, RESNET, dense_hessian, generator, problem
from torch import Tensor

from dpkit import models, tree
from dpkit.hessian import HessianSpec, Operator, exact_diagonal, operator, product, program
from dpkit.hessian.matrices import MATRICES
from dpkit.hessian.memory import Watch, fitting
from dpkit.models import ModelSpec

GREY = functools.partial(ModelSpec, channels=1, classes=CLASSES)
# Each architecture and some of its tensors, from its ends and its middle; None: all prunable ones.
ARCHITECTURES = {
    "convnet3": (CONVNET, ("conv0.weight", "conv2.weight", "norm1.weight", "classifier.bias")),
    "convnet4": (GREY(arch="convnet4", width=3, image_size=16, norm="layer"), ("conv0.weight", "conv3.weight")),
    "resnet10": (RESNET, ("conv1.weight", "layer2.0.downsample.0.weight", "layer3.0.bn1.bias", "fc.weight")),
    "resnet18": (GREY(arch="resnet18", width=1, image_size=8, norm="group"), ("conv1.weight", "layer2.1.bn1.bias", "fc.weight")),
    "resnet20": (GREY(arch="resnet20", width=2, image_size=8), ("conv1.weight", "layer1.2.conv2.weight", "fc.weight")),
    "alexnet": (GREY(arch="alexnet", width=2, image_size=8), ("conv0.weight", "conv3.weight", "classifier.weight")),
    "vgg16": (GREY(arch="vgg16", width=2, image_size=16), ("conv0.weight", "conv1.weight", "conv7.bias", "classifier.bias")),
    "mlp": (GREY(arch="mlp", width=3, image_size=4), None),
    "vit": (GREY(arch="vit", width=4, image_size=8), ("patch_embed.proj.weight", "blocks.3.attn.proj.weight", "head.weight")),
}


def dense(spec, params, buffers, images, labels, mask, names, train=False, everything=False):
    """Each matrix (n, n) by its definition, from Jacobians of the logits in the flat vector of entries."""
    keep = tree.flatten({n: torch.ones_like(params[n], dtype=torch.bool) if everything or n not in (mask or {}) else mask[n]
                         for n in names}, names)
    places, chosen = keep.nonzero().squeeze(1), {n: params[n] for n in names}

    def logits(entries: Tensor) -> Tensor:
        flat = torch.zeros(len(keep), dtype=entries.dtype).index_put((places,), entries)
        return models.forward(spec, {**params, **tree.unflatten(flat, chosen)}, buffers, images, train)[0]

    def losses(z: Tensor) -> Tensor:
        return F.cross_entropy(z, labels, reduction="none")

    at = tree.flatten(chosen)[places]
    jacobian, z = torch.autograd.functional.jacobian(logits, at), logits(at)
    single = torch.stack([torch.autograd.functional.hessian(lambda row, i=i: F.cross_entropy(row[None], labels[i:i + 1]), z[i])
                          for i in range(len(z))])
    gradients = torch.autograd.functional.jacobian(lambda entries: losses(logits(entries)), at)
    return {"hessian": torch.autograd.functional.hessian(lambda entries: losses(logits(entries)).mean(), at),
            "gauss_newton": torch.einsum("nki,nkl,nlj->ij", jacobian, single, jacobian) / len(z),
            "empirical_fisher": gradients.T @ gradients / len(z)}, jacobian, z


def assert_products(given, truth, chunk=5, **options):
    for matrix in MATRICES:
        op = Operator(*given, chunk=chunk, matrix=matrix, **options)
        vectors = torch.randn(op.size, 2, generator=generator("operators"), dtype=torch.float64)
        expected = truth[matrix] @ vectors
        assert (op.matmat(vectors) - expected).norm() <= 1e-10 * expected.norm()
        assert op.about["matrix"] == op.matrix == matrix


def test_all_architectures_are_here():
    assert set(ARCHITECTURES) == set(models.ARCHITECTURES)


def test_gauss_newton_is_the_fisher_matrix():
    """Expectation over labels drawn from the network's own chances, by the definition; the labels given do not enter."""
    given = problem(CONVNET, 0.7)
    truth, jacobian, z = dense(CONVNET, *given, models.prunable(CONVNET))
    chances, fisher = z.softmax(1), 0.0
    for label in range(CLASSES):
        gradients = torch.einsum("nk,nki->ni", chances - F.one_hot(torch.tensor(label), CLASSES), jacobian)
        fisher = fisher + (chances[:, label, None] * gradients).T @ gradients / len(z)
    op = Operator(CONVNET, *given, matrix="gauss_newton")
    eye = torch.eye(op.size, dtype=torch.float64)
    torch.testing.assert_close(op.matmat(eye), fisher, rtol=1e-10, atol=1e-13)
    other = Operator(CONVNET, *given[:3], 3 - given[3], given[4], matrix="gauss_newton")
    torch.testing.assert_close(other.matmat(eye), fisher, rtol=1e-10, atol=1e-13)
    assert torch.linalg.eigvalsh(fisher)[0] > -1e-12
    assert torch.linalg.eigvalsh(truth["hessian"])[0] < -1e-4  # what the Hessian is not
    empirical = torch.linalg.eigvalsh(Operator(CONVNET, *given, matrix="empirical_fisher").matmat(eye))
    assert empirical[0] > -1e-12
    assert int((empirical > 1e-10 * empirical[-1]).sum()) <= len(z)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_soft_labels_whatever_their_sum(scale):
    params, buffers, images, labels, mask = problem(CONVNET, 0.6, soft=True)
    given = params, buffers, images, scale * labels, mask
    truth, _, _ = dense(CONVNET, *given, models.prunable(CONVNET))
    assert_products((CONVNET, *given), truth)


# Modes


@pytest.mark.parametrize("spec, sparsity", [(CONVNET_BATCH, 0.3), (RESNET, 0.85)], ids=["convnet", "resnet"])
def test_train_mode_takes_the_statistics_of_the_batch(spec, sparsity):
    given = problem(spec, sparsity)
    truth, _, _ = dense(spec, *given, models.prunable(spec), train=True)
    assert_products((spec, *given), truth, chunk=None, mode="train")
    op = Operator(spec, *given, mode="train")
    assert op.about["mode"] == "train"
    assert op.about["batch_statistics"] == "of the batch of 12"
    assert Operator(spec, *given).about["batch_statistics"] == "running"
    assert abs(op.loss - Operator(spec, *given).loss) > 1e-3


def test_without_batchnorm_the_modes_are_one():
    given = problem(CONVNET, 0.4)
    eval_mode, train_mode = (Operator(CONVNET, *given, chunk=5, mode=mode) for mode in ("eval", "train"))
    vector = torch.ones(eval_mode.size, dtype=torch.float64)
    assert torch.equal(eval_mode.matvec(vector), train_mode.matvec(vector))
    assert train_mode.about["batch_statistics"] == "none"


def test_pruned_entries_may_be_included():
    given = problem(CONVNET, 0.5)
    mask = given[4]
    truth, _, _ = dense(CONVNET, *given, models.prunable(CONVNET), everything=True)
    assert_products((CONVNET, *given), truth, include_pruned=True)
    op, usual = Operator(CONVNET, *given, include_pruned=True), Operator(CONVNET, *given)
    assert op.size == models.count_prunable(CONVNET) > usual.size
    assert (op.pruned, usual.pruned) == ("included", "left out")
    survivors = op.flatten(mask).nonzero().squeeze(1)
    exact = exact_diagonal(op).values
    torch.testing.assert_close(exact[survivors], exact_diagonal(usual).values, rtol=1e-9, atol=1e-13)
    assert (exact[op.flatten(mask).logical_not()] != 0).any()  # the loss would curve there if the network could go


def test_published_protocol():
    """The diagonal as the study's scripts take it: one double backward for every entry of every prunable tensor."""
    params, buffers, images, labels, mask = problem(CONVNET_BATCH, 0.5, count=64)
    spec = HessianSpec.published(dtype="float64")
    assert (spec.images, spec.mode, spec.include_pruned, spec.matrix) == (64, "train", True, "hessian")
    leaves = {n: params[n].clone().requires_grad_() for n in models.prunable(CONVNET_BATCH)}
    logits, _ = models.forward(CONVNET_BATCH, {**params, **leaves}, buffers, images, train=True)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(leaves.values()), create_graph=True)
    entries = [torch.autograd.grad(g.reshape(-1)[i], leaf, retain_graph=True)[0].reshape(-1)[i]
               for g, leaf in zip(gradients, leaves.values(), strict=True) for i in range(leaf.numel())]
    op = Operator.from_spec(spec, CONVNET_BATCH, params, buffers, images, labels, mask)
    found = exact_diagonal(op, limit=op.size)
    torch.testing.assert_close(found.values, torch.stack(entries), rtol=1e-9, atol=1e-12)
    assert op.about == {"matrix": "hessian", "mode": "train", "batch_statistics": "of the batch of 64",
                        "pruned_entries": "included", "images": 64, "size": 98, "dtype": "float64"}
    corrected = Operator.from_spec(HessianSpec(images=64, dtype="float64"), CONVNET_BATCH, params, buffers, images, labels, mask)
    assert corrected.size < op.size
    assert abs(exact_diagonal(corrected).values.mean() - found.values.mean()) > 0.01 * abs(found.values.mean())


def test_settings_of_old_results_keep_their_form():
    assert "matrix" not in HessianSpec().to_dict()
    assert HessianSpec.published().to_dict() == {**HessianSpec(images=64).to_dict(), "mode": "train", "include_pruned": True}
    with pytest.raises(ValueError, match="matrix must be one of hessian, gauss_newton, empirical_fisher; got 'fisher'"):
        HessianSpec(matrix="fisher")


# Traced programs of the other matrices


@pytest.mark.parametrize("matrix, mode", [("gauss_newton", "eval"), ("empirical_fisher", "eval"), ("hessian", "train"),
                                          ("gauss_newton", "train")])
def test_the_cut_program_is_the_product(monkeypatch, matrix, mode):
    monkeypatch.setattr(operator, "CompiledProduct", functools.partial(product.CompiledProduct, compiled=False))
    monkeypatch.setattr(operator, "can_compile", lambda: True)
    monkeypatch.setattr(program, "_PROGRAMS", {})
    for spec, soft in ((CONVNET_BATCH, False), (CONVNET, True)):
        if mode == "train" and spec is CONVNET:
            continue
        given = problem(spec, 0.4, soft=soft, count=10)
        options = {"matrix": matrix, "mode": mode, "chunk": None if mode == "train" else 4}
        eager, op = (Operator(spec, *given, compile=c, **options) for c in (False, True))
        vectors = torch.randn(op.size, 2, generator=generator("cut"), dtype=torch.float64)
        expected = eager.matmat(vectors)
        assert (op.matmat(vectors) - expected).norm() <= 1e-12 * expected.norm()
        assert op._compiled is not None


@pytest.mark.slow
@pytest.mark.parametrize("matrix, mode", [("gauss_newton", "eval"), ("empirical_fisher", "eval"), ("hessian", "train")])
def test_compiled_for_real(matrix, mode):
    given = problem(CONVNET_BATCH, 0.4, count=10)
    eager, op = (Operator(CONVNET_BATCH, *given, compile=c, matrix=matrix, mode=mode, threads=2) for c in (False, True))
    vectors = torch.randn(op.size, 2, generator=generator("cut"), dtype=torch.float64)
    expected = eager.matmat(vectors)
    assert (op.matmat(vectors) - expected).norm() <= 1e-12 * expected.norm()
    assert op._compiled is not None


# Memory


def held(op: Operator) -> Watch:
    """Counts what is made beyond the operator's own tensors."""
    groups = op._weights, op._fixed, op._buffers, op._entries
    return Watch(op._images, op._labels, *(t for group in groups for t in group.values() if t is not None))


@pytest.mark.parametrize("spec, matrix", [(CONVNET.replace(width=8, image_size=16), "hessian"), (CONVNET, "gauss_newton"),
                                          (GREY(arch="mlp", width=4, image_size=8, norm="batch"), "empirical_fisher")])
def test_a_memory_bound_is_kept(spec, matrix):
    given = problem(spec, 0.5, count=40)
    free = Operator(spec, *given, matrix=matrix)
    assert free.chunk == 100
    one, ten, all_of_them = free.peak(1), free.peak(10), free.peak(40)
    assert one < ten < all_of_them
    for memory, chunks in ((one, (1,)), (ten, (8, 9, 10)), (all_of_them, (40,))):
        op = Operator(spec, *given, matrix=matrix, memory=memory)
        assert op.chunk in chunks
        vector = torch.randn(op.size, 1, generator=generator("memory"), dtype=torch.float64)
        with held(op) as watch:
            found = op.matmat(vector)
        # What was rehearsed is what happens; a few copies of vector and product at the ends come on top.
        assert 0.9 * memory < watch.peak <= memory + 4 * 8 * op.size
        torch.testing.assert_close(found, free.matmat(vector), rtol=1e-9, atol=1e-12)
    line = f"memory must be at least {one} bytes for a chunk of 1 image of {spec.arch}, got {one - 1}"
    with pytest.raises(ValueError, match=line):
        Operator(spec, *given, matrix=matrix, memory=one - 1, chunk=2)
    assert Operator(spec, *given, matrix=matrix, memory=all_of_them, chunk=7).chunk == 7


def test_the_rehearsal_is_the_product():
    spec = RESNET.replace(norm="group")
    op = Operator(spec, *problem(spec, 0.5))
    with held(op) as watch:
        op._eager(torch.ones(1, op.size, dtype=torch.float64))
    assert op.peak(12) == pytest.approx(watch.peak, rel=0.02)  # the vector of the one is counted, that of the other is not


def test_a_compiled_product_keeps_the_bound(monkeypatch):
    monkeypatch.setattr(operator, "CompiledProduct", functools.partial(product.CompiledProduct, compiled=False))
    monkeypatch.setattr(operator, "can_compile", lambda: True)
    monkeypatch.setattr(program, "_PROGRAMS", {})
    spec = CONVNET.replace(norm="none", width=8, image_size=16)
    given = problem(spec, 0.5, count=40)
    memory = 4 * Operator(spec, *given).peak(3)
    op = Operator(spec, *given, memory=memory, compile=True, threads=1)
    vector = torch.randn(op.size, 1, generator=generator("memory"), dtype=torch.float64)
    op.matvec(vector[:, 0])
    assert len(op._compiled._chunks) > 1
    op._compiled._saved = [None] * len(op._compiled._chunks)
    with held(op) as watch:
        op.matmat(vector)
    assert 0.1 * memory < watch.peak <= memory


@pytest.mark.parametrize("memory", [899, 900, 913, 2000, 6000, 13000])
@pytest.mark.parametrize("lines", [((100, 7), (-20, 13), (900, 0)), ((50, 11),), ((0, 1), (-900, 100))])
def test_a_chunk_that_fits_is_found(memory, lines):
    peaks = [max(fixed + each * n for fixed, each in lines) for n in range(1001)]
    asked = []
    found = fitting(lambda n: asked.append(n) or peaks[n], memory, 1000)
    largest = max((n for n in range(1, 1001) if peaks[n] <= memory), default=0)
    assert found == largest or (found and found < largest and 0.9 * memory <= peaks[found] <= memory)
    assert len(asked) <= 12


# What is refused, each with one line


@pytest.mark.parametrize("options, line", [
    ({"matrix": "fisher"}, "matrix must be one of hessian, gauss_newton, empirical_fisher; got 'fisher'"),
    ({"mode": "test"}, "mode must be one of eval, train; got 'test'"),
    ({"mode": "train", "chunk": 5}, "takes the images as one batch of at least 2 in one chunk, got 12 images and chunk 5"),
    ({"memory": 100}, r"memory must be at least \d{4,} bytes for a chunk of 1 image of convnet3, got 100"),
    ({"memory": 100, "mode": "train"}, r"memory must be at least \d{5,} bytes for a chunk of 12 images of convnet3, got 100"),
    ({"memory": 10**9, "keep": 3}, "keep must be None where memory decides it, got keep 3 and memory 1000000000")])
def test_operator_refuses(options, line):
    with pytest.raises(ValueError, match=line) as caught:
        Operator(CONVNET_BATCH, *problem(CONVNET_BATCH), **options)
    assert "\n" not in str(caught.value)


def test_one_image_is_no_batch():
    params, buffers, images, labels, mask = problem(CONVNET_BATCH)
    with pytest.raises(ValueError, match="one batch of at least 2 in one chunk, got 1 images"):
        Operator(CONVNET_BATCH, params, buffers, images[:1], labels[:1], mask, mode="train")


# Other libraries


class Module(torch.nn.Module):
    """A network as a module with the parameters ``names``, which is what other libraries take."""

    def __init__(self, spec, params, buffers, names) -> None:
        super().__init__()
        self.spec, self.held, self.kept = spec, params, buffers
        for name in names:
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(params[name].clone()))

    def forward(self, x: Tensor) -> Tensor:
        leaves = {name.replace("/", "."): leaf for name, leaf in self.named_parameters()}
        return models.forward(self.spec, {**self.held, **leaves}, self.kept, x)[0]


@pytest.mark.parametrize("spec", [CONVNET_BATCH, CONVNET.replace(norm="none"),
                                  *(ARCHITECTURES[arch][0] for arch in ("resnet10", "resnet20", "alexnet", "mlp"))],
                         ids=lambda spec: f"{spec.arch}-{spec.norm_kind}")
def test_curvlinops_agrees(spec):
    """Where it runs: its Hessian fails on group normalisation."""
    curvlinops = pytest.importorskip("curvlinops")
    kinds = {"hessian": curvlinops.HessianLinearOperator, "gauss_newton": curvlinops.GGNLinearOperator,
             "empirical_fisher": curvlinops.EFLinearOperator}
    params, buffers, images, labels, _ = problem(spec)
    net = Module(spec, params, buffers, models.prunable(spec))
    data = [(images[:7], labels[:7]), (images[7:], labels[7:])]
    for matrix, kind in kinds.items():
        theirs = kind(net, torch.nn.CrossEntropyLoss(), list(net.parameters()), data, check_deterministic=False)
        op = Operator(spec, params, buffers, images, labels, matrix=matrix)
        vectors = torch.randn(op.size, 2, generator=generator("curvlinops"), dtype=torch.float64)
        expected = theirs @ vectors
        assert (op.matmat(vectors) - expected).norm() <= 1e-10 * expected.norm()


def test_pyhessian_agrees_on_a_resnet20():
    pyhessian = pytest.importorskip("pyhessian")
    spec, _ = ARCHITECTURES["resnet20"]
    params, buffers, images, labels, _ = problem(spec)
    net = Module(spec, params, buffers, tuple(params)).eval()
    computer = pyhessian.hessian(net, torch.nn.CrossEntropyLoss(), data=(images, labels), cuda=False)
    op = Operator(spec, params, buffers, images, labels, names=tuple(params))
    vector = torch.randn(op.size, generator=generator("pyhessian"), dtype=torch.float64)
    pieces = list(op.unflatten(vector).values())
    theirs = pyhessian.utils.hessian_vector_product(computer.gradsH, computer.params, pieces)
    expected = op.flatten(dict(zip(op.names, theirs, strict=True)))
    assert (op.matvec(vector) - expected).norm() <= 1e-10 * expected.norm()


def test_dense_matrices_are_those_of_the_older_test():
    given = problem(CONVNET, 0.6)
    truth, _, _ = dense(CONVNET, *given, models.prunable(CONVNET))
    torch.testing.assert_close(truth["hessian"], dense_hessian(CONVNET, *given, models.prunable(CONVNET)), rtol=1e-9, atol=1e-13)
