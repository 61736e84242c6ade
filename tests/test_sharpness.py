"""Sharpness on quadratics whose maximum over a ball is known, and on rescaled networks that are the same function."""
import math

import pytest
import torch
import torch.nn.functional as F

from dpkit import models, tree
from dpkit.hessian import Operator, subset
from dpkit.hessian.objective import NetworkLoss, fixed_loss
from dpkit.hessian.sharpness import (
    SharpnessSpec,
    average_sharpness,
    edge_ratio,
    fisher_rao,
    fisher_rao_of,
    measure,
    sharpness,
)
from dpkit.models import ModelSpec

MLP = ModelSpec(arch="mlp", width=4, image_size=4, channels=1, classes=3)
CONVNET = ModelSpec(arch="convnet3", width=3, image_size=8, channels=1, classes=4)
RESNET = ModelSpec(arch="resnet10", width=1, image_size=8, channels=1, classes=4)
VIT = ModelSpec(arch="vit", width=4, image_size=8, channels=1, classes=4)


def generator(*path) -> torch.Generator:
    return tree.generator_for("sharpness tests", *path)


class Quadratic:
    """b'(x - w) + (x - w)'A(x - w) / 2 about the point w."""

    def __init__(self, matrix, slope, weights):
        self.matrix, self.slope, self.weights = matrix, slope, weights

    def value(self, point):
        return self.gradient(point)[0]

    def gradient(self, point):
        step = point - self.weights
        return float(self.slope @ step + step @ self.matrix @ step / 2), self.slope + self.matrix @ step


def quadratic(eigenvalues, *path):
    g = generator("quadratic", *path)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    slope, weights = torch.randn(2, n, generator=g, dtype=torch.float64)
    return Quadratic(basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T, slope, weights)


def ball_maximum(matrix, slope, radius):
    """max b'u + u'Au / 2 over ||u|| <= r by the secular equation: u = (m I - A)^-1 b with m >= the top eigenvalue, ||u|| = r
    (More and Sorensen 1983, Computing a trust region step)."""
    values, vectors = torch.linalg.eigh(matrix)
    b = vectors.T @ slope
    low, high = float(values[-1]), float(values[-1]) + float(slope.norm()) / radius + 1
    if low < 0 and (b / -values).norm() <= radius:
        return float((b**2 / -values).sum() / 2)  # the top lies inside
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (b / (middle - values)).norm() > radius else (low, middle)
    u = b / (high - values)
    return float(b @ u + (values * u**2).sum() / 2)


@pytest.mark.parametrize("eigenvalues", [[9.0, 4.0, 1.0, 0.5, 0.0], [5.0, 1.0, -1.0, -3.0, -8.0], [-1.0, -2.0, -6.0]],
                         ids=["convex", "indefinite", "concave"])
@pytest.mark.parametrize("radius", [0.01, 0.5, 3.0])
def test_the_maximum_over_a_ball_is_found(eigenvalues, radius):
    problem = quadratic(eigenvalues)
    expected = ball_maximum(problem.matrix, problem.slope, radius)
    found = sharpness(problem, radius, steps=200)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert found.value <= expected * (1 + 1e-12)
    assert float(found.point.norm()) <= radius * (1 + 1e-12)
    assert problem.value(problem.weights + found.point) == found.value


def test_the_first_point_is_sams():
    problem = quadratic([9.0, 4.0, 1.0])
    found = sharpness(problem, 0.3, steps=0)
    step = 0.3 * problem.slope / problem.slope.norm()
    assert found.first_order == found.value == pytest.approx(problem.value(problem.weights + step), rel=1e-12)
    assert found.linear == pytest.approx(0.3 * float(problem.slope.norm()), rel=1e-12)
    assert found.passes == 2
    assert sharpness(problem, 0.3, steps=5).passes == 7


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_adaptive_is_plain_in_coordinates_divided_by_the_weights(ball):
    problem = quadratic([9.0, 4.0, 1.0, -2.0])
    size = problem.weights.abs()
    divided = Quadratic(size[:, None] * problem.matrix * size, size * problem.slope, problem.weights)
    one = sharpness(problem, 0.7, adaptive=True, ball=ball)
    other = sharpness(divided, 0.7, ball=ball)
    assert one[:3] == pytest.approx(other[:3], rel=1e-12)
    torch.testing.assert_close(one.point, size * other.point, rtol=1e-12, atol=0)


def test_the_maximum_over_a_box_is_found():
    g = generator("box")
    curvature, slope, weights = torch.rand(3, 6, generator=g, dtype=torch.float64)
    problem = Quadratic(torch.diag(curvature), slope - 0.5, weights)
    found = sharpness(problem, 2.0, ball="linf")
    assert found.value == pytest.approx(float(2 * problem.slope.abs().sum() + 2 * curvature.sum()), rel=1e-12)
    assert float(found.point.abs().max()) == 2.0


