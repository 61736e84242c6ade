"""Make the built book complete in itself: it opens from a folder and asks nothing of any network.

A plain Jupyter Book points browsers at content networks for MathJax, plotly, tables and live code. This
extension

* copies MathJax (one file with SVG output, hence no web fonts), plotly.js and the script of interactive
  tables from the packages installed beside the book into ``_static/vendor``;
* gives plotly and the tables only to pages that show one;
* drops every script and style that a theme or extension fetches from elsewhere (live code, above all);
* reads every finished page again and warns about anything that a browser would still fetch from outside, so
  that a build with warnings as errors fails.
"""
from __future__ import annotations

import importlib.util
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.builders.html._assets import _JavaScript
from sphinx.util import logging

logger = logging.getLogger(__name__)

MATHJAX = "vendor/mathjax.js"
ON_DEMAND = {"vendor/plotly.js": "Plotly.newPlot", "vendor/itables.js": "_itables_"}
_ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)


def package_file(package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing it; ``FileNotFoundError`` names the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the book needs {package}: pip install -c constraints.txt -e '.[study]'")
    path = Path(next(iter(spec.submodule_search_locations)), *parts)
    if not path.is_file():
        raise FileNotFoundError(f"the package {package} no longer has {'/'.join(parts)}: see constraints.txt")
    return path


def tables_script() -> str:
    """The script that turns the HTML tables of itables into sortable ones, as a classic script."""
    from itables import options
    from itables.javascript import generate_init_offline_itables_html

    markup = generate_init_offline_itables_html(options.dt_bundle)
    found = re.search(r"<script[^>]*>(?P<body>.*?)</script>", markup, re.DOTALL)
    if found is None:
        raise ValueError("itables no longer provides its script for offline pages: see constraints.txt")
    return found["body"]


def collect(folder: Path) -> None:
    """Write the vendored scripts under ``folder``."""
    target = folder / "vendor"
    target.mkdir(parents=True, exist_ok=True)
    # The distribution's import name is spelled with dashes.
    mathjax = package_file("sphinx-mathjax-offline", "static", "mathjax", "tex-svg-full.js")
    shutil.copyfile(mathjax, folder / MATHJAX)
    shutil.copyfile(package_file("plotly", "package_data", "plotly.min.js"), target / "plotly.js")
    (target / "itables.js").write_text(tables_script(), encoding="utf-8")


def is_elsewhere(address: str | None) -> bool:
    """Whether a browser would leave the book for this address.

    >>> is_elsewhere("https://example.org/a.js"), is_elsewhere("//example.org/a.js"), is_elsewhere("a.js")
    (True, True, False)
    """
    return bool(address) and bool(_ELSEWHERE.match(address))


def is_local(asset: Any) -> bool:
    """Whether a script or style that Sphinx is about to link stays inside the book and loads no live code."""
    filename = str(getattr(asset, "filename", asset) or "")
    inline = str((getattr(asset, "attributes", None) or {}).get("body", ""))
    return not is_elsewhere(filename) and "thebe" not in filename.lower() and "thebe" not in inline.lower()


class Requests(HTMLParser):
    """Collects in ``found`` what a browser fetches from outside to show a page. Links do not count."""

    SOURCES = ("script", "img", "iframe", "audio", "video", "source", "embed", "object", "track", "input")
    STYLE = re.compile(r"(?:@import\s+|url\(\s*)[\"']?((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)
    IMPORT = re.compile(r"(?:\bfrom\s*|\bimport\s*\(?\s*)[\"']((?:https?:)?//[^\"']+)[\"']")
    PASSIVE = frozenset({"canonical", "author", "license", "next", "prev", "search", "index", "help"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside = tag if tag in ("script", "style") else ""
        addresses = [given.get("src"), given.get("data"), given.get("poster")] if tag in self.SOURCES else []
        if tag == "link" and not set((given.get("rel") or "").lower().split()) & self.PASSIVE:
            addresses.append(given.get("href"))
        self.found += [address for address in addresses if is_elsewhere(address)]
        self.found += self.STYLE.findall(given.get("style") or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.found += self.STYLE.findall(data)
        elif self._inside == "script":
            self.found += self.IMPORT.findall(data)


def outside_requests(html: str) -> list[str]:
    """Addresses outside the book that showing the page ``html`` would fetch."""
    parser = Requests()
    parser.feed(html)
    return parser.found


def _prepare(app: Sphinx) -> None:
    if app.builder.format != "html":
        return
    folder = Path(app.doctreedir).parent / "offline-assets"
    collect(folder)
    app.config.html_static_path.append(str(folder))


def _page(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    for group in ("script_files", "css_files"):
        if group in context:
            context[group][:] = [asset for asset in context[group] if is_local(asset)]
    body = context.get("body") or ""
    for script, sign in ON_DEMAND.items():
        if sign in body:
            context["script_files"].append(_JavaScript(f"_static/{script}", priority=100))


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        if "_static" in page.relative_to(app.outdir).parts:
            continue
        for address in dict.fromkeys(outside_requests(page.read_text(encoding="utf-8"))):
            logger.warning("%s would fetch %s: the book must hold all that it shows",
                           page.relative_to(app.outdir), address)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _prepare)
    app.connect("html-page-context", _page, priority=900)
    app.connect("build-finished", _check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
