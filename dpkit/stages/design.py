"""Factorial designs: a profile run at every combination of two levels of a few factors, each combination with its own settings.

A factor need not be one parameter. Noise, for example, is a learning rate over a batch size; what belongs to a combination of
levels is written down once, in a file, and every effect is computed from that.
"""
from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkit.stages.profiles import read_yaml

FIELDS = ("profile", "settings", "factors", "runs")


@dataclass(frozen=True)
class Design:
    """A full factorial design of k factors at two levels.

    profile: a name or a file. factors: their names (k,). levels: of each factor, the low one and the high one, in the order in
    which the file has them. runs: settings of each of the 2^k runs by the signs of its levels, -1 low and +1 high.
    """

    profile: str
    factors: tuple[str, ...]
    levels: tuple[tuple[str, str], ...]
    runs: Mapping[tuple[int, ...], dict[str, Any]]

    def name(self, signs: tuple[int, ...]) -> str:
        """A run in words, by its levels: ``low-short-small``."""
        return "-".join(pair[sign > 0] for pair, sign in zip(self.levels, signs, strict=True))


def read_design(path: Path) -> Design:
    """The design in a YAML file with the fields ``profile``, ``settings`` (of all runs), ``factors`` and ``runs``.

    A run names its level of each factor, and under ``set`` the settings that it has beside those of all runs. The level of a
    factor that comes first is the low one. Raises ``ValueError`` with one line where the file is no full design.
    """
    where = f"design {path}"
    found = read_yaml(Path(path), where)
    if not isinstance(found, dict) or set(found) - set(FIELDS) or not {"profile", "factors", "runs"} <= set(found):
        got = ", ".join(map(str, found)) if isinstance(found, dict) else repr(found)
        raise ValueError(f"{where} must have profile, factors and runs, and may have settings; got {got}")
    factors, runs, common = found["factors"], found["runs"], found.get("settings") or {}
    if not _names(factors) or len(set(factors)) != len(factors) or not isinstance(common, dict):
        raise ValueError(f"{where}: factors must be a list of different names in small letters, settings `name: value` lines; "
                         f"got {factors!r} and {common!r}")
    if not isinstance(runs, list) or not all(isinstance(r, dict) and set(r) == {*factors, "set"} and isinstance(r["set"], dict)
                                             for r in runs):
        raise ValueError(f"{where}: each run must have a level of {', '.join(factors)} and `set` with its settings")
    levels = tuple(tuple(dict.fromkeys(str(run[factor]) for run in runs)) for factor in factors)
    for factor, pair in zip(factors, levels, strict=True):
        if len(pair) != 2:
            raise ValueError(f"{where}: factor {factor} must have two levels, got {', '.join(pair)}")
    signs = [tuple(2 * pair.index(str(run[factor])) - 1 for factor, pair in zip(factors, levels, strict=True)) for run in runs]
    if sorted(signs) != sorted(itertools.product((-1, 1), repeat=len(factors))):
        raise ValueError(f"{where} must have each combination of levels once, {2 ** len(factors)} runs; got {len(runs)}, "
                         f"{len(set(signs))} of them different")
    return Design(str(found["profile"]), tuple(factors), levels,
                  {at: common | run["set"] for at, run in zip(signs, runs, strict=True)})


def _names(factors: Any) -> bool:
    return (isinstance(factors, list) and bool(factors)
            and all(isinstance(f, str) and f.isalpha() and f.islower() and f != "set" for f in factors))
