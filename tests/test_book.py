"""The built book: complete, offline, without gaps, every number from the run, and alive in a browser."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import clean_environment

from dpkit import book
from dpkit.report import format as form
from dpkit.store import Missing

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Site:
    """A built book. root: the checkout that it was built from; html: where its pages lie."""

    def __init__(self, root: Path, html: Path):
        self.root, self.html = root, html

    def documents(self) -> list[str]:
        """All documents of the table of contents, the front page first."""
        toc = yaml.safe_load((self.root / "_toc.yml").read_text(encoding="utf-8"))

        def listed(entry: dict):
            yield from [entry["file"]] if "file" in entry else []
            for inner in (*entry.get("chapters", ()), *entry.get("sections", ())):
                yield from listed(inner)
        return [toc["root"], *(name for part in (*toc.get("parts", ()), *toc.get("chapters", ())) for name in listed(part))]

    def path(self, document: str) -> Path:
        return self.html / f"{document}.html"

    def page(self, document: str) -> BeautifulSoup:
        return BeautifulSoup(self.path(document).read_text(encoding="utf-8"), "html.parser")

    def numbers(self, profile: str) -> dict[str, dict]:
        """The numbers that a profile's pages are made from."""
        folder = yaml.safe_load((self.root / "_config.yml").read_text(encoding="utf-8"))["sphinx"]["config"]["dpkit_profiles"][
            profile].replace("runs/quick", "runs/smoke")
        return form.parse_numbers((self.root / folder / "numbers.jsonl").read_text(encoding="utf-8"), folder)


@pytest.fixture(scope="session")
def site(smoke) -> Site:
    """The book of the smoke study, built once with warnings as errors in a checkout of its own."""
    root = smoke.root.parent / "book" / "checkout"
    ready = root.parent / "ready"
    with smoke.alone():
        if not ready.exists():
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(smoke.root, root, ignore=shutil.ignore_patterns("results"))
            done = subprocess.run([sys.executable, "-m", "dpkit", "book", "--profile", "smoke"], cwd=root,
                                  env=clean_environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            ready.write_text(done.stdout, encoding="utf-8")
    address = re.search(r"file://(\S+)", ready.read_text(encoding="utf-8"))
    assert address, "the command does not say where the book lies"
    front = Path(address[1])
    assert front.is_file()
    assert root in front.parents
    return Site(root, front.parent)


def pages(site: Site) -> list[Path]:
    return [path for path in sorted(site.html.rglob("*.html")) if "_static" not in path.relative_to(site.html).parts]


# --- pages ------------------------------------------------------------------------------------------------------------

def test_every_document_has_its_page(site):
    documents = site.documents()
    assert len(documents) >= 12
    for document in documents:
        assert site.page(document).find("h1"), document
    # the front page is one click or none away from where `dpkit book` points
    front = (site.html / "index.html").read_text(encoding="utf-8")
    assert f"{documents[0]}.html" in front or "dp-verdicts" in front


def test_links_inside_the_book_lead_somewhere(site):
    for path in pages(site):
        for link in BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").find_all("a", href=True):
            target = link["href"].split("#")[0].split("?")[0]
            if target and not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{path.relative_to(site.html)}: {target}"


def test_no_page_asks_anything_of_a_network(site):
    found = pages(site)
    assert found
    outside = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
    for path in found:
        text = path.read_text(encoding="utf-8")
        page = BeautifulSoup(text, "html.parser")
        fetched = [tag.get("src") for tag in page.find_all(["script", "img", "iframe", "source", "embed"])]
        fetched += [tag.get("href") for tag in page.find_all("link") if set(tag.get("rel", [])) - {"canonical", "license"}]
        assert not [address for address in fetched if address and outside.match(address)], path.name
        assert not re.search(r"@import|url\(\s*[\"']?https?:", text), path.name
        for address in filter(None, fetched):
            if not address.startswith("data:"):
                assert (path.parent / address.split("?")[0].split("#")[0]).exists(), f"{path.name}: {address}"
    for style in site.html.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_no_page_shows_an_error(site):
    for path in pages(site):
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        assert not page.select(".problematic, .system-message, .traceback"), path.name
        assert "Traceback (most recent call last)" not in page.get_text(), path.name


def test_chapters_show_their_figures_and_tables(site):
    chapters = [name for name in site.documents() if re.search(r"/\d\d-", name)]
    assert len(chapters) >= 7
    for name in chapters:
        page = site.page(name)
        assert page.select(".cell_output table, .cell_output img"), name
        if not name.endswith("verdicts"):
            assert page.select(".cell_output img"), name
        # injected parameters are there, folded away
        assert page.select(".tag_injected-parameters.tag_hide-input, .tag_hide-input.tag_injected-parameters"), name


# --- numbers ----------------------------------------------------------------------------------------------------------

def prose(text: str) -> str:
    """A page's source without comments, what stands between fences, and literals of two backticks."""
    lines, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("%"):
            lines.append(line)
    return re.sub(r"``.*?``", "", "\n".join(lines))


def test_every_number_in_the_prose_is_one_of_the_run(site):
    sources = [path for path in (site.root / "book").rglob("*.md") if "runs" not in path.parts]
    count = 0
    for path in sources:
        roles = re.findall(r"\{num\}`([\w-]+):", prose(path.read_text(encoding="utf-8")))
        document = path.relative_to(site.root).with_suffix("").as_posix()
        if document not in site.documents():
            continue
        shown = site.page(document).select("abbr.dp-number")
        assert len(shown) == len(roles), document
        for tag in shown:
            name = tag["title"].split(" (")[0]
            records = [numbers[name] for numbers in map(site.numbers, set(roles)) if name in numbers]
            texts = {form.number_text(record, option) for record in records for option in ("", *form.OPTIONS)}
            assert tag.get_text() in texts, f"{document}: {name}"
            count += 1
    assert count


def test_the_table_of_verdicts_holds_what_was_measured(site):
    page, front = site.page(site.documents()[0]), (site.root / "book" / "index.md").read_text(encoding="utf-8")
    profiles = re.findall(r"^```\{verdicts\} ([\w-]+)", front, re.MULTILINE)
    tables = page.select("table.dp-verdicts")
    assert len(tables) == len(profiles) >= 1
    for profile, table in zip(profiles, tables, strict=True):
        known = site.numbers(profile)
        rows = table.select("tbody tr")
        assert [row.find("strong").get_text() for row in rows] == [f"C{i}" for i in range(1, 8)]
        tested = 0
        for row in rows:
            assert row.select_one(".dp-badge").get_text() in form.VERDICTS
            assert row.select_one("a.reference.internal")
            measured = row.find_all("td")[2]
            values = [p.get_text().replace("\xa0", " ").lstrip("\u25cf ") for p in measured.select("p.dp-value")]
            names = [code.get_text() for code in measured.select("code")]
            assert len(values) == len(names)
            for value, name in zip(values, names, strict=True):
                assert value == (form.number_text(known[name]) if name in known else "not measured")
                tested += name in known
        assert tested


# --- what is refused --------------------------------------------------------------------------------------------------

def write(path: Path, *outputs) -> Path:
    cell = nbformat.v4.new_code_cell("1", outputs=list(outputs), execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell]), path)
    return path