def test_at_a_minimum_restarts_find_the_sharpest_direction():
    problem = quadratic([9.0, 4.0, 1.0])
    problem.slope = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the gradient must not be 0.*ask for restarts"):
        sharpness(problem, 0.5)
    found = sharpness(problem, 0.5, steps=60, restarts=1, generator=generator("restart"))
    assert found.value == pytest.approx(0.5**2 * 9.0 / 2, rel=1e-9)  # rho^2 lambda / 2
    assert (found.first_order, found.linear) == (0.0, 0.0)


def test_restarts_leave_a_lesser_maximum():
    # f has maxima at the ends of [-1, 1]; the gradient at 0 points to the lesser one
    class Valley:
        weights = torch.zeros(1, dtype=torch.float64)

        def gradient(self, point):
            x = float(point)
            return (3 * x**2 if x < 0 else x**2) + 0.1 * x, torch.tensor([(6 * x if x < 0 else 2 * x) + 0.1], dtype=torch.float64)

    assert sharpness(Valley(), 1.0).value == pytest.approx(1.1)
    assert sharpness(Valley(), 1.0, restarts=8, generator=generator("valley")).value == pytest.approx(2.9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_sharpness_is_half_the_trace(adaptive):
    problem = quadratic([9.0, 4.0, 1.0, -2.0])
    size = problem.weights.abs() if adaptive else torch.ones(4, dtype=torch.float64)
    expected = 0.1**2 / 2 * float((problem.matrix.diagonal() * size**2).sum())
    found = average_sharpness(problem, 0.1, 400, generator("noise"), adaptive=adaptive)
    assert abs(found.value - expected) <= 3 * found.standard_error
    assert 0 < found.standard_error < 0.1 * expected
    assert (found.products, found.samples) == (801, 400)


def test_average_sharpness_does_not_see_a_slope():
    flat = Quadratic(torch.zeros(3, 3, dtype=torch.float64), torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64),
                     torch.ones(3, dtype=torch.float64))
    found = average_sharpness(flat, 0.1, 5, generator())
    assert abs(found.value) + found.standard_error < 1e-15


def problem(spec, sparsity=0.0, soft=False, count=14):
    """(params, buffers, images, labels, mask) in float64, with norms and biases away from their start."""
    g = generator(spec.arch, spec.norm_kind)
    params, buffers = (tree.to(t, dtype=torch.float64) for t in models.init(spec, g))
    for name, tensor in [*params.items(), *buffers.items()]:
        if name not in models.prunable(spec):
            tensor += 0.3 * torch.rand(tensor.shape, generator=g)
    mask = {n: torch.rand(params[n].shape, generator=g) >= sparsity for n in models.prunable(spec)}
    params.update({n: torch.where(keep, params[n], 0.0) for n, keep in mask.items()})
    images = torch.randn(count, spec.channels, spec.image_size, spec.image_size, generator=g, dtype=torch.float64)
    labels = torch.randint(0, spec.classes, (count,), generator=g)
    if soft:
        labels = torch.rand(count, spec.classes, generator=g, dtype=torch.float64)
    return params, buffers, images, labels, mask if sparsity else None


CASES = {"mlp": (MLP, 0.0, False), "mlp, masked": (MLP, 0.5, False), "convnet, soft, masked": (CONVNET, 0.4, True),
         "resnet, masked": (RESNET, 0.6, False), "vit": (VIT, 0.0, False)}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    spec, sparsity, soft = request.param
    given = problem(spec, sparsity, soft)
    return spec, given, NetworkLoss(spec, *given, chunk=5)


def per_image_gradients(spec, params, buffers, images, labels, mask):
    """(N, n): the definition, one image at a time."""
    names = models.prunable(spec)
    rows = []
    for image, label in zip(images, labels, strict=True):
        chosen = {n: params[n].clone().requires_grad_() for n in names}
        logits, _ = models.forward(spec, {**params, **chosen}, buffers, image[None])
        parts = torch.autograd.grad(F.cross_entropy(logits, label[None]), tuple(chosen.values()))
        rows.append(torch.cat([g[mask[n]] if mask else g.reshape(-1) for n, g in zip(names, parts, strict=True)]))
    return torch.stack(rows)


def test_loss_and_gradient_are_those_of_the_network(case):
    spec, given, loss = case
    params, buffers, images, labels, _ = given
    gradients = per_image_gradients(spec, *given)
    value, slope = loss.gradient(loss.weights)
    logits, _ = models.forward(spec, params, buffers, images)
    assert value == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-12)
    assert loss.value(loss.weights) == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(slope, gradients.mean(0), rtol=1e-9, atol=1e-13)
    op = Operator(spec, *given)
    assert loss.loss == pytest.approx(op.loss, rel=1e-13)
    assert (loss.size, loss.names) == (op.size, op.names)
    torch.testing.assert_close(loss.weights, op.flatten(params), rtol=0, atol=0)


