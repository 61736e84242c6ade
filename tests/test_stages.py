"""Units become artifacts: what each one holds, what a second call does, and what is left when something goes wrong."""
from __future__ import annotations

import functools
import itertools

import pytest
import torch
from small_study import contents, plan, same, units

from dpkit import data, prune, training
from dpkit.data import normalise
from dpkit.models import ModelSpec
from dpkit.stages import Context, closure, compute, make, missing, run
from dpkit.stages.make import initial, network_of, read_set
from dpkit.store import Store


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A store with the whole tiny study, made in this process, with its report."""
    store = Store(tmp_path_factory.mktemp("whole") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SMALL", float("inf"))
        report = compute(store, units(plan()), device="cpu")
    return store, report


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def here(monkeypatch):
    """Compute in this process however much there is."""
    monkeypatch.setattr(run, "SMALL", float("inf"))


# --- the whole study ---
def test_everything_is_made_once(done):
    store, report = done
    everything = closure(units(plan()))
    assert sorted(report.made) == sorted(everything) == sorted(store.keys())
    assert report.failed == report.errors == {}
    assert list(store.verify()) == []
    assert list((store.root / "tmp").iterdir()) == []
    order = {key: i for i, key in enumerate(report.made)}
    assert all(order[p.key] < order[key] for key, unit in everything.items() for p in unit.parents.values())


def test_a_second_call_makes_nothing(done):
    store, _ = done
    before = {p: p.stat().st_mtime_ns for p in store.root.rglob("*")}
    report = compute(store, units(plan()), device="cpu")
    assert report.made == []
    assert {p: p.stat().st_mtime_ns for p in store.root.rglob("*")} == before


def test_an_artifact_says_what_made_it(done):
    store, _ = done
    for key, unit in closure(units(plan())).items():
        meta = store.get(key).meta
        assert (meta["stage"], meta["label"]) == (unit.stage, unit.label)
        assert meta["parents"] == {role: p.key for role, p in unit.parents.items()}
        assert meta["seconds"] >= 0
        assert meta["device"] == "cpu"
        assert meta["data"]["dataset"] == "shapes"


def test_a_network_holds_what_it_measured(done):
    store, _ = done
    made = plan()
    dataset = data.load(made.study.data)
    model = ModelSpec(**made.model)
    for unit in (made.dense(0, "search"), made.child("ltr", 0, 2, 1)):
        artifact = store.get(unit.key)
        params, buffers = network_of(artifact)
        test = normalise(dataset.test.images, dataset.mean, dataset.std)
        error, loss = training.evaluate(model, params, buffers, test, dataset.test.labels)
        assert (artifact.result["error"], artifact.result["loss"]) == (error, loss)
    steps = 2 * 5  # epochs of 160 images in batches of 32
    assert store.get(made.dense(0, "search").key).result["steps"] == steps
    assert store.get(made.dense(0, "search").key).result["points"] == 320
    assert store.get(made.child("ltr", 0, 2, 0).key).result["steps"] == steps - made.rewind_step


@pytest.mark.parametrize("which", ["child of ltr", "search of distilled"])
def test_a_network_is_trained_from_its_ticket_on_its_images(done, which):
    store, _ = done
    made = plan()
    unit = made.child("ltr", 0, 2, 1) if which == "child of ltr" else made.searched("distilled", 0, 1)
    dataset, ticket = data.load(made.study.data), store.get(unit.parents["ticket"].key)
    split = read_set(store.get(unit.parents["images"].key)) if "images" in unit.parents else dataset.train
    start = [{n: t[None] for n, t in part.items()} for part in (*network_of(ticket), ticket.group("mask"))]
    found = training.fit(training.TrainSpec(**unit.spec["train"]), ModelSpec(**made.model), split, dataset.mean, dataset.std,
                         *start[:2], [unit.spec["noise_seed"]], masks=start[2], first_step=unit.spec["first_step"])
    stored = network_of(store.get(unit.key))[0]
    assert all(torch.equal(found.params[n][0], t) for n, t in stored.items())


def test_a_ticket_holds_its_mask_and_starts_where_it_should(done):
    store, _ = done
    made = plan()
    dense = store.get(made.dense(0, "search").key)
    starts = {"imp": initial(made.dense(0, "search").spec), "ltr": network_of(dense, f"{made.rewind_step}/"),
              "random": initial(made.dense(0, "search").spec)}
    for arm, (params, _) in starts.items():
        masks = [store.get(made.ticket(arm, 0, r).key).group("mask") for r in ((2,) if arm == "random" else (1, 2))]
        ticket = store.get(made.ticket(arm, 0, 2).key)
        assert prune.surviving(masks[-1]) == ticket.result["surviving"] == made.counts[2]
        assert ticket.result["sparsity"] == pytest.approx(1 - made.counts[2] / made.counts[0])
        for name, weight in ticket.group("params").items():
            assert torch.equal(weight, torch.where(masks[-1][name], params[name], 0.0) if name in masks[-1] else params[name])
        assert all(not (masks[-1][n] & ~masks[0][n]).any() for n in masks[0])
        child = store.get(made.child(arm, 0, 2, 0).key).group("params")
        assert all(not child[n][~m].any() for n, m in masks[-1].items())
    trained = network_of(dense)[0]
    first = store.get(made.ticket("imp", 0, 1).key).group("mask")
    full = {n: torch.ones_like(m) for n, m in first.items()}
    assert prune.jaccard(first, prune.keep_highest(prune.magnitude(trained, full), full, made.counts[1])) == 1


def test_small_sets_hold_their_recipe_and_train_what_follows(done):
    store, _ = done
    made = plan()
    for name, factor in (("idc", 2), ("idc_factor1", 1), ("random_real", 1), ("herding", 1)):
        artifact = store.get(made.small_set(name, 0).key)
        assert artifact.result["stored_images"] == 10
        assert artifact.result["training_images"] == len(read_set(artifact)) == 10 * factor**2
        recipe = artifact.result["recipe"]
        assert recipe["train"] == made.study.train_on_set(factor**2).to_dict()
        assert recipe["mean"] == data.load(made.study.data).mean.tolist()
        assert len(artifact.result["history"]) == (2 if name.startswith("idc") else 0)
    searched = store.get(made.searched("distilled", 0, 0).key)
    assert searched.result["points"] == made.study.train_on_set(4).epochs * 40


def test_measurements_fit_the_networks_that_they_measure(done):
    store, _ = done
    made = plan()
    for entry in made.connectivity():
        path = store.get(entry.unit.key)
        ends = [store.get(entry.unit.parents[name].key).result["error"] for name in "ab"]
        assert path.tensors["errors"][[0, -1]].tolist() == pytest.approx(ends)
        expected = float(path.tensors["errors"].max()) - sum(ends) / 2
        assert path.result["error_barrier"] == pytest.approx(expected, abs=1e-6)
    for entry in made.hessian():
        found = store.get(entry.unit.key)
        arm = entry.place["arm"]
        assert found.result["surviving"] == made.counts[0 if arm == "dense" else 2] == found.tensors["diagonal"].numel()
    plane = store.get(made.landscape()[0].unit.key)
    assert plane.tensors["errors"].shape == (3, 3)


# --- the same bits however it is made ---
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_same_bits(done, store, monkeypatch, workers):
    monkeypatch.setattr(run, "SMALL", 0)
    wanted = [plan().small_set("idc", 0), plan().ticket("imp", 0, 1), plan().dense(0, "child", 1)]
    seen = []
    report = compute(store, wanted, device="cpu", workers=workers, observe=seen.append)
    assert sorted(report.made) == sorted(closure(wanted))
    assert same(contents(store), contents(done[0], closure(wanted)))
    assert (seen[-1].done, seen[-1].units, seen[-1].running) == (len(report.made), len(report.made), ())
    assert seen[-1].work == pytest.approx(seen[-1].total)
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen))


def test_an_interrupted_study_goes_on_to_the_same_end(done, store, here):
    some = units(plan(), "data") + [plan().ticket("imp", 0, 1)]
    first = compute(store, some, device="cpu")
    assert len(first.made) == 3
    assert not set(missing(store, units(plan()))) & set(first.made)
    second = compute(store, units(plan()), device="cpu")
    assert not set(second.made) & set(first.made)
    assert same(contents(store), contents(done[0]))


class Stop(BaseException):
    """As Ctrl-C, but no other's."""


