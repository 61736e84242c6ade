"""Figures over many arms: a panel a family, differences seed by seed, and what the searches cost."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator

from dpkit.report.arms import averages, family, is_control, ordered, split
from dpkit.report.figures import MARKERS, against_sparsity, colour, mean_line, new, nothing, paths, threshold, title, whiskers
from dpkit.report.frames import summary

LEAST = 0.01  # seconds: the least that a logarithmic axis shows
FEW = 6  # so many arms still fit one panel
REFERENCES = ("imp", "random")  # in every panel
LINES = ("-", "--", ":", "-.")
LIGHT = ("#F0E442", "#9ADBC5")  # colours that need a rim on white
CROWD = 4  # so many arms of one colour can be told apart by their lines and markers
#: colours of what was changed, for where a crowd of controls has the colours of their arms
CHANGES = {"_weights": "#0072B2", "_norm_only": "#56B4E9", "_shuffled": "#009E73", "_reinit": "#D55E00", "_signs": "#CC79A7",
           "_borrowed": "#E69F00", "_transferred": "#5B1F4A"}
SPARE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")


def look(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each arm, so that no two of the ``names`` look alike.

    An arm has its own colour and marker; where another has taken them (controls have their arm's) the line style changes, and the
    marker to one that is free. Where more than four have one colour, controls have one for what was changed instead, and a line
    style for their arm.
    """
    found: dict[str, dict[str, Any]] = {}
    names = list(names)
    shades = Counter(map(colour, names))
    for name in names:
        shade, marker = colour(name), MARKERS.get(split(name)[0].removesuffix("_soft"), "o")
        if split(name)[1] and shades[shade] > CROWD:
            shade = CHANGES[split(name)[1][-1]]
        taken = [style for style in found.values() if style["color"] == shade]
        used = [style["marker"] for style in found.values()]
        if marker in used:
            marker = next((m for m in SPARE_MARKERS if m not in used), marker)
        found[name] = {"color": shade, "marker": marker, "linestyle": LINES[len(taken) % len(LINES)]}
    return found


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """The arms by family, in order; ``dense`` is in none."""
    found: dict[str, list[str]] = {}
    for name in ordered(names):
        if name != "dense":
            found.setdefault(family(name), []).append(name)
    return found


def stacked(groups: Mapping[str, list[str]], label: str, xlabel: str, **options: Any) -> tuple[Figure, list]:
    """A figure with a panel a family, one below another with equal axes, and room for their legends on the right."""
    heights = [max(1.75, 0.17 * len(names) + 0.35) for names in groups.values()]
    figure, axes = new(7.6, sum(heights) + 0.28 * len(heights) + 0.5, rows=len(groups), sharex=True, sharey=True, squeeze=False,
                       gridspec_kw={"height_ratios": heights}, **options)
    found = [row[0] for row in axes]
    for panel, word in zip(found, groups, strict=True):
        panel.set_title(word, fontsize=10, loc="left")
    found[-1].set_xlabel(xlabel)
    figure.supylabel(label, fontsize=10)
    return figure, found


def line(panel, x: Any, part: pd.DataFrame, name: str, style: Mapping[str, Any]) -> None:
    """An arm's means in percent with their intervals, cut to [0, 1], as thin bars, and its entry in the legend."""
    panel.vlines(x, 100 * part["low"].clip(0), 100 * part["high"].clip(upper=1), color=style["color"], lw=1.0, alpha=0.6)
    rim = [withStroke(linewidth=2.6, foreground="#666666")] if style["color"] in LIGHT else []
    panel.plot(x, 100 * part["mean"], markersize=4.5, lw=1.4, label=f"{title(name)} (n = {part['n'].min()})", path_effects=rim,
               **style)


def legend(panel) -> None:
    """The panel's legend on its right."""
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.05), fontsize=8, handlelength=3, frameon=False)


