"""Figures and tables that compare small sets: how good they are, on which networks, with which labels, and what they cost."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dpkit.report.figures import MARKERS, colour, new, nothing, title, whiskers
from dpkit.report.format import estimate_text, value_text
from dpkit.report.frames import GROUPS, group, summary

SOFT = "_soft"
LEAST = 0.01  # seconds: the least that the logarithmic axis shows


def _size(name: str) -> float:
    return 13 if MARKERS.get(name.removesuffix(SOFT)) == "*" else 8.5  # a star covers less than its size


def ranked(table: pd.DataFrame, by: str = "set", column: str = "accuracy") -> pd.DataFrame:
    """:func:`summary` by set, the best of each of :data:`GROUPS` first. Columns: set, mean, low, high, n, group."""
    stats = summary(table, [by], column)
    stats = stats.assign(group=[group(name) for name in stats[by]], order=[[*GROUPS].index(group(name)) for name in stats[by]])
    stats = stats.sort_values(["order", "mean"], ascending=[True, False], kind="stable")
    return stats.drop(columns="order").reset_index(drop=True)


def accuracies(table: pd.DataFrame, label: str = "test accuracy (%)", *, chance: float | None = None) -> Figure:
    """A horizontal bar a set, in groups, the best of each first; seeds are dots, whiskers 95% intervals.

    table: columns set, seed, accuracy, failed. chance: accuracy of guessing, a dotted line.
    """
    if not len(table):
        return nothing()
    stats = ranked(table)
    if not len(stats):
        return nothing("no network has a result")
    words = list(dict.fromkeys(stats["group"]))
    places = np.arange(len(stats)) + 0.75 * np.array([words.index(word) for word in stats["group"]])
    figure, axes = new(7, 0.36 * (places[-1] + 1) + 1.1)
    axes.barh(places, 100 * stats["mean"], color=[colour(n) for n in stats["set"]], height=0.72,
              edgecolor="#444444", linewidth=0.5)
    for width, tint in ((3, "white"), (1.2, "#222222")):  # a light rim, to be seen on dark bars
        whiskers(axes, 100 * stats["mean"], places, 100 * stats["low"], 100 * stats["high"], horizontal=True, colour=tint,
                 width=width)
    good = table[table["failed"].isna()]
    for y, name in zip(places, stats["set"], strict=True):
        values = 100 * good[good["set"] == name].groupby("seed")["accuracy"].mean()
        axes.plot(values, np.full(len(values), y), "o", color="white", markeredgecolor="black", markersize=3.5, zorder=3)
    for word in words:
        y = places[stats["group"].tolist().index(word)]
        if word == title(stats["set"][stats["group"].tolist().index(word)]):
            continue  # all data are a group of one
        axes.annotate(word, (0, y - 0.56), xytext=(-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8,
                      fontstyle="italic", color="#555555")
    axes.set_yticks(places, [f"{title(n)} (n = {k})" for n, k in zip(stats["set"], stats["n"], strict=True)])
    if chance is not None:
        axes.axvline(100 * chance, color="#555555", lw=1, ls=":")
        axes.annotate("chance", (100 * chance, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), va="top",
                      textcoords="offset points", fontsize=8, color="#555555")
    axes.set_ylim(places[-1] + 0.6, -0.95)
    axes.set_xlim(0, min(100.0, 104 * stats["high"].max()) or 1.0)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


def labels(table: pd.DataFrame, label: str = "test accuracy (%)") -> Figure:
    """Hard against soft labels: a row a set, an open mark for its hard labels, a full one for the teacher's.

    table: columns set, seed, accuracy, failed; only sets that are there in both forms are drawn.
    """
    stats = summary(table, ["set"], "accuracy").set_index("set") if len(table) else pd.DataFrame()
    both = [name for name in stats.index if name + SOFT in stats.index]
    if not both:
        return nothing("no set was measured with both kinds of labels")
    both.sort(key=lambda name: -stats.loc[name + SOFT, "mean"])
    figure, axes = new(7, 0.42 * len(both) + 1.3)
    for y, name in enumerate(both):
        for row, shift, fill in ((stats.loc[name], 0.12, "white"), (stats.loc[name + SOFT], -0.12, colour(name))):
            whiskers(axes, [100 * row["mean"]], [y + shift], [100 * row["low"]], [100 * row["high"]], horizontal=True,
                     colour="#222222")
            axes.plot(100 * row["mean"], y + shift, "o", color=fill, markeredgecolor="#222222", markersize=8, zorder=3)
    axes.plot([], [], "o", color="white", markeredgecolor="#222222", markersize=8, label="hard labels")
    axes.plot([], [], "o", color="#666666", markeredgecolor="#222222", markersize=8, label="the teacher's labels")
    axes.set_yticks(range(len(both)), [f"{title(n)} (n = {stats.loc[n, 'n']})" for n in both])
    axes.set_ylim(len(both) - 0.4, -0.6)
    axes.set_xlabel(label)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def architectures(table: pd.DataFrame, label: str = "test accuracy (%)") -> Figure:
    """The same sets on several architectures: a panel each, rows in the order of the first; all data as a dashed line.

    table: columns set, arch, seed, accuracy, failed.
    """
    if not len(table):
        return nothing("no other architecture was asked for")
    parts = {arch: ranked(part) for arch, part in table.groupby("arch", sort=False)}
    parts = {arch: part for arch, part in parts.items() if len(part)}
    if not parts:
        return nothing("no network has a result")
    order = [name for name in dict.fromkeys(n for part in parts.values() for n in part["set"]) if name != "all_data"]
    figure, axes = new(7.2, 0.3 * len(order) + 1.4, columns=len(parts), sharex=True, sharey=True, squeeze=False)
    for panel, (arch, part) in zip(axes[0], parts.items(), strict=True):
        stats = part.set_index("set")
        for y, name in enumerate(order):
            if name in stats.index:
                row = stats.loc[name]
                whiskers(panel, [100 * row["mean"]], [y], [100 * row["low"]], [100 * row["high"]], horizontal=True,
                         colour="#222222")
                panel.plot(100 * row["mean"], y, MARKERS.get(name.removesuffix(SOFT), "o"), color=colour(name),
                           markeredgecolor="#222222", markeredgewidth=0.6, markersize=_size(name), zorder=3)
        if "all_data" in stats.index:
            value = 100 * stats.loc["all_data", "mean"]
            panel.axvline(value, color="black", lw=1.2, ls="--", label="all data")
        panel.set(title=arch, xlabel=label)
        panel.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(order)), [title(n) for n in order])
    axes[0][0].set_ylim(len(order) - 0.4, -0.6)
    axes[0][0].set_xlim(left=0)
    handles = {text: line for panel in axes[0] for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", fontsize=9, frameon=False)
    return figure


def price(table: pd.DataFrame, label: str = "test accuracy (%)") -> Figure:
    """Accuracy against seconds on a logarithmic axis: a mark at what making the set took, a line on to what it took with the
    networks that it rests on. All data: what training the network itself took.

    table: a row a set; columns set, mean, low, high (fractions), own_seconds, network_seconds.
    """
    if not len(table):
        return nothing()
    figure, axes = new(7.4, 4.2)
    for _, row in table.iterrows():
        name, y = row["set"], 100 * row["mean"]
        start, end = max(LEAST, row["own_seconds"]), max(LEAST, row["own_seconds"] + row["network_seconds"])
        whiskers(axes, [start], [y], [100 * row["low"]], [100 * row["high"]], colour="#888888")
        if row["network_seconds"] > 0:
            axes.plot([start, end], [y, y], color=colour(name), lw=1.6)
            axes.plot(end, y, "|", color="#222222", markersize=9)
        axes.plot(start, y, MARKERS.get(name.removesuffix(SOFT), "o"), color=colour(name), markeredgecolor="#222222",
                  markeredgewidth=0.6, markersize=_size(name), ls="", label=title(name), zorder=3)
    axes.set(xscale="log", ylabel=label,
             xlabel="seconds: of the set itself (mark), and with the networks that it needs (end of the line)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    return figure


def progress(table: pd.DataFrame, columns: int = 4) -> Figure:
    """Each method's own loss, over its first value, against the share of its steps: a panel a method, all with the same axes.

    table: of :func:`dpkit.report.histories`; a set that was made several times has as many lines.
    """
    if not len(table):
        return nothing("no method kept a history")
    names = list(dict.fromkeys(table["set"]))
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new(7.4, 1.75 * rows + 0.3, columns=columns, rows=rows, sharex=True, sharey=True, squeeze=False)
    for place, panel in enumerate(axes.flat):
        if place >= len(names):
            panel.axis("off")
            axes.flat[place - columns].tick_params(labelbottom=True)
            continue
        lines = table[table["set"] == names[place]]
        for _, line in lines.groupby("seed", sort=False):
            panel.plot(100 * line["share"], line["loss"], color="#555555", lw=2.4)  # a rim, so that yellow is seen in print
            panel.plot(100 * line["share"], line["loss"], color=colour(names[place]), lw=1.6, marker="o", markersize=2.5)
        panel.axhline(1, color="#777777", lw=0.8, ls=":")
        panel.set_title(title(names[place]), fontsize=9)
        panel.tick_params(labelsize=8)
    axes[0][0].set(yscale="log", xlim=(0, 102))
    for axis in (axes[0][0].yaxis.set_major_formatter, axes[0][0].yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "12357" else "")
    for row in axes:
        row[0].tick_params(axis="y", which="minor", labelsize=8)
    figure.supxlabel("steps done (%)", fontsize=10)
    figure.supylabel("loss over its first value", fontsize=10)
    return figure


def priced(costs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """What :func:`price` draws: costs of a set averaged over the times that it was made, its accuracy, and all data.

    costs: of :func:`frames.costs`; table: columns set, seed, accuracy, seconds, failed.
    """
    found = ranked(table)
    good = costs[costs["failed"].isna()].groupby("set")[["own_seconds", "network_seconds"]].mean()
    dense = table[(table["set"] == "all_data") & table["failed"].isna()]["seconds"]
    if len(dense):
        good.loc["all_data"] = [dense.mean(), 0.0]
    return found[found["set"].isin(good.index)].join(good, on="set").reset_index(drop=True)


def cost_table(costs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The same as text, a row a set, with memory and sizes; a set that failed says why where its mean accuracy would stand."""
    stats = ranked(table).set_index("set") if len(table) else pd.DataFrame()
    rows = []
    for name, part in costs.groupby("set", sort=False):
        good = part[part["failed"].isna()]
        if not len(good):
            rows.append((title(name), *[""] * 6, f"failed: {part['failed'].iloc[0]}"))
            continue
        row = good.iloc[0]
        rows.append((title(name), int(row["stored_images"]), int(row["training_images"]), len(good),
                     _time(good["own_seconds"].mean()),
                     f"{row['networks']}, {_time(good['network_seconds'].mean())}" if row["networks"] else "none",
                     f"{row['memory'] / 1e9:.2f} GB" if row["memory"] else "not known",
                     _accuracy(stats, name).split("%")[0] + "%" if name in stats.index else "not measured"))
    columns = ["set", "stored", "decoded", "made", "time", "networks", "memory", "accuracy"]
    return pd.DataFrame(rows, columns=columns).set_index("set")


