"""What is measured between networks and around them: which units there are, and what they hold."""
from __future__ import annotations

import pytest
import torch
from lines_study import SETTINGS, computed
from small_study import plan

from dpkit import connectivity, data, landscape, models, tree
from dpkit.alignment import transfer, weight_matching
from dpkit.connectivity import PathSpec
from dpkit.data import normalise
from dpkit.models import ModelSpec
from dpkit.stages import closure, compute, load_study
from dpkit.stages.make import network_of


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return computed(tmp_path_factory.mktemp("lines"))


def test_children_that_part_later_share_their_first_steps(done):
    store, made = done
    rows = made.instability()
    assert {(e.place["arm"], e.place["step"]) for e in rows} == {
        ("dense", 0), ("dense", 1), ("dense", 8), ("imp", 0), ("imp", 1), ("imp", 8), ("ltr", 2), ("ltr", 8)}
    assert {e.place["seed"] for e in rows} == {0}
    paths = {e.unit.key for e in made.connectivity()}
    for entry in rows:
        a, b = entry.unit.parents["a"], entry.unit.parents["b"]
        assert (entry.unit.key in paths) == (entry.place["step"] == (2 if entry.place["arm"] == "ltr" else 0))
        if entry.unit.key in paths:
            continue
        shared = a.parents["start"]
        assert shared.key == b.parents["start"].key
        assert a.spec["first_step"] == b.spec["first_step"] == entry.place["step"]
        assert a.spec["noise_seed"] != b.spec["noise_seed"]
        kept = store.get(shared.key).group(f"{entry.place['step']}/params")
        ends = [network_of(store.get(u.key))[0] for u in (a, b)]
        assert not all(torch.equal(ends[0][n], ends[1][n]) for n in kept)
        if entry.place["arm"] != "dense":  # what the ticket lacks, all of them lack
            mask = store.get(a.parents["ticket"].key).group("mask")
            for params in (kept, *ends):
                assert all((params[n][~m] == 0).all() for n, m in mask.items())


def test_a_child_that_parts_goes_on_from_there(done):
    store, made = done
    unit = next(e for e in made.instability() if (e.place["arm"], e.place["step"]) == ("dense", 8)).unit.parents["a"]
    start = unit.parents["start"]
    total = made.study.train.steps(made.identity["train"])
    assert store.get(unit.key).result["steps"] == total - 8
    before, after = store.get(start.key).group("8/params"), network_of(store.get(unit.key))[0]
    ended = network_of(store.get(start.key))[0]
    assert tree.norm({n: after[n] - before[n] for n in after}) < tree.norm({n: ended[n] for n in ended})
    assert tree.norm({n: after[n] - before[n] for n in after}) > 0


def test_paths_on_training_images_are_of_the_same_networks(done):
    store, made = done
    test, train = made.connectivity(), made.train_paths()
    assert [e.place for e in test] == [e.place for e in train]
    assert all({k: u.key for k, u in a.unit.parents.items()} == {k: u.key for k, u in b.unit.parents.items()}
               for a, b in zip(test, train, strict=True))
    unit, dataset = train[0].unit, data.load(made.study.data)
    chosen = models.spread(len(dataset.train), 40)
    images = normalise(dataset.train.images[chosen], dataset.mean, dataset.std)
    ends = [network_of(store.get(unit.parents[name].key)) for name in "ab"]
    found = connectivity.path(PathSpec(**unit.spec["path"]), ModelSpec(**unit.spec["model"]), *ends, images,
                              dataset.train.labels[chosen])
    assert torch.equal(found.errors, store.get(unit.key).tensors["errors"])
    assert plan(**SETTINGS | {"train_path_images": 0}).train_paths() == []


