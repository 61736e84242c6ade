"""The notebooks' sources, their parameters, and what happens when a cell fails or there is nothing to show."""
from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

from dpkit import notebooks
from dpkit.stages import FIELDS, load_study

SOURCES = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
STEMS = [path.stem for path in SOURCES]
MODULES = {"IPython", "dpkit", "json", "pandas", "torch"}
TINY = {"train_images": 100, "test_images": 50, "width": 2, "epochs": 1, "sets": ["idc"], "ipc": 1, "factor": 1,
        "distill_outer": 1, "distill_inner": 1, "distill_network_images": 20, "set_epochs": 1, "evaluation_seeds": 1,
        "arms": ["imp", "distilled"], "rounds": 1, "at_rounds": [1], "rewind_epochs": 0.5, "seeds": 1, "points": 3,
        "plane_arms": ["dense"], "plane_resolution": 3, "plane_images": 20, "hessian_arms": ["dense", "distilled"],
        "hessian_images": 20, "probes": 2, "lanczos_steps": 2}

each = pytest.mark.parametrize("path", SOURCES, ids=STEMS)


def cells(path: Path, kind: str = "code") -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


# --- sources ----------------------------------------------------------------------------------------------------------

def test_there_are_nine_in_reading_order():
    assert STEMS == ["01-data", "02-distillation", "03-tickets", "04-masks", "05-robustness", "06-connectivity", "07-landscape",
                     "08-hessian", "09-verdicts"]
    assert list(notebooks.sources()) == STEMS


@each
def test_sources_are_valid_and_carry_no_results(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells(path))
    assert not {name for cell in book.cells for name in cell.metadata} - {"tags"}
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids)
    assert set(book.metadata) == {"kernelspec", "language_info"}


