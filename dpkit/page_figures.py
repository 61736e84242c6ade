"""The figures of the book's own pages, drawn from what is recorded in it: ``python -m dpkit.page_figures``.

Chapters draw their figures when they are executed. The front page and the pages on compression, on Imagenette, on the masks of
small sets and on the noise of the search are no chapters, so their figures are drawn by this module and lie in ``book/_static``.
Each holds a digest of the files that it was drawn from, by which a test tells whether it is that of the recorded numbers.
"""
from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dpkit import files, project, stages
from dpkit.report import set_masks
from dpkit.report.figures import MARKERS, colour, new, paths, png, threshold, title, whiskers
from dpkit.report.format import number_text, parse_numbers
from dpkit.statistics import mean_interval

ARMS = ("dense", "imp", "ltr", "distilled", "random_real", "random")  # of the lines between children
#: runs of the page on compression: what varies, its values, and the folder of each
COMPRESSED = {"images a class": {1: "ipc1", 3: "ipc3", 10: "ipc10", 30: "ipc30"},
              "classes": {3: "classes3", 5: "classes5", 10: "ipc10"}}
PERCENT = 59
#: sets of the page on the noise of the search, in words
SEARCHED = {"idc10": "400 images of IDC's", "real40": "400 random real images"}
#: sets of searches of different lengths: how they are called, their colour and marker
LENGTHS = {"idc10": ("400 of IDC's", "#D55E00", "D"), "real10": ("100 real", "#9AD0F0", "v"),
           "real40": ("400 real", "#56B4E9", "o"), "real400": ("4,000 real", "#0B4F7D", "s")}
STEPS = (8, 24, 88, 264, 704, 2112)
TIMES = ("#009E73", "#D55E00")  # short and long searches
STABLE = 0.02  # the threshold of stability, a rise in error (Frankle et al. 2020, arXiv 1912.05671)


def lines(sources: Sequence[Path]) -> Figure:
    """Error between children, of some of the arms; sources: the table of the lines that a chapter showed."""
    table = pd.read_csv(sources[0])
    return paths(table[table["arm"].isin(ARMS)].sort_values("arm", key=lambda names: names.map(ARMS.index), kind="stable"))


