"""Figures of what masks remove from the dense network, of sharpness along training, and of sharpness beside accuracy.

Frames come from :mod:`dpkit.report.curvature`.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dpkit.report.arm_figures import legend, look
from dpkit.report.arms import called, ordered, split
from dpkit.report.curvature import CORRELATED, at_highest, correlation
from dpkit.report.curvature_figures import GREY, heights, in_groups, name_rows, rows_of, scale
from dpkit.report.figures import colour, new, nothing, title
from dpkit.statistics import Correlation

SYMBOLS = ("o", "s", "^", "D", "v", "P", "X", "p")  # of sparsities
RED = "#B00000"
FILLED, HOLLOW = {"marker": "D", "color": "#D55E00"}, {"marker": "o", "color": "white", "markeredgecolor": "#222222"}
CHANCE = {"marker": "|", "color": "#222222", "markersize": 13, "markeredgewidth": 1.8}
#: what is drawn against accuracy: at equal sparsity the trace orders networks as the trace per weight does
SHOWN = {column: label for column, label in CORRELATED.items() if column != "trace"}
MOST_LOSSES = 4  # so many losses have a panel, the real one first


# --- what masks remove ------------------------------------------------------------------------------------------------

def removed(table: pd.DataFrame) -> Figure:
    """Mean curvature in the dense network of the weights that a mask removes and of those that it keeps, and of what random masks
    with the same layer counts remove: a row an arm, a panel a loss. table: of :func:`dpkit.report.curvature.removed`."""
    return _beside(table, {"removed": ("removed", FILLED), "kept": ("kept", HOLLOW),
                           "removed by random masks with the same layers": ("chance", CHANCE)},
                   "mean curvature of the dense network's weights")


def overlap(table: pd.DataFrame) -> Figure:
    """Share of the dense network's top eigenvectors that lies on a mask's weights, beside random masks with the same layer counts
    and with the same total: a row an arm, a panel a loss. table: of :func:`dpkit.report.curvature.removed`."""
    return _beside(table, {"on surviving weights": ("overlap", FILLED),
                           "random masks with the same layers": ("overlap_layerwise", CHANCE),
                           "of the same total": ("overlap_uniform", CHANCE | {"color": "#AAAAAA"})},
                   "share of the top eigenvectors (%)", percent=True)


def rises(table: pd.DataFrame) -> Figure:
    """Rise of the dense network's loss when a mask's removed weights are set to 0, without training, beside random masks with the
    same layer counts (bar: least to most): a row an arm, a panel a loss. table: of :func:`dpkit.report.curvature.removed`."""
    return _beside(table, {"the mask": ("rise", FILLED), "random masks with the same layers": ("rise_random", CHANCE)},
                   "rise of the dense network's loss (nats)", reach=("rise_least", "rise_most"))


def _beside(table: pd.DataFrame, marks: Mapping[str, tuple[str, Mapping[str, Any]]], label: str, *, percent: bool = False,
            reach: tuple[str, str] | None = None) -> Figure:
    """marks: name -> column, style, the first one with dots for initialisations. reach: columns of a bar's ends."""
    columns = [column for column, _ in marks.values()]
    good = table[table[columns[0]].notna()] if len(table) else table
    if not len(good):
        return nothing("no mask has a result" if len(table) else "nothing measured yet")
    good = at_highest(good)
    losses = sorted(dict.fromkeys(good["on"]), key=lambda on: on != "real")[:MOST_LOSSES]
    places, factor = rows_of(good["arm"]), 100 if percent else 1
    figure, axes = new(2.7 + (4.6 if len(losses) == 1 else 2.6 if len(losses) == 2 else 2.2) * len(losses),
                       0.24 * (max(places.values()) + 1.4) + 1.2, columns=len(losses), sharey=True, squeeze=False)
    for panel, on in zip(axes[0], losses, strict=True):
        part = good[good["on"] == on]
        for arm, y in places.items():
            mine = part[part["arm"] == arm]
            if not len(mine):
                continue
            if reach and mine[list(reach)].notna().all(axis=None):
                ends = [mine[reach[0]].min(), mine[reach[1]].max()]
                panel.plot(ends, [y, y], color="#CCCCCC", lw=4, solid_capstyle="butt", zorder=1)
            panel.plot(factor * mine[columns[0]], np.full(len(mine), y), ".", color=GREY, markersize=5, zorder=2)
            for column, style in list(marks.values())[::-1]:
                panel.plot(factor * mine[column].mean(), y, **{"markersize": 6, "ls": "", "zorder": 3} | dict(style))
        if percent:
            panel.set_xlim(0, 100)
        else:
            scale(panel, part[[*columns, *(reach or ())]].to_numpy().ravel())
        panel.set_title("on real images" if on == "real" else f"on {called(on)} images", fontsize=9.5)
    name_rows(axes[0], places, good.groupby("arm")["seed"].nunique())
    handles = [Line2D([], [], label=name, **{"markersize": 6, "ls": ""} | dict(style)) for name, (_, style) in marks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(marks), fontsize=8.5, frameon=False)
    figure.supxlabel(label, fontsize=10)
    return figure


