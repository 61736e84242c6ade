"""The study of seconds whose networks are measured between and around, for the tests of these stages."""
from __future__ import annotations

import pytest
from small_study import plan

from dpkit.stages import compute, run
from dpkit.store import Store

SETTINGS = {"arms": ("imp", "ltr", "distilled", "imp_borrowed", "imp_transferred"), "robust_arms": ("dense",), "seeds": 2,
            "train_path_images": 40, "statistics_arms": ("dense",), "spawn_arms": ("dense", "imp", "ltr"),
            "spawn_epochs": (0.25, 1.5), "spawn_seeds": 1, "layer_arms": ("imp",), "between_arms": ("dense", "imp", "distilled"),
            "plane_arms": ("imp",), "plane_sets": ("idc",), "trajectory_points": 2, "square_arms": ("dense",),
            "square_resolution": 3, "around_arms": ("imp",), "around_resolution": 3, "profile_arms": ("imp",),
            "profile_directions": 2, "profile_points": 5, "at_rounds": (1, 2), "points": 5}
PARTS = ("connectivity", "train_paths", "alignment", "starts", "statistics", "instability", "layers", "between", "landscape",
         "plane_sets", "trajectory", "square", "square_forms", "around", "profile")


def entries(made, *parts):
    return [e for part in parts for e in getattr(made, part)()]


def computed(folder):
    """The store and the plan of it, with every part made."""
    store, made = Store(folder / "store"), plan(**SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SMALL", float("inf"))
        report = compute(store, [e.unit for e in entries(made, *PARTS)], device="cpu")
    assert not report.errors
    assert not report.failed
    return store, made