def test_statistics_are_compared_in_a_network_that_has_them(done):
    store, made = done
    rows = made.statistics()
    assert [(e.place["statistics"], e.place["seed"]) for e in rows] == [
        (kind, seed) for seed in (0, 1) for kind in ("reestimate", "interpolate", "repair")]
    for kind, entry in zip(("reestimate", "interpolate", "repair") * 2, rows, strict=True):
        assert entry.unit.spec["path"]["statistics"] == kind
        assert entry.unit.spec["model"]["norm"] == "batch"
    losses = [store.get(e.unit.key).tensors["losses"] for e in rows[:3]]
    assert not torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])  # BatchNorm measured anew is what REPAIR does to it
    own = plan(**SETTINGS | {"statistics_norm": "same"}).statistics()
    assert {e.unit.parents["a"].key for e in own} <= {e.unit.parents["a"].key for e in made.connectivity()}


def test_statistics_are_compared_where_repair_has_something_to_do(done):
    """In a ResNet the ends of blocks are repaired as well."""
    store, _ = done
    rows = plan(**SETTINGS | {"statistics_arch": "resnet10:2", "seeds": 1, "arms": ("imp",), "between_arms": ("imp",),
                              "spawn_arms": ("imp",)}).statistics()
    assert {(e.place["arch"], e.place["norm"]) for e in rows} == {("resnet10", "batch")}
    assert {(e.unit.spec["model"]["arch"], e.unit.spec["model"]["width"]) for e in rows} == {("resnet10", 2)}
    assert not compute(store, [e.unit for e in rows], device="cpu", workers=1).errors
    losses = {e.place["statistics"]: store.get(e.unit.key).tensors["losses"] for e in rows}
    assert not torch.allclose(losses["reestimate"][1:-1], losses["repair"][1:-1], rtol=1e-4)
    with pytest.raises(ValueError, match="statistics_arch must be ARCH:WIDTH, such as resnet10:8, or nothing; got 'resnet10'"):
        plan(**SETTINGS | {"statistics_arch": "resnet10"})
    with pytest.raises(ValueError, match="statistics_arch must be"):
        plan(**SETTINGS | {"statistics_arch": "unheard:3"})


