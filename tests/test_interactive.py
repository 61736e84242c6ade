"""Planes and lines to touch: every choice, pressed in any order, shows what the grids and frames hold; a browser draws them."""
from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import plotly
import pytest
from plotly.colors import hex_to_rgb

from dpkit.report import figures
from dpkit.report.interactive import View, line, surface
from dpkit.report.interactive_planes import LOG
from dpkit.report.interactive_view import LIMIT, plain

EXTENSION = Path(__file__).resolve().parents[1] / "book" / "_ext" / "offline_assets.py"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARMS, DATA, WORDS = ("dense", "imp@67", "distilled@67"), ("test images", "distilled set"), {"errors": "error", "losses": "loss"}
TITLES = ["dense", "IMP, rewound to start, 67% sparse", "distilled pruning (IDC), 67% sparse"]


def grid(i: int, points: int = 9) -> dict[str, np.ndarray]:
    """Planes of different extent and height; one point of each is not finite."""
    x, y = np.linspace(-1 - i, 5 + i, points), np.linspace(-1, 3 + i, points - 1)
    losses = 0.05 * (i + 1) * np.exp(0.1 * (x[None] ** 2 + y[:, None] ** 2))
    losses[0, 0] = np.inf
    return {"x": x, "y": y, "losses": losses, "errors": 0.9 - 0.8 / (1 + losses),
            "corners": np.array([[0.0, 0.0], [4.0, 0.0], [2.0, 2.0]])}


@pytest.fixture(scope="module")
def grids() -> dict:
    return {arm: {word: grid(i + 2 * j) | {edge: grid(i)[edge] for edge in ("x", "y")} for j, word in enumerate(DATA)}
            for i, arm in enumerate(ARMS)}


@pytest.fixture(scope="module")
def view(grids) -> View:
    return surface(grids, {"imp@67": {"positions": np.array([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [4.0, 0.0]]]),
                                      "outside": np.array([[2.5, 0.0], [2.5, 0.0]]), "steps": np.array([0, 400])}})


class Page:
    """What a browser holds: traces and layout, buttons that can be pressed, a slider that can be moved."""

    def __init__(self, view: View):
        held = json.loads(json.dumps(view.figure))
        self.traces, self.layout = held["data"], held["layout"]

    def press(self, menu: int, label: str) -> None:
        self.do(next(b for b in self.layout["updatemenus"][menu]["buttons"] if b["label"] == label))

    def move(self, step: int) -> None:
        self.do(self.layout["sliders"][0]["steps"][step])

    def do(self, button: dict) -> None:
        """Do what plotly.js does with the arguments of a button: values in a list go round over the traces."""
        args = button["args"]
        layouts = args[1] if button["method"] == "update" else {}
        for name, values in args[0].items():
            assert not isinstance(values, list) or len(values) == len(args[-1])
            for i, trace in enumerate(args[-1]):
                self.traces[trace][name] = values[i] if isinstance(values, list) else values
        for path, value in layouts.items():
            *places, last = path.split(".")
            where = self.layout
            for place in places:
                where = where[place]
            where[last] = value

    def of(self, kind: str) -> list[dict]:
        return [trace for trace in self.traces if trace["type"] == kind and trace.get("visible", True) is True]


def as_shown(trace: dict) -> np.ndarray:
    """What hovering over a trace says, NaN for nothing."""
    return np.array(trace["text"] if "text" in trace else trace["z"], dtype=float)


def wanted(grid: dict, value: str) -> np.ndarray:
    found = (100 if value == "errors" else 1) * grid[value]
    return np.where(np.isfinite(found), found, np.nan)


CHOICES = list(product(range(len(ARMS)), DATA, WORDS))


