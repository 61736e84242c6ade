"""Landscapes for print: contours on planes, one-dimensional profiles and a few surfaces.

A grid is a mapping with arrays x (Rx,), y (Ry,) ascending, errors (Ry, Rx) as fractions, losses (Ry, Rx) in nats and corners
(K, 2), where the networks lie. Grids and profiles come by arm: ``imp`` or, at one sparsity in percent, ``imp@67``; a name that is
no arm's is a title as it stands. Errors are drawn in percent on a linear scale, losses on a logarithmic one.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib
import mpl_toolkits.mplot3d  # noqa: F401  (adds the projection "3d")
import numpy as np
from matplotlib import cm
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpkit.report import landscape_panels as parts
from dpkit.report.figures import STYLE, new, nothing
from dpkit.report.landscape_panels import COLOURS, SMALL, VALUES, Grid, checked, heading, is_log, scale

WIDTH = 7.4  # inches of a figure
MOST_SURFACES = 3  # more in one row cannot be read in print


def contours(grids: Mapping[str, Grid], value: str = "errors", *, trajectories: Mapping[str, Grid] | None = None,
             minima: bool = True, columns: int = 3, label: str = "test") -> Figure:
    """Filled contours on planes through children, a panel an arm, all in one scale of colours.

    grids: by arm, as in the module's text; distances are those of weights. trajectories: by the same names, of K runs of SGD
    projected onto the plane: positions (K, S, 2), outside (K, S) distance from the plane, steps (S,). A run is a line with a dot
    for each of the S networks, the fainter the farther it is from the plane in this panel; a triangle marks its start. minima:
    mark the lowest point of each grid. label: the data, as in "test error (%)".
    """
    axis = ("distance along the first axis", "distance along the second axis")
    return _panels(grids, value, axis, parts.children, trajectories or {}, minima, columns, label)


def squares(grids: Mapping[str, Grid], value: str = "errors", *, minima: bool = True, columns: int = 3, label: str = "test"
            ) -> Figure:
    """Squares of four children, a panel an arm, one scale; x and y are ratios, 0 and 1 at the children.

    A grid may say its ``form``; of ``diagonals``, the plane of the published code, only the corners 0 and 3 are children.
    """
    axis = ("ratio along the first side", "ratio along the second side")
    return _panels(grids, value, axis, parts.children, {}, minima, columns, label)


def around(grids: Mapping[str, Grid], value: str = "losses", *, minima: bool = False, columns: int = 3, label: str = "test"
           ) -> Figure:
    """Planes spanned by two filter-normalised random directions (Li et al. 2018) about one network each.

    x and y count norms of the network's filters; the network lies at the grid's first corner, or at (0, 0) without corners.
    """
    axis = ("first direction (filter norms)", "second direction (filter norms)")
    return _panels(grids, value, axis, parts.network, {}, minima, columns, label)


def compared(pairs: Mapping[str, Mapping[str, Grid]], value: str = "losses", *, trajectories: Mapping[str, Grid] | None = None,
             minima: bool = True) -> Figure:
    """One plane seen by several data side by side, a row an arm and a column a data set, each column in its own scale.

    pairs: by arm, grids by what was evaluated, such as ``{"imp": {"test images": grid, "distilled set": grid}}``. All arms have
    the same data; the plane of a row is one. Other arguments as of :func:`contours`.
    """
    data = list(next(iter(pairs.values()))) if pairs else []
    for name, grids in pairs.items():
        if list(grids) != data:
            raise ValueError(f"all arms must have the same data, got {', '.join(data) or 'none'} for the first and "
                             f"{', '.join(grids) or 'none'} for {name}; leave out what not all have")
    if not data:
        return nothing()
    scales = [scale([checked(arm, grids[word], value) for arm, grids in pairs.items()], is_log(value)) for word in data]
    if None in scales:
        return nothing("no point has a finite value")
    side = min(3.1, WIDTH / len(data))
    tall = (side - 0.5) * parts.ratio(grids[data[0]] for grids in pairs.values()) + 0.25
    figure, axes = new(side * len(data), tall * len(pairs) + 1.1, columns=len(data), rows=len(pairs), squeeze=False)
    for j, word in enumerate(data):
        for panel, (arm, grids) in zip(axes[:, j], pairs.items(), strict=True):
            parts.fill(panel, grids[word], checked(arm, grids[word], value), scales[j])
            parts.limits(panel, grids[word], (trajectories or {}).get(arm))
            parts.walks(panel, (trajectories or {}).get(arm))
            parts.children(panel, grids[word])
            if minima:
                parts.lowest(panel, grids[word], checked(arm, grids[word], value))
        axes[0][j].set_title(word, fontsize=10)
        parts.bar(figure, list(axes[:, j]), scales[j], value, f"{word}:", location="bottom", pad=0.02)
    for row, arm in zip(axes, pairs, strict=True):
        row[0].set_ylabel(parts.caption(arm, 24), fontsize=9)
    parts.key(figure, bool(trajectories), minima)
    return figure


def profiles(table: Mapping[str, Grid], label: str = "test") -> Figure:
    """Error and loss along straight lines through networks: mean over directions, and the range from lowest to highest.

    table: by arm, arrays t (T,) in norms of the filters, errors (D, T) as fractions and losses (D, T) in nats, one row a
    direction. Loss is on a logarithmic scale. The mean has a gap where a direction has no finite value.
    """
    if not table:
        return nothing()
    figure, axes = new(WIDTH, 3.3, columns=2)
    styles = parts.styles(table)
    for panel, (value, (factor, unit, log)) in zip(axes, VALUES.items(), strict=True):
        for name, profile in table.items():
            t, found = np.asarray(profile["t"], dtype=float), np.atleast_2d(np.asarray(profile[value], dtype=float))
            if found.shape[1:] != t.shape:
                raise ValueError(f"the profiles of {name} must have {value} of shape (directions, t), got {found.shape} for "
                                 f"{t.size} values of t")
            found = factor * np.where(np.isfinite(found) & ((found > 0) | (not log)), found, np.nan)
            mean, found = found.mean(0), np.ma.masked_invalid(found)
            panel.fill_between(t, found.min(0), found.max(0), color=styles[name]["color"], alpha=0.15, lw=0)
            panel.plot(t, mean, color=styles[name]["color"], ls=styles[name]["linestyle"], lw=1.8,
                       label=f"{heading(name)} ({len(found)} direction{'s' * (len(found) > 1)})")
        panel.set(xlabel="step along the direction (norms of the filters)", ylabel=f"{label} {unit}")
        if log:
            panel.set_yscale("log")
            parts.plain_ticks(panel.yaxis)
        panel.axvline(0, color="#777777", lw=0.8, ls=":")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) > 1 else 1, fontsize=SMALL, frameon=False)
    return figure


def surfaces(grids: Mapping[str, Grid], value: str = "losses", *, label: str = "test", lines: int = 41) -> Figure:
    """A few planes as surfaces, in one scale of heights and colours, the children below them on the floor.

    Heights of losses are logarithmic. lines: at most so many lines of the grid a side are drawn. Raises ``ValueError`` for more
    than :data:`MOST_SURFACES` grids.
    """
    if len(grids) > MOST_SURFACES:
        raise ValueError(f"at most {MOST_SURFACES} surfaces can be read in one figure, got {len(grids)}; choose some of them, or "
                         f"draw contours")
    found = {name: checked(name, grid, value) for name, grid in grids.items()}
    common = scale(found.values(), is_log(value))
    if common is None:
        return nothing() if not grids else nothing("no point has a finite value")
    norm, levels = common
    with matplotlib.rc_context(STYLE):
        wide = 3.7 * len(grids) if len(grids) < 3 else 8.4
        figure = Figure(figsize=(wide + 0.8, 3.3 if len(grids) < 3 else 2.9), layout="constrained")
        axes = figure.subplots(1, len(grids), squeeze=False, subplot_kw={"projection": "3d", "computed_zorder": False})[0]
    height = (lambda v: np.log10(np.clip(v, norm.vmin, None))) if isinstance(norm, LogNorm) else (lambda v: v)
    low, high = float(height(np.float64(norm.vmin))), float(height(np.float64(norm.vmax)))
    floor = low - 0.25 * (high - low)
    for panel, (name, grid) in zip(axes, grids.items(), strict=True):
        x, y = np.meshgrid(grid["x"], grid["y"])
        panel.contour(x, y, height(found[name]), levels=height(levels[1:-1]), cmap=COLOURS, linewidths=0.6, offset=floor,
                      vmin=low, vmax=high, zorder=1)
        for i, (a, b) in enumerate(np.asarray(grid.get("corners", np.empty((0, 2))), dtype=float)):
            panel.plot([a], [b], [floor], "o", color="white", markeredgecolor="black", markersize=4, zorder=2)
            panel.text(a, b, floor, f"   {i}", fontsize=7, va="center", zorder=2)
        panel.plot_surface(x, y, height(found[name]), facecolors=cm.ScalarMappable(norm, COLOURS).to_rgba(found[name]), lw=0.15,
                           edgecolor=(1, 1, 1, 0.35), rcount=lines, ccount=lines, shade=False, antialiased=True, zorder=3)
        panel.set(zlim=(floor, high), xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
        panel.set_title(parts.caption(name, 30), fontsize=9, y=1.0)
        panel.set_xlabel("first axis", fontsize=7, labelpad=-7)
        panel.set_ylabel("second axis", fontsize=7, labelpad=-7)
        panel.set_zlabel(f"{label} {VALUES[value][1]}" if panel is axes[0] else "", fontsize=7, labelpad=-7)
        panel.view_init(elev=28, azim=-58)
        panel.tick_params(labelsize=6.5, pad=-3)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(4))
        if isinstance(norm, LogNorm):
            ticks = parts.log_ticks(norm.vmin, norm.vmax)
            ticks = ticks[::-(-len(ticks) // 5)] if ticks else ticks
            panel.set_zticks([float(np.log10(t)) for t in ticks], [f"{t:g}" for t in ticks])
        else:
            panel.set_zticks(MaxNLocator(4).tick_values(low, high))
            panel.set_zlim(floor, high)
        for axis in (panel.xaxis, panel.yaxis, panel.zaxis):
            axis.set_pane_color((1, 1, 1, 0))
            axis._axinfo["grid"].update(color=(0, 0, 0, 0.08), linewidth=0.5)
        panel.set_box_aspect((1, 1, 0.75), zoom=0.95)
    parts.bar(figure, list(axes), common, value, label, shrink=0.7, pad=0.06)
    return figure


def _panels(grids: Mapping[str, Grid], value: str, axis: tuple[str, str], networks: Callable, trajectories: Mapping[str, Grid],
            minima: bool, columns: int, label: str) -> Figure:
    log = is_log(value)
    found = {name: checked(name, grid, value) for name, grid in grids.items()}
    common = scale(found.values(), log)
    if common is None:
        return nothing() if not grids else nothing("no point has a finite value")
    columns = min(columns, len(grids))
    rows = -(-len(grids) // columns)
    columns = -(-len(grids) // rows)  # four panels are two and two
    side = min(2.9, (WIDTH - 0.7) / columns)
    captions = [parts.caption(name, int(14 * side)) for name in grids]
    tall = (side - 0.4) * parts.ratio(grids.values()) + 0.25 + 0.15 * max(text.count("\n") + 1 for text in captions)
    figure, axes = new(side * columns + 0.9, tall * rows + 0.85, columns=columns, rows=rows, squeeze=False)
    for panel in axes.flat[len(grids):]:
        panel.axis("off")
    for i, (panel, text, (name, grid)) in enumerate(zip(axes.flat, captions, grids.items(), strict=False)):
        parts.fill(panel, grid, found[name], common)
        parts.limits(panel, grid, trajectories.get(name))
        parts.walks(panel, trajectories.get(name))
        networks(panel, grid)
        if minima:
            parts.lowest(panel, grid, found[name])
        panel.set_title(text, fontsize=9)
        if i + columns >= len(grids):  # the last of its column
            panel.set_xlabel(axis[0], fontsize=SMALL)
        if i % columns == 0:
            panel.set_ylabel(axis[1], fontsize=SMALL)
    parts.bar(figure, axes.ravel().tolist(), common, value, label)
    parts.key(figure, bool(trajectories), minima)
    return figure
