"""Figures of connectivity from made-up frames: what they show, and that many arms, one seed, nothing and failures have one."""
from __future__ import annotations

import io
import math
import warnings
from itertools import combinations

import pandas as pd
import pytest
from matplotlib.figure import Figure

from dpkit.report import apart_figures, between_figures, connectivity, connectivity_figures, figures
from dpkit.report.figures import mean_line

ARMS = ("dense", "imp", "ltr", "large_batch", "distilled", "dm", "mtt", "random_real", "herding", "el2n", "snip", "grasp",
        "synflow", "random", "imp_weights", "distilled_shuffled")


def made_up(arms, seeds: int = 2, extra=({},), failed: str | None = None) -> pd.DataFrame:
    """A frame of paths; all values NaN where all failed."""
    records = []
    for i, arm in enumerate(arms):
        for percent in (0,) if arm == "dense" else (36, 67):
            for seed in range(seeds):
                for more in extra:
                    value = float("nan") if failed else 0.3 * math.exp(-i) + 0.01 * seed
                    records.append({"arm": arm, "round": percent // 30, "percent": percent, "seed": seed, "pair": "0-1",
                                    "error_barrier": value, "error_barrier_linear": value / 2, "stable": value < 0.02,
                                    "barrier": value, "others_barrier": value, "failed": failed, "key": str(len(records)),
                                    **more})
    columns = ["arm", "round", "percent", "seed", "pair", "error_barrier", "error_barrier_linear", "stable", "barrier",
               "others_barrier", "failed", "key", *extra[0]]
    return pd.DataFrame.from_records(records, columns=list(dict.fromkeys(columns)))


def pairs_of_arms(table: pd.DataFrame) -> pd.DataFrame:
    names = [a for a in dict.fromkeys(table["arm"]) if a != "dense"]
    parts = [table[(table["arm"] == a) & (table["percent"] == 67)].assign(other=b) for a, b in combinations(names, 2)]
    return pd.concat(parts, ignore_index=True) if parts else table.iloc[:0].assign(other="")


BY_STEP = tuple({"step": int(40 * e), "epochs": e} for e in (0.0, 0.25, 0.5, 1.0))
BY_LAYER = tuple({"layer": f"blocks.{i}.conv.weight", "position": i} for i in range(3))
BY_STATISTICS = tuple({"statistics": which} for which in connectivity.STATISTICS)
BY_ROUND = tuple({"round": i, "other_round": i + 1} for i in range(2))
DRAWN = {"definitions": (connectivity_figures.definitions, ({},)), "statistics": (connectivity_figures.statistics, BY_STATISTICS),
         "train_and_test": (lambda table: connectivity_figures.train_and_test(table, table), ({},)),
         "instability": (connectivity_figures.instability, BY_STEP), "spawn_map": (connectivity_figures.spawn_map, BY_STEP),
         "layers": (lambda table: between_figures.layers(table[table["percent"] != 36]), BY_LAYER),
         "rounds": (between_figures.rounds, BY_ROUND),
         "solution": (between_figures.solution, ({},)),
         "between_arms": (lambda table: between_figures.between_arms(pairs_of_arms(table), table[table["percent"] == 67]), ({},))}


