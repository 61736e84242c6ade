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

from dpkit.report import comparison, figures, frames


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


def sets() -> pd.DataFrame:
    """Small sets of every group on two networks, some with soft labels; one network diverged."""
    rows = []
    for name, values in (("idc", [0.4, 0.5]), ("dm", [0.5, 0.6]), ("random_real", [0.3, np.nan]), ("theirs", [0.2, 0.3]),
                         ("generator", [0.3, 0.3]), ("idc_soft", [0.6, 0.62]), ("random_real_soft", [0.45, 0.5]),
                         ("all_data", [0.8, 0.9])):
        rows += [{"set": name, "arch": arch, "seed": seed, "accuracy": value - less, "seconds": 30.0,
                  "failed": "diverged at step 3" if np.isnan(value) else None}
                 for seed, value in enumerate(values) for arch, less in (("convnet3", 0.0), ("resnet10", 0.1))]
    return pd.DataFrame(rows)


def costs() -> pd.DataFrame:
    return pd.DataFrame([{"set": name, "seed": 0, "own_seconds": own, "networks": len(keys), "network_seconds": 5.0 * len(keys),
                          "networks_of": keys, "memory": memory, "stored_images": None if failed else 20,
                          "training_images": None if failed else 80, "failed": failed, "key": name}
                         for name, own, keys, memory, failed in (
                             ("idc", 90.0, (), 2_500_000_000, None), ("dm", 0.001, ("a", "b"), 0, None),
                             ("random_real", 0.0, ("b",), 1_000_000_000, None), ("mtt", 3.0, (), 1, "not finite"))])


def history() -> pd.DataFrame:
    return pd.DataFrame([{"set": name, "seed": 0, "share": share, "loss": loss} for name in ("idc", "mtt")
                         for share, loss in ((0.5, 1.0), (1.0, 0.25))])


ONE = sets()[sets()["arch"] == "convnet3"].reset_index(drop=True)
COMPARED = {"accuracies": (ONE,), "labels": (ONE,), "architectures": (sets(),), "price": (comparison.priced(costs(), ONE),),
            "progress": (history(),)}
EACH = {"learning_curves": (curve(),), "bars": (table().rename(columns={"arm": "set"}), "set", "accuracy", "accuracy (%)"),
        "against_sparsity": (table(), "error", "test error (%)"), "paths": (lines(),)}


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


@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_for_results_and_one_for_none(name):
    function, (table,) = getattr(comparison, name), COMPARED[name]
    full = function(table)
    assert drawn(full) == drawn(function(table))
    empty = function(table.iloc[:0])
    assert len(empty.axes[0].texts) == 1
    assert drawn(empty) != drawn(full)
    if "failed" in table:
        diverged = function(table.assign(failed="diverged at step 0", accuracy=np.nan))
        assert len(diverged.axes[0].texts) == 1


@pytest.mark.parametrize("name", ["bars", "against_sparsity"])
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


# --- comparing small sets ---------------------------------------------------------------------------------------------

def test_sets_are_ranked_within_their_groups():
    stats = comparison.ranked(ONE)
    assert stats["group"].tolist() == ["learned"] * 3 + ["generated"] + ["chosen"] * 2 + ["published", "all data"]
    assert stats["set"].tolist() == [
        "idc_soft", "dm", "idc", "generator", "random_real_soft", "random_real", "theirs", "all_data"]


