"""An interactive view of the masks, layer by layer: choose a sparsity, a layer and two arms. Needs plotly.

Everything is one plotly figure whose selectors are plotly's own, so it works wherever plotly's output does: in the book, which
brings plotly.js along, and in Jupyter, which shows the same figure by plotly's own type. The selectors have to combine, and
plotly's can only set fixed values. So the values of all sparsities stand side by side on the x axes, those of all layers one
below another on the y axis of the matrix, and a selector moves a window over them; which arms are drawn is a matter of visible
traces.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io

from dpkit.report.arms import called, ordered
from dpkit.report.overlap import ALL

LIMIT = 1_400_000  # bytes of HTML
IDENTIFIER = "masks-explorer"
FIRST, SECOND, GREY = "#0072B2", "#D55E00", "#777777"
SHARES = (0, 25, 50, 75, 100)
STEP = 115  # from one arm to the next on the y axis of the pair's overlap, which is 0 to 100
SMALL = {"size": 11}
# heights in pixels: the selectors; the panels below; a letter of a slanted label
TOP, PANEL, LETTER = 150, 140, 4.8
COLOURS = ((0, "#67001F"), (0.25, "#D6604D"), (0.5, "#F7F7F7"), (0.75, "#4393C3"), (1, "#053061"))


@dataclass
class Explorer:
    """A plotly figure that shows itself, in the book as HTML without plotly.js, in Jupyter by plotly's own type."""

    figure: go.Figure = field(repr=False)  # its text would be longer than its picture

    @cached_property
    def html(self) -> str:
        """A piece of a page that draws the figure where plotly.js is loaded."""
        return plotly.io.to_html(self.figure, include_plotlyjs=False, full_html=False, div_id=IDENTIFIER,
                                 default_height=f"{self.figure.layout.height}px",
                                 config={"displayModeBar": False, "responsive": True})

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"application/vnd.plotly.v1+json": json.loads(self.figure.to_json()), "text/html": self.html}