def test_the_first_view_is_contours_and_no_trace_needs_webgl(view):
    page = Page(view)
    assert {trace["type"] for trace in page.traces} == {"contour", "scatter"}  # the others' being there is enough for plotly
    assert len(page.of("contour")) == 4
    assert [trace["opacity"] for trace in page.of("contour")] == [1, 0, 0, 0]
    assert [[b["label"] for b in menu["buttons"]] for menu in page.layout["updatemenus"]] == [
        TITLES, ["error, test images", "loss, test images", "error, distilled set", "loss, distilled set"],
        ["contours", "surface (turn it)"]]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_every_choice_in_any_order_shows_its_grid(view, grids, order):
    page = Page(view)
    for (arm, word, value), solid in product(CHOICES[::-1], (True, False)):
        presses = [(0, TITLES[arm]), (1, f"{WORDS[value]}, {word}"), (2, "surface (turn it)" if solid else "contours")]
        for which in order:
            page.press(*presses[which])
        goal, found = grids[ARMS[arm]][word], wanted(grids[ARMS[arm]][word], value)
        fields = page.of("surface" if solid else "contour")
        assert len(fields) == 4
        assert page.of("contour" if solid else "surface") == []
        (seen,) = (trace for trace in fields if trace["opacity"] == 1)
        for trace in fields:  # what is not meant neither shows nor speaks, and a template would make it speak
            assert trace["hidesurface"] == (trace["hoverinfo"] == "skip") == (trace is not seen)
            assert "hovertemplate" not in trace
        np.testing.assert_allclose(as_shown(seen), found, rtol=5.1e-3)
        drawn = np.array(seen["z"], dtype=float)
        np.testing.assert_allclose(10 ** (drawn / LOG) if value == "losses" else drawn, found, rtol=5.1e-3)
        assert seen["hoverinfo"] == ("text+name" if value == "losses" else "z+name")
        assert seen["name"] == ("loss (nats)" if value == "losses" else "error (%)")
        for axes in (page.layout, page.layout["scene"]):
            np.testing.assert_allclose(axes["xaxis"]["range"], goal["x"][[0, -1]], rtol=1e-3)
            np.testing.assert_allclose(axes["yaxis"]["range"], goal["y"][[0, -1]], rtol=1e-3)
        assert page.layout["scene"]["zaxis"]["title"]["text"] == seen["name"]
        shown = [name for name, axis in page.layout.items() if name.startswith("coloraxis") and axis["showscale"]]
        assert shown == [seen["coloraxis"]]  # one colour bar, that of what is seen
        marks = [trace for trace in page.of("scatter3d" if solid else "scatter") if trace["mode"].startswith("markers")]
        assert [trace["hoverinfo"] for trace in marks].count("text") == 1
        (mark,) = (trace for trace in marks if trace["opacity"] == 1)
        near = [(np.abs(goal["y"] - y).argmin(), np.abs(goal["x"] - x).argmin()) for x, y in goal["corners"]]
        heights = np.array(mark["z"]) if value == "errors" else 10 ** (np.array(mark["z"]) / LOG)
        np.testing.assert_allclose(heights, [found[place] for place in near], rtol=5.1e-3)


def test_the_colour_bar_is_in_nats_and_common_to_all_arms(view, grids):
    axis = Page(view).layout["coloraxis4"]
    found = np.concatenate([wanted(grids[arm]["distilled set"], "losses").ravel() for arm in ARMS])
    np.testing.assert_allclose([axis["cmin"], axis["cmax"]], LOG * np.log10([np.nanmin(found), np.nanmax(found)]), atol=0.51)
    places, texts = axis["colorbar"]["tickvals"], axis["colorbar"]["ticktext"]
    np.testing.assert_allclose(10 ** (np.array(places) / LOG), [float(t) for t in texts], rtol=2e-3)
    assert len(places) >= 3


def test_marks_follow_the_arm(view):
    page = Page(view)
    page.press(0, TITLES[1])
    run, *children = page.of("scatter")
    assert (run["x"], run["y"]) == ([1, 0, None, 1, 4, None], [1, 0, None, 1, 0, None])
    assert run["text"][0] == "child 0, step 0: 2.5 from the plane"
    assert all(list(zip(marks["x"], marks["y"], strict=True)) == [(0, 0), (4, 0), (2, 2)] for marks in children)
    page.press(2, "surface (turn it)")
    assert page.of("scatter") == []
    assert [trace["mode"] for trace in page.of("scatter3d")] == ["none", *["markers"] * 4]
    page.press(0, TITLES[0])
    page.press(2, "contours")
    assert page.of("scatter")[0]["x"] == []


def test_lines_of_the_grids_are_left_out_where_the_page_would_be_too_long(grids):
    whole = surface(grids)
    thin = surface(grids, limit=len(whole.html) - 1)
    assert len(thin.html) < len(whole.html)
    first = Page(thin).traces[0]
    assert (first["x"], first["y"][-1]) == ([-1, 0.5, 2, 3.5, 5], 3)  # the ends stay
    assert np.shape(first["z"]) == (5, 5)
    many = {arm: {word: grid(1, 41) for word in DATA} for arm in ("dense", "imp@67", "distilled@67", "random@67", "dm@67")}
    view = surface(many)
    assert np.shape(Page(view).traces[0]["z"]) == (40, 41)
    assert len(view.html) < LIMIT


