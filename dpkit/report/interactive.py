"""Landscapes and paths to touch, for the book and for Jupyter: planes (:func:`surface`), and a line with a slider (:func:`line`).

Each view is one plotly figure whose selectors and legend are plotly's own; see :mod:`dpkit.report.explorer` for why. On a line,
what is visible is a matter of the sparsity and the legend; where the points and the values beside the names are is one of alpha.
"""
from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from dpkit.report.arm_figures import LINES
from dpkit.report.arms import called, ordered
from dpkit.report.interactive_planes import surface
from dpkit.report.interactive_view import FONT, LIMIT, MENU, NOTE, SMALL, View, plain, sized
from dpkit.report.landscape_panels import VALUES, styles

__all__ = ["View", "few", "line", "surface"]

DASHES = dict(zip(LINES, ("solid", "dash", "dot", "dashdot"), strict=True))
TOP, PANEL, SLIDER, ENTRY = 62, 280, 105, 19  # pixels: selector; panels; the axes below and the slider; an arm's name
MOST = 6  # arms that can still be told apart beside the dense network
START = 0.5  # where the slider stands first: where barriers are highest most often


def few(arms: Sequence[str], preferred: Sequence[str] = ()) -> list[str]:
    """The arms of a view with a slider, ``dense`` first: the ``preferred`` ones if there are others, or else the first six.

    >>> few(["imp", "ltr", "random"], ["dense"]), few(["imp", "ltr", "random"], ["dense", "ltr"])
    (['dense', 'imp', 'ltr', 'random'], ['dense', 'ltr'])
    """
    return ["dense", *([name for name in preferred if name != "dense"] or [name for name in arms if name != "dense"][:MOST])]


def line(table: pd.DataFrame, limit: int = LIMIT, label: str = "test") -> View:
    """Error and loss on the lines between children, with a slider for the position alpha: points on all curves, and their values.

    table: a row a point: arm, percent, seed, alphas, errors (fractions), losses (nats), and ``key`` or ``pair`` of the line. A
    curve is the mean over initialisations of means over their lines, at the positions that all lines of an arm have; the band
    runs from the lowest line to the highest. Between positions that were measured the slider follows the curve as drawn. With
    several sparsities one is chosen; ``dense`` is shown with each. label: the data, as in "test error (%)". Raises ``ValueError``
    without rows, and when the HTML would take more than ``limit`` bytes.
    """
    if not len(table):
        raise ValueError("the view of lines needs at least one line between children, got none; compute the chapter on "
                         "connectivity first")
    curves = _curves(table)
    levels = sorted({percent for arm, percent in curves if arm != "dense"})
    return sized(View(json.loads(_figure(curves, levels or [0], label).to_json()), "line"), limit)


def _curves(table: pd.DataFrame) -> dict[tuple[str, int], dict]:
    """By arm and sparsity: alphas (T,), n initialisations, and for error (percent) and loss mean, low and high (T,)."""
    found = {}
    lines = [name for name in ("seed", "pair", "key") if name in table]
    for arm in ordered(table["arm"]):
        for percent, part in table[table["arm"] == arm].groupby("percent"):
            part = part.assign(alphas=part["alphas"].round(9))
            shared = part.groupby("alphas").size()
            alphas = shared[shared == part.drop_duplicates(lines).shape[0]].index.to_numpy()
            if len(alphas) < 2:
                raise ValueError(f"the lines of {arm} at {percent}% must share at least 2 positions, got {len(alphas)}; measure "
                                 f"them with the same number of points")
            part = part[part["alphas"].isin(alphas)]
            curve = {"alphas": alphas, "n": part["seed"].nunique()}
            for value, (factor, _, _) in VALUES.items():
                mean = part.groupby(["alphas", "seed"])[value].mean().groupby("alphas").mean()
                ends = part.groupby("alphas")[value].agg(["min", "max"])
                curve[value] = [factor * v.to_numpy(dtype=float) for v in (mean, ends["min"], ends["max"])]
            found[arm, int(percent)] = curve
    return found


