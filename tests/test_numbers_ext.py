"""Numbers and verdicts in the book: the forms, the role, the directive, and the watch on outside requests."""
from __future__ import annotations

import ast
import doctest
import io
import json
import sys
from pathlib import Path

import pytest

from dpkit.report import format as form

ROOT = Path(__file__).resolve().parents[1]


# --- forms ---------------------------------------------------------------------------------------------

def test_examples_in_docstrings():
    assert doctest.testmod(form).failed == 0


@pytest.mark.parametrize(("name", "kind"), [
    ("distill.idc.accuracy", "percent"), ("data.dense.error", "percent"),
    ("tickets.imp.accuracy@67", "percent"), ("tickets.imp.sparsity@67", "percent"),
    ("connectivity.dense.barrier", "points"), ("tickets.distilled.accuracy_difference@67", "points"),
    ("hessian.dense.trace", "number"), ("connectivity.dense.loss_barrier", "number"),
    ("tickets.imp.training_points", "count"), ("tickets.imp.seconds", "seconds"),
    ("tickets.distilled.speedup", "factor"), ("hessian.error.trace", "number"),
    ("distill.idc_minus_random_real.accuracy", "points"), ("connectivity.imp.stable@67", "percent"),
    ("hessian.distilled_over_imp.trace@89", "factor"), ("hessian.imp.removed_excess@67", "number"),
    ("hessian.imp.removal_rise@67", "number"), ("connectivity.imp.stable_from@67", "number"),
    ("hessian.imp.trace_per_weight@89", "number"),
    ("tickets.imp_over_distilled.search_seconds@67", "factor"), ("tickets.imp.search_points@67", "count"),
])
def test_kind_follows_from_the_measure(name, kind):
    assert form.kind_of(name) == kind


@pytest.mark.parametrize(("record", "text"), [
    ((0.721, 5, 0.702, 0.74, "percent"), "72.1% [70.2, 74.0] (n = 5)"),
    ((0.721, 1, None, None, "percent"), "72.1% (n = 1)"),
    ((1.0, 3, 1.0, 1.0, "percent"), "100.0% [100.0, 100.0] (n = 3)"),
    ((-0.00001, 2, -0.021, 0.02, "points"), "0.0 points [\u22122.1, 2.0] (n = 2)"),
    ((638.21, 3, 601.0, 675.4, "number"), "638 [601, 675] (n = 3)"),
    ((0.012345, 3, 0.0099999, 0.0147, "number"), "0.0123 [0.0100, 0.0147] (n = 3)"),
    ((1.5e7, 2, None, None, "number"), "1.50 \u00d7 10\u2077 (n = 2)"),
    ((45000.0, 3, 45000.0, 45000.0, "count"), "45,000 [45,000, 45,000] (n = 3)"),
    ((90.0, 2, 60.0, 150.0, "seconds"), "90.0 s [60.0, 150.0] (n = 2)"),
    ((5400.0, 2, 4800.0, 6000.0, "seconds"), "90.0 min [80.0, 100.0] (n = 2)"),
    ((4.2, 2, 3.1, 5.3, "factor"), "4.20\u00d7 [3.10, 5.30] (n = 2)"),
    ((0.5, 2, float("nan"), 0.6, "percent"), "50.0% (n = 2)"),
    ((None, 0, None, None, "percent"), "not measured"),
    ((float("nan"), 3, None, None, "percent"), "failed"),
])
def test_estimates(record, text):
    assert form.estimate_text(*record) == text


def test_parts_of_a_number():
    record = {"name": "distill.idc.accuracy", "value": 0.721, "n": 5, "low": 0.702, "high": 0.74,
              "key": "ab12"}
    assert form.number_text(record, "value") == "72.1%"
    assert form.number_text(record, "interval") == "[70.2, 74.0]"
    assert form.number_text(record, "n") == "5"
    assert form.number_title(record) == "distill.idc.accuracy (dpkit lineage ab12)"
    with pytest.raises(ValueError, match="must be one of value, interval, n"):
        form.number_text(record, "mean")