def compression(sources: Sequence[Path]) -> Figure:
    """Barriers against images a class, classes, and what a set teaches; sources: the numbers of all runs."""
    found = {path.parent.name: parse_numbers(path.read_text(encoding="utf-8"), str(path)) for path in sources}
    figure, axes = new(10.4, 3.8, columns=3, sharey=True)
    for panel, (what, runs) in zip(axes, COMPRESSED.items(), strict=False):
        for i, arm in enumerate(("distilled", "random_real", "imp", "dense")):
            rows = [found[folder][_barrier(arm)] for folder in runs.values()]
            x = [place + 0.06 * (i - 1.5) for place in range(len(runs))]  # side by side, so that no interval covers another
            _line(panel, arm, x, rows, "--" if arm == "dense" else "-")
        panel.set(xlabel=what)
        panel.set_xticks([*range(len(runs))], [str(value) for value in runs])
    for arm, name in (("distilled", "idc"), ("random_real", "random_real")):
        runs = COMPRESSED["images a class"]
        x = [100 * found[folder][f"distill.{name}.accuracy"]["value"] for folder in runs.values()]
        rows = [found[folder][_barrier(arm)] for folder in runs.values()]
        _line(axes[2], arm, x, rows, "-")
        for place, row, value in zip(x, rows, runs, strict=True):
            axes[2].annotate(str(value), (place, 100 * row["value"]), xytext=(5, 4), textcoords="offset points", fontsize=8,
                             color=colour(arm))
    axes[2].set(xlabel="accuracy after training on the set (%)")
    for panel in axes:
        threshold(panel, STABLE)
    axes[0].set_ylabel(f"error barrier at {PERCENT}% (points)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def sets(sources: Sequence[Path]) -> Figure:
    """What masks do against what their sets teach, a point a set; sources: the tables of what networks learn from sets, of
    tickets and of barriers, and the numbers of their study."""
    taught, tickets, paths = (pd.read_csv(path) for path in sources[:3])
    found = parse_numbers(sources[3].read_text(encoding="utf-8"), str(sources[3]))
    table = set_masks.matched(taught, tickets, paths)
    percents = sorted({int(percent) for percent in table["percent"]})
    panels = [(column, chapter, percent) for column, chapter in (("barrier", "connectivity"), ("accuracy", "tickets"))
              for percent in percents]
    figure, axes = new(4.3 * len(percents), 7.6, columns=len(percents), rows=2)
    for panel, (column, chapter, percent) in zip(axes.flat, panels, strict=True):
        some = table[table["percent"] == percent]
        for name in [name for name in dict.fromkeys(taught["set"]) if name in set(some["set"])]:
            rows = some[some["set"] == name]
            (x, *x_ends), (y, *y_ends) = ([100 * v for v in mean_interval(rows[c].tolist())] for c in ("set_accuracy", column))
            look = {"color": colour(name), "fillstyle": "none" if name.endswith("_soft") else "full"}
            panel.plot([x], [y], marker=MARKERS[name.removesuffix("_soft")], ms=7, ls="none", label=title(name), **look)
            whiskers(panel, [x], [y], *([end] for end in y_ends), colour=colour(name), width=0.8)
            whiskers(panel, [x], [y], *([end] for end in x_ends), horizontal=True, colour=colour(name), width=0.8)
        for arm, dashes in (("imp", "--"), ("random", ":")):
            number = found[f"{chapter}.{arm}.{column}@{percent}"]
            panel.axhline(100 * number["value"], color=colour(arm), ls=dashes, lw=1.2, label=title(arm))
        if column == "barrier":
            threshold(panel, STABLE)
            panel.set_ylim(-0.15, 35)
        what = f"error barrier at {percent}% (points)" if column == "barrier" else f"accuracy at {percent}% (%)"
        panel.set(xlabel="accuracy after training on the set (%)", ylabel=what)
        ranked = found[f"{chapter}.set_accuracy.rank_correlation@{percent}"]
        panel.set_title(f"rank correlation {number_text(ranked)}", fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def noise(sources: Sequence[Path]) -> Figure:
    """Barriers at both levels of noise, time and step, a panel for each set; sources: the design, and the numbers of its runs."""
    design = stages.read_design(sources[0])
    found = {path.parent.name: parse_numbers(path.read_text(encoding="utf-8"), str(path)) for path in sources[1:]}
    (noises, times, steps), signs = design.levels, (-1, 1)
    figure, axes = new(8.6, 4.2, columns=len(SEARCHED), sharey=True)
    for panel, (arm, words) in zip(axes, SEARCHED.items(), strict=True):
        for i, (time, step) in enumerate(itertools.product(signs, signs)):
            rows = [found[design.name((noise, time, step))][_barrier(arm)] for noise in signs]
            x = [place + 0.05 * (i - 1.5) for place in signs]  # side by side, so that no interval covers another
            values, low, high = ([100 * row[field] for row in rows] for field in ("value", "low", "high"))
            look = {"color": TIMES[time > 0], "ls": "--" if step > 0 else "-", "fillstyle": "none" if step > 0 else "full"}
            panel.plot(x, values, marker="o", ms=6, lw=1.4, label=f"{times[time > 0]}, {steps[step > 0]} steps", **look)
            whiskers(panel, x, values, low, high, colour=TIMES[time > 0])
        imp = found[design.name((-1, -1, -1))][_barrier("imp")]  # of all runs: none of the factors concerns it
        panel.axhline(100 * imp["value"], color=colour("imp"), ls=":", lw=1.2, label=title("imp"))
        threshold(panel, STABLE)
        panel.set_xticks(signs, noises)
        panel.set(xlabel="noise of the search", title=words, xlim=(-1.5, 1.5))
    axes[0].set_ylabel(f"error barrier at {PERCENT}% (points)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


def length(sources: Sequence[Path]) -> Figure:
    """Barriers and accuracy against the steps of a search's round, a line a set; sources: the numbers of the runs."""
    found = {int(path.parent.name.removeprefix("steps-")): parse_numbers(path.read_text(encoding="utf-8"), str(path))
             for path in sources}
    figure, axes = new(9.4, 4.2, columns=2)
    panels = (("connectivity", "barrier", "error barrier"), ("tickets", "accuracy", "accuracy"))
    for panel, (chapter, column, words) in zip(axes, panels, strict=True):
        for i, (arm, (called, tone, marker)) in enumerate(LENGTHS.items()):
            rows = {steps: numbers[name] for steps, numbers in sorted(found.items())
                    if (name := f"{chapter}.{arm}.{column}@{PERCENT}") in numbers}
            if not rows:
                continue
            x = [steps * 1.04 ** (i - 1.5) for steps in rows]  # side by side, so that no interval covers another
            values, low, high = ([100 * row[field] for row in rows.values()] for field in ("value", "low", "high"))
            least = min(row["n"] for row in rows.values())
            panel.plot(x, values, marker=marker, ms=5, lw=1.4, color=tone, label=f"{called} (n = {least})")
            whiskers(panel, x, values, low, high, colour=tone)
        panel.set_xscale("log")
        panel.set_xticks(sorted(found), [f"{steps:,}" for steps in sorted(found)])
        panel.set_xticks([], minor=True)
        unit = "points" if column == "barrier" else "%"
        panel.set(xlabel="steps of a round of the search", ylabel=f"{words} at {PERCENT}% ({unit})")
    threshold(axes[0], STABLE)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _barrier(arm: str) -> str:
    return f"connectivity.{arm}.barrier" + ("" if arm == "dense" else f"@{PERCENT}")


def _line(panel, arm: str, x: Sequence[float], rows: Sequence[dict], dashes: str) -> None:
    """The records of one arm in percent, with their intervals."""
    values, low, high = ([100 * row[field] for row in rows] for field in ("value", "low", "high"))
    panel.plot(x, values, marker=MARKERS[arm], ms=5, lw=1.4, ls=dashes, color=colour(arm),
               label=f"{title(arm)} (n = {min(row['n'] for row in rows)})")
    whiskers(panel, x, values, low, high, colour=colour(arm))


def figures() -> dict[str, tuple[Callable[[Sequence[Path]], Figure], list[Path]]]:
    """By file name in ``book/_static``: what draws it, and the files that it is drawn from."""
    book = project.root() / "book"
    folders = sorted({folder for runs in COMPRESSED.values() for folder in runs.values()})
    small = book / "distillers" / "shapes"
    design = book / "search-noise" / "design.yml"
    found = stages.read_design(design)
    runs = [found.name(signs) for signs in sorted(found.runs)]
    return {"front.png": (lines, [book / "cifar10" / "figures" / "paths.csv"]),
            "imagenette.png": (lines, [book / "imagenette" / "figures" / "paths.csv"]),
            "set-masks.png": (sets, [*(small / "figures" / f"{name}.csv" for name in ("set-accuracy", "accuracy", "barriers")),
                                     small / "numbers.jsonl"]),
            "search-noise.png": (noise, [design, *(design.parent / run / "numbers.jsonl" for run in runs)]),
            "search-length.png": (length, [design.parent / f"steps-{steps}" / "numbers.jsonl" for steps in STEPS]),
            "compression.png": (compression, [book / "compression" / folder / "numbers.jsonl" for folder in folders])}


def digest(sources: Sequence[Path]) -> str:
    """SHA-256 of files, one after another."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def main() -> None:
    """Draw all of them."""
    for name, (draw, sources) in figures().items():
        files.place({project.root() / "book" / "_static" / name: png(draw(sources), Source=digest(sources))}, overwrite=True)


if __name__ == "__main__":
    main()
