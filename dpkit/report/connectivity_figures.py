"""Figures of linear connectivity. Frames come from :mod:`dpkit.report.connectivity`; barriers of error are drawn in points.

Axes of barriers are linear up to two points, where stability ends (Frankle et al. 2020), and logarithmic above; maps are blue up
to there and orange to dark red above.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from dpkit.report.arm_figures import FEW, families, legend, line, look
from dpkit.report.arms import averages, ordered
from dpkit.report.connectivity import STATISTICS
from dpkit.report.figures import new, nothing, title, whiskers
from dpkit.report.frames import summary

RULE = 2  # points, below which a pair is stable
TICKS = (0, 1, 2, 5, 10, 20, 50)
PERCENTS = 3  # so many sparsities, the highest, have a panel each
EDGES = (0, 0.5, 1, RULE, 5, 10, 20, 50, 100)
TINTS = ("#FFFFFF", "#E3EEF8", "#C3DAEE", "#FDDDA8", "#F7AE5C", "#DF6E2E", "#A93419", "#5E0D10")
EMPTY, RED = "#D0D0D0", "#B00000"
#: how the marks of a row look: the first is what counts elsewhere
LOOKS = ({"marker": "o", "color": "#222222"}, {"marker": "o", "color": "white", "markeredgecolor": "#222222"},
         {"marker": "D", "color": "#D55E00"})
NAMES = {"reestimate": "measured anew", "interpolate": "averaged (the authors')", "repair": "measured anew and repaired"}
HEIGHT = "error barrier (points)"


def measured(table: pd.DataFrame, column: str = "error_barrier") -> pd.DataFrame:
    """Rows that have a result."""
    return table[table["failed"].isna() & table[column].notna()] if len(table) else table


def scale(panel, axis: str = "y", words: bool = True, label_side: float = 0.99, rule: bool = True, lowest: float = 0.0) -> None:
    """Axis of barriers in points: linear up to two, logarithmic above, with a line at two.

    rule: whether two points say anything of what is shown; the rule is one of barriers above the mean of the ends.
    lowest: of what is shown, in points, where that may be below 0.
    """
    getattr(panel, f"set_{axis}scale")("symlog", linthresh=RULE, linscale=0.8)
    ticks = [*(-t for t in reversed(TICKS[1:]) if t <= -lowest), *TICKS]
    getattr(panel, f"set_{axis}ticks")(ticks, [str(t).replace("-", "−") for t in ticks])
    getattr(panel, f"set_{axis}ticks")([], minor=True)
    getattr(panel, f"set_{axis}lim")(min(-0.15, 1.15 * lowest), 100)
    if not rule:
        return
    (panel.axhline if axis == "y" else panel.axvline)(RULE, color=RED, lw=1, ls=":", zorder=0.5)
    if words:
        panel.annotate(f"stable below {RULE} points", (label_side, RULE), xycoords=("axes fraction", "data"), ha="right",
                       va="bottom", fontsize=7.5, color=RED, bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5})


def _levels(table: pd.DataFrame) -> list[int]:
    """The highest sparsities; 0 where there is only the dense network."""
    return sorted({int(p) for p in table["percent"] if p})[-PERCENTS:] or [0]


def _at(table: pd.DataFrame, percent: int) -> pd.DataFrame:
    """Rows of one sparsity, and those of the dense network."""
    return table[(table["percent"] == percent) | (table["arm"] == "dense")]


# --- a row an arm -----------------------------------------------------------------------------------------------------

def _rows(series: Mapping[str, tuple[pd.DataFrame, str]], words: Mapping[tuple[str, int], str] | None = None,
          heading: str = "") -> Figure:
    """A row an arm with a mark for each of ``series`` (name -> table, column), a panel a sparsity; dots are initialisations.

    words: by (arm, percent), text at the right edge, under ``heading``.
    """
    tables = {name: (measured(table, column), column) for name, (table, column) in series.items()}
    tables = {name: (table, column) for name, (table, column) in tables.items() if len(table)}
    if not tables:
        return nothing("no path has a result" if any(len(table) for table, _ in series.values()) else "nothing measured yet")
    whole = pd.concat([table[["arm", "percent"]] for table, _ in tables.values()], ignore_index=True)
    levels, names = _levels(whole), ordered(whole["arm"])
    names = [n for n in names if n == "dense" or whole[whole["arm"] == n]["percent"].isin(levels).any()]
    spread = 0.24 if len(series) > 2 else 0.2
    figure, axes = new(2.7 + 2.5 * len(levels), (0.14 * len(series) + 0.12) * len(names) + 1.5, columns=len(levels), sharex=True,
                       sharey=True, squeeze=False)
    for panel, percent in zip(axes[0], levels, strict=True):
        for i, (name, style) in enumerate(zip(series, LOOKS, strict=False)):
            if name not in tables:
                continue
            table, column = tables[name]
            for _, row in summary(_at(table, percent), ["arm", "percent"], column).iterrows():
                y = names.index(row["arm"]) + (i - (len(series) - 1) / 2) * spread
                part = table[(table["arm"] == row["arm"]) & (table["percent"] == row["percent"])]
                seeds = 100 * part.groupby("seed")[column].mean()
                panel.plot(seeds, np.full(len(seeds), y), ".", color="#888888", markersize=4, zorder=2)
                whiskers(panel, [100 * row["mean"]], [y], [100 * row["low"]], [100 * row["high"]], horizontal=True,
                         colour="#888888", width=0.8)
                panel.plot(100 * row["mean"], y, markersize=6, ls="", zorder=3, **style)
        scale(panel, "x", words=False)
        for y, name in enumerate(names):
            text = (words or {}).get((name, 0 if name == "dense" else percent))
            if text:
                panel.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        if words:
            panel.annotate(heading, (1.01, 1.01), xycoords="axes fraction", va="bottom", fontsize=8)
        panel.set_title(f"{percent}% sparse" if percent else "dense", fontsize=10)
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
    for y in np.arange(len(names) - 1) + 0.5:
        for panel in axes[0]:
            panel.axhline(y, color="#E5E5E5", lw=0.7, zorder=0)
    counts = {n: max(int(table[table["arm"] == n]["seed"].nunique()) for table, _ in tables.values()) for n in names}
    axes[0][0].set_yticks(range(len(names)), [f"{title(n)} (n = {counts[n]})" for n in names], fontsize=9)
    axes[0][0].set_ylim(len(names) - 0.45, -0.55)
    for name, style in zip(series, LOOKS, strict=False):
        axes[0][0].plot([], [], ls="", markersize=6, label=name, **style)
    figure.legend(loc="outside upper center", ncols=len(series), fontsize=9, frameon=False)
    figure.supxlabel(f"{HEIGHT}; dotted: {RULE} points", fontsize=10)
    return figure


def definitions(table: pd.DataFrame) -> Figure:
    """The barrier of error by three definitions: above the mean of the ends, above the line between them, and how many pairs lie
    below two points. table: of :func:`dpkit.report.connectivity.paths`."""
    good, words = measured(table), {}
    for (arm, percent), part in good.groupby(["arm", "percent"], sort=False) if len(good) else ():
        words[arm, int(percent)] = f"{int(part['stable'].astype(bool).sum())}/{len(part)}"
    return _rows({"highest error minus the ends' mean": (table, "error_barrier"),
                  "highest excess over the line between the ends": (table, "error_barrier_linear")}, words, "stable")


def statistics(table: pd.DataFrame) -> Figure:
    """The barrier under each way to get BatchNorm's statistics on the path, side by side. table: of ``paths``, with a column
    ``statistics``."""
    return _rows({NAMES[which]: (table[table["statistics"] == which] if len(table) else table, "error_barrier")
                  for which in STATISTICS})


def train_and_test(train: pd.DataFrame, test: pd.DataFrame) -> Figure:
    """Barrier on training images against that on test images: a mark an arm and sparsity, a dot an initialisation; bigger marks
    are sparser. On the diagonal both are equal. Up to six arms in one panel, else a panel a family. Both tables: of ``paths``;
    pairs that are in both count."""
    columns = ["arm", "percent", "seed", "pair", "error_barrier"]
    if not len(train) or not len(test):
        return nothing()
    both = measured(train)[columns].merge(measured(test)[columns], on=columns[:-1], suffixes=("_train", "_test"))
    if not len(both):
        return nothing("no pair has both")
    means = 100 * both.groupby(["arm", "percent", "seed"])[["error_barrier_test", "error_barrier_train"]].mean()
    levels, groups = sorted({int(p) for p in both["percent"] if p}), families(both["arm"]) or {"": []}
    if sum(map(len, groups.values())) <= FEW:
        groups = {"": [name for names in groups.values() for name in names]}
    # one below the other: beside the names of a family two square panels in a row would be left with no room
    rows = len(groups)
    figure, axes = new(7.4, 4.4 if rows == 1 else 2.8 * rows + 0.4, columns=1, rows=rows, sharex=True, sharey=True, squeeze=False)
    dense = {"dense": LOOKS[0] | {"marker": "s"}} if "dense" in set(both["arm"]) else {}
    for panel, (word, names) in zip(axes.flat, groups.items(), strict=False):
        panel.plot([-0.15, 100], [-0.15, 100], color="#777777", lw=0.9, zorder=0.5)
        for name, style in {**dense, **look(names)}.items():
            rim = style["color"] if style["marker"] == "x" else "white"
            for percent in [0] if name == "dense" else levels:
                if (name, percent) in means.index.droplevel("seed"):
                    part, size = means.loc[name, percent], 5 + 4 * (levels.index(percent) + 1) / len(levels) if percent else 7
                    x, y = part["error_barrier_test"], part["error_barrier_train"]
                    panel.plot(x, y, ".", color=style["color"], markersize=3.5, alpha=0.6)
                    panel.plot(x.mean(), y.mean(), ls="", marker=style["marker"], color=style["color"], markersize=size,
                               alpha=0.9, markeredgecolor=rim, markeredgewidth=1.2 if rim != "white" else 0.6)
            panel.plot([], [], ls="", marker=style["marker"], color=style["color"], markersize=6,
                       label=f"{title(name)} (n = {both[both['arm'] == name]['seed'].nunique()})")
        scale(panel, "x", words=False)
        scale(panel, words=panel is axes[0][0])
        panel.set_title(word, fontsize=10, loc="left")
        panel.set_aspect("equal")
        legend(panel)
    sizes = "; bigger marks are sparser" if len(levels) > 1 else ""
    figure.supxlabel(f"error barrier on test images (points){sizes}", fontsize=10)
    figure.supylabel("error barrier on training images (points)", fontsize=10)
    return figure


# --- against the spawn step -------------------------------------------------------------------------------------------

def instability(table: pd.DataFrame) -> Figure:
    """Barrier against how long children are the same network: a line an arm with 95% intervals, the dense network dashed.

    A column a sparsity, and a row of panels a family where there are many arms. table: of ``paths`` with columns step and epochs.
    """
    good = measured(table)
    if not len(good):
        return nothing("no path has a result" if len(table) else "nothing measured yet")
    stats, levels = summary(good, ["arm", "percent", "epochs"], "error_barrier"), _levels(good)
    groups = families(stats["arm"]) or {"": []}
    if sum(map(len, groups.values())) <= FEW:
        groups = {"": [name for names in groups.values() for name in names]}
    sizes = [max(1.9, 0.17 * (len(names) + 1) + 0.4) if len(groups) > 1 else 3.2 for names in groups.values()]
    figure, axes = new(2.9 + 2.2 * len(levels), sum(sizes) + 0.3 * len(sizes) + 0.6, columns=len(levels), rows=len(groups),
                       sharex=True, sharey=True, squeeze=False, gridspec_kw={"height_ratios": sizes})
    for row, (word, names) in zip(axes, groups.items(), strict=True):
        for panel, percent in zip(row, levels, strict=True):
            for name, style in {"dense": {"color": "black", "marker": "s", "linestyle": "--"}, **look(names)}.items():
                part = stats[(stats["arm"] == name) & (stats["percent"] == (0 if name == "dense" else percent))]
                if len(part):
                    part = part.sort_values("epochs")
                    line(panel, part["epochs"], part, name, style)
            scale(panel, words=panel is axes[0][0])
        handles = {text: h for panel in row for h, text in zip(*panel.get_legend_handles_labels(), strict=True)}
        row[-1].legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.05), fontsize=8, frameon=False,
                       handlelength=3)
        if word:
            row[0].set_title(word, fontsize=10, loc="left")
    for panel, percent in zip(axes[0], levels, strict=True):
        panel.set_title(f"{percent}% sparse" if percent else "dense", fontsize=10, loc="right")
    _epochs(axes[0][0], sorted(set(stats["epochs"])))
    for panel in axes.flat:
        panel.tick_params(labelsize=8)
    figure.supxlabel("epochs that the children share (k)", fontsize=10)
    figure.supylabel(HEIGHT, fontsize=10)
    return figure


def _epochs(panel, values: Sequence[float]) -> None:
    """A spawn step's axis: linear up to the first one after zero, logarithmic above, a tick where something was measured unless
    the tick before it is close."""
    positive = [v for v in values if v > 0]
    if not positive:
        panel.set_xticks(list(values), [f"{v:g}" for v in values])
        return
    panel.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
    panel.set_xlim(-0.25 * positive[0] if 0 in values else positive[0] / 1.6, values[-1] * 1.6)
    shown, apart = [0.0] if 0 in values else [], max(1.9, (positive[-1] / positive[0]) ** 0.2)
    for value in positive:
        if not shown or value >= apart * shown[-1]:
            shown.append(value)
    panel.set_xticks(shown, [f"{v:.2g}" for v in shown], fontsize=8)
    panel.set_xticks([v for v in values if v not in shown], minor=True)
    panel.xaxis.set_minor_formatter(lambda value, _: "")


def spawn_map(table: pd.DataFrame) -> Figure:
    """Where stability begins: mean barrier by sparsity and spawn step, a panel an arm; the lowest row is the dense network, which
    all arms share. table: of ``paths`` with columns step, epochs."""
    good = measured(table)
    if not len(good):
        return nothing("no path has a result" if len(table) else "nothing measured yet")
    stats = averages(good, ["arm", "percent", "epochs"], "error_barrier")
    epochs, percents = sorted(set(stats["epochs"])), sorted({int(p) for p in stats["percent"]}, reverse=True)
    names = [n for n in ordered(stats["arm"]) if n != "dense"] or ["dense"]
    values = {place: 100 * mean for *place, mean in stats[["arm", "percent", "epochs", "mean"]].itertuples(index=False)
              for place in [tuple(place)]}
    columns = min(3, len(names), max(1, int(6.6 / (0.33 * len(epochs) + 0.15))))
    rows = -(-len(names) // columns)
    figure, axes = new(1.0 + columns * max(2.2, 0.33 * len(epochs) + 0.15), rows * (0.24 * len(percents) + 0.4) + 1.3,
                       columns=columns, rows=rows, sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(axes.flat, names, strict=False):
        grid = np.array([[values.get((name if p else "dense", p, e), np.nan) for e in epochs] for p in percents])
        shown = heat(panel, grid, 7.5)
        panel.set_title(f"{title(name)} (n = {good[good['arm'] == name]['seed'].nunique()})", fontsize=9, loc="left")
        if 0 in percents and len(percents) > 1:
            panel.axhline(len(percents) - 1.5, color="white", lw=3)
    for panel in list(axes.flat)[len(names):]:
        panel.axis("off")
    for panel in axes[-1]:
        panel.set_xticks(range(len(epochs)), [f"{e:.2g}" for e in epochs], fontsize=8)
    for panel in axes.flat[max(0, len(names) - columns):len(names)]:  # the last one of each column
        panel.tick_params(axis="x", labelbottom=True, labelsize=8)
    axes[0][0].set_yticks(range(len(percents)), [f"{p}%" if p else "dense" for p in percents])
    for panel in axes.flat:
        panel.tick_params(axis="y", labelsize=8)
    figure.supxlabel("epochs that the children share (k)", fontsize=10)
    figure.supylabel("sparsity", fontsize=10)
    bar(figure, shown, axes.ravel().tolist(), location="top")
    return figure


def heat(panel, values: np.ndarray, size: float = 8, empty: str = EMPTY):
    """A matrix of barriers in points, written into its cells; ``empty`` is the colour where nothing was measured."""
    shown = panel.imshow(np.ma.masked_invalid(values), cmap=ListedColormap(TINTS).with_extremes(bad=empty),
                         norm=BoundaryNorm(EDGES, len(TINTS)), aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
            panel.text(x, y, text.replace("-", "−"), ha="center", va="center", fontsize=size,
                       color="white" if value >= EDGES[5] else "black")
    panel.grid(False)
    panel.tick_params(length=0)
    for edge in panel.spines.values():
        edge.set_visible(False)
    return shown


def bar(figure: Figure, shown: Any, axes: Any, label: str = HEIGHT, location: str = "right") -> None:
    """The scale of :func:`heat`."""
    drawn = figure.colorbar(shown, ax=axes, ticks=EDGES, shrink=0.95, aspect=25 if location == "right" else 45, spacing="uniform",
                            pad=0.02, location=location)
    (drawn.ax.set_yticklabels if location == "right" else drawn.ax.set_xticklabels)([f"{edge:g}" for edge in EDGES], fontsize=8)
    drawn.ax.minorticks_off()
    drawn.set_label(label, fontsize=9)
