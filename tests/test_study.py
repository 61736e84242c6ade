"""The smoke study through the workflow: whole, once, again without work, and told when it has gone stale."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import NOT_OURS, Smoke

from dpkit import cli, notebooks, project, stages, studies
from dpkit.book import check_notebook
from dpkit.report import format as form
from dpkit.store import Store


@pytest.fixture
def study(smoke, monkeypatch) -> Smoke:
    """The executed study; its checkout is the current folder."""
    for name in NOT_OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(smoke.root)
    return smoke


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir()) if path.is_file()}


def keys(store: Path) -> list[str]:
    return list(Store(store).keys())


# --- what a study leaves ----------------------------------------------------------------------------------------------

def test_every_notebook_is_executed_without_errors(study):
    made = sorted(path.stem for path in study.folder.glob("*.ipynb"))
    assert made == list(notebooks.sources())
    for path in sorted(study.folder.glob("*.ipynb")):
        check_notebook(path)
        code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()]
        assert all(cell.execution_count for cell in code), path.name
        assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_executed_notebooks_name_no_place_of_this_machine(study):
    for path in (*study.folder.glob("*.ipynb"), *study.folder.glob("*.json*")):
        assert str(study.root) not in path.read_text(encoding="utf-8"), path.name


def test_nothing_half_written_is_left(study):
    names = [path.name for path in study.folder.rglob("*")]
    assert not [name for name in names if name.startswith(".")]
    assert not (study.root / "results" / "failed").exists()
    assert not (study.store / "errors").exists() or not list((study.store / "errors").iterdir())
    assert not list(Store(study.store).verify())


def test_every_planned_unit_is_in_the_store_and_nothing_else(study):
    plan = cli.plan_of("smoke", {})
    planned = stages.closure(e.unit for part in stages.FRAMES for e in getattr(plan, part)())
    kept = {key for key in keys(study.store) if Store(study.store).get(key).meta["stage"] != "number"}
    assert kept == set(planned)


def test_numbers_and_verdicts_are_written_for_the_book(study):
    text = (study.folder / "numbers.jsonl").read_text(encoding="utf-8")
    numbers = form.parse_numbers(text, "numbers.jsonl")
    for chapter in ("distill.idc.accuracy", "tickets.imp.accuracy@67", "connectivity.dense.barrier",
                    "landscape.dense.highest_error", "hessian.dense.trace"):
        assert chapter in numbers
    assert all((study.store / record["key"][:2] / record["key"] / "meta.json").is_file() for record in numbers.values())
    rows = form.parse_verdicts((study.folder / "verdicts.json").read_text(encoding="utf-8"), "verdicts.json")
    assert [row["id"] for row in rows] == [f"C{i}" for i in range(1, 8)]
    for row in rows:
        for test in row["tests"]:
            assert test["value"] == numbers[test["measure"]]["value"]


def test_the_command_gives_the_numbers_of_the_book(study, dpkit):
    answer = dpkit("numbers", "--profile", "smoke", "--json")
    assert answer.out == (study.folder / "numbers.jsonl").read_text(encoding="utf-8")


def test_without_a_store_the_recorded_numbers_are_given_and_that_is_said(study, dpkit, tmp_path, monkeypatch):
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "empty"))
    answer = dpkit("numbers", "--profile", "smoke", "--json")
    assert answer.out == (study.folder / "numbers.jsonl").read_text(encoding="utf-8")
    assert "numbers as recorded in book/runs/smoke" in answer.err


def test_every_figure_is_written_with_its_frame(study):
    pictures = sorted((study.folder / "figures").glob("*.png"))
    assert len(pictures) >= 8
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    for name in ("barriers", "paths", "curvature", "planes", "learning-curves"):
        lines = (study.folder / "figures" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        assert len(lines) > 1
        assert re.search(r"\b(seed|arm)\b", lines[0])


def test_the_record_says_what_was_run(study):
    record = json.loads((study.folder / "provenance.json").read_text(encoding="utf-8"))
    assert record["profile"] == "smoke"
    assert record["settings"] == stages.load_study("smoke").to_dict()
    assert record["notebooks"] == {stem: notebooks.digest(path) for stem, path in notebooks.sources().items()}
    assert record["stages"] == {name: found.version for name, found in stages.STAGES.items()}
    assert {"torch", "python", "processor", "cores"} <= set(record["machine"])


# --- again ------------------------------------------------------------------------------------------------------------

def test_a_second_run_makes_nothing_and_executes_nothing(study):
    with study.alone():
        before = keys(study.store), times(study.folder)
        assert studies.run("smoke", {}) == study.folder
        assert (keys(study.store), times(study.folder)) == before


def test_a_notebook_that_was_deleted_is_executed_again_from_the_store_to_the_same_bytes(study):
    with study.alone():
        again = [study.folder / name for name in ("04-masks.ipynb", "09-verdicts.ipynb")]  # the last one sums up
        before, stamps, content = keys(study.store), times(study.folder), [path.read_bytes() for path in again]
        record = (study.folder / "numbers.jsonl").read_bytes()
        again[0].unlink()
        studies.run("smoke", {})
        assert keys(study.store) == before
        assert [path.read_bytes() for path in again] == content
        assert (study.folder / "numbers.jsonl").read_bytes() == record
        assert {name for name, stamp in times(study.folder).items() if stamps[name] != stamp} == {
            *(path.name for path in again), "numbers.jsonl", "verdicts.json"}


def test_a_share_makes_its_part_with_equal_bits_and_no_more(study, tmp_path):
    given = {"profile": "smoke", "share": "1/2", "store": str(tmp_path / "store"), "workers": 1}
    notebooks.execute("03-tickets", given, tmp_path / "out" / "03-tickets.ipynb")
    check_notebook(tmp_path / "out" / "03-tickets.ipynb")
    one, whole = Store(tmp_path / "store"), Store(study.store)
    made = {key for key in keys(one.root) if one.get(key).meta["stage"] != "number"}
    plan = cli.plan_of("smoke", {})
    mine, other = (set(stages.closure(plan.share("tickets", share))) for share in ("1/2", "2/2"))
    assert made == mine
    assert mine < mine | other == set(stages.closure(e.unit for e in plan.tickets()))
    assert {key: one.get(key).meta["sha256"] for key in made} == {key: whole.get(key).meta["sha256"] for key in made}


# --- the workflow -----------------------------------------------------------------------------------------------------

PARAMETERS = 'profile, overrides, store, out, device, workers = "smoke", {}, None, None, "auto", 0'
LANGUAGE = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def put(checkout: Path, **sources: tuple[str, ...]) -> None:
    """Notebooks of these cells, by name (``n01_odd`` is 01-odd), instead of the study's."""
    for path in (checkout / "notebooks").glob("*.ipynb"):
        path.unlink()
    for name, texts in sources.items():
        cells = [nbformat.v4.new_code_cell(text, metadata={"tags": [] if i else ["parameters"]})
                 for i, text in enumerate((PARAMETERS, *texts))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=LANGUAGE),
                       checkout / "notebooks" / f"{name[1:].replace('_', '-')}.ipynb")


