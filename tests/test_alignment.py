"""Permutations leave networks what they are, and weight matching finds them: exactly, and as well as brute force."""
import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import MEAN, PLAIN, STD, coloured

from dpkit import alignment, connectivity, models, prune, tree
from dpkit.connectivity import PathSpec
from dpkit.data import Split
from dpkit.models import ModelSpec, wiring
from dpkit.models.spec import RULES
from dpkit.training import fit

MODELS = [ModelSpec(arch=arch, norm=norm, width=64 if arch == "vit" else 8, classes=3,
                    image_size=32 if (arch, norm) == ("vgg16", "instance") else 16)
          for arch, rules in RULES.items() for norm in rules.norms]
IDS = [f"{model.arch} {model.norm}" for model in MODELS]
SMALL = ModelSpec(width=5, image_size=8, classes=3, norm="batch")
ORDERS = torch.tensor(list(itertools.permutations(range(5))))


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def network(model, seed=0, dtype=torch.float32):
    """Random tensors everywhere, norms and running statistics too."""
    generator = source(seed)
    params, buffers = models.init(model, generator)
    params = {n: t if t.dim() > 1 else t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in params.items()}
    buffers = {n: t + torch.rand(t.shape, generator=generator) for n, t in buffers.items()}
    return tree.to(params, dtype=dtype), tree.to(buffers, dtype=dtype)


