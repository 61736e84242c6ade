"""Intervals of a mean over initialisations, against exact enumeration of all bootstrap draws."""
import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch

from dpkit.statistics import (
    attainable_coverage,
    hierarchical_interval,
    hierarchical_pairs_interval,
    mean_interval,
    share_interval,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def means_of(group):
    """Exact distribution of the mean of a resampled group."""
    share = Fraction(1, len(group) ** len(group))
    found = Counter()
    for draw in itertools.product(group, repeat=len(group)):
        found[Fraction(sum(map(Fraction, draw))) / len(group)] += share
    return found


def pair_means_of(group):
    """Exact distribution of the mean over pairs of different children among resampled ones."""
    children = sorted({c for pair in group for c in pair})
    found = Counter()
    for draw in itertools.product(children, repeat=len(children)):
        values = [Fraction(group[min(i, j), max(i, j)]) for i, j in itertools.combinations(draw, 2) if i != j]
        if values:
            found[sum(values) / len(values)] += 1
    total = sum(found.values())
    return Counter({mean: Fraction(count, total) for mean, count in found.items()})


def mixture(distributions):
    """Exact distribution of the mean over as many initialisations, drawn with replacement, each from its own distribution."""
    count = len(distributions)
    one = Counter()
    for distribution in distributions:
        for mean, share in distribution.items():
            one[mean] += share / count
    total = {Fraction(0): Fraction(1)}
    for _ in range(count):
        following = Counter()
        for (x, p), (y, q) in itertools.product(total.items(), one.items()):
            following[x + y] += p * q
        total = following
    return sorted((float(x / count), float(p)) for x, p in total.items())


def quantiles_around(distribution, level, slack):
    """Range in which the quantile of many draws lies: the exact quantiles at level +- slack."""
    reached = list(itertools.accumulate(share for _, share in distribution))
    return [next((value for (value, _), r in zip(distribution, reached, strict=True) if r >= wanted), distribution[-1][0])
            for wanted in (level - slack, level + slack)]


def holds(interval, distribution, level):
    for bound, at in ((interval.low, (1 - level) / 2), (interval.high, (1 + level) / 2)):
        low, high = quantiles_around(distribution, at, 0.01)
        assert low - 1e-12 <= bound <= high + 1e-12


@pytest.mark.parametrize("groups", [
    [[0, 1], [3], [5, 7, 12]], [[1], [2], [4]], [[0, 8], [1, 9]], [[1, 2, 3], [2, 2, 9], [4, 4, 4]],
])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_draws_are_those_of_full_enumeration(groups, level):
    found = hierarchical_interval(groups, generator(), level=level, draws=20_000)
    holds(found, mixture([means_of(group) for group in groups]), level)
    assert found.mean == pytest.approx(sum(sum(g) / len(g) for g in groups) / len(groups))
    assert (found.initialisations, found.values) == (len(groups), sum(map(len, groups)))


@pytest.mark.parametrize("groups", [
    [{(0, 1): 1, (0, 2): 4, (1, 2): 9}, {(0, 1): 2, (0, 2): 3, (1, 2): 5}],
    [{(0, 1): 1, (0, 2): 4, (1, 2): 9}, {(0, 1): 2}, {(0, 1): 30, (0, 2): 0, (1, 2): 6}],
])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_pairs_are_drawn_by_their_children(groups, level):
    found = hierarchical_pairs_interval(groups, generator(1), level=level, draws=20_000)
    holds(found, mixture([pair_means_of(group) for group in groups]), level)
    assert found.mean == pytest.approx(sum(sum(g.values()) / len(g) for g in groups) / len(groups))


def test_basic_intervals_are_percentile_intervals_turned_round():
    groups = [[1, 2, 9], [4, 5], [0, 1, 2]]
    one, other = (hierarchical_interval(groups, generator(3), kind=kind) for kind in ("percentile", "basic"))
    assert other.low == pytest.approx(2 * one.mean - one.high)
    assert other.high == pytest.approx(2 * one.mean - one.low)


def test_the_generator_decides_and_levels_nest():
    groups = [[1, 2, 9], [4, 5], [0, 1, 2]]
    assert hierarchical_interval(groups, generator(3)) == hierarchical_interval(groups, generator(3))
    assert hierarchical_interval(groups, generator(3)) != hierarchical_interval(groups, generator(4))
    wide, narrow = (hierarchical_interval(groups, generator(3), level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_one_initialisation_has_no_interval():
    found = hierarchical_interval([[1.0, 2.0, 6.0]], generator())
    assert (found.mean, found.low, found.high, found.initialisations, found.values) == (3.0, None, None, 1, 3)
    assert hierarchical_pairs_interval([{("a", "b"): 2.0}], generator()).low is None


def test_two_initialisations_reach_no_further_than_their_values():
    found = hierarchical_interval([[1.0], [3.0]], generator(), level=0.99999)
    assert (found.low, found.mean, found.high) == (1.0, 2.0, 3.0)
    assert mean_interval([1.0, 3.0])[1] < -10  # Student's interval assumes normal values, and pays for it
    assert [attainable_coverage(n) for n in range(1, 6)] == [0, 0.5, 0.75, 0.875, 0.9375]
    assert attainable_coverage(6) > 0.95


def test_the_only_pair_of_two_children_says_nothing_about_pairs():
    found = hierarchical_pairs_interval([{(0, 1): 1}, {(0, 1): 3}, {(0, 1): 8}], generator(2), level=0.9, draws=20_000)
    holds(found, mixture([Counter({Fraction(value): Fraction(1)}) for value in (1, 3, 8)]), 0.9)


@pytest.mark.parametrize("initialisations, coverage", [(2, 0.75), (3, 0.83), (10, 0.93)])
def test_coverage_is_what_the_documentation_says(initialisations, coverage):
    source, studies, held = generator(initialisations), 300, 0
    for _ in range(studies):
        between, within = (torch.randn(initialisations, n, generator=source) for n in (1, 3))
        found = hierarchical_interval((between + within).tolist(), source, draws=200)
        held += found.low <= 0 <= found.high
    assert held / studies == pytest.approx(coverage, abs=0.07)  # three standard errors


@pytest.mark.parametrize("change, message", [
    ({"groups": []}, "an interval needs at least 1 initialisation, got none"),
    ({"groups": [[1.0], []]}, "every initialisation needs at least 1 value, but number 1 of 2 has none; leave it out"),
    ({"groups": [[float("nan")], [1.0]]}, "values must be numbers, got NaN for initialisation number 0 of 2"),
    ({"level": 1.0}, r"level must lie in \(0, 1\), got 1.0"),
    ({"draws": 0}, "draws must be at least 1, got 0"),
    ({"kind": "bca"}, "kind must be one of percentile, basic; got 'bca'"),
])
def test_bad_input_is_refused(change, message):
    arguments = {"groups": [[1.0], [2.0]], "generator": generator()} | change
    with pytest.raises(ValueError, match=message):
        hierarchical_interval(**arguments)


def test_a_child_is_no_pair_with_itself():
    with pytest.raises(ValueError, match="a pair must be of two children, got 0 twice; leave it out"):
        hierarchical_pairs_interval([{(0, 0): 1.0}, {(0, 1): 1.0}], generator())


@pytest.mark.parametrize(("successes", "count", "low", "high"), [
    # from tables of Clopper-Pearson limits at 95%; for all or none of n the limit is (0.025)^(1/n) from that end
    (0, 10, 0.0, 0.3085), (1, 10, 0.0025, 0.4450), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (3, 3, 0.2924, 1.0),
    (0, 3, 0.0, 0.7076), (8, 20, 0.1912, 0.6395), (1, 1, 0.025, 1.0)])
def test_exact_binomial_limits(successes, count, low, high):
    found = share_interval(successes, count)
    assert found[0] == successes / count
    assert found[1:] == pytest.approx((low, high), abs=5e-5)
    assert share_interval(count, count)[1] == pytest.approx(0.025 ** (1 / count))


def test_a_broken_success_widens_the_interval_on_both_sides():
    assert share_interval(2.5, 4) == (0.625, share_interval(2, 4)[1], share_interval(3, 4)[2])


@pytest.mark.parametrize(("given", "said"), [((-1, 3), "got -1 of 3"), ((4, 3), "got 4 of 3"), ((0, 0), "got 0 of 0"),
                                             ((1, 2, 1.0), "level must lie in")])
def test_shares_that_are_none(given, said):
    with pytest.raises(ValueError, match=said):
        share_interval(*given)
