"""Planes to touch: contours or surfaces that turn, for several arms, error and loss, on real and on distilled data.

One plotly figure whose selectors are plotly's own, as in :mod:`dpkit.report.explorer`, so that it works in the book and in
Jupyter. Selectors have to combine, and plotly's can only set fixed values, so each has its own means. The arm decides which
traces are visible; what is measured makes the others transparent and changes the colour bar; the view changes the traces' type,
from contours to surfaces and back. It starts with contours, and with no trace of a type that needs WebGL: where that is
missing plotly shows nothing at all if such a trace is there, visible or not. Hovering uses no templates: a trace that has one is
never silent.

Losses are drawn by their decimal logarithm, with ticks and hover in nats: plotly knows no logarithmic colours. Whole
thousandths of it are short.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.ticker import LogLocator, MaxNLocator

from dpkit.report.interactive_view import FONT, LIMIT, MENU, NOTE, SMALL, View, plain, sized
from dpkit.report.landscape_panels import COLOURS, VALUES, Grid, checked, heading, is_log, scale

HEIGHT, TOP, BELOW = 570, 118, 55  # pixels of the view of planes: whole, selectors, axis below
THINNED = (1, 2, 3, 4)  # every so many-th line of the grids, until the HTML is short enough
LOG = 1000  # a decade of loss, as drawn


def surface(grids: Mapping[str, Mapping[str, Grid]], trajectories: Mapping[str, Grid] | None = None, limit: int = LIMIT) -> View:
    """Planes through children: choose the arm, what is measured, and contours or a surface that turns.

    grids: by arm (``imp`` or ``imp@67``), then by the data evaluated, such as ``{"test images": grid, "distilled set": grid}``;
    a grid as in :mod:`dpkit.report.landscape_figures`. All arms share the scale of a measure; that of losses is logarithmic.
    trajectories: by arm, runs of SGD projected onto the plane, as of :func:`~dpkit.report.landscape_figures.contours`; they are
    drawn on the contours. Where the HTML would take more than ``limit`` bytes, lines of the grids are left out.
    Raises ``ValueError`` when there is nothing to show, when arms have different data, or when even that is too large.
    """
    data = list(next(iter(grids.values()))) if grids else []
    if not data:
        raise ValueError("the view of planes needs at least one grid, got none; compute the chapter on landscapes first")
    for name, found in grids.items():
        if list(found) != data:
            raise ValueError(f"all arms must have the same data, got {', '.join(data)} for the first and "
                             f"{', '.join(found) or 'none'} for {name}; leave out what not all have")
    for step in THINNED:
        view = View(_Planes(grids, data, trajectories or {}, step).figure(), "planes")
        if len(view.html) <= limit:
            break
    return sized(view, limit)


def _thinned(values: Any, step: int) -> np.ndarray:
    """Every so many-th entry along each axis, the last always among them."""
    values = np.asarray(values, dtype=float)
    for axis, many in enumerate(values.shape):
        chosen = np.linspace(0, many - 1, -(-(many - 1) // step) + 1).round().astype(int)
        values = np.take(values, chosen, axis)
    return values


def _lifted(values: np.ndarray, norm: Normalize) -> np.ndarray:
    """Values as drawn: thousandths of the decimal logarithm where the scale is logarithmic, else as they are."""
    return np.round(LOG * np.log10(values)) if isinstance(norm, LogNorm) else values


class _Planes:
    """Arms A and measures M (error and loss on each data) of a view of planes, and its traces and selectors.

    Traces, in this order: fields, which are contours or surfaces, A by M; trajectories, A; children, A by M.
    """

    def __init__(self, grids: Mapping[str, Mapping[str, Grid]], data: list[str], trajectories: Mapping[str, Grid], step: int):
        self.grids, self.arms, self.trajectories, self.step = grids, list(grids), trajectories, step
        self.measures = [(value, word) for word in data for value in VALUES]
        self.values, scales = {}, []
        for value, word in self.measures:
            for arm in self.arms:
                self.values[arm, value, word] = checked(arm, grids[arm][word], value)
            scales.append(scale([self.values[arm, value, word] for arm in self.arms], is_log(value)))
        if None in scales:
            value, word = self.measures[scales.index(None)]
            raise ValueError(f"{value} on {word} must have a finite value somewhere, got none; leave out these data")
        self.norms = [norm for norm, _ in scales]
        self.drawn = {(arm, *measure): _lifted(np.clip(self.values[arm, *measure], norm.vmin, None), norm)
                      for arm in self.arms for measure, norm in zip(self.measures, self.norms, strict=True)}

    def first(self, a: int) -> Grid:
        """The grid that gives an arm's axes and children; all data are evaluated on one plane."""
        return next(iter(self.grids[self.arms[a]].values()))

    def log(self, m: int) -> bool:
        return isinstance(self.norms[m], LogNorm)

    def figure(self) -> dict[str, Any]:
        arms = range(len(self.arms))
        each = [(a, m) for a in arms for m in range(len(self.measures))]
        traces = [*(self._field(*place) for place in each), *map(self._walk, arms), *(self._children(*place) for place in each)]
        return {"data": traces, "layout": self._layout()}

    # traces -----------------------------------------------------------------------------------------------------------

    def _field(self, a: int, m: int) -> dict[str, Any]:
        key = self.arms[a], *self.measures[m]
        grid = self.grids[self.arms[a]][self.measures[m][1]]
        levels = MaxNLocator(15).tick_values(*self._ends(m))
        text = {"text": plain(_thinned(self.values[key], self.step))} if self.log(m) else {}
        return {"type": "contour", "x": plain(_thinned(grid["x"], self.step), 4), "y": plain(_thinned(grid["y"], self.step), 4),
                "z": plain(_thinned(self.drawn[key], self.step), 5 if text else 3), **text,
                "coloraxis": f"coloraxis{m + 1 if m else ''}", "visible": a == 0, **self._seen(m, m == 0),
                "name": VALUES[key[1]][1], "hoverongaps": False, "line": {"width": 0.5, "color": "white"},
                "autocontour": False, "lighting": {"ambient": 0.85, "diffuse": 0.4, "specular": 0.05},
                "contours": {"coloring": "heatmap", "start": levels[0], "end": levels[-1], "size": levels[1] - levels[0],
                             "x": {"highlight": False}, "y": {"highlight": False}}}

    def _seen(self, m: int, seen: bool) -> dict[str, Any]:
        """What shows a field or hides it, whichever type it has."""
        word = "text+name" if self.log(m) else "z+name"
        return {"opacity": int(seen), "hidesurface": not seen, "hoverinfo": word if seen else "skip"}

    def _walk(self, a: int) -> dict[str, Any]:
        """All runs of an arm as one line with gaps; what hovering says gives the step and the distance from the plane."""
        walk = self.trajectories.get(self.arms[a])
        x, y, text = [], [], []
        for k in range(len(walk["positions"]) if walk else 0):
            places, away = np.asarray(walk["positions"][k], dtype=float), plain(walk["outside"][k])
            x += [*plain(places[:, 0], 4), None]
            y += [*plain(places[:, 1], 4), None]
            text += [*(f"child {k}, step {int(s)}: {d} from the plane" for s, d in zip(walk["steps"], away, strict=True)), ""]
        return {"type": "scatter", "x": x, "y": y, "text": text, "hoverinfo": "text", "mode": "lines+markers", "visible": a == 0,
                "line": {"color": "white", "width": 1.5},
                "marker": {"size": 5, "color": "#FFB000", "line": {"color": "black", "width": 0.7}}}

    def _children(self, a: int, m: int) -> dict[str, Any]:
        """Children at the heights of a measure, for the scene: those of the grid's points that are nearest."""
        grid, drawn = self.first(a), self.drawn[self.arms[a], *self.measures[m]]
        corners = np.asarray(grid["corners"], dtype=float).reshape(-1, 2)
        z = [drawn[np.abs(grid["y"] - y).argmin(), np.abs(grid["x"] - x).argmin()] for x, y in corners]
        return {"type": "scatter", "x": plain(corners[:, 0], 4), "y": plain(corners[:, 1], 4), "z": plain(np.array(z), 5),
                "mode": "markers+text", "visible": a == 0, "opacity": int(m == 0),
                "text": [f"child {i}" for i in range(len(corners))],
                "textposition": "top center", "hoverinfo": "skip" if m else "text",
                "textfont": {"color": "white", "size": 11, "shadow": "0 0 3px black, 0 0 3px black"},
                "marker": {"size": 9, "color": "white", "line": {"color": "black", "width": 1.5}}}

    # scales -----------------------------------------------------------------------------------------------------------

    def _ends(self, m: int) -> list[float]:
        """Lowest and highest drawn value of a measure."""
        norm = self.norms[m]
        return plain(_lifted(np.array([norm.vmin, norm.vmax]), norm), 7)

    def _ticks(self, m: int, wanted: int) -> tuple[list[float], list[str]]:
        """About so many places of a measure's scale, and their values as text."""
        norm, log = self.norms[m], self.log(m)
        found = (LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(wanted)).tick_values(norm.vmin, norm.vmax)
        inside = [float(t) for t in found if norm.vmin <= t <= norm.vmax]
        if log and len(inside) < 2:  # less than from 1 to 2
            inside = [float(t) for t in MaxNLocator(3).tick_values(norm.vmin, norm.vmax) if norm.vmin <= t <= norm.vmax]
        inside = inside[::max(1, round(len(inside) / wanted))]
        return plain(_lifted(np.array(inside), norm), 7), [f"{t:g}" for t in inside]

    def _window(self, a: int) -> dict[str, Any]:
        """Ranges for an arm, flat and in the scene."""
        grid = self.first(a)
        x, y = ([*plain(np.asarray(grid[edge], dtype=float)[[0, -1]], 5)] for edge in ("x", "y"))
        long = max(x[1] - x[0], y[1] - y[0])
        return {"xaxis.range": x, "yaxis.range": y, "scene.xaxis.range": x, "scene.yaxis.range": y,
                "scene.aspectratio": {"x": round((x[1] - x[0]) / long, 3), "y": round((y[1] - y[0]) / long, 3), "z": 0.6}}

    def _measure(self, m: int) -> dict[str, Any]:
        """The scale of heights and the colour bar of a measure."""
        bars = {f"coloraxis{i + 1 if i else ''}.showscale": i == m for i in range(len(self.measures))}
        places, texts = self._ticks(m, 4)
        return {**bars, "scene.zaxis.range": self._ends(m), "scene.zaxis.tickvals": places, "scene.zaxis.ticktext": texts,
                "scene.zaxis.title.text": VALUES[self.measures[m][0]][1]}

    def _colours(self, m: int) -> dict[str, Any]:
        low, high = self._ends(m)
        places, texts = self._ticks(m, 8)
        title = VALUES[self.measures[m][0]][1].replace(" (", "<br>(")
        return {"cmin": low, "cmax": high, "showscale": m == 0,
                "colorscale": [[i / 16, to_hex(colormaps[COLOURS](i / 16))] for i in range(17)],
                "colorbar": {"title": {"text": title, "font": SMALL}, "thickness": 14, "len": 0.9, "tickvals": places,
                             "ticktext": texts, "tickfont": SMALL}}

    # selectors --------------------------------------------------------------------------------------------------------

    def _selectors(self) -> list[tuple[float, float, str, list[tuple[str, list]]]]:
        """For each selector its place from the left and above the panel in pixels, its name, and its buttons."""
        arms, measures = range(len(self.arms)), range(len(self.measures))
        each, every = len(arms) * len(measures), [*range(len(arms) * (2 * len(measures) + 1))]
        kept = [*every[:each], *every[-each:]]  # all but the runs

        def arm(a: int) -> list:
            return [{"visible": [b == a for b in arms for _ in measures] + [b == a for b in arms]
                     + [b == a for b in arms for _ in measures]}, self._window(a), every]

        def measure(m: int) -> list:
            seen = [self._seen(i, i == m) for _ in arms for i in measures]
            seen += [{**style, "hoverinfo": "text" if style["opacity"] else "skip"} for style in seen]
            return [{name: [style[name] for style in seen] for name in seen[0]}, self._measure(m), kept]

        def view(solid: bool) -> list:
            kinds = ("surface", "scatter3d", "scatter3d") if solid else ("contour", "scatter", "scatter")
            modes = ("none", "none", "markers") if solid else ("none", "lines+markers", "markers+text")
            many = (each, len(arms), each)  # the runs are drawn on contours only
            return [{name: [v for v, k in zip(values, many, strict=True) for _ in range(k)]
                     for name, values in (("type", kinds), ("mode", modes), ("marker.size", (9, 5, 7 if solid else 9)))},
                    {}, every]

        words = {"errors": "error", "losses": "loss"}
        return [(0, 62, "plane through children of", [(heading(name), arm(a)) for a, name in enumerate(self.arms)]),
                (0, 14, "measured", [(f"{words[value]}, {word}", measure(m)) for m, (value, word) in enumerate(self.measures)]),
                (0.6, 14, "view", [("contours", view(False)), ("surface (turn it)", view(True))])]

    def _layout(self) -> dict[str, Any]:
        start = {**self._window(0), **self._measure(0)}
        still = {"zeroline": False, "showgrid": False, "fixedrange": True, "tickfont": SMALL, "constrain": "domain"}
        small = {"tickfont": {"size": 10}, "backgroundcolor": "white", "gridcolor": "#DDDDDD", "showspikes": False}
        layout = {
            "font": FONT, "height": HEIGHT, "showlegend": False, "hovermode": "closest",
            "margin": {"l": 65, "r": 20, "t": TOP, "b": BELOW}, "paper_bgcolor": "white", "plot_bgcolor": "#E8E8E8",
            **{f"coloraxis{m + 1 if m else ''}": self._colours(m) for m in range(len(self.measures))},
            "xaxis": {**still, "title": {"text": "distance along the first axis", "font": SMALL}},
            "yaxis": {**still, "title": {"text": "distance along the second axis", "font": SMALL}, "scaleanchor": "x"},
            "scene": {"aspectmode": "manual", "dragmode": "orbit",
                      "camera": {"eye": {"x": 1.1, "y": -1.3, "z": 0.8}, "center": {"x": 0, "y": 0, "z": -0.15}},
                      "xaxis": {**small, "title": {"text": "first axis"}, "nticks": 5}, "zaxis": {**small, "title": {}},
                      "yaxis": {**small, "title": {"text": "second axis"}, "nticks": 5}}}
        for path, value in start.items():
            *places, last = path.split(".")
            where = layout
            for place in places:
                where = where[place]
            where[last] = value
        paper = HEIGHT - TOP - BELOW
        layout["updatemenus"] = [{**MENU, "active": 0, "x": x, "y": 1 + above / paper,
                                  "buttons": [{"label": label, "method": "update", "args": args} for label, args in buttons]}
                                 for x, above, _, buttons in self._selectors()]
        layout["annotations"] = [{**NOTE, "text": word, "x": x, "y": 1 + (above + 31) / paper,
                                  "font": {"size": 10, "color": "#555555"}} for x, above, word, _ in self._selectors()]
        return layout
