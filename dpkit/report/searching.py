"""What searches come to: how far the weights of a search's last training go, and how well its network does."""
from __future__ import annotations

import math
from collections.abc import Mapping

from dpkit.report.arms import is_control
from dpkit.report.frames import frame
from dpkit.report.numbers import Collector, Number, Rows
from dpkit.store import Store


def moved(store: Store, key: str) -> float:
    """|w - w0| / |w0| over the surviving weights of a network that was trained from a ticket; NaN without a ticket.

    w: the network's weights, w0: the ticket's, from which it started at initialisation.
    """
    network = store.get(key)
    if "ticket" not in network.meta["parents"]:
        return math.nan
    ticket = store.get(network.meta["parents"]["ticket"])
    start, end, mask = ticket.group("params"), network.group("params"), ticket.group("mask")
    way = sum(float(((end[n].double() - start[n].double()) * m).square().sum()) for n, m in mask.items())
    return math.sqrt(way / sum(float((start[n].double() * m).square().sum()) for n, m in mask.items()))


def numbers(store: Store, chapters: Mapping[str, Rows]) -> list[Number]:
    """``tickets.ARM.search_distance@P``: :func:`moved` of the last network that the search for a ticket trained, where that
    started from a ticket (from the second round on), and ``search_accuracy``, that network's on test images; controls share the
    search of their arm and have none."""
    rows = [(place, key) for place, key in chapters.get("searches", ())
            if 1 <= place["search_round"] == place["pieces"] - 1 and not is_control(place["arm"])]
    table = frame(store, rows, "network")
    if not len(table):
        return []
    distances = [moved(store, key) if failed is None else math.nan
                 for key, failed in zip(table["key"], table["failed"], strict=True)]
    table = table.assign(accuracy=1 - table["error"], distance=distances)
    chapter = Collector(store, "tickets", table[table["distance"].notna()])
    for arm, percent in chapter.places():
        chapter.add(arm, percent, "search_distance", "distance", "length")
        chapter.add(arm, percent, "search_accuracy", "accuracy")
    return chapter.found