def printed(path: Path) -> str:
    """What an executed notebook's cells wrote."""
    return "".join(o.text for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
                   for o in cell.outputs if o.output_type == "stream")


def test_a_notebook_that_fails_ends_the_study_in_one_line_and_leaves_no_output(checkout):
    put(checkout, n01_odd=("import os", "print(os.environ['OMP_NUM_THREADS'])", 'raise ValueError("the data are odd")'))
    with pytest.raises(notebooks.Failed) as caught:
        studies.run("smoke", {})
    assert re.match(r"notebook 01-odd failed: ValueError: the data are odd; the executed copy is \S+$", str(caught.value))
    assert not [path for path in (checkout / "book" / "runs" / "smoke").rglob("*") if path.is_file()]
    assert printed(checkout / "results" / "failed" / "01-odd.ipynb") == "1\n"  # a core each, as others are drawn beside it


def test_notebooks_are_executed_side_by_side_and_the_last_one_after_them(checkout):
    def waits(mine: str, other: str) -> tuple[str, ...]:
        return ("import time\nfrom pathlib import Path",
                f"Path({mine!r}).touch()\nwhile not Path({other!r}).exists():\n    time.sleep(0.1)")

    put(checkout, n01_one=waits("one", "two"), n02_two=waits("two", "one"),
        n03_last=("from pathlib import Path", "print(sorted(path.name for path in Path(out).glob('[0-9]*')))"))
    out = studies.run("smoke", {}, workers=2)
    assert printed(out / "03-last.ipynb") == "['01-one.ipynb', '02-two.ipynb']\n"
    assert not list((checkout / "results" / "runs").rglob("*.running"))
    assert not list((checkout / "results" / "runs").rglob("progress.json"))


def test_a_unit_that_fails_names_itself_in_the_notebook_that_needs_it(study, checkout):
    for path in (checkout / "notebooks").glob("*.ipynb"):
        if path.stem not in ("01-data", "05-robustness"):
            path.unlink()
    # as a profile of its own, from a place that jobs do not start in
    (checkout / "own.yml").write_text(stages.profiles()["smoke"].read_text(encoding="utf-8"), encoding="utf-8")
    with study.alone():
        shutil.copytree(study.store, checkout / "results" / "store")
    store, plan = checkout / "results" / "store", cli.plan_of("own.yml", {})
    needs, other = plan.robustness()[-1].unit, plan.data()[0].unit
    for unit in (needs, other):
        shutil.rmtree(store / unit.key[:2] / unit.key)
    network = needs.parents["network"].key
    (store / network[:2] / network / "tensors.safetensors").write_bytes(b"spoilt")
    with pytest.raises(notebooks.Failed) as caught:
        studies.run("own.yml", {}, workers=1)
    assert str(caught.value).startswith("notebook 05-robustness failed: RuntimeError: 1 of robustness's units ended in an error, "
                                        f"the first: {needs.label}: ")
    assert needs.label in (store / "errors" / f"{needs.key}.txt").read_text(encoding="utf-8")
    assert (store / other.key[:2] / other.key / "meta.json").is_file()  # all else is made
    shown = nbformat.read(checkout / "results" / "failed" / "05-robustness.ipynb", as_version=4)
    assert [o.ename for cell in shown.cells if cell.cell_type == "code" for o in cell.outputs if o.output_type == "error"] == [
        "RuntimeError"]


