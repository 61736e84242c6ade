"""Tidy frames from the store: one row a network, path, plane or spectrum, with the key that it came from."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dpkit.statistics import mean_interval
from dpkit.store import Artifact, Store

#: how the arms and sets are called in figures and tables
TITLES = {"dense": "dense", "imp": "IMP, rewound to start", "ltr": "IMP, rewound to early step",
          "distilled": "distilled pruning (IDC)", "random_real": "random real subset", "random": "random mask",
          "idc": "IDC", "idc_factor1": "IDC, factor 1", "dc": "DC", "dsa": "DSA", "dm": "DM", "mtt": "MTT",
          "generator": "diffusion model", "herding": "herding", "k_center": "k-center", "el2n": "EL2N, easiest",
          "all_data": "all data"}


#: what each stage measures: a frame has these columns even where nothing came out
MEASURES = {"network": ("error", "loss", "train_loss", "steps", "points"),
            "path": ("error_barrier", "loss_barrier", "stable"), "plane": ("highest_error", "lowest_error"),
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
            parts.append(part.assign(**place, key=key))
    if not parts:
        return pd.DataFrame(columns=list(dict.fromkeys([*names, *(name for place, _ in rows for name in place), "key"])))
    return pd.concat(parts, ignore_index=True)


def summary(table: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean, interval and n of a fraction ``column`` for each group, over seeds (rows of one seed are averaged first).

    Intervals are cut to [0, 1], as those of the printed numbers are.
    """
    records = []
    for place, group in table[table["failed"].isna()].groupby(by, sort=False):
        values = group.groupby("seed")[column].mean().tolist()
        mean, low, high = mean_interval(values)
        records.append({**dict(zip(by, place if isinstance(place, tuple) else (place,), strict=True)), "mean": mean,
                        "low": mean if low is None else max(0.0, low),
                        "high": mean if high is None else min(1.0, high), "n": len(values)})
    return pd.DataFrame.from_records(records, columns=[*by, "mean", "low", "high", "n"])