def _figure(curves: dict[tuple[str, int], dict], levels: list[int], label: str) -> go.Figure:
    places = [place for level in levels for place in curves if place[1] == level or (place[0] == "dense" and level == levels[0])]
    looks = styles(list(dict.fromkeys(arm for arm, _ in places)))
    longest = max(sum(arm == "dense" or percent == level for arm, percent in places) for level in levels)
    above = TOP if len(levels) > 1 else 25
    below = SLIDER + ENTRY * longest
    height = above + PANEL + below
    figure = go.Figure(layout={
        "template": "none", "font": FONT, "height": height, "hovermode": "closest", "paper_bgcolor": "white",
        "plot_bgcolor": "white", "margin": {"l": 50, "r": 20, "t": above, "b": below},
        "legend": {"orientation": "v", "x": 0, "xanchor": "left", "y": -SLIDER / PANEL, "yanchor": "top", "font": SMALL,
                   "itemclick": "toggle", "groupclick": "togglegroup", "itemdoubleclick": False, "tracegroupgap": 0}})
    steps = sorted({float(a) for curve in curves.values() for a in curve["alphas"]})
    start = int(np.abs(np.array(steps) - START).argmin())
    points = _points(curves, places, steps)
    shown = [arm == "dense" or percent == levels[-1] for arm, percent in places]
    for place, visible in zip(places, shown, strict=True):
        figure.add_traces(_lines(curves[place], looks[place[0]], visible, _group(place)))
    for axis in ("", "2"):
        for i, place in enumerate(places):
            y = points["errors" if not axis else "losses"][start][i]
            figure.add_trace(go.Scatter(
                x=[steps[start]], y=[y], name=points["names"][start][i], xaxis=f"x{axis}", yaxis=f"y{axis}", visible=shown[i],
                showlegend=not axis, legendgroup=_group(place), mode="markers", hoverinfo="skip",
                marker={"size": 10, "color": looks[place[0]]["color"], "line": {"color": "white", "width": 1.5}}))
    _controls(figure, places, levels, points, steps, start)
    grid = {"gridcolor": "#EEEEEE", "zeroline": False, "fixedrange": True, "tickfont": SMALL}
    for axis, value, domain in (("", "errors", [0, 0.44]), ("2", "losses", [0.56, 1])):
        tops = [curve[value][2].max() for place, curve in curves.items() if place in places]
        figure.update_layout({
            f"xaxis{axis}": {**grid, "title": {"text": "position α on the line", "font": SMALL}, "domain": domain,
                             "anchor": f"y{axis}", "range": [-0.03, 1.03]},
            f"yaxis{axis}": {**grid, "title": {"text": f"{label} {VALUES[value][1]}", "font": SMALL}, "anchor": f"x{axis}",
                             "range": [0, round(1.05 * max(tops), 4)]}})
    return figure


def _group(place: tuple[str, int]) -> str:
    """What a click on a name in the legend hides together: band, means and points of one arm at one sparsity."""
    return f"{place[0]}@{place[1]}"


def _lines(curve: dict, look: dict, visible: bool, group: str) -> list[go.Scatter]:
    """Band and mean of a curve, in the panel of the error and in that of the loss."""
    found, x = [], plain(curve["alphas"], 5)
    for value, axis in (("errors", ""), ("losses", "2")):
        mean, low, high = (plain(v, 4) for v in curve[value])
        common = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "visible": visible, "showlegend": False, "legendgroup": group}
        red, green, blue = hex_to_rgb(look["color"])
        found += [go.Scatter(x=x + x[::-1], y=high + low[::-1], mode="lines", line={"width": 0}, fill="toself", hoverinfo="skip",
                             fillcolor=f"rgba({red},{green},{blue},0.13)", **common),
                  go.Scatter(x=x, y=mean, mode="lines", line={"width": 2, "color": look["color"],
                                                              "dash": DASHES[look["linestyle"]]},
                             hovertemplate="α = %{x}: %{y}" + "%" * (value == "errors") + "<extra></extra>", **common)]
    return found


def _points(curves: dict, places: list, steps: list[float]) -> dict[str, list[list]]:
    """For each position of the slider and each curve: error in percent, loss, and the name with both."""
    found: dict[str, list[list]] = {"errors": [], "losses": [], "names": []}
    for alpha in steps:
        values = {value: [float(np.interp(alpha, curves[p]["alphas"], curves[p][value][0])) for p in places] for value in VALUES}
        for value, row in values.items():
            found[value].append(plain(np.array(row), 4))
        found["names"].append([f"{called(arm)} (n = {curves[arm, percent]['n']}): error {_text(error, '%')}, loss {_text(loss)}"
                               for (arm, percent), error, loss in zip(places, *values.values(), strict=True)])
    return found


def _text(value: float, unit: str = "") -> str:
    if not np.isfinite(value):
        return "not finite"
    return f"{value:.1f}{unit}" if unit else f"{value:.3f}" if value < 10 else f"{value:.4g}"


def _controls(figure: go.Figure, places: list, levels: list[int], points: dict, steps: list[float], start: int) -> None:
    many = len(places)
    first = 4 * many  # after bands and means of both panels
    marks = [*range(first, first + 2 * many)]
    sliding = [{"label": f"{alpha:.4g}", "method": "restyle",
                "args": [{"x": [[round(alpha, 5)]] * 2 * many,
                          "y": [[v] for v in points["errors"][k]] + [[v] for v in points["losses"][k]],
                          "name": points["names"][k] * 2}, marks]} for k, alpha in enumerate(steps)]
    figure.update_layout(sliders=[{
        "active": start, "steps": sliding, "x": 0, "len": 1, "y": -38 / PANEL, "yanchor": "top", "pad": {"t": 0, "b": 0},
        "currentvalue": {"prefix": "α = ", "font": {"size": 13, "color": "#333333"}, "xanchor": "center"},
        "ticklen": 0, "minorticklen": 0,
        "font": {"size": 10, "color": "rgba(0,0,0,0)"}, "transition": {"duration": 0}}])
    if len(levels) > 1:
        buttons = []
        for level in levels:
            seen = [arm == "dense" or percent == level for arm, percent in places]
            visible = [s for s in seen for _ in range(4)] + seen * 2
            buttons.append({"label": f"{level}%", "method": "restyle", "args": [{"visible": visible}, [*range(6 * many)]]})
        figure.update_layout(
            updatemenus=[{**MENU, "active": len(levels) - 1, "x": 0, "y": 1 + 12 / PANEL, "buttons": buttons}],
            annotations=[{**NOTE, "text": "sparsity", "x": 0, "y": 1 + 43 / PANEL, "font": {"size": 10, "color": "#555555"}}])
