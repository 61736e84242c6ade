"""From numbers to verdicts, by thresholds that are committed before the run (``book/claims.yml``)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpkit.report.numbers import Number

SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_TESTED = "supported", "contradicted", "inconclusive", "not tested"


def judge(number: Number | None, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """Verdict of one test: is the number on the required side of the threshold with its whole 95% interval?

    Supported when the whole interval is, contradicted when none of it is, inconclusive in between or when there is no
    interval (n of 1), not tested without a number. Exactly one of ``at_least`` and ``at_most`` is given.
    """
    if (at_least is None) == (at_most is None):
        raise ValueError("a test needs exactly one of at_least and at_most")
    if number is None:
        return NOT_TESTED
    if number.low is None or number.high is None:
        return INCONCLUSIVE
    if at_least is not None:
        return SUPPORTED if number.low >= at_least else CONTRADICTED if number.high < at_least else INCONCLUSIVE
    return SUPPORTED if number.high <= at_most else CONTRADICTED if number.low > at_most else INCONCLUSIVE


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim from those of its tests.

    Contradicted if any test is; else not tested if any is missing (or there are none); supported if all are; else
    inconclusive.
    """
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    if not verdicts or NOT_TESTED in verdicts:
        return NOT_TESTED
    return SUPPORTED if set(verdicts) == {SUPPORTED} else INCONCLUSIVE


def read_claims(path: Path) -> list[dict[str, Any]]:
    """The claims with their tests, in order. Raises ``ValueError`` when the file lacks a field."""
    claims = yaml.safe_load(path.read_text(encoding="utf-8"))
    for claim in claims:
        lacking = [f for f in ("id", "claim", "chapter", "tests") if f not in claim]
        if lacking:
            raise ValueError(f"{path}: claim {claim.get('id', '?')} lacks {', '.join(lacking)}")
        for test in claim["tests"]:
            if "number" not in test or ("at_least" in test) == ("at_most" in test):
                raise ValueError(f"{path}: a test of {claim['id']} needs number and one of at_least, at_most")
    return claims


def verdicts(claims: Sequence[Mapping[str, Any]], numbers: Sequence[Number], percent: int) -> list[dict[str, Any]]:
    """One record a claim: verdict, and the test that decided it. ``{percent}`` in a test's number is the sparsity."""
    known = {n.name: n for n in numbers}
    records = []
    for claim in claims:
        tests = []
        for test in claim["tests"]:
            name = test["number"].format(percent=percent)
            limits = {side: test[side] for side in ("at_least", "at_most") if side in test}
            tests.append({"number": known.get(name), "name": name, **limits, "verdict": judge(known.get(name), **limits)})
        outcome = combine([t["verdict"] for t in tests])
        # show the test that the verdict hangs on: the first that is not supported, else the first
        shown = next((t for t in tests if t["verdict"] == outcome), tests[0] if tests else None)
        found = shown["number"] if shown else None
        side = next((s for s in ("at_least", "at_most") if shown and s in shown), None)
        records.append({"id": claim["id"], "claim": claim["claim"], "verdict": outcome, "chapter": claim["chapter"],
                        "note": claim.get("note", ""), "measure": shown["name"] if shown else None,
                        "value": found.value if found else None, "n": found.n if found else None,
                        "low": found.low if found else None, "high": found.high if found else None,
                        "key": found.key if found else None, "side": side, "threshold": shown[side] if side else None,
                        "tests": [{"measure": t["name"], "verdict": t["verdict"], "value": t["number"].value if t["number"]
                                   else None, "n": t["number"].n if t["number"] else None,
                                   "low": t["number"].low if t["number"] else None,
                                   "high": t["number"].high if t["number"] else None,
                                   **{s: t[s] for s in ("at_least", "at_most") if s in t}} for t in tests]})
    return records
