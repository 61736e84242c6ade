"""Specifications: small frozen dataclasses, typed and validated on construction, with one canonical form.

A spec is the only thing that decides what a computation does, so its canonical form decides the key under which the
result is stored. Python tells ``1`` from ``1.0`` and JSON does too; both must give the same key, hence the coercion.

A specification may grow a field when results exist already. :func:`later` declares such a field together with the value that
describes what was done before there was a choice; while it has that value it is left out of the canonical form, so old
keys stay valid, and any other value gives a key of its own.
"""
from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any


def coerce(name: str, value: Any, kind: Any) -> Any:
    """Return ``value`` as the annotated type ``kind`` or raise ``ValueError`` with one clear line.

    Lossless conversions only: an integer may become a float, a whole float an integer, a list a tuple. Strings are
    never read as numbers here; the command line does that with :func:`parse`.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [k for k in arguments if k is not type(None)]
        return coerce(name, value, kinds[0])
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            return float(value)
    elif kind is str:
        if isinstance(value, str):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(coerce(name, item, arguments[0]) for item in value)
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, dict):
            return kind(**value)
    else:
        return value
    raise ValueError(f"{name} must be {describe(kind)}, got {value!r} ({type(value).__name__})")


def describe(kind: Any) -> str:
    """The name of an annotated type as a person would say it."""
    if typing.get_origin(kind) is tuple:
        return f"a list of {describe(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(describe(k) for k in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def parse(name: str, text: Any, kind: Any) -> Any:
    """Read a command-line word as the annotated type ``kind``: ``"1e-3"`` is a number, ``"a,b"`` a list.

    Raises ``ValueError`` with the same line as :func:`coerce`.
    """
    if not isinstance(text, str):
        return coerce(name, text, kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if type(None) in arguments and text.lower() in ("none", "null", ""):
            return None
        kind = next(k for k in arguments if k is not type(None))
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        words = [w.strip() for w in text.strip("[]()").split(",") if w.strip()]
        return tuple(parse(name, word, arguments[0]) for word in words)
    if kind is bool and text.lower() in ("true", "yes", "1", "false", "no", "0"):
        return text.lower() in ("true", "yes", "1")
    if kind in (int, float):
        try:
            return coerce(name, float(text) if kind is float or not text.lstrip("+-").isdigit() else int(text), kind)
        except ValueError:
            raise ValueError(f"{name} must be {describe(kind)}, got {text!r}") from None
    return coerce(name, text, kind)


def later(default: Any, *, before: Any) -> Any:
    """A field that was added when keys existed: left out of :meth:`Spec.to_dict` while it equals ``before``.

    ``before`` is a fact about the past and never changes; ``default`` may, and then new keys follow it.
    """
    return dataclasses.field(default=default, metadata={"before": before})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every specification. Subclasses list typed fields with defaults and override :meth:`check`."""

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = coerce(field.name, getattr(self, field.name), kinds[field.name])
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` where the fields do not make sense (override)."""

    def require(self, condition: bool, message: str) -> None:
        """Raise ``ValueError(message)`` unless ``condition`` holds."""
        if not condition:
            raise ValueError(message)

    def one_of(self, name: str, allowed: typing.Iterable[str]) -> None:
        """Raise unless field ``name`` is one of the ``allowed`` words."""
        allowed = tuple(allowed)
        self.require(getattr(self, name) in allowed,
                     f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    def between(self, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> None:
        """Raise unless field ``name`` lies in the interval from ``low`` to ``high``."""
        value = getattr(self, name)
        inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        self.require(inside, f"{name} must lie in {interval}, got {value:g}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, defaults included, as plain JSON values; those of :func:`later` only where they matter."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "before" not in field.metadata or value != field.metadata["before"]:
                found[field.name] = value.to_dict() if isinstance(value, Spec) else value
        return json.loads(canonical_json(found))

    def replace(self, **changes: Any) -> typing.Self:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN. Raises ``ValueError`` on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
