"""Figures of curvature from made-up frames: what they show, and that many arms, one seed and nothing have one."""
from __future__ import annotations

import io
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from dpkit.report import curvature, curvature_figures, sharpness_figures

ARMS = ("dense", "imp", "ltr", "large_batch", "distilled", "dm", "dsa", "mtt", "random_real", "herding", "el2n", "snip", "grasp",
        "synflow", "random", "theirs", "imp_weights", "distilled_shuffled", "imp_reinit")


def made_up(arms, seeds: int = 2, percents=(36, 67)) -> pd.DataFrame:
    records = []
    for i, arm in enumerate(arms):
        for percent in (0,) if arm == "dense" else percents:
            for seed in range(seeds):
                value = math.exp(-i / 3 - percent / 50) * (1 + seed / 5)
                records.append({"arm": arm, "percent": percent, "seed": seed,
                                **{name: value for names in curvature.MEASURES.values() for name in names},
                                "average_sharpness": value - 0.1, "accuracy": 0.5 + 0.4 / (1 + value), "failed": None})
    names = [name for names in curvature.MEASURES.values() for name in names]
    return pd.DataFrame.from_records(records, columns=[*curvature.PLACE, *names, "failed"])


def masks(arms, seeds: int = 2, losses=("real", "idc", "dm")) -> pd.DataFrame:
    names = [*curvature.REMOVED, "overlap_excess", "rise_random", "rise_least", "rise_most", "rise_excess"]
    return pd.DataFrame([{"arm": arm, "percent": 67, "seed": seed, "on": on, "failed": None,
                          **{name: 0.01 * (1 + i + k + seed) for k, name in enumerate(names)}}
                         for on in losses for i, arm in enumerate(arms) if arm != "dense" for seed in range(seeds)],
                        columns=["arm", "percent", "seed", "on", *names, "failed"])


def ways(arms, seeds: int = 2) -> pd.DataFrame:
    return pd.DataFrame([{"arm": arm, "percent": 67 if arm != "dense" else 0, "seed": seed, "epochs": e, "ratio": e / (e + 1 + i)}
                         for i, arm in enumerate(arms) for seed in range(seeds) for e in range(3)],
                        columns=["arm", "percent", "seed", "epochs", "ratio"])


def spectra(arms, seeds: int = 2) -> list[curvature.Density]:
    grid = 0.03 * np.sinh(np.linspace(-3, 7, 50))
    curve = 1 / (1e-6 + grid**2)
    return [curvature.Density(arm, 67 if arm != "dense" else 0, seed, grid * (1 + seed / 10), curve, curve / 10,
                              np.array([grid[-5], grid[2]]), 1000) for arm in arms for seed in range(seeds)]


def entries(arms, seeds: int = 1) -> dict[str, np.ndarray]:
    return {arm: np.linspace(-1, 5, 50) / (1 + i) for i, arm in enumerate(arms)}


MEASURED = {"trace": "trace", "average_sharpness": "average sharpness", "negative_low": "negative mass", "frobenius": "norm"}
DRAWN = {"measures": (made_up, lambda table: curvature_figures.measures(table, MEASURED)),
         "protocols": (made_up, curvature_figures.protocols),
         "against_sparsity": (made_up, lambda table: curvature_figures.against_sparsity(table, "trace", "trace")),
         "densities": (spectra, curvature_figures.densities), "diagonals": (entries, curvature_figures.diagonals),
         "removed": (masks, sharpness_figures.removed), "overlap": (masks, sharpness_figures.overlap),
         "rises": (masks, sharpness_figures.rises), "edge": (ways, sharpness_figures.edge),
         "against_accuracy": (made_up, sharpness_figures.against_accuracy)}


