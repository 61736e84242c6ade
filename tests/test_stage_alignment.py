"""The stage that matches two children's channels: what it finds for networks whose answer is known."""
from __future__ import annotations

import pytest
import torch
from small_study import plan

from dpkit import alignment, connectivity, data, models, tree
from dpkit.data import normalise
from dpkit.models import ModelSpec
from dpkit.stages import Context, closure, compute
from dpkit.stages.connect import measure_alignment, measure_path
from dpkit.stages.make import network_of


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from dpkit.store import Store

    store, made = Store(tmp_path_factory.mktemp("alignment") / "store"), plan(arms=("imp",), robust_arms=("dense",))
    report = compute(store, [e.unit for e in (*made.connectivity(), *made.alignment())], workers=1)
    assert not report.errors
    return store, made


def entry(made, arm):
    return next(e for e in made.alignment() if e.place["arm"] == arm)


def test_it_measures_what_the_library_says(done):
    store, made = done
    for arm in ("dense", "imp"):
        unit = entry(made, arm).unit
        found, (a, b) = store.get(unit.key), (network_of(store.get(unit.parents[name].key)) for name in "ab")
        result = found.result
        assert result["l2"] == pytest.approx(float(connectivity.distances(a[0], b[0]).l2[-1]))
        assert result["aligned_l2"] <= result["l2"] + 1e-9
        start = network_of(store.get(unit.parents["ticket"].key))[0] if arm == "imp" else None
        if start is not None:
            assert result["cosine"] == pytest.approx(float(connectivity.distances(a[0], b[0], origin=start).cosine[-1]))
        assert -1 <= result["cosine"] <= 1
        assert 0 <= result["disagreement"] <= 1
        assert result["aligned_barrier"] == pytest.approx(connectivity.barrier(found.tensors["errors"]))
        if result["moved"] == 0:
            path = next(e for e in made.connectivity() if e.place["arm"] == arm)
            assert torch.equal(found.tensors["errors"], store.get(path.unit.key).tensors["errors"])


def test_a_permuted_copy_is_brought_back(done):
    store, made = done
    unit = entry(made, "imp").unit
    model = ModelSpec(**unit.spec["model"])
    first = store.get(unit.parents["a"].key)
    order = alignment.draw(model, tree.generator_for(3, "order"))
    copy = [alignment.permute(model, tensors, order) for tensors in network_of(first)]

    class Permuted:
        failed = None

        def group(self, name):
            return dict(zip(("params", "buffers"), copy, strict=True))[name]

    # without masks, as those of a permuted network are permuted too
    dense = entry(made, "dense").unit
    found = measure_alignment(Context(store), dense, {"a": first, "b": Permuted()})
    assert found.result["aligned_l2"] == pytest.approx(0, abs=1e-6)
    assert found.result["moved"] > 0
    assert found.result["aligned_barrier"] == pytest.approx(0)
    assert found.result["disagreement"] == 0
    assert found.result["sparsity_between"] == 0


def test_distances_by_layer_and_churn_are_kept(done):
    store, made = done
    for arm in ("dense", "imp"):
        unit = entry(made, arm).unit
        found, model = store.get(unit.key), ModelSpec(**unit.spec["model"])
        (a, _), (b, _) = pair = [network_of(store.get(unit.parents[name].key)) for name in "ab"]
        layers = models.prunable(model)
        assert found.result["layers"] == list(layers)
        for i, name in enumerate(layers):
            assert float(found.tensors["l2"][i]) == pytest.approx(float((a[name].double() - b[name].double()).norm()))
            assert int(found.tensors["sizes"][i]) == a[name].numel()
        assert float(found.tensors["l2"][-1]) == found.result["l2"]
        assert float(found.tensors["cosine"][-1]) == found.result["cosine"]
        order = found.group("order")
        matched = alignment.permute(model, b, order)
        assert found.result["aligned_l2"] == pytest.approx(float(connectivity.distances(a, matched).l2[-1]))
        data_ = data.load(made.study.data)
        images = normalise(data_.test.images, data_.mean, data_.std)
        said = [models.forward(model, *network, images)[0].argmax(1) for network in pair]
        right = [s == data_.test.labels for s in said]
        assert found.result["churn_gains"] == pytest.approx(float((~right[0] & right[1]).double().mean()))
        assert found.result["churn_losses"] == pytest.approx(float((right[0] & ~right[1]).double().mean()))
        assert found.result["disagreement"] == pytest.approx(float((said[0] != said[1]).double().mean()))
        assert found.result["churn_needless"] == pytest.approx(
            found.result["disagreement"] - abs(found.result["churn_gains"] - found.result["churn_losses"]))


def test_a_network_that_overflows_is_a_row_without_a_result(done):
    store, made = done
    unit = entry(made, "dense").unit
    params, buffers = network_of(store.get(unit.parents["b"].key))
    params = {n: t * {"classifier.weight": 1e38, "norm2.weight": 1e6}.get(n, 1) for n, t in params.items()}
    assert all(bool(torch.isfinite(t).all()) for t in params.values())

    class Overflowing:
        failed = None

        def group(self, name):
            return {"params": params, "buffers": buffers}[name]

    parents = {"a": store.get(unit.parents["a"].key), "b": Overflowing()}
    for stage in (measure_path, measure_alignment):
        found = stage(Context(store), unit, parents)
        assert found.tensors == found.result == {}
        assert "must" in found.failed
        assert "finite" in found.failed


def test_children_of_one_ticket_are_checked_against_its_mask(done):
    store, made = done
    unit = next(e for e in made.connectivity() if e.place["arm"] == "imp").unit
    first = store.get(unit.parents["a"].key)
    params, buffers = network_of(first)

    class Grown:
        failed = None

        def group(self, name):
            return {"params": {n: t + 1 for n, t in params.items()}, "buffers": buffers}[name]

    with pytest.raises(ValueError, match="network b must be zero where its mask removes weights"):
        measure_path(Context(store), unit, {"a": first, "b": Grown()})


def test_its_parents_are_both_children_and_their_ticket():
    made = plan(arms=("imp",), robust_arms=("dense",))
    assert set(entry(made, "imp").unit.parents) == {"a", "b", "ticket"}
    assert set(entry(made, "dense").unit.parents) == {"a", "b"}
    assert closure([entry(made, "imp").unit])
