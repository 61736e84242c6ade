"""How a number is written: percent, points, significant digits, intervals, verdicts. Text in, text out.

One place decides the form, so that the book, the notebooks and the command line print a number alike. Nothing
here reads a file, and nothing here needs more than the standard library.

A number is a record ``{"name", "value", "n", "low", "high", "key"}``. Its name is ``chapter.arm.measure``
with ``@sparsity`` in percent where there is one; the measure decides the form (:func:`kind_of`), and so does
an arm ``A_minus_B``, ``A_over_B`` or ``A_effect_of_FACTOR``.
Accuracies, errors and barriers are fractions in [0, 1] and are written
in percent or in percentage points.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

VERDICTS = ("supported", "contradicted", "inconclusive", "not tested")
KINDS = ("percent", "points", "number", "count", "seconds", "factor")
OPTIONS = ("value", "interval", "n")

# The first kind whose words meet the measure's words wins: a difference of accuracies is written in points.
_WORDS = (
    ("number", {"from", "removed", "removal"}),  # epochs; curvature; nats
    ("percent", {"jaccard", "hamming", "unique", "kept", "distance", "moved", "disagreement", "churn"}),
    ("points", {"barrier", "difference", "gap", "rise", "drop", "excess"}),
    ("percent", {"accuracy", "error", "sparsity", "fraction", "share", "overlap", "stable"}),
    ("seconds", {"seconds", "duration"}),
    ("factor", {"speedup", "factor", "ratio"}),
    ("count", {"count", "images", "points", "products", "parameters", "weights", "steps", "epochs"}),
)
_MINUS = "\u2212"
_SUPERSCRIPT = str.maketrans("-0123456789",
                             "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def kind_of(name: str) -> str:
    """The form in which the number called ``name`` is written, one of :data:`KINDS`.

    >>> [kind_of(name) for name in ("distill.idc.accuracy", "tickets.imp.barrier@67", "hessian.imp.trace")]
    ['percent', 'points', 'number']
    >>> kind_of("distill.idc_minus_herding.accuracy"), kind_of("hessian.distilled_over_imp.trace@89")
    ('points', 'factor')
    >>> kind_of("tickets.imp.accuracy_change@67"), kind_of("tickets.imp_effect_of_noise.accuracy@67")
    ('points', 'points')
    """
    *places, measure = name.split("@")[0].split(".")
    arm = places[-1] if places else ""
    words = set(measure.lower().split("_"))
    if "_over_" in arm:
        return "factor"
    if "loss" in words:
        return "number"
    kind = next((kind for kind, known in _WORDS if words & known), "number")
    difference = "_minus_" in arm or "_effect_of_" in arm or "change" in words
    return "points" if kind == "percent" and difference else kind


def significant(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, in full where that is readable, else as a power of ten.

    >>> significant(638.2), significant(0.01234), significant(18240.0), significant(2.5e-7)
    ('638', '0.0123', '18,200', '2.50 \u00d7 10\u207b\u2077')
    """
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if power < -4 or power > 6:
        text = f"{mantissa} \u00d7 10{str(power).translate(_SUPERSCRIPT)}"
    else:
        text = f"{round(value, digits - 1 - power):,.{max(digits - 1 - power, 0)}f}"
    return text.replace("-", _MINUS)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", _MINUS)


