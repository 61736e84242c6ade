"""Parts of panels that show a landscape: scales common to several grids, filled contours, marks and their key.

A grid is a mapping with arrays x (Rx,), y (Ry,) ascending, errors (Ry, Rx) as fractions, losses (Ry, Rx) in nats and corners
(K, 2), where the networks lie. Errors are shown in percent on a linear scale, losses on a logarithmic one.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import cm
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dpkit.report.arm_figures import LINES, look
from dpkit.report.figures import title

Grid = Mapping[str, np.ndarray]
#: what is drawn: unit in the file, factor to the one shown, axis label, whether its scale is logarithmic
VALUES = {"errors": (100, "error (%)", False), "losses": (1, "loss (nats)", True)}
COLOURS = "viridis"
HALO = [withStroke(linewidth=2.2, foreground="#222222")]
SMALL = 8


def heading(name: str) -> str:
    """How an arm is called, with its sparsity where the name says it.

    >>> heading("imp@67"), heading("dense"), heading("any title")
    ('IMP, rewound to start, 67% sparse', 'dense', 'any title')
    """
    arm, _, percent = name.partition("@")
    return title(arm) + (f", {percent}% sparse" if percent and percent != "0" else "")


def is_log(value: str) -> bool:
    """Whether ``errors`` or ``losses`` are drawn on a logarithmic scale. Raises ``ValueError`` for any other word."""
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
    return VALUES[value][2]


def checked(name: str, grid: Grid, value: str) -> np.ndarray:
    """The values (Ry, Rx) of a grid in the unit shown, NaN where they are not finite.

    Raises ``ValueError`` when ``value`` is not one of :data:`VALUES`, or when the shapes of a grid do not belong together.
    """
    is_log(value)
    x, y, found = (np.asarray(grid[key], dtype=float) for key in ("x", "y", value))
    if found.shape != (y.size, x.size) or min(found.shape) < 2:
        raise ValueError(f"the grid of {name} must have {value} of shape (y, x), at least 2 each, got {found.shape} for {y.size} "
                         f"values of y and {x.size} of x; rows belong to y")
    return VALUES[value][0] * np.where(np.isfinite(found), found, np.nan)


def scale(found: Iterable[np.ndarray], log: bool) -> tuple[Normalize, np.ndarray] | None:
    """Colours and contour levels for all of ``found`` together; None where nothing is finite.

    On a logarithmic scale what is not positive counts as the smallest positive value.
    """
    flat = np.concatenate([values[np.isfinite(values)] for values in found] or [np.empty(0)])
    if log and (flat > 0).any():
        flat = flat[flat > 0]
    if not flat.size:
        return None
    low, high = float(flat.min()), float(flat.max())
    if log and low > 0:
        if high < low * 1.02:  # one colour still needs two ends
            low, high = low / 1.5, high * 1.5
        return LogNorm(low, high), np.geomspace(low, high, 16)
    if high - low < 1e-9 * max(1, abs(high)):
        high = low + 1
    levels = MaxNLocator(14).tick_values(low, high)
    inside = levels[(levels > low) & (levels < high)]
    return Normalize(low, high), np.unique([low, *inside, high])


def fill(panel, grid: Grid, values: np.ndarray, common: tuple[Normalize, np.ndarray]) -> None:
    norm, levels = common
    values = np.ma.masked_invalid(np.clip(values, norm.vmin, norm.vmax))
    panel.set_facecolor("#E8E8E8")  # outside the grid and where no value is finite
    panel.contourf(grid["x"], grid["y"], values, levels=levels, norm=norm, cmap=COLOURS)
    with np.errstate(invalid="ignore"):
        if np.ma.max(values) > np.ma.min(values):
            panel.contour(grid["x"], grid["y"], values, levels=levels[1:-1], colors="white", linewidths=0.35, alpha=0.7)
    panel.grid(False)
    panel.set_aspect("equal")
    panel.tick_params(labelsize=SMALL)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(4))


def limits(panel, grid: Grid, walk: Grid | None) -> None:
    """Show the whole grid and the whole of the runs, which may leave it."""
    seen = [np.asarray(walk["positions"], dtype=float).reshape(-1, 2)] if walk else []
    for i, (edge, set_limits) in enumerate((("x", panel.set_xlim), ("y", panel.set_ylim))):
        ends = np.asarray(grid[edge], dtype=float)[[0, -1]]
        inside = np.concatenate([part[:, i] for part in seen] or [ends])
        reach = 0.04 * max(inside.max() - inside.min(), ends[1] - ends[0])
        set_limits(min(ends[0], inside.min() - reach if inside.min() < ends[0] else ends[0]),
                   max(ends[1], inside.max() + reach if inside.max() > ends[1] else ends[1]))


def walks(panel, walk: Grid | None) -> None:
    if not walk:
        return
    positions, outside = np.asarray(walk["positions"], dtype=float), np.asarray(walk["outside"], dtype=float)
    if positions.ndim != 3 or positions.shape[2] != 2 or outside.shape != positions.shape[:2]:
        raise ValueError(f"a trajectory must have positions (runs, steps, 2) and outside (runs, steps), got "
                         f"{positions.shape} and {outside.shape}")
    far = max(float(outside.max()), 1e-30)
    for run, away in zip(positions, outside, strict=True):
        panel.plot(*run.T, color="white", lw=1.0, path_effects=[withStroke(linewidth=2.0, foreground="#222222")], zorder=3)
        shades = np.tile(to_rgba("#FFB000"), (len(run), 1))
        shades[:, 3] = 1 - 0.8 * away / far
        panel.scatter(*run[1:].T, s=11, color=shades[1:], edgecolors="black", linewidths=0.4, zorder=4)
        panel.plot(*run[0], "^", color="white", markeredgecolor="black", markersize=6.5, zorder=5)


def children(panel, grid: Grid) -> None:
    corners = np.asarray(grid["corners"], dtype=float)
    middle = corners.mean(0)
    ends = np.asarray(grid["y"], dtype=float)[[0, -1]]
    nobody = (1, 2) if str(grid.get("form", "")) == "diagonals" else ()  # corners of that plane at which no child lies
    for i, (x, y) in enumerate(corners):
        if i in nobody:
            continue
        panel.plot(x, y, "o", color="white", markeredgecolor="black", markersize=6, zorder=6, clip_on=False)
        below = y < middle[1]
        if np.abs(ends - y).min() < 0.06 * np.ptp(ends):
            below = not below  # at the edge of the grid a name outside would lie on the numbers of the axis
        panel.annotate(f"child {i}", (x, y), xytext=(0, -6 if below else 6), textcoords="offset points",
                       ha="left" if x < middle[0] - 1e-9 else "right" if x > middle[0] + 1e-9 else "center",
                       va="top" if below else "bottom", color="white", fontsize=SMALL, path_effects=HALO, zorder=7)


def network(panel, grid: Grid) -> None:
    x, y = np.asarray(grid.get("corners", np.zeros((1, 2))), dtype=float).reshape(-1, 2)[0]
    panel.plot(x, y, "o", color="white", markeredgecolor="black", markersize=6, zorder=6)


def lowest(panel, grid: Grid, values: np.ndarray) -> None:
    if np.isfinite(values).any():
        row, column = np.unravel_index(np.nanargmin(values), values.shape)
        panel.plot(grid["x"][column], grid["y"][row], "P", color="#FF4FA3", markeredgecolor="black", markersize=6,
                   markeredgewidth=0.6, zorder=8, clip_on=False)


def bar(figure: Figure, axes: list, common: tuple[Normalize, np.ndarray], value: str, label: str, **options: Any) -> None:
    norm, _ = common
    bar = figure.colorbar(cm.ScalarMappable(norm, COLOURS), ax=axes, label=f"{label} {VALUES[value][1]}",
                          **{"shrink": 0.9, "aspect": 30, **options})
    bar.ax.tick_params(labelsize=SMALL)
    if isinstance(norm, LogNorm):
        plain_ticks(bar.ax.xaxis if options.get("location") == "bottom" else bar.ax.yaxis)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks within a logarithmic scale: 1, 2 and 5 times powers of ten, of which a short one has too few; then round numbers."""
    decades = np.log10(high / low)
    ticks = (LogLocator(subs=(1,) if decades >= 3 else (1, 2, 5)).tick_values(low, high) if decades >= 0.7
             else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    return [float(tick) for tick in ticks if low <= tick <= high]


def plain_ticks(axis) -> None:
    """:func:`log_ticks`, written in full."""
    axis.set_major_locator(FixedLocator(log_ticks(*sorted(axis.get_view_interval()))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def key(figure: Figure, walks: bool, minima: bool) -> None:
    """What the marks mean, below the panels."""
    def mark(shape: str, shade: str, size: float, word: str):
        return Line2D([], [], ls="", marker=shape, color=shade, markeredgecolor="black", markeredgewidth=0.6,
                                       markersize=size, label=word)

    marks = [mark("P", "#FF4FA3", 6, "lowest point of the grid")] * minima
    if walks:
        marks += [mark("^", "white", 6.5, "start of training"),
                  mark("o", "#FFB000", 4, "during training, fainter far from the plane")]
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=SMALL, handletextpad=0.2,
                      frameon=False)


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of each name; the sparsities of one arm have its colour and differ in the line."""
    arms = look(dict.fromkeys(name.partition("@")[0] for name in names))
    seen: dict[str, int] = {}
    found = {}
    for name in names:
        shade = arms[name.partition("@")[0]]["color"]
        found[name] = {"color": shade, "linestyle": LINES[seen.get(shade, 0) % len(LINES)]}
        seen[shade] = seen.get(shade, 0) + 1
    return found


def caption(name: str, width: int) -> str:
    """How an arm is called in lines of at most about ``width`` letters, its sparsity in a line of its own."""
    arm, _, percent = name.partition("@")
    return "\n".join([*wrap(heading(arm), max(12, width)), *([f"{percent}% sparse"] if percent not in ("", "0") else [])])


def ratio(grids: Iterable[Grid]) -> float:
    """Height over width of the tallest grid."""
    return max(float(np.ptp(grid["y"]) / np.ptp(grid["x"])) for grid in grids)
