"""The cost of mask searches, from made-up networks and sets in a real store, against sums worked out by hand."""
from __future__ import annotations

import math

import pytest
from test_report import found, put

from dpkit.report import arm_figures, ledger
from dpkit.store import Store, key_for

FLOPS = 6.0  # of training on one image


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def searched(store: Store, arm: str, seed: int, rounds: list[tuple[float, float] | None], networks: int = 2,
             decoded: int = 1, of: str = "") -> list[tuple[dict, str]]:
    """Rows of the ledger: (training points, processor seconds) of each network, None for one that diverged."""
    return [({"arm": arm, "round": 2, "percent": 67, "seed": seed, "search_round": i, "pieces": networks, "networks": networks,
              "part": 1.0, "decoded": decoded, "image_flops": FLOPS},
             put(store, f"{of or arm} search {seed} {i}", {"points": spent[0]} if spent else None,
                 cpu=spent[1] if spent else 0.0))
            for i, spent in enumerate(rounds)]


def small_set(store: Store, arm: str, seed: int, own: float, network: float = 0.0) -> tuple[dict, str]:
    """The set of an arm's search, made in ``own`` seconds on a network that took ``network`` seconds."""
    parents = {}
    if network:
        parents["network0"] = key_for("network", 1, {"of": arm}, {})
        store.put(parents["network0"], stage="network", version=1, spec={"of": arm}, parents={}, tensors={},
                  result={"error": 0.1}, seconds=0.0, extra={"device": "cpu", "cpu_seconds": network})
    key = key_for("distill", 1, {"set": arm}, parents)
    store.put(key, stage="distill", version=1, spec={"set": arm}, parents=parents, tensors={}, result={"stored_images": 10},
              seconds=0.0, extra={"device": "cpu", "cpu_seconds": own})
    return {"arm": arm, "round": 2, "percent": 67, "seed": seed}, key


def test_the_cost_of_a_search_is_the_sum_over_its_networks(store):
    rows = [*searched(store, "imp", 0, [(1000, 4.0), (3000, 4.0)]), *searched(store, "imp", 1, [(1000, 9.0), (3000, 9.0)]),
            *searched(store, "distilled", 0, [(100, 1.0), (100, 1.0)], decoded=4),
            *searched(store, "distilled", 1, [(100, 2.0), (300, 7.0)], decoded=4)]
    known = found(store, searches=rows)
    assert known["tickets.imp.search_points@67"].value == 4000
    assert known["tickets.imp.search_stored_points@67"].value == 4000
    assert known["tickets.imp.search_flops@67"].value == 4000 * FLOPS
    assert known["tickets.distilled.search_points@67"].value == pytest.approx(300)
    assert known["tickets.distilled.search_stored_points@67"].value == pytest.approx(75)
    ratio = known["tickets.imp_over_distilled.search_seconds@67"]
    assert (ratio.value, ratio.n) == (pytest.approx(math.sqrt(8 / 2 * 18 / 9)), 2)
    assert ratio.low < ratio.value < ratio.high
    # four times as many images as stored: the two counts of the same search differ by the factor that images decode into
    ways = [known[f"tickets.imp_over_distilled.search_{name}@67"].value for name in ("points", "stored_points", "flops")]
    assert ways[1] == pytest.approx(4 * ways[0])
    assert ways[2] == pytest.approx(ways[0])


def test_the_cost_with_the_set_counts_the_set_and_its_networks(store):
    rows = [*searched(store, "imp", 0, [(1000, 40.0), (1000, 40.0)]), *searched(store, "distilled", 0, [(100, 1.0), (100, 1.0)]),
            *searched(store, "herding", 0, [(100, 1.0), (100, 2.0)]), *searched(store, "dm", 0, [(100, 1.0), (100, 2.0)])]
    missing = ({"arm": "dm", "round": 2, "percent": 67, "seed": 0}, "0" * 64)
    sets = [small_set(store, "distilled", 0, 8.0), small_set(store, "herding", 0, 0.5, 30.0), missing]
    known = found(store, searches=rows, search_sets=sets)
    assert known["tickets.distilled.search_seconds_with_set@67"].value == 10.0
    assert known["tickets.herding.search_seconds_with_set@67"].value == pytest.approx(33.5)
    assert known["tickets.imp.search_seconds_with_set@67"].value == 80.0  # it has no set to make
    assert known["tickets.imp_over_distilled.search_seconds@67"].value == pytest.approx(40)
    assert known["tickets.imp_over_distilled.search_seconds_with_set@67"].value == pytest.approx(8)
    assert known["tickets.imp_over_herding.search_seconds_with_set@67"].value == pytest.approx(80 / 33.5)
    assert "tickets.dm.search_seconds@67" in known
    assert "tickets.dm.search_seconds_with_set@67" not in known  # its set is not made
    used = {artifact.key for _, _, artifact in store.lineage(known["tickets.distilled.search_seconds_with_set@67"].key)}
    assert {sets[0][1], rows[2][1], rows[3][1]} <= used
    used = {artifact.key for _, _, artifact in store.lineage(known["tickets.distilled.search_seconds@67"].key)}
    assert used == {rows[2][1], rows[3][1], known["tickets.distilled.search_seconds@67"].key}