def sharing(costs: pd.DataFrame) -> list[str]:
    """Which sets rest on the same networks, in words, a line each: ``2 networks: herding; k-center``."""
    users: dict[str, list[str]] = {}
    for name, part in costs.groupby("set", sort=False):
        for key in sorted({key for found in part["networks_of"] for key in found}):
            users.setdefault(key, []).append(title(name))
    groups = pd.Series(["; ".join(names) for names in users.values() if len(names) > 1], dtype=object).value_counts(sort=False)
    return [f"{count} network{'s' if count > 1 else ''}: {names}" for names, count in groups.items()]


def _time(seconds: float) -> str:
    return "< 0.1 s" if seconds < 0.1 else value_text(seconds, "seconds")


def _accuracy(stats: pd.DataFrame, name: str) -> str:
    if name not in stats.index:
        return "not measured"
    row = stats.loc[name]
    return estimate_text(row["mean"], int(row["n"]), *((row["low"], row["high"]) if row["n"] > 1 else (None, None)), "percent")


def texts(table: pd.DataFrame) -> Mapping[str, str]:
    """The accuracy of each set as it is printed, with its interval and n."""
    stats = ranked(table).set_index("set") if len(table) else pd.DataFrame()
    return {name: _accuracy(stats, name) for name in stats.index}


def by_architecture(table: pd.DataFrame) -> pd.DataFrame:
    """The same by architecture: a row a set, a column an architecture. table: columns set, arch, seed, accuracy, failed."""
    found = {arch: texts(part) for arch, part in table.groupby("arch", sort=False)} if len(table) else {}
    names = dict.fromkeys(name for texts_of in found.values() for name in texts_of)
    rows = {title(name): {arch: texts_of.get(name, "not measured") for arch, texts_of in found.items()} for name in names}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(found)).rename_axis("set")
