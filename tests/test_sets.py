"""Small sets as artifacts: what methods need and leave, soft labels, other people's sets, the memory bound."""
from __future__ import annotations

import sys

import pytest
import torch
from small_study import contents, plan, same

from dpkit import data, distill, models, training
from dpkit.data import Split, normalise, zca
from dpkit.distill import METHODS, export, published
from dpkit.models import ModelSpec
from dpkit.stages import FRAMES, closure, compute, footprint, run
from dpkit.stages.make import initial
from dpkit.stages.making import SETS
from dpkit.stages.sets import network_of, read_set, trajectories
from dpkit.stages.unit import Context
from dpkit.store import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with each of the small sets of a tiny study, the generator's too."""
    store = Store(tmp_path_factory.mktemp("sets") / "store")
    study = plan(generator_steps=2, generator_width=8, generator_batch=8)
    report = compute(store, [study.small_set(name, 0) for name in (*SETS, "dm_soft")], device="cpu", workers=1)
    assert report.errors == {}
    return store, study


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.mark.parametrize("name", SETS)
def test_each_set_has_its_budget_and_its_recipe(made, name):
    store, study = made
    artifact, factor = store.get(study.small_set(name, 0).key), 2 if name == "idc" else 1
    assert artifact.tensors["images"].shape == (10, 3, 16, 16)
    assert artifact.tensors["images"].dtype == torch.float32
    assert artifact.tensors["labels"].tolist() == list(range(10))
    assert (artifact.result["factor"], artifact.result["training_images"]) == (factor, 10 * factor**2)
    assert artifact.result["recipe"]["space"] == "pixels"
    assert artifact.result["recipe"]["train"]["epochs"] == 3 * 4 // factor**2
    method = METHODS[SETS[name]]
    assert (len(artifact.result["history"]) > 0) == method.learned
    real = {row.tobytes() for row in (data.load(study.study.data).train.images.float() / 255).numpy()}
    chosen = [image.numpy().tobytes() in real for image in artifact.tensors["images"]]
    assert all(chosen) if not method.learned else not any(chosen)


def test_learned_settings_reach_the_training(made):
    store, study = made
    artifact = store.get(study.small_set("mtt", 0).key)
    lr = artifact.result["recipe"]["learned"]["lr"]
    assert artifact.result["recipe"]["train"]["lr"] == lr != study.study.set_lr
    unit = next(e.unit for e in study.distillation() if e.place == {"set": "mtt", "seed": 0})
    found = run.make(Context(store), [unit])
    assert found == {unit.key: None}
    spec, dataset = ModelSpec(**study.model), data.load(study.study.data)
    start = [{n: t[None] for n, t in part.items()} for part in initial(unit.spec)]
    train = training.TrainSpec(**unit.spec["train"]).replace(lr=lr)
    fit = training.fit(train, spec, read_set(artifact), dataset.mean, dataset.std, *start, [unit.spec["noise_seed"]])
    assert all(torch.equal(fit.params[n][0], t) for n, t in network_of(store.get(unit.key))[0].items())


def test_methods_see_the_networks_that_they_ask_for(made):
    store, study = made
    for name, count, times in (("mtt", 1, 3), ("herding", 1, 1), ("k_center", 1, 1), ("el2n", 1, 1), ("idc", 0, 0)):
        unit = study.small_set(name, 0)
        found = trajectories(unit, {role: store.get(p.key) for role, p in unit.parents.items()})
        assert [len(t) for t in found] == [times] * count
    expert = store.get(study.expert(0).key)
    unit = study.small_set("mtt", 0)
    first = trajectories(unit, {"network0": expert})[0]
    assert all(torch.equal(first[0][0][n], t) for n, t in initial(study.expert(0).spec)[0].items())
    assert all(torch.equal(first[-1][0][n], t) for n, t in network_of(expert)[0].items())
    pool = plan(distill_pool=2).small_set("idc", 0)
    assert sorted(pool.parents) == ["network0", "network1"]
    assert pool.spec["distill"]["networks"] == "pool"


def test_learned_sets_are_made_as_often_as_asked():
    several = plan(set_seeds=2, evaluation_seeds=4)
    for name in ("idc", "dc", "dm", "mtt", "generator"):
        assert len({several.small_set(name, seed).key for seed in range(4)}) == 2
    assert len({several.small_set("random_real", seed).key for seed in range(4)}) == 4
    assert len({several.small_set("herding", seed).key for seed in range(4)}) == 1
    assert several.small_set("idc", 0).key == plan().small_set("idc", 0).key