# --- along training, and beside accuracy ------------------------------------------------------------------------------

def edge(table: pd.DataFrame) -> Figure:
    """The edge-of-stability ratio against epochs: thin lines are initialisations, thick ones their mean; 1 is the edge. Up to six
    arms in one panel, else a panel a family. table: of :func:`dpkit.report.curvature.edges`."""
    if not len(table):
        return nothing()
    table = at_highest(table)
    groups = in_groups(table["arm"])
    figure, axes = new(7.4, sum(heights(groups)) + 0.6, rows=len(groups), sharex=True, sharey=True, squeeze=False,
                       gridspec_kw={"height_ratios": heights(groups)})
    for (panel,), (word, names) in zip(axes, groups.items(), strict=True):
        styles = {"dense": {"color": "black", "marker": "", "linestyle": "-"}} if "dense" in set(table["arm"]) else {}
        for name, style in {**styles, **look(names)}.items():
            part = table[table["arm"] == name]
            for _, way in part.groupby("seed"):
                way = way.sort_values("epochs")
                panel.plot(way["epochs"], way["ratio"], color=style["color"], lw=0.6, alpha=0.45)
            means = part.groupby("epochs")["ratio"].mean()
            panel.plot(means.index, means, lw=1.7, markersize=3.5, label=f"{title(name)} (n = {part['seed'].nunique()})", **style)
        panel.axhline(1, color=RED, lw=1, ls=":")
        panel.annotate("edge of stability", (0.99, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8,
                       color=RED)
        panel.set_title(word, fontsize=10, loc="left")
        legend(panel)
    axes[0][0].set_ylim(min(0.0, 1.05 * table["ratio"].min()), 1.1 * max(1.05, table["ratio"].max()))
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("top eigenvalue over the largest stable one", fontsize=10)
    return figure


def against_accuracy(table: pd.DataFrame, columns: Mapping[str, str] = SHOWN) -> Figure:
    """Test accuracy against each measure (column -> label): a mark a network, colours of arms, symbols of sparsities, with the
    rank correlation at equal sparsity and its interval. Hollow marks are controls and other rewinding. table: of ``networks``."""
    good = table[table["accuracy"].notna()] if len(table) else table
    columns = {c: label for c, label in columns.items() if len(good) and good[c].notna().any()}
    if not columns:
        return nothing("no network has a result" if len(table) else "nothing measured yet")
    names, levels = ordered(good["arm"]), sorted(set(good["percent"]))
    symbols = {p: "*" if p == 0 else SYMBOLS[i % len(SYMBOLS)] for i, p in enumerate(sorted(levels, key=lambda p: (p == 0, p)))}
    wide = min(3, len(columns))
    rows = -(-len(columns) // wide)
    figure, axes = new(max(5.0, 2.65 * wide + 0.4), 2.45 * rows + 0.5 + 0.17 * -(-(len(names) + len(levels)) // 3), columns=wide,
                       rows=rows, sharey=True, squeeze=False)
    for panel, (column, label) in zip(axes.flat, columns.items(), strict=False):
        for (arm, percent), part in good[good[column].notna()].groupby(["arm", "percent"], sort=False):
            panel.plot(part[column], 100 * part["accuracy"], ls="", marker=symbols[percent], alpha=0.8,
                       markersize=4.5 if percent else 7, **_mark(arm))
        scale(panel, good[column])
        panel.set_title(f"{label}\n{_correlation_text(correlation(table, column))}", fontsize=8.5)
    for panel in list(axes.flat)[len(columns):]:
        panel.axis("off")
    handles = [Line2D([], [], ls="", marker="*" if n == "dense" else "o", markersize=7 if n == "dense" else 5, label=title(n),
                      **_mark(n)) for n in names]
    handles += [Line2D([], [], ls="", marker=symbols[p], markersize=5, color="#555555", label=f"{p}% sparse" if p else "dense")
                for p in levels if p or "dense" not in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False, handletextpad=0.2)
    figure.supylabel("test accuracy (%)", fontsize=10)
    return figure


def _correlation_text(found: Correlation | None) -> str:
    if found is None:
        return "no correlation: too few networks"
    ends = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"ρ = {found.value:.2f}{ends}".replace("-", "−")


def _mark(arm: str) -> dict[str, Any]:
    """Colours of an arm's marks: controls and other rewinding have their arm's, and are hollow."""
    hollow = bool(split(arm)[1])
    return {"color": colour(arm), "markerfacecolor": "none" if hollow else colour(arm), "markeredgewidth": 0.8 if hollow else 0}
