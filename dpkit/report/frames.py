"""Tidy frames from the store: one row a network, path, plane or spectrum, with the key that it came from."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import pandas as pd

from dpkit.statistics import mean_interval
from dpkit.store import Artifact, Store

#: how the arms and sets are called in figures and tables
TITLES = {"dense": "dense", "imp": "IMP, rewound to start", "ltr": "IMP, rewound to early step",
          "distilled": "distilled pruning (IDC)", "random_real": "random real subset", "random": "random mask",
          "idc": "IDC", "idc_factor1": "IDC, factor 1", "dc": "DC", "dsa": "DSA", "dm": "DM", "mtt": "MTT",
          "generator": "diffusion model", "herding": "herding", "k_center": "k-center", "el2n": "EL2N, easiest",
          "all_data": "all data", "distilled_pretrained": "distilled, after early real training",
          "combined": "distilled, then IMP", "large_batch": "IMP, large batches", "early_stopped": "IMP, stopped early",
          "one_shot": "one cut after training", "snip": "SNIP", "grasp": "GraSP", "synflow": "SynFlow"}


#: how the small sets come about, in the order in which they are shown; what others published is none of them
GROUPS = {"learned": ("idc", "idc_factor1", "dc", "dsa", "dm", "mtt"), "generated": ("generator",),
          "chosen": ("random_real", "herding", "k_center", "el2n"), "published": (), "all data": ("all_data",)}

#: what each stage measures: a frame has these columns even where nothing came out
MEASURES = {"network": ("error", "loss", "train_loss", "steps", "points"),
            "path": ("error_barrier", "loss_barrier", "stable"),
            "alignment": ("aligned_barrier", "aligned_loss_barrier", "moved", "l2", "aligned_l2", "cosine", "sparsity_between",
                          "disagreement", "churn_gains", "churn_losses", "churn_sideways", "churn_needless"),
            "robustness": ("clean_error", "mean_corruption_error"),
            "plane": ("highest_error", "lowest_error"), "square": ("highest_error", "lowest_error", "off"),
            "around": ("highest_error", "lowest_error"), "profile": ("error", "loss", "error_rise", "loss_rise"),
            "trajectory": ("outside_start", "outside_halfway"), "layers": ("highest_barrier", "highest_others_barrier"),
            "sharpness": ("sharpness", "sharpness_first", "adaptive_sharpness", "adaptive_first", "average_sharpness",
                          "average_sharpness_error", "adaptive_average", "adaptive_average_error", "fisher_rao",
                          "fisher_rao_error", "loss"),
            "spectrum": tuple(name + end for name in (
                "trace", "top_eigenvalue", "frobenius", "negative_total", "negative_fraction", "rank_entropy",
                "rank_participation", "gn_trace", "gn_top", "fisher_trace") for end in ("", "_error"))
            + ("size", "products", "lowest_eigenvalue", "last_layer_mean", "negative_low", "negative_high"),
            "diagonal": ("exact", "published_mean", "published_mean_error", "published_surviving", "published_surviving_error",
                         "published_loose", "published_loose_error", "size", "surviving"),
            "removed": ("images",), "edge": ("edge_highest", "edge_last"),
            "hessian": ("trace", "trace_error", "top_eigenvalue", "top_eigenvalue_error", "surviving", "trace_per_weight",
                        "diagonal_negative", "diagonal_error", "products")}


def spent(artifact: Artifact) -> float:
    """Seconds that making an artifact took: of the processor on a CPU, by the clock on a GPU.

    Processor seconds do not grow when the machine is busy with other things.
    """
    clock = artifact.meta["seconds"]
    return artifact.meta.get("cpu_seconds", clock) if artifact.meta.get("device") == "cpu" else clock


def frame(store: Store, rows: Iterable[tuple[Mapping[str, Any], str]], stage: str = "") -> pd.DataFrame:
    """One row for each (place, key): the place, the artifact's plain results, its seconds, ``failed`` and ``key``.

    Rows whose artifact is not made yet are left out; rows without a result (a diverged network) stay, with ``failed``
    saying why and NaN for their numbers. With ``stage`` its columns are there even when there is not one result.
    """
    rows, records = list(rows), []
    for place, key in rows:
        if not store.has(key):
            continue
        artifact = store.get(key)
        result = {k: v for k, v in artifact.meta["result"].items() if not isinstance(v, (dict, list))}
        records.append({**place, **result, "seconds": spent(artifact), "failed": artifact.failed, "key": key})
    table = pd.DataFrame.from_records(records)
    places = [name for place, _ in rows for name in place]
    wanted = dict.fromkeys([*places, *MEASURES.get(stage, ()), "seconds", "failed", "key"])
    return table.reindex(columns=[*table.columns, *(name for name in wanted if name not in table.columns)])


def curves(store: Store, rows: Iterable[tuple[Mapping[str, Any], str]], names: Iterable[str]) -> pd.DataFrame:
    """One row for each point of each artifact's curves: the place, ``key``, and the tensors ``names``, all (T,)."""
    rows, names, parts = list(rows), list(names), []
    for place, key in rows:
        if store.has(key) and not store.get(key).failed:
            tensors = store.get(key).tensors
            part = pd.DataFrame({name: tensors[name].double().numpy() for name in names})
            if "alphas" in part:  # 0.3 of one path is that of another, whatever rounding made of it
                part["alphas"] = part["alphas"].round(12)
            parts.append(part.assign(**place, key=key))
    if not parts:
        return pd.DataFrame(columns=list(dict.fromkeys([*names, *(name for place, _ in rows for name in place), "key"])))
    return pd.concat(parts, ignore_index=True)


