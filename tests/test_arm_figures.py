"""Arms by name and family, and the figures of tickets and masks: they carry the values of their frames, for few arms and many."""
from __future__ import annotations

import doctest
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from masked import compared, drawn, watched
from matplotlib.colors import same_color
from test_figures import drawn as picture
from test_figures import lab

from dpkit.report import arm_figures, arms, figures, frames, overlap, overlap_figures
from dpkit.store import Store

MANY = ["imp", "ltr", "ltr_500", "large_batch", "early_stopped", "one_shot", "distilled", "combined", "distilled_pretrained",
        "dm", "generator", "random_real", "herding", "theirs", "snip", "grasp", "synflow", "random", "distilled_shuffled",
        "distilled_reinit", "distilled_signs", "imp_weights", "imp_norm_only"]
FEW = ["imp", "distilled", "random_real", "random"]


def tickets(names: list[str]) -> pd.DataFrame:
    """Accuracy of two children each; arm i lies i percent below the first at 67%, equal at 36%; one network diverged."""
    rows = [{"arm": arm, "percent": percent, "seed": seed, "child": child, "failed": None,
             "accuracy": 0.9 - 0.01 * seed - 0.002 * child - (percent == 67) * 0.01 * i - 0.001 * seed * i}
            for i, arm in enumerate(names) for percent in (36, 67) for seed in range(2) for child in range(2)]
    rows += [{"arm": "dense", "percent": 0, "seed": seed, "child": 0, "failed": None, "accuracy": 0.95} for seed in range(2)]
    rows += [{"arm": names[-1], "percent": 67, "seed": 2, "child": 0, "failed": "diverged at step 3", "accuracy": np.nan}]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("masks") / "store")