@pytest.mark.parametrize("kind, after", [("network", 5), ("idc", 1)])
def test_a_unit_stopped_in_the_middle_goes_on_from_its_checkpoint(done, store, monkeypatch, kind, after):
    for room in ("make", "sets"):
        monkeypatch.setattr(f"dpkit.stages.{room}.CHECKPOINT_SECONDS", -1.0)
    unit = plan().dense(0, "search") if kind == "network" else plan().small_set("idc", 0)
    steps = []

    def stop(key, step, total):
        steps.append(step)
        if len(steps) > after:
            raise Stop

    with pytest.raises(Stop):
        run.make(Context(store, progress=stop), [unit])
    assert not store.has(unit.key)
    assert store.partial(unit.key).exists()
    steps.clear()
    run.make(Context(store, progress=lambda key, step, total: steps.append((step, total))), [unit])
    assert steps == [(6, 10), (7, 10), (8, 10), (9, 10), (10, 10)] if kind == "network" else [(2, 2)]
    assert not store.partial(unit.key).exists()
    assert same(contents(store), contents(done[0], [unit.key]))


def populate(store, made, wanted):
    """Make the parents of some units, then the units together."""
    parents = {p.key: p for unit in wanted for p in unit.parents.values()}
    compute(store, parents.values(), device="cpu")
    run.make(Context(store), wanted)


