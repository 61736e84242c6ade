"""A study's settings, and the plan that follows from them before anything is computed."""
from __future__ import annotations

import numpy as np
import pytest

from dpkit.data import DataSpec, load
from dpkit.distill import METHODS
from dpkit.models import ModelSpec, count_prunable
from dpkit.prune import survivors
from dpkit.stages import CHAPTERS, FIELDS, FRAMES, Plan, Study, closure, load_study, parse_share, profiles

IDENTITY = {"kind": "shapes", "train": 400, "test": 200, "shape": [3, 16, 16], "classes": 10, "sha256": "0" * 64}
SMALL = {"width": 4, "epochs": 2, "rewind_epochs": 0.5, "rounds": 2, "at_rounds": (2,), "seeds": 1, "evaluation_seeds": 1}


def plan(identity=IDENTITY, **changes):
    return Plan(Study(**(SMALL | changes)), identity)


def keys(made, *chapters, stage=None):
    """Keys of the chapters' units and all their ancestors."""
    units = closure(e.unit for c in chapters or CHAPTERS for e in made.chapter(c))
    return {key for key, unit in units.items() if stage is None or unit.stage in stage}


# --- settings ---
@pytest.mark.parametrize("name", profiles())
def test_every_profile_gives_a_study_with_a_plan(name):
    study = load_study(name)
    if study.dataset == "shapes":
        assert keys(Plan(study, IDENTITY))


def test_words_are_read_as_the_declared_types():
    study = load_study("smoke", {"lr": "1e-3", "arms": "imp, random", "hessian_arms": "dense", "plane_arms": "dense",
                                 "at_rounds": "1,2", "seeds": "3", "compile": "no", "epochs": 4.0})
    assert (study.lr, study.arms, study.at_rounds, study.seeds) == (0.001, ("imp", "random"), (1, 2), 3)
    assert study.compile is False
    assert study.epochs == 4
    assert type(study.epochs) is int
    assert study.width == load_study("smoke").width


def test_a_file_may_be_a_profile_and_its_words_are_read_too(tmp_path):
    file = tmp_path / "mine.yml"
    file.write_text("lr: 1e-2\nseeds: 4\narms: [imp]\nhessian_arms: [dense]\nplane_arms: [dense]\n")
    study = load_study(str(file), {"seeds": 2})
    assert (study.lr, study.seeds, study.arms) == (0.01, 2, ("imp",))