def masks(store: Store, names: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [compared(store, {arm: drawn(100 * seed + i, 32 - 32 * percent // 100) for i, arm in enumerate(names)},
                     100 * len(names) + seed, percent, dead={"imp": 2}) for seed in range(2) for percent in (25, 75)]
    return overlap.overlaps(store, rows), overlap.layers(store, rows)


def test_the_examples_of_names_hold():
    assert doctest.testmod(arms).failed == 0


def test_arms_are_ordered_by_family_and_each_once():
    assert arms.ordered([*reversed(MANY), "dense", "imp"])[:8] == [
        "dense", "imp", "ltr", "ltr_500", "large_batch", "early_stopped", "one_shot", "distilled"]
    groups = arm_figures.families([*reversed(MANY), "dense"])
    assert list(groups) == [*arms.FAMILIES]
    assert sorted(name for names in groups.values() for name in names) == sorted(MANY)
    assert groups[arms.OTHERS] == ["theirs"]
    assert set(groups[arms.CHANGED]) == {name for name in MANY if arms.split(name)[1]}
    assert [name for name in MANY if arms.is_control(name)] == ["distilled_shuffled", "distilled_reinit", "distilled_signs"]


def test_every_control_and_scope_of_the_study_is_known_here():
    from dpkit.stages import CONTROLS, SUFFIXES
    assert {f"_{name}" for name in CONTROLS} == set(arms.CONTROLS)
    assert {f"_{name}" for name in SUFFIXES} == set(arms.SCOPES)
    assert len({arms.called(name) for name in MANY}) == len(MANY)


def test_no_two_arms_of_a_figure_look_alike():
    for names in (MANY, *arm_figures.families(MANY).values()):
        looks = arm_figures.look(names)
        assert len({(style["color"], style["linestyle"], style["marker"]) for style in looks.values()}) == len(names)
    for names in arm_figures.families(MANY).values():
        assert len({style["marker"] for style in arm_figures.look(names).values()}) == len(names)
    plain = [name for name in MANY if not arms.split(name)[1] and name in frames.TITLES]
    for names in arm_figures.families(plain).values():  # in one panel colours are told apart, or else the line style
        looks = arm_figures.look(names)
        for a, b in combinations(names, 2):
            if looks[a]["linestyle"] == looks[b]["linestyle"]:
                assert np.linalg.norm(lab(looks[a]["color"], np.eye(3)) - lab(looks[b]["color"], np.eye(3))) > 10, (a, b)
    assert figures.colour("distilled_shuffled") == figures.COLOURS["distilled"]
    assert figures.colour("ltr_500") == figures.COLOURS["ltr"]


def test_averages_leave_out_what_failed_or_is_not_defined():
    table = pd.DataFrame({"arm": "imp", "seed": [0, 0, 1, 2, 3], "x": [-0.2, -0.4, 1.5, np.nan, 9.0],
                          "failed": [None, None, None, None, "diverged"]})
    row = arms.averages(table, ["arm"], "x").iloc[0]
    assert (row["mean"], row["n"]) == (pytest.approx(0.6), 2)
    assert row["high"] - row["mean"] == pytest.approx(12.7062 * 0.9, rel=1e-4)  # neither end is cut
    assert arms.averages(table.iloc[:0], ["arm"], "x").empty
    assert list(arms.averages(table.iloc[:1], ["arm"], "x").iloc[0][["low", "high"]]) == [-0.2, -0.2]


def test_differences_are_paired_by_initialisation():
    table = tickets(["imp", "dm", "random"])
    pairs = arms.paired(table[~((table["arm"] == "imp") & (table["seed"] == 1) & (table["percent"] == 36))], "accuracy")
    found = pairs.set_index(["arm", "percent", "seed"])["difference"].to_dict()
    assert found == {("dm", 36, 0): pytest.approx(0), ("dm", 67, 0): pytest.approx(-0.01), ("dm", 67, 1): pytest.approx(-0.011),
                     ("random", 36, 0): pytest.approx(0), ("random", 67, 0): pytest.approx(-0.02),
                     ("random", 67, 1): pytest.approx(-0.022)}
    assert arms.paired(table[table["arm"] == "dm"], "accuracy").empty
    assert arms.paired(table.iloc[:0], "accuracy").empty


def test_a_grid_of_numbers_has_a_row_an_arm():
    table = arms.number_grid(lambda name: name.upper(), "a.{arm}.b@{percent}", ["imp", "dm"], [36, 67])
    assert table.loc["DM"].tolist() == ["A.DM.B@36", "A.DM.B@67"]
    assert list(table.columns) == ["36%", "67%"]


def test_few_arms_share_a_panel_and_many_have_one_a_family():
    assert len(arm_figures.by_family(tickets(FEW), "accuracy", "accuracy (%)").axes) == 1
    figure = arm_figures.by_family(tickets(MANY), "accuracy", "accuracy (%)")
    assert [panel.get_title(loc="left") for panel in figure.axes] == [*arms.FAMILIES]
    for panel in figure.axes:  # the references are the same everywhere
        lines = {line.get_gid(): line for line in panel.get_lines() if line.get_gid()}
        assert list(lines) == ["dense (n = 2)", "IMP, rewound to start (n = 2)", "random mask (n = 2)"]
        np.testing.assert_allclose(lines["IMP, rewound to start (n = 2)"].get_ydata(), [89.4, 89.4])
    shown = {line.get_label(): line for panel in figure.axes for line in panel.get_lines() if not line.get_gid()}
    assert set(shown) == {f"{figures.title(name)} (n = 2)" for name in MANY if name not in arm_figures.REFERENCES}
    i = MANY.index("dm")
    np.testing.assert_allclose(shown["DM (n = 2)"].get_ydata(), [89.4 - 0.05 * i, 89.4 - 1.05 * i])
    assert same_color(shown["DM (n = 2)"].get_color(), figures.COLOURS["dm"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "dense (n = 2)", "IMP, rewound to start (n = 2)", "random mask (n = 2)"]
    ruled = arm_figures.by_family(tickets(MANY).assign(accuracy=lambda t: 1 - t["accuracy"]), "accuracy", "barrier", rule=0.02)
    assert {panel.get_yscale() for panel in ruled.axes} == {"symlog"}


def test_differences_have_a_row_an_arm_and_the_random_mask_does_not_set_the_scale():
    table = tickets([name for name in MANY if name != "random"])
    far = tickets(["imp", "random"])
    far["accuracy"] -= 0.4 * (far["arm"] == "random")
    pairs = arms.paired(pd.concat([table, far[far["arm"] == "random"]]), "accuracy")
    figure = arm_figures.differences(pairs, "points")
    assert [panel.get_title() for panel in figure.axes] == ["36% sparse", "67% sparse"]
    names = [name for names in arm_figures.families(MANY).values() for name in names if name != "imp"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [figures.title(name) for name in names]
    means = {round(float(line.get_ydata()[0]), 3): line.get_xdata()[0] for line in figure.axes[1].get_lines()
             if line.get_marker() == "|"}
    at = dict(zip(names, figure.axes[1].get_yticks(), strict=True))
    assert means[round(float(at["ltr"]), 3)] == pytest.approx(-1.05)
    assert figure.axes[0].get_xlim()[0] > -39
    assert [text.get_text() for panel in figure.axes for text in panel.texts] == ["← −40", "← −41"]


@pytest.mark.parametrize("names", [FEW, MANY], ids=["few", "many"])
def test_figures_of_masks_for_few_arms_and_many(store, names):
    pairs, layers = masks(store, names)
    top = layers[layers["percent"] == 75]
    whole = pairs[(pairs["percent"] == 75) & (pairs["layer"] == "all")]
    made = {"agreement": (whole,), "against_chance": (whole,), "densities": (top,), "unique": (top,), "effective": (layers,),
            "work": (layers,)}
    for name, arguments in made.items():
        function = getattr(overlap_figures, name)
        assert len(function(*arguments).axes) >= 1
        empty = function(arguments[0].iloc[:0])
        assert len(empty.axes[0].texts) == 1, name
        if names is FEW:
            assert picture(function(*arguments)) == picture(function(*arguments)), name  # no warning; equal files


def test_the_matrix_holds_every_pair_once(store):
    pairs, _ = masks(store, FEW)
    whole = pairs[(pairs["percent"] == 75) & (pairs["layer"] == "all")]
    axes = overlap_figures.agreement(whole).axes[0]
    cells = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    assert cells.shape == (3, 3)
    assert np.isfinite(cells).sum() == 6
    for i, a in enumerate(FEW):
        for j in range(i + 1, 4):
            one = whole[(whole["arm_a"] == a) & (whole["arm_b"] == FEW[j])]["excess"].mean()
            assert cells[j - 1, i] == pytest.approx(100 * one)
    assert len(axes.texts) == 6
    low, high = axes.images[0].get_clim()
    assert low == -high  # white is chance


def test_overlap_stands_beside_both_chance_levels(store):
    pairs, _ = masks(store, FEW)
    axes = overlap_figures.against_chance(pairs[pairs["percent"] == 75]).axes[0]
    assert [text.get_text().split(" (n")[0] for text in axes.get_yticklabels()] == [figures.title(n) for n in FEW[1:]]
    side = pairs[(pairs["percent"] == 75) & (pairs["layer"] == "all") & (pairs["arm_a"] == "imp")]
    side = side[side["arm_b"] == "distilled"]
    row = [line.get_xdata()[0] for line in axes.get_lines()  # the ends of the interval are small marks too
           if len(line.get_xdata()) == 1 and line.get_ydata()[0] == 0 and line.get_markersize() > 6]
    assert row == pytest.approx([100 * side[name].mean() for name in ("jaccard_chance", "jaccard_within", "jaccard")])
    alone = overlap_figures.against_chance(pairs, "dm")
    assert [text.get_text() for text in alone.axes[0].texts] == ["no mask to compare with DM"]


def test_panels_of_masks_draw_the_means_in_percent(store):
    _, layers = masks(store, FEW)
    work = overlap_figures.work(layers).axes[0]
    lines = {line.get_label(): line for line in work.get_lines()}
    mean = layers[(layers["arm"] == "imp") & (layers["layer"] == "all")].groupby("percent")["flops_kept"].mean()
    np.testing.assert_allclose(lines["IMP, rewound to start (n = 2)"].get_ydata(), 100 * mean)
    np.testing.assert_allclose(lines["all layers alike"].get_ydata(), [75, 25])
    effective = {line.get_label(): line for line in overlap_figures.effective(layers).axes[0].get_lines()}
    np.testing.assert_allclose(effective["IMP, rewound to start (n = 2)"].get_ydata(), [100 * (1 - 22 / 32), 100 * (1 - 6 / 32)])
    np.testing.assert_allclose(effective["all weights on a path"].get_ydata(), [25, 75])
    density = overlap_figures.densities(layers[layers["percent"] == 75]).axes[0]
    assert [text.get_text() for text in density.get_xticklabels()] == ["conv0", "classifier"]
    bars = overlap_figures.unique(layers[layers["percent"] == 75]).axes[0].patches
    mean = layers[(layers["percent"] == 75) & (layers["layer"] == "all")].groupby("arm")["unique_share"].mean()
    np.testing.assert_allclose([bar.get_width() for bar in bars], [100 * mean[name] for name in FEW])


def test_early_bird_panels_share_one_scale(store):
    rows = [watched(store, source, seed, [0, 10, 100], scale)
            for source, scale in (("idc", 0.1), ("real", 0.2)) for seed in range(2)]
    figure = overlap_figures.early_bird(overlap.early_bird(store, rows))
    first, second, _ = figure.axes
    assert (first.get_title(), second.get_title()) == ("all real data\n100 steps (n = 2)", "IDC\n100 steps (n = 2)")
    np.testing.assert_allclose(second.images[0].get_array(), [[0, 10, 20], [10, 0, 10], [20, 10, 0]])
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, pytest.approx(40))
    assert len(overlap_figures.early_bird(overlap.early_bird(store, [])).axes[0].texts) == 1


@pytest.mark.parametrize("names", [FEW, MANY], ids=["few", "many"])
def test_paths_show_every_arm_at_every_sparsity(names):
    rows = [{"arm": arm, "percent": percent, "seed": seed, "pair": "0-1", "alphas": a, "errors": 0.1 + 0.01 * i + a * (1 - a)}
            for i, arm in enumerate(names) for percent in (36, 67) for seed in range(2) for a in (0.0, 0.5, 1.0)]
    rows += [{"arm": "dense", "percent": 0, "seed": 0, "pair": "0-1", "alphas": a, "errors": 0.05} for a in (0.0, 0.5, 1.0)]
    figure = arm_figures.paths_by_family(pd.DataFrame(rows))
    picture(figure)
    tops = {round(float(max(line.get_ydata())), 6) for axes in figure.axes for line in axes.lines}
    assert {round(100 * (0.35 + 0.01 * i), 6) for i in range(len(names))} <= tops
    assert round(100 * 0.05, 6) in tops
    if names is MANY:
        titles = {axes.get_title(loc="left") for axes in figure.axes} - {""}
        assert titles == {arms.family(name) for name in names if name != "imp"}
    assert arm_figures.paths_by_family(pd.DataFrame()).axes


def test_a_crowd_of_controls_has_colours_for_what_was_changed():
    changed = ("weights", "shuffled", "reinit", "signs", "borrowed", "transferred")
    crowd = [f"{arm}_{word}" for arm in ("imp", "distilled") for word in changed] + ["distilled_norm_only"]
    styles = arm_figures.look(crowd)
    assert len({(s["color"], s["linestyle"]) for s in styles.values()}) == len(crowd)
    assert len({s["color"] for s in styles.values()}) == 7
    assert {styles[f"imp_{word}"]["linestyle"] for word in changed} == {"-"}
    assert {styles[f"distilled_{word}"]["linestyle"] for word in changed} == {"--"}
    few = arm_figures.look(["imp", "imp_shuffled"])
    assert few["imp_shuffled"]["color"] == few["imp"]["color"]  # of a few a control has its arm's
