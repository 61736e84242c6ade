"""Figures of what networks stand. Frames come from :mod:`dpkit.report.robustness`."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from dpkit.report.arm_figures import LIGHT, look
from dpkit.report.arms import averages, ordered
from dpkit.report.figures import colour, new, nothing, sheet, title, whiskers
from dpkit.report.frames import summary
from dpkit.report.robustness import FULL, to_dense


def examples(clean: Tensor, corrupted: Mapping[tuple[str, int], Tensor]) -> Figure:
    """The first image as it is and under each corruption: a row a corruption, a column a severity.

    clean, and each of ``corrupted`` by (name, severity): (N, C, H, W) uint8, of every name at the same severities.
    """
    if not corrupted:
        return nothing("no corruption was asked for")
    names, severities = list(dict.fromkeys(n for n, _ in corrupted)), list(dict.fromkeys(s for _, s in corrupted))
    shown = [pixels[0] for name in names for pixels in (clean, *(corrupted[name, severity] for severity in severities))]
    images = np.stack([pixels.permute(1, 2, 0).expand(-1, -1, 3).numpy() for pixels in shown]) / 255
    figure = sheet(images, [name.replace("_", " ") for name in names], 1 + len(severities))
    axes, width = figure.axes[0], images.shape[2] + 1
    axes.xaxis.tick_top()
    axes.set_xticks([i * width + width / 2 for i in range(1 + len(severities))], ["clean", *map(str, severities)])
    return figure


def _places(table: pd.DataFrame) -> dict[tuple[str, int], str]:
    """Names by (arm, percent), in order; the sparsity is named where there are several."""
    found = set(zip(table["arm"], table["percent"].astype(int), strict=True))
    several = len({percent for arm, percent in found if arm != "dense"}) > 1
    return {(arm, percent): title(arm) + (f", {percent}%" if several and percent else "")
            for arm in ordered(arm for arm, _ in found) for percent in sorted(p for a, p in found if a == arm)}


def errors(table: pd.DataFrame) -> Figure:
    """A row an arm: an open mark at the error on clean images, a full one at the mean over corruptions, 95% intervals, a dot an
    initialisation. table: of :func:`dpkit.report.robustness.networks`."""
    good = table[table["failed"].isna()] if len(table) else table
    if not len(good):
        return nothing("no network has a result" if len(table) else "nothing measured yet")
    places = _places(good)
    figure, axes = new(7, 0.42 * len(places) + 1.3)
    counts = []
    for column, full in (("clean_error", False), ("mean_corruption_error", True)):
        stats = summary(good, ["arm", "percent"], column).set_index(["arm", "percent"])
        counts = [int(stats.loc[place, "n"]) for place in places]
        for y, place in enumerate(places):
            row, shade = stats.loc[place], colour(place[0])
            at = y + (0.14 if full else -0.14)
            whiskers(axes, [100 * row["mean"]], [at], [100 * row["low"]], [100 * row["high"]], horizontal=True, colour="#444444")
            seeds = 100 * good[(good["arm"] == place[0]) & (good["percent"] == place[1])].groupby("seed")[column].mean()
            axes.plot(seeds, np.full(len(seeds), at), "o", color=shade, markersize=3.5, alpha=0.55, markeredgewidth=0)
            axes.plot(100 * row["mean"], at, "o", color=shade if full else "white", markeredgecolor="#222222" if full else shade,
                      markeredgewidth=0.6 if full else 1.6, markersize=8, zorder=3)
    for shade, text in (("white", "clean images"), ("#666666", "mean over corruptions and severities")):
        axes.plot([], [], "o", color=shade, markeredgecolor="#222222", markersize=8, label=text)
    axes.set_yticks(range(len(places)), [f"{name} (n = {n})" for name, n in zip(places.values(), counts, strict=True)])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("test error (%)")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def differences(table: pd.DataFrame) -> Figure:
    """By how many points each arm errs more than the dense network of its initialisation, by corruption and over all of them.

    Means over initialisations; red is worse than dense, blue better. table: of :func:`dpkit.report.robustness.corruptions`.
    """
    if not len(table):
        return nothing()
    pairs = to_dense(table)
    if not len(pairs):
        return nothing("no initialisation has a dense network and a sparse one")
    places, names = _places(pairs), list(dict.fromkeys(pairs["corruption"]))
    stats = averages(pairs, ["arm", "percent", "corruption"], "difference").set_index(["arm", "percent", "corruption"])
    values = np.array([[100 * stats["mean"].get((*place, name), np.nan) for name in names] for place in places])
    values = np.hstack([np.nanmean(values, axis=1, keepdims=True), values])
    figure, axes = new(2.6 + 0.46 * values.shape[1], 0.34 * len(places) + 1.9)
    most = max(1.0, float(np.nanmax(np.abs(values))))
    shown = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.1f}".replace("-", "−") if abs(value) < 9.95 else f"{value:.0f}".replace("-", "−")
            axes.text(x, y, "0.0" if text == "−0.0" else text, ha="center", va="center", fontsize=8,
                      color="white" if abs(value) > 0.6 * most else "black")
    axes.axvline(0.5, color="black", lw=1.2)
    axes.set_yticks(range(len(places)), list(places.values()))
    axes.set_xticks(range(values.shape[1]), ["all corruptions", *(name.replace("_", " ") for name in names)], rotation=45,
                    ha="right", fontsize=8.5)
    axes.grid(False)
    axes.tick_params(length=0)
    figure.colorbar(shown, ax=axes, label="error minus dense (points)", shrink=0.9, pad=0.02)
    return figure


def severities(table: pd.DataFrame) -> Figure:
    """Mean error over corruptions against severity, 0 being clean images: a line an arm with 95% intervals.

    table: of :func:`dpkit.report.robustness.corruptions`.
    """
    if not len(table):
        return nothing()
    clean = table.drop_duplicates(["arm", "percent", "seed", "key"]).assign(severity=0)
    whole = pd.concat([clean.assign(error=clean["clean_error"]), table], ignore_index=True)
    return _lines(whole, "severity", "severity (0: clean images)", lambda value: str(value))


def bits(table: pd.DataFrame) -> Figure:
    """Error against the bits of the weights, from as trained to the fewest: a line an arm with 95% intervals and a dot an
    initialisation. table: of :func:`dpkit.report.robustness.quantised`."""
    if not len(table):
        return nothing()
    fewest = table.assign(place=-table["bits"])
    return _lines(fewest, "place", "bits of a weight", lambda value: "as trained" if value == -FULL else str(-value))


def _lines(table: pd.DataFrame, column: str, label: str, text) -> Figure:
    """``error`` in percent against the levels of ``column``, evenly spaced in their order."""
    places, levels = _places(table), sorted(set(table[column]))
    stats = summary(table, ["arm", "percent", column], "error")
    figure, axes = new(7.2, 4.0)
    styles = look(arm if len([a for a, _ in places if a == arm]) == 1 else f"{arm} {percent}" for arm, percent in places)
    for i, ((place, name), style) in enumerate(zip(places.items(), styles.values(), strict=True)):
        part = stats[(stats["arm"] == place[0]) & (stats["percent"] == place[1])].sort_values(column)
        shade = colour(place[0])
        x = np.array([levels.index(value) for value in part[column]]) + 0.05 * (i - (len(places) - 1) / 2)  # side by side
        axes.vlines(x, 100 * part["low"], 100 * part["high"], color=shade, lw=1, alpha=0.6)
        rim = [withStroke(linewidth=2.7, foreground="#666666")] if shade in LIGHT else []
        axes.plot(x, 100 * part["mean"], lw=1.5, markersize=5, label=f"{name} (n = {part['n'].min()})", path_effects=rim,
                  **(style | {"color": shade}))
        own = table[(table["arm"] == place[0]) & (table["percent"] == place[1])]
        for at, value in zip(x, part[column], strict=True):
            seeds = 100 * own[own[column] == value].groupby("seed")["error"].mean()
            axes.plot(np.full(len(seeds), at), seeds, "o", color=shade, markersize=2.5, alpha=0.5, markeredgewidth=0)
    axes.set_xticks(range(len(levels)), [text(value) for value in levels])
    axes.set(xlabel=label, ylabel="test error (%)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5)
    return figure