def _seconds(value: float) -> tuple[float, str]:
    """Divisor and unit in which a time of ``value`` seconds reads well."""
    for limit, divisor, unit in ((120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if abs(value) < limit:
            return divisor, unit
    return 3600.0, "h"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: float, kind: str, scale: float = 1.0) -> str:
    """The digits alone, without a unit."""
    if kind in ("percent", "points"):
        return _fixed(100.0 * value, 1)
    if kind == "count":
        return _fixed(value, 0 if float(value).is_integer() else 1)
    if kind == "seconds":
        return _fixed(value / scale, 1)
    return significant(value)


def value_text(value: float | None, kind: str) -> str:
    """One value with its unit.

    >>> value_text(0.7213, "percent"), value_text(0.0694, "points"), value_text(-0.01, "points")
    ('72.1%', '6.9 points', '\u22121.0 points')
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if not _finite(value):
        return "not measured" if value is None else "failed"
    divisor, unit = _seconds(value) if kind == "seconds" else (1.0, "")
    after = {"percent": "%", "points": " points", "seconds": f" {unit}", "factor": "\u00d7"}.get(kind, "")
    return _plain(value, kind, divisor) + after


def interval_text(value: float | None, low: float | None, high: float | None, kind: str) -> str:
    """``[low, high]`` in the unit of :func:`value_text`, or nothing where there is no finite interval."""
    if not (_finite(value) and _finite(low) and _finite(high)):
        return ""
    divisor = _seconds(value)[0] if kind == "seconds" else 1.0
    return f"[{_plain(low, kind, divisor)}, {_plain(high, kind, divisor)}]"


def estimate_text(value: float | None, n: int | None, low: float | None, high: float | None,
                  kind: str) -> str:
    """A number as the book prints it: value, interval and count.

    >>> estimate_text(0.721, 5, 0.702, 0.74, "percent")
    '72.1% [70.2, 74.0] (n = 5)'
    >>> estimate_text(0.069, 1, None, None, "points")
    '6.9 points (n = 1)'
    """
    parts = [value_text(value, kind)]
    if _finite(value):
        parts += [interval_text(value, low, high, kind), f"(n = {n})" if n is not None else ""]
    return " ".join(part for part in parts if part)


def number_text(record: Mapping[str, Any], option: str = "") -> str:
    """The text of one number record; ``option`` picks a part: ``value``, ``interval`` or ``n``.

    Raises ``ValueError`` for an unknown option.
    """
    kind = record.get("kind") or kind_of(record["name"])
    value, low, high, n = (record.get(field) for field in ("value", "low", "high", "n"))
    if option == "":
        return estimate_text(value, n, low, high, kind)
    if option == "value":
        return value_text(value, kind)
    if option == "interval":
        return interval_text(value, low, high, kind) or "no interval"
    if option == "n":
        return str(n)
    raise ValueError(f"the part of a number must be one of {', '.join(OPTIONS)}; got {option!r}")


def number_title(record: Mapping[str, Any]) -> str:
    """What a reader sees on hovering: the full name and where ``dpkit lineage`` starts."""
    key = record.get("key")
    return record["name"] + (f" (dpkit lineage {key[:12]})" if key else "")


def parse_numbers(text: str, source: str) -> dict[str, dict[str, Any]]:
    """Number records by name, from JSON lines. ``source`` names the text in errors.

    Raises ``ValueError`` on a line that is no JSON object, lacks a name or a value, or repeats a name.
    """
    records: dict[str, dict[str, Any]] = {}
    for index, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {index}: must be one JSON object a line, got {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("name"), str) or "value" not in record:
            raise ValueError(f"{source}, line {index}: a number needs a name and a value, got {line[:80]}")
        if record["name"] in records:
            raise ValueError(f"{source}, line {index}: {record['name']} appears twice; a name has one value")
        records[record["name"]] = record
    return records


def parse_verdicts(text: str, source: str) -> list[dict[str, Any]]:
    """Verdict records in their order, from a JSON list.

    Raises ``ValueError`` on anything but a list of objects with ``id``, ``claim`` and a known verdict.
    """
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: must be a JSON list of verdicts, got {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{source}: must be a JSON list of verdicts, got {type(rows).__name__}")
    for row in rows:
        if not isinstance(row, dict) or not row.get("id") or not row.get("claim"):
            raise ValueError(f"{source}: a verdict needs an id and a claim, got {json.dumps(row)[:80]}")
        if row.get("verdict") not in VERDICTS:
            raise ValueError(f"{source}: the verdict of {row['id']} must be one of {', '.join(VERDICTS)}; "
                             f"got {row.get('verdict')!r}")
    return rows


def verdict_number(row: Mapping[str, Any]) -> str:
    """The number that decided a claim, or that there is none."""
    if row.get("value") is None:
        return "not measured"
    kind = row.get("kind") or kind_of(str(row.get("measure") or ""))
    return estimate_text(row["value"], row.get("n"), row.get("low"), row.get("high"), kind)


def verdict_threshold(row: Mapping[str, Any]) -> str:
    """What the number had to be, in its unit: ``at least``, ``at most`` or the bare threshold; or nothing.

    >>> verdict_threshold({"measure": "connectivity.distilled.barrier@67", "at_most": 0.02})
    'at most 2.0 points'
    """
    kind = row.get("kind") or kind_of(str(row.get("measure") or ""))
    for side in ("at_least", "at_most"):
        if row.get(side) is not None:
            return f"{side.replace('_', ' ')} {value_text(row[side], kind)}"
    if row.get("threshold") is None:
        return ""
    return f"{str(row.get('side') or '').replace('_', ' ')} {value_text(row['threshold'], kind)}".strip()


def verdict_tests(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tests behind a verdict: those it lists, else the one that it is, else none."""
    return list(row.get("tests") or ([row] if row.get("measure") else []))
