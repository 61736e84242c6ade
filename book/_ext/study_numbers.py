"""Numbers and verdicts of the study in the book's prose: a role and a directive that read what a run wrote.

``{num}`quick:distill.idc.accuracy` `` prints the number with its interval and count; ``|value``,
``|interval`` or ``|n`` after the name prints a part. ``{verdicts}`` with a profile as its argument prints the
table of claims. The files are ``numbers.jsonl`` and ``verdicts.json`` in the profile's folder
(``dpkit_profiles`` of the configuration, by default ``book/runs/PROFILE``). A missing file or name is a
warning, so a build with warnings as errors never prints a gap.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from dpkit.report import format as form

logger = logging.getLogger(__name__)
_PARSED: dict[tuple[str, int], Any] = {}


def folder_of(env: BuildEnvironment, profile: str) -> str:
    """The folder of a profile's results inside the book's source."""
    return env.config.dpkit_profiles.get(profile, f"book/runs/{profile}").rstrip("/")


def read(env: BuildEnvironment, profile: str, name: str, parse: Callable[[str, str], Any]) -> Any:
    """A parsed results file of a profile, read once a build.

    Raises ``ValueError`` with one line when the file is missing or malformed.
    """
    relative = f"{folder_of(env, profile)}/{name}"
    path = Path(env.srcdir, relative)
    env.note_dependency(str(path))
    if not path.is_file():
        raise ValueError(f"{relative} is missing: run `dpkit study --profile {profile}` first")
    stamp = (str(path), path.stat().st_mtime_ns)
    if stamp not in _PARSED:
        _PARSED[stamp] = parse(path.read_text(encoding="utf-8"), relative)
    return _PARSED[stamp]


def find(env: BuildEnvironment, reference: str) -> tuple[dict[str, Any], str]:
    """The record and the wanted part for ``profile:name`` or ``profile:name|part``.

    Raises ``ValueError`` with one line for a malformed reference or an unknown name.
    """
    profile, colon, rest = reference.partition(":")
    name, _, option = (part.strip() for part in rest.partition("|"))
    if not colon or not profile.strip() or not name:
        raise ValueError(f"a number is written profile:name or profile:name|part, got {reference!r}")
    profile = profile.strip()
    records = read(env, profile, "numbers.jsonl", form.parse_numbers)
    if name not in records:
        raise ValueError(f"no number {name} in profile {profile}: see `dpkit numbers --profile {profile}`")
    return records[name], option


class NumberRole(SphinxRole):
    """``{num}`profile:name|part` ``"""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            record, option = find(self.env, self.text)
            text = form.number_text(record, option)
        except ValueError as error:
            logger.warning("%s", error, location=self.get_location(), type="dpkit", subtype="number")
            return [nodes.problematic(self.rawtext, f"[{self.text}]")], []
        return [nodes.abbreviation(self.rawtext, text, explanation=form.number_title(record),
                                   classes=["dp-number"])], []


class VerdictsDirective(SphinxDirective):
    """The table of claims of one profile: statement, verdict, deciding number, chapter."""

    required_arguments = 1
    COLUMNS = (("Claim", 38), ("Verdict", 17), ("What was measured", 45))

    def run(self) -> list[nodes.Node]:
        profile = self.arguments[0]
        try:
            rows = read(self.env, profile, "verdicts.json", form.parse_verdicts)
        except ValueError as error:
            logger.warning("%s", error, location=self.get_location(), type="dpkit", subtype="verdicts")
            return []
        table = nodes.table(classes=["dp-verdicts"])
        group = nodes.tgroup(cols=len(self.COLUMNS))
        table += group
        group += [nodes.colspec(colwidth=width) for _, width in self.COLUMNS]
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        head += nodes.row("", *(nodes.entry("", nodes.paragraph("", title)) for title, _ in self.COLUMNS))
        for row in rows:
            body += nodes.row("", self.claim(row), self.verdict(row, profile), self.measured(row))
        return [table]

    def claim(self, row: dict[str, Any]) -> nodes.entry:
        """Its id, its statement, and a note where the verdict needs one."""
        statement = nodes.paragraph("", "", nodes.strong("", str(row["id"])), nodes.Text(" " + row["claim"]))
        entry = nodes.entry("", statement)
        if row.get("note"):
            entry += nodes.paragraph("", str(row["note"]), classes=["dp-note"])
        return entry

    def verdict(self, row: dict[str, Any], profile: str) -> nodes.entry:
        """A badge whose colour repeats what its text says, and the way to the chapter behind it."""
        kind = row["verdict"].replace(" ", "-")
        badge = nodes.inline("", row["verdict"], classes=["dp-badge", f"dp-{kind}"])
        entry = nodes.entry("", nodes.paragraph("", "", badge))
        link = self.chapter(row, profile)
        if link is not None:
            entry += nodes.paragraph("", "", link, classes=["dp-chapter"])
        return entry

    def measured(self, row: dict[str, Any]) -> nodes.entry:
        """For each test the number, its name, and what it had to be, fixed before the run."""
        tests = form.verdict_tests(row)
        entry = nodes.entry("")
        for test in tests:
            text = form.verdict_number(test).replace("(n = ", "(n\u00a0=\u00a0")
            value = nodes.paragraph("", text, classes=["dp-value"])
            if len(tests) > 1 and test.get("verdict"):
                kind = test["verdict"].replace(" ", "-")
                value.insert(0, nodes.abbreviation("", "\u25cf", explanation=test["verdict"],
                                                   classes=["dp-mark", f"dp-mark-{kind}"]))
                value.insert(1, nodes.Text(" "))
            entry += value
            threshold = form.verdict_threshold(test)
            if threshold:
                entry += nodes.paragraph("", f"claimed: {threshold}", classes=["dp-note"])
            entry += nodes.paragraph("", "", nodes.literal("", str(test["measure"])), classes=["dp-note"])
        if not tests:
            entry += nodes.paragraph("", "not measured", classes=["dp-note"])
        return entry

    def chapter(self, row: dict[str, Any], profile: str) -> nodes.Node | None:
        """A link to the page that shows how the number came about; None where numbers alone were recorded, without chapters."""
        target = str(row.get("chapter") or "").removesuffix(".ipynb").removesuffix(".md")
        folder = f"{folder_of(self.env, profile)}/"
        if not target or ("/" not in target and not any(name.startswith(folder) for name in self.env.found_docs)):
            return None
        document = target if "/" in target else folder + target
        label = target.rsplit("/", 1)[-1].lstrip("0123456789-") or target
        link = addnodes.pending_xref("", nodes.inline("", label, classes=["doc"]), refdomain="std",
                                     reftype="doc", reftarget=f"/{document.lstrip('/')}",
                                     refdoc=self.env.docname, refexplicit=True, refwarn=True)
        self.set_source_info(link)
        return link


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("dpkit_profiles", {}, "env", types=(dict,))
    app.add_role("num", NumberRole())
    app.add_directive("verdicts", VerdictsDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