def drawn(figure: Figure) -> None:
    """Draws the figure; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=30)


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_for_many_arms_one_seed_and_nothing(name):
    make, draw = DRAWN[name]
    drawn(draw(make(ARMS, 2)))
    drawn(draw(make(("dense", "imp", "distilled"), 1)))
    drawn(draw(make(("imp",), 1)))
    empty = draw(make((), 1))
    assert len(empty.axes[0].texts) == len(empty.axes) == 1
    table = make(ARMS[:3], 2)
    if isinstance(table, pd.DataFrame) and name != "edge":  # a part that was not measured leaves NaN
        columns = [c for c in table.columns if c not in ("arm", "percent", "seed", "on", "failed")]
        empty = draw(table.assign(**dict.fromkeys(columns, np.nan)))
        assert len(empty.axes[0].texts) == len(empty.axes) == 1
        drawn(empty)


def test_measures_show_geometric_means_of_the_highest_sparsity():
    table = made_up(("dense", "imp"), 2).assign(trace=[1.0, 4.0, 99.0, 99.0, 9.0, 4.0])
    table["average_sharpness"] = [1.0, 3.0, 99.0, 99.0, -1.0, 2.0]
    figure = curvature_figures.measures(table, {"trace": "trace", "average_sharpness": "average"})
    marks = [[line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"] for axes in figure.axes]
    np.testing.assert_allclose(marks, [[2.0, 6.0], [2.0, 0.5]])
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "symlog"]


def test_masks_stand_beside_chance():
    figure = sharpness_figures.overlap(masks(("imp", "random"), 1, ("idc", "real")).assign(
        overlap=[0.6, 0.5, 0.7, 0.5], overlap_layerwise=0.5, overlap_uniform=0.3))
    assert [axes.get_title() for axes in figure.axes] == ["on real images", "on IDC images"]
    marks = [sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "D") for axes in figure.axes]
    np.testing.assert_allclose(marks, [[50, 70], [50, 60]])
    levels = {float(line.get_xdata()[0]) for line in figure.axes[0].lines if line.get_marker() == "|"}
    assert levels == {50.0, 30.0}


def test_the_correlation_stands_at_the_panel():
    table = made_up(("dense", "imp", "random"), 3)
    table["accuracy"] = 1 - table["trace_per_weight"] / 100  # at equal sparsity it falls as the measure rises
    figure = sharpness_figures.against_accuracy(table)
    assert figure.axes[0].get_title() == "trace per surviving weight\nρ = −1.00 [−1.00, −1.00]"
    assert len(figure.axes) == 6  # the trace itself would say the same as that per weight
    points = sum(len(line.get_xdata()) for line in figure.axes[0].lines)
    assert points == len(table)  # the dense networks are shown
    alone = sharpness_figures.against_accuracy(table[table["arm"] != "imp"].assign(accuracy=0.5))
    assert alone.axes[0].get_title().endswith("no correlation: too few networks")


def test_densities_share_their_axes_and_mark_eigenvalues():
    figure = curvature_figures.densities(spectra(("dense", "imp"), 2))
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim()
    assert (first.get_yscale(), first.get_xscale()) == ("log", "symlog")
    assert first.get_ylim()[0] == pytest.approx(0.1 / (0.03 * np.sinh(7) * 1.1))  # of eigenvalues, a tenth of one
    strokes = [line.get_xdata() for line in second.lines if line.get_marker() == "|"]
    assert len(strokes) == 2
    assert strokes[0][0] > 0 > strokes[0][1]


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.5), (0.9, 7.0), (0.02, 5.0), (1e-9, 3e4), (3.1e-4, 3.9e-4), (0.11, 0.95)])
def test_logarithmic_axes_have_two_to_six_ticks(low, high):
    ticks = curvature_figures.positive_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)


def test_ticks_read_well():
    assert [curvature_figures.tick_text(v) for v in (0, 0.003, -20, 1e-6, -1e7, 3e8)] == [
        "0", "0.003", "−20", "$10^{-6}$", "$−10^{7}$", "$3·10^{8}$"]
