"""Rank correlations against hand counts, scipy, and exact enumeration of all draws of initialisations."""
import itertools
import math
from statistics import NormalDist

import pytest
import torch

from dpkit.statistics import rank_correlation

METHODS = ("spearman", "kendall")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ranks(values):
    """Mean ranks by counting."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def pearson(a, b):
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True))
    below = sum((p - ma) ** 2 for p in a) * sum((q - mb) ** 2 for q in b)
    return top / math.sqrt(below) if below else math.nan


def by_hand(x, y, method, strata=None):
    """Both coefficients from their definitions, point by point and pair by pair."""
    strata = strata or [0] * len(x)
    if method == "spearman":
        a, b = [0.0] * len(x), [0.0] * len(x)
        for stratum in set(strata):
            places = [i for i, s in enumerate(strata) if s == stratum]
            for values, out in ((x, a), (y, b)):
                for i, r in zip(places, ranks([values[i] for i in places]), strict=True):
                    out[i] = (r - (len(places) + 1) / 2) / (len(places) + 1)
        return pearson(a, b)
    over = one = other = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        if strata[i] == strata[j]:
            dx, dy = ((v[i] > v[j]) - (v[i] < v[j]) for v in (x, y))
            over, one, other = over + dx * dy, one + abs(dx), other + abs(dy)
    return over / math.sqrt(one * other) if one and other else math.nan


def data(seed, count, values=6):
    """Integers with many ties."""
    return [torch.randint(values, (count,), generator=generator(seed + i)).tolist() for i in (0, 100)]


@pytest.mark.parametrize("method, value", [("spearman", 0.8), ("kendall", 2 / 3)])
def test_a_case_counted_by_hand(method, value):
    # squared rank differences 0, 1, 1, 0: 1 - 6 * 2 / (4 * 15); five concordant pairs, one discordant
    found = rank_correlation([1, 2, 3, 4], [10, 30, 20, 40], range(4), generator(), method=method, draws=10)
    assert found.value == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed, count", [(0, 5), (1, 12), (2, 40)])
def test_values_are_the_definitions(method, seed, count):
    x, y = data(seed, count)
    strata = torch.randint(3, (count,), generator=generator(seed + 7)).tolist()
    clusters = [i % 3 for i in range(count)]
    for groups in (None, strata):
        found = rank_correlation(x, y, clusters, generator(), strata=groups, method=method, draws=5)
        assert found.value == pytest.approx(by_hand(x, y, method, groups), abs=1e-14)
        assert (found.initialisations, found.points, found.strata) == (3, count, len(set(groups or [0])))


@pytest.mark.parametrize("method", METHODS)
def test_scipy_agrees(method):
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        x, y = data(seed, 30, values=9)
        other = stats.spearmanr(x, y) if method == "spearman" else stats.kendalltau(x, y, variant="b")
        found = rank_correlation(x, y, [0] * 30, generator(), method=method)
        assert found.value == pytest.approx(other.statistic, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strata", [None, [0, 1, 0, 1, 0, 1, 0, 1, 1]])
def test_draws_are_those_of_full_enumeration(method, strata):
    x, y, clusters = [1, 5, 2, 2, 7, 4, 3, 9, 0], [2, 6, 1, 3, 3, 8, 4, 5, 7], [0, 0, 1, 1, 1, 2, 2, 2, 2]
    members = [[i for i, c in enumerate(clusters) if c == cluster] for cluster in range(3)]
    values = []
    for draw in itertools.product(range(3), repeat=3):
        points = [i for c in draw for i in members[c]]
        values.append(by_hand([x[i] for i in points], [y[i] for i in points], method,
                              strata and [strata[i] for i in points]))
    values = sorted(v for v in values if not math.isnan(v))
    found = rank_correlation(x, y, clusters, generator(1), strata=strata, method=method, level=0.5, draws=30_000)

    def around(level):
        # of so many draws a quantile lies within 0.01 of its level
        return [values[min(int(level * len(values) + s * 0.01 * len(values)), len(values) - 1)] for s in (-1, 1)]

    for bound, level in ((found.low, 0.25), (found.high, 0.75)):
        low, high = around(level)
        assert low - 1e-12 <= bound <= high + 1e-12
    full = rank_correlation(x, y, clusters, generator(1), strata=strata, method=method, level=0.9999, draws=30_000)
    assert (full.low, full.high) == (pytest.approx(values[0]), pytest.approx(values[-1]))


def test_draws_in_which_all_is_tied_are_drawn_again():
    # one network for each of two initialisations: half of the draws hold one network twice
    found = rank_correlation([1, 2], [5, 9], ["a", "b"], generator(), draws=50)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert (found.fisher_low, found.fisher_high) == (None, None)


@pytest.mark.parametrize("method", METHODS)
def test_only_orders_count_and_directions_turn_the_sign(method):
    x, y = data(3, 20)
    clusters = [i // 5 for i in range(20)]

    def correlated(a, b):
        return rank_correlation(a, b, clusters, generator(4), method=method, draws=200)

    plain = correlated(x, y)
    assert correlated([math.exp(v) for v in x], [v**3 for v in y]) == plain
    assert correlated([math.inf if v == 5 else v for v in x], y) == plain
    turned = correlated(x, [-v for v in y])
    assert (turned.value, turned.low, turned.high) == pytest.approx((-plain.value, -plain.high, -plain.low), abs=1e-12)
    assert plain.low <= plain.value <= plain.high


def test_strata_take_out_what_sparsity_does():
    """Within each sparsity y falls with x; over all of them both rise."""
    x, y = [1, 2, 3, 11, 12, 13, 21, 22, 23], [3, 2, 1, 13, 12, 11, 23, 22, 21]
    sparsities, clusters = [20] * 3 + [50] * 3 + [80] * 3, [0, 1, 2] * 3
    for method in METHODS:
        assert rank_correlation(x, y, clusters, generator(), method=method, draws=20).value > 0.3
        assert rank_correlation(x, y, clusters, generator(), strata=sparsities, method=method, draws=20).value == -1


@pytest.mark.parametrize("method, factor, less", [("spearman", 1.06, 3), ("kendall", 0.437, 4)])
def test_fisher_intervals_are_their_formula(method, factor, less):
    x, y = data(5, 12)
    found = rank_correlation(x, y, [0] * 12, generator(), strata=[0] * 6 + [1] * 6, method=method, level=0.9)
    z = NormalDist().inv_cdf(0.95) * math.sqrt(factor / (12 - 1 - less))
    assert math.atanh(found.fisher_high) - math.atanh(found.value) == pytest.approx(z)
    assert math.atanh(found.value) - math.atanh(found.fisher_low) == pytest.approx(z)
    assert (found.low, found.high, found.initialisations) == (None, None, 1)
    assert rank_correlation(x[:less], range(less), [0] * less, generator(), method=method).fisher_low is None


@pytest.mark.parametrize("initialisations, coverage, fisher", [(2, 0.63, 0.81), (3, 0.87, 0.80), (10, 0.92, 0.76)])
def test_coverage_is_what_the_documentation_says(initialisations, coverage, fisher):
    source, studies, held, other = generator(initialisations), 400, 0, 0
    clusters = [c for c in range(initialisations) for _ in range(10)]
    true = 6 / math.pi * math.asin(0.25)  # of two normal variables with correlation 0.5 (Pearson 1907)
    for _ in range(studies):
        x, noise = (torch.randn(initialisations, 1, generator=source) + torch.randn(initialisations, 10, generator=source)
                    for _ in range(2))
        y = 0.5 * x + math.sqrt(0.75) * noise
        found = rank_correlation(x.flatten().tolist(), y.flatten().tolist(), clusters, source, draws=300)
        held += found.low <= true <= found.high
        other += found.fisher_low <= true <= found.fisher_high
    assert held / studies == pytest.approx(coverage, abs=0.08)  # three standard errors
    assert other / studies == pytest.approx(fisher, abs=0.07)


@pytest.mark.parametrize("change, message", [
    ({"x": [1.0]}, "x, y, initialisations and strata must be equally long and at least 2, got 1, 3, 3"),
    ({"strata": [1]}, "must be equally long and at least 2, got 3, 3, 3, 1"),
    ({"y": [1.0, math.nan, 2.0]}, "x and y must be numbers, got NaN for 0 x and 1 y; leave these networks out"),
    ({"y": [4.0, 4.0, 4.0]}, "y must take at least 2 values within a stratum, got ties only"),
    ({"strata": [0, 1, 2]}, "x must take at least 2 values within a stratum, got ties only"),
    ({"method": "pearson"}, "method must be one of spearman, kendall; got 'pearson'"),
    ({"level": 0.0}, r"level must lie in \(0, 1\), got 0.0"),
    ({"draws": 0}, "draws must be at least 1, got 0"),
])
def test_bad_input_is_refused(change, message):
    arguments = {"x": [1.0, 2.0, 3.0], "y": [1.0, 3.0, 2.0], "initialisations": [0, 1, 2], "generator": generator()} | change
    with pytest.raises(ValueError, match=message):
        rank_correlation(**arguments)
