"""Figures of masks: who agrees with whom, where the weights are, which of them do anything, and when the mask is settled."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure

from dpkit.report.arm_figures import FEW, families, heights, legend, line, look, stacked
from dpkit.report.arms import averages, ordered
from dpkit.report.figures import colour, new, nothing, title, whiskers
from dpkit.report.overlap import ALL, with_arm

SPARSITY = "sparsity (% of weights removed)"
WRITTEN = 14  # so many arms leave room for a number in each cell


def agreement(table: pd.DataFrame, column: str = "excess", label: str = "overlap above chance (%)") -> Figure:
    """A matrix of arms: ``column`` of each pair in percent, means over initialisations, white at zero.

    table: of :func:`dpkit.report.overlap.overlaps`, rows of one sparsity and one layer.
    """
    stats = averages(table, ["arm_a", "arm_b"], column)
    if not len(stats):
        return nothing("fewer than two masks to compare")
    names = ordered([*stats["arm_a"], *stats["arm_b"]])
    values = np.full((len(names), len(names)), np.nan)
    for _, row in stats.iterrows():
        i, j = sorted((names.index(row["arm_a"]), names.index(row["arm_b"])))
        values[j, i] = 100 * row["mean"]
    side = 0.44 if len(names) <= WRITTEN else 0.29
    figure, axes = new(min(8.6, 2.9 + side * len(names)), 1.7 + side * len(names))
    shown = axes.imshow(values[1:, :-1], cmap="RdBu", norm=CenteredNorm(0, max(5.0, np.nanmax(np.abs(values)))))
    if len(names) <= WRITTEN:
        for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
            dark = abs(values[i, j]) > 0.6 * shown.norm.halfrange
            axes.text(j, i - 1, str(round(values[i, j])).replace("-", "−"), ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")
    axes.set_xticks(range(len(names) - 1), [title(n) for n in names[:-1]], rotation=55, ha="right", rotation_mode="anchor",
                    fontsize=8.5)
    axes.set_yticks(range(len(names) - 1), [title(n) for n in names[1:]], fontsize=8.5)
    axes.grid(False)
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    if len(names) > FEW:  # the empty half of the matrix has room
        bar = figure.colorbar(shown, cax=axes.inset_axes([0.62, 0.9, 0.36, 0.035]), orientation="horizontal")
    else:
        bar = figure.colorbar(shown, ax=axes, shrink=0.9)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def against_chance(table: pd.DataFrame, arm: str = "imp") -> Figure:
    """Overlap of each arm's mask with that of ``arm``, beside two chance levels: a row an arm, whole masks.

    The dot is the Jaccard index with its 95% interval, the light tick what random masks of the same size would have, the dark
    tick what masks would have whose layers keep as many weights and are random inside: between the two lies what the densities
    of the layers explain, beyond the dark one what they do not. table: of ``overlaps``, rows of one sparsity.
    """
    table = with_arm(table[table["layer"] == ALL], arm) if len(table) else table
    if not len(table):
        return nothing(f"no mask to compare with {title(arm)}")
    stats = {name: averages(table, ["arm"], name).set_index("arm") for name in ("jaccard", "jaccard_chance", "jaccard_within")}
    names = [name for names in families(stats["jaccard"].index).values() for name in names]
    figure, axes = new(7.2, 0.28 * len(names) + 1.4)
    for y, name in enumerate(names):
        row = stats["jaccard"].loc[name]
        levels = [100 * stats[level].loc[name, "mean"] for level in ("jaccard_chance", "jaccard_within")]
        axes.plot([*levels, 100 * row["mean"]], [y] * 3, color="#CCCCCC", lw=1.2, zorder=1)
        for level, tint in zip(levels, ("#AAAAAA", "#222222"), strict=True):
            axes.plot(level, y, "|", color=tint, markersize=11, markeredgewidth=2.2)
        whiskers(axes, [100 * row["mean"]], [y], [100 * max(0, row["low"])], [100 * min(1, row["high"])], horizontal=True,
                 colour="#444444", width=1)
        axes.plot(100 * row["mean"], y, "o", color=colour(name), markeredgecolor="#222222", markeredgewidth=0.5, markersize=6.5)
    for mark, tint, text in (("|", "#AAAAAA", "chance, as many weights"), ("|", "#222222", "chance, as many in each layer"),
                             ("o", "#777777", f"with {title(arm)}")):
        axes.plot([], [], mark, color=tint, markersize=8, markeredgewidth=2 if mark == "|" else 0.5, label=text)
    axes.set_yticks(range(len(names)), [f"{title(n)} (n = {stats['jaccard'].loc[n, 'n']})" for n in names], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("overlap: Jaccard index of the kept weights (%)")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


def densities(table: pd.DataFrame) -> Figure:
    """Kept weights of each layer in percent: a line an arm with 95% intervals, a panel a family, IMP thin in every panel.

    table: of :func:`dpkit.report.overlap.layers`, rows of one sparsity.
    """
    table = table[table["layer"] != ALL] if len(table) else table
    layers = list(dict.fromkeys(table["layer"])) if len(table) else []
    places = {name: i for i, name in enumerate(layers)}
    return _panels(table, "density", "kept weights of a layer (%)", "", x=places, place="layer")


def work(table: pd.DataFrame) -> Figure:
    """Multiply-adds that the kept weights do, in percent of the dense network's, against sparsity; the dashed line is where every
    layer would keep as large a part of its weights.

    table: of :func:`dpkit.report.overlap.layers`; rows of the whole mask are used.
    """
    levels = _levels(table)
    return _panels(_whole(table), "flops_kept", "multiply-adds kept (%)", SPARSITY, x=levels, place="percent",
                   rule=[100 - p for p in levels], rule_label="all layers alike")


def effective(table: pd.DataFrame) -> Figure:
    """Effective against nominal sparsity: a line an arm, a panel a family. On the dashed line every kept weight lies on a path
    from input to output; above it some do nothing, and at 100% the network is cut through.

    table: of :func:`dpkit.report.overlap.layers`; rows of the whole mask are used.
    """
    levels = _levels(table)
    return _panels(_whole(table), "effective_sparsity", "effective sparsity (%)", SPARSITY, x=levels, place="percent",
                   rule=list(levels.values()), rule_label="all weights on a path")


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["layer"] == ALL] if len(table) else table


def _levels(table: pd.DataFrame) -> dict:
    """The sparsities of a frame, as positions."""
    return {p: float(p) for p in sorted(set(table["percent"]))} if len(table) else {}


def _panels(table: pd.DataFrame, column: str, label: str, xlabel: str, *, x: dict, place: str, rule: Sequence[float] = (),
            rule_label: str = "") -> Figure:
    """``column`` in percent over the places ``x`` (value of the column ``place`` to position), a panel a family of arms, IMP thin
    in every panel; ``rule``: heights of a dashed line at these places."""
    stats = averages(table, ["arm", place], column) if len(table) else table
    if not len(stats):
        return nothing()
    groups = families(stats["arm"])
    if sum(map(len, groups.values())) <= FEW:
        groups = {"": [name for names in groups.values() for name in names]}
    figure, panels = stacked(groups, label, xlabel)
    sides = {arm: part.assign(x=part[place].map(x)).sort_values("x") for arm, part in stats.groupby("arm", sort=False)}
    for panel, names in zip(panels, groups.values(), strict=True):
        if len(rule):
            panel.plot(list(x.values()), rule, color="#777777", lw=0.9, ls="--", label=rule_label)
        if "imp" in sides and "imp" not in names:
            panel.plot(sides["imp"]["x"], 100 * sides["imp"]["mean"], color=colour("imp"), lw=0.9, label=title("imp"))
        shift = 0.03 if place == "layer" else 0.4
        for i, (arm, style) in enumerate(look(names).items()):
            line(panel, sides[arm]["x"] + (i - (len(names) - 1) / 2) * shift, sides[arm], arm, style)
        legend(panel)
    heights(panels[0], [*(100 * stats["mean"]), *rule])
    if place == "layer":
        panels[-1].set_xticks(list(x.values()), [name.removesuffix(".weight") for name in x], rotation=45, ha="right",
                              rotation_mode="anchor", fontsize=8)
    else:
        panels[0].set_xticks(list(x.values()), [f"{v:g}" for v in x.values()])
    return figure


def unique(table: pd.DataFrame) -> Figure:
    """Weights that no other arm keeps, in percent of an arm's own: a bar an arm, initialisations as dots, 95% intervals.

    table: of :func:`dpkit.report.overlap.layers`, rows of one sparsity; those of the whole mask are used.
    """
    table = _whole(table)
    stats = averages(table, ["arm"], "unique_share").set_index("arm")
    if not len(stats):
        return nothing()
    names = [name for names in families(stats.index).values() for name in names]
    stats = stats.loc[names]
    figure, axes = new(7, 0.28 * len(names) + 1.0)
    places = np.arange(len(names))
    axes.barh(places, 100 * stats["mean"], color=[colour(n) for n in names], height=0.7, edgecolor="#444444", linewidth=0.5)
    for width, tint in ((2.6, "white"), (1.0, "#222222")):  # a light rim, to be seen on dark bars
        whiskers(axes, 100 * stats["mean"], places, 100 * stats["low"].clip(0), 100 * stats["high"].clip(upper=1),
                 horizontal=True, colour=tint, width=width)
    for y, name in enumerate(names):
        values = 100 * table[table["arm"] == name].groupby("seed")["unique_share"].mean()
        axes.plot(values, np.full(len(values), y), "o", color="white", markeredgecolor="black", markersize=3.5, zorder=3)
    axes.set_yticks(places, [f"{title(n)} (n = {stats.loc[n, 'n']})" for n in names], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("weights that only this arm keeps (% of its own)")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


def early_bird(table: pd.DataFrame) -> Figure:
    """When a mask is settled: distances between the magnitude masks of one training, a panel a source, one colour scale.

    Both axes are the share of that source's own training; distances in percent of the weights, means over initialisations.
    table: of :func:`dpkit.report.overlap.early_bird`, rows of one sparsity.
    """
    stats = averages(table, ["source", "step_a", "step_b"], "distance") if len(table) else table
    if not len(stats):
        return nothing()
    sources = ordered_sources(stats["source"])
    columns = min(3, len(sources))
    rows = -(-len(sources) // columns)
    figure, axes = new(1.0 + 2.6 * columns, 3.1 * rows, columns=columns, rows=rows, squeeze=False)
    scale = Normalize(0, 100 * stats["mean"].max() or 1.0)
    for panel, source in zip(axes.flat, sources, strict=False):
        grid = stats[stats["source"] == source].pivot(index="step_a", columns="step_b", values="mean")
        shown = panel.imshow(100 * grid.to_numpy(), cmap="viridis", norm=scale, origin="lower")
        share = 100 * grid.columns.to_numpy() / max(1, grid.columns.max())
        few = np.unique(np.linspace(0, len(share) - 1, min(6, len(share))).round().astype(int))
        panel.set_xticks(few, [f"{share[i]:.0f}" for i in few])
        panel.set_yticks(few, [f"{share[i]:.0f}" for i in few])
        seeds = table[table["source"] == source]["seed"].nunique()
        steps = int(grid.columns.max())
        name = "all real data" if source == "real" else title(source)
        panel.set_title(f"{name}\n{steps:,} step{'s' * (steps != 1)} (n = {seeds})", fontsize=10)
        panel.grid(False)
    for panel in list(axes.flat)[len(sources):]:
        panel.axis("off")
    figure.supxlabel("training done (%)", fontsize=10)
    figure.supylabel("training done (%)", fontsize=10)
    figure.colorbar(shown, ax=axes.ravel().tolist(), label="weights that differ (%)", shrink=0.8)
    return figure


def ordered_sources(names: pd.Series) -> list[str]:
    """Real data first, then small sets."""
    return sorted(dict.fromkeys(names), key=lambda name: (name != "real", name))