def heights(panel, values: Iterable[float]) -> None:
    """An axis for the means: intervals of two seeds may be so wide that nothing else could be read; they are cut at the edge."""
    low, high = min(values), max(values)
    reach = 0.12 * max(high - low, 1.0)
    panel.set_ylim(max(low - reach, -reach), min(high + reach, 100 + reach))


def by_family(table: pd.DataFrame, column: str, label: str, *, rule: float | None = None) -> Figure:
    """``column`` in percent against sparsity for any number of arms: up to six in one panel, else a panel a family.

    Every panel has the dense network, IMP and the random mask as thin lines, so that families can be compared. table: columns
    arm, percent, seed, failed; rule: as in :func:`dpkit.report.figures.against_sparsity`.
    """
    if not len(table):
        return nothing()
    stats = summary(table, ["arm", "percent"], column)
    groups = families(stats["arm"])
    if sum(map(len, groups.values())) <= FEW:
        return against_sparsity(table, column, label, rule=rule, looks=look(dict.fromkeys(stats["arm"])))
    groups = {word: [n for n in names if n not in REFERENCES] for word, names in groups.items()}
    groups = {word: names for word, names in groups.items() if names}
    figure, panels = stacked(groups, label, "sparsity (% of weights removed)")
    sides = {arm: part.sort_values("percent") for arm, part in stats.groupby("arm", sort=False)}
    for panel, names in zip(panels, groups.values(), strict=True):
        shown = _references(panel, sides)
        for i, (arm, style) in enumerate(look(names).items()):
            # side by side, so that intervals can be told apart
            line(panel, sides[arm]["percent"] + (i - (len(names) - 1) / 2) * 0.5, sides[arm], arm, style)
        legend(panel)
    for panel in panels:
        if rule is not None:
            threshold(panel, rule)
    if rule is None:
        heights(panels[0], 100 * stats["mean"])
    panels[0].set_xticks(sorted({int(p) for p in stats["percent"] if p}))
    if shown:
        figure.legend(shown, [entry.get_gid() for entry in shown], loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


def _references(panel, sides: Mapping[str, pd.DataFrame]) -> list:
    """The dense network as a dashed line, IMP and the random mask thin; returns the lines, named in their group's identifier."""
    found = []
    if "dense" in sides:
        row = sides["dense"].iloc[0]
        found.append(panel.axhline(100 * row["mean"], color="black", lw=1, ls="--", gid=f"dense (n = {row['n']})"))
    for arm in REFERENCES:
        if arm in sides:
            part = sides[arm]
            panel.fill_between(part["percent"], 100 * part["low"], 100 * part["high"], color=colour(arm), alpha=0.12, lw=0)
            found += panel.plot(part["percent"], 100 * part["mean"], color=colour(arm), lw=1, marker=MARKERS[arm], markersize=3,
                                gid=f"{title(arm)} (n = {part['n'].min()})")
    return found


def differences(table: pd.DataFrame, label: str, column: str = "difference", levels: int = 3) -> Figure:
    """Paired differences in points: a row an arm, families apart, a panel for each of the highest ``levels`` sparsities.

    Dots are initialisations, the bar their mean, whiskers the 95% interval. The random mask does not set the scale: where it
    falls off the axis, an arrow says how far. table: of :func:`dpkit.report.arms.paired`.
    """
    if not len(table):
        return nothing("no initialisation has both networks")
    shown = sorted(set(table["percent"]))[-levels:]
    groups = families(table["arm"])
    places = _places(groups)
    height = 0.25 * (max(places.values()) + 1.7) + 0.9
    figure, axes = new(7.6, height, columns=len(shown), sharex=True, sharey=True, squeeze=False)
    stats = averages(table, ["arm", "percent"], column)
    recent = table[table["percent"].isin(shown)]
    most = recent[recent["arm"] != "random"] if (recent["arm"] != "random").any() else recent
    low, high = min(0.0, 100 * most[column].min()), max(0.0, 100 * most[column].max())
    reach = 0.3 * max(high - low, 1.0)  # an interval of two seeds may be so wide that nothing else could be read: it is cut
    axes[0][0].set_xlim(low - reach, high + reach)
    for panel, percent in zip(axes[0], shown, strict=True):
        panel.axvline(0, color="#444444", lw=1)
        for _, row in stats[stats["percent"] == percent].iterrows():
            at, shade = places[row["arm"]], colour(row["arm"])
            dots = table[(table["arm"] == row["arm"]) & (table["percent"] == percent)].groupby("seed")[column].mean()
            panel.plot(100 * dots, np.full(len(dots), at), "o", color=shade, markersize=4, alpha=0.5, markeredgewidth=0)
            if row["n"] > 1:
                whiskers(panel, [100 * row["mean"]], [at], [100 * row["low"]], [100 * row["high"]], horizontal=True,
                         colour="#222222", width=1)
            panel.plot(100 * row["mean"], at, "|", color=shade, markersize=11, markeredgewidth=2.5)
            if not low - reach < 100 * row["mean"] < high + reach:
                left = row["mean"] < 0
                far = f"{100 * row['mean']:.0f}".replace("-", "−")
                panel.annotate(f"← {far}" if left else f"{far} →", (0.02 if left else 0.98, at), va="center",
                               xycoords=("axes fraction", "data"), ha="left" if left else "right", fontsize=8, color="#333333")
        panel.set_title(f"{percent}% sparse", fontsize=10)
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
    _rows(axes[0], places, groups)
    figure.supxlabel(label, fontsize=10)
    return figure


def _places(groups: Mapping[str, list[str]]) -> dict[str, float]:
    """The row of each arm, with a gap between families."""
    places, y = {}, 0.0
    for names in groups.values():
        places |= {name: y + i for i, name in enumerate(names)}
        y += len(names) + 0.7
    return places


def _rows(axes, places: Mapping[str, float], groups: Mapping[str, list[str]]) -> None:
    """Names of the arms on the first panel, with a line between families in all."""
    axes[0].set_yticks(list(places.values()), [title(name) for name in places], fontsize=9)
    axes[0].set_ylim(max(places.values()) + 0.8, -0.8)
    for names in list(groups.values())[1:]:
        for panel in axes:
            panel.axhline(places[names[0]] - 0.85, color="#BBBBBB", lw=0.8)


def _readable(panel) -> None:
    """Ticks of a logarithmic axis that neither crowd nor run out, however many decades it has."""
    low, high = panel.dataLim.intervalx
    decades = np.log10(high / low)
    digits = (1,) if decades > 1.2 else (1, 3) if decades > 0.6 else (1, 2, 3, 5, 7)
    panel.xaxis.set_major_locator(LogLocator(subs=digits, numticks=5))
    panel.xaxis.set_minor_formatter(lambda value, _: "")

    def text(value: float, _: Any) -> str:
        if 1e-2 <= value < 1e4:
            return f"{value:g}"
        digit, power = f"{value:.0e}".split("e")
        return f"$10^{{{int(power)}}}$" if digit == "1" else f"${digit}{{\\cdot}}10^{{{int(power)}}}$"

    panel.xaxis.set_major_formatter(text)


def cost(table: pd.DataFrame) -> Figure:
    """What each search cost: images processed, floating-point operations, seconds; logarithmic axes.

    Images: a full mark for decoded ones, an open one for as stored. Seconds: a full mark for the search, an open one with making
    the set and the networks that this rests on. Means over initialisations. table: of :func:`dpkit.report.ledger.ledger`.
    """
    table = table[~table["arm"].map(is_control).astype(bool)]
    if not len(table):
        return nothing("no search is whole yet")
    groups = families(table["arm"])
    places = _places(groups)
    stats = table.groupby("arm")[["points", "stored_points", "flops", "seconds", "seconds_with_set"]].mean()
    stats[["seconds", "seconds_with_set"]] = stats[["seconds", "seconds_with_set"]].clip(lower=LEAST)
    figure, axes = new(7.6, 0.25 * (max(places.values()) + 1.7) + 1.2, columns=3, sharey=True, squeeze=False)
    columns = (("points", "stored_points", "images processed"), ("flops", None, "operations (FLOP)"),
               ("seconds", "seconds_with_set", "seconds"))
    for panel, (column, second, label) in zip(axes[0], columns, strict=True):
        for name, y in places.items():
            first, other = stats.at[name, column], stats.at[name, second] if second else float("nan")
            if np.isfinite(other) and other != first:
                panel.plot([first, other], [y, y], color=colour(name), lw=1.2)
                panel.plot(other, y, "o", color="white", markeredgecolor=colour(name), markeredgewidth=1.4, markersize=6)
            panel.plot(first, y, "o", color=colour(name), markeredgecolor="#222222", markeredgewidth=0.5, markersize=6)
        panel.set(xscale="log", xlabel=label)
        _readable(panel)
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
        panel.margins(x=0.12)
    _rows(axes[0], places, groups)
    for full, text in (("#777777", "decoded images; the search alone"), ("white", "images as stored; with making the set")):
        axes[0][0].plot([], [], "o", color=full, markeredgecolor="#555555", label=text)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def paths_by_family(table: pd.DataFrame) -> Figure:
    """Error along the line between children: up to six arms in one row of panels, else a row of panels a family.

    A panel for each sparsity: thin lines are pairs, thick ones their mean. Every row has IMP as a thin line and the dense network
    dashed. table: columns arm, percent, seed, pair, alphas, errors (a fraction).
    """
    if not len(table):
        return nothing()
    groups = families(table["arm"])
    if sum(map(len, groups.values())) <= FEW:
        return paths(table, look(dict.fromkeys(table["arm"])))
    groups = {word: [name for name in names if name != "imp"] for word, names in groups.items()}
    groups = {word: names for word, names in groups.items() if names}
    levels = sorted({p for p in table["percent"] if p})
    sizes = [max(1.7, 0.17 * len(names) + 0.4) for names in groups.values()]
    figure, axes = new(3.2 + 1.9 * len(levels), sum(sizes) + 0.3 * len(sizes) + 0.6, columns=len(levels), rows=len(groups),
                       sharex=True, sharey=True, squeeze=False, gridspec_kw={"height_ratios": sizes})
    means = {place: mean_line(lines) for place, lines in table.groupby(["arm", "percent"])}
    for row, (word, names) in zip(axes, groups.items(), strict=True):
        for panel, percent in zip(row, levels, strict=True):
            for reference, level, dashes in (("dense", 0, "--"), ("imp", percent, "-")):
                if (reference, level) in means:
                    mean = means[reference, level]
                    panel.plot(mean.index, 100 * mean, color=colour(reference), lw=0.9, ls=dashes, label=title(reference))
            for name, style in look(names).items():
                lines = table[(table["arm"] == name) & (table["percent"] == percent)]
                for _, pair in lines.groupby(["seed", "pair"]):
                    panel.plot(pair["alphas"], 100 * pair["errors"], color=style["color"], lw=0.5, alpha=0.35)
                if len(lines):
                    mean = means[name, percent]
                    panel.plot(mean.index, 100 * mean, color=style["color"], ls=style["linestyle"], lw=1.7, label=title(name))
        row[0].set_title(word, fontsize=10, loc="left")
        handles = {text: h for panel in row for h, text in zip(*panel.get_legend_handles_labels(), strict=True)}
        row[-1].legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.05), fontsize=8, frameon=False,
                       handlelength=3)
    for panel, percent in zip(axes[0], levels, strict=True):
        panel.set_title(f"{percent}% sparse", fontsize=10, loc="right")
    for panel in axes[-1]:
        panel.set_xlabel("position α on the line")
    figure.supylabel("test error (%)", fontsize=10)
    return figure
