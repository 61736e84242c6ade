"""Figures of curvature at trained networks. Frames come from :mod:`dpkit.report.curvature`.

Axes are logarithmic, and where a measure may fall below 0 linear about it and logarithmic beyond.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import wrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from dpkit.report.arm_figures import FEW, families, legend, look
from dpkit.report.arms import family, ordered
from dpkit.report.curvature import Density, at_highest
from dpkit.report.figures import colour, new, nothing, title

GREY = "#999999"
PROTOCOLS = {"published_mean": ("published: train mode, one batch, removed entries as zeros",
                                {"marker": "s", "color": "#222222"}),
             "published_surviving": ("the same, surviving entries only", {"marker": "s", "color": "white",
                                                                          "markeredgecolor": "#222222"}),
             "trace_per_weight": ("corrected: eval mode, fixed images, surviving", {"marker": "D", "color": "#D55E00"})}


# --- axes -------------------------------------------------------------------------------------------------------------

def tick_text(value: float) -> str:
    """A tick's text: in full where that is short, else as a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")
    mantissa, power = f"{value:.0e}".split("e")
    lead = {"1": "", "-1": "−"}.get(mantissa, mantissa.replace("-", "−") + "·")
    return f"${lead}10^{{{int(power)}}}$"


def positive_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Two to about ``most`` round values in [low, high], both above 0, for a logarithmic axis."""
    reach = math.log10(high / low)
    if reach <= 0.8:
        return [v for v in MaxNLocator(3).tick_values(low, high) if low <= v <= high and v > 0]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if reach > 2.2:
        step = max(1, math.ceil(reach / most))
        return [10.0**k for k in range(first, last + 1) if k % step == 0 and low <= 10.0**k <= high]
    digits = (1, 3) if reach > 1.3 else (1, 2, 5)
    return [v for k in range(first, last + 1) for d in digits if low <= (v := d * 10.0**k) <= high]


def scale(panel, values: Iterable[float], axis: str = "x", linear: float | None = None) -> None:
    """A logarithmic axis for ``values``, or a symmetric one if some are not above 0; ``linear``: the latter's linear part."""
    found = np.array([v for v in values if np.isfinite(v)], dtype=float)
    if not len(found):
        return
    sizes = np.abs(found[found != 0])
    low, high = float(found.min()), float(found.max())
    if low > 0 and linear is None:
        low, high = low / 1.25, high * 1.25
        getattr(panel, f"set_{axis}scale")("log")
        ticks = positive_ticks(low, high)
    else:
        most = float(sizes.max()) if len(sizes) else 1.0
        linear = linear or 10.0 ** math.floor(math.log10(float(np.median(sizes)) if len(sizes) else 0.1))
        getattr(panel, f"set_{axis}scale")("symlog", linthresh=linear, linscale=0.5)
        up = [10.0**k for k in range(math.ceil(math.log10(linear)), math.floor(math.log10(most)) + 1)] or [most]
        up = up[::-1][::max(1, math.ceil(len(up) / 2))]
        low, high = min(1.6 * low, -0.3 * linear), max(1.6 * high, 0.3 * linear)
        ticks = sorted([0.0, *(v for v in up if v <= high), *(-v for v in up if -v >= low)])
    getattr(panel, f"set_{axis}lim")(low, high)
    getattr(panel, f"set_{axis}ticks")(ticks, [tick_text(v) for v in ticks], fontsize=8)
    getattr(panel, f"set_{axis}ticks")([], minor=True)


def rows_of(names: Iterable[str]) -> dict[str, float]:
    """The row of each arm, in their order, with a gap between families."""
    found: dict[str, float] = {}
    y, before = 0.0, None
    for name in ordered(names):
        group = "" if name == "dense" else family(name)
        y += 0.0 if before is None else 1.0 if group == before else 1.5
        found[name], before = y, group
    return found