def test_a_rise_is_that_of_the_moved_network_and_pruned_entries_stay(case):
    spec, (params, buffers, images, labels, mask), loss = case
    found = sharpness(loss, 0.5, steps=4)
    moved = {**params, **loss.unflatten(loss.weights + found.point)}
    if mask:
        assert all(not moved[n][~keep].any() for n, keep in mask.items())
    logits, _ = models.forward(spec, moved, buffers, images)
    assert found.value == pytest.approx(float(F.cross_entropy(logits, labels)) - loss.loss, rel=1e-9)
    assert found.value >= found.first_order > 0
    tiny = sharpness(loss, 1e-6, steps=0)
    assert tiny.value == pytest.approx(tiny.linear, rel=1e-3)


def test_fisher_rao_is_its_definition(case):
    spec, given, loss = case
    params, buffers, images, _, mask = given
    along = per_image_gradients(spec, *given) @ loss.weights
    found = fisher_rao(loss)
    assert found.labels == pytest.approx(float(along.square().mean()), rel=1e-9)
    assert found.labels_error == pytest.approx(float(along.square().std()) / math.sqrt(len(images)), rel=1e-9)
    # the model's own labels: every class in turn, weighted by its probability
    p = models.forward(spec, params, buffers, images)[0].softmax(1)
    total = sum(p[:, c] * (per_image_gradients(spec, params, buffers, images, torch.full((len(images),), c), mask)
                           @ loss.weights).square() for c in range(spec.classes))
    assert found.model == pytest.approx(float(total.mean()), rel=1e-9)


def test_fisher_rao_of_a_homogeneous_network_needs_its_logits_only():
    params, buffers, images, labels, mask = problem(MLP, 0.3)
    params = {n: torch.zeros_like(t) if n.endswith("bias") else t for n, t in params.items()}
    loss = NetworkLoss(MLP, params, buffers, images, labels, mask)
    logits, _ = models.forward(MLP, params, buffers, images)
    assert fisher_rao(loss) == pytest.approx(fisher_rao_of(logits, 3 * logits, loss.targets), rel=1e-10)


def test_rescaled_layers_change_plain_sharpness_and_leave_adaptive_measures():
    """Dinh et al. 2017: the same function, another point."""
    params, *rest = problem(MLP, 0.3)
    factor = 5.0
    other = {**params, "linear0.weight": params["linear0.weight"] * factor, "linear0.bias": params["linear0.bias"] * factor,
             "linear1.weight": params["linear1.weight"] / factor}
    one, two = (NetworkLoss(MLP, p, *rest) for p in (params, other))
    assert two.loss == pytest.approx(one.loss, rel=1e-13)
    spec = SharpnessSpec(images=14, radius=0.1, adaptive_radius=0.3, dtype="float64", pairs=40)
    a, b = (measure(spec, loss, generator("noise")) for loss in (one, two))
    assert b.adaptive[:3] == pytest.approx(a.adaptive[:3], rel=1e-10)
    assert b.adaptive_average.value == pytest.approx(a.adaptive_average.value, rel=1e-8)
    assert b.fisher_rao == pytest.approx(a.fisher_rao, rel=1e-10)
    assert b.plain.value > 1.5 * a.plain.value
    assert b.average.value > 1.5 * a.average.value


@pytest.mark.parametrize("momentum, nesterov, decay", [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, True, 0.0), (0.5, True, 0.3),
                                                       (0.9, False, 0.4)])
def test_the_edge_is_where_torch_starts_to_diverge(momentum, nesterov, decay):
    curvature = 3.0
    per_rate = edge_ratio(curvature, 1.0, momentum, nesterov=nesterov, weight_decay=decay)

    def end(ratio):
        x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.SGD([x], lr=ratio / per_rate, momentum=momentum, nesterov=nesterov, weight_decay=decay)
        for _ in range(2000):
            optimiser.zero_grad()
            (curvature / 2 * x**2).sum().backward()
            optimiser.step()
        return abs(float(x.detach()))

    assert edge_ratio(curvature, 0.99 / per_rate, momentum, nesterov=nesterov, weight_decay=decay) == pytest.approx(0.99)
    assert end(0.99) < 1e-3
    assert end(1.01) > 1e3 or math.isnan(end(1.01))


