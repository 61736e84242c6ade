"""Flat dictionaries of tensors, populations of them, and seeds that are equal everywhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpkit
from dpkit import tree

ROOT = Path(dpkit.__file__).parents[1]


@pytest.fixture
def one():
    source = torch.Generator().manual_seed(1)
    return {
        "b": torch.randn(2, 3, generator=source),
        "a": torch.randn(4, generator=source),
        "c": torch.randn(1, 2, 2, generator=source),
    }


@pytest.fixture
def other(one):
    return {name: t.flip(0) + 0.25 for name, t in one.items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_flatten_and_back(one):
    vector = tree.flatten(one)
    assert vector.shape == (14,)
    assert torch.equal(vector[:6], one["b"].reshape(-1))  # the dictionary's order, not the alphabet's
    assert same(tree.unflatten(vector, one), one)
    assert torch.equal(tree.flatten(one, ["c", "b"]), torch.cat([one["c"].reshape(-1), one["b"].reshape(-1)]))


@pytest.mark.parametrize("length", [13, 15])
def test_a_vector_of_another_length_is_refused(one, length):
    with pytest.raises(ValueError, match=f"must have 14 entries to fill the tree, got {length}"):
        tree.unflatten(torch.zeros(length), one)


def test_interpolation_is_exact_at_both_ends(one, other):
    assert same(tree.lerp(one, other, 0.0), one)
    assert same(tree.lerp(one, other, 1.0), other)
    middle = tree.lerp(one, other, 0.25)
    for name in one:
        torch.testing.assert_close(middle[name], 0.75 * one[name] + 0.25 * other[name])


def test_arithmetic(one, other):
    assert same(tree.add(tree.subtract(one, one), other), other)
    for name, t in tree.add(one, other, -2.0).items():
        torch.testing.assert_close(t, one[name] - 2 * other[name])
    a, b = tree.flatten(one).double(), tree.flatten(other).double()
    assert tree.dot(one, other) == pytest.approx(float(a @ b), rel=1e-12)
    assert tree.norm(one) == pytest.approx(float(a.norm()), rel=1e-12)


def test_inner_products_are_accumulated_in_double_precision():
    # in float32 the 1 is lost between the two large terms
    a = {"x": torch.tensor([1e4, 1.0, 1e4])}
    b = {"x": torch.tensor([1e4, 1.0, -1e4])}
    assert tree.dot(a, b) == 1.0


def test_a_population_and_its_members(one, other):
    together = tree.stack([one, other, one])
    assert tree.population(together) == 3
    assert together["b"].shape == (3, 2, 3)
    members = tree.unstack(together)
    assert same(members[0], one)
    assert same(members[1], other)


@pytest.mark.parametrize("wrong", [{}, {"a": torch.zeros(())}, {"a": torch.zeros(2), "b": torch.zeros(3)}])
def test_what_is_no_population_is_refused(wrong):
    with pytest.raises(ValueError, match="one leading axis shared by all tensors"):
        tree.population(wrong)


def test_a_detached_copy_shares_nothing(one):
    leaf = {name: t.clone().requires_grad_() for name, t in one.items()}
    copy = tree.detach(leaf)
    copy["a"].add_(1)
    assert not copy["a"].requires_grad
    assert torch.equal(leaf["a"], one["a"])


def test_casting_leaves_whole_numbers_alone():
    before = {"w": torch.ones(2), "mask": torch.ones(2, dtype=torch.bool), "n": torch.ones(1).long()}
    cast = tree.to(before, dtype=torch.float64)
    assert [t.dtype for t in cast.values()] == [torch.float64, torch.bool, torch.int64]


def test_finite(one):
    assert tree.is_finite(one | {"n": torch.ones(1, dtype=torch.int64)})
    for bad in (float("nan"), float("inf")):
        assert not tree.is_finite(one | {"w": torch.tensor([0.0, bad])})


def test_seeds_are_equal_in_two_processes():
    program = (
        "from dpkit import tree; import torch; print(tree.seed_for(3, 'init', 0), "
        "torch.rand(1, generator=tree.generator_for('shapes', 'train', 7)).item())"
    )
    outputs = set()
    for salt in ("0", "12345"):
        found = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": salt},
        )
        outputs.add(found.stdout.strip())
    here = torch.rand(1, generator=tree.generator_for("shapes", "train", 7)).item()
    assert outputs == {f"{tree.seed_for(3, 'init', 0)} {here}"}


def test_seeds_stay_as_recorded():
    # results are stored under keys that name these seeds: a change would make all of them stale in silence
    assert tree.seed_for(0, "init", 0) == 8294310390055449569
    assert tree.seed_for("shapes", "train", 0) == 7261754857199167526


def test_seeds_are_distinct_and_fit_in_63_bits():
    rests = [(), *itertools.product(range(12)), *itertools.product(range(3), range(12))]
    paths = [
        (run, purpose, *rest)
        for run in (0, 1, "0")
        for purpose in ("init", "order", "augment")
        for rest in rests
    ]
    seeds = [tree.seed_for(*path) for path in paths]
    assert len(set(seeds)) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert tree.seed_for(0, "a", 1) != tree.seed_for(0, "a1")
    assert tree.seed_for(0, 1, 23) != tree.seed_for(0, 12, 3)


def test_generators_draw_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    a = torch.rand(5, generator=tree.generator_for(0, "x"))
    assert torch.equal(torch.rand(3), expected)  # the global generator has not moved
    assert torch.equal(a, torch.rand(5, generator=tree.generator_for(0, "x")))
    assert not torch.equal(a, torch.rand(5, generator=tree.generator_for(0, "y")))