def test_networks_made_as_a_population_equal_those_made_alone(done, store, here, monkeypatch):
    made = plan()
    wanted = [made.child(arm, 0, 2, child) for arm in ("imp", "random") for child in (0, 1)]
    populate(store, made, wanted)
    keys = [u.key for u in wanted]
    assert same(contents(store, keys), contents(done[0], keys))


def test_networks_stopped_together_go_on_in_any_company(done, store, monkeypatch):
    monkeypatch.setattr(make, "CHECKPOINT_SECONDS", -1.0)
    made = plan()
    wanted = [made.child(arm, 0, 2, child) for arm in ("imp", "random") for child in (0, 1)]
    compute(store, [p for unit in wanted for p in unit.parents.values()], device="cpu")

    def stopped(units, after):
        def stop(key, step, total):
            if step > after:
                raise Stop

        with pytest.raises(Stop):
            run.make(Context(store, progress=stop), units)

    per_epoch = made.study.train.steps_per_epoch(made.identity["train"])
    stopped(wanted[:2], per_epoch)
    saved = [store.load_partial(unit.key) for unit in wanted]
    assert [int(found["step"]) if found else 0 for found in saved] == [per_epoch, per_epoch, 0, 0]
    assert all(float(found["cpu_seconds"]) > 0 for found in saved[:2])
    steps = []
    run.make(Context(store, progress=lambda key, step, total: steps.append(step)), wanted[1:])
    whole = made.study.train.steps(made.identity["train"])
    assert steps == [*range(per_epoch + 1, whole + 1), *range(1, whole + 1)]  # the one that was stopped, then the others
    run.make(Context(store), wanted[:1])
    assert not any(store.partial(unit.key).exists() for unit in wanted)
    keys = [u.key for u in wanted]
    assert same(contents(store, keys), contents(done[0], keys))


def test_networks_trained_with_vmap_agree_with_those_made_alone(done, store, here, monkeypatch):
    made = plan()
    wanted = [made.child(arm, 0, 2, child) for arm in ("imp", "random") for child in (0, 1)]
    monkeypatch.setattr(training, "fit", functools.partial(training.fit, form="vmap"))
    parents = [p for unit in wanted for p in unit.parents.values()]
    for key in closure(parents):
        artifact = done[0].get(key)
        store.put(key, tensors=artifact.tensors, **{n: artifact.meta[n] for n in (
            "stage", "version", "spec", "parents", "result", "seconds", "label")})
    run.make(Context(store), wanted)
    for unit in wanted:
        alone, together = done[0].get(unit.key), store.get(unit.key)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(together.tensors[name], tensor, atol=2e-3, rtol=1e-2)
        assert together.result["loss"] == pytest.approx(alone.result["loss"], rel=1e-2)


def test_populations_are_of_networks_that_share_their_settings(store, monkeypatch):
    sizes, single = [], run.make

    def spy(context, group):
        sizes.append([unit.label for unit in group])
        assert len({(u.stage, str(u.spec.get("train")), u.spec.get("first_step"), str(u.spec.get("snapshots")),
                     u.parents["images"].key if "images" in u.parents else "") for u in group}) == 1
        return single(context, group)

    monkeypatch.setattr(run, "make", spy)
    todo = missing(store, units(plan(), "tickets"))
    whole = run._Run(store, todo, "cpu", data_root="data", observe=None)
    whole.here(16)
    assert sorted(whole.report.made) == sorted(todo)
    assert max(len(group) for group in sizes) >= 4  # children of several arms
    assert all(len(group) == 1 for group in sizes if "ticket" in group[0] and "child" not in group[0])


def test_what_is_missing_is_the_unit_and_what_it_needs(done, store):
    unit = plan().ticket("imp", 0, 2)
    assert list(missing(done[0], [unit])) == []
    assert set(missing(store, [unit])) == set(closure([unit]))
    dense = plan().dense(0, "search")
    run.make(Context(store), [dense])
    assert set(missing(store, [unit])) == set(closure([unit])) - {dense.key}


def test_stages_are_registered_under_the_names_that_are_stored():
    # a new version makes every stored result of that stage stale: change it when the mathematics changes, and only then
    from dpkit.stages import STAGES

    first = ("distill", "published", "soften", "network", "ticket", "masks", "early_bird", "robustness", "path", "layers",
             "plane", "square", "around", "profile", "trajectory", "sharpness")
    # distances by layer and permutations; no curvature is a failure; what results are of; early steps of the edge
    second = ("alignment", "hessian", "spectrum", "diagonal", "removed", "edge")
    assert {name: s.version for name, s in STAGES.items()} == dict.fromkeys(first, 1) | dict.fromkeys(second, 2)
    assert STAGES["network"].many is make.train_many
