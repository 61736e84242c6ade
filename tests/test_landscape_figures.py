"""Landscapes for print: scales common to panels, marks where the networks are, values of the grids in percent and nats."""
from __future__ import annotations

import doctest
import io

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import LogNorm, same_color
from matplotlib.figure import Figure

from dpkit.report import figures
from dpkit.report import landscape_figures as draw
from dpkit.report import landscape_panels as parts

ARMS = ("dense", "imp@67", "distilled@67", "random@67")


def grid(shift: float = 0.0, across: float = 6.0) -> dict[str, np.ndarray]:
    """A bowl about (1, 1) on 7 x 5 points; three corners."""
    x, y = np.linspace(-2, across, 7), np.linspace(-1, 3, 5)
    bowl = (x[None] - x[2]) ** 2 / 40 + (y[:, None] - 1) ** 2 / 8
    return {"x": x, "y": y, "errors": 0.1 + shift + 0.4 * bowl, "losses": 0.2 + shift + bowl,
            "corners": np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 2.0]])}


def grids(names=ARMS) -> dict:
    return {name: grid(0.05 * i) for i, name in enumerate(names)}


def walk() -> dict[str, np.ndarray]:
    positions = np.array([[[1.5, 1.0], [0.5, 0.5], [0.0, 0.0]], [[1.5, 1.0], [9.0, 0.5], [4.0, 0.0]]])
    return {"positions": positions, "outside": np.array([[3.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), "steps": np.array([0, 10, 20])}


def drawn(figure: Figure) -> Figure:
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


def colour_bar(figure: Figure):
    return next(axes for axes in figure.axes if axes.get_label() == "<colorbar>")


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def test_examples_of_names_hold():
    assert doctest.testmod(parts).failed == 0
    assert parts.caption("imp@67", 30) == "IMP, rewound to start\n67% sparse"
    assert parts.caption("dense@0", 30) == "dense"


@pytest.mark.parametrize("value", ["errors", "losses"])
def test_all_panels_share_one_scale_and_name_its_unit(value):
    figure = drawn(draw.contours(grids(), value))
    factor, unit, log = parts.VALUES[value]
    found = np.concatenate([factor * g[value].ravel() for g in grids().values()])
    bar = colour_bar(figure)
    assert bar.get_ylabel() == f"test {unit}"
    assert bar.get_ylim() == pytest.approx((found.min(), found.max()))
    assert bar.get_yscale() == ("log" if log else "linear")
    for panel in panels(figure):
        filled = panel.collections[0]
        assert (filled.norm.vmin, filled.norm.vmax) == pytest.approx((found.min(), found.max()))
        assert isinstance(filled.norm, LogNorm) == log
    assert [panel.get_title() for panel in panels(figure)][:2] == ["dense", "IMP, rewound to start\n67% sparse"]
    assert len(panels(figure)) == 4  # two and two, none empty


def test_children_and_the_lowest_point_are_where_they_belong():
    panel = panels(drawn(draw.contours({"dense": grid()})))[0]
    at = {line.get_marker(): [] for line in panel.get_lines()}
    for line in panel.get_lines():
        at[line.get_marker()].append(line.get_xydata()[0].tolist())
    assert at["o"] == grid()["corners"].tolist()
    assert at["P"] == [[grid()["x"][2], 1.0]]  # the bottom of the bowl
    assert [text.get_text() for text in panel.texts] == ["child 0", "child 1", "child 2"]
    assert "P" not in {line.get_marker() for line in panels(draw.contours({"dense": grid()}, minima=False))[0].get_lines()}


def test_trajectories_start_at_a_triangle_and_widen_the_panel():
    figure = drawn(draw.contours({"dense": grid(), "imp@67": grid()}, trajectories={"dense": walk()}))
    first, second = panels(figure)
    starts = [line.get_xydata()[0].tolist() for line in first.get_lines() if line.get_marker() == "^"]
    assert starts == [[1.5, 1.0], [1.5, 1.0]]
    lines = [line.get_xydata() for line in first.get_lines() if len(line.get_xydata()) == 3]
    np.testing.assert_array_equal(lines, walk()["positions"])
    dots = [shape for shape in first.collections if len(shape.get_offsets()) == 2]
    np.testing.assert_array_equal([dot.get_offsets() for dot in dots], walk()["positions"][:, 1:])
    assert dots[0].get_facecolors()[-1, 3] == 1  # the child lies on the plane
    assert dots[0].get_facecolors()[0, 3] == pytest.approx(1 - 0.8 / 3)
    assert first.get_xlim()[1] > 9 > second.get_xlim()[1] == 6  # which one run leaves
    assert first.get_xlim()[0] == -2
    assert texts(figure) == ["lowest point of the grid", "start of training", "during training, fainter far from the plane"]


def test_points_without_a_value_leave_a_gap_and_do_not_set_the_scale():
    broken = grid()
    broken["losses"][0, :3] = np.nan, np.inf, 0.0
    figure = drawn(draw.contours({"dense": broken}, "losses"))
    positive = broken["losses"][np.isfinite(broken["losses"]) & (broken["losses"] > 0)]
    assert colour_bar(figure).get_ylim() == pytest.approx((positive.min(), positive.max()))
    broken["losses"][:] = np.nan
    assert [t.get_text() for t in draw.contours({"dense": broken}, "losses").axes[0].texts] == ["no point has a finite value"]
    assert [t.get_text() for t in draw.surfaces({"dense": broken}).axes[0].texts] == ["no point has a finite value"]


@pytest.mark.parametrize("value", ["errors", "losses"])
@pytest.mark.parametrize("level", [0.0, 0.25])
def test_a_plane_on_which_nothing_changes_is_drawn(value, level):
    flat = {**grid(), value: np.full((5, 7), level)}
    drawn(draw.contours({"dense": flat}, value))
    drawn(draw.surfaces({"dense": flat}, value))


def test_two_data_sets_have_a_scale_each():
    pairs = {arm: {"test images": grid(), "distilled set": {**grid(), "losses": grid()["losses"] ** 4}} for arm in ARMS[:2]}
    figure = drawn(draw.compared(pairs, trajectories={"dense": walk()}))
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert [bar.get_xlabel() for bar in bars] == ["test images: loss (nats)", "distilled set: loss (nats)"]
    low, high = grid()["losses"].min(), grid()["losses"].max()
    assert [bar.get_xlim() for bar in bars] == [pytest.approx((low, high)), pytest.approx((low ** 4, high ** 4))]
    found = panels(figure)
    assert [panel.get_title() for panel in found] == ["test images", "distilled set", "", ""]
    assert [panel.get_ylabel() for panel in found] == ["dense", "", "IMP, rewound to start\n67% sparse", ""]
    assert all(sum(line.get_marker() == "^" for line in panel.get_lines()) == 2 for panel in found[:2])


def test_squares_and_random_directions_say_what_their_axes_are():
    square = {**grid(), "x": np.linspace(0, 1, 7), "y": np.linspace(0, 1, 5),
              "corners": np.array([[0, 0], [1, 0], [0, 1], [1, 1]])}
    panel = panels(drawn(draw.squares({"imp@67": square})))[0]
    assert panel.get_xlabel() == "ratio along the first side"
    assert [text.get_text() for text in panel.texts] == [f"child {i}" for i in range(4)]
    without = {name: values for name, values in grid().items() if name != "corners"}
    panel = panels(drawn(draw.around({"imp@67": without})))[0]
    assert panel.get_xlabel() == "first direction (filter norms)"
    assert [line.get_xydata().tolist() for line in panel.get_lines()] == [[[0.0, 0.0]]]


def test_profiles_are_means_over_directions_with_their_range():
    t = np.linspace(-1, 1, 5)
    losses = np.stack([0.1 + t ** 2, 0.3 + t ** 2])
    table = {name: {"t": t, "errors": losses / 4, "losses": losses} for name in ("imp@67", "imp@89", "distilled_shuffled@67")}
    figure = drawn(draw.profiles(table))
    error, loss = figure.axes
    assert (error.get_ylabel(), loss.get_ylabel(), loss.get_yscale()) == ("test error (%)", "test loss (nats)", "log")
    np.testing.assert_allclose(error.get_lines()[0].get_ydata(), 25 * (0.2 + t ** 2))
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), 0.2 + t ** 2)
    heights = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.1, 1.3))
    assert same_color(error.get_lines()[0].get_color(), figures.colour("imp"))
    assert len({(line.get_color(), line.get_linestyle()) for line in error.get_lines() if len(line.get_xdata()) == 5}) == 3
    table["imp@67"]["losses"] = np.where(t == 1, [[np.inf], [1.3]], losses)
    np.testing.assert_allclose(draw.profiles(table).axes[1].get_lines()[0].get_ydata(), [*(0.2 + t[:4] ** 2), np.nan])
    assert texts(figure)[1] == "IMP, rewound to start, 89% sparse (2 directions)"


