"""Figures of linear connectivity in parts and between unlike networks: single layers, arms, rounds, small sets against real data.

Frames come from :mod:`dpkit.report.connectivity`; what holds for :mod:`dpkit.report.connectivity_figures` holds here.
"""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dpkit.report.arm_figures import FEW, by_family, families, legend, line, look
from dpkit.report.arms import averages, ordered
from dpkit.report.connectivity_figures import HEIGHT, RULE, bar, heat, measured, scale
from dpkit.report.figures import colour, new, nothing, title, whiskers
from dpkit.report.frames import summary


def layers(table: pd.DataFrame) -> Figure:
    """What moving one layer costs: a panel an arm and sparsity, a place a layer from the input on.

    Full marks: this layer moved alone, open ones: all but this one; means over initialisations with 95% intervals. All may lie
    below 0, where the mixture errs less than the mean of both children.
    table: of :func:`dpkit.report.connectivity.layers`, rows of one sparsity and, with them, those of the dense network.
    """
    good = measured(table, "barrier")
    if not len(good):
        return nothing("no pair has a result" if len(table) else "nothing measured yet")
    places = good.drop_duplicates("layer").sort_values("position")["layer"].tolist()
    order = [(n, p) for n in ordered(good["arm"]) for p in sorted(set(good[good["arm"] == n]["percent"]))]
    columns = min(len(order), 3 if len(places) <= 8 else 2)
    rows = -(-len(order) // columns)
    spans = {(name, percent, column): summary(good[(good["arm"] == name) & (good["percent"] == percent)], ["layer"], column,
                                              (-1.0, 1.0)).set_index("layer").reindex(places)
             for name, percent in order for column in ("others_barrier", "barrier")}
    lowest = 100 * min(float(stats["low"].min()) for stats in spans.values())
    tall = 1.95 if lowest < -1 else 1.55
    figure, axes = new(1.0 + columns * max(2.6, 0.16 * len(places) + 0.6), tall * rows + 1.3, columns=columns, rows=rows,
                       sharex=True, sharey=True, squeeze=False)
    for panel, (name, percent) in zip(axes.flat, order, strict=False):
        part = good[(good["arm"] == name) & (good["percent"] == percent)]
        for column, fill in (("others_barrier", "white"), ("barrier", colour(name))):
            stats = spans[name, percent, column]
            x = np.arange(len(places)) + (0.14 if column == "barrier" else -0.14)
            whiskers(panel, x, 100 * stats["mean"], 100 * stats["low"], 100 * stats["high"], colour="#888888", width=0.8)
            panel.plot(x, 100 * stats["mean"], "o", color=fill, markeredgecolor=colour(name), markersize=4.5, zorder=3)
        scale(panel, words=False, lowest=min(0.0, lowest))
        place = f"{title(name)}, {percent}%" if percent else title(name)
        panel.set_title(f"{place} (n = {part['seed'].nunique()})", fontsize=8, loc="left")
        panel.grid(axis="x", visible=False)
    for panel in list(axes.flat)[len(order):]:
        panel.axis("off")
    for panel in axes.flat[max(0, len(order) - columns):len(order)]:  # the last one of each column
        panel.set_xticks(range(len(places)), [n.removesuffix(".weight") for n in places], rotation=60, ha="right",
                         rotation_mode="anchor", fontsize=7.5)
        panel.tick_params(axis="x", labelbottom=True)
    for fill, text in (("#555555", "this layer moved alone"), ("white", "all layers but this one moved")):
        axes[0][0].plot([], [], "o", color=fill, markeredgecolor="#555555", markersize=5, label=text)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    figure.supylabel("rise of the error (points)", fontsize=10)
    return figure


def _label(column: str) -> str:
    return "error barrier above the line (points)" if column.endswith("linear") else HEIGHT


def between_arms(table: pd.DataFrame, own: pd.DataFrame | None = None, column: str = "error_barrier_linear") -> Figure:
    """Barriers between arms: a matrix, means over initialisations; above the line between the ends unless ``column`` is another.

    table: of ``paths``, rows of the relation ``arms`` at one sparsity, columns arm and other. own: of ``paths`` at that sparsity,
    pairs of children of one arm; they go on the diagonal.
    """
    good = measured(table, column)
    if not len(good):
        return nothing("no path has a result" if len(table) else "nothing measured yet")
    stats, names = averages(good, ["arm", "other"], column), ordered([*good["arm"], *good["other"]])
    values = np.full((len(names), len(names)), np.nan)
    for _, row in stats.iterrows():
        i, j = sorted((names.index(row["arm"]), names.index(row["other"])))
        values[j, i] = 100 * row["mean"]
    diagonal = averages(measured(own, column), ["arm"], column) if own is not None and len(own) else stats.iloc[:0]
    for name, mean in zip(diagonal["arm"], diagonal["mean"], strict=True):
        if name in names:
            values[names.index(name), names.index(name)] = 100 * mean
    first = 0 if len(diagonal) else 1  # without a diagonal the first row and the last column are empty
    side = 0.44 if len(names) <= 10 else 0.36
    figure, axes = new(3.6 + side * len(names), 1.9 + side * len(names))
    shown = heat(axes, values[first:, :len(names) - first], size=8 if len(names) <= 10 else 7,
                 empty="white")
    axes.set_aspect("equal")
    axes.set_xticks(range(len(names) - first), [title(n) for n in names[:len(names) - first]], rotation=55, ha="right",
                    rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(names) - first), [title(n) for n in names[first:]], fontsize=8.5)
    bar(figure, shown, axes, _label(column))
    return figure