@pytest.mark.parametrize("profile, overrides, line", [
    ("smok", {}, "unknown profile 'smok'; did you mean smoke?"),
    ("nothing", {}, "unknown profile 'nothing'; "),
    ("none.yml", {}, "profile file none.yml does not exist"),
    ("smoke", {"fractoin": "0.2"}, "unknown parameter 'fractoin'; did you mean fraction?"),
    ("smoke", {"zzz": 1}, "unknown parameter 'zzz'; there are dataset, "),
    ("smoke", {"fraction": "1.0"}, "fraction must lie in (0, 1), got 1.0"),
    ("smoke", {"fraction": "20%"}, "fraction must be a number, got '20%'"),
    ("smoke", {"fraction": 0}, "fraction must lie in (0, 1), got 0.0"),
    ("smoke", {"seeds": "two"}, "seeds must be a whole number, got 'two'"),
    ("smoke", {"seeds": 0}, "seeds must be >= 1, got 0"),
    ("smoke", {"children": 1}, "children must be >= 2, a path needs two ends; got 1"),
    ("smoke", {"arms": "imp,rigl"}, "unknown arm 'rigl'; "),
    ("smoke", {"sets": "gan"}, "sets must be chosen from idc, idc_factor1, dc, dsa, dm, mtt, generator, random_real, herding, "
                               "k_center, el2n, and each with _soft; got gan"),
    ("smoke", {"dm_steps": 0}, "dm_steps must be >= 1, got 0"), ("smoke", {"dc_lr": 0}, "dc_lr "),
    ("smoke", {"dc_distance": "l2"}, "dc_distance must be one of squared, l1, cosine; got 'l2'"),
    ("smoke", {"mtt_student_steps": 0}, "mtt_student_steps must be >= 1, got 0"),
    ("smoke", {"generator_width": 12}, "generator_width must be a multiple of 8, got 12"),
    ("smoke", {"expert_epochs": 0}, "expert_epochs must be >= 1, got 0"),
    ("smoke", {"soft_temperature": 0}, "soft_temperature must be > 0, got 0"),
    ("smoke", {"distill_memory": -1}, "distill_memory must be >= 0, got -1"),
    ("smoke", {"evaluation_archs": "resnet10"}, "evaluation_archs must be ARCH:WIDTH, each once; got 'resnet10'"),
    ("smoke", {"evaluation_archs": "vgg:8"}, "arch must be one of"),
    ("smoke", {"published": "idc=data.pt"}, "published must be NAME=FILE, "),
    ("smoke", {"published": "real=data.pt"}, "published must name a set as nothing else is named, got real, which means all real "
                                             "data; for example my_real=data.pt"),
    ("smoke", {"published": "random=a/data.pt@2"}, "published must name a set as nothing else is named, got random, which means "
                                                   "an arm (a random mask); for example my_random=a/data.pt@2"),
    ("smoke", {"published": "data.pt"}, "published must be NAME=FILE, "),
    ("smoke", {"arms": "random", "plane_arms": "distilled"}, "plane_arms must be chosen from dense, random; got distilled"),
    ("smoke", {"at_rounds": "3"}, "at_rounds must lie in [1, 2], the rounds; got [3]"),
    ("smoke", {"at_rounds": ""}, "at_rounds must name at least one round"),
    ("smoke", {"rewind_epochs": "2"}, "rewind_epochs must lie in (0, 2), got 2"),
    ("smoke", {"dataset": "cifar"}, "dataset must be shapes, cifar10, "),
    ("smoke", {"lr": -1}, "lr must be > 0, got -1"),
    ("smoke", {"set_lr": 0}, "set_lr must be > 0, got 0"),
    ("smoke", {"set_batch": -1}, "set_batch must be >= 0, got -1"),
    ("smoke", {"set_augment": "blur"}, "set_augment must be joined by _ from "),
    ("smoke", {"augment": "color_blur"}, "augment must be joined by _ from "),
    ("smoke", {"distill_distance": "l2"}, "distill_distance must be one of squared, l1, cosine; got 'l2'"),
    ("smoke", {"statistics": "keep"}, "statistics must be one of reestimate, interpolate, repair; got 'keep'"),
    ("smoke", {"scope": "biases"}, "scope must be one of all, weights, norm_only; got 'biases'"),
    ("smoke", {"arch": "vgg"}, "arch must be one of convnet3, "),
    ("smoke", {"width": 0}, "width must be at least 1 channel, got 0"),
    ("smoke", {"points": 1}, "points must "), ("smoke", {"plane_resolution": 1}, "plane_resolution must "),
    ("smoke", {"plane_images": -1}, "plane_images must "), ("smoke", {"hessian_images": 0}, "hessian_images must "),
    ("smoke", {"probes": 0}, "probes must "), ("smoke", {"lanczos_steps": 0}, "lanczos_steps must "),
    ("smoke", {"distill_outer": 0}, "distill_outer must be >= 1"), ("smoke", {"factor": 0}, "factor must be >= 1"),
    ("smoke", {"set_epochs": 0}, "set_epochs must be >= 1, got 0"), ("smoke", {"ipc": 0}, "ipc must be >= 1, got 0"),
])
def test_a_wrong_setting_is_refused_in_one_line(profile, overrides, line):
    with pytest.raises(ValueError) as caught:
        load_study(profile, overrides)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, line", [
    ("- a\n- b\n", "must be a list of `name: value` lines"), ("a: [1\n", "is not readable YAML"), ("", "must be a list"),
    ("lr: fast\n", "lr must be a number, got 'fast'"), ("rate: 1\n", "unknown parameter 'rate'"),
])
def test_a_profile_that_is_none_is_refused(tmp_path, text, line):
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(ValueError, match=line) as caught:
        load_study(str(tmp_path / "mine.yml"))
    assert "\n" not in str(caught.value)


def test_settings_reach_the_specifications():
    study = Study(lr=0.3, momentum=0.8, weight_decay=0.01, schedule="onecycle", precision="bf16", augment="flip",
                  cutmix=0.25, epochs=7, batch_size=32, ipc=3, factor=2, distill_lr=0.04, distill_real_batch=5, scope="weights")
    train = study.train
    assert (train.lr, train.momentum, train.weight_decay, train.schedule) == (0.3, 0.8, 0.01, "onecycle")
    assert (train.precision, train.augment.operations, train.cutmix, train.batch_size) == ("bf16", "flip", 0.25, 32)
    idc = study.distill("idc", 2)
    assert (idc.ipc, idc.factor, idc.lr, idc.real_batch) == (3, 2, 0.04, 5)
    assert {study.distill(method).ipc for method in METHODS} == {3}
    assert [study.distill(m).distance for m in ("dc", "dsa")] == ["cosine"] * 2
    other = Study(dc_outer=4, dc_lr=0.2, dc_distance="l1", dm_steps=7, dm_lr=3.0, mtt_steps=8, mtt_lr_img=5.0, generator_steps=9)
    both = [other.distill(m) for m in ("dc", "dsa")]
    assert [(found.outer, found.lr, found.distance) for found in both] == [(4, 0.2, "l1")] * 2
    assert (other.distill("dm").steps, other.distill("dm").lr) == (7, 3.0)
    assert (other.distill("mtt").steps, other.distill("mtt").lr_img, other.distill("generator").steps) == (8, 5.0, 9)
    assert study.prune.scope == "weights"
    assert study.model(IDENTITY) == ModelSpec(width=16, image_size=16)
    assert study.replace(arch="resnet10").model(IDENTITY | {"shape": [3, 224, 224]}).stem == "imagenet"
    with pytest.raises(ValueError, match="images must be square, got 16 x 20"):
        study.model(IDENTITY | {"shape": [3, 16, 20]})


