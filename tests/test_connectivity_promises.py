"""What the project promises about connectivity, looked up in its profiles and in what it has recorded."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpkit.barriers import is_stable
from dpkit.report import interactive
from dpkit.stages import load_study

BOOK = Path(__file__).resolve().parents[1] / "book"


@pytest.mark.parametrize("profile", ["quick", "cifar10-small"])
def test_profiles_measure_what_was_promised(profile):
    study = load_study(profile)
    assert len([arm for arm in study.arms if arm != "dense"]) >= 6
    assert study.seeds >= 2  # one has no interval
    assert study.children >= 2
    assert study.plane_resolution == 41
    assert study.train_path_images > 0
    assert len(study.at_rounds) >= 2  # a barrier against sparsity


@pytest.mark.parametrize("profile", ["quick", "tickets"])
def test_studies_on_the_built_in_data_refine_their_paths(profile):
    study = load_study(profile)
    assert study.path.error_tolerance == 0.005
    assert study.path.most_points > study.points
    assert load_study("cifar10-small").path_tolerance == 0  # what is recorded stays


@pytest.mark.parametrize("profile", ["smoke", "quick", "tickets", "cifar10-small"])
def test_the_slider_of_a_profile_has_more_than_the_dense_network(profile):
    study = load_study(profile)
    shown = interactive.few(study.arms, study.spawn_arms)
    assert shown[0] == "dense"
    assert len(set(shown)) == len(shown) > 1
    assert set(shown[1:]) <= set(study.arms)


@pytest.mark.parametrize("where", ["arms/shapes", "cifar10"])
def test_recorded_barriers_are_of_six_arms_with_intervals_and_the_dense_one_is_high(where):
    lines = (BOOK / where / "numbers.jsonl").read_text(encoding="utf-8").splitlines()
    numbers = {record["name"]: record for record in map(json.loads, lines)}
    found: dict[str, list[dict]] = {}
    for name, record in numbers.items():
        room, arm, measure = (name.split(".") + ["", ""])[:3]
        if room == "connectivity" and measure.startswith("barrier@") and "_minus_" not in arm and "_to_" not in arm:
            found.setdefault(arm, []).append(record)
    assert len(found) >= 6
    for arm, records in found.items():
        assert len(records) >= 2, arm  # against sparsity
        for record in records:
            assert record["n"] >= 2
            assert 0 <= record["low"] <= record["value"] <= record["high"] <= 1
    assert numbers["connectivity.dense.barrier"]["value"] >= 0.05
    assert not is_stable(numbers["connectivity.dense.barrier"]["value"])