def test_empty_cut_and_failed_notebooks_are_refused(tmp_path):
    fine = nbformat.v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=1)
    book.check_notebook(write(tmp_path / "fine.ipynb", fine))
    with pytest.raises(book.Broken, match=r"empty.ipynb has no outputs"):
        book.check_notebook(write(tmp_path / "empty.ipynb"))
    failed = nbformat.v4.new_output("error", ename="ValueError", evalue="boom", traceback=[])
    with pytest.raises(book.Broken, match=r"failed.ipynb carries an error \(ValueError: boom\)"):
        book.check_notebook(write(tmp_path / "failed.ipynb", fine, failed))
    for content in ("", "{}", (tmp_path / "fine.ipynb").read_text(encoding="utf-8")[:-50]):
        (tmp_path / "cut.ipynb").write_text(content, encoding="utf-8")
        with pytest.raises(book.Broken, match=r"cut.ipynb is no whole notebook"):
            book.check_notebook(tmp_path / "cut.ipynb")


def test_a_book_with_a_failed_chapter_is_not_built(checkout, site):
    shutil.copytree(site.root / "book" / "runs", checkout / "book" / "runs")
    path = checkout / "book" / "runs" / "smoke" / "03-tickets.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    cell = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    cell["outputs"] = [{"output_type": "error", "ename": "ValueError", "evalue": "boom", "traceback": []}]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(book.Broken, match=r"03-tickets.ipynb carries an error"):
        book.build("smoke")
    assert not list((checkout / "_build").rglob("*.html"))
    with pytest.raises(Missing, match="no executed notebooks"):
        book.build("quick")


# --- in a browser -----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine: `apt-get install chromium`")
def test_a_browser_without_a_network_shows_formulas_and_verdicts(site, tmp_path):
    def rendered(document: str) -> BeautifulSoup:
        done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
                               "--virtual-time-budget=20000", "--dump-dom", site.path(document).as_uri()],
                              capture_output=True, text=True, timeout=120)
        return BeautifulSoup(done.stdout, "html.parser")

    chapter = next(name for name in site.documents() if name.endswith("02-distillation"))
    formulas = site.page(chapter).select(".math")
    page = rendered(chapter)
    assert formulas
    drawn = page.select(".math mjx-container")
    assert len(drawn) == len(formulas)
    assert all(formula.select("svg") for formula in drawn)  # several where a line breaks inside one
    assert not page.select("mjx-merror, [data-mjx-error]")
    front = rendered(site.documents()[0])
    assert len(front.select("table.dp-verdicts tbody tr")) >= 7
    assert front.select_one("table.dp-verdicts .dp-badge").get_text() in form.VERDICTS
