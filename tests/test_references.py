"""What papers report: that it stands where it should, which data it is compared with, and what is said about differences."""
from __future__ import annotations

import pytest
import torch

from dpkit.distill import DMSpec, HerdingSpec, IDCSpec
from dpkit.report import references


def test_reported_accuracies_stand_beside_ours_with_their_source():
    table = references.beside({"idc": "60.0% (n = 1)"}, 10)
    assert table.loc["IDC"].tolist() == ["50.6%", "67.5%", "74.5%", "IDC code", "60.0% (n = 1)"]
    assert table.loc["DM"].tolist() == ["", "48.9%", "63.0%", "PAD", "not measured"]
    assert table.loc["DATM", "ours, 10 a class"] == "not made here"
    assert table.loc["all data", "10 a class"] == "84.8%"
    assert len({(r.set, r.ipc) for r in references.CIFAR10}) == len(references.CIFAR10)
    assert all(0 < r.accuracy < 100 and "arXiv" in references.SOURCES[r.source] for r in references.CIFAR10)


@pytest.mark.parametrize(("change", "known"), [
    ({}, True), ({"kind": "cifar10", "classes": 3}, True), ({"kind": "svhn"}, False), ({"classes": 100}, False),
    ({"shape": [3, 16, 16]}, False), ({"mean": (0.4377, 0.4438, 0.4728)}, False), ({"mean": (0.4789, 0.4723, 0.4305)}, False),
    ({"std": (0.26, 0.25, 0.27)}, False)], ids=["npz", "named", "other", "classes", "size", "svhn", "cinic", "contrast"])
def test_cifar10_is_known_by_its_pixels(change, known):
    facts = {"kind": "npz", "classes": 10, "shape": [3, 32, 32], "mean": (0.4915, 0.4821, 0.4464), "std": references.STD} | change
    identity = {name: facts[name] for name in ("kind", "classes", "shape")}
    assert references.is_cifar10(identity, torch.tensor(facts["mean"]), torch.tensor(facts["std"])) is known


def test_departures_from_the_published_setting_are_told():
    whole = {"train": 50_000, "test": 10_000}
    assert references.departures({"idc": IDCSpec(), "herding": HerdingSpec()}, "convnet3", 128, whole) == []
    found = references.departures({"idc": IDCSpec(outer=3, inner=10), "dm": DMSpec(steps=5), "dm_soft": DMSpec(steps=5)},
                                  "convnet3", 32, {"train": 45_000, "test": 6000})
    assert found == ["network convnet3 of width 32; theirs is convnet3 of width 128",
                     "45,000 training and 6,000 test images; theirs are 50,000 and 10,000",
                     "IDC takes 30 steps; the published settings have 200,000",
                     "DM takes 5 steps; the published settings have 20,000"]
