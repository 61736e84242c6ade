"""Factorial designs: files that are none are refused, effects against a least-squares fit, what the book's own design says."""
from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report_change import made

from dpkit import project, report, stages
from dpkit.report import searching
from dpkit.report.effects import effect, effect_name
from dpkit.statistics import mean_interval
from dpkit.store import Store, key_for

SMALL = """profile: smoke
settings: {seeds: 2}
factors: [noise, time]
runs:
  - {noise: low, time: short, set: {set_lr: 0.1}}
  - {noise: high, time: short, set: {set_lr: 0.2}}
  - {noise: low, time: long, set: {set_lr: 0.3, seeds: 3}}
  - {noise: high, time: long, set: {set_lr: 0.4}}
"""
CORNERS = list(itertools.product((-1, 1), repeat=3))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def test_a_design_gives_each_run_its_levels_and_settings(tmp_path):
    (tmp_path / "d.yml").write_text(SMALL)
    found = stages.read_design(tmp_path / "d.yml")
    assert (found.profile, found.factors, found.levels) == ("smoke", ("noise", "time"), (("low", "high"), ("short", "long")))
    assert found.runs == {(-1, -1): {"seeds": 2, "set_lr": 0.1}, (1, -1): {"seeds": 2, "set_lr": 0.2},
                          (-1, 1): {"seeds": 3, "set_lr": 0.3}, (1, 1): {"seeds": 2, "set_lr": 0.4}}
    assert [found.name(signs) for signs in found.runs] == ["low-short", "high-short", "low-long", "high-long"]


@pytest.mark.parametrize("old, new, line", [
    ("profile: smoke\n", "", "must have profile, factors and runs, and may have settings; got settings, factors, runs"),
    ("settings:", "setting:", "must have profile, factors and runs, and may have settings; got profile, setting"),
    ("{seeds: 2}", "[seeds]", "factors must be a list of different names in small letters, settings `name: value` lines"),
    ("[noise, time]", "[noise, noise]", "factors must be a list of different names"),
    ("[noise, time]", "[Noise, time]", "factors must be a list of different names"),
    ("[noise, time]", "noise", "factors must be a list of different names"),
    ("time: long, set: {set_lr: 0.4}", "set: {set_lr: 0.4}", "each run must have a level of noise, time and `set` with its "),
    ("set: {set_lr: 0.1}", "set: 0.1", "each run must have a level of noise, time and `set`"),
    ("noise: high, time: long", "noise: higher, time: long", "factor noise must have two levels, got low, high, higher"),
    ("noise: high, time: long", "noise: low, time: long", "must have each combination of levels once, 4 runs; got 4, 3 of them"),
    ("  - {noise: high, time: long, set: {set_lr: 0.4}}\n", "", "must have each combination of levels once, 4 runs; got 3, 3 of"),
    ("runs:", "runs: [", "is not readable YAML"),
])
def test_a_file_that_is_no_full_design_is_refused_in_one_line(tmp_path, old, new, line):
    assert old in SMALL
    (tmp_path / "d.yml").write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError) as caught:
        stages.read_design(tmp_path / "d.yml")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_design_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"design .*none\.yml does not exist"):
        stages.read_design(tmp_path / "none.yml")
    with pytest.raises(ValueError, match="cannot be read"):
        stages.read_design(tmp_path)


def test_effects_are_those_of_a_least_squares_fit():
    generator = np.random.default_rng(0)
    values = {signs: float(generator.normal()) for signs in CORNERS}
    several = [chosen for size in (1, 2, 3) for chosen in itertools.combinations(range(3), size)]
    table = np.array([[1.0, *(np.prod([signs[i] for i in chosen]) for chosen in several)] for signs in CORNERS])
    fitted = np.linalg.lstsq(table, np.array([values[signs] for signs in CORNERS]), rcond=None)[0]
    # an effect is the way from -1 to +1, a coefficient half of it
    assert [effect(values, chosen) for chosen in several] == pytest.approx(2 * fitted[1:])