def test_a_layer_that_moves_alone(done):
    store, made = done
    rows = made.layers()
    assert [(e.place["round"], e.place["seed"]) for e in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    entry = rows[0]
    found = store.get(entry.unit.key)
    path = next(e for e in made.connectivity() if e.place == entry.place)
    ends = store.get(path.unit.key).tensors["errors"][[0, -1]]
    assert torch.equal(found.tensors["end_errors"], ends)
    assert found.tensors["errors"].shape == (len(found.result["layers"]), 5)
    assert torch.equal(found.tensors["errors"][:, 0], ends[0].expand(len(found.result["layers"])))
    assert found.result["highest_barrier"] == pytest.approx(float(found.tensors["errors"].max() - ends.mean()))


def test_relations_between_networks(done):
    _, made = done
    rows = made.between()
    counted = {}
    for e in rows:
        counted.setdefault(e.place["relation"], []).append(tuple(e.place[n] for n in ("arm", "round", "other", "other_round")))
    assert sorted(set(counted["rounds"])) == [("distilled", 0, "distilled", 1), ("imp", 0, "imp", 1)]
    assert sorted(set(counted["solution"])) == [("distilled", 0, "distilled", 0), ("distilled", 1, "distilled", 1)]
    assert sorted(set(counted["arms"])) == [("imp", 1, "distilled", 1), ("imp", 2, "distilled", 2)]
    for e in rows:
        a, b = e.unit.parents["a"], e.unit.parents["b"]
        assert a.spec["init_seed"] == b.spec["init_seed"]
        if e.place["relation"] == "solution":
            assert "images" in a.parents
            assert "images" not in b.parents
            if e.place["round"]:
                assert a.parents["ticket"].key == b.parents["ticket"].key


def test_dense_networks_of_two_starts_are_compared_before_and_after(done):
    store, made = done
    rows = made.starts()
    assert [(e.place["pair"], e.place["matched"]) for e in rows] == [("0-1", False), ("0-1", True)]
    a, b = (rows[0].unit.parents[name] for name in "ab")
    assert (a.key, b.key) == (made.child("dense", 0, 0, 0).key, made.child("dense", 1, 0, 1).key)
    assert [e.unit.stage for e in rows] == ["path", "alignment"]
    found = store.get(rows[1].unit.key).result
    assert found["aligned_l2"] <= found["l2"] + 1e-9
    assert found["cosine"] <= found["aligned_cosine"] + 1e-9  # of the weights, as there is no start to go from
    assert [e.place["pair"] for e in plan(**SETTINGS | {"seeds": 3}).starts()] == ["0-1"] * 2 + ["1-2"] * 2 + ["2-0"] * 2
    assert plan(**SETTINGS | {"seeds": 1, "arms": ("imp",), "robust_arms": ("dense",), "spawn_arms": (), "layer_arms": (),
                              "between_arms": ()}).starts() == []


def test_masks_of_another_start(done):
    store, made = done
    unit = made.ticket("imp_transferred", 0, 2)
    mask, lent = store.get(unit.key).group("mask"), store.get(made.ticket("imp", 1, 2).key).group("mask")
    model = ModelSpec(**unit.spec["model"])
    theirs, own = (network_of(store.get(made.dense(i, "search").key))[0] for i in (1, 0))
    found = weight_matching(model, theirs, own, generator=tree.generator_for(unit.spec["control_seed"], "matching"))
    expected = transfer(model, lent, found)
    assert all(torch.equal(mask[n], expected[n]) for n in expected)
    assert {n: int(m.sum()) for n, m in mask.items()} == {n: int(m.sum()) for n, m in lent.items()}
    borrowed = store.get(made.ticket("imp_borrowed", 0, 2).key)
    assert all(torch.equal(m, lent[n]) for n, m in borrowed.group("mask").items())
    start = models.init(model, tree.generator_for(unit.spec["init_seed"], "init"))[0]
    for ticket in (store.get(unit.key), borrowed):
        kept = ticket.group("mask")
        assert all(torch.equal(t, torch.where(kept[n], start[n], 0.0) if n in kept else start[n])
                   for n, t in ticket.group("params").items())
    assert made.searches_of("imp_borrowed", 0, 2)[0].key == made.searched("imp", 1, 0).key
    with pytest.raises(ValueError, match="seeds must be >= 2 for arm imp_borrowed, which takes another"):
        plan(arms=("imp_borrowed",), robust_arms=("dense",))


def test_ways_end_at_the_corners_of_their_plane(done):
    store, made = done
    way, plane = (store.get(getattr(made, part)()[0].unit.key) for part in ("trajectory", "landscape"))
    assert torch.allclose(way.tensors["positions"][:, -1], plane.tensors["corners"], atol=1e-6)
    assert float(way.tensors["outside"][:, -1].max()) < 1e-5
    assert way.tensors["steps"].tolist() == [0, 5, 10]
    # all three start at one place
    assert torch.allclose(way.tensors["positions"][:, 0], way.tensors["positions"][:1, 0].expand(3, 2), atol=1e-6)
    assert way.result["outside_start"] == pytest.approx(float(way.tensors["relative"][:, 0].mean()))


def test_a_small_set_is_seen_on_the_same_plane(done):
    store, made = done
    real, small = (store.get(getattr(made, part)()[0].unit.key) for part in ("landscape", "plane_sets"))
    assert torch.equal(real.tensors["x"], small.tensors["x"])
    assert torch.equal(real.tensors["corners"], small.tensors["corners"])
    assert not torch.equal(real.tensors["losses"], small.tensors["losses"])


def test_around_and_profile_stay_within_the_mask(done):
    store, made = done
    unit = made.profile()[0].unit
    mask = store.get(unit.parents["ticket"].key).group("mask")
    params, buffers = network_of(store.get(unit.parents["network"].key))
    spec, model = landscape.ProfileSpec(**unit.spec["profile"]), ModelSpec(**unit.spec["model"])
    directions = landscape.random_directions(spec, model, params, tree.generator_for(unit.spec["seed"], "directions"), mask=mask)
    assert all((d[n][~m] == 0).all() for d in directions for n, m in mask.items())
    dataset = data.load(made.study.data)
    images = normalise(dataset.test.images, dataset.mean, dataset.std)
    found = landscape.profile(spec, model, params, buffers, directions, images, dataset.test.labels, mask=mask)
    saved = store.get(unit.key)
    assert torch.equal(found.losses, saved.tensors["losses"])
    assert saved.result["loss_rise"] == pytest.approx(float(found.losses[:, [1, 3]].mean() - found.losses[0, 2]))
    centre = store.get(made.around()[0].unit.key).tensors["losses"][1, 1]
    assert float(centre) == pytest.approx(float(found.losses[0, 2]))


def test_steps_at_which_children_part_are_there_once():
    assert plan(**SETTINGS | {"spawn_epochs": (1.5, 1.0, 1.001)}).spawn_steps == {5: 1.0, 8: 1.6}


def test_bad_settings_are_named():
    for changes, said in (({"spawn_epochs": (0.5, 9)}, r"spawn_epochs must lie between 0 and epochs \(2\), got 9"),
                          ({"spawn_epochs": (1.99,)}, r"spawn_epochs must lie at least half a step before the end \(10 steps"),
                          ({"profile_points": 19}, "profile_points must be one more than a multiple of 4"),
                          ({"spawn_seeds": 5}, r"spawn_seeds must lie in \[0, 2\], the seeds \(0: all of them\), got 5"),
                          ({"statistics_norm": "whatever"}, "statistics_norm must be"),
                          ({"plane_sets": ("unheard",)}, "plane_sets must be chosen from"),
                          ({"layer_arms": ("snip",)}, "layer_arms must be chosen from dense, imp"),
                          ({"train_path_images": -1}, r"train_path_images must be >= 0 \(0: none\), got -1"),
                          ({"path_tolerance": 2.0}, "path_tolerance must lie in")):
        with pytest.raises(ValueError, match=said):
            plan(**SETTINGS | changes)


def test_what_is_measured_follows_the_arms():
    study = load_study("smoke", {"arms": "imp"})
    assert study.between_arms == ("imp",)
    assert study.spawn_arms == ("dense", "imp")
    assert load_study("smoke", {"arms": "random"}).between_arms == ("dense",)
    assert load_study("tickets", {"epochs": 2}).spawn_epochs == (0.25, 0.5, 1.0)


def test_old_keys_stay():
    """What is measured beside a path changes no key of the path, of the networks, or of their tickets."""
    plain = plan(arms=("imp",), robust_arms=("dense",), points=5)
    more = plan(**SETTINGS | {"arms": ("imp",), "seeds": 1, "at_rounds": (2,), "spawn_arms": ("imp",), "between_arms": ("imp",)})
    assert {e.unit.key for e in plain.connectivity()} == {e.unit.key for e in more.connectivity()}
    assert set(closure([e.unit for e in plain.tickets()])) == set(closure([e.unit for e in more.tickets()]))


def test_the_square_of_one_arm_is_there_in_both_forms(done):
    store, made = done
    rows = made.square_forms()
    assert [e.place["form"] for e in rows] == ["bilinear", "diagonals"]
    assert rows[0].unit.key == made.square()[0].unit.key
    whole, flat = (store.get(e.unit.key) for e in rows)
    assert whole.result["off"] == flat.result["off"] > 0
    for row, column in ((0, 0), (-1, -1)):  # the two children that the plane holds
        assert torch.equal(whole.tensors["losses"][row, column], flat.tensors["losses"][row, column])
    assert not torch.equal(whole.tensors["losses"], flat.tensors["losses"])
    assert len(plan(**SETTINGS | {"square_arms": ()}).square_forms()) == 0