# --- soft labels ---
def test_soft_labels_are_the_teachers_probabilities(made):
    store, study = made
    hard, soft = (store.get(study.small_set(name, 0).key) for name in ("dm", "dm_soft"))
    assert torch.equal(hard.tensors["images"], soft.tensors["images"])
    dataset, model = data.load(study.study.data), ModelSpec(**study.model)
    x = normalise(read_set(hard).images, dataset.mean, dataset.std)
    logits, _ = models.forward(model, *network_of(store.get(study.dense(0, "search").key)), x)
    split = read_set(soft)
    torch.testing.assert_close(split.labels, torch.softmax(logits, 1))
    assert soft.result["teacher_agrees"] == pytest.approx(float((logits.argmax(1) == hard.tensors["labels"]).float().mean()))
    # every decoded image of a mosaic has labels of its own
    mosaics = plan().small_set("idc_soft", 0)
    compute(store, [mosaics], device="cpu")
    assert store.get(mosaics.key).tensors["soft"].shape == (40, 10)
    assert len(read_set(store.get(mosaics.key)).labels.unique(dim=0)) > 10
    warm = plan(soft_temperature=4.0).small_set("dm_soft", 0)
    assert warm.key != study.small_set("dm_soft", 0).key


# --- resuming ---
@pytest.mark.parametrize("name, steps", [("dc", 2), ("mtt", 0)])
def test_a_stopped_distillation_goes_on_to_the_same_bits(made, store, monkeypatch, name, steps):
    full, study = made
    monkeypatch.setattr("dpkit.stages.sets.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(sys.modules["dpkit.distill.mtt"], "EVERY", 1)  # the name is its function's too
    unit = study.small_set(name, 0)
    for key in closure(unit.parents.values()):
        artifact = full.get(key)
        store.put(key, **{k: artifact.meta[k] for k in ("stage", "version", "spec", "parents", "label", "result", "seconds")},
                  tensors=artifact.tensors)

    class Stop(BaseException):
        pass

    seen = []

    def stop(key, step, total):
        seen.append(step)
        if len(seen) > steps:
            raise Stop

    with pytest.raises(Stop):
        run.make(Context(store, progress=stop), [unit])
    assert store.partial(unit.key).exists()
    again = []
    run.make(Context(store, progress=lambda key, step, total: again.append(step)), [unit])
    assert again
    assert again[0] > 1
    assert same(contents(store, [unit.key]), contents(full, [unit.key]))


# --- published sets ---
@pytest.fixture
def theirs(tmp_path, made):
    """One set in each published form."""
    store, study = made
    artifact, dataset = store.get(study.small_set("dm", 0).key), data.load(study.study.data)
    split = Split(artifact.tensors["images"], artifact.tensors["labels"])
    export.write(split, tmp_path / "res_DM.pt", "dc", dataset.mean, dataset.std)
    mosaics = store.get(study.small_set("idc", 0).key)
    export.write(Split(mosaics.tensors["images"], mosaics.tensors["labels"]), tmp_path / "data.pt", "idc", factor=2)
    white = zca.whiten(Split(split.images, split.labels), zca.fit(dataset.train.images))
    zeros, ones = torch.zeros(3), torch.ones(3)
    export.write(white, tmp_path / "images_best.pt", "mtt", zeros, ones)
    return tmp_path, split, Split(mosaics.tensors["images"], mosaics.tensors["labels"]), white


def test_published_sets_are_trained_on_as_their_own(theirs, store):
    folder, split, mosaics, white = theirs
    given = (f"theirs={folder / 'res_DM.pt'}", f"tiles={folder / 'data.pt'}@2", f"zca={folder / 'images_best.pt'}@whitened")
    study = plan(published=given, sets=("theirs", "tiles", "zca", "theirs_soft"))
    report = compute(store, [e.unit for e in study.distillation()], device="cpu", workers=1)
    assert report.errors == {}
    found = {name: store.get(study.small_set(name, 0).key) for name in study.study.sets}
    torch.testing.assert_close(found["theirs"].tensors["images"], split.images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["tiles"].tensors["images"], mosaics.images)
    assert len(read_set(found["tiles"])) == 40
    assert found["zca"].result["recipe"]["space"] == "whitened"
    torch.testing.assert_close(found["zca"].tensors["images"], white.images)
    # trained and tested on whitened images, as the recipe says
    unit = next(e.unit for e in study.distillation() if e.place["set"] == "zca")
    dataset, network = data.load(study.study.data), store.get(unit.key)
    test = zca.whiten(dataset.test, zca.fit(dataset.train.images))
    error, _ = training.evaluate(ModelSpec(**study.model), *network_of(network), test.images, test.labels)
    assert network.result["error"] == error


def test_the_file_counts_and_not_where_it_lies(theirs, tmp_path):
    folder, *_ = theirs
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "other.pt").write_bytes((folder / "data.pt").read_bytes())
    first, second = (plan(published=(f"tiles={path}@2",)).small_set("tiles", 0)
                     for path in (folder / "data.pt", tmp_path / "copy" / "other.pt"))
    assert first.key == second.key
    assert first.file != second.file
    assert plan(published=(f"tiles={folder / 'data.pt'}@1",)).small_set("tiles", 0).key != first.key