def explorer(overlaps: pd.DataFrame, layers: pd.DataFrame, limit: int = LIMIT) -> Explorer:
    """The view of the masks, means over initialisations, from the frames of :mod:`dpkit.report.overlap`.

    A matrix of arms: overlap above chance in one layer; below it, for two arms, the kept weights of each layer and their
    overlap there beside what chance gives. Where this would take more than ``limit`` bytes of HTML, sparsities in the middle are
    left out, the highest being the last to go. Raises ``ValueError`` when there are fewer than two arms, or when one sparsity is
    too large.
    """
    levels = sorted(set(overlaps["percent"]))
    if not levels:
        raise ValueError("the explorer needs the masks of at least two arms, got none; compute the chapter on masks first")
    while True:
        found = Explorer(_figure(_Values(overlaps, layers, levels)))
        if len(found.html) <= limit:
            return found
        if len(levels) == 1:
            raise ValueError(f"the explorer must fit in {limit} bytes, but one sparsity takes {len(found.html)}; show fewer arms")
        levels.pop(len(levels) // 2 - (len(levels) == 2))


class _Values:
    """The frames as arrays in percent, over sparsities S, layers L (``all`` last) and arms A; NaN where nothing was compared."""

    def __init__(self, overlaps: pd.DataFrame, layers: pd.DataFrame, levels: list[int]):
        overlaps, layers = overlaps[overlaps["percent"].isin(levels)], layers[layers["percent"].isin(levels)]
        self.levels, self.layers = levels, list(dict.fromkeys(layers["layer"]))
        self.arms = ordered(layers["arm"])
        shape = (len(levels), len(self.layers), len(self.arms))
        known = {"percent": levels, "layer": self.layers, "arm": self.arms, "arm_a": self.arms, "arm_b": self.arms}
        def means(table: pd.DataFrame, by: list[str], column: str) -> tuple[list[np.ndarray], np.ndarray]:
            found = table.groupby(by, sort=False)[column].mean().reset_index()
            places = [found[name].map({v: i for i, v in enumerate(known[name])}).to_numpy() for name in by]
            return places, found[column].to_numpy()

        self.density = np.full(shape, np.nan)
        places, found = means(layers, ["percent", "layer", "arm"], "density")
        self.density[tuple(places)] = 100 * found
        self.overlap = {name: np.full((*shape, len(self.arms)), np.nan) for name in ("jaccard", "jaccard_chance", "excess")}
        for name, values in self.overlap.items():
            (s, layer, a, b), found = means(overlaps, ["percent", "layer", "arm_a", "arm_b"], name)
            values[s, layer, a, b] = values[s, layer, b, a] = 100 * found
        self.seeds = int(overlaps.groupby("percent")["seed"].nunique().min())

    @property
    def heights(self) -> tuple[float, float, float]:
        """Pixels of the matrix, of what stands between it and the panels, and of the labels under these."""
        slanted = [LETTER * max(map(len, names)) + 15 for names in (self.titles, self.layer_titles)]
        return max(240.0, 15.0 * len(self.arms)), slanted[0] + 40, slanted[1]

    @property
    def whole(self) -> float:
        """Pixels between the selectors and the labels at the bottom: what plotly calls the paper."""
        matrix, gap, _ = self.heights
        return matrix + gap + PANEL

    @property
    def titles(self) -> list[str]:
        return [called(name) for name in self.arms]

    @property
    def layer_titles(self) -> list[str]:
        return ["all layers" if name == ALL else name.removesuffix(".weight") for name in self.layers]


def _plain(values: np.ndarray) -> list:
    """Whole percents, None for NaN: a few bytes each."""
    return [[None if np.isnan(v) else round(float(v)) for v in row] for row in np.atleast_2d(values)]


def _figure(values: _Values) -> go.Figure:
    arms, deep = len(values.arms), len(values.layers) - 1
    below = values.heights[2]
    figure = go.Figure(layout={
        "template": "none", "font": {"family": "sans-serif", "size": 12}, "height": TOP + values.whole + below,
        "showlegend": False, "hovermode": "closest", "margin": {"l": 60, "r": 20, "t": TOP, "b": below},
        "paper_bgcolor": "white", "plot_bgcolor": "white"})
    figure.add_trace(_matrix(values))
    # rows of traces: density of a first arm, of a second one; overlap of a first arm with all others, and chance
    x = [s * (deep + 1) + layer for s in range(len(values.levels)) for layer in range(deep)]
    names = [name for _ in values.levels for name in values.layer_titles[:deep]]
    for shade, mark, words in ((FIRST, "circle", "first arm"), (SECOND, "diamond", "second arm")):
        for a, title in enumerate(values.titles):
            figure.add_trace(go.Scatter(
                x=x, y=_plain(values.density[:, :deep, a].ravel())[0], text=names, mode="markers", xaxis="x2", yaxis="y2",
                visible=False, marker={"color": shade, "symbol": mark, "size": 8},
                hovertemplate=f"{title} ({words})<br>%{{text}}: %{{y}}% kept<extra></extra>"))
    for a in range(arms):
        # all second arms one above another, a window shows one
        across = [v + s * (deep + 1) for _ in range(arms) for s in range(len(values.levels)) for v in range(deep)]
        for name, style in (("jaccard", {"color": "#222222", "symbol": "circle", "size": 8}),
                            ("jaccard_chance", {"color": GREY, "symbol": "line-ew-open", "size": 14, "line": {"width": 2}})):
            part = np.moveaxis(values.overlap[name][:, :deep, a], -1, 0)  # (second arm, S, layers)
            flat = _plain(part.ravel())[0]
            lifted = [None if v is None else v + STEP * (i // (len(values.levels) * deep)) for i, v in enumerate(flat)]
            figure.add_trace(go.Scatter(
                x=across, y=lifted, customdata=flat, mode="markers", xaxis="x3", yaxis="y3", visible=False, marker=style,
                hovertemplate=("overlap" if name == "jaccard" else "chance") + " %{customdata}%<extra></extra>"))
    _axes(figure, values)
    _selectors(figure, values)
    return figure


def _matrix(values: _Values) -> go.Heatmap:
    """All matrices in one heat map: sparsities side by side, layers one below another, an empty line between."""
    arms = len(values.arms)
    def tiled(name: str) -> list:
        blocks = np.full((len(values.layers), arms + 1, len(values.levels), arms + 1), np.nan)
        blocks[:, :arms, :, :arms] = values.overlap[name].transpose(1, 2, 0, 3)
        return _plain(blocks.reshape(len(values.layers) * (arms + 1), -1))

    found, jaccard, chance = (tiled(name) for name in ("excess", "jaccard", "jaccard_chance"))
    top = max([5, *(abs(v) for row in found for v in row if v is not None)])
    both = [[list(pair) for pair in zip(*rows, strict=True)] for rows in zip(jaccard, chance, strict=True)]
    bar = {"title": {"text": "overlap above<br>chance (%)", "font": SMALL}, "len": 0.4, "y": 1, "yanchor": "top", "thickness": 12,
           "tickfont": SMALL}
    return go.Heatmap(z=found, customdata=both, zmin=-top, zmax=top, colorscale=COLOURS, colorbar=bar, hoverongaps=False, xgap=1,
                      ygap=1, hovertemplate="%{y} with %{x}<br>overlap %{customdata[0]}%, chance %{customdata[1]}%<br>"
                                            "above chance %{z}%<extra></extra>")


def _windows(values: _Values) -> tuple[list[dict], list[list], list[list]]:
    """Ranges for each sparsity (of the three x axes and of the densities), each layer (of the matrix) and each second arm (of the
    pair's overlap)."""
    arms, deep = len(values.arms), len(values.layers) - 1
    tops = [max(1.0, float(np.nanmax(part))) for part in values.density[:, :deep]]
    across = [{"xaxis.range": [s * (arms + 1) - 0.5, s * (arms + 1) + arms - 0.5],
               **{f"xaxis{i}.range": [s * (deep + 1) - 0.5, s * (deep + 1) + deep - 0.5] for i in (2, 3)},
               "yaxis2.range": [-0.05 * tops[s], 1.08 * tops[s]]} for s in range(len(values.levels))]
    down = [[layer * (arms + 1) + arms - 0.5, layer * (arms + 1) - 0.5] for layer in range(len(values.layers))]
    return across, down, [[STEP * b - 5, STEP * b + 105] for b in range(arms)]


def _axes(figure: go.Figure, values: _Values) -> None:
    arms, deep, levels = len(values.arms), len(values.layers) - 1, range(len(values.levels))
    across, down, lifted = _windows(values)
    first, second = _start(values)
    still = {"fixedrange": True, "zeroline": False, "tickfont": SMALL, "showline": False}
    matrix, grid = {**still, "showgrid": False}, {**still, "gridcolor": "#EEEEEE"}
    places = [s * (deep + 1) + layer for s in levels for layer in range(deep)]
    names = [name for _ in levels for name in values.layer_titles[:deep]]
    below = {**grid, "tickvals": places, "ticktext": names, "tickangle": -50, "range": across[-1]["xaxis2.range"]}
    lower, upper = [0, PANEL / values.whole], [1 - values.heights[0] / values.whole, 1]
    figure.update_layout(
        xaxis={**matrix, "tickvals": [s * (arms + 1) + a for s in levels for a in range(arms)], "tickangle": -50,
               "ticktext": values.titles * len(levels), "range": across[-1]["xaxis.range"], "domain": [0, 1], "anchor": "y"},
        yaxis={**matrix, "tickvals": [layer * (arms + 1) + a for layer in range(deep + 1) for a in range(arms)],
               "ticktext": values.titles * (deep + 1), "range": down[-1], "domain": upper, "automargin": True},
        xaxis2={**below, "anchor": "y2", "domain": [0, 0.46]}, xaxis3={**below, "anchor": "y3", "domain": [0.56, 1]},
        yaxis2={**grid, "title": {"text": "kept weights (%)", "font": SMALL}, "range": across[-1]["yaxis2.range"],
                "domain": lower, "anchor": "x2"},
        yaxis3={**grid, "title": {"text": "overlap of the two (%)", "font": SMALL}, "range": lifted[second], "domain": lower,
                "tickvals": [STEP * b + v for b in range(arms) for v in SHARES], "ticktext": [str(v) for v in SHARES] * arms,
                "anchor": "x3"})
    for trace in (1 + first, 1 + arms + second, 1 + 2 * (arms + first), 2 + 2 * (arms + first)):
        figure.data[trace].visible = True


def _start(values: _Values) -> tuple[int, int]:
    """The arms shown at first: IMP and distilled pruning where they are there."""
    wanted = [values.arms.index(name) for name in ("imp", "distilled") if name in values.arms]
    first, second = [*wanted, *(i for i in range(len(values.arms)) if i not in wanted)][:2]
    return first, second


def _selectors(figure: go.Figure, values: _Values) -> None:
    arms = len(values.arms)
    across, down, lifted = _windows(values)
    first, second = _start(values)

    def shown(chosen: int, times: int = 1) -> list[bool]:
        return [a == chosen for a in range(arms) for _ in range(times)]

    of_first, of_second = [*range(1, 1 + arms), *range(1 + 2 * arms, 1 + 4 * arms)], [*range(1 + arms, 1 + 2 * arms)]
    each = list(enumerate(values.titles))
    # name, colour, place from the left and above the matrix in pixels, active button, buttons (label, method, arguments)
    menus = (
        ("sparsity", "#333333", 0.0, 110, len(values.levels) - 1,
         [(f"{p}%", "relayout", [window]) for p, window in zip(values.levels, across, strict=True)]),
        ("layer", "#333333", 0.5, 110, len(down) - 1,
         [(name, "relayout", [{"yaxis.range": window}]) for name, window in zip(values.layer_titles, down, strict=True)]),
        ("first arm ●", FIRST, 0.0, 50, first,
         [(title, "restyle", [{"visible": shown(a) + shown(a, 2)}, of_first]) for a, title in each]),
        ("second arm ◆", SECOND, 0.5, 50, second,
         [(title, "update", [{"visible": shown(a)}, {"yaxis3.range": lifted[a]}, of_second]) for a, title in each]))
    whole = values.whole
    note = {"xref": "paper", "yref": "paper", "showarrow": False, "yanchor": "bottom", "xanchor": "left"}
    seeds = f"means over {values.seeds} initialisation{'s' * (values.seeds > 1)}"
    figure.update_layout(
        updatemenus=[{"buttons": [{"label": label, "method": method, "args": args} for label, method, args in buttons],
                      "active": active, "x": x, "xanchor": "left", "y": 1 + (above - 44) / whole, "yanchor": "bottom",
                      "font": SMALL, "showactive": True, "pad": {"t": 0, "b": 0}, "bgcolor": "white", "bordercolor": "#BBBBBB"}
                     for _, _, x, above, active, buttons in menus],
        annotations=[*({**note, "text": word, "x": x, "y": 1 + (above - 8) / whole, "font": {"size": 11, "color": shade}}
                       for word, shade, x, above, *_ in menus),
                     *({**note, "text": text, "x": x, "y": (PANEL + 8) / whole, "font": SMALL} for x, text in (
                         (0, "kept weights of each layer"), (0.56, "● overlap, – what chance gives"))),
                     {**note, "text": seeds, "x": 1, "xanchor": "right", "y": 1 + 102 / whole,
                      "font": {"size": 10, "color": GREY}}])
