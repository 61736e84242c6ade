"""The stage that matches two children's channels: what it finds for networks whose answer is known."""
from __future__ import annotations

import pytest
import torch
from small_study import plan

from dpkit import alignment, connectivity, tree
from dpkit.models import ModelSpec
from dpkit.stages import Context, closure, compute
from dpkit.stages.connect import measure_alignment
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


def test_its_parents_are_both_children_and_their_ticket():
    made = plan(arms=("imp",), robust_arms=("dense",))
    assert set(entry(made, "imp").unit.parents) == {"a", "b", "ticket"}
    assert set(entry(made, "dense").unit.parents) == {"a", "b"}
    assert closure([entry(made, "imp").unit])
