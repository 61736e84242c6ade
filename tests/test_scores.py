"""SNIP, GraSP and SynFlow against values by hand, finite differences, dense Hessians and conservation laws."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from prune_networks import drawn, flat, random_mask, same, small

from dpkit import models, prune, tree
from dpkit.models import ModelSpec
from dpkit.prune import PruneSpec

TINY = ModelSpec(width=3, image_size=8, classes=3)
NETWORKS = [TINY.replace(norm="none"), TINY, TINY.replace(norm="batch")]


def double(model, seed=0):
    params, buffers = drawn(model, seed)
    # statistics that evaluation and training tell apart
    return tree.to(params, dtype=torch.float64), {n: t.double() + 0.1 for n, t in buffers.items()}


def batch(model, count=6):
    source = tree.generator_for(4, "images")
    images = torch.randn(count, model.channels, model.image_size, model.image_size, generator=source, dtype=torch.float64)
    return images, torch.arange(count) % model.classes


def loss_of(model, params, buffers, images, labels, train=True, temperature=1.0):
    return F.cross_entropy(models.forward(model, params, buffers, images, train)[0] / temperature, labels)


def places(mask, count=25):
    """Some surviving weights: (tensor, index)."""
    found = [(name, tuple(i)) for name, m in mask.items() for i in m.nonzero().tolist()]
    return found[::max(1, len(found) // count)]


def changed(params, name, index, factor):
    """A copy with one weight multiplied by ``factor``."""
    other = dict(params)
    other[name] = params[name].clone()
    other[name][index] *= factor
    return other


# --- SNIP ---
@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: m.norm_kind)
@pytest.mark.parametrize("train", [True, False])
def test_snip_is_how_much_the_loss_feels_each_connection(model, train):
    params, buffers = double(model)
    mask, (images, labels) = random_mask(model, 0.7), batch(model)
    masked = prune.apply(params, mask)
    scores = prune.snip(model, params, buffers, images, labels, mask, train=train)
    assert list(scores) == list(mask)
    for name, index in places(mask):
        # the derivative with respect to a factor c on the connection, at c = 1, by central differences
        up, down = (loss_of(model, changed(masked, name, index, c), buffers, images, labels, train) for c in (1 + 1e-5, 1 - 1e-5))
        assert float(scores[name][index]) == pytest.approx(abs(float(up - down)) / 2e-5, rel=1e-5, abs=1e-9)
    assert all(not scores[n][~m].any() for n, m in mask.items())
    assert sum(int((scores[n] > 0).sum()) for n in mask) > prune.surviving(mask) / 2


def test_snip_of_a_linear_classifier_by_hand():
    model = TINY.replace(norm="none", width=1, classes=2)
    params, buffers = double(model)
    # convolutions that see nothing: their biases 1, 2 and 3 make the feature 3 for every image
    params |= {f"conv{i}.weight": torch.zeros_like(params[f"conv{i}.weight"]) for i in range(3)}
    params |= {f"conv{i}.bias": torch.tensor([i + 1.0], dtype=torch.float64) for i in range(3)}
    params |= {"classifier.weight": torch.tensor([[0.5], [-0.25]]).double(), "classifier.bias": torch.zeros(2).double()}
    images, _ = batch(model, 1)
    p = 1 / (1 + math.exp(-(1.5 + 0.75)))  # of class 0: logits 1.5 and -0.75
    scores = prune.snip(model, params, buffers, images, torch.tensor([0]), prune.full(model, params))
    # |w dL/dw| with dL/dw = (p - y) * feature
    assert scores["classifier.weight"].flatten().tolist() == pytest.approx([0.5 * (1 - p) * 3, 0.25 * (1 - p) * 3])
    assert not any(scores[f"conv{i}.weight"].any() for i in range(3))


def test_soft_labels_are_those_of_cross_entropy():
    model = TINY
    (params, buffers), (images, labels) = double(model), batch(model)
    mask = prune.full(model, params)
    hard = prune.snip(model, params, buffers, images, labels, mask)
    soft = prune.snip(model, params, buffers, images, F.one_hot(labels, 3).double(), mask)
    assert all(torch.allclose(hard[n], soft[n], rtol=1e-12, atol=0) for n in mask)


# --- GraSP ---
def dense_product(model, params, buffers, mask, images, labels, temperature):
    """Hessian times gradient over the survivors from a dense float64 Hessian, as one vector over all prunable weights."""
    alive = flat(mask)
    masked = prune.apply(params, mask)
    start = tree.flatten(masked, mask)

    def loss(survivors):
        vector = torch.zeros_like(start).masked_scatter(alive, survivors)
        return loss_of(model, masked | tree.unflatten(vector, mask), buffers, images, labels, temperature=temperature)

    point = start[alive]
    hessian = torch.autograd.functional.hessian(loss, point)
    gradient = torch.autograd.functional.jacobian(loss, point)
    return torch.zeros_like(start).masked_scatter(alive, hessian @ gradient)


@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: m.norm_kind)
@pytest.mark.parametrize("temperature", [200.0, 1.5])
def test_grasp_is_the_weight_times_a_dense_hessian_times_the_gradient(model, temperature):
    params, buffers = double(model)
    mask, (images, labels) = random_mask(model, 0.8), batch(model)
    scores = prune.grasp(model, params, buffers, images, labels, mask, temperature=temperature)
    expected = tree.flatten(params, mask) * dense_product(model, params, buffers, mask, images, labels, temperature)
    found = tree.flatten(scores)
    alive = flat(mask)
    torch.testing.assert_close(found[alive], expected[alive], rtol=1e-7, atol=float(expected.abs().max()) * 1e-9)
    assert found[alive].min() < 0 < found[alive].max()


def test_grasp_keeps_what_would_lower_the_gradient_flow_if_it_went():
    model = NETWORKS[0]
    (params, buffers), (images, labels) = double(model), batch(model)
    mask = prune.full(model, params)
    scores = prune.grasp(model, params, buffers, images, labels, mask, temperature=1.0)

    def flow(network):
        weights = {n: network[n].clone().requires_grad_() for n in mask}
        loss = loss_of(model, network | weights, buffers, images, labels)
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(weights.values())))

    for name, index in places(mask):
        # a weight that shrinks by the part e lowers the squared norm by 2 e times its score
        e = 1e-5
        fall = (flow(changed(params, name, index, 1 + e)) - flow(changed(params, name, index, 1 - e))) / (2 * e)
        assert fall == pytest.approx(2 * float(scores[name][index]), rel=1e-4, abs=1e-9)


def test_batches_add_up_where_images_do_not_meet():
    model = NETWORKS[0]  # no norm, or other images of a batch would be felt
    (params, buffers), (images, labels) = double(model), batch(model, 7)
    mask = random_mask(model, 0.8)
    for score in (prune.snip, prune.grasp):
        whole = score(model, params, buffers, images, labels, mask)
        parts = score(model, params, buffers, images, labels, mask, batch_size=3)
        assert all(torch.allclose(whole[n][m], parts[n][m], rtol=1e-9, atol=1e-18) for n, m in mask.items())


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_scores_work_for_every_architecture_and_leave_their_input(arch):
    model = small(arch)
    params, buffers = drawn(model)
    before = (tree.detach(params), tree.detach(buffers))
    images, labels = batch(model)
    mask = random_mask(model, 0.5)
    for score in (prune.snip, prune.grasp):
        scores = score(model, params, buffers, images.float(), labels, mask)
        assert tree.is_finite(scores)
        assert all(scores[n].shape == m.shape and not scores[n].requires_grad for n, m in mask.items())
        assert flat(scores)[flat(mask)].abs().max() > 0
    assert same(params, before[0])
    assert same(buffers, before[1])
    assert not any(t.requires_grad for t in params.values())


@pytest.mark.parametrize("change, line", [
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ({"batch_size": 0}, "batch_size must be at least 1 or None for all images, got 0"),
    ({"labels": torch.zeros(2, dtype=torch.long)}, "one label for each, got 6 images and 2 labels"),
    ({"params": {n: t * math.nan for n, t in double(TINY)[0].items()}}, "GraSP scores must be finite numbers, got NaN"),
    ({"mask": {"other": torch.ones(1, dtype=torch.bool)}}, "mask names 'other', which the network lacks"),
])
def test_scores_without_meaning_are_refused(change, line):
    (params, buffers), (images, labels) = double(TINY), batch(TINY)
    call = {"params": params, "buffers": buffers, "images": images, "labels": labels, "mask": random_mask(TINY, 0.5)} | change
    with pytest.raises(ValueError, match=line):
        prune.grasp(TINY, **call)


# --- SynFlow ---
CHAINS = [a for a in models.ARCHITECTURES if not a.startswith("resnet") and a != "vit"]


def test_synaptic_flow_by_hand():
    model = TINY.replace(norm="none", width=1, classes=2)
    params, _ = double(model)
    for i, taps in enumerate([[0.5, -1.0, 2.0], [-3.0], [0.25]]):
        params[f"conv{i}.weight"] = torch.zeros(1, len(taps), 3, 3, dtype=torch.float64)
        params[f"conv{i}.weight"][0, :, 1, 1] = torch.tensor(taps)  # centre taps: each layer is a number
    params["classifier.weight"] = torch.tensor([[-2.0], [1.0]]).double()
    scores = prune.synflow_scores(model, params, prune.full(model, params))
    # R = (.5 + 1 + 2) * 3 * .25 * (2 + 1), and each weight's part of it
    assert scores["conv0.weight"][0, :, 1, 1].tolist() == pytest.approx([0.5 * 2.25, 1.0 * 2.25, 2.0 * 2.25])
    for name in ("conv1.weight", "conv2.weight"):
        assert float(scores[name][0, 0, 1, 1]) == pytest.approx(3.5 * 2.25)
    assert scores["classifier.weight"].flatten().tolist() == pytest.approx([3.5 * 0.75 * 2, 3.5 * 0.75 * 1])
    assert all(float(s.sum()) == pytest.approx(3.5 * 2.25) for s in scores.values())


@pytest.mark.parametrize("arch", CHAINS)
def test_every_layer_of_a_chain_carries_the_whole_flow(arch):
    model = small(arch)
    params, _ = drawn(model)
    for mask in (prune.full(model, params), random_mask(model, 0.5)):
        sums = [float(s.sum()) for s in prune.synflow_scores(model, params, mask).values()]
        assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-9)
        assert sums[0] > 0


@pytest.mark.parametrize("norm", ["none", "instance", "batch"])
def test_what_flows_into_a_channel_flows_out_of_it(norm):
    model = small("convnet3", norm=norm)
    params, _ = drawn(model)
    scores = prune.synflow_scores(model, params, random_mask(model, 0.6))
    for i in range(2):
        into = scores[f"conv{i}.weight"].flatten(1).sum(1)
        torch.testing.assert_close(into, scores[f"conv{i + 1}.weight"].transpose(0, 1).flatten(1).sum(1), rtol=1e-9, atol=0)
    # norms do nothing, so all three have the same scores
    bare = small("convnet3", norm="none")
    assert same(scores, prune.synflow_scores(bare, {n: params[n] for n in drawn(bare)[0]}, random_mask(model, 0.6)))


def test_residual_flow_is_the_derivative_of_the_flow():
    model = small("resnet10")
    params, _ = drawn(model)
    mask = random_mask(model, 0.5)
    scores = prune.synflow_scores(model, params, mask)
    absolute = {n: t.double().abs() if n in mask else t.double() for n, t in prune.apply(params, mask).items()}
    image = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    fresh = {n: t.double() for n, t in drawn(model)[1].items()}  # statistics 0 and 1: batch norm divides by sqrt(1 + epsilon)
    absolute["fc.bias"] = torch.zeros_like(absolute["fc.bias"])

    def flow(network):
        return float(models.forward(model, network, fresh, image)[0].sum())

    for name, index in places(mask):
        step = 1e-4
        slope = (flow(changed(absolute, name, index, 1 + step)) - flow(changed(absolute, name, index, 1 - step))) / (2 * step)
        assert float(scores[name][index]) == pytest.approx(slope, rel=2e-4)  # ten norms of 1 - 5e-6 each


def test_synflow_keeps_layers_alive_where_others_lose_them():
    model = ModelSpec(width=16, image_size=8, classes=3, norm="none")
    params, buffers = drawn(model)
    params["conv1.weight"] = params["conv1.weight"] * 0.01  # a layer of small weights
    full = prune.full(model, params)
    count = 40
    images, labels = batch(model, 12)
    by_magnitude = prune.keep_highest(prune.magnitude(params, full), full, count)
    by_snip = prune.keep_highest(prune.snip(model, params, buffers, images.float(), labels, full), full, count)
    by_synflow = prune.synflow(model, params, buffers, full, count)
    assert "conv1.weight" in prune.collapsed(by_magnitude)
    assert prune.surviving(prune.effective(model, by_snip)) < count
    assert prune.surviving(by_synflow) == count
    assert prune.collapsed(by_synflow) == []
    assert same(prune.effective(model, by_synflow), by_synflow)  # each survivor is on a path


def test_the_schedule_is_exponential_and_starts_from_the_mask(monkeypatch):
    model = small("convnet3")
    params, buffers = drawn(model)
    begin, seen = random_mask(model, 0.5), []
    inner = prune.scores.synflow_scores
    monkeypatch.setattr(prune.scores, "synflow_scores", lambda m, p, mask: seen.append(mask) or inner(m, p, mask))
    found = prune.synflow(model, params, buffers, begin, 40, iterations=7)
    first = prune.surviving(begin)
    assert [prune.surviving(m) for m in seen] == [round(first * (40 / first) ** (k / 7)) for k in range(7)]
    assert prune.surviving(found) == 40
    for before, after in zip(seen, [*seen[1:], found], strict=True):
        assert not (flat(after) & ~flat(before)).any()


def test_synflow_keeps_to_allocation_and_spared_layers():
    model = small("convnet3")
    params, buffers = drawn(model)
    full = prune.full(model, params)
    spec = PruneSpec(allocation="layerwise", spare=("last",))
    found = prune.synflow(model, params, buffers, full, 200, 10, spec=spec)
    assert prune.surviving(found) == 200
    assert bool(found["classifier.weight"].all())
    shares = [prune.density(found)[n] for n in full if n != "classifier.weight"]
    assert max(shares) - min(shares) < 0.03


def test_flow_without_meaning_is_refused():
    model = small("convnet3")
    params, buffers = drawn(model)
    full = prune.full(model, params)
    cut = full | {"conv1.weight": torch.zeros_like(full["conv1.weight"])}
    with pytest.raises(ValueError, match="SynFlow needs a path of finite weights from input to output, but the flow is 0; keep"):
        prune.synflow(model, params, buffers, cut, 10)
    broken = params | {"conv1.weight": params["conv1.weight"] * math.inf}
    with pytest.raises(ValueError, match="SynFlow needs a path of finite weights from input to output, but the flow is"):
        prune.synflow_scores(model, broken, full)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        prune.synflow(model, params, buffers, full, 10, 0)
    with pytest.raises(ValueError, match=r"count must lie in \[1, \d+\], the surviving weights; got 0"):
        prune.synflow(model, params, buffers, full, 0)
    with pytest.raises(ValueError, match=r"mask must cover the prunable weights of convnet3, but it lacks 'conv1.weight'"):
        prune.synflow(model, params, buffers, {n: m for n, m in full.items() if n != "conv1.weight"}, 10)


def test_synflow_does_not_pretend_for_attention():
    model = small("vit")
    params, buffers = drawn(model)
    with pytest.raises(ValueError, match="SynFlow needs a network that is linear in each layer's absolute weights, got vit"):
        prune.synflow(model, params, buffers, prune.full(model, params), 10)