@pytest.mark.parametrize(("text", "message"), [
    ('{"name": "a.b.accuracy", "value": 1}\n{', "line 2: must be one JSON object a line"),
    ('{"value": 1}', "needs a name and a value"), ("[1]", "needs a name and a value"),
    ('{"name": "a.b.c", "value": 1}\n{"name": "a.b.c", "value": 1}', "appears twice"),
])
def test_bad_number_files(text, message):
    with pytest.raises(ValueError, match=message):
        form.parse_numbers(text, "numbers.jsonl")


@pytest.mark.parametrize(("rows", "message"), [
    ({}, "must be a JSON list"), ([{"id": "C1"}], "needs an id and a claim"),
    ([{"id": "C1", "claim": "x", "verdict": "proven"}], "must be one of supported"),
])
def test_bad_verdict_files(rows, message):
    with pytest.raises(ValueError, match=message):
        form.parse_verdicts(json.dumps(rows), "verdicts.json")


def test_thresholds_have_the_unit_of_their_number():
    row = {"measure": "x.y.barrier", "threshold": 0.02}
    assert form.verdict_threshold(row) == "2.0 points"
    assert form.verdict_threshold(row | {"side": "at_most"}) == "at most 2.0 points"
    assert form.verdict_threshold({"measure": "x.a_over_b.trace", "at_least": 10}) == "at least 10.0\u00d7"
    assert form.verdict_threshold({"measure": "x.y.trace", "threshold": None}) == ""
    assert form.verdict_number({"measure": "x.y.trace", "value": None}) == "not measured"


