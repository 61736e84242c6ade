"""Every figure from a frame like the study's and from an empty one; lines and bars carry the frame's values."""
from __future__ import annotations

import io
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from dpkit.report import figures


def table() -> pd.DataFrame:
    """Tickets of three arms at two sparsities and of the dense network; one network diverged."""
    rows = []
    for arm, percent, errors in (("dense", 0, [0.10, 0.14]), ("imp", 36, [0.20, 0.24]), ("imp", 67, [0.30, 0.38]),
                                 ("distilled", 36, [0.22, 0.22]), ("distilled", 67, [0.40, np.nan])):
        rows += [{"arm": arm, "percent": percent, "seed": seed, "error": error, "accuracy": 1 - error, "trace": 10 * error,
                  "top_eigenvalue": error, "failed": "diverged at step 3" if np.isnan(error) else None}
                 for seed, error in enumerate(errors)]
    return pd.DataFrame(rows)


def lines() -> pd.DataFrame:
    """Error along two paths a sparsity."""
    return pd.DataFrame([{"arm": arm, "percent": percent, "seed": 0, "pair": pair, "alphas": x, "errors": top * x + shift}
                         for arm, percent, top in (("dense", 0, 0.4), ("imp", 67, 0.2))
                         for pair, shift in (("0-1", 0), ("0-2", 0.1)) for x in (0.0, 0.5, 1.0)])


def curve() -> pd.DataFrame:
    return pd.DataFrame({"seed": [0, 0, 1, 1], "epoch": [1, 2, 1, 2], "curve": [2.0, 1.0, 2.5, 0.5]})


def grids() -> dict:
    y, x = np.mgrid[0:3, 0:4]
    return {name: {"x": np.arange(4.0), "y": np.arange(3.0), "errors": (x + y + shift) / 10, "losses": x * 1.0,
                   "corners": np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]])} for name, shift in (("dense", 0), ("IMP", 3))}


EACH = {"learning_curves": (curve(),), "bars": (table().rename(columns={"arm": "set"}), "set", "accuracy", "accuracy (%)"),
        "against_sparsity": (table(), "error", "test error (%)"), "paths": (lines(),), "planes": (grids(),),
        "curvature": (table(), {"trace": "trace", "top_eigenvalue": "top eigenvalue"}),
        "diagonals": ({"dense": np.linspace(-1, 5, 50), "imp": np.zeros(50) + 0.01},)}


def drawn(figure: Figure) -> bytes:
    """The figure as a picture, any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@pytest.mark.parametrize("name", EACH)
def test_a_figure_for_results_and_one_for_none(name):
    function, (first, *rest) = getattr(figures, name), EACH[name]
    full = function(first, *rest)
    assert isinstance(full, Figure)
    assert drawn(full) == drawn(function(first, *rest))  # equal results give equal files
    empty = function(first.iloc[:0] if isinstance(first, pd.DataFrame) else {}, *rest)
    assert [text.get_text() for text in empty.axes[0].texts] == ["nothing measured yet"]
    assert drawn(empty) != drawn(full)


@pytest.mark.parametrize("name", ["bars", "against_sparsity", "curvature"])
def test_a_figure_when_every_network_diverged(name):
    first, *rest = EACH[name]
    columns = ["error", "accuracy", "trace", "top_eigenvalue"]
    diverged = first.assign(failed="diverged at step 0", **dict.fromkeys(columns, np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = getattr(figures, name)(diverged, *rest)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no network has a result"]


def test_against_sparsity_draws_the_means_over_seeds_in_percent():
    axes = figures.against_sparsity(table(), "error", "test error (%)", rule=0.02).axes[0]
    by_label = {line.get_label(): line for line in axes.get_lines()}
    imp = by_label["IMP, rewound to start (n = 2)"]
    np.testing.assert_allclose(imp.get_ydata(), [22.0, 34.0])
    assert np.abs(np.asarray(imp.get_xdata()) - [36, 67]).max() < 1  # beside one another, at their sparsity
    assert same_color(imp.get_color(), figures.COLOURS["imp"])
    # the diverged seed is left out, and the legend says how many are behind the point with the fewest
    np.testing.assert_allclose(by_label["distilled pruning (IDC) (n = 1)"].get_ydata(), [22.0, 40.0])
    np.testing.assert_allclose(by_label["dense (n = 2)"].get_ydata(), [12.0, 12.0])
    assert any(np.allclose(line.get_ydata(), 2.0) for line in axes.get_lines())  # the rule
    assert [int(tick) for tick in axes.get_xticks()] == [36, 67]


def test_bars_are_as_long_as_their_means_and_every_seed_is_a_dot():
    data = table()[table()["percent"] == 67].rename(columns={"arm": "set"})
    axes = figures.bars(data, "set", "accuracy", "accuracy (%)").axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["IMP, rewound to start (n = 2)", "distilled pruning (IDC) (n = 1)"]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [66.0, 60.0])
    dots = [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(np.concatenate(dots), [70.0, 62.0, 60.0])


def test_paths_draw_each_pair_and_their_mean():
    figure = figures.paths(lines())
    assert [axes.get_title() for axes in figure.axes] == ["dense", "67% sparse"]
    drawn_lines = [line.get_ydata() for line in figure.axes[0].get_lines()]
    np.testing.assert_allclose(drawn_lines, [[0, 20, 40], [10, 30, 50], [5, 25, 45]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "IMP, rewound to start"]


def test_curvature_shows_geometric_means_on_a_logarithmic_axis():
    figure = figures.curvature(table()[table()["percent"] != 36], {"trace": "trace"})
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    means = [line.get_ydata()[0] for line in axes.get_lines() if line.get_marker() == "None"]
    np.testing.assert_allclose(means, [10 * np.sqrt(0.10 * 0.14), 10 * np.sqrt(0.30 * 0.38), 4.0])


def test_planes_share_one_scale_and_mark_the_children():
    figure = figures.planes(grids())
    first, second, bar = figure.axes
    assert (first.get_title(), second.get_title()) == ("dense", "IMP")
    assert bar.get_ylim() == pytest.approx((0.0, 80.0))
    assert [text.get_text() for text in first.texts] == ["child 0", "child 1", "child 2"]
    np.testing.assert_allclose([line.get_xydata()[0] for line in first.get_lines()], grids()["dense"]["corners"])


def test_diagonals_are_shares_that_sum_to_one():
    axes = figures.diagonals(EACH["diagonals"][0]).axes[0]
    assert [patch.get_data().values.sum() for patch in axes.patches] == [pytest.approx(1.0), pytest.approx(1.0)]


def test_sheet_puts_every_image_in_its_row():
    images = np.stack([np.full((2, 2, 3), (i + 1) / 10) for i in range(6)])
    axes = figures.sheet(images, ["a", "b"], 3).axes[0]
    canvas = axes.images[0].get_array()
    assert canvas.shape == (5, 8, 3)
    np.testing.assert_allclose(canvas[0, [0, 3, 6], 0], [0.1, 0.2, 0.3])
    np.testing.assert_allclose(canvas[3, [0, 3, 6], 0], [0.4, 0.5, 0.6])
    assert canvas[2].min() == canvas[:, 2].min() == 1.0  # the gaps
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]


def test_figures_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures.paths(lines())
    assert dict(matplotlib.rcParams) == before
