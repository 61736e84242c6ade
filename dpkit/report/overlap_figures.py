"""Figures of masks: who agrees with whom, where the weights are, which of them do anything, and when the mask is settled."""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure

from dpkit.report.arm_figures import FEW, families, look
from dpkit.report.arms import averages, ordered
from dpkit.report.figures import colour, new, nothing, title, whiskers
from dpkit.report.overlap import ALL, with_arm

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
            axes.text(j, i - 1, f"{values[i, j]:.0f}".replace("-", "−"), ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")
    axes.set_xticks(range(len(names) - 1), [title(n) for n in names[:-1]], rotation=55, ha="right", rotation_mode="anchor",
                    fontsize=8.5)
    axes.set_yticks(range(len(names) - 1), [title(n) for n in names[1:]], fontsize=8.5)
    axes.grid(False)
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    inset = axes.inset_axes([0.62, 0.9, 0.36, 0.035]) if len(names) > 4 else None  # the empty half of the matrix
    bar = figure.colorbar(shown, ax=None if inset is not None else axes, cax=inset, orientation="horizontal", shrink=0.6)
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
        whiskers(axes, [100 * row["mean"]], [y], [100 * row["low"]], [100 * row["high"]], horizontal=True, colour="#444444", width=1)
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
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return figure


def densities(table: pd.DataFrame) -> Figure:
    """Kept weights of each layer in percent: a line an arm with 95% intervals, a panel a family, IMP thin in every panel.

    table: of :func:`dpkit.report.overlap.layers`, rows of one sparsity.
    """
    table = table[table["layer"] != ALL] if len(table) else table
    layers = list(dict.fromkeys(table["layer"])) if len(table) else []
    return _panels(table, "density", "kept weights (%)", x={name: i for i, name in enumerate(layers)}, place="layer")


def work(table: pd.DataFrame) -> Figure:
    """Multiply-adds that the kept weights do, in percent of the dense network's, against sparsity; the dashed line is where every
    layer would keep as large a part of its weights.

    table: of :func:`dpkit.report.overlap.layers`; rows of the whole mask are used.
    """
    table = table[table["layer"] == ALL] if len(table) else table
    levels = sorted(set(table["percent"])) if len(table) else []
    return _panels(table, "flops_kept", "multiply-adds kept (%)", x={p: float(p) for p in levels}, place="percent", diagonal=True)


def _panels(table: pd.DataFrame, column: str, label: str, *, x: dict, place: str, diagonal: bool = False) -> Figure:
    """``column`` in percent over the places ``x`` (value of the column ``place`` to position), a panel a family of arms."""
    stats = averages(table, ["arm", place], column)
    if not len(stats):
        return nothing()
    groups = families(stats["arm"])
    if sum(map(len, groups.values())) <= FEW:
        groups = {"": [name for names in groups.values() for name in names]}
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    heights = [2.4 + 0.19 * max(len(n) for n in [*groups.values()][columns * r:columns * r + columns]) for r in range(rows)]
    figure, axes = new(7.6 if columns > 1 else 6.4, sum(heights) + 0.3, columns=columns, rows=rows, sharex=True, sharey=True,
                       squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, (word, names) in zip(axes.flat, groups.items(), strict=False):
        if "imp" in set(stats["arm"]) and "imp" not in names:
            part = stats[stats["arm"] == "imp"]
            panel.plot(part[place].map(x), 100 * part["mean"], color=colour("imp"), lw=0.9, label=title("imp"))
        if diagonal:
            panel.plot(list(x.values()), [100 - v for v in x.values()], color="#777777", lw=0.9, ls="--",
                       label="every layer alike")
        for i, (arm, style) in enumerate(look(names).items()):
            part = stats[stats["arm"] == arm]
            at = part[place].map(x) + (i - (len(names) - 1) / 2) * (0.03 if place == "layer" else 0.4)
            whiskers(panel, at, 100 * part["mean"], 100 * part["low"], 100 * part["high"], colour=style["color"], width=0.8)
            panel.plot(at, 100 * part["mean"], markersize=4.5, lw=1.3, label=f"{title(arm)} (n = {part['n'].min()})", **style)
        panel.set_title(word, fontsize=10)
        panel.tick_params(labelbottom=True)
        below = -0.42 if place == "layer" else -0.24
        panel.legend(loc="upper left", bbox_to_anchor=(-0.02, below), fontsize=8, handlelength=3)
    for panel in list(axes.flat)[len(groups):]:
        panel.axis("off")
    for row in axes:
        row[0].set_ylabel(label)
    if place == "layer":
        for panel in axes.flat:
            panel.set_xticks(list(x.values()), [name.removesuffix(".weight") for name in x], rotation=45, ha="right",
                             rotation_mode="anchor", fontsize=8)
    else:
        axes[0][0].set_xticks(list(x.values()), [f"{v:g}" for v in x.values()])
        for panel in list(axes.flat)[:len(groups)]:
            panel.set_xlabel("sparsity (% of weights removed)", fontsize=9)
    axes[0][0].set_ylim(bottom=0)
    return figure


def unique(table: pd.DataFrame) -> Figure:
    """Weights that no other arm keeps, in percent of an arm's own: a bar an arm, initialisations as dots, 95% intervals.

    table: of :func:`dpkit.report.overlap.layers`, rows of one sparsity; those of the whole mask are used.
    """
    table = table[table["layer"] == ALL] if len(table) else table
    stats = averages(table, ["arm"], "unique_share").set_index("arm")
    if not len(stats):
        return nothing()
    names = [name for names in families(stats.index).values() for name in names]
    stats = stats.loc[names]
    figure, axes = new(7, 0.28 * len(names) + 1.0)
    places = np.arange(len(names))
    axes.barh(places, 100 * stats["mean"], color=[colour(n) for n in names], height=0.7, edgecolor="#444444", linewidth=0.5)
    for width, tint in ((2.6, "white"), (1.0, "#222222")):  # a light rim, to be seen on dark bars
        whiskers(axes, 100 * stats["mean"], places, 100 * stats["low"].clip(0), 100 * stats["high"].clip(upper=1), horizontal=True,
                 colour=tint, width=width)
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


def effective(table: pd.DataFrame) -> Figure:
    """Nominal against effective sparsity: what is kept, and what of it lies on a path from input to output.

    Left: both in percent of all weights on logarithmic axes; on the dashed line they are equal. Right: kept weights on no path,
    in percent of the kept ones, against sparsity. table: of ``layers``; rows of the whole mask are used.
    """
    table = table[table["layer"] == ALL] if len(table) else table
    stats = averages(table.assign(left=1 - table["effective_sparsity"]), ["arm", "percent"], "left") if len(table) else table
    if not len(stats):
        return nothing()
    dead, kept = (averages(table, ["arm", "percent"], name) for name in ("dead_share", "density"))
    names = [name for names in families(stats["arm"]).values() for name in names]
    figure, axes = new(7.6, 3.4 + 0.16 * (-(-len(names) // 2)), columns=2)
    ends = [100 * stats["mean"].min() / 1.2, 100 * kept["mean"].max() * 1.2]
    axes[0].plot(ends, ends, color="#777777", lw=0.9, ls="--")
    for arm, style in look(names).items():
        left, lost, all_kept = (part[part["arm"] == arm].sort_values("percent") for part in (stats, dead, kept))
        axes[0].plot(100 * all_kept["mean"], 100 * left["mean"], markersize=4.5, lw=1.1, **style)
        axes[1].plot(lost["percent"], 100 * lost["mean"], markersize=4.5, lw=1.3, label=title(arm), **style)
        whiskers(axes[1], lost["percent"], 100 * lost["mean"], 100 * lost["low"].clip(0), 100 * lost["high"].clip(upper=1),
                 colour=style["color"], width=0.8)
    axes[0].set(xscale="log", yscale="log", xlabel="kept weights (% of all)", ylabel="kept weights on a path (% of all)")
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes[0].tick_params(which="both", labelsize=8)
    axes[0].invert_xaxis()
    axes[0].invert_yaxis()
    axes[1].set(xlabel="sparsity (% of weights removed)", ylabel="kept weights on no path (% of kept)")
    axes[1].set_ylim(bottom=0)
    axes[1].set_xticks(sorted({int(p) for p in stats["percent"]}))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
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
    figure, axes = new(1.0 + 3.1 * len(sources), 3.5, columns=len(sources), squeeze=False)
    scale = Normalize(0, 100 * stats["mean"].max() or 1.0)
    for panel, source in zip(axes[0], sources, strict=True):
        grid = stats[stats["source"] == source].pivot(index="step_a", columns="step_b", values="mean")
        shown = panel.imshow(100 * grid.to_numpy(), cmap="viridis", norm=scale, origin="lower")
        share = 100 * grid.columns.to_numpy() / grid.columns.max()
        few = np.unique(np.linspace(0, len(share) - 1, min(6, len(share))).round().astype(int))
        panel.set_xticks(few, [f"{share[i]:.0f}" for i in few])
        panel.set_yticks(few, [f"{share[i]:.0f}" for i in few])
        seeds = table[table["source"] == source]["seed"].nunique()
        name = "all real data" if source == "real" else title(source)
        panel.set(title=f"{name}, {grid.columns.max():,} steps (n = {seeds})", xlabel="training done (%)")
        panel.title.set_fontsize(10)
        panel.grid(False)
    axes[0][0].set_ylabel("training done (%)")
    figure.colorbar(shown, ax=axes[0].tolist(), label="weights that differ (%)", shrink=0.8)
    return figure


def ordered_sources(names: pd.Series) -> list[str]:
    """Real data first, then small sets."""
    return sorted(dict.fromkeys(names), key=lambda name: (name != "real", name))