@each
def test_the_first_code_cell_declares_known_parameters_and_all_are_used(path):
    tagged = [i for i, cell in enumerate(cells(path)) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [0]
    found = notebooks.declared(path)
    assert set(notebooks.COMMON) <= set(found) <= {*notebooks.COMMON, *FIELDS}
    # None leaves a parameter to the profile
    assert all(found[name] is None for name in found if name in FIELDS)
    assert (found["profile"], found["share"], found["overrides"], found["store"], found["out"]) == (
        "smoke", "1/1", {}, None, None)
    (call,) = [node for node in ast.walk(ast.parse(cells(path)[1].source)) if isinstance(node, ast.Call)
               and getattr(node.func, "id", "") == "Chapter"]
    passed = [getattr(node, "id", None) for node in call.args[1:]] + [k.arg for k in call.keywords if k.arg == k.value.id]
    assert sorted(passed) == sorted(found)


@each
def test_code_only_calls_the_library(path):
    for cell in cells(path):
        tree = ast.parse(cell.source)  # also: no magics and no shell
        for node in ast.walk(tree):
            assert not isinstance(node, (ast.ClassDef, ast.While, ast.Try)), cell.source
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= MODULES


@each
def test_prose_holds_no_typed_results(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert not re.findall(r"\d+\.\d+ ?%|\d+\.\d+ points|± ?\d|\(n = \d", text)
    assert text.startswith("# ")


# --- parameters -------------------------------------------------------------------------------------------------------

def tickets() -> Path:
    return notebooks.find("03-tickets")


@pytest.mark.parametrize("name", ["03-tickets", "tickets", "03-tickets.ipynb", "notebooks/03-tickets.ipynb"])
def test_a_notebook_is_found_by_its_names(name):
    assert notebooks.find(name).stem == "03-tickets"


def test_an_unknown_notebook_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown notebook '3-ticket'; did you mean 03-tickets\?"):
        notebooks.find("3-ticket")


def test_words_become_values_and_what_the_notebook_does_not_declare_goes_into_overrides():
    found = notebooks.parameters(tickets(), {"width": "4", "at_rounds": "1,2", "rounds": 2, "probes": "3", "arms": "imp",
                                             "profile": "smoke", "workers": "1", "overrides": {"ipc": 5}})
    assert found == {"width": 4, "at_rounds": [1, 2], "rounds": 2, "arms": ["imp"], "profile": "smoke", "workers": 1,
                     "overrides": {"ipc": 5, "probes": 3}}
    json.dumps(found)  # papermill writes them into a cell


def test_fewer_arms_need_no_second_parameter():
    study = load_study("smoke", {"arms": notebooks.parameters(tickets(), {"arms": "imp,random"})["arms"]})
    assert (study.plane_arms, study.hessian_arms) == (("dense",), ("dense", "imp"))


@pytest.mark.parametrize(("given", "reason"), [
    ({"bogus": 1}, "unknown parameter 'bogus'"), ({"widht": 1}, "did you mean width"), ({"width": "4.5"}, "a whole number"),
    ({"width": True}, "a whole number"), ({"fraction": 1.0}, "fraction must lie in"), ({"fraction": 0}, "fraction must lie in"),
    ({"overrides": {"bogus": 1}}, "unknown parameter 'bogus'"), ({"overrides": {"fraction": 2}}, "fraction must lie in"),
    ({"share": "3/2"}, "share must be i/n"), ({"profile": "nope"}, "unknown profile"), ({"at_rounds": [3]}, "at_rounds must"),
    ({"workers": "x"}, "workers must be a whole number"), ({"children": 1}, "children must be >= 2")])
def test_parameters_are_checked_before_anything_runs(tmp_path, given, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        notebooks.parameters(tickets(), given)
    with pytest.raises(ValueError, match=re.escape(reason)):
        notebooks.execute("03-tickets", given, tmp_path / "out" / "03-tickets.ipynb")
    assert not list(tmp_path.iterdir())


def test_the_digest_is_of_what_the_author_wrote(tmp_path):
    book = nbformat.read(tickets(), as_version=4)
    code = next(cell for cell in book.cells if cell.cell_type == "code")
    code.outputs, code.execution_count = [nbformat.v4.new_output("stream", text="1")], 3
    nbformat.write(book, tmp_path / "run.ipynb")
    assert notebooks.digest(tmp_path / "run.ipynb") == notebooks.digest(tickets())
    code.source += "\n"
    nbformat.write(book, tmp_path / "edited.ipynb")
    assert notebooks.digest(tmp_path / "edited.ipynb") != notebooks.digest(tickets())


# --- execution --------------------------------------------------------------------------------------------------------

def write(path: Path, *sources: str) -> Path:
    """A notebook whose first cell holds the parameters."""
    made = [nbformat.v4.new_code_cell(source, metadata={"tags": [] if i else ["parameters"]})
            for i, source in enumerate(sources)]
    language = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=language), path)
    return path


def test_a_failing_cell_gives_one_line_no_output_and_a_copy_to_look_at(checkout, tmp_path):
    path = write(tmp_path / "broken.ipynb", 'profile = "smoke"', "print('before')", 'raise ValueError("boom\\nand more")')
    output = tmp_path / "executed" / "broken.ipynb"
    with pytest.raises(notebooks.Failed) as caught:
        notebooks.execute(str(path), {}, output)
    kept = checkout / "results" / "failed" / "broken.ipynb"
    assert str(caught.value).startswith("notebook broken failed: ValueError: boom")
    assert len(str(caught.value).splitlines()) == 1
    assert not list(output.parent.iterdir())
    outputs = [output for cell in cells(kept) for output in cell.outputs]
    assert next(o.text for o in outputs) == "before\n"
    assert "boom\nand more" in [o.get("evalue") for o in outputs]


def test_an_executed_notebook_is_clean(tmp_path, checkout):
    path = write(tmp_path / "run.ipynb", 'profile = "smoke"\nout = None')
    book = nbformat.read(path, as_version=4)
    book.metadata["papermill"] = {"duration": 1.5}
    stream = [nbformat.v4.new_output("stream", name=name, text=name) for name in ("stdout", "stderr")]
    book.cells += [nbformat.v4.new_code_cell(f'out = "{checkout}/book/runs"', metadata={
        "tags": ["injected-parameters"], "papermill": {"duration": 1}, "execution": {"busy": "now"}}, outputs=stream)]
    nbformat.write(book, path)
    other = tmp_path / "again.ipynb"
    book.cells[-1].id = "0123abcd"  # papermill draws one in every run
    nbformat.write(book, other)
    for target in (path, other):
        notebooks._clean(target)
    clean = nbformat.read(path, as_version=4)
    nbformat.validate(clean)
    assert "papermill" not in clean.metadata
    assert clean.cells[-1].metadata == {"tags": ["injected-parameters", "hide-input"]}
    assert [output.name for output in clean.cells[-1].outputs] == ["stdout"]
    assert clean.cells[-1].source == 'out = "book/runs"'
    assert path.read_bytes() == other.read_bytes()


def play(path: Path, **parameters) -> dict:
    """Run a notebook's code cells in this process; returns what they left behind."""
    namespace: dict = {}
    for i, cell in enumerate(cells(path)):
        exec(compile(cell.source, f"{path.name}[{i}]", "exec"), namespace)
        if i == 0:
            namespace |= parameters
    return namespace


@each
def test_a_share_with_nothing_to_do_runs_through_on_an_empty_store(path, checkout, tmp_path):
    left = play(path, share="97/97", overrides=TINY, store=str(tmp_path / "store"), workers=1)
    assert list(left["chapter"].store.keys()) == []
    assert left["chapter"].numbers == {}


@pytest.fixture(scope="module")
def diverged(tmp_path_factory) -> Path:
    """A store that the notebooks of a study whose networks all diverge share."""
    return tmp_path_factory.mktemp("diverged") / "store"


@each
def test_a_study_whose_networks_all_diverge_is_shown(path, checkout, diverged):
    left = play(path, overrides=TINY | {"lr": 1e30, "set_lr": 1e30, "set_epochs": 4}, store=str(diverged), workers=1)
    chapter = left["chapter"]
    frame = chapter.frame(chapter.parts[0])
    assert len(frame) == len(chapter.rows(chapter.parts[0]))
    assert frame["failed"].str.contains("diverged at step").all()
    assert chapter.numbers == {}
    assert {verdict["verdict"] for verdict in chapter.verdicts()} == {"not tested"}
    if chapter.name == "verdicts":
        assert len(left["failed"]) == sum(len(chapter.rows(part)) for part in chapter.parts)


def distillation() -> Path:
    return notebooks.find("02-distillation")


def test_small_sets_of_every_sort_are_compared(checkout, tmp_path):
    sets = ["idc", "idc_factor1", "dm", "herding", "random_real", "idc_soft", "random_real_soft"]
    few = {"sets": sets, "ipc": 2, "evaluation_seeds": 2, "seeds": 2, "dm_steps": 2, "dm_real_batch": 4}
    left = play(distillation(), overrides=TINY | few, evaluation_archs=["resnet10:2"], store=str(tmp_path / "store"), workers=1,
                out=str(tmp_path / "out"))
    chapter = left["chapter"]
    assert set(left["pictures"]) == {"IDC", "IDC, factor 1", "DM", "herding", "random real subset"}
    assert {images.shape for images in left["pictures"].values()} == {(10, 16, 16, 3)}
    assert {name.split("\n")[0] for name in left["pairs"]} == {"IDC", "IDC, factor 1", "DM"}  # real images have no before
    assert set(left["others"]["arch"]) == {"convnet3 (made with)", "resnet10"}
    assert set(left["points"]["set"]) == {"idc", "idc_factor1", "dm", "herding", "random_real", "all_data"}
    assert left["costs"].set_index(["set", "seed"])["networks"].to_dict() == {
        ("idc", 0): 0, ("idc_factor1", 0): 0, ("dm", 0): 0, ("herding", 0): 1, ("random_real", 0): 0, ("random_real", 1): 0,
        ("idc_soft", 0): 1, ("random_real_soft", 0): 1, ("random_real_soft", 1): 1}
    assert len(left["shared"]) == 1
    assert set(left["history"]["set"]) == {"idc", "idc_factor1", "dm"}
    assert {name: getattr(spec, "factor", None) for name, spec in chapter.asked().items() if name in ("idc", "idc_soft")} == {
        "idc": 1, "idc_soft": 1}
    assert all("teacher's first choice" in row and "not measured" not in row for row in left["rows"])
    assert left["known"] is False
    assert chapter.pictures("idc", count=1).shape == (10, 16, 16, 3)
    assert 0 <= chapter.pictures("dm").min() <= chapter.pictures("dm").max() <= 1
    assert chapter.pictures("herding", "before") is chapter.pictures("dsa") is chapter.small_set("dsa") is None
    # factor 1 in both: the same set, so no difference
    assert chapter.sign("distill.idc_minus_idc_factor1.accuracy") == "not decided"
    assert chapter.sign("distill.idc_minus_dsa.accuracy") == "not measured"
    written = {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert written == {"set-images", "before-after", "idc-images", "set-accuracy", "soft-labels", "architectures", "price",
                       "matching"}


def test_a_set_that_could_not_be_made_is_shown_as_failed(checkout, tmp_path):
    sets = {"sets": ["dm", "dm_soft", "random_real"], "dm_steps": 3, "dm_real_batch": 4, "dm_lr": 1e38}
    left = play(distillation(), overrides=TINY | sets, store=str(tmp_path / "store"), workers=1)
    table = left["comparison"].cost_table(left["costs"], left["frame"])
    assert table.loc["DM", "accuracy"].startswith("failed: the images are not finite")
    assert table.loc["DM, soft labels", "accuracy"].startswith("failed: parent set")
    assert table.loc["random real subset", "accuracy"].endswith("%")  # one seed has no interval
    assert (list(left["recipes"]), left["against"]) == (["random_real"], ["dm"])
    assert left["chapter"].sign("distill.random_real_minus_dm.accuracy") == "not measured"
