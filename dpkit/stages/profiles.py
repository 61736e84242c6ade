"""Profiles: where a study's settings come from. A small YAML file gives some, ``--set`` and a notebook's parameters cell change
some; the rest are the defaults of :class:`~dpkit.stages.study.Study`.
"""
from __future__ import annotations

import dataclasses
import difflib
import typing
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dpkit.spec import parse
from dpkit.stages.study import ARMED, Study

FIELDS: dict[str, Any] = {name: kind for name, kind in typing.get_type_hints(Study).items()
                          if name in {f.name for f in dataclasses.fields(Study)}}


def unknown(kind: str, name: str, allowed: typing.Iterable[str]) -> ValueError:
    """The error for a name that is not one of ``allowed``, with the nearest one that is."""
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(allowed)}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")


@cache
def profiles() -> dict[str, Path]:
    """The profiles that come with the library, by name."""
    folder = resources.files("dpkit") / "profiles"
    return {Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if str(f).endswith(".yml")}


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; raises ``ValueError`` with one line, which calls it ``what``, where it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{what} does not exist") from None
    except OSError as error:
        raise ValueError(f"{what} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} is not readable YAML ({' '.join(str(error).split())})") from None


def read_profile(name: str) -> dict[str, Any]:
    """The settings in a profile: a name that comes with the library, or the path of a YAML file."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else profiles().get(name)
    if path is None:
        raise unknown("profile", name, profiles())
    settings = read_yaml(path, f"profile file {path}")
    if not isinstance(settings, dict):
        raise ValueError(f"profile {name} must be a list of `name: value` lines")
    return settings


def load_study(profile: str, overrides: dict[str, Any] | None = None) -> Study:
    """The study of a profile with some parameters changed; words are read as the declared types.

    Where ``arms`` changes and the lists of arms to be measured do not, arms that are gone are not measured either; where
    ``epochs`` gets fewer and spawn_epochs does not change, children do not part after the end.
    Raises ``ValueError`` on an unknown profile or parameter, a wrong type or a value out of range.
    """
    settings: dict[str, Any] = {}
    for source in (read_profile(profile), overrides or {}):
        for name, value in source.items():
            if name not in FIELDS:
                raise unknown("parameter", str(name), FIELDS)
            # YAML reads 1e-3 as a word, so words are parsed from files too
            settings[name] = parse(name, value, FIELDS[name])
        for name in (f"{part}_arms" for part in ARMED):
            if "arms" in source and name not in source:
                before = settings.get(name, getattr(Study, name))
                settings[name] = tuple(a for a in before if a in ("dense", *settings["arms"])) or ("dense",) * bool(before)
        if "epochs" in source and "spawn_epochs" not in source:
            before = settings.get("spawn_epochs", Study.spawn_epochs)
            settings["spawn_epochs"] = tuple(epoch for epoch in before if epoch < settings["epochs"])
    return Study(**settings)