def test_sets_that_decode_into_fewer_images_take_as_many_steps():
    study = Study(set_epochs=50, factor=2, ipc=10, batch_size=20)
    assert study.train_on_set(40).epochs == 50
    assert study.train_on_set(10).epochs == 200
    assert study.train_on_set(40).steps(400) == study.train_on_set(10).steps(100)


# --- keys ---
def test_a_plan_is_the_same_each_time_and_its_keys_are_distinct():
    one, other = plan(), plan()
    for frame in FRAMES:
        rows, again = getattr(one, frame)(), getattr(other, frame)()
        assert [e.unit.key for e in rows] == [e.unit.key for e in again]
        places = [tuple(sorted(e.place.items())) for e in rows]
        assert len(set(places)) == len(places)
        if not frame.startswith("search"):  # arms start their searches from one dense network, and some share a set
            assert len({e.unit.key for e in rows}) == len(places)


def test_keys_do_not_depend_on_where_the_data_lie(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"train_images": rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), "train_labels": np.arange(40) % 4,
              "test_images": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), "test_labels": np.arange(8) % 4}
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / f"{name}.npz", **arrays)
        dataset = f"npz:{tmp_path / name / f'{name}.npz'}"
        found.append(keys(plan(load(DataSpec(dataset=dataset)).identity, dataset=dataset)))
    assert found[0] == found[1]
    arrays["train_images"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "three.npz", **arrays)
    changed = load(DataSpec(dataset=f"npz:{tmp_path / 'three.npz'}")).identity
    assert not keys(plan(changed), stage=("network", "distill")) & found[0]


MAKING = ("network", "ticket", "distill")
MEASURING = {"masks", "early_bird", "robustness", "path", "alignment", "plane", "hessian"}


@pytest.mark.parametrize("change, stages", [
    ({"points": 7}, {"path", "alignment"}), ({"statistics": "interpolate"}, {"path", "alignment", "plane"}),
    ({"probes": 3}, {"hessian"}),
    ({"plane_images": 50}, {"plane"}), ({"hessian_images": 60}, {"hessian"}), ({"lanczos_steps": 5}, {"hessian"}),
    ({"fraction": 0.3}, {"ticket", "network", *MEASURING}), ({"sets": ("idc",)}, set()),
    ({"severities": (1,)}, {"robustness"}), ({"early_bird_points": 3}, {"network", "early_bird"}), ({"large_batch": 99}, set()),
    ({"distill_lr": 0.1}, {"distill", "network", "ticket", *MEASURING}), ({"rounds": 4}, set()),
    ({"evaluation_seeds": 2}, set()), ({"children": 4}, set()), ({"seeds": 2}, set()), ({"at_rounds": (1, 2)}, set()),
])
def test_a_setting_changes_the_keys_of_what_depends_on_it_alone(change, stages):
    units = closure(e.unit for c in CHAPTERS for e in plan().chapter(c))
    after = keys(plan(**change))
    if "sets" in change:
        units = closure(e.unit for e in plan().chapter("tickets"))
    assert {unit.stage for key, unit in units.items() if key not in after} == stages


def test_a_prune_setting_leaves_dense_networks_alone_and_another_run_leaves_nothing():
    base = plan()
    dense = {base.dense(0, "search").key, base.dense(0, "child", 1).key}
    for change in ({"fraction": 0.3}, {"scope": "weights"}, {"distill_lr": 0.1}, {"arms": ("imp", "random", "distilled",
                                                                                           "random_real")}):
        assert dense <= keys(plan(**change))
    assert not keys(plan(run=1)) & keys(base)
    assert not keys(plan(lr=0.2)) & {*dense, base.child("distilled", 0, 2, 0).key}
    assert base.searched("distilled", 0, 0).key in keys(plan(lr=0.2))  # which never saw that learning rate


