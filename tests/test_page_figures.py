"""The figures of the book's own pages: drawn from what is recorded, and those that lie in the book are of today's record."""
from __future__ import annotations

import json

import pandas as pd
import pytest
from PIL import Image

from dpkit import page_figures, project
from dpkit.page_figures import ARMS, COMPRESSED, PERCENT


@pytest.mark.parametrize("name", ["front.png", "imagenette.png", "compression.png"])
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