def name_rows(axes: Sequence, places: Mapping[str, float], counts: Mapping[str, int]) -> None:
    """Names of arms at the first of some panels that share their rows, with the number of initialisations."""
    axes[0].set_yticks(list(places.values()), [f"{title(n)} (n = {counts.get(n, 0)})" for n in places], fontsize=8.5)
    axes[0].set_ylim(max(places.values()) + 0.7, -0.7)
    for panel in axes:
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
        for y, after in zip(list(places.values())[:-1], list(places.values())[1:], strict=True):
            if after - y > 1:
                panel.axhline((y + after) / 2, color="#CCCCCC", lw=0.8, zorder=0)


def centre(whole: Iterable[float]) -> Callable[[pd.Series], float]:
    """The mean to show on the axis of ``whole``: the geometric one, or, where a value on it is not above 0, the plain one."""
    positive = all(v > 0 for v in whole if np.isfinite(v))
    return lambda values: float(np.exp(np.log(values).mean())) if positive else float(values.mean())


# --- at trained networks ----------------------------------------------------------------------------------------------

def measures(table: pd.DataFrame, columns: Mapping[str, str]) -> Figure:
    """A panel for each measure (column -> label), a row an arm, of the dense network and the highest sparsity.

    Initialisations are dots, a bar their geometric mean, or their mean where some on the panel are not above 0. table: of
    :func:`dpkit.report.curvature.networks`.
    """
    columns = {c: label for c, label in columns.items() if c in table and table[c].notna().any()}
    if not columns:
        return nothing("no network has a result" if len(table) else "nothing measured yet")
    good = at_highest(table)
    good = good[good[list(columns)].notna().any(axis=1)]
    places = rows_of(good["arm"])
    wide = min(3, len(columns))
    rows = -(-len(columns) // wide)
    height = 0.21 * (max(places.values()) + 1.4) + 0.55
    figure, axes = new(2.6 + 2.0 * wide, rows * height + 0.2, columns=wide, rows=rows, sharey=True, squeeze=False)
    for panel, (column, label) in zip(axes.flat, columns.items(), strict=False):
        part = good[good[column].notna()]
        middle = centre(part[column])
        for arm, y in places.items():
            values = part[part["arm"] == arm].groupby("seed")[column].mean()
            if len(values):
                panel.plot(values, np.full(len(values), y), "o", color=colour(arm), alpha=0.45, markersize=4.5, markeredgewidth=0)
                panel.plot(middle(values), y, "|", color=colour(arm), markersize=12, markeredgewidth=2.5)
        scale(panel, part[column])
        panel.set_title(label, fontsize=9.5)
    for panel in list(axes.flat)[len(columns):]:
        panel.axis("off")
    for row in range(rows):
        name_rows(axes[row][:len(columns) - row * wide], places, good.groupby("arm")["seed"].nunique())
    return figure


def protocols(table: pd.DataFrame) -> Figure:
    """Mean of the Hessian's diagonal by the published protocol, by the same on surviving entries, and corrected: a row an arm, a
    mark each, dots for initialisations. table: of ``networks``."""
    if not len(table) or table[list(PROTOCOLS)].isna().all(axis=None):
        return nothing("no network has a result" if len(table) else "nothing measured yet")
    if table["published_mean"].isna().all():
        return nothing("the published protocol was not measured")
    good = at_highest(table[table["published_mean"].notna()])
    places = rows_of(good["arm"])
    figure, axes = new(7.4, 0.3 * (max(places.values()) + 1.4) + 1.2)
    middle = centre(good[list(PROTOCOLS)].to_numpy().ravel())
    for i, (column, (_, style)) in enumerate(PROTOCOLS.items()):
        for arm, y in places.items():
            values = good[(good["arm"] == arm) & good[column].notna()].groupby("seed")[column].mean()
            at = y + (i - 1) * 0.24
            axes.plot(values, np.full(len(values), at), ".", color=GREY, markersize=4)
            if len(values):
                axes.plot(middle(values), at, ls="", markersize=5.5, zorder=3, **style)
    scale(axes, good[list(PROTOCOLS)].to_numpy().ravel())
    name_rows([axes], places, good.groupby("arm")["seed"].nunique())
    axes.set_xlabel("mean of the Hessian's diagonal")
    handles = [Line2D([], [], ls="", markersize=6, label=label, **style) for label, style in PROTOCOLS.values()]
    figure.legend(handles=handles, loc="outside upper center", fontsize=8.5, frameon=False)
    return figure


def against_sparsity(table: pd.DataFrame, column: str, label: str) -> Figure:
    """A measure against sparsity: a line an arm through geometric means, dots for initialisations, the dense network dashed; up
    to six arms in one panel, else a panel a family. table: of ``networks``."""
    good = table[table[column].notna()] if len(table) else table
    if not len(good):
        return nothing("no network has a result" if len(table) else "nothing measured yet")
    groups, middle = in_groups(good["arm"]), centre(good[column])
    figure, axes = new(7.4, sum(heights(groups)) + 0.6, rows=len(groups), sharex=True, sharey=True, squeeze=False,
                       gridspec_kw={"height_ratios": heights(groups)})
    for (panel,), (word, names) in zip(axes, groups.items(), strict=True):
        dense = good[good["arm"] == "dense"].groupby("seed")[column].mean()
        if len(dense):
            panel.axhline(middle(dense), color="black", lw=1.1, ls="--", label=f"dense (n = {len(dense)})")
        for i, (name, style) in enumerate(look(names).items()):
            part = good[good["arm"] == name].groupby(["percent", "seed"])[column].mean()
            means = part.groupby("percent").apply(middle)
            shift = (i - (len(names) - 1) / 2) * 0.4
            panel.plot(part.index.get_level_values("percent") + shift, part, ".", color=style["color"], alpha=0.5, markersize=4)
            seeds = part.groupby("percent").size().min()
            panel.plot(means.index + shift, means, markersize=4.5, lw=1.4, label=f"{title(name)} (n = {seeds})", **style)
        panel.set_title(word, fontsize=10, loc="left")
        legend(panel)
    scale(axes[0][0], good[column], "y")
    levels = sorted({int(p) for p in good["percent"] if p}) or [0]
    axes[-1][0].set_xlim(levels[0] - 4, levels[-1] + 4)
    axes[-1][0].set_xticks(levels)
    figure.supxlabel("sparsity (% of weights removed)", fontsize=10)
    figure.supylabel(label, fontsize=10)
    return figure


def in_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Families of arms, or all in one group without a name where there are few."""
    groups = families(names) or {"": []}
    few = sum(map(len, groups.values())) <= FEW
    return {"": [name for part in groups.values() for name in part]} if few else groups


def heights(groups: Mapping[str, Sequence[str]]) -> list[float]:
    """Inches of a panel for each group, with room for its legend."""
    return [max(3.3 if len(groups) == 1 else 1.8, 0.17 * (len(names) + 1) + 0.4) for names in groups.values()]


def densities(entries: Sequence[Density]) -> Figure:
    """Eigenvalues per unit of eigenvalue, a panel an arm at its highest sparsity: thin lines are initialisations, the thick one
    their mean; short strokes on the axis are the largest eigenvalues, those that converged. The dense network's mean is grey in
    all panels.

    A density times the number of eigenvalues, so that one outlier is equally high in a dense and in a sparse network, whose
    shares of it differ. The eigenvalue's axis is linear about 0, and the other one is logarithmic down to a tenth of what a
    single eigenvalue gives.
    """
    if not entries:
        return nothing()
    most = max(entry.percent for entry in entries)
    shown = [entry for entry in entries if entry.arm == "dense" or entry.percent == most]
    names = list(dict.fromkeys(entry.arm for entry in shown))
    parts = {name: [entry for entry in shown if entry.arm == name] for name in names}
    edges = [np.abs(entry.grid).max() for entry in shown]
    unit = float(np.median(edges)) / 1000
    ends = [min(float(entry.grid.min()) for entry in shown), max(float(entry.grid.max()) for entry in shown)]
    common = unit * np.sinh(np.linspace(np.arcsinh(ends[0] / unit), np.arcsinh(ends[1] / unit), 500))
    means = {name: np.mean([np.interp(common, e.grid, e.size * e.curve, left=0, right=0) for e in part], axis=0)
             for name, part in parts.items()}
    floor = min(0.1 / np.abs(entry.grid).max() for entry in shown)
    top = 3 * max(float(entry.size * entry.curve.max()) for entry in shown)
    columns = min(3 if len(names) <= 9 else 4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new(max(4.2, 2.75 * columns + 0.4) if columns < 4 else 9.6, 1.95 * rows + 0.6, columns=columns, rows=rows,
                       sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(axes.flat, names, strict=False):
        if name != "dense" and "dense" in means:
            panel.plot(common, _visible(means["dense"], floor), color=GREY, lw=1.1)
        for entry in parts[name]:
            panel.plot(entry.grid, _visible(entry.size * entry.curve, floor), color=colour(name), lw=0.6, alpha=0.5)
            panel.plot(entry.eigenvalues, np.full(len(entry.eigenvalues), 0.02), "|", color=colour(name), markersize=6, alpha=0.8,
                       markeredgewidth=0.9, transform=blended_transform_factory(panel.transData, panel.transAxes))
        panel.plot(common, _visible(means[name], floor), color=colour(name), lw=1.7)
        panel.set_title("\n".join(wrap(f"{title(name)} (n\u00a0=\u00a0{len(parts[name])})", 34)), loc="left",
                        fontsize=8.5 if columns < 4 else 7.5)
        panel.axvline(0, color="#444444", lw=0.7, zorder=0.5)
    for panel in list(axes.flat)[len(names):]:
        panel.axis("off")
    scale(axes[0][0], ends, "x", linear=10.0 ** math.ceil(math.log10(unit)))
    axes[0][0].set_yscale("log")
    ticks = positive_ticks(floor, top)
    axes[0][0].set_yticks(ticks, [tick_text(v) for v in ticks], fontsize=8)
    axes[0][0].set_yticks([], minor=True)
    axes[0][0].set_ylim(floor, top)
    for panel in axes.flat[max(0, len(names) - columns):len(names)]:  # the last one of each column
        panel.tick_params(axis="x", labelbottom=True, labelsize=8)
    figure.supxlabel("eigenvalue of the Hessian" + ("; grey: dense" if "dense" in means and len(names) > 1 else ""), fontsize=10)
    figure.supylabel("eigenvalues per unit", fontsize=10)
    return figure


def _visible(curve: np.ndarray, floor: float) -> np.ndarray:
    return np.where(curve > 0.01 * floor, curve, np.nan)


def diagonals(values: Mapping[str, np.ndarray], label: str = "share of surviving weights") -> Figure:
    """Distribution of the Hessian's diagonal over its entries by arm, on a symmetric logarithmic scale: up to six arms in one
    panel, else a panel a family with the dense network in each. values: arm -> entries."""
    values = {arm: v[np.isfinite(v)] for arm, v in values.items()}
    values = {arm: v for arm, v in values.items() if len(v)}
    if not values:
        return nothing()
    unit = max(1e-6, min(float(np.quantile(np.abs(v), 0.5)) for v in values.values()))
    most = max(unit, *(float(np.abs(v).max()) for v in values.values()))
    bins = unit * np.sinh(np.linspace(*np.arcsinh(np.array([-most, most]) / unit), 81))
    bins[[0, -1]] = -most, most  # rounding must not lose the largest entry
    groups = in_groups(values)
    figure, axes = new(7.6, sum(heights(groups)) + 0.6, rows=len(groups), sharex=True, sharey=True, squeeze=False,
                       gridspec_kw={"height_ratios": heights(groups)})
    for (panel,), (word, names) in zip(axes, groups.items(), strict=True):
        styles = {"dense": {"color": "black", "linestyle": "-"}} if "dense" in values else {}
        for arm, style in {**styles, **look(names)}.items():
            panel.stairs(np.histogram(values[arm], bins=bins)[0] / len(values[arm]), bins, color=style["color"], lw=1.4,
                         ls=style["linestyle"], label=title(arm))
        panel.set_title(word, fontsize=10, loc="left")
        legend(panel)
    scale(axes[0][0], [-most, most], linear=unit)
    figure.supxlabel("diagonal entry of the Hessian", fontsize=10)
    figure.supylabel(label, fontsize=10)
    return figure