def test_surfaces_stand_on_one_scale_over_their_contours():
    figure = drawn(draw.surfaces(dict(list(grids().items())[:3])))
    found = panels(figure)
    assert len({panel.get_zlim() for panel in found}) == 1
    everything = np.concatenate([g["losses"].ravel() for g in list(grids().values())[:3]])
    low, high = np.log10(everything.min()), np.log10(everything.max())
    assert found[0].get_zlim() == pytest.approx((low - 0.25 * (high - low), high))
    ticks = found[0].get_zticks()
    words = [float(text.get_text()) for text in found[0].get_zticklabels()]
    np.testing.assert_allclose(10 ** np.asarray(ticks), words, rtol=1e-6)


@pytest.mark.parametrize("function", [draw.contours, draw.squares, draw.around, draw.compared, draw.profiles, draw.surfaces])
def test_nothing_measured_is_said(function):
    assert [text.get_text() for text in drawn(function({})).axes[0].texts] == ["nothing measured yet"]


def test_what_cannot_be_drawn_is_refused_in_one_line():
    turned = {**grid(), "errors": grid()["errors"].T}
    with pytest.raises(ValueError, match=r"^the grid of imp must have errors of shape \(y, x\).*got \(7, 5\) for 5 values"):
        draw.contours({"imp": turned})
    for function in (draw.contours, draw.surfaces):
        with pytest.raises(ValueError, match=r"^value must be one of errors, losses, got 'loss'"):
            function({"imp": grid()}, "loss")
    with pytest.raises(ValueError, match=r"^at most 3 surfaces can be read in one figure, got 4"):
        draw.surfaces(grids())
    with pytest.raises(ValueError, match=r"^all arms must have the same data, got test images for the first and none for imp"):
        draw.compared({"dense": {"test images": grid()}, "imp": {}})
    with pytest.raises(ValueError, match=r"^the profiles of imp must have errors of shape \(directions, t\), got \(2, 4\)"):
        draw.profiles({"imp": {"t": np.arange(3.0), "errors": np.ones((2, 4)), "losses": np.ones((2, 3))}})
    with pytest.raises(ValueError, match=r"^a trajectory must have positions \(runs, steps, 2\)"):
        draw.contours({"imp": grid()}, trajectories={"imp": {**walk(), "outside": np.zeros(3)}})