def test_formatting_needs_the_standard_library_only():
    tree = ast.parse(Path(form.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


# --- the extensions in a small book --------------------------------------------------------------------

NUMBERS = [{"name": "distill.idc.accuracy", "value": 0.721, "n": 5, "low": 0.702, "high": 0.74,
            "key": "ab12cd"},
           {"name": "connectivity.distilled.barrier@67", "value": 0.009, "n": 1, "low": None, "high": None,
            "key": None}]
VERDICTS = [{"id": "C1", "claim": "It <works>.", "verdict": "supported", "measure": "x.y.accuracy_difference",
             "value": -0.004, "n": 3, "low": -0.01, "high": 0.002, "threshold": -0.02, "chapter": "page",
             "note": "Small."},
            {"id": "C3", "claim": "Both.", "verdict": "contradicted", "chapter": "page", "note": "",
             "tests": [
                {"measure": "x.y.barrier", "verdict": "supported", "value": 0.01, "n": 3, "low": 0.005,
                 "high": 0.015, "at_most": 0.02},
                {"measure": "x.z.barrier", "verdict": "contradicted", "value": 0.001, "n": 3, "low": 0.0,
                 "high": 0.002, "at_least": 0.02}]},
            {"id": "C6", "claim": "Later.", "verdict": "not tested", "measure": None, "value": None,
             "n": None, "threshold": None, "chapter": None, "note": None, "tests": []}]


@pytest.fixture
def extensions(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))


def build(folder: Path, text: str, names=("study_numbers",), results: bool = True) -> tuple[str, str]:
    """Build a book of one page; returns its HTML and the warnings."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    source, results_folder = folder / "source", folder / "source" / "book" / "runs" / "quick"
    results_folder.mkdir(parents=True)
    (source / "index.md").write_text(f"# Title\n\n{text}\n", encoding="utf-8")
    (results_folder / "page.md").write_text("---\norphan: true\n---\n\n# Page\n", encoding="utf-8")
    if results:
        (results_folder / "numbers.jsonl").write_text("\n".join(map(json.dumps, NUMBERS)), encoding="utf-8")
        (results_folder / "verdicts.json").write_text(json.dumps(VERDICTS), encoding="utf-8")
    (source / "conf.py").write_text(f"extensions = ['myst_parser', *{list(names)!r}]\n", encoding="utf-8")
    warnings = io.StringIO()
    with docutils_namespace():
        Sphinx(source, source, folder / "html", folder / "doctrees", "html", status=None,
               warning=warnings).build()
    return (folder / "html" / "index.html").read_text(encoding="utf-8"), warnings.getvalue()


def test_role_prints_value_interval_and_count(tmp_path, extensions):
    text = ("{num}`quick:distill.idc.accuracy`, {num}`quick:distill.idc.accuracy|value`, "
            "{num}`quick:connectivity.distilled.barrier@67`")
    html, warnings = build(tmp_path, text)
    assert not warnings
    assert ">72.1% [70.2, 74.0] (n = 5)</abbr>" in html
    assert ">72.1%</abbr>" in html
    assert ">0.9 points (n = 1)</abbr>" in html
    assert 'title="distill.idc.accuracy (dpkit lineage ab12cd)"' in html


def test_verdicts_of_a_study_without_chapters_have_no_links(tmp_path, extensions):
    folder = tmp_path / "source" / "book" / "runs" / "bare"
    folder.mkdir(parents=True)
    (folder / "verdicts.json").write_text(json.dumps(VERDICTS), encoding="utf-8")
    html, warnings = build(tmp_path, "```{verdicts} bare\n```")
    assert not warnings
    assert "dp-badge" in html
    assert "page.html" not in html


@pytest.mark.parametrize(("text", "results", "message"), [
    ("{num}`quick:distill.idc.acuracy`", True, "no number distill.idc.acuracy in profile quick"),
    ("{num}`quick:distill.idc.accuracy|mean`", True, "must be one of value, interval, n"),
    ("{num}`distill.idc.accuracy`", True, "is written profile:name"),
    ("{num}`quick:distill.idc.accuracy`", False, "numbers.jsonl is missing"),
    ("```{verdicts} quick\n```", False, "verdicts.json is missing"),
    ("```{verdicts} slow\n```", True, "book/runs/slow/verdicts.json is missing"),
])
def test_gaps_are_warnings(tmp_path, extensions, text, results, message):
    _, warnings = build(tmp_path, text, results=results)
    assert "WARNING" in warnings
    assert message in warnings


def test_verdicts_table(tmp_path, extensions):
    html, warnings = build(tmp_path, "```{verdicts} quick\n```")
    assert not warnings
    table = html[html.index("<table"):html.index("</table>")]
    for piece in ("It &lt;works&gt;.", "Small.", "dp-supported", ">supported<", "claimed: \u22122.0 points",
                  "\u22120.4 points [\u22121.0, 0.2] (n\u00a0=\u00a03)", 'href="book/runs/quick/page.html"',
                  "dp-not-tested", ">not tested<", "not measured", "dp-mark-supported",
                  "0.1 points [0.0, 0.2]", "at least 2.0 points"):
        assert piece in table


def test_pages_ask_for_nothing_outside(tmp_path, extensions):
    html, warnings = build(tmp_path, "<div>Plotly.newPlot</div>", ("offline_assets", "sphinx.ext.mathjax"))
    assert not warnings
    assert "_static/vendor/plotly.js" in html
    assert "vendor/itables.js" not in html
    assert (tmp_path / "html" / "_static" / "vendor" / "mathjax.js").stat().st_size > 1e6


def test_outside_requests_are_warnings(tmp_path, extensions):
    page = '<script src="https://example.org/a.js"></script> <a href="https://example.org">fine</a>'
    _, warnings = build(tmp_path, page, ("offline_assets",))
    assert "index.html would fetch https://example.org/a.js" in warnings


@pytest.mark.parametrize(("html", "found"), [
    ('<img src="//example.org/a.png">', ["//example.org/a.png"]),
    ('<link rel="stylesheet" href="http://example.org/a.css">', ["http://example.org/a.css"]),
    ('<link rel="canonical" href="http://example.org/">', []),
    ('<style>@import "https://example.org/a.css"; p { background: url(https://example.org/b.png) }</style>',
     ["https://example.org/a.css", "https://example.org/b.png"]),
    ('<p style="background: url(https://example.org/b.png)">', ["https://example.org/b.png"]),
    ("<script type=module>import {a} from 'https://example.org/a.js'</script>", ["https://example.org/a.js"]),
    ('<p>see "https://example.org/a.js" or url(https://example.org)</p>', []),
    ('<script>var site = "https://example.org"</script>', []),
])
def test_what_counts_as_a_request(extensions, html, found):
    import offline_assets

    assert offline_assets.outside_requests(html) == found