def test_a_search_that_is_not_whole_has_no_cost(store):
    rows = [*searched(store, "imp", 0, [(1000, 4.0), (3000, 4.0)]), *searched(store, "imp", 1, [(1000, 9.0), None]),
            *searched(store, "imp", 2, [(1000, 9.0)]), *searched(store, "distilled", 0, [(100, 1.0), None]),
            *searched(store, "one_shot", 0, [(1000, 4.0)], networks=1)]
    known = found(store, searches=rows)
    assert {name: (n.value, n.n) for name, n in known.items() if "points" in name and "stored" not in name} == {
        "tickets.imp.search_points@67": (4000, 1), "tickets.one_shot.search_points@67": (1000, 1),
        "tickets.imp_over_one_shot.search_points@67": (pytest.approx(4), 1)}
    assert known["tickets.imp.search_seconds@67"].value == 8.0
    assert ledger.ledger(store, []).empty
    assert ledger.ledger(store, rows[2:4]).empty
    assert list(ledger.ledger(store, []).columns) == list(ledger.ledger(store, rows).columns) == ledger.COLUMNS


def test_controls_share_the_search_of_their_arm(store):
    rows = [*searched(store, "imp", 0, [(1000, 4.0), (3000, 4.0)]),
            *searched(store, "imp_shuffled", 0, [(1000, 4.0), (3000, 4.0)], of="imp")]
    known = found(store, searches=rows)
    assert {name.split(".")[1] for name in known} == {"imp"}
    table = ledger.ledger(store, rows)
    assert list(ledger.ledger_table(table).index) == ["IMP, rewound to start (n = 1)"]
    assert [text.get_text() for text in arm_figures.cost(table).axes[0].get_yticklabels()] == ["IMP, rewound to start"]


def test_the_ledger_as_text_says_what_is_not_known(store):
    rows = [*searched(store, "distilled", 0, [(100, 1.0), (100, 1.0)], decoded=4), *searched(store, "imp", 0, [(1000, 60.0)] * 2),
            *searched(store, "herding", 0, [(100, 1.0), (100, 2.0)]), *searched(store, "dm", 0, [(100, 1.0), (100, 2.0)])]
    sets = [small_set(store, "distilled", 0, 8.0), small_set(store, "herding", 0, 0.5, 30.0), ({**rows[-1][0]}, "0" * 64)]
    text = ledger.ledger_table(ledger.ledger(store, rows, sets))
    assert [name.split(" (n")[0] for name in text.index] == ["IMP, rewound to start", "distilled pruning (IDC)", "DM", "herding"]
    assert text.loc["distilled pruning (IDC) (n = 1)"].tolist() == [2, "200", "50", "1,200 FLOP", "2.0 s", "8.0 s", "10.0 s"]
    assert text.loc["herding (n = 1)", "making the set"] == "0.5 s, its networks 30.0 s"
    assert text.loc["DM (n = 1)", ["making the set", "with the set"]].tolist() == ["not made yet", "not known yet"]
    assert text.loc["IMP, rewound to start (n = 1)", ["making the set", "with the set"]].tolist() == ["no set", "2.0 min"]


def test_reported_factors_stand_beside_ours(store):
    rows = [*searched(store, "imp", 0, [(3000, 4.0)] * 2), *searched(store, "distilled", 0, [(100, 1.0)] * 2, decoded=4)]
    table = ledger.beside_paper(found(store, searches=rows), 67)
    assert table["reported"].tolist() == ["up to 150×", "up to 37.5×", "up to 5×"]
    assert [text.split(" ")[0] for text in table["ours"]] == ["120×", "30.0×", "4.00×"]
    assert ledger.beside_paper({}, 67)["ours"].tolist() == ["not measured"] * 3


def test_the_figure_of_costs_marks_search_and_set(store):
    rows = [*searched(store, "imp", 0, [(1000, 40.0)] * 2), *searched(store, "distilled", 0, [(100, 1.0)] * 2, decoded=4)]
    figure = arm_figures.cost(ledger.ledger(store, rows, [small_set(store, "distilled", 0, 8.0)]))
    images, operations, seconds = figure.axes
    marks = {name: sorted({float(x) for line in panel.get_lines() for x in line.get_xdata() if line.get_marker() == "o"})
             for name, panel in (("images", images), ("operations", operations), ("seconds", seconds))}
    assert marks == {"images": [50, 200, 2000], "operations": [200 * FLOPS, 2000 * FLOPS], "seconds": [2, 10, 80]}
    assert {panel.get_xscale() for panel in figure.axes} == {"log"}
    empty = arm_figures.cost(ledger.ledger(store, []))
    assert [text.get_text() for text in empty.axes[0].texts] == ["no search is whole yet"]


def test_a_part_of_a_training_counts_as_that_part(store):
    (place, key), = searched(store, "imp", 0, [(1000, 40.0)], networks=1)
    table = ledger.ledger(store, [(place | {"part": 0.25}, key)])
    assert table["points"].tolist() == [250]
    assert table["seconds"].tolist() == [10]
    assert table["flops"].tolist() == [250 * place["image_flops"]]


def test_a_score_at_initialisation_costs_what_its_images_take(store):
    key = put(store, "snip ticket", {"sparsity": 0.67, "round": 2}, cpu=0.5)
    place = {"arm": "snip", "round": 2, "percent": 67, "seed": 0, "search_round": 0, "pieces": 1, "networks": 0, "part": 1.0,
             "decoded": 1, "image_flops": 7.0, "points": 100}
    table = ledger.ledger(store, [(place, key), *searched(store, "imp", 0, [(1000, 40.0)] * 2)])
    row = table.set_index("arm").loc["snip"]
    assert (row["networks"], row["points"], row["flops"], row["seconds"]) == (0, 100, 700, 0.5)