def test_planes_that_cannot_be_shown_are_refused(grids):
    with pytest.raises(ValueError, match=r"^the view of planes needs at least one grid, got none"):
        surface({})
    with pytest.raises(ValueError, match=r"^all arms must have the same data, got test images, distilled set for the first"):
        surface({"dense": grids["dense"], "imp": {}})
    with pytest.raises(ValueError, match=r"^the view must fit in 5000 bytes of HTML, but takes"):
        surface(grids, limit=5000)
    broken = {"dense": {"test images": {**grid(0), "losses": np.full((8, 9), np.nan)}}}
    with pytest.raises(ValueError, match=r"^losses on test images must have a finite value somewhere, got none"):
        surface(broken)


# --- lines ------------------------------------------------------------------------------------------------------------

def table(arms=("dense", "imp", "distilled"), levels=(36, 67)) -> pd.DataFrame:
    rows = [{"arm": arm, "percent": percent, "seed": seed, "pair": pair, "alphas": alpha,
             "errors": 0.1 + 0.01 * i + 0.002 * percent * alpha * (1 - alpha) + 0.02 * seed + 0.01 * (pair == "0-2"),
             "losses": 0.3 + alpha * (1 - alpha) * (i + 1)}
            for i, arm in enumerate(arms) for percent in ((0,) if arm == "dense" else levels) for seed in range(2)
            for pair in ("0-1", "0-2") for alpha in np.linspace(0, 1, 5)]
    return pd.DataFrame(rows)


def test_the_slider_puts_points_on_every_curve_and_says_their_values():
    page = Page(line(table()))
    assert [step["label"] for step in page.layout["sliders"][0]["steps"]] == ["0", "0.25", "0.5", "0.75", "1"]
    for level, step in ((67, 3), (36, 1), (67, 0)):
        page.press(0, f"{level}%")
        page.move(step)
        alpha = step / 4
        marks = [t for t in page.of("scatter") if t["mode"] == "markers"]
        assert [t["x"] for t in marks] == [[alpha]] * 6
        errors = [100 * (0.1 + 0.01 * i + 0.002 * (level if i else 0) * alpha * (1 - alpha) + 0.015) for i in range(3)]
        losses = [0.3 + alpha * (1 - alpha) * (i + 1) for i in range(3)]
        np.testing.assert_allclose([t["y"][0] for t in marks], errors + losses, rtol=1e-3)
        named = [t["name"] for t in marks if t["showlegend"]]
        assert named[1] == f"IMP, rewound to start (n = 2): error {errors[1]:.1f}%, loss {losses[1]:.3f}"
        assert len(named) == 3


def test_curves_are_means_over_initialisations_with_the_range_of_lines():
    page = Page(line(table()))
    curves = [t for t in page.of("scatter") if t["mode"] == "lines" and t["yaxis"] == "y"]
    band, mean = curves[2:4]  # after those of the dense network
    alphas = np.linspace(0, 1, 5)
    middle = 100 * (0.11 + 0.002 * 67 * alphas * (1 - alphas) + 0.015)
    np.testing.assert_allclose(mean["y"], middle, rtol=1e-3)
    np.testing.assert_allclose(band["y"][:5], middle + 1.5, rtol=1e-3)
    np.testing.assert_allclose(band["y"][5:], middle[::-1] - 1.5, rtol=1e-3)
    assert mean["line"]["color"] == figures.colour("imp")
    assert band["fillcolor"].startswith("rgba({},{},{},".format(*hex_to_rgb(figures.colour("imp"))))


def test_positions_that_only_some_lines_have_are_left_out():
    refined = table(("imp",))
    extra = refined[refined["pair"] == "0-1"].assign(alphas=0.4, errors=0.9).drop_duplicates(["percent", "seed"])
    page = Page(line(pd.concat([refined, extra])))
    assert [step["label"] for step in page.layout["sliders"][0]["steps"]] == ["0", "0.25", "0.5", "0.75", "1"]
    apart = refined.assign(alphas=np.where((refined["pair"] == "0-2") & (refined["alphas"] > 0), refined["alphas"] * 0.9,
                                           refined["alphas"]))
    with pytest.raises(ValueError, match=r"^the lines of imp at 36% must share at least 2 positions, got 1"):
        line(apart)


def test_many_arms_on_one_line_look_apart_and_fit():
    names = ["imp", "ltr", "ltr_500", "large_batch", "early_stopped", "one_shot", "distilled", "combined", "dm", "random_real",
             "herding", "snip", "random", "distilled_shuffled", "imp_weights"]
    view = line(table(("dense", *names), (20, 67, 89)))
    assert len(view.html) < LIMIT
    means = [t for t in Page(view).of("scatter") if t["mode"] == "lines" and t["yaxis"] == "y" and "dash" in t["line"]]
    assert len({(t["line"]["color"], t["line"]["dash"]) for t in means}) == 16
    with pytest.raises(ValueError, match=r"^the view must fit in 1000 bytes"):
        line(table(), limit=1000)
    with pytest.raises(ValueError, match=r"^the view of lines needs at least one line between children, got none"):
        line(table().iloc[:0])


