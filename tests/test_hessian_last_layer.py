"""The last layer's diagonal in closed form, exact diagonals by entries, and sampled ones within their stated error."""
import pytest
import torch
from test_hessian import CASES, CONVNET, RESNET, dense_hessian, problem
from test_hessian_estimators import MatrixOperator, generator, with_spectrum

from dpkit import models
from dpkit.hessian import Operator, exact_diagonal, trace_and_diagonal
from dpkit.hessian.estimate import student_quantile
from dpkit.hessian.last_layer import last_layer_diagonal
from dpkit.models import ModelSpec

SPECS = {"convnet": CONVNET, "convnet, BatchNorm": CONVNET.replace(norm="batch"), "resnet": RESNET,
         "convnet4": ModelSpec(arch="convnet4", width=2, image_size=16, channels=1, classes=4),
         "resnet20": ModelSpec(arch="resnet20", width=1, image_size=8, channels=1, classes=4),
         "alexnet": ModelSpec(arch="alexnet", width=2, image_size=8, channels=1, classes=4),
         "vgg16": ModelSpec(arch="vgg16", width=1, image_size=16, channels=1, classes=4),
         "mlp": ModelSpec(arch="mlp", width=3, image_size=8, channels=1, classes=4),
         "vit": ModelSpec(arch="vit", width=6, image_size=8, channels=1, classes=4)}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("sparsity, soft", [(0.0, False), (0.5, False), (0.3, True)])
def test_the_last_layer_equals_double_backward(spec, sparsity, soft):
    params, buffers, images, labels, mask = problem(spec, sparsity, soft)
    if soft:
        labels = labels * torch.linspace(0.5, 2.0, len(labels), dtype=labels.dtype)[:, None]  # sums other than 1
    name = models.classifier_name(spec)
    names = (f"{name}.weight", f"{name}.bias")
    op = Operator(spec, params, buffers, images, labels, mask, names)
    expected = exact_diagonal(op).values
    found = last_layer_diagonal(spec, params, buffers, images, labels, mask, bias=True)
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-13)
    assert (found.values >= 0).all()
    assert found.values.any()
    assert not found.standard_errors.any()
    assert found.products == 0
    weights = last_layer_diagonal(spec, params, buffers, images, labels, mask, chunk=5)
    torch.testing.assert_close(weights.values, expected[:len(weights.values)], rtol=1e-10, atol=1e-13)
    single = last_layer_diagonal(spec, params, buffers, images, labels, mask, dtype=torch.float32)
    torch.testing.assert_close(single.values, weights.values, rtol=1e-3, atol=1e-6)


def test_the_last_layer_of_two_classes_by_hand():
    """One weight a class, inputs 1 and 2, equal chances: (1/4 x 1 + 1/4 x 4) / 2."""
    spec = ModelSpec(arch="mlp", width=1, image_size=1, channels=1, classes=2)
    params = {n: torch.zeros_like(t) for n, t in models.init(spec, generator("hand"))[0].items()}
    for layer, name in enumerate(n for n in params if n.endswith("weight") and "classifier" not in n):
        params[name][:] = 1.0 if layer == 0 else 1 / params[name].shape[1]
    images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    weight = params[f"{models.classifier_name(spec)}.weight"]
    assert weight.shape == (2, 1)
    assert not weight.any()
    found = last_layer_diagonal(spec, params, {}, images, torch.tensor([0, 1]), bias=True)
    torch.testing.assert_close(found.values, torch.tensor([0.625, 0.625, 0.25, 0.25], dtype=torch.float64))


def test_sampled_entries_are_within_their_stated_error():
    """Two networks, every entry: 95% intervals hold 95 of 100 entries and seeds, up to what entries have in common."""
    for name in ("convnet, masked", "convnet with BatchNorm, masked"):
        spec, sparsity, soft, names = CASES[name]
        op = MatrixOperator(dense_hessian(spec, *problem(spec, sparsity, soft), names or models.prunable(spec)))
        truth, within = op.matrix.diagonal(), []
        rows = (op.matrix - torch.diag(truth)).norm(dim=1)
        sampled = rows > 1e-9 * rows.max()  # the others are exact
        assert sampled.sum() > 40
        for seed in range(100):
            found = trace_and_diagonal(op, 40, generator(name, seed))[1]
            half = student_quantile(0.95, 39) * found.standard_errors
            within.append(((found.values - truth).abs() <= half)[sampled].double())
        shares = torch.stack(within)
        assert 0.94 <= shares.mean() <= 0.97, name
        # Nor does the mean hide an entry whose interval is false.
        assert shares.mean(0).min() >= 0.85, name


def test_chosen_entries_and_bounded_memory():
    op = with_spectrum(range(1, 31))
    truth = op.matrix.diagonal()
    places = torch.tensor([29, 3, 3, 0])
    before = op.products
    found = exact_diagonal(op, entries=places, limit=4)
    torch.testing.assert_close(found.values, truth[places])
    assert op.products - before == found.products == 4
    widths = []

    class Watched(MatrixOperator):
        def matmat(self, vectors):
            widths.append(vectors.shape[1])
            return super().matmat(vectors)

    watched = Watched(op.matrix)
    torch.testing.assert_close(exact_diagonal(watched, memory=7 * 2 * 30 * 8 + 5).values, truth)
    assert widths == [7, 7, 7, 7, 2]


def test_what_makes_no_sense_is_refused():
    params, buffers, images, labels, mask = problem(CONVNET, 0.5)
    op = with_spectrum(range(1, 6))
    none = {"classifier.weight": torch.zeros(4, 3, dtype=torch.bool)}

    def layer(images=images, labels=labels, mask=mask, params=params, **more):
        return last_layer_diagonal(CONVNET, params, buffers, images, labels, mask, **more)

    whole, soft = {**params, "classifier.weight": torch.zeros(4, 3)}, torch.ones(12, 4, dtype=torch.float64) / 4
    broken = {**params, "classifier.bias": params["classifier.bias"] * float("nan")}
    for call, line in [
        (lambda: layer(mask=none, params=whole), r"mask of classifier\.weight must keep at least one weight, got none kept"),
        (lambda: layer(mask={"classifier.weight": torch.ones(2).bool()}),
         r"mask of classifier\.weight must be boolean and shaped like it \(\(4, 3\)\), got \(2,\)"),
        (lambda: layer(mask=none), r"pruned entries must be 0, got \d+ others in classifier\.weight"),
        (lambda: layer(labels=-soft), r"\(12, 4\) torch\.float64 from -"),
        (lambda: layer(images=images[:0], labels=labels[:0]), "at least one"),
        (lambda: layer(labels=labels[1:]), "12 images and 11 labels"),
        (lambda: layer(chunk=0), "chunk must be >= 1, got 0"),
        (lambda: layer(params=broken), "must be finite"),
        (lambda: exact_diagonal(op, entries=torch.tensor([5])), r"places in \[0, 5\), got \(1,\) from 5 to 5"),
        (lambda: exact_diagonal(op, entries=torch.tensor([-1])), r"places in \[0, 5\)"),
        (lambda: exact_diagonal(op, entries=torch.zeros(0)), r"places in \[0, 5\), got \(0,\)"),
        (lambda: exact_diagonal(op, memory=79), "one vector and its product, 80 bytes, got 79"),
        (lambda: exact_diagonal(op, block=0), "block must be >= 1, got 0"),
        (lambda: exact_diagonal(op, block=2.5), r"block must be a whole number, got 2\.5"),
        (lambda: exact_diagonal(op, memory=float("nan")), "memory must be a finite number of bytes, at least 1, or None"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