def half(model, params, seed=0):
    full = prune.full(model, params)
    return prune.keep_highest(prune.random_scores(full, source(seed)), full, prune.size(full) // 2)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def trained(model, mask=None):
    """A network after a few epochs, with its running statistics; pruned by ``mask``."""
    images = coloured()
    split = Split(*(images.images.repeat_interleave(2, 2).repeat_interleave(2, 3), images.labels))
    start = [tree.stack([t]) for t in models.init(model, source(3))]
    return fit(PLAIN, model, split, MEAN, STD, *start, [0], masks=tree.stack([mask]) if mask else None).network(0)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_a_permuted_network_computes_what_it_did(model):
    params, buffers = network(model, dtype=torch.float64)
    mask = half(model, params)
    x = torch.randn(4, 3, model.image_size, model.image_size, generator=source(1), dtype=torch.float64)
    order = alignment.draw(model, source(2))
    moved, statistics, permuted = (alignment.permute(model, t, order) for t in (params, buffers, mask))
    for whole, other in ((params, moved), (prune.apply(params, mask), prune.apply(moved, permuted))):
        assert not any(torch.equal(whole[name], other[name]) for name in models.prunable(model))
        for train in (False, True):
            expected, after = models.forward(model, whole, buffers, x, train=train)
            logits, then = models.forward(model, other, statistics, x, train=train)
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
            assert expected.std() > 1e-3
            for name, t in alignment.permute(model, after, order).items():
                torch.testing.assert_close(then[name], t, rtol=1e-9, atol=1e-9)
    assert all(m.dtype == torch.bool for m in permuted.values())
    assert prune.density(permuted) == prune.density(mask)
    back = [alignment.permute(model, t, alignment.inverse(order)) for t in (moved, statistics, permuted)]
    assert all(equal(*pair) for pair in zip(back, (params, buffers, mask), strict=True))
    assert equal(alignment.permute(model, params, alignment.identity(model)), params)


@pytest.mark.parametrize("model, group", [(ModelSpec(width=8, image_size=8, norm="group"), "conv1"),
                                          (ModelSpec(arch="vit", width=64, image_size=8), "blocks.2.attn.v"),
                                          (ModelSpec(arch="vit", width=64, image_size=8), "blocks.2.attn.qk")])
def test_what_is_kept_together_matters(model, group):
    params, buffers = network(model, dtype=torch.float64)
    x = torch.randn(4, 3, 8, 8, generator=source(1), dtype=torch.float64)
    size = wiring.groups(model)[group].size
    torn = {group: torch.arange(size).roll(1)}
    logits = [models.forward(model, p, buffers, x)[0] for p in (params, wiring.take(model, params, torn))]
    assert (logits[0] - logits[1]).abs().max() > 1e-5
    with pytest.raises(ValueError, match=rf"the permutation of {group} must keep its 2 blocks of {size // 2} channels together"):
        alignment.permute(model, params, torn)


RECOVERED = [ModelSpec(arch=arch, norm=norm, width=64 if arch == "vit" else 8, image_size=16, classes=3)
             for arch, norm in [*((arch, "auto") for arch in RULES), ("convnet3", "batch"), ("convnet3", "group"),
                                ("resnet20", "none")]]


@pytest.mark.parametrize("model", RECOVERED, ids=[f"{m.arch} {m.norm}" for m in RECOVERED])
def test_a_permutation_of_a_trained_network_is_found_exactly(model):
    params, buffers = trained(model)
    order = alignment.draw(model, source(4))
    moved, statistics = (alignment.permute(model, t, order) for t in (params, buffers))
    found = alignment.weight_matching(model, params, moved, generator=source(5))
    assert equal(found, alignment.inverse(order))
    assert equal(alignment.permute(model, moved, found), params)
    assert equal(alignment.permute(model, statistics, found), buffers)


@pytest.mark.parametrize("arch", ["resnet10", "mlp"])
def test_a_pruned_network_is_found_with_mask_and_buffers(arch):
    model = ModelSpec(arch=arch, norm="batch", width=8, image_size=16, classes=3)
    mask = half(model, models.init(model, source(3))[0])
    network = [*trained(model, mask), mask]
    moved = [alignment.permute(model, t, alignment.draw(model, source(4))) for t in network]
    found = alignment.weight_matching(model, network[0], moved[0], (mask, moved[2]), generator=source(5))
    assert all(equal(alignment.permute(model, t, found), whole) for t, whole in zip(moved, network, strict=True))


def test_the_barrier_between_a_network_and_itself_goes():
    model = ModelSpec(norm="batch", width=8, image_size=16, classes=3)
    a = trained(model)
    b = tuple(alignment.permute(model, t, alignment.draw(model, source(4))) for t in a)
    found = alignment.weight_matching(model, a[0], b[0], generator=source(5))
    aligned = tuple(alignment.permute(model, t, found) for t in b)
    split = coloured()
    images = split.images.repeat_interleave(2, 2).repeat_interleave(2, 3).float() / 255
    spec = PathSpec(points=5, statistics="interpolate")
    before, after = (connectivity.path(spec, model, a, other, images, split.labels) for other in (b, aligned))
    assert before.loss_barrier > 0.01
    assert after.loss_barrier < 1e-6


def test_one_layer_is_matched_as_by_trying_every_order():
    for arch, group in (("convnet3", "conv0"), ("convnet3", "conv2"), ("mlp", "linear1"), ("resnet10", "layer1")):
        model = SMALL.replace(arch=arch)
        a, b = network(model, 0)[0], network(model, 1)[0]
        values = [alignment.objective(model, a, b, {group: order}) for order in ORDERS]
        found = alignment.weight_matching(model, a, b, generator=source(), restarts=0, only={group})
        assert torch.equal(found[group], ORDERS[int(torch.tensor(values).argmax())])
        assert alignment.objective(model, a, b, found) == max(values) > values[0]
        assert equal(found | {group: torch.arange(5)}, alignment.identity(model))


def test_two_layers_are_matched_as_by_trying_every_pair_of_orders():
    for seed in range(3):
        a, b = network(SMALL, seed)[0], network(SMALL, seed + 10)[0]
        written = [n for n in a if n.startswith(("conv1", "norm1"))]
        rest = [n for n in a if n not in written and n != "conv2.weight"]
        best = -float("inf")
        for order in ORDERS:
            moved = alignment.permute(SMALL, b, {"conv0": order})
            value = sum((a[n].double() * moved[n].double()).sum() for n in rest)
            values = value + sum((a[n].double() * moved[n].double()[ORDERS]).flatten(1).sum(1) for n in written)
            values += (a["conv2.weight"].double() * moved["conv2.weight"].double()[:, ORDERS].movedim(1, 0)).flatten(1).sum(1)
            best = max(best, float(values.max()))
        found = alignment.weight_matching(SMALL, a, b, generator=source(), restarts=10, only={"conv0", "conv1"})
        assert alignment.objective(SMALL, a, b, found) == pytest.approx(best, rel=1e-12)


def test_groups_of_group_norm_are_matched_as_by_trying_every_order():
    model = ModelSpec(width=8, image_size=8, classes=3, norm="group")
    a, b = network(model, 0)[0], network(model, 1)[0]
    inner = list(itertools.permutations(range(4)))
    orders = [torch.tensor([*(x + i for x in first), *(x + 4 - i for x in second)])
              for i in (0, 4) for first in inner for second in inner]
    written = [n for n in a if n.startswith(("conv1", "norm1"))]
    stacked = torch.stack(orders)
    values = sum((a[n].double() * b[n].double()[stacked]).flatten(1).sum(1) for n in written)
    values += (a["conv2.weight"].double() * b["conv2.weight"].double()[:, stacked].movedim(1, 0)).flatten(1).sum(1)
    found = alignment.weight_matching(model, a, b, generator=source(), restarts=0, only={"conv1"})
    assert torch.equal(found["conv1"], orders[int(values.argmax())])


def test_heads_are_matched_as_wholes():
    model = ModelSpec(arch="vit", width=64, image_size=8, classes=3)
    a, b = network(model, 0, torch.float64)[0], network(model, 1, torch.float64)[0]
    block = "blocks.1.attn"
    q, k, v = ([torch.cat([t[f"{block}.qkv.weight"], t[f"{block}.qkv.bias"][:, None]], 1)[64 * i : 64 * i + 64] for t in (a, b)]
               for i in range(3))
    out = [t[f"{block}.proj.weight"].T for t in (a, b)]
    worth = {"qk": q[0] @ q[1].T + k[0] @ k[1].T, "v": v[0] @ v[1].T + out[0] @ out[1].T}
    best, expected = -float("inf"), {}
    for heads in ((0, 1), (1, 0)):
        value, orders = 0.0, {}
        for name, scores in worth.items():
            parts = []
            for i, j in enumerate(heads):
                part = scores[32 * i : 32 * i + 32, 32 * j : 32 * j + 32]
                rows, columns = linear_sum_assignment(part, maximize=True)
                value += float(part[rows, columns].sum())
                parts.append(torch.from_numpy(columns) + 32 * j)
            orders[f"{block}.{name}"] = torch.cat(parts)
        if value > best:
            best, expected = value, orders
    found = alignment.weight_matching(model, a, b, generator=source(), restarts=0, only=set(expected))
    assert equal(found, alignment.identity(model) | expected)


@pytest.mark.parametrize("arch, norm", [("convnet3", "instance"), ("resnet10", "group"), ("vit", "layer")])
def test_the_objective_never_falls_and_ends_at_an_optimum(arch, norm):
    model = ModelSpec(arch=arch, norm=norm, width=32 if arch == "vit" else 8, image_size=8, classes=3)
    a, b = network(model, 0)[0], network(model, 1)[0]
    steps = list(alignment.descend(model, a, b, generator=source()))
    values = [value for _, value in steps]
    assert len(steps) > 3
    assert equal(steps[0][0], alignment.identity(model))
    assert all(later > earlier for earlier, later in itertools.pairwise(values))
    for order, value in steps:
        alignment.check(model, order)
        assert value == pytest.approx(alignment.objective(model, a, b, order), rel=1e-10)
    distance = sum(float((a[n].double() - t.double()).square().sum())
                   for n, t in alignment.permute(model, b, steps[-1][0]).items())
    assert distance == pytest.approx(tree.dot(a, a) + tree.dot(b, b) - 2 * values[-1], rel=1e-9)
    assert [value for _, value in alignment.descend(model, a, b, generator=source(), start=steps[-1][0])] == [
        pytest.approx(values[-1], rel=1e-12)]


def test_the_same_generator_gives_the_same_and_more_descents_nothing_worse():
    model = SMALL.replace(arch="mlp", width=20)
    a, b = network(model, 0)[0], network(model, 1)[0]
    values = []
    for restarts in (0, 1, 4):
        first, again = (alignment.weight_matching(model, a, b, generator=source(6), restarts=restarts) for _ in range(2))
        assert equal(first, again)
        values.append(alignment.objective(model, a, b, first))
    assert values == sorted(values)
    assert values[0] > alignment.objective(model, a, b)


def test_what_masks_remove_does_not_count():
    a, b = network(SMALL, 0)[0], network(SMALL, 1)[0]
    masks = half(SMALL, a, 0), half(SMALL, b, 1)
    wild = [{n: torch.where(m[n], t, 50.0 * torch.randn(t.shape, generator=source(9))) if n in m else t for n, t in net.items()}
            for net, m in zip((a, b), masks, strict=True)]
    expected = alignment.weight_matching(SMALL, prune.apply(a, masks[0]), prune.apply(b, masks[1]), generator=source())
    assert equal(alignment.weight_matching(SMALL, *wild, masks, generator=source()), expected)
    assert not equal(alignment.weight_matching(SMALL, *wild, generator=source()), expected)


def test_equal_channels_stay_where_they_are():
    a = network(SMALL)[0]
    dead = {n: torch.cat([t[:2], torch.zeros_like(t[2:])]) if n.startswith(("conv1", "norm1")) else t for n, t in a.items()}
    dead["conv2.weight"] = torch.cat([dead["conv2.weight"][:, :2], torch.zeros(5, 3, 3, 3)], 1)
    assert equal(alignment.weight_matching(SMALL, dead, dead, generator=source()), alignment.identity(SMALL))


def test_a_mask_moves_to_another_start():
    model = ModelSpec(arch="resnet10", width=8, image_size=16, classes=3)
    params, _ = trained(model)
    full = prune.full(model, params)
    count = prune.size(full) // 5
    other = alignment.permute(model, params, alignment.draw(model, source(4)))
    found = alignment.weight_matching(model, params, other, generator=source())
    mask, expected = (prune.keep_highest(prune.magnitude(p, full), full, count) for p in (params, other))
    assert not equal(mask, expected)
    assert equal(alignment.transfer(model, mask, found), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_assignment_is_the_best_of_all_orders(size):
    rows = torch.arange(size)
    orders = torch.tensor(list(itertools.permutations(range(size))))
    for seed in range(20):
        scores = torch.randn(size, size, generator=source(seed), dtype=torch.float64)
        for values in (scores, scores.round(), scores.abs() * 1e6, scores[:1] + scores[:, :1]):
            found = alignment.assignment(values)
            assert sorted(found.tolist()) == rows.tolist()
            assert values[rows, found].sum() == pytest.approx(float(values[rows, orders].sum(1).max()), abs=1e-12, rel=1e-12)


def test_assignment_is_scipys():
    for size, seed in ((40, 0), (150, 1)):
        x, y = torch.randn(2, size, 20, generator=source(seed), dtype=torch.float64)
        for scores in (x @ y.T, torch.randint(0, 4, (size, size), generator=source(seed)).double()):
            rows, columns = linear_sum_assignment(scores, maximize=True)
            found = alignment.assignment(scores)
            assert sorted(found.tolist()) == rows.tolist()
            assert scores[torch.arange(size), found].sum() == pytest.approx(float(scores[rows, columns].sum()), rel=1e-12)


NAN, EXTRA = {"conv1.weight": torch.full((5, 5, 3, 3), torch.nan)}, {"extra.weight": torch.ones(1)}


@pytest.mark.parametrize("change, message", [
    (lambda a, b: {"b": b | NAN}, r"network b must have finite weights, but 'conv1\.weight' has NaN"),
    (lambda a, b: {"b": b | EXTRA}, r"networks a and b must have the same tensors, but 'extra\.weight' is in b and not in a"),
    (lambda a, b: {"a": a | EXTRA, "b": b | EXTRA}, r"network a must have the parameters of convnet3 with width 5, but 'extra"),
    (lambda a, b: {"b": network(SMALL.replace(width=4))[0]}, r"networks a and b must have tensors of the same shapes"),
    (lambda a, b: {"model": SMALL.replace(width=4)}, r"but 'conv0\.weight' is \(5, 3, 3, 3\) in a and \(4, 3, 3, 3\) in"),
    (lambda a, b: {"model": SMALL.replace(arch="mlp")}, r"parameters of mlp .* but 'linear0\.weight' is nothing in a"),
    (lambda a, b: {"masks": ({}, {"norm0.weight": torch.ones(5, dtype=torch.bool)})}, r"mask of network b must be boolean"),
    (lambda a, b: {"masks": ({"conv0.weight": torch.ones(5, 3, 3, 3)}, {})}, r"mask of network a .* as torch\.float32 \(5, 3"),
    (lambda a, b: {"only": {"conv9"}}, r"only must name groups of convnet3"),
    (lambda a, b: {"restarts": -1}, r"restarts must be at least 0"),
])
def test_networks_that_cannot_be_matched_are_refused_in_one_line(change, message):
    given = {"model": SMALL, "a": network(SMALL, 0)[0], "b": network(SMALL, 1)[0]}
    given |= change(given["a"], given["b"])
    with pytest.raises(ValueError, match=message) as error:
        alignment.weight_matching(**given, generator=source())
    assert "\n" not in str(error.value)


VIT = ModelSpec(arch="vit", width=64, image_size=8)


@pytest.mark.parametrize("model, order, message", [
    (SMALL, {"conv9": torch.arange(5)}, r"permutations must be of groups of convnet3, such as 'conv0', got 'conv9'"),
    (SMALL, {"conv0": torch.arange(4)}, r"the permutation of conv0 must hold each of 0 to 4 once"),
    (SMALL, {"conv0": torch.zeros(5, dtype=torch.int64)}, r"the permutation of conv0 must hold each of 0 to 4 once"),
    (SMALL, {"conv0": torch.arange(5).float()}, r"got \(5,\) torch\.float32"),
    (VIT, {"blocks.0.attn.qk": torch.arange(64).roll(32)},
     r"blocks\.0\.attn\.qk and blocks\.0\.attn\.v must put their blocks in the same order, got \[1, 0\] and \[0, 1\]"),
])
def test_what_is_no_permutation_of_channels_is_refused_in_one_line(model, order, message):
    with pytest.raises(ValueError, match=message) as error:
        alignment.permute(model, network(model)[0], order)
    assert "\n" not in str(error.value)


def test_bad_scores_and_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"networks a and b must have the same tensors"):
        alignment.objective(SMALL, network(SMALL)[0] | EXTRA, network(SMALL)[0])
    with pytest.raises(ValueError, match=r"scores must be a square matrix, got shape \(2, 3\)"):
        alignment.assignment(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"scores must be finite numbers"):
        alignment.assignment(torch.full((2, 2), torch.nan))