def drawn(figure: Figure) -> None:
    """Draws the figure; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=40)


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_for_many_arms_one_seed_nothing_and_failures(name):
    draw, extra = DRAWN[name]
    drawn(draw(made_up(ARMS, 2, extra)))
    drawn(draw(made_up(("dense", "imp", "distilled"), 1, extra)))
    for table in (made_up((), 1, extra), made_up(ARMS[:3], 1, extra, failed="diverged")):
        empty = draw(table)
        assert len(empty.axes) == 1
        assert len(empty.axes[0].texts) == 1
        drawn(empty)


@pytest.mark.parametrize("name", ["definitions", "statistics", "train_and_test", "instability", "spawn_map", "layers"])
def test_the_dense_network_alone_has_a_figure(name):
    draw, extra = DRAWN[name]
    figure = draw(made_up(("dense",), 1, extra))
    assert any("dense" in text.get_text() for axes in figure.axes for text in figure.findobj(type(axes.title)))
    drawn(figure)


def test_the_map_has_sparsities_above_the_dense_network():
    table = made_up(("dense", "imp"), 2, BY_STEP)
    table.loc[(table["arm"] == "imp") & (table["percent"] == 67) & (table["epochs"] == 0.5), "error_barrier"] = 0.5
    table = table[~((table["arm"] == "imp") & (table["percent"] == 36) & (table["epochs"] == 1.0))]
    axes = connectivity_figures.spawn_map(table).axes[0]
    values = axes.images[0].get_array()
    assert values.shape == (3, 4)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["67%", "36%", "dense"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.25", "0.5", "1"]
    assert values[0].tolist() == pytest.approx([100 * (0.3 / math.e + 0.005)] * 2 + [50] + [100 * (0.3 / math.e + 0.005)])
    assert values[2].tolist() == pytest.approx([30.5] * 4)
    assert bool(values.mask[1, 3])
    colours = axes.images[0].to_rgba(pd.Series([1.9, 2.1]).to_numpy())
    assert colours[0][2] > colours[0][0]  # blue below two points
    assert colours[1][0] > colours[1][2]  # and red above


def test_the_matrix_has_arms_below_the_diagonal_and_children_on_it():
    table = made_up(("imp", "distilled", "random"))
    pairs = pairs_of_arms(table).assign(error_barrier_linear=[0.1, 0.3, 0.2, 0.2, 0.6, 0.6])
    reverse = pairs.rename(columns={"arm": "other", "other": "arm"})  # a path has no direction
    for some in (pairs, reverse):
        axes = between_figures.between_arms(some, table[table["percent"] == 67]).axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["IMP, rewound to start", "distilled pruning (IDC)",
                                                                        "random mask"]
        assert [text.get_text() for text in axes.texts] == ["15", "20", "5.8", "20", "60", "2.3"]
        axes = between_figures.between_arms(some).axes[0]
        assert [text.get_text() for text in axes.texts] == ["20", "20", "60"]


def test_lines_and_marks_carry_the_means():
    table = made_up(("dense", "imp"), 2, BY_STEP)
    panels = connectivity_figures.instability(table).axes
    found = {line.get_label(): list(line.get_ydata()) for line in panels[1].lines}
    assert found["dense (n = 2)"] == pytest.approx([30.5] * 4)
    assert found["IMP, rewound to start (n = 2)"] == pytest.approx([100 * (0.3 / math.e + 0.005)] * 4)
    marks = connectivity_figures.definitions(made_up(("dense", "imp"), 2)).axes[1]
    words = [text.get_text() for text in marks.texts]
    assert words == ["0/2", "0/2", "stable"]
    places = sorted(line.get_xdata()[0] for line in marks.lines if line.get_marker() == "o" and len(line.get_xdata()))
    assert places == pytest.approx(sorted(x for v in (30.5, 100 * (0.3 / math.e + 0.005)) for x in (v / 2, v)))
    chain = between_figures.rounds(made_up(("imp",), 2, BY_ROUND)).axes[0]
    assert [text.get_text() for text in chain.get_xticklabels()] == ["0–1", "1–2"]
    layer = between_figures.layers(made_up(("imp",), 2, BY_LAYER)).axes[0]
    assert [text.get_text() for text in layer.get_xticklabels()] == ["blocks.0.conv", "blocks.1.conv", "blocks.2.conv"]


def test_networks_of_other_sparsity_are_above_the_line_and_without_the_rule_of_two_points():
    chain = between_figures.rounds(made_up(("imp",), 2, BY_ROUND))
    assert chain._supylabel.get_text() == "error barrier above the line (points)"
    heights = [y for line in chain.axes[0].lines for y in line.get_ydata() if len(line.get_ydata()) == 2]
    assert max(heights) == pytest.approx(100 * (0.3 + 0.005) / 2)  # half of error_barrier in this frame
    path = between_figures.rounds(made_up(("imp",), 2, BY_ROUND), "error_barrier")
    assert path._supylabel.get_text() == "error barrier (points)"
    small = between_figures.solution(made_up(("distilled",), 2).assign(percent=lambda t: t["percent"].replace(36, 0)))
    assert [text.get_text() for text in small.axes[0].get_xticklabels()] == ["dense", "67"]
    for figure, ruled in ((chain, False), (path, True), (small, False)):
        words = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert any("stable" in text for text in words) == ruled


def test_layers_may_lie_below_zero():
    table = made_up(("imp",), 2, BY_LAYER).assign(barrier=-0.04, others_barrier=-0.1)
    table.loc[table["seed"] == 1, "others_barrier"] = -0.102
    panel = between_figures.layers(table).axes[0]
    low = panel.get_ylim()[0]
    assert low < -100 * (0.101 + 12.7 * 0.001)  # the whole interval of two initialisations
    marks = [y for line in panel.lines for y in line.get_ydata() if line.get_marker() == "o"]
    assert min(marks) == pytest.approx(-10.1)
    assert "−10" in [text.get_text() for text in panel.get_yticklabels()]
    assert between_figures.layers(made_up(("imp",), 2, BY_LAYER)).axes[0].get_ylim()[0] == pytest.approx(-0.15)


def test_mean_lines_are_of_the_positions_that_all_lines_have():
    lines = pd.DataFrame([{"arm": "imp", "percent": 67, "seed": seed, "pair": "0-1", "alphas": a, "errors": 0.1 + 0.1 * seed}
                          for seed in range(2) for a in (0.0, 0.5, 1.0, *([0.25] if seed else []))])
    assert mean_line(lines).to_dict() == pytest.approx({0.0: 0.15, 0.5: 0.15, 1.0: 0.15})
    thick = [line for line in figures.paths(lines).axes[0].lines if line.get_linewidth() == 2]
    assert list(thick[0].get_xdata()) == [0.0, 0.5, 1.0]


def distances(arms, seeds: int = 2) -> pd.DataFrame:
    """Distances by layer; all arms' first layers are equally far apart."""
    return pd.DataFrame([{"arm": arm, "percent": 67 if arm != "dense" else 0, "seed": seed, "layer": f"conv{i}.weight",
                          "position": i, "step": 0.1 + 0.1 * i + 0.02 * seed, "cosine": 0.9 - 0.2 * i, "failed": None}
                         for arm in arms for seed in range(seeds) for i in range(3)])


def test_distances_by_layer_are_drawn_from_the_input_on():
    figure = apart_figures.layers(distances(("dense", "imp", "distilled")))
    drawn(figure)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["conv0", "conv1", "conv2"]
    means = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert means["IMP, rewound to start (n = 2)"] == pytest.approx([0.9, 0.7, 0.5])
    drawn(apart_figures.layers(distances(ARMS, 1)))
    drawn(apart_figures.layers(distances(())))


def test_churn_is_a_bar_of_what_it_consists_of():
    table = made_up(("dense", "imp"), 2).assign(disagreement=0.1, churn_gains=0.03, churn_losses=0.05, churn_sideways=0.02,
                                                churn_needless=0.08)
    figure = apart_figures.churn(table)
    drawn(figure)
    bars = figure.axes[0].patches[:3]
    assert [bar.get_width() for bar in bars] == pytest.approx([3, 5, 2])
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 3, 8])
    ticks = [line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"
             and line.get_xdata()[0] == line.get_xdata()[1]]
    assert ticks[0] == pytest.approx(2)  # the difference of the errors
    assert len(figure.axes[0].get_yticklabels()) == 3
    for none in (table.iloc[:0], table.assign(failed="diverged")):
        drawn(apart_figures.churn(none))