def test_effects_are_computed_initialisation_by_initialisation(store):
    name = "connectivity.imp.barrier@59"
    per_seed = {signs: {seed: 0.1 * seed + 0.02 * signs[0] * (1 + seed) + 0.03 * signs[1] * signs[2] for seed in range(3)}
                for signs in CORNERS}
    del per_seed[1, 1, 1][1]  # a network that diverged
    runs = {signs: [made(store, name, values, tag=str(signs))] for signs, values in per_seed.items()}
    found = {n.name: n for n in report.effects(store, runs, ["noise", "time", "step"])}
    assert len(found) == 7
    mean, low, high = mean_interval([0.04, 0.12])
    noise = found["connectivity.imp_effect_of_noise.barrier@59"]
    assert (noise.value, noise.n, noise.low, noise.high) == pytest.approx((mean, 2, low, high))
    assert found["connectivity.imp_effect_of_time.barrier@59"].value == pytest.approx(0)
    both = found[effect_name(name, ["time", "step"])]
    assert (both.value, both.low, both.high) == pytest.approx((0.06, 0.06, 0.06))
    assert set(store.get(both.key).meta["parents"].values()) == {some[0].key for some in runs.values()}


def test_only_what_all_runs_have_and_what_differs_has_effects(store):
    same = made(store, "tickets.dense.accuracy", {0: 0.9})
    runs = {}
    for signs in CORNERS:
        ratio = made(store, "hessian.a_over_b.trace", {0: 2.0 + signs[0]}, "ratio", str(signs))
        share = made(store, "connectivity.imp.stable", {0: 1.0, 1: float(signs[0] > 0)}, "share", str(signs))
        apart = made(store, "tickets.ltr.accuracy", {CORNERS.index(signs): 0.5}, tag=str(signs))  # no initialisation in common
        lacking = [made(store, "tickets.imp.accuracy", {0: 0.5}, tag=str(signs))] * (signs != (1, 1, 1))
        runs[signs] = [same, ratio, share, apart, *lacking]
    assert report.effects(store, runs, ["noise", "time", "step"]) == []
    del runs[1, 1, 1]
    with pytest.raises(ValueError, match="effects of 3 factors need 8 runs, one for each combination of levels; got 7"):
        report.effects(store, runs, ["noise", "time", "step"])


def test_the_books_design_varies_noise_and_time_eightfold_and_each_alone():
    found = stages.read_design(project.root() / "book" / "search-noise" / "design.yml")
    assert found.factors == ("noise", "time", "step")
    for signs, settings in found.runs.items():
        train = stages.load_study(found.profile, settings).train_on_set(40)
        noise, time = train.lr / train.batch_size, train.lr * train.steps(400)
        assert 400 % train.batch_size == 0  # no short batch, whose steps would be noisier
        assert noise == pytest.approx(0.0032 if signs[0] > 0 else 0.0004)
        assert time == pytest.approx(112.64 if signs[1] > 0 else 14.08)
        assert train.lr == 0.16 if signs[2] > 0 else train.lr <= 0.02


def test_the_books_other_designs_are_of_the_runs_that_they_name():
    folder = project.root() / "book" / "search-noise"
    first, sets = stages.read_design(folder / "design.yml"), stages.read_design(folder / "sets.yml")
    for (*signs, images), settings in sets.runs.items():
        settings = {k: v for k, v in settings.items() if k not in ("published", "arms", "sets")}
        assert settings.items() <= first.runs[tuple(signs)].items()
        assert sets.runs[*signs, images]["published"][0].startswith("subset=sets/idc10" if images > 0 else "subset=sets/real40")
    images = stages.read_design(folder / "images.yml")
    for (time, many), settings in images.runs.items():
        per_class = 400 if many > 0 else 10
        train = stages.load_study(images.profile, settings | {"published": []} | {"arms": ["imp"]}).train_on_set(per_class)
        assert train.steps(10 * per_class) == {(-1, -1): 88, (1, -1): 704, (-1, 1): 80, (1, 1): 720}[time, many]
    crossed = stages.read_design(folder / "crossed.yml")
    for (time,), settings in crossed.runs.items():
        study = stages.load_study(crossed.profile, settings | {"published": [], "arms": ["early_stopped"]})
        assert {study.train_on_set(40).steps(400), study.search["early_stopped"].steps(4000)} == {3780 if time > 0 else 378}
        assert study.search["usual"].steps(4000) == 3780