def test_without_momentum_the_ratio_is_half_the_product():
    assert edge_ratio(30.0, 0.1) == pytest.approx(0.1 * 30.0 / 2)
    assert edge_ratio(30.0, 0.1, 0.9) == pytest.approx(0.1 * 30.0 / 3.8)
    assert edge_ratio(-3.0, 0.1) < 0


def test_the_fixed_images_are_those_of_hessians():
    params, buffers, images, labels, mask = problem(CONVNET, 0.4)
    loss = fixed_loss(CONVNET, params, buffers, images, labels, mask, count=8, dtype="float64")
    index = subset(labels, 8)
    assert loss.loss == pytest.approx(Operator(CONVNET, params, buffers, images[index], labels[index], mask).loss, rel=1e-13)
    everything = fixed_loss(CONVNET, params, buffers, images, labels, mask, count=8, scope="all")
    assert everything.size == sum(t.numel() for t in params.values()) - sum(int((~m).sum()) for m in mask.values())
    assert everything.dtype == torch.float32
    with pytest.raises(ValueError, match="scope must be one of weights, all; got 'layers'"):
        fixed_loss(CONVNET, params, buffers, images, labels, mask, count=8, scope="layers")
    with pytest.raises(ValueError, match="dtype must be one of float32, float64; got 'xx'"):
        fixed_loss(CONVNET, params, buffers, images, labels, mask, count=8, dtype="xx")


def test_batches_share_the_loss_out():
    given = problem(CONVNET, 0.4)
    loss = NetworkLoss(CONVNET, *given)
    parts = list(loss.batches(7))
    assert [p.size for p in parts] == [loss.size] * 2
    assert sum(p.loss for p in parts) / 2 == pytest.approx(loss.loss, rel=1e-12)
    assert len(list(loss.batches(5))) == 2
    with pytest.raises(ValueError, match=r"a batch must have from 1 to 14 images \(those given\), got 15"):
        next(loss.batches(15))


@pytest.mark.parametrize("change, message", [
    ({"radius": 0.0}, "radius must be a finite number above 0, got 0.0"),
    ({"radius": math.inf}, "radius must be a finite number above 0, got inf"),
    ({"ball": "l1"}, "ball must be one of l2, linf; got 'l1'"),
    ({"steps": -1}, "steps and restarts must be >= 0, got -1 and 0"),
    ({"restarts": 2}, "restarts are random and need a generator, got 2 without one"),
    ({"radius": 1e200}, "the loss must be finite in the ball, got (inf|nan); take a radius below 1e"),
])
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sharpness(quadratic([9.0, 4.0]), **({"radius": 1.0} | change))


def test_bad_networks_noise_and_rates_are_refused():
    params, buffers, images, labels, mask = problem(MLP, 0.3)
    nothing = {n: torch.zeros_like(m) for n, m in mask.items()}
    empty = {**params, **{n: torch.zeros_like(params[n]) for n in mask}}
    with pytest.raises(ValueError, match="needs surviving weights, got a mask that prunes all of them"):
        NetworkLoss(MLP, empty, buffers, images, labels, nothing)
    with pytest.raises(ValueError, match="the loss must be finite, got nan; the network has diverged"):
        NetworkLoss(MLP, {**params, "classifier.bias": params["classifier.bias"] * math.nan}, buffers, images, labels, mask)
    with pytest.raises(ValueError, match=r"must be \(\d+,\), one row for each surviving weight, got \(3,\)"):
        NetworkLoss(MLP, params, buffers, images, labels, mask).value(torch.zeros(3))
    with pytest.raises(ValueError, match="names must be distinct parameters of mlp, got conv9"):
        NetworkLoss(MLP, params, buffers, images, labels, mask, ["conv9"])
    with pytest.raises(ValueError, match="deviation must be a finite number above 0, got -1"):
        average_sharpness(quadratic([1.0]), -1.0, 4, generator())
    with pytest.raises(ValueError, match="pairs must be >= 2 to give an error bar, got 1"):
        average_sharpness(quadratic([1.0]), 1.0, 1, generator())
    with pytest.raises(ValueError, match="the loss must be finite, got NaN or infinity near the weights"):
        average_sharpness(quadratic([1.0]), 1e200, 2, generator())
    with pytest.raises(ValueError, match=r"must be \(N, K\) with N >= 2, got \(1, 3\), \(1, 3\) and \(1, 3\)"):
        fisher_rao_of(*torch.zeros(3, 1, 3))
    for bad in ({"lr": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"top_eigenvalue": math.nan}):
        with pytest.raises(ValueError, match="edge_ratio needs lr > 0, momentum in"):
            edge_ratio(**({"top_eigenvalue": 1.0, "lr": 0.1} | bad))
    with pytest.raises(ValueError, match=r"adaptive_radius must be > 0, got 0\.0"):
        SharpnessSpec(adaptive_radius=0)
