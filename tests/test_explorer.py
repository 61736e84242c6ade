"""The interactive view: its selectors, pressed one after another, show what the frames hold; it asks nothing of any network."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from masked import compared, drawn

from dpkit.report import overlap
from dpkit.report.explorer import LIMIT, STEP, Explorer, explorer
from dpkit.store import Store

EXTENSION = Path(__file__).resolve().parents[1] / "book" / "_ext" / "offline_assets.py"
ARMS = ("imp", "distilled", "random_real", "random")
TITLES = ["IMP, rewound to start", "distilled pruning (IDC)", "random real subset", "random mask"]


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> tuple[pd.DataFrame, pd.DataFrame]:
    store = Store(tmp_path_factory.mktemp("masks") / "store")
    rows = [compared(store, {arm: drawn(100 * seed + 10 * percent + i, 32 - 32 * percent // 100) for i, arm in enumerate(ARMS)},
                     seed, percent) for seed in range(2) for percent in (25, 50, 75)]
    return overlap.overlaps(store, rows), overlap.layers(store, rows)


class Page:
    """What a browser holds: traces and layout, and selectors that can be pressed."""

    def __init__(self, view: Explorer):
        plain = json.loads(view.figure.to_json())
        self.traces, self.layout = plain["data"], plain["layout"]

    def press(self, menu: int, label: str) -> None:
        """Do what plotly.js does with the arguments of a button."""
        button = next(b for b in self.layout["updatemenus"][menu]["buttons"] if b["label"] == label)
        args = button["args"]
        styles, layouts = {"relayout": ({}, args[0]), "restyle": (args[0], {}), "update": tuple(args[:2])}[button["method"]]
        traces = args[-1] if button["method"] != "relayout" else []
        for name, values in styles.items():
            for trace, value in zip(traces, values, strict=True):
                self.traces[trace][name] = value
        for path, value in layouts.items():
            axis, _, name = path.partition(".")
            self.layout[axis][name] = value

    def matrix(self) -> np.ndarray:
        """The cells of the heat map inside its two windows."""
        (left, right), (low, high) = self.layout["xaxis"]["range"], self.layout["yaxis"]["range"]
        cells = np.array(self.traces[0]["z"], dtype=float)
        return cells[int(high + 0.5):int(low + 0.5), int(left + 0.5):int(right + 0.5)]

    def marks(self, axis: str) -> list[tuple[float, float]]:
        """Visible marks of a panel inside its windows, in its own values."""
        (left, right), (low, high) = (self.layout[f"{side}axis{axis}"]["range"] for side in "xy")
        return [(x, y) for trace in self.traces[1:] if trace["visible"] is True and trace["xaxis"] == f"x{axis}"
                for x, y in zip(trace["x"], trace["y"], strict=True) if left < x < right and y is not None and low < y < high]

    def ticks(self, axis: str) -> list[str]:
        """Labels inside an axis's window."""
        low, high = sorted(self.layout[axis]["range"])
        texts = zip(self.layout[axis]["tickvals"], self.layout[axis]["ticktext"], strict=True)
        return [text for value, text in texts if low < value < high]


def means(table: pd.DataFrame, column: str, **place) -> float:
    for name, value in place.items():
        table = table[table[name] == value]
    return 100 * float(table[column].mean())


LAYERS = {"conv0": "conv0.weight", "classifier": "classifier.weight", "all layers": "all"}


def test_every_choice_of_sparsity_and_layer_shows_its_matrix(frames):
    pairs, layers = frames
    page = Page(explorer(pairs, layers))
    assert [menu["active"] for menu in page.layout["updatemenus"]] == [2, 2, 0, 1]
    for percent in (75, 25, 50):
        for word, layer in LAYERS.items():
            page.press(1, word)
            page.press(0, f"{percent}%")
            cells = page.matrix()
            assert cells.shape == (4, 4)
            assert page.ticks("xaxis") == page.ticks("yaxis") == TITLES
            for i, a in enumerate(ARMS):
                assert np.isnan(cells[i, i])
                for j in range(i + 1, 4):
                    value = means(pairs, "excess", percent=percent, layer=layer, arm_a=a, arm_b=ARMS[j])
                    assert cells[i, j] == cells[j, i] == pytest.approx(value, abs=0.51)


