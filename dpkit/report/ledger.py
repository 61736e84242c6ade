"""What the mask searches cost: images, operations and time, with and without making the small set."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from dpkit.report.arms import called, is_control, ordered
from dpkit.report.format import number_text, significant, value_text
from dpkit.report.frames import costs, frame
from dpkit.report.numbers import Collector, Number, Rows
from dpkit.store import Store

#: names of the ledger's columns in numbers
MEASURES = {"search_points": "points", "search_stored_points": "stored_points", "search_flops": "flops",
            "search_seconds": "seconds", "search_seconds_with_set": "seconds_with_set"}
COLUMNS = ["arm", "percent", "seed", "networks", *list(MEASURES.values())[:4], "set_seconds", "set_network_seconds",
           "seconds_with_set", "failed", "keys"]


@dataclass(frozen=True)
class Claimed:
    """A factor that the papers report. measure: of :data:`MEASURES`; factor: IMP's cost over distilled pruning's, at most."""

    measure: str
    factor: float
    words: str
    source: str


#: Real data: 300 epochs of 50,000 images in each round. Distilled: 1000 epochs of 10 stored images a class, decoded by 2 x 2.
#: That the reported 150 counts stored images follows from these settings of the authors' code; the paper does not say so.
PAPER = (Claimed("search_stored_points", 300 * 50_000 / (1000 * 100), "images processed, as stored",
                 "arXiv 2310.18769, inferred"),
         Claimed("search_points", 300 * 50_000 / (1000 * 400), "images processed, decoded ones counted",
                 "from the settings of the authors' code"),
         Claimed("search_seconds", 5.0, "time to a ticket of equal sparsity, the set not counted", "arXiv 2307.03364"))


def searches(store: Store, rows: Rows) -> pd.DataFrame:
    """One row for each network that a search trained, or for the ticket of a score at initialisation, of searches that are whole.

    Beside the columns of :func:`dpkit.report.frame`: stored_points (a decoded image counts as one over the number that its
    stored one decodes into, so that images are counted as stored) and flops (training on the points, pruned weights counted,
    as the machine multiplies by them). A search of which a network is missing or failed has no cost yet and is left out.
    rows: places have arm, percent, seed, pieces (how many the whole search has), networks (how many of them are networks), part
    (of a training that counts), decoded (images that a stored one decodes into) and image_flops (of one image); of a score
    also points.
    """
    table = frame(store, list(rows), "network")
    if not len(table):
        return table
    table = table[table["failed"].isna()]
    whole = table.groupby(["arm", "percent", "seed"])["key"].transform("size") == table["pieces"]
    table = table[whole]
    table = table.assign(points=table["points"] * table["part"], seconds=table["seconds"] * table["part"])
    return table.assign(stored_points=table["points"] / table["decoded"], flops=table["points"] * table["image_flops"])


def ledger(store: Store, searched: Rows, sets: Rows = ()) -> pd.DataFrame:
    """One row for each search: its networks, points (images processed), stored_points, flops, seconds (of the processor on a
    CPU, by the clock on a GPU); set_seconds of making the small set, set_network_seconds of the networks on real data that
    this rests on, seconds_with_set, all three together (NaN while a set that it needs is not made); keys of all that counts.

    searched: of :func:`searches`; sets: rows whose place says arm, percent, seed, and the key of the search's small set. Arms
    without a set have none to make. A set is counted in full for each search, though several may share it.
    """
    table = searches(store, searched)
    keys = ["arm", "percent", "seed"]
    if not len(table):
        return pd.DataFrame(columns=COLUMNS)
    amounts = {name: (name, "sum") for name in ("points", "stored_points", "flops", "seconds")}
    found = table.groupby(keys, sort=False).agg(networks=("networks", "first"), keys=("key", list), **amounts)
    needed = [(tuple(place[name] for name in keys), place, key) for place, key in sets]
    made = costs(store, [(place, key) for _, place, key in needed])
    made = made[made["failed"].isna()]
    spent = made.groupby(keys)[["own_seconds", "network_seconds"]].sum() if len(made) else pd.DataFrame()
    complete = {place: all(key in set(made["key"]) for at, _, key in needed if at == place) for place in found.index}
    for name, column in (("set_seconds", "own_seconds"), ("set_network_seconds", "network_seconds")):
        found[name] = [(float(spent.at[place, column]) if place in spent.index else 0.0) if complete[place] else float("nan")
                       for place in found.index]
    found["seconds_with_set"] = found["seconds"] + found["set_seconds"] + found["set_network_seconds"]
    found["keys"] = [[*own, *(key for at, _, key in needed if at == place)]
                     for place, own in zip(found.index, found["keys"], strict=True)]
    return found.assign(failed=None).reset_index()[COLUMNS]


def numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """``tickets.ARM.search_points@P`` and so on (:data:`MEASURES`), means over initialisations, and the ratios
    ``tickets.ARM_over_distilled`` and ``tickets.imp_over_ARM``; controls share the search of their arm and have none."""
    table = ledger(store, list(chapters.get("searches", ())), list(chapters.get("search_sets", ())))
    table = table[~table["arm"].map(is_control).astype(bool)]
    found: list[Number] = []
    for measure, column in MEASURES.items():
        # a row for each artifact that is counted, so that the number leads back to all of them
        rows = table[table[column].notna()].explode("keys").rename(columns={"keys": "key"})
        if "with_set" not in measure:
            rows = rows[rows["key"].isin({key for _, key in chapters.get("searches", ())})]
        chapter = Collector(store, "tickets", rows)
        for name, percent in chapter.places():
            chapter.add(name, percent, measure, column, "mean")
            if name != "distilled":
                chapter.compare((name, percent), ("distilled", percent), measure, column, ratio=True)
            if name not in ("imp", "distilled"):
                chapter.compare(("imp", percent), (name, percent), measure, column, ratio=True)
        found += chapter.found
    return found


def ledger_table(table: pd.DataFrame) -> pd.DataFrame:
    """The ledger as text, a row an arm by family, means over initialisations; controls share the search of their arm and are left
    out."""
    rows = []
    for arm in ordered(name for name in table["arm"] if not is_control(name)):
        part = table[table["arm"] == arm]
        mean = part[[*MEASURES.values(), "set_seconds", "set_network_seconds"]].mean()
        making, whole = "not made yet", "not known yet"
        if part["seconds_with_set"].notna().all():
            networks = f", its networks {_seconds(mean['set_network_seconds'])}" if mean["set_network_seconds"] else ""
            making = _seconds(mean["set_seconds"]) + networks if mean["set_seconds"] or networks else "no set"
            whole = _seconds(mean["seconds_with_set"])
        images = [f"{mean[name]:,.0f}" for name in ("points", "stored_points")]
        rows.append((f"{called(arm)} (n = {len(part)})", int(part["networks"].iloc[0]), *images,
                     f"{significant(mean['flops'])} FLOP", _seconds(mean["seconds"]), making, whole))
    columns = ["search", "networks", "images", "as stored", "operations", "time", "making the set", "with the set"]
    return pd.DataFrame(rows, columns=columns).set_index("search")


def _seconds(value: float) -> str:
    return "< 0.1 s" if value < 0.1 else value_text(value, "seconds")


def beside_paper(known: Mapping[str, Number], percent: int) -> pd.DataFrame:
    """IMP's cost over distilled pruning's: what the papers report as the most, and ours at this sparsity, as text.

    known: numbers by name.
    """
    rows = []
    for claimed in PAPER:
        ours = known.get(f"tickets.imp_over_distilled.{claimed.measure}@{percent}")
        rows.append((claimed.words, f"up to {claimed.factor:g}×", number_text(ours.record()) if ours else "not measured",
                     claimed.source))
    return pd.DataFrame(rows, columns=["IMP over distilled pruning", "reported", "ours", "source"]).set_index(
        "IMP over distilled pruning")