def group(name: str) -> str:
    """Which of :data:`GROUPS` a set belongs to; a set with soft labels belongs where its images do."""
    plain = name.removesuffix("_soft")
    return next((word for word, names in GROUPS.items() if plain in names), "published")


def costs(store: Store, rows: Iterable[tuple[Mapping[str, Any], str]]) -> pd.DataFrame:
    """What small sets took, one row for each (place, key) that is made.

    Columns: the place; own_seconds of making the set (of soft labels: with the set that they belong to); networks trained on
    real data that it rests on, how many, and their network_seconds; networks_of, those networks' keys; memory, the most bytes
    that the process that made it has held until then, an upper bound; stored_images, training_images; failed; key.
    """
    rows, records = list(rows), []
    for place, key in rows:
        if not store.has(key):
            continue
        found, todo = {}, [key]
        while todo:
            current = todo.pop()
            if current not in found and store.has(current):
                found[current] = store.get(current)
                if found[current].meta["stage"] != "network":  # what a network rests on was not trained for this set
                    todo += found[current].meta["parents"].values()
        networks = {k: a for k, a in found.items() if a.meta["stage"] == "network"}
        own = [a for k, a in found.items() if k not in networks]
        result = found[key].result
        records.append({**place, "own_seconds": sum(map(spent, own)), "networks": len(networks),
                        "network_seconds": sum(map(spent, networks.values())), "networks_of": tuple(sorted(networks)),
                        "memory": max(a.meta.get("peak_memory", 0) for a in own),
                        "stored_images": result.get("stored_images"), "training_images": result.get("training_images"),
                        "failed": found[key].failed, "key": key})
    wanted = dict.fromkeys([*(name for place, _ in rows for name in place), "own_seconds", "networks", "network_seconds",
                            "networks_of", "memory", "stored_images", "training_images", "failed", "key"])
    return pd.DataFrame.from_records(records, columns=list(wanted))


def histories(store: Store, rows: Iterable[tuple[Mapping[str, Any], str]], parts: int = 40) -> pd.DataFrame:
    """The methods' losses while they learned, each over its own first value: losses of different methods have no common unit.

    One row a point: the place, key, share of the steps that are done, in (0, 1], and loss. A history longer than ``parts`` is
    averaged over so many equal parts; then "first" means the first part. Sets without a history are left out.
    """
    rows, found = list(rows), []
    for place, key in rows:
        history = store.get(key).result.get("history") if store.has(key) else None
        if not history or not history[0] > 0:
            continue
        edges = [round(i * len(history) / min(parts, len(history))) for i in range(min(parts, len(history)) + 1)]
        means = [sum(history[a:b]) / (b - a) for a, b in pairwise(edges)]
        found += [{**place, "share": b / len(history), "loss": mean / means[0], "key": key}
                  for b, mean in zip(edges[1:], means, strict=True)]
    wanted = dict.fromkeys([*(name for place, _ in rows for name in place), "share", "loss", "key"])
    return pd.DataFrame.from_records(found, columns=list(wanted))


def summary(table: pd.DataFrame, by: list[str], column: str, span: tuple[float, float] = (0.0, 1.0)) -> pd.DataFrame:
    """Mean, interval and n of a ``column`` for each group, over seeds (rows of one seed are averaged first).

    span: what the measure can be, by default a fraction; intervals are cut to it, as those of the printed numbers are.
    """
    records = []
    for place, group in table[table["failed"].isna()].groupby(by, sort=False):
        values = group.groupby("seed")[column].mean().tolist()
        mean, low, high = mean_interval(values)
        records.append({**dict(zip(by, place if isinstance(place, tuple) else (place,), strict=True)), "mean": mean,
                        "low": mean if low is None else max(span[0], low),
                        "high": mean if high is None else min(span[1], high), "n": len(values)})
    return pd.DataFrame.from_records(records, columns=[*by, "mean", "low", "high", "n"])