def test_published_sets_that_do_not_fit_are_refused_before_anything_is_stored(theirs, store):
    folder, *_ = theirs
    for given, line in ((f"tiles={folder / 'data.pt'}", "is in IDC's form, which does not say its factor; add it"),
                        (f"tiles={folder / 'none.pt'}", "does not exist"),
                        (f"white={folder / 'images_best.pt'}", "whitened")):
        with pytest.raises(ValueError, match=line) as caught:
            plan(published=(given,)).small_set(given.partition("=")[0], 0)
        assert "\n" not in str(caught.value)
    soft = plan(published=(f"white={folder / 'images_best.pt'}@whitened",)).small_set("white_soft", 0)
    report = compute(store, [soft], device="cpu", workers=1)
    assert "soft labels need images as pixels" in report.errors[soft.key]
    assert not store.has(soft.key)


def test_a_file_that_changed_after_planning_is_refused(theirs, store):
    folder, *_ = theirs
    unit = plan(published=(f"tiles={folder / 'data.pt'}@2",)).small_set("tiles", 0)
    images, labels = torch.load(folder / "data.pt", weights_only=True)
    torch.save([images.flip(0), labels.flip(0)], folder / "data.pt")
    report = compute(store, [unit], device="cpu", workers=1)
    assert "is not the file any more" in report.errors[unit.key]
    assert published.SPACES == ("pixels", "normalised", "whitened")


# --- memory ---
@pytest.mark.parametrize("name", SETS)
def test_the_memory_of_every_set_is_known_before(name):
    unit = plan().small_set(name, 0)
    need = footprint.memory(unit.stage, unit.spec, {role: p.spec for role, p in unit.parents.items()})
    assert 3e8 < need < 3e9
    wide = plan(width=12).small_set(name, 0)
    assert footprint.memory(wide.stage, wide.spec, {role: p.spec for role, p in wide.parents.items()}) >= need


def test_a_bound_on_memory_reaches_the_method_and_refuses_what_cannot_fit():
    free, bound = plan().small_set("idc", 0), plan(distill_memory=2.0).small_set("idc", 0)
    assert free.key == bound.key  # it changes no result
    assert free.held is None
    assert bound.held == pytest.approx(footprint.allowed_images(bound.spec, 2e9))
    with pytest.raises(ValueError, match=r"distill_memory must be at least 0\.\d\d gigabytes for small set idc, got 0.1; raise "
                                         r"it, or lower real_batch, synthetic_batch or network_batch or width"):
        plan(distill_memory=0.1).small_set("idc", 0)


def test_other_architectures_train_on_the_same_sets(store):
    study = plan(evaluation_archs=("resnet10:2",), sets=("random_real",))
    rows = study.transfer()
    assert [e.place for e in rows] == [{"set": "random_real", "arch": "resnet10", "seed": 0},
                                       {"set": "all_data", "arch": "resnet10", "seed": 0}]
    assert "transfer" in FRAMES
    assert rows[0].unit.parents["images"].key == study.small_set("random_real", 0).key
    assert (rows[0].unit.spec["model"]["arch"], rows[0].unit.spec["model"]["width"]) == ("resnet10", 2)
    compute(store, [e.unit for e in rows], device="cpu", workers=1)
    assert all(0 <= store.get(e.unit.key).result["error"] <= 1 for e in rows)
    assert distill.METHODS["random"].networks == ""
