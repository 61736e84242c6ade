"""More points and tolerances: what the store has is taken over, to the last bit, and nothing is measured twice."""
from __future__ import annotations

import pytest
import torch
from lines_study import SETTINGS, computed
from small_study import plan

from dpkit import alignment, connectivity, landscape, models
from dpkit.models import ModelSpec
from dpkit.stages import compute, run
from dpkit.stages.connect import nested


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return computed(tmp_path_factory.mktemp("lines"))


@pytest.fixture
def counted(monkeypatch):
    """How many networks were evaluated, a number a job; everything runs in this process."""
    found = []
    for module in (connectivity.places, landscape.measure):
        original = module.evaluate_many
        monkeypatch.setattr(module, "evaluate_many", lambda model, count, *args, original=original, **options:
                            (found.append(count), original(model, count, *args, **options))[1])
    monkeypatch.setattr(run, "SMALL", float("inf"))
    return found


@pytest.mark.parametrize(("part", "changes", "step"), [
    ("connectivity", {"points": 9}, 2), ("layers", {"points": 9}, 2), ("alignment", {"points": 9}, 2),
    ("landscape", {"plane_resolution": 5}, 2),
    ("square", {"square_resolution": 5}, 2), ("around", {"around_resolution": 5}, 2), ("profile", {"profile_points": 9}, 2)])
def test_more_points_refine_and_measure_nothing_twice(done, monkeypatch, counted, part, changes, step):
    store, made = done
    before, after = getattr(made, part)()[0].unit, getattr(plan(**SETTINGS | changes), part)()[0].unit
    monkeypatch.setattr(alignment, "weight_matching", None)  # channels are matched once
    monkeypatch.setattr(connectivity, "predict", None)
    assert not compute(store, [after], device="cpu").errors
    old, new = store.get(before.key).tensors, store.get(after.key).tensors
    assert store.get(after.key).result["refined"] == before.key
    axes = (slice(None, None, step),) * (2 if part in ("landscape", "square", "around") else 1)
    for name in ("errors", "losses"):
        assert torch.equal(old[name], new[name][(..., *axes)])
    unique = {"connectivity": 9 - 5, "layers": 2 * 4 * 4, "alignment": 9 - 5, "landscape": 25 - 9, "square": 25 - 9,
              "around": 25 - 9, "profile": 2 * 4}[part]
    assert sum(counted) == unique


@pytest.mark.parametrize("part", ["connectivity", "alignment"])
def test_a_tolerance_adds_points_to_those_that_are_known_and_takes_them_back(done, counted, part):
    store, made = done
    first = getattr(made, part)()[0].unit
    alone = store.get(first.key).tensors
    units = {t: getattr(plan(**SETTINGS | {"path_tolerance": t}), part)()[0].unit for t in (1e-3, 5e-4)}
    for tolerance, unit in units.items():
        counted.clear()
        assert not compute(store, [unit], device="cpu").errors
        found = store.get(unit.key)
        assert found.result["refined"] == (first if tolerance == 1e-3 else units[1e-3]).key
        known = store.get(found.result["refined"]).tensors["alphas"]
        assert sum(counted) == len(found.tensors["alphas"]) - len(known)
        at = torch.isin(found.tensors["alphas"], alone["alphas"])
        for name in ("errors", "losses"):
            assert torch.equal(found.tensors[name][at], alone[name])


@pytest.mark.parametrize(("part", "name", "unique"), [
    ("connectivity", "points", 10 - 4), ("layers", "points", 2 * 4 * 6), ("alignment", "points", 10 - 4),
    ("square", "square_resolution", 100 - 16), ("around", "around_resolution", 100 - 16)])
def test_grids_of_which_neither_holds_the_other_share_points(done, counted, part, name, unique):
    """Of 7 and 10 points a third of the way and two thirds are in both."""
    store, _ = done
    coarse, fine = (getattr(plan(**SETTINGS | {name: count}), part)()[0].unit for count in (7, 10))
    assert not compute(store, [coarse], device="cpu").errors
    counted.clear()
    assert not compute(store, [fine], device="cpu").errors
    assert store.get(fine.key).result["refined"] == coarse.key
    assert sum(counted) == unique


def test_the_lines_of_a_plane_are_shared_where_they_are_the_same_bits():
    a, b, c = (models.init(ModelSpec(arch="mlp", width=3, image_size=4, classes=3), torch.Generator().manual_seed(i))[0]
               for i in range(3))
    flat = landscape.plane(a, b, c)
    coarse, fine = (flat.axes(count, 0.25)[0] for count in (41, 61))
    assert 61 in nested(41)
    assert int(torch.isin(fine, coarse).sum()) >= 15  # of 21 that are the same fractions


def test_counts_that_share_points():
    assert nested(11)[:19] == [21, 31, 41, 51, 61, 71, 81, 91, 101, 111, 121, 131, 141, 151, 161, 171, 181, 191, 201]
    assert nested(11)[19:21] == [16, 26]  # six of their points
    assert nested(11)[-2:] == [6, 3]
    assert nested(21)[:4] == [41, 61, 81, 101]
    assert nested(3, least=2)[-1] == 2
    for points in (5, 11, 41):
        for count in nested(points):
            both = set(connectivity.evenly(points).tolist()) & set(connectivity.evenly(count).tolist())
            assert len(both) > 3 or len(both) == min(points, count)