def test_the_distance_of_a_search_is_that_of_its_surviving_weights(store):
    def put(stage: str, spec: dict, parents: dict, tensors: dict) -> str:
        key = key_for(stage, 1, spec, parents)
        store.put(key, stage=stage, version=1, spec=spec, parents=parents, tensors=tensors, result={"error": 0.1, "points": 1},
                  seconds=0.0, label=stage)
        return key

    start, mask = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([True, False, True])
    ticket = put("ticket", {"t": 0}, {}, {"params/w": start, "params/b": torch.ones(1), "mask/w": mask})
    far = put("network", {"n": 0}, {"ticket": ticket}, {"params/w": torch.tensor([3.0, 0.0, 1.0]), "params/b": torch.zeros(1)})
    dense = put("network", {"n": 1}, {}, {"params/w": start, "params/b": torch.zeros(1)})
    assert searching.moved(store, far) == pytest.approx(3 / 5)  # biases do not count
    rows = [({"arm": "imp", "percent": 59, "seed": 0, "pieces": 2, "search_round": i}, key) for i, key in ((0, dense), (1, far))]
    alone = [({"arm": "one_shot", "percent": 59, "seed": 0, "pieces": 1, "search_round": 0}, dense)]
    found = [(number.name, number.value, number.n) for number in searching.numbers(store, {"searches": rows + alone})]
    assert found == [("tickets.imp.search_distance@59", pytest.approx(0.6), 1),
                     ("tickets.imp.search_accuracy@59", pytest.approx(0.9), 1)]  # of the last network, not of the first
    assert searching.numbers(store, {"searches": alone}) == []


def test_the_command_computes_runs_and_prints_effects(checkout, dpkit):
    Path("d.yml").write_text("""profile: smoke
settings: {train_images: 100, test_images: 50, width: 2, epochs: 1, rewind_epochs: 0.5, sets: [random_real], arms: [random_real],
           rounds: 2, at_rounds: [2], seeds: 2, points: 3}
factors: [noise]
runs:
  - {noise: low, set: {set_lr: 0.01, set_epochs: 2}}
  - {noise: high, set: {set_lr: 0.5, set_epochs: 2}}
""")
    assert "the store has no number of run low" in dpkit("effects", "d.yml", "--run", "low").err
    assert dpkit("effects", "d.yml", "--run", "lwo").err == "dpkit: unknown run 'lwo'; did you mean low?\n"
    first = dpkit("effects", "d.yml", "--compute", "--chapter", "tickets", "--run", "low", "--workers", "1")
    assert first.code == 0, first.err
    assert "tickets.random_real.search_distance@" in first.out
    lacking = dpkit("effects", "d.yml")
    assert "run high has 2 numbers, others up to 10" in lacking.err  # those of the dense network, which all runs share
    assert "the store has no number of all runs that differs between them; `dpkit effects d.yml --compute` makes" in lacking.err
    made = dpkit("effects", "d.yml", "--compute", "--chapter", "tickets", "--workers", "1")
    assert made.code == 0, made.err
    assert "tickets.random_real_effect_of_noise.search_distance@" in made.out
    assert "points" in made.out
    assert "…" not in made.out  # a name that is cut short leads nowhere