def test_accuracies_are_bars_of_the_means_with_a_dot_a_seed():
    axes = comparison.accuracies(ONE[~ONE["set"].str.endswith("_soft")], chance=0.1).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "DM (n = 2)", "IDC (n = 2)", "diffusion model (n = 2)", "random real subset (n = 1)", "theirs (n = 2)",
        "all data (n = 2)"]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [55, 45, 30, 30, 25, 85])
    assert same_color(axes.patches[0].get_facecolor(), figures.COLOURS["dm"])
    assert sum(len(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o") == 11
    assert {text.get_text() for text in axes.texts} == {"learned", "generated", "chosen", "published", "chance"}
    tops = [bar.get_y() for bar in axes.patches]
    assert tops == sorted(tops)
    assert axes.yaxis_inverted()  # the first row is on top


def test_labels_pairs_each_set_with_its_soft_form():
    axes = comparison.labels(ONE).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["IDC (n = 2)", "random real subset (n = 1)"]
    marks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    np.testing.assert_allclose(marks, [45, 61, 30, 47.5])
    few = comparison.labels(ONE[ONE["set"] != "idc"].iloc[:2])
    assert [text.get_text() for text in few.axes[0].texts] == ["no set was measured with both kinds of labels"]


def test_architectures_have_a_panel_each_and_equal_rows():
    first, second = comparison.architectures(sets()).axes
    assert (first.get_title(), second.get_title()) == ("convnet3", "resnet10")
    assert first.get_xlim() == second.get_xlim()
    names = [text.get_text() for text in first.get_yticklabels()]
    row = names.index("DM")
    for panel, value in ((first, 55), (second, 45)):
        (mark,) = [line for line in panel.get_lines() if line.get_marker() == figures.MARKERS["dm"]]
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (pytest.approx(value), row)
    assert list(comparison.by_architecture(sets()).columns) == ["convnet3", "resnet10"]
    assert comparison.by_architecture(sets()).loc["DM", "resnet10"].startswith("45.0% [")
    assert len(comparison.by_architecture(sets().iloc[:0])) == 0


def test_the_price_of_a_set_is_its_own_and_that_of_its_networks():
    found = comparison.priced(costs(), ONE).set_index("set")
    assert found.loc["dm", ["own_seconds", "network_seconds"]].tolist() == [0.001, 10.0]
    assert found.loc["all_data", ["own_seconds", "network_seconds"]].tolist() == [30.0, 0.0]
    assert set(found.index) == {"idc", "dm", "random_real", "all_data"}  # what failed or has no costs has no place
    axes = comparison.price(found.reset_index()).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["DM"].get_xdata()[0] == comparison.LEAST
    assert lines["IDC"].get_xdata()[0] == 90.0
    assert any(list(line.get_xdata()) == [comparison.LEAST, 10.001] for line in axes.get_lines())


def test_progress_has_a_panel_a_method_and_one_scale():
    more = history().assign(seed=1, loss=lambda t: t["loss"] * 2)
    figure = comparison.progress(pd.concat([history(), more[more["set"] == "mtt"], history().assign(set="dm")]), columns=2)
    first, second, third, fourth = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["IDC", "MTT", "DM", ""]
    assert not fourth.axison
    assert third.axison
    assert first.get_ylim() == second.get_ylim()
    lines = [line.get_ydata().tolist() for line in second.get_lines() if line.get_marker() == "o"]
    assert lines == [[1.0, 0.25], [2.0, 0.5]]


def test_the_table_of_costs_says_what_is_not_known():
    table = comparison.cost_table(costs(), ONE)
    assert table.loc["IDC"].tolist()[:-1] == [20, 80, 1, "90.0 s", "none", "2.50 GB"]
    assert table.loc["DM"].tolist()[3:-1] == ["< 0.1 s", "2, 10.0 s", "not known"]
    assert table.loc["MTT", "accuracy"] == "failed: not finite"
    assert table.loc["IDC", "accuracy"] == "45.0%"
    assert comparison.cost_table(costs(), ONE.iloc[:0]).loc["IDC", "accuracy"] == "not measured"
    assert comparison.sharing(costs()) == ["1 network: DM; random real subset"]


def test_panels_show_each_set_in_its_place():
    blocks = {name: np.full((4, 2, 3, 3), value) for name, value in (("one", 0.1), ("two", 0.2), ("three", 0.3))}
    figure = figures.panels(blocks, ["a", "b"], columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "three", ""]
    assert [axes.images[0].get_array()[0, 0, 0] for axes in figure.axes[:3]] == [0.1, 0.2, 0.3]
    assert [[t.get_text() for t in axes.get_yticklabels()] for axes in figure.axes[:3]] == [["a", "b"], ["", ""], ["a", "b"]]
    assert figures.panels({}, []).axes[0].texts[0].get_text() == "nothing made yet"


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour, as an eye with the matrix ``seen`` on linear RGB sees it."""
    rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = seen @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear.clip(0, 1)
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", [
    np.eye(3),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])],
    ids=["all cones", "protanopia", "deuteranopia"])  # matrices: Machado et al. 2009, severity 1
def test_the_colours_of_sets_can_be_told_apart(seen):
    names = [name for group in frames.GROUPS.values() for name in group]
    assert len({figures.MARKERS[name] for name in names}) == len(names)
    places = {name: lab(figures.COLOURS[name], seen) for name in names}
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            # marks and labels tell them apart too; a difference of about 2 is just noticeable
            assert np.linalg.norm(places[a] - places[b]) > 10, (a, b)
    assert figures.colour("idc_soft") == figures.COLOURS["idc"]
    assert figures.colour("theirs") == figures.OTHER
