"""The built-in data set shows what the study is about: asserted on the quick profile's settings, with margins."""
from __future__ import annotations

import pytest

from dpkit import data, report, stages
from dpkit.store import Store

pytestmark = pytest.mark.slow

#: the requirement stands beside each margin; numbers are fractions
BOUNDS = {
    "distill.all_data.accuracy": (0.92, 0.985),  # required: 0.90 to 0.99
    "connectivity.dense.barrier": (0.06, 1.0),  # required: at least 0.05
    "distill.random_real.accuracy": (0.15, 0.585),  # required: at most 0.60
    "distill.idc_minus_random_real.accuracy": (0.16, 1.0),  # required: at least 0.15
    "connectivity.random.barrier@67": (0.06, 1.0),  # required: at least 0.05
    "connectivity.imp.barrier@67": (0.0, 0.018),  # required: at most 0.02
}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    study = stages.load_study("quick", {"sets": "idc,random_real", "arms": "imp,random", "at_rounds": "5", "seeds": 3,
                                        "plane_arms": "dense", "hessian_arms": "dense"})
    plan = stages.Plan(study, data.load(study.data).identity)
    store = Store(tmp_path_factory.mktemp("store"))
    parts = {name: plan.chapter(name) for name in ("distillation", "connectivity")}
    found = stages.compute(store, [entry.unit for entries in parts.values() for entry in entries], device="cpu")
    assert not found.errors
    assert not found.failed
    rows = {name: [(entry.place, entry.unit.key) for entry in entries] for name, entries in parts.items()}
    return {number.name: number for number in report.all_numbers(store, rows)}


@pytest.mark.parametrize("name", BOUNDS)
def test_shapes_shows_the_phenomenon(numbers, name):
    low, high = BOUNDS[name]
    assert low <= numbers[name].value <= high
