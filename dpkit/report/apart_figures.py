"""Figures of how far apart two children are: by layer in their weights, and in what they say about images.

Frames come from :mod:`dpkit.report.apart` and from the chapter's frame of the part ``alignment``.
"""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dpkit.report.apart import CHURN
from dpkit.report.arm_figures import legend, look
from dpkit.report.arms import averages, ordered
from dpkit.report.figures import colour, new, nothing, title, whiskers

MOST = 8  # so many arms fit one panel
SHADES = {"churn_gains": "#009E73", "churn_losses": "#D55E00", "churn_sideways": "#B0B0B0"}


def _named(arm: str, percent: int) -> str:
    return f"{title(arm)}, {percent}%" if percent else title(arm)


def layers(table: pd.DataFrame) -> Figure:
    """Distance of two children's weights over the root of their number, and cosine of the ways that they took, by layer from the
    input on: means over initialisations with 95% intervals, a line an arm, at most eight of them.

    table: of :func:`dpkit.report.apart.layers`, rows of one sparsity and, with them, those of the dense network.
    """
    if not len(table):
        return nothing()
    places = table.drop_duplicates("layer").sort_values("position")["layer"].tolist()
    names = ordered(table["arm"])[:MOST]
    styles = {"dense": {"color": "black", "marker": "s", "linestyle": "--"}} | look(n for n in names if n != "dense")
    figure, axes = new(max(7.6, 3.4 + 0.36 * len(places)), 3.4, columns=2, squeeze=False)
    for panel, (column, label) in zip(axes[0], (("step", "distance over √(weights)"),
                                                ("cosine", "cosine of the two ways")), strict=True):
        for i, name in enumerate(names):
            stats = averages(table[table["arm"] == name], ["layer"], column).set_index("layer").reindex(places)
            x = np.arange(len(places)) + (i - (len(names) - 1) / 2) * 0.06
            whiskers(panel, x, stats["mean"], stats["low"], stats["high"], colour=styles[name]["color"], width=0.7)
            panel.plot(x, stats["mean"], markersize=4.5, lw=1.2, **styles[name],
                       label=f"{title(name)} (n = {table[table['arm'] == name]['seed'].nunique()})")
        means = averages(table[table["arm"].isin(names)], ["arm", "layer"], column)["mean"]
        reach = 0.25 * max(float(means.max() - means.min()), 0.05)
        low, high = float(means.min()) - reach, float(means.max()) + reach  # wide intervals are cut at the edge
        panel.set_ylim(max(low, 0.0) if column == "step" else max(low, -1.02), high if column == "step" else min(high, 1.02))
        panel.set_ylabel(label)
        panel.set_xticks(range(len(places)), [n.removesuffix(".weight") for n in places], rotation=45 if len(places) > 4 else 0,
                         ha="right" if len(places) > 4 else "center", fontsize=8)
        panel.grid(axis="x", visible=False)
    legend(axes[0][1])
    return figure


def churn(table: pd.DataFrame) -> Figure:
    """What the share of test images on which two children disagree consists of: a bar an arm and sparsity, means over
    initialisations. The part that equal errors could do without is right of the tick.

    table: the frame of the part ``alignment``.
    """
    good = table[table["failed"].isna() & table["disagreement"].notna()] if len(table) else table
    if not len(good):
        return nothing("no pair has a result" if len(table) else "nothing measured yet")
    places = [(arm, p) for arm in ordered(good["arm"]) for p in sorted(set(good[good["arm"] == arm]["percent"]))]
    figure, axes = new(7.4, 0.24 * len(places) + 1.3)
    for y, (arm, percent) in enumerate(places):
        part = good[(good["arm"] == arm) & (good["percent"] == percent)]
        start = 0.0
        for name, shade in SHADES.items():
            value = 100 * float(part.groupby("seed")[name].mean().mean())
            axes.barh(y, value, left=start, color=shade, height=0.66)
            start += value
        seeds = 100 * part.groupby("seed")["disagreement"].mean()
        axes.plot(seeds, np.full(len(seeds), y), "o", color="white", markeredgecolor="black", markersize=3.5, zorder=3)
        needless = 100 * float(part.groupby("seed")["churn_needless"].mean().mean())
        axes.plot([start - needless] * 2, [y - 0.33, y + 0.33], color="black", lw=1.4)
        axes.plot(-0.6, y, "|", color=colour(arm), markersize=9, markeredgewidth=3, clip_on=False)
    for name, shade in SHADES.items():
        axes.barh(0, 0, color=shade, label=CHURN[name])
    axes.plot([], [], "|", color="black", markersize=11, markeredgewidth=1.4, label="what unequal errors ask for")
    counts = {place: good[(good["arm"] == place[0]) & (good["percent"] == place[1])]["seed"].nunique() for place in places}
    axes.set_yticks(range(len(places)), [f"{_named(*place)} (n = {counts[place]})" for place in places], fontsize=8)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlim(left=-0.9)
    axes.set_xlabel("share of test images on which two children disagree (%)")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False, columnspacing=1.2)
    return figure
