"""One function a figure: a tidy frame in, a matplotlib figure out. An empty frame gives a figure that says so."""
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dpkit.report.arms import called, split
from dpkit.report.frames import summary

#: one colour an arm or set everywhere: those of Okabe and Ito (2008), told apart by colour-blind readers, and shades of them.
#: Learned sets differ in hue, chosen ones are green or grey
COLOURS = {"dense": "#000000", "all_data": "#000000", "imp": "#0072B2", "ltr": "#56B4E9", "distilled": "#D55E00",
           "random": "#8C8C8C", "idc": "#D55E00", "idc_factor1": "#E69F00", "dc": "#56B4E9", "dsa": "#0072B2", "dm": "#CC79A7",
           "mtt": "#5B1F4A", "generator": "#F0E442", "random_real": "#009E73", "herding": "#00513B", "k_center": "#9ADBC5",
           "el2n": "#6A6E70", "distilled_pretrained": "#8B3A00", "combined": "#E69F00", "large_batch": "#009E73",
           "early_stopped": "#CC79A7", "one_shot": "#E69F00", "snip": "#0072B2", "grasp": "#E69F00", "synflow": "#009E73"}
MARKERS = {"dense": "s", "imp": "o", "ltr": "^", "distilled": "D", "random_real": "v", "random": "x", "all_data": "s",
           "idc": "D", "idc_factor1": "d", "dc": "o", "dsa": "^", "dm": "P", "mtt": "X", "generator": "*", "herding": "<",
           "k_center": ">", "el2n": "p", "distilled_pretrained": "d", "combined": "h", "large_batch": "s", "early_stopped": "p",
           "one_shot": "P", "snip": "^", "grasp": "s", "synflow": "P"}
OTHER = "#777777"  # of what others published
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 110, "savefig.bbox": "tight",
         # without a salt the SVG's identifiers differ from run to run
         "svg.hashsalt": "dpkit"}