def test_searches_begin_with_one_dense_network_and_end_where_they_should():
    made = plan(rounds=3, at_rounds=(3,))
    dense = made.dense(0, "search")
    assert made.searched("imp", 0, 0) is made.searched("ltr", 0, 0) is dense
    assert dense.spec["snapshots"] == [made.rewind_step]
    assert made.rewind_step == round(0.5 * 7)  # 400 images in batches of 64
    imp, ltr = made.ticket("imp", 0, 1), made.ticket("ltr", 0, 1)
    assert imp.parents == {"network": dense}
    assert ltr.parents == {"network": dense, "start": dense}
    assert made.ticket("imp", 0, 2).parents["previous"] is imp
    assert made.child("ltr", 0, 3, 0).spec["first_step"] == made.rewind_step
    assert made.child("imp", 0, 3, 0).spec["first_step"] == 0
    assert made.ticket("random", 0, 3).parents == {}
    assert made.searched("distilled", 0, 0).parents["images"] is made.small_set("idc", 0)
    assert made.searched("random_real", 0, 1).parents["ticket"] is made.ticket("random_real", 0, 1)
    assert "images" not in made.child("distilled", 0, 3, 0).parents  # children see real data


def test_children_share_their_start_and_differ_in_noise():
    made = plan()
    a, b = made.child("imp", 0, 2, 0), made.child("imp", 0, 2, 1)
    assert a.spec["init_seed"] == b.spec["init_seed"]
    assert a.spec["noise_seed"] != b.spec["noise_seed"]
    assert a.parents["ticket"] is b.parents["ticket"]
    # arms are paired: the same noise for the same child of each arm
    assert a.spec["noise_seed"] == made.child("random", 0, 2, 0).spec["noise_seed"]
    assert made.dense(0, "search").spec["noise_seed"] not in (a.spec["noise_seed"], b.spec["noise_seed"])


def test_how_many_and_where():
    made = plan(seeds=3, children=3, at_rounds=(1, 2), evaluation_seeds=4)
    assert len(made.data()) == 3
    assert len(made.distillation()) == 4 * len(made.study.sets) + 3
    assert made.transfer() == []
    places = 1 + len(made.study.arms) * 2
    assert len(made.tickets()) == places * 3 * 3
    assert len(made.connectivity()) == places * 3 * 3  # three pairs
    assert len(made.hessian()) == len(made.robustness()) == 4 * 3
    assert (len(made.masks()), len(made.early_bird())) == (2 * 3, 2 * 3)
    assert len(made.landscape()) == 2
    counts = survivors(count_prunable(made.study.model(IDENTITY)), 0.2, 2)
    assert made.counts == counts
    assert {e.place["percent"] for e in made.tickets()} == {0, 20, 36}
    assert {e.place["pair"] for e in made.connectivity()} == {"0-1", "0-2", "1-2"}


def test_ancestors_come_first():
    units = closure(e.unit for c in CHAPTERS for e in plan().chapter(c))
    seen = set()
    for key, unit in units.items():
        assert {p.key for p in unit.parents.values()} <= seen
        seen.add(key)


# --- shares ---
@pytest.mark.parametrize("chapter", CHAPTERS)
@pytest.mark.parametrize("of", [1, 2, 3, 50])
def test_shares_are_a_partition(chapter, of):
    made = plan(seeds=2)
    shares = [[u.key for u in made.share(chapter, f"{i}/{of}")] for i in range(1, of + 1)]
    everything = [key for share in shares for key in share]
    assert sorted(everything) == sorted(e.unit.key for e in made.chapter(chapter))
    assert len(set(everything)) == len(everything)


def test_work_on_one_ticket_stays_in_one_share():
    made = plan(seeds=2, children=3)
    for share in ("1/3", "2/3", "3/3"):
        mine = {u.key for u in made.share("connectivity", share)}
        entries = made.chapter("connectivity")
        whole = {(e.place["arm"], e.place["seed"]) for e in entries if e.unit.key in mine}
        assert {e.unit.key for e in entries if (e.place["arm"], e.place["seed"]) in whole} == mine
        assert len(mine) > 0


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "1/0", "1/2/3", "-1/2", "", "1.0/2", "1/ 2"])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="share must be i/n with 1 <= i <= n, such as 2/3; got"):
        parse_share(share)


def test_a_share_is_two_numbers():
    assert parse_share("2/3") == (2, 3)
    assert set(FIELDS) >= {"fraction", "seeds", "dataset"}