def test_figures_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    draw.surfaces({"imp": grid()})
    draw.contours({"imp": grid()})
    assert dict(matplotlib.rcParams) == before


def square(**more) -> dict:
    """A square of four children at its own corners."""
    lines = np.linspace(0, 1, 5)
    return {"x": lines, "y": lines, "errors": np.add.outer(lines, lines) / 4, "losses": 1 + np.add.outer(lines, lines),
            "corners": np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]]), **more}


def test_names_of_children_lie_inside_of_a_square_and_not_on_its_numbers():
    panel = panels(drawn(draw.squares({"dense": square()})))[0]
    assert [(name.get_text(), name.xyann[1] > 0, name.get_va()) for name in panel.texts] == [
        ("child 0", True, "bottom"), ("child 1", True, "bottom"), ("child 2", False, "top"), ("child 3", False, "top")]
    plane = panels(drawn(draw.contours({"dense": grid()})))[0]  # with room around the children, names lie outside
    assert [name.xyann[1] > 0 for name in plane.texts] == [False, False, True]


def test_the_published_plane_names_the_two_children_that_it_holds():
    panel = panels(drawn(draw.squares({"dense": square(form="diagonals")})))[0]
    assert [text.get_text() for text in panel.texts] == ["child 0", "child 3"]


def test_axes_of_surfaces_have_names():
    first, second = panels(drawn(draw.surfaces({"dense": grid(), "imp@67": grid(0.1)})))
    assert (first.get_xlabel(), first.get_ylabel(), first.get_zlabel()) == ("first axis", "second axis", "test loss (nats)")
    assert second.get_xlabel() == "first axis"