def new(width: float = 7.0, height: float = 4.0, columns: int = 1, rows: int = 1, **options):
    """A figure and its axes in the book's style, without any global state."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **options)


def png(figure: Figure, **facts: str) -> bytes:
    """A figure as PNG with a palette: a third of the bytes in notebooks and recorded results, with no difference to be seen.

    facts: texts to keep in the file.
    """
    from PIL import Image, PngImagePlugin

    drawn, small, kept = io.BytesIO(), io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in facts.items():
        kept.add_text(name, text)
    figure.savefig(drawn, format="png", dpi=160, metadata={"Software": None})
    whole = Image.open(drawn).convert("RGB")
    whole.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "PNG", optimize=True, pnginfo=kept)
    return small.getvalue()


def nothing(text: str = "nothing measured yet") -> Figure:
    """A figure for an empty frame."""
    figure, axes = new(5, 1.5)
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#555555")
    return figure


def title(name: str) -> str:
    """How an arm or a set is called."""
    return called(name)


def colour(name: str) -> str:
    """The colour of an arm or a set; soft labels have their set's, controls their arm's."""
    base, _ = split(name)
    return COLOURS.get(base.removesuffix("_soft"), COLOURS["ltr"] if base.startswith("ltr_") else OTHER)


def sheet(images: np.ndarray, labels: Sequence[str], columns: int) -> Figure:
    """Images (N, H, W, 3) in [0, 1] as a sheet of ``columns`` columns; one row a label."""
    rows = len(images) // columns
    figure, axes = new(min(7.5, 0.55 * columns + 1.2), min(7.5, 0.55 * rows + 0.2))
    _rows_of_images(axes, images, labels, columns)
    return figure


def panels(blocks: Mapping[str, np.ndarray], labels: Sequence[str], columns: int = 4) -> Figure:
    """Images (N, H, W, 3) in [0, 1] of several sets side by side, a panel a title, in each one row a label.

    columns: panels in a row; the labels stand at the first of them.
    """
    if not blocks:
        return nothing("nothing made yet")
    rows, each = -(-len(blocks) // columns), max(1, len(labels))
    count, height, width = next(iter(blocks.values())).shape[:3]
    side = min(6.4 / columns / max(1, count // each), 0.45)  # inches of one image
    above = 0.22 + 0.19 * max(name.count("\n") + 1 for name in blocks)
    figure, axes = new(7.4, rows * (side * each * height / width + above), columns=columns, rows=rows, squeeze=False)
    for place, panel in enumerate(axes.flat):
        panel.axis("off")
        if place < len(blocks):
            name, images = list(blocks.items())[place]
            panel.axis("on")
            _rows_of_images(panel, images, labels if place % columns == 0 else [""] * len(labels), len(images) // each)
            panel.set_title(name, fontsize=9)
            panel.tick_params(labelsize=8)
    return figure


def _rows_of_images(axes, images: np.ndarray, labels: Sequence[str], columns: int) -> None:
    rows, pad = len(images) // columns, 1
    height, width = images.shape[1:3]
    canvas = np.ones((rows * (height + pad) - pad, columns * (width + pad) - pad, 3))
    for i in range(rows * columns):
        r, c = divmod(i, columns)
        canvas[r * (height + pad):r * (height + pad) + height, c * (width + pad):c * (width + pad) + width] = images[i]
    axes.imshow(canvas.clip(0, 1), interpolation="nearest")
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([r * (height + pad) + height / 2 for r in range(rows)], list(labels)[:rows])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def learning_curves(table: pd.DataFrame) -> Figure:
    """Training loss against epoch. Columns: epoch, curve, seed."""
    if not len(table):
        return nothing()
    figure, axes = new(6, 3.2)
    for seed, group in table.groupby("seed"):
        axes.plot(group["epoch"], group["curve"], label=f"seed {seed}")
    axes.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log")
    axes.legend()
    return figure


def bars(table: pd.DataFrame, by: str, column: str, label: str) -> Figure:
    """A horizontal bar a group: mean and 95% interval over seeds, each seed a dot. ``column`` is shown in percent."""
    if not len(table):
        return nothing()
    stats = summary(table, [by], column)
    if not len(stats):
        return nothing("no network has a result")
    figure, axes = new(6.5, 0.5 * len(stats) + 1.0)
    place = np.arange(len(stats))[::-1]
    axes.barh(place, 100 * stats["mean"], color=[colour(n) for n in stats[by]], alpha=0.75, height=0.6)
    whiskers(axes, 100 * stats["mean"], place, 100 * stats["low"], 100 * stats["high"], horizontal=True)
    for y, name in zip(place, stats[by], strict=True):
        values = 100 * table[(table[by] == name) & table["failed"].isna()].groupby("seed")[column].mean()
        axes.plot(values, np.full(len(values), y), "o", color="white", markeredgecolor="black", markersize=4, zorder=3)
    axes.set_yticks(place, [f"{title(n)} (n = {k})" for n, k in zip(stats[by], stats["n"], strict=True)])
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    return figure


def whiskers(axes, x, y, low, high, horizontal: bool = False, colour: str = "black", width: float = 1.2) -> None:
    """Intervals from ``low`` to ``high`` about points, all sequences of equal length."""
    center = np.asarray(x if horizontal else y, dtype=float)
    spread = np.vstack([center - np.asarray(low, dtype=float), np.asarray(high, dtype=float) - center]).clip(0)
    axes.errorbar(x, y, fmt="none", ecolor=colour, capsize=3, capthick=width, lw=width,
                  **{"xerr" if horizontal else "yerr": spread})


def against_sparsity(table: pd.DataFrame, column: str, label: str, *, rule: float | None = None,
                     looks: Mapping[str, Mapping] | None = None) -> Figure:
    """``column`` in percent against sparsity: a line an arm, a dot a seed, 95% intervals; the dense network as a band.

    rule: a threshold to draw, as a fraction. The axis is then linear up to the threshold and logarithmic above, since
    what matters is on which side a value lies. looks: colour, marker and linestyle of each arm, where they are not its own.
    """
    if not len(table):
        return nothing()
    stats = summary(table, ["arm", "percent"], column)
    if not len(stats):
        return nothing("no network has a result")
    figure, axes = new(7, 4.2)
    dense = stats[stats["arm"] == "dense"]
    if len(dense):
        row = dense.iloc[0]
        axes.axhspan(100 * row["low"], 100 * row["high"], color="black", alpha=0.1, lw=0)
        axes.axhline(100 * row["mean"], color="black", lw=1.2, ls="--", label=f"dense (n = {row['n']})")
    arms = [a for a in dict.fromkeys(stats["arm"]) if a != "dense"]
    for i, arm in enumerate(arms):
        part = stats[stats["arm"] == arm].sort_values("percent")
        x = part["percent"] + (i - (len(arms) - 1) / 2) * 0.6  # side by side, so that intervals do not cover one another
        style = {"color": colour(arm), "marker": MARKERS.get(arm, "o")} | dict((looks or {}).get(arm, {}))
        axes.plot(x, 100 * part["mean"], **style, markersize=5, label=f"{title(arm)} (n = {part['n'].min()})")
        whiskers(axes, x, 100 * part["mean"], 100 * part["low"], 100 * part["high"], colour=colour(arm))
        good = table[(table["arm"] == arm) & table["failed"].isna()]
        for place, percent in zip(x, part["percent"], strict=True):
            seeds = 100 * good[good["percent"] == percent].groupby("seed")[column].mean()
            axes.plot(np.full(len(seeds), place), seeds, "o", color=colour(arm), markersize=3, alpha=0.5)
    if rule is not None:
        threshold(axes, rule)
    axes.set(xlabel="sparsity (% of weights removed)", ylabel=label)
    axes.set_xticks(sorted({int(p) for p in stats["percent"] if p}))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def threshold(axes, rule: float) -> None:
    """Draw a threshold, a fraction, on an axis in points: linear up to it and logarithmic above."""
    axes.set_yscale("symlog", linthresh=100 * rule, linscale=0.8)
    ticks = [0, 1, 2, 5, 10, 20, 50]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(-0.15, 100)
    axes.axhline(100 * rule, color="#B00000", lw=1, ls=":")
    axes.annotate(f"stable: below {100 * rule:g} points", (0.5, 100 * rule), xycoords=("axes fraction", "data"), ha="center",
                  va="bottom", fontsize=8, color="#B00000")


def mean_line(lines: pd.DataFrame) -> pd.Series:
    """Mean error of several lines by position, at those that all of them have: refined ones have more, each its own.

    lines: columns seed, pair, alphas, errors.
    """
    found = lines.groupby("alphas")["errors"].agg(["mean", "size"])
    return found.loc[found["size"] == lines.groupby(["seed", "pair"]).ngroups, "mean"]


def paths(table: pd.DataFrame, looks: Mapping[str, Mapping] | None = None) -> Figure:
    """Error along the line between children: a panel for each sparsity, a thin line a pair, a thick one the mean.

    looks: by arm, the ``linestyle`` of its mean.
    """
    if not len(table):
        return nothing()
    levels = sorted(set(table["percent"]))
    figure, axes = new(2.6 + 2.4 * len(levels), 3.6, columns=len(levels), sharey=True, squeeze=False)
    for panel, percent in zip(axes[0], levels, strict=True):
        part = table[table["percent"] == percent]
        for arm in dict.fromkeys(part["arm"]):
            lines = part[part["arm"] == arm]
            for _, line in lines.groupby(["seed", "pair"]):
                panel.plot(line["alphas"], 100 * line["errors"], color=colour(arm), lw=0.6, alpha=0.45)
            mean, dashes = mean_line(lines), (looks or {}).get(arm, {}).get("linestyle", "-")
            panel.plot(mean.index, 100 * mean, color=colour(arm), lw=2, ls=dashes, label=title(arm))
        panel.set(xlabel="position α on the line", title=f"{percent}% sparse" if percent else "dense")
    axes[0][0].set_ylabel("test error (%)")
    handles = {text: h for panel in axes[0] for h, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9)
    return figure
