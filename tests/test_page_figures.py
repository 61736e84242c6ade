"""The figures of the book's own pages: drawn from what is recorded, and those that lie in the book are of today's record."""
from __future__ import annotations

import itertools
import json

import pandas as pd
import pytest
from PIL import Image

from dpkit import page_figures, project, stages
from dpkit.page_figures import ARMS, COMPRESSED, PERCENT, SEARCHED
from dpkit.report import set_masks


@pytest.mark.parametrize("name", [f"{name}.png" for name in ("front", "imagenette", "compression", "set-masks", "search-noise",
                                                            "search-length")])
def test_the_books_figures_are_of_what_is_recorded(name):
    _, sources = page_figures.figures()[name]
    with Image.open(project.root() / "book" / "_static" / name) as picture:
        assert picture.text["Source"] == page_figures.digest(sources), "run python -m dpkit.page_figures"


def test_lines_show_its_arms_in_their_order(tmp_path):
    rows = [{"alphas": alpha, "errors": 0.2 + 0.1 * (alpha == 0.5), "arm": arm, "percent": percent, "seed": 0, "pair": "0-1"}
            for arm in (*reversed(ARMS), "snip") for percent in ((0,) if arm == "dense" else (51, 83)) for alpha in (0, 0.5, 1)]
    pd.DataFrame(rows).to_csv(tmp_path / "paths.csv", index=False)
    figure = page_figures.lines([tmp_path / "paths.csv"])
    assert [panel.get_title() for panel in figure.axes] == ["dense", "51% sparse", "83% sparse"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(ARMS)
    assert labels[0] == "dense"
    assert "SNIP" not in labels


def test_barriers_stand_at_their_run_and_arm(tmp_path):
    folders = sorted({folder for runs in COMPRESSED.values() for folder in runs.values()})
    for i, folder in enumerate(folders):
        (tmp_path / folder).mkdir()
        records = [{"name": f"connectivity.{arm}.barrier" + ("" if arm == "dense" else f"@{PERCENT}"),
                    "value": 0.01 * i + 0.001 * j,
                    "n": 5, "low": 0.0, "high": 0.2, "key": "0"}
                   for j, arm in enumerate(("distilled", "random_real", "imp", "dense"))]
        records += [{"name": f"distill.{name}.accuracy", "value": 0.1 * i + 0.01 * j, "n": 5}
                    for j, name in enumerate(("idc", "random_real"))]
        (tmp_path / folder / "numbers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    figure = page_figures.compression([tmp_path / folder / "numbers.jsonl" for folder in folders])
    *counted, taught = figure.axes
    for panel, (what, runs) in zip(counted, COMPRESSED.items(), strict=True):
        assert panel.get_xlabel() == what
        assert [text.get_text() for text in panel.get_xticklabels()] == [str(value) for value in runs]
        lines = {line.get_label().split(" (n")[0]: line.get_ydata() for line in panel.get_lines()}
        wanted = [folders.index(folder) + 0.1 for folder in runs.values()]  # random_real is the second arm: 0.001 more, in points
        assert list(lines["random real subset"]) == pytest.approx(wanted)
    runs = COMPRESSED["images a class"].values()
    lines = {line.get_label().split(" (n")[0]: line for line in taught.get_lines()}
    assert list(lines["random real subset"].get_xdata()) == pytest.approx([10 * folders.index(folder) + 1 for folder in runs])
    assert list(lines["random real subset"].get_ydata()) == pytest.approx([folders.index(folder) + 0.1 for folder in runs])


def numbers_file(folder, records):
    folder.mkdir()
    lines = [json.dumps({"name": name, "value": value, "n": 8, "low": value - 0.001, "high": value + 0.001, "key": "0"})
             for name, value in records.items()]
    text = "".join(f"{line}\n" for line in lines)
    (folder / "numbers.jsonl").write_text(text, encoding="utf-8")
    return folder / "numbers.jsonl"


def test_each_run_of_a_design_stands_at_its_noise_on_the_line_of_its_time_and_step(tmp_path):
    design = project.root() / "book" / "search-noise" / "design.yml"
    found = stages.read_design(design)
    value = {signs: 0.001 * (10 + sum(2 ** i for i, sign in enumerate(signs) if sign > 0)) for signs in found.runs}
    files = [numbers_file(tmp_path / found.name(signs), {f"connectivity.{arm}.barrier@{PERCENT}": more + value[signs]
                                                         for arm, more in (("idc10", 0), ("real40", 0.1), ("imp", 0))})
             for signs in found.runs]
    figure = page_figures.noise([design, *files])
    assert [panel.get_title() for panel in figure.axes] == list(SEARCHED.values())
    for panel, more in zip(figure.axes, (0, 0.1), strict=True):
        assert [text.get_text() for text in panel.get_xticklabels()] == ["low", "high"]
        lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
        for (time, word), (step, size) in itertools.product(((-1, "short"), (1, "long")), ((-1, "small"), (1, "large"))):
            assert lines[f"{word}, {size} steps"] == pytest.approx([100 * (more + value[noise, time, step]) for noise in (-1, 1)])


def test_runs_of_other_lengths_stand_at_their_steps(tmp_path):
    arms = {8: ["idc10", "real10"], 88: ["idc10", "real10", "real400"], 264: ["idc10", "real10", "real400"]}
    files = [numbers_file(tmp_path / f"steps-{steps}",
                          {f"{chapter}.{arm}.{column}@{PERCENT}": more + steps / 10_000 + 0.01 * i for i, arm in enumerate(names)
                           for chapter, column, more in (("connectivity", "barrier", 0), ("tickets", "accuracy", 0.5))})
             for steps, names in arms.items()]
    figure = page_figures.length(list(reversed(files)))
    for panel, more in zip(figure.axes, (0, 0.5), strict=True):
        assert [text.get_text() for text in panel.get_xticklabels()] == ["8", "88", "264"]
        lines = {line.get_label(): line for line in panel.get_lines()}
        wanted = [100 * (more + steps / 10_000 + 0.02) for steps in (88, 264)]
        assert list(lines["4,000 real (n = 8)"].get_ydata()) == pytest.approx(wanted)
        assert list(lines["100 real (n = 8)"].get_xdata()) == pytest.approx([8, 88, 264], rel=0.1)
        assert "400 real (n = 8)" not in lines


def test_sets_stand_where_they_teach_and_their_masks_do(tmp_path):
    arms = {"distilled": 0.8, "dm": 0.7, "dm_soft": 0.72, "random_real": 0.5, "imp": None, "random": None}
    taught, tickets, paths, records = [], [], [], []
    for i, (arm, value) in enumerate(arms.items()):
        for seed in (0, 1):
            if value:
                taught.append({"set": set_masks.set_of(arm), "seed": seed, "error": 1 - value, "failed": None})
            for percent in (59, 89):
                place = {"arm": arm, "percent": percent, "seed": seed, "failed": None}
                tickets.append({**place, "error": 0.1 + 0.01 * i + 0.01 * seed})
                paths.append({**place, "error_barrier": 0.03 * i})
        for percent in (59, 89):
            records += [{"name": f"{name}@{percent}", "value": 0.25, "n": 2, "low": 0.2, "high": 0.3, "key": "0"}
                        for name in (f"tickets.{arm}.accuracy", f"connectivity.{arm}.barrier")]
    records += [{"name": f"{chapter}.set_accuracy.rank_correlation@{percent}", "value": -0.5, "n": 2, "low": -0.9, "high": 0.1,
                 "key": "0"} for chapter in ("tickets", "connectivity") for percent in (59, 89)]
    files = [tmp_path / f"{name}.csv" for name in ("sets", "tickets", "paths")] + [tmp_path / "numbers.jsonl"]
    for rows, file in zip((taught, tickets, paths), files, strict=False):
        pd.DataFrame(rows).to_csv(file, index=False)
    files[3].write_text("".join(json.dumps(record) + "\n" for record in records))
    figure = page_figures.sets(files)
    assert [panel.get_ylabel() for panel in figure.axes] == [
        "error barrier at 59% (points)", "error barrier at 89% (points)", "accuracy at 59% (%)", "accuracy at 89% (%)"]
    assert figure.axes[0].get_title() == "rank correlation −0.500 [−0.900, 0.100] (n = 2)"
    lines = {line.get_label(): line for line in figure.axes[3].lines}
    assert float(lines["DM"].get_xdata()[0]) == pytest.approx(70)
    assert float(lines["DM"].get_ydata()[0]) == pytest.approx(100 - 11.5)
    assert lines["DM, soft labels"].get_fillstyle() == "none"
    assert float(lines["random mask"].get_ydata()[0]) == pytest.approx(25)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["IDC", "DM"]