def test_every_choice_of_two_arms_shows_their_densities_and_overlap(frames):
    pairs, layers = frames
    page = Page(explorer(pairs, layers))
    for percent, first, second in ((75, 2, 0), (25, 0, 3), (50, 1, 2), (50, 3, 1)):
        page.press(2, TITLES[first])
        page.press(0, f"{percent}%")
        page.press(3, TITLES[second])
        wanted = [means(layers, "density", percent=percent, layer=layer, arm=ARMS[arm])
                  for arm in (first, second) for layer in ("conv0.weight", "classifier.weight")]
        assert [y for _, y in page.marks("2")] == pytest.approx(wanted, abs=0.51)
        a, b = sorted((first, second))
        wanted = [means(pairs, column, percent=percent, layer=layer, arm_a=ARMS[a], arm_b=ARMS[b])
                  for column in ("jaccard", "jaccard_chance") for layer in ("conv0.weight", "classifier.weight")]
        assert [y - STEP * second for _, y in page.marks("3")] == pytest.approx(wanted, abs=0.51)
        assert page.ticks("xaxis2") == page.ticks("xaxis3") == ["conv0", "classifier"]
        assert page.ticks("yaxis3") == ["0", "25", "50", "75", "100"]


def test_an_arm_with_itself_has_no_overlap(frames):
    page = Page(explorer(*frames))
    page.press(3, TITLES[0])  # IMP is the first arm from the beginning
    assert page.marks("3") == []
    assert len(page.marks("2")) == 4


def test_the_page_asks_nothing_of_any_network(frames):
    spec = importlib.util.spec_from_file_location("offline_assets", EXTENSION)
    assets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assets)
    html = explorer(*frames).html
    assert assets.ON_DEMAND["vendor/plotly.js"] in html  # the book gives plotly.js to pages with this word
    assert assets.outside_requests(html) == []
    assert "<html" not in html
    assert len(html) < 100_000


def test_a_notebook_gets_both_forms_and_a_short_text(frames):
    view = explorer(*frames)
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/html"}
    assert bundle["application/vnd.plotly.v1+json"]["data"][0]["type"] == "heatmap"
    json.dumps(bundle)
    assert repr(view) == "Explorer()"
    assert explorer(*frames).html == view.html  # equal results give equal files


def test_many_arms_stay_within_the_limit_by_leaving_sparsities_out():
    names, layers = [f"ltr_{i}" for i in range(1, 16)], [*(f"l{i}.weight" for i in range(8)), "all"]
    levels = (20, 50, 67, 79, 89)
    rng = np.random.Generator(np.random.PCG64(0))
    place = pd.MultiIndex.from_product([levels, [0], layers, names, names], names=["percent", "seed", "layer", "arm_a", "arm_b"])
    pairs = place.to_frame(index=False)
    pairs = pairs[pairs["arm_a"] < pairs["arm_b"]].assign(failed=None)
    for column in ("jaccard", "jaccard_chance", "excess"):
        pairs[column] = rng.uniform(0, 1, len(pairs))
    place = pd.MultiIndex.from_product([levels, [0], layers, names], names=["percent", "seed", "layer", "arm"])
    each = place.to_frame(index=False).assign(density=rng.uniform(0, 1, len(place)), failed=None)
    view = explorer(pairs, each, limit=200_000)
    kept = [button["label"] for button in Page(view).layout["updatemenus"][0]["buttons"]]
    assert 1 <= len(kept) < 5
    assert kept[-1] == "89%"
    assert len(view.html) <= 200_000
    assert LIMIT < 1_500_000


def test_what_cannot_be_shown_is_refused(frames):
    pairs, layers = frames
    with pytest.raises(ValueError, match="at least two arms, got none"):
        explorer(pairs.iloc[:0], layers)
    with pytest.raises(ValueError, match="must fit in 1000 bytes, but one sparsity takes"):
        explorer(pairs, layers, limit=1000)
