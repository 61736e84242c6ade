"""The built-in set, statistics, normalising, and splits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dpkit
from dpkit.data import DataSpec, Split, load, normalise, per_class_indices, shapes, statistics

TRAIN_SHA = "8db23a32ce7fa2e82b9d5836211e82e964e1d6bd1de71091356c55f059221b8e"
TEST_SHA = "489cf027986b392e83558e59d3bebddf8a3474ba9790c65cbe6c385ba3727f62"
PROGRAM = """
import hashlib
from dpkit.data import shapes
for part in ("train", "test"):
    print(hashlib.sha256(shapes.make(part, 200).images.numpy().tobytes()).hexdigest())
"""
ROOT = Path(dpkit.__file__).parents[1]


def sha(images):
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


# --- the built-in set ---------------------------------------------------------------------------------------
def test_shapes_are_the_recorded_bytes_in_every_process():
    assert sha(shapes.make("train", 200).images) == TRAIN_SHA
    other = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert other.stdout.split() == [TRAIN_SHA, TEST_SHA]


def test_a_shorter_set_of_shapes_is_the_beginning_of_a_longer_one():
    long, short = shapes.make("test", 1100), shapes.make("test", 130)
    assert long.images.shape == (1100, 3, 16, 16)
    assert long.images.dtype == torch.uint8
    assert torch.equal(long.images[:130], short.images)
    assert torch.equal(long.labels[:130], short.labels)
    assert not torch.equal(long.images[1000:1100], long.images[:100])  # each thousand has a seed of its own


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_shapes_of_fewer_classes_are_those_of_all_without_the_others(classes):
    some, every = load(DataSpec(classes=classes, train=1500, test=150)), shapes.make("train", 8000)
    left = every.labels < classes
    assert torch.equal(some.train.images, every.images[left][:1500])
    assert torch.equal(some.train.labels, every.labels[left][:1500])
    assert some.class_names == shapes.CLASSES[:classes]
    assert some.classes == classes
    assert len(some.test) == 150
    assert int(some.test.labels.max()) == classes - 1


def test_shapes_are_balanced_shuffled_and_differ_between_parts():
    train, test = shapes.make("train", 1000), shapes.make("test", 1000)
    for part in (train, test):
        assert [len(place) for place in per_class_indices(part.labels, 10)] == [100] * 10
        assert len(set(part.labels[:40].tolist())) == 10
        assert len(torch.unique(part.images.flatten(1), dim=0)) == 1000
    assert not torch.equal(train.labels, test.labels)
    together = torch.cat([train.images, test.images]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 2000


def test_identity_follows_the_bytes_and_the_sizes():
    found = load(DataSpec(train=200, test=100))
    assert found.identity | {"sha256": ""} == {
        "kind": "shapes",
        "train": 200,
        "test": 100,
        "shape": [3, 16, 16],
        "classes": 10,
        "sha256": "",
    }
    assert found.class_names == shapes.CLASSES
    assert load(DataSpec(train=200, test=100)).identity == found.identity
    assert load(DataSpec(train=201, test=100)).identity["sha256"] != found.identity["sha256"]


# --- statistics, normalising, splits ------------------------------------------------------------------------
@pytest.mark.parametrize("count", [7, 5003])
def test_statistics_equal_numpy(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 4, 5), dtype=np.uint8)
    images[:, 1] //= 3
    mean, std = statistics(torch.from_numpy(images))
    pixels = images / 255.0
    np.testing.assert_allclose(mean.numpy(), pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), pixels.std((0, 2, 3)), rtol=1e-6)
    floats = statistics(torch.from_numpy(pixels.astype(np.float32)))
    torch.testing.assert_close(floats, (mean, std))


def test_normalised_pixels_have_mean_zero_and_deviation_one():
    images = shapes.make("train", 100).images
    x = normalise(images, *statistics(images))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalise(images.float() / 255, *statistics(images)), x)


@pytest.mark.parametrize(
    "images, labels, line",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2).long(), r"images must be \(N, C, H, W\) of uint8 or float32"),
        (torch.zeros(2, 3, 4, 4).double(), torch.zeros(2).long(), "of float64"),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2),
            r"labels must be \(N,\) int64 or \(N, K\) float32, got \(2,\)",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3).long(), "labels must be"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3).long(), "must be equally many, got 2 and 3"),
    ],
)
def test_what_is_no_split_is_refused(images, labels, line):
    with pytest.raises(ValueError, match=line):
        Split(images, labels)


def test_a_split_gives_rows_and_targets():
    split = Split(torch.arange(4).float().view(4, 1, 1, 1), torch.tensor([2, 0, 1, 2]))
    chosen = split.select(torch.tensor([3, 1]))
    assert chosen.images.flatten().tolist() == [3, 1]
    assert chosen.targets(3).tolist() == [[0, 0, 1], [1, 0, 0]]
    soft = Split(split.images, torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]]))
    assert soft.hard_labels().tolist() == [1, 0, 1, 0]
    assert torch.equal(soft.targets(2), soft.labels)
    assert [p.tolist() for p in per_class_indices(split.labels, 3)] == [[1], [2], [0, 3]]