def rounds(table: pd.DataFrame, column: str = "error_barrier_linear") -> Figure:
    """Barriers between what successive rounds of one search trained: a line an arm with 95% intervals.

    Above the line between the ends unless ``column`` is another: networks of other sparsity err differently, and half of that
    difference would count as a barrier. Two points are marked where they are a rule, above the mean of the ends. table: of
    ``paths``, rows of the relation ``rounds``, columns round and other_round.
    """
    good = measured(table, column)
    good = good[good["arm"] != "dense"] if len(good) else good  # it has one round
    if not len(good):
        return nothing("no path has a result" if len(table) else "nothing measured yet")
    good = good.assign(place=list(zip(good["round"].astype(int), good["other_round"].astype(int), strict=True)))
    places, stats = sorted(set(good["place"])), summary(good, ["arm", "place"], column)
    groups = families(stats["arm"])
    if sum(map(len, groups.values())) <= FEW:
        groups = {"": [n for names in groups.values() for n in names]}
    sizes = [max(1.9, 0.17 * len(names) + 0.4) if len(groups) > 1 else 3.2 for names in groups.values()]
    figure, axes = new(7.6, sum(sizes) + 0.28 * len(sizes) + 0.6, rows=len(groups), sharex=True, sharey=True, squeeze=False,
                       gridspec_kw={"height_ratios": sizes})
    for (panel,), (word, names) in zip(axes, groups.items(), strict=True):
        for i, (name, style) in enumerate(look(names).items()):
            part = stats[stats["arm"] == name].sort_values("place")
            line(panel, [places.index(p) + (i - (len(names) - 1) / 2) * 0.05 for p in part["place"]], part, name, style)
        scale(panel, words=panel is axes[0][0], rule=not column.endswith("linear"))
        legend(panel)
        panel.set_title(word, fontsize=10, loc="left")
    axes[-1][0].set_xticks(range(len(places)), [f"{a}–{b}" for a, b in places])
    axes[-1][0].set_xlabel("rounds of the search")
    figure.supylabel(_label(column), fontsize=10)
    return figure


def solution(table: pd.DataFrame, column: str = "error_barrier_linear") -> Figure:
    """Barrier between the network that a search's small set trained and a child of the same ticket on real data, by sparsity.

    Above the line between the ends unless ``column`` is another: the small set's network errs far more often, and half of that
    difference would count as a barrier. "dense" is before any pruning. table: of ``paths``, rows of the relation ``solution``.
    """
    good = measured(table, column)
    if not len(good):
        return nothing("no path has a result" if len(table) else "nothing measured yet")
    figure = by_family(good, column, _label(column), rule=None if column.endswith("linear") else RULE / 100)
    levels = sorted({int(p) for p in good["percent"]})
    for panel in figure.axes:
        panel.set_xticks(levels, [str(p) if p else "dense" for p in levels])
    return figure