def test_the_line_says_what_is_computed_and_then_what_is_executed(checkout, tmp_path):
    put(checkout, n01_data=(), n02_own=(), n03_last=())
    assert studies._line(tmp_path) == ""
    (tmp_path / "progress.json").write_text('{"line": "artifacts: 2 of 9 units"}', encoding="utf-8")
    assert studies._line(tmp_path) == "artifacts: 2 of 9 units"
    (tmp_path / "artifacts.done").touch()
    assert studies._line(tmp_path) == "notebooks: 0 of 3 executed"
    for name in ("01-data.done", "02-own.share-1of2.done", "02-own.running", "03-last.running"):
        (tmp_path / name).touch()
    assert studies._line(tmp_path) == "notebooks: 1 of 3 executed  [02-own; 03-last]"
    (tmp_path / "progress.json").write_text('{"line": "own: 2 of 9 units"}', encoding="utf-8")
    assert studies._line(tmp_path) == "notebook 2 of 3, own: 2 of 9 units"
    (tmp_path / "progress.json").write_text('{"line": "cut', encoding="utf-8")
    assert studies._line(tmp_path) == "notebooks: 1 of 3 executed  [02-own; 03-last]"


def test_only_what_the_notebooks_show_is_computed(checkout):
    assert studies._chapters() == list(stages.CHAPTERS)
    put(checkout, n01_hessian=(), n02_own=(), n03_data=())
    assert studies._chapters() == ["data", "hessian"]


@pytest.mark.parametrize(("lines", "reason"), [
    (["dpkit: notebook 05-b failed: y", "dpkit: fewer processes", "dpkit: notebook 03-a failed: x"], "notebook 03-a failed: x"),
    (["noise", "dpkit: fewer processes", "dpkit: no space left", "Error in rule"], "no space left"),
    (["noise", "MissingInputException in rule chapter"], "MissingInputException in rule chapter"), (["noise"], "")])
def test_one_line_of_what_a_failed_workflow_says_is_the_reason(lines, reason):
    assert studies._complaint(lines) == reason


@pytest.mark.parametrize(("workers", "free", "beside"), [(3, None, 3), (3, 64e9, 3), (3, 2.5e9, 2), (3, 1e8, 1), (1, None, 1),
                                                         (50, None, 8), (0, None, 4)])
def test_as_many_notebooks_at_once_as_there_are_cores_and_memory(monkeypatch, workers, free, beside):
    monkeypatch.setattr("dpkit.cores.available", lambda: 4)
    monkeypatch.setattr(studies, "free_memory", lambda: free)
    assert studies.side_by_side(workers) == beside


# --- stale ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def record(smoke, tmp_path) -> Path:
    """A copy of the executed study, to spoil."""
    with smoke.alone():
        return Path(shutil.copytree(smoke.folder, tmp_path / "smoke"))


def change(folder: Path, *place: str, value) -> None:
    """Put ``value`` at a place of the folder's record."""
    path = folder / "provenance.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_fresh_record_is_not_stale(study, record):
    assert studies.stale(record) == []


@pytest.mark.parametrize(("place", "value", "reason"), [
    (("notebooks", "03-tickets"), "0" * 64, "notebook 03-tickets has changed since"),
    (("stages", "hessian"), 0, "stage hessian is now version 2, recorded with 0"),
    (("settings", "epochs"), 3, "epochs of profile smoke is now 2, recorded with 3")])
def test_a_record_is_stale_when_something_behind_it_changed(study, record, place, value, reason):
    change(record, *place, value=value)
    assert studies.stale(record) == [reason]


def test_a_record_is_stale_when_a_notebook_is_missing(study, record):
    (record / "07-landscape.ipynb").unlink()
    assert studies.stale(record) == ["the executed 07-landscape is missing"]


def test_other_data_do_not_make_a_record_stale(study, record):
    change(record, "settings", "dataset", value="npz:elsewhere.npz")
    assert studies.stale(record) == []


def test_verify_tells_of_stale_records(checkout, record, dpkit):
    target = checkout / "book" / "runs" / "smoke"
    shutil.copytree(record, target)
    assert project.recorded_folders() == [target]
    path = checkout / "notebooks" / "03-tickets.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[0].source += " Edited."
    nbformat.write(book, path)
    answer = dpkit("verify")
    assert answer.code == 1
    assert "book/runs/smoke: stale, notebook 03-tickets has changed since" in answer.out
    assert answer.out.splitlines()[-1] == "0 artifacts, 0 wrong; 1 recorded results, 1 stale"