def test_a_name_hides_all_of_its_arm_and_the_slider_does_not_bring_it_back():
    view = line(table())
    traces, layout = view.figure["data"], view.figure["layout"]
    assert (layout["legend"]["itemclick"], layout["legend"]["groupclick"]) == ("toggle", "togglegroup")
    groups = {}
    for trace in traces:
        groups.setdefault(trace["legendgroup"], []).append(trace)
    assert set(groups) == {"dense@0", "imp@36", "imp@67", "distilled@36", "distilled@67"}
    for parts in groups.values():  # band and mean, and the point, in both panels
        assert sorted(t["mode"] for t in parts) == ["lines"] * 4 + ["markers"] * 2
        assert sum(t.get("showlegend", True) for t in parts) == 1
    assert all("visible" not in step["args"][0] for step in layout["sliders"][0]["steps"])


def test_dense_alone_needs_no_choice_of_sparsity():
    page = Page(line(table(("dense",))))
    assert "updatemenus" not in page.layout
    assert len([t for t in page.of("scatter") if t["mode"] == "markers"]) == 2


# --- both -------------------------------------------------------------------------------------------------------------

def test_pages_ask_nothing_of_any_network_and_have_identifiers_of_their_own(view, grids):
    spec = importlib.util.spec_from_file_location("offline_assets", EXTENSION)
    assets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assets)
    for shown in (view, line(table())):
        assert assets.ON_DEMAND["vendor/plotly.js"] in shown.html
        assert assets.outside_requests(shown.html) == []
        assert "<html" not in shown.html
        bundle = shown._repr_mimebundle_()
        assert set(bundle) == {"application/vnd.plotly.v1+json", "text/html"}
        json.dumps(bundle)
    others = [surface(grids), surface({arm: grids[arm] for arm in ARMS[:2]}), line(table()), line(table(("imp",)))]
    identifiers = [shown.html.split('id="')[1].split('"')[0] for shown in others]
    assert len(set(identifiers)) == 4
    assert surface(grids).html == others[0].html  # equal results give equal files
    assert repr(view) == "View(name='planes')"


def test_numbers_are_short_and_what_is_not_finite_is_null():
    assert plain(np.array([[1 / 3, 20.0], [np.nan, -np.inf]])) == [[0.333, 20], [None, None]]
    assert json.dumps(plain(np.array([0.0, 1234.5]))) == "[0, 1230]"


SCRIPT = """<script>window.addEventListener("load", async () => {
  const all = [...document.querySelectorAll(".plotly-graph-div")], said = [];
  const press = async (d, menu, k) => Plotly.update(d, ...d.layout.updatemenus[menu].buttons[k].args);
  const state = (d) => said.push([d.querySelectorAll(".contour").length, d.querySelectorAll("canvas").length,
                                  d.querySelectorAll(".colorbar, .cbtitle").length > 0].join("/"));
  const [planes, line] = all;
  state(planes); await press(planes, 0, 1); await press(planes, 1, 3); state(planes);
  await press(planes, 2, 1); state(planes); await press(planes, 2, 0); state(planes);
  await Plotly.restyle(line, ...line.layout.sliders[0].steps[1].args);
  said.push([...line.querySelectorAll(".legendtext")].map(t => t.textContent).join("/"));
  const result = document.createElement("pre"); result.id = "result"; result.textContent = said.join("\\n");
  document.body.append(result);
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine: `apt-get install chromium`")
def test_a_browser_draws_contours_without_webgl_and_moves_the_points(view, tmp_path):
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    (tmp_path / "page.html").write_text(f'<html><head><meta charset="utf-8"><script src="{script.as_uri()}"></script></head>'
                                        f"<body>{view.html}{line(table()).html}{SCRIPT}</body></html>", encoding="utf-8")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                           "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
                           "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "page.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert 'id="result"' in done.stdout, done.stderr[-500:]
    first, chosen, turned, back, names = done.stdout.split('id="result">')[1].split("</pre>")[0].split("\n")
    assert first == chosen == back == "4/0/true"  # four contours of one arm, no canvas of WebGL
    assert int(turned.split("/")[1]) >= 1
    assert names.startswith("dense (n = 2): error 11.5%, loss 0.487/IMP, rewound to start (n = 2): error 15.0%, loss 0.675/")
    assert all(len(part) < 100 for pair in pairwise(names.split("/")) for part in pair)
