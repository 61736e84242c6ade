"""Hessian products of tiny networks against their dense float64 Hessians."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models, tree
from dpkit.hessian import (
    HessianSpec,
    Operator,
    exact_diagonal,
    operator,
    subset,
    top_eigenpairs,
    top_eigenvalue,
    trace_and_diagonal,
)
from dpkit.models import ModelSpec

IMAGES, CLASSES = 12, 4
CONVNET = ModelSpec(arch="convnet3", width=3, image_size=8, channels=1, classes=CLASSES)
CONVNET_BATCH = CONVNET.replace(width=2, norm="batch")
RESNET = ModelSpec(arch="resnet10", width=1, image_size=8, channels=1, classes=CLASSES)


def generator(*path) -> torch.Generator:
    return tree.generator_for("hessian tests", *path)


def problem(spec: ModelSpec, sparsity=0.0, soft=False, count=IMAGES):
    """(params, buffers, images, labels, mask) in float64, with norms away from their start."""
    g = generator(spec.arch, spec.norm_kind)
    params, buffers = (tree.to(t, dtype=torch.float64) for t in models.init(spec, g))
    for name, tensor in [*params.items(), *buffers.items()]:
        if "norm" in name or "bn" in name or "downsample.1" in name:
            tensor += 0.3 * torch.rand(tensor.shape, generator=g)
    mask = {n: torch.rand(params[n].shape, generator=g) >= sparsity for n in models.prunable(spec)}
    params.update({n: torch.where(keep, params[n], 0.0) for n, keep in mask.items()})
    images = torch.randn(count, spec.channels, spec.image_size, spec.image_size, generator=g, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (count,), generator=g)
    if soft:
        labels = torch.rand(count, CLASSES, generator=g, dtype=torch.float64).softmax(1)
    return params, buffers, images, labels, mask if sparsity else None


def dense_hessian(spec, params, buffers, images, labels, mask, names) -> Tensor:
    """Column-wise double backward with respect to the flat vector of surviving entries."""
    keep = tree.flatten({n: (mask or {}).get(n, torch.ones_like(params[n], dtype=torch.bool)) for n in names}, names)
    places = keep.nonzero().squeeze(1)
    chosen = {n: params[n] for n in names}

    def loss(entries: Tensor) -> Tensor:
        flat = torch.zeros(len(keep), dtype=entries.dtype).index_put((places,), entries)
        logits, _ = models.forward(spec, {**params, **tree.unflatten(flat, chosen)}, buffers, images)
        return F.cross_entropy(logits, labels)

    return torch.autograd.functional.hessian(loss, tree.flatten(chosen)[places])


RESNET_PART = ("conv1.weight", "layer1.0.conv2.weight", "layer3.0.downsample.0.weight", "fc.weight",
               "bn1.bias")
CASES = {
    "convnet": (CONVNET, 0.0, False, None),
    "convnet, masked": (CONVNET, 0.5, False, None),
    "convnet, soft labels, masked": (CONVNET, 0.3, True, None),
    "convnet with BatchNorm, masked": (CONVNET_BATCH, 0.2, False, None),
    "resnet, some names, masked": (RESNET, 0.2, False, RESNET_PART),
    "resnet, some names": (RESNET, 0.0, False, RESNET_PART),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    """(spec, problem, names, dense Hessian) of one tiny network."""
    spec, sparsity, soft, names = request.param
    given = problem(spec, sparsity, soft)
    dense = dense_hessian(spec, *given, names or models.prunable(spec))
    assert 20 < len(dense) < 520
    return spec, given, names, dense


@pytest.mark.parametrize("chunk, keep", [(IMAGES, None), (5, None), (5, IMAGES)])
def test_product_equals_the_dense_hessian(case, chunk, keep):
    spec, given, names, dense = case
    op = Operator(spec, *given, names, chunk=chunk, keep=keep)
    assert op.size == len(dense)
    assert op.dtype == torch.float64
    vectors = torch.randn(op.size, 3, generator=generator("v"), dtype=torch.float64)
    for _ in range(2):
        expected = dense @ vectors
        assert (op.matmat(vectors) - expected).norm() <= 1e-10 * expected.norm()
        first = op.matvec(vectors[:, 0])
        assert (first - expected[:, 0]).norm() <= 1e-10 * expected[:, 0].norm()


def test_top_eigenvalues_of_a_network(case):
    spec, given, names, dense = case
    op = Operator(spec, *given, names)
    truth = torch.linalg.eigvalsh(dense).flip(0)
    top = top_eigenvalue(op, min(90, op.size), generator("start"))
    assert abs(top.value - truth[0]) <= 1e-8 * truth[0]
    pairs = top_eigenpairs(op, 3, min(90, op.size), generator("start"))
    assert pairs.values[0].item() == top.value
    torch.testing.assert_close(pairs.values, truth[:3], rtol=1e-6, atol=1e-9)
    residual = torch.linalg.norm(dense @ pairs.vectors - pairs.vectors * pairs.values, dim=0)
    assert (residual <= pairs.residuals + 1e-12).all()


def test_trace_and_diagonal_of_a_network(case):
    spec, given, names, dense = case
    op = Operator(spec, *given, names)
    exact = exact_diagonal(op, block=50)
    torch.testing.assert_close(exact.values, dense.diagonal(), rtol=1e-9, atol=1e-12)
    assert exact.products == op.size
    assert not exact.standard_errors.any()
    total, values = trace_and_diagonal(op, 40, generator("probes"))
    assert abs(total.value - dense.trace()) <= 4 * total.standard_error
    assert ((values.values - dense.diagonal()).abs() <= 3 * values.standard_errors).double().mean() > 0.95
    assert total.products == values.products == 40
    # The finite sum over all entries says the same three times.
    assert math.isclose(total.value, float(values.values.sum()), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(float(exact.values.sum()), float(torch.linalg.eigvalsh(dense).sum()), rel_tol=1e-9)


def test_product_equals_a_difference_of_gradients():
    """An oracle without second derivatives: central difference along the vector, error O(h^2)."""
    params, buffers, images, labels, mask = problem(CONVNET, 0.5)
    op = Operator(CONVNET, params, buffers, images, labels, mask)
    vector = torch.randn(op.size, generator=generator("d"), dtype=torch.float64)

    def gradient(step: float) -> Tensor:
        moved = {n: (params[n] + step * t).requires_grad_() for n, t in op.unflatten(vector).items()}
        logits, _ = models.forward(CONVNET, {**params, **moved}, buffers, images)
        parts = torch.autograd.grad(F.cross_entropy(logits, labels), list(moved.values()))
        return op.flatten(dict(zip(moved, parts, strict=True)))

    h = 1e-5
    difference = (gradient(h) - gradient(-h)) / (2 * h)
    torch.testing.assert_close(op.matvec(vector), difference, rtol=1e-4, atol=1e-7)


def test_pruned_entries_are_left_out():
    params, buffers, images, labels, mask = problem(CONVNET, 0.5)
    op = Operator(CONVNET, params, buffers, images, labels, mask)
    whole = Operator(CONVNET, params, buffers, images, labels)
    assert op.size == sum(int(keep.sum()) for keep in mask.values()) < whole.size
    vector = torch.randn(op.size, generator=generator("m"), dtype=torch.float64)
    tensors = op.unflatten(vector)
    assert all(not tensors[n][~keep].any() for n, keep in mask.items())
    assert torch.equal(op.flatten(tensors), vector)
    expected = op.flatten(whole.unflatten(whole.matvec(whole.flatten(tensors))))
    torch.testing.assert_close(op.matvec(vector), expected, rtol=1e-12, atol=1e-14)


def test_names_without_a_mask_survive_whole():
    params, buffers, images, labels, mask = problem(CONVNET, 0.5)
    spec = HessianSpec(images=IMAGES, scope="all", dtype="float64")
    op = Operator.from_spec(spec, CONVNET, params, buffers, images, labels, mask)
    free = sum(t.numel() for n, t in params.items() if n not in mask)
    assert op.size == free + sum(int(keep.sum()) for keep in mask.values())
    assert op.names == tuple(params)


def test_spec_chooses_images_dtype_and_scope():
    params, buffers, images, labels, mask = problem(CONVNET, 0.5)
    spec = HessianSpec(images=6)
    op = Operator.from_spec(spec, CONVNET, params, buffers, images, labels, mask)
    index = subset(labels, 6)
    same = Operator(CONVNET, params, buffers, images[index], labels[index], mask, dtype=torch.float32)
    vector = torch.randn(op.size, generator=generator("s"))
    assert op.names == models.prunable(CONVNET)
    assert op.matvec(vector).dtype == torch.float32
    assert torch.equal(op.matvec(vector), same.matvec(vector))


def test_float32_agrees_with_float64():
    given = problem(RESNET, 0.8)
    single, double = (Operator(RESNET, *given, dtype=d) for d in (torch.float32, torch.float64))
    vector = torch.randn(double.size, generator=generator("f"), dtype=torch.float64)
    difference = single.matvec(vector).double() - double.matvec(vector)
    assert difference.norm() <= 1e-4 * double.matvec(vector).norm()


def test_product_is_symmetric_and_repeatable_under_no_grad():
    op = Operator(RESNET, *problem(RESNET, 0.8), chunk=5)
    u, v = torch.randn(2, op.size, generator=generator("uv"), dtype=torch.float64)
    with torch.no_grad():
        assert math.isclose(torch.dot(u, op.matvec(v)), torch.dot(v, op.matvec(u)), rel_tol=1e-9)
        assert torch.equal(op.matvec(v), op.matvec(v))
    assert not op.matvec(v).requires_grad


def test_network_is_copied():
    given = problem(CONVNET_BATCH)
    before = [tree.detach(t) for t in given[:2]]
    op = Operator(CONVNET_BATCH, *given)
    vector = torch.ones(op.size, dtype=torch.float64)
    product = op.matvec(vector)
    for now, then in zip(given[:2], before, strict=True):
        assert all(torch.equal(now[n], then[n]) and not now[n].requires_grad for n in then)
    for tensor in [*given[0].values(), *given[1].values()]:
        tensor.zero_()
    assert torch.equal(op.matvec(vector), product)


@pytest.mark.parametrize("chunk, keep, passes", [(IMAGES, None, 1), (4, None, 9), (4, IMAGES, 3),
                                                 (IMAGES, 0, 3)])
def test_graph_is_kept_where_it_should_be(monkeypatch, chunk, keep, passes):
    op = Operator(CONVNET, *problem(CONVNET), chunk=chunk, keep=keep)
    calls, forward = [], models.forward
    monkeypatch.setattr(operator.models, "forward", lambda *a: calls.append(1) or forward(*a))
    for _ in range(2):
        op.matvec(torch.ones(op.size))
    op.matmat(torch.ones(op.size, 4))
    assert len(calls) == passes


def test_full_precision_restores_the_setting():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32
    with operator.full_precision():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32)


def test_subset_is_balanced_and_fixed():
    labels = torch.arange(5).repeat_interleave(20)
    index = subset(labels, 11)
    assert torch.equal(labels[index].bincount(), torch.tensor([3, 2, 2, 2, 2]))
    assert torch.equal(index, subset(F.one_hot(labels).float(), 11))
    assert torch.equal(subset(labels, 100).sort().values, torch.arange(100))
    with pytest.raises(ValueError, match=r"images must lie in \[1, 100\] .* got 101"):
        subset(labels, 101)


# What is refused, each with one line


def changed(change):
    """Arguments of an operator on a masked ConvNet after ``change`` altered a dictionary of them."""
    params, buffers, images, labels, mask = problem(CONVNET, 0.5)
    arguments = {"params": params, "buffers": buffers, "images": images, "labels": labels, "mask": mask}
    change(arguments)
    return arguments


REFUSED = {
    "no surviving weights": (lambda a: (a.update(mask={n: torch.zeros_like(k) for n, k in a["mask"].items()}),
                                        a.update(params=tree.add(a["params"], a["params"], -1.0))),
                             "needs surviving weights"),
    "no names": (lambda a: a.update(names=()), "needs surviving weights"),
    "unknown name": (lambda a: a.update(names=("conv9.weight",)), r"of convnet3, got conv9\.weight"),
    "a name twice": (lambda a: a.update(names=("conv0.weight",) * 2), "names must be distinct"),
    "diverged": (lambda a: a["params"]["classifier.bias"].fill_(float("nan")), "must be finite, got nan"),
    "infinite images": (lambda a: a["images"].mul_(float("inf")), "loss must be finite"),
    "weights under the mask": (lambda a: a["params"]["classifier.weight"].fill_(1.0), "entries must be 0"),
    "mask of another shape": (lambda a: a["mask"].update({"classifier.weight": torch.ones(2).bool()}),
                              r"mask of classifier\.weight must be boolean and shaped like it \(\(4, 3\)\)"),
    "mask of numbers": (lambda a: a["mask"].update({"classifier.weight": torch.ones(4, 3)}), "be boolean"),
    "mask of nothing": (lambda a: a["mask"].update({"conv9.weight": torch.ones(1) > 0}), "no such parameter"),
    "no images": (lambda a: a.update(images=a["images"][:0], labels=a["labels"][:0]), "at least one"),
    "a label missing": (lambda a: a.update(labels=a["labels"][1:]), "12 images and 11 labels"),
    "label out of range": (lambda a: a["labels"].fill_(CLASSES), "whole numbers from 0 to 3"),
    "soft labels of another width": (lambda a: a.update(labels=torch.ones(IMAGES, 3)), "probabilities"),
    "soft labels below zero": (lambda a: a.update(labels=torch.full((IMAGES, CLASSES), -0.25)), "probabilities of at least 0"),
    "soft labels that are no numbers": (lambda a: a.update(labels=torch.full((IMAGES, CLASSES), math.nan)), "of at least 0"),
    "a memory bound that is no number": (lambda a: a.update(memory=math.nan), "memory must be a finite number of bytes"),
    "a memory bound without an end": (lambda a: a.update(memory=math.inf), "memory must be a finite number of bytes"),
    "half precision": (lambda a: a.update(dtype=torch.float16), "dtype must be"),
    "empty chunk": (lambda a: a.update(chunk=0), "chunk must be >= 1, got 0"),
}


@pytest.mark.parametrize("change, line", REFUSED.values(), ids=REFUSED.keys())
def test_operator_refuses(change, line):
    arguments = changed(change)
    with pytest.raises(ValueError, match=line) as caught:
        Operator(CONVNET, **arguments)
    assert "\n" not in str(caught.value)


def test_operator_refuses_data_whose_passes_differ(monkeypatch):
    forward, noise = models.forward, generator("noise")

    def augmented(spec, params, buffers, x, train=False):
        return forward(spec, params, buffers, x + 0.01 * torch.randn(x.shape, generator=noise))

    monkeypatch.setattr(operator.models, "forward", augmented)
    with pytest.raises(ValueError, match="two passes over the images must give one loss"):
        Operator(CONVNET, *problem(CONVNET))


def test_vectors_of_another_length_are_refused():
    op = Operator(CONVNET, *problem(CONVNET))
    for multiply, bad in [(op.matvec, (5,)), (op.matvec, (op.size, 1)), (op.matmat, (op.size,)),
                          (op.matmat, (5, 2)), (op.unflatten, (5,))]:
        with pytest.raises(ValueError, match=rf"vectors must be \({op.size},"):
            multiply(torch.ones(bad))
    with pytest.raises(ValueError, match="products must be finite"):
        op.matvec(torch.full((op.size,), float("nan")))


@pytest.mark.parametrize("field, value", [("images", 0), ("probes", 1), ("lanczos_steps", 0), ("target", 1.0),
                                          ("scope", "layers"), ("dtype", "float16"), ("most", 31)])
def test_spec_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field} must"):
        HessianSpec(**{field: value})


def test_a_target_is_not_for_rounded_products():
    with pytest.raises(ValueError, match="target needs precision fp32, got bf16; leave one of them out"):
        HessianSpec(target=0.1, precision="bf16")
