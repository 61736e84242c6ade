"""One small set through the command line: made, evaluated, stopped and continued, written, read again; every mistake one line."""
from __future__ import annotations

import functools
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import NOT_OURS, make_checkout
from small_study import TINY
from test_cli import files, one_line

from dpkit import cli, stages
from dpkit.store import Store


def word(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


SETTINGS = {name: word(value) for name, value in TINY.items() if name != "sets"}


def tiny(**more: str) -> list[str]:
    """Options that make the smallest study."""
    return ["--profile", "smoke", *(part for name, value in (SETTINGS | {"evaluation_archs": "", "evaluation_seeds": "2"}
                                                             | more).items() for part in ("--set", f"{name}={value}"))]


@functools.cache
def plan(**more):
    return cli.plan_of("smoke", SETTINGS | {"evaluation_archs": "", "evaluation_seeds": "2"} | more)


@pytest.fixture
def run(dpkit):
    """Call `dpkit distill`; the answer must be good."""
    def call(*words, **more):
        answer = dpkit("distill", *words, *tiny(**more))
        assert answer.code == 0, answer.err
        return answer.out
    return call


def lines_of(out: str, start: str) -> list[str]:
    return [line for line in out.splitlines() if line.strip().startswith(start)]


# --- make -------------------------------------------------------------------------------------------------------------------
def test_making_says_what_comes_and_what_came(dpkit, run, here):
    out = run("make", "dm", evaluation_archs="resnet10:2")
    assert re.match(r"to make: set dm, 4 networks to evaluate it\nabout \d+ s on 1 core .* of memory, .* on disk", out)
    key, = re.findall(r"^  key       ([0-9a-f]{64})$", out, re.MULTILINE)
    artifact = here.get(key)
    assert artifact.meta["spec"]["distill"]["method"] == "dm"
    assert lines_of(out, "images") == ["  images    10 stored, each one training image"]
    assert re.search(r"^  made in   \d+ s on cpu, at most \d+ MB of memory$", out, re.MULTILINE)
    own, other = lines_of(out, "accuracy")
    assert re.fullmatch(r"  accuracy  [\d.]+% \[.*\] \(n = 2\) on convnet3-3, distill.dm.accuracy", own)
    assert re.fullmatch(r"  accuracy  [\d.]+% \[.*\] \(n = 2\) on resnet10-2, distill.dm.resnet10.accuracy", other)
    # it is the study's set and the study's networks: nothing of it is left to be made there, and the number is the same
    asked = cli.plan_of("smoke", SETTINGS | {"sets": "dm", "evaluation_archs": "resnet10:2", "evaluation_seeds": "2"})
    left = stages.missing(here, [e.unit for e in (*asked.distillation(), *asked.transfer())])
    assert {unit.label for unit in left.values()} == {"dense network 0, child 0"}
    numbers = dpkit("numbers", "--json", *tiny(sets="dm", evaluation_archs="resnet10:2")).out
    value = next(json.loads(x) for x in numbers.splitlines() if '"distill.dm.accuracy"' in x)["value"]
    assert f"  accuracy  {100 * value:.1f}%" in own
    # the command that it ends with works
    last, = lines_of(out, "export it: dpkit")
    assert dpkit(*shlex.split(last.split("dpkit ", 1)[1])).code == 0
    assert torch.equal(torch.load("sets/dm/data.pt")[0], artifact.tensors["images"])
    assert json.loads(Path("sets/dm/recipe.json").read_text())["key"] == key


def test_nothing_is_made_twice(run, here):
    run("make", "idc", "--no-evaluate")
    before = {path: path.stat().st_mtime_ns for path in here.root.rglob("meta.json")}
    out = run("make", "idc", "--no-evaluate")
    assert out.startswith("to make: nothing, all of it is in the store\nsmall set idc\n")
    assert "about" not in out
    assert "accuracy" not in out
    assert "  images    10 stored, decoded into 40" in out
    assert {path: path.stat().st_mtime_ns for path in here.root.rglob("meta.json")} == before


def test_what_a_set_needs_is_made_first(run, here):
    out = run("make", "mtt", "--no-evaluate")
    assert out.startswith("to make: 1 unit before it (expert 0), set mtt\n")
    assert re.search(r"stored, each one training image; learned with them: lr [\d.]+$", out, re.MULTILINE)
    assert here.has(plan().expert(0).key)
    out = run("make", "dm_soft", "--no-evaluate", dm_steps="1")
    assert out.startswith("to make: 2 units before it (small set dm; dense network 0, search), set dm_soft\n")
    assert "export dm_soft sets/dm_soft --form png" in out


def test_one_seed_of_several(run, here):
    out = run("make", "random_real", "--seed", "1")
    assert out.startswith("to make: set random_real, 1 network to evaluate it\n")
    assert lines_of(out, "key") == [f"  key       {plan().small_set('random_real', 1).key}"]
    assert lines_of(out, "accuracy")[0].endswith("(n = 1) on convnet3-3, distill.random_real.accuracy")
    assert "sets/random_real --form idc --seed 1" in out
    assert run("make", "random_real").startswith("to make: set random_real, 1 network to evaluate it\n")
    run("export", "random_real", "one", "--seed", "1")
    assert json.loads(Path("one/recipe.json").read_text())["seed"] == 1


def test_a_stopped_set_continues_and_ends_as_a_straight_one(dpkit, run, here, tmp_path, monkeypatch):
    more = {"distill_outer": "4"}
    key, told, most = plan(**more).small_set("idc", 0).key, [], [99]

    def telling(self, unit):
        def tell(done, total):
            told.append(done)
            if len(told) == most[0]:
                raise KeyboardInterrupt
        return tell

    monkeypatch.setattr(stages.Context, "step", telling)
    monkeypatch.setattr(stages.sets, "CHECKPOINT_SECONDS", 0.0)
    run("make", "idc", "--no-evaluate", **more)
    straight, whole = here.get(key).tensors["images"], len(told)
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))
    told, most[0] = told[:0], 3
    answer = dpkit("distill", "make", "idc", "--no-evaluate", *tiny(**more))
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == "dpkit: stopped; the same command continues where it was"
    assert "Traceback" not in answer.err
    store = Store(tmp_path / "store")
    assert not store.has(key)
    assert store.load_partial(key) is not None
    told, most[0] = [], 99
    assert run("make", "idc", "--no-evaluate", **more).startswith("to make: set idc\n")
    assert 0 < len(told) < whole  # it went on from what was kept
    assert torch.equal(store.get(key).tensors["images"], straight)


def test_no_result_is_an_error_in_the_words_of_the_study(dpkit, here):
    answer = dpkit("distill", "make", "dm", *tiny(dm_lr="1e30"))
    assert answer.code == 2
    assert re.fullmatch(r"dpkit: small set dm has no result: the images are not finite after step \d+; lower lr \(here these "
                        r"options begin with dm_\)", answer.err.splitlines()[-1])


def test_memory_that_runs_out_names_what_helps(dpkit, here, monkeypatch):
    def none_left(spec, task):
        raise MemoryError("no more")

    monkeypatch.setattr("dpkit.distill.distil", none_left)
    answer = dpkit("distill", "make", "dm", *tiny(dm_steps="3"))
    assert answer.code == 2
    line = answer.err.splitlines()[-1]
    assert line.startswith("dpkit: small set dm: not enough memory to compute this alone; lower ")
    assert "--set distill_memory=GIGABYTES" in line
    assert "Traceback" not in answer.err


# --- import and export ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("form", "file", "at"), [("idc", "data.pt", ""), ("mtt", "images_best.pt", "@normalised"),
                                                  ("dc", "res.pt", "")])
def test_what_is_exported_can_be_imported(dpkit, run, here, form, file, at):
    run("make", "dm", "--no-evaluate")
    made = here.get(plan().small_set("dm", 0).key)
    folder = f"out/{form}"
    out = run("export", "dm", folder, "--form", form)
    assert out.splitlines() == [f"{folder}/{file}", *([f"{folder}/labels_best.pt"] if form == "mtt" else []),
                                f"{folder}/recipe.json"]
    recipe = json.loads(Path(folder, "recipe.json").read_text())
    assert recipe["recipe"] == made.result["recipe"]
    assert recipe["made"]["spec"]["distill"] == made.meta["spec"]["distill"]
    assert recipe["files"][file]["space"] == ("pixels" if form == "idc" else "normalised")
    at = at or ("@1" if form == "idc" else "")
    out = run("import", f"mine_{form}={folder}/{file}{at}", "--no-evaluate")
    assert f"form {form}, 10 images of 10 classes, " in out
    key, = re.findall(r"^  key       ([0-9a-f]{64})$", out, re.MULTILINE)
    assert torch.allclose(here.get(key).tensors["images"], made.tensors["images"], atol=1e-6)
    # the settings that it ends with are those of a study with the set in it
    words = shlex.split(lines_of(out, "use it in a study")[0].split("dpkit ", 1)[1])
    settings = cli.settings_of([w for o, w in pairwise(words) if o == "--set"])
    assert cli.plan_of("smoke", settings).small_set(f"mine_{form}", 0).key == key
    assert f"mine_{form}" in settings["sets"].split(",")


def test_a_published_set_is_evaluated_and_listed(run, here):
    run("make", "dm", "--no-evaluate")
    run("export", "dm", "again/d.pt")
    assert set(Path("again").iterdir()) == {Path("again/d.pt"), Path("again/recipe.json")}
    out = run("import", "again=again/d.pt@1")
    assert re.search(r"accuracy  .* \(n = 2\) on convnet3-3, distill.again.accuracy", out)
    out = run("list", published="again=again/d.pt@1", sets="again,dm_soft")
    rows = {line.split()[0]: line for line in out.splitlines()[1:-1]}
    assert set(rows) == {*stages.making.SETS, "again", "dm_soft"}
    assert "1 of 1" in rows["again"]
    assert "(n = 2)" in rows["again"]
    assert "1 of 1" in rows["dm"]
    assert "0 of 1" in rows["el2n"]
    assert "arXiv 2107.07075" in rows["el2n"]
    assert "1 network" in rows["herding"]
    assert out.splitlines()[-1].startswith("make one: dpkit distill make NAME --profile smoke --set")


def test_pictures_and_what_may_not_be_written(dpkit, run, here):
    run("make", "idc", "--no-evaluate")
    out = run("export", "idc", "pictures", "--form", "png")
    assert {Path(name).name for name in out.splitlines()} == {"all.png", *(f"class-{k}.png" for k in range(10)), "recipe.json"}
    assert all(Path(name).is_file() for name in out.splitlines())
    # the same set may join it in another form, another set may not
    run("export", "idc", "pictures")
    assert set(json.loads(Path("pictures/recipe.json").read_text())["files"]) == {"all.png", "data.pt", *(
        f"class-{k}.png" for k in range(10))}
    run("make", "dm", "--no-evaluate")
    before = {path: path.read_bytes() for path in Path("pictures").iterdir()}
    for words, reason in ((["idc", "pictures"], "data.pt exists"), (["dm", "pictures/other.pt"], "is of another set"),
                          (["idc", "new", "--form", "mtt"], "mosaics of 2 x 2 images, which only form idc holds"),
                          (["idc", "new", "--form", "tar"], "form must be one of idc, mtt, dc, png"),
                          (["idc", "new.pt", "--form", "png"], "form png writes a .png"),
                          (["el2n", "new"], "`dpkit distill make el2n --profile smoke"),
                          (["dm", "new", "--seed", "7"], "seed must be 0 for dm")):
        assert reason in one_line(dpkit("distill", "export", *words, *tiny()))
    assert not list(Path().glob("new*"))
    assert {path: path.read_bytes() for path in Path("pictures").iterdir()} == before
    run("export", "dm", "pictures", "--overwrite")
    assert set(json.loads(Path("pictures/recipe.json").read_text())["files"]) == {"data.pt"}


def test_soft_labels_are_for_looking_only(dpkit, run, here):
    run("make", "dm_soft", "--no-evaluate")
    line = one_line(dpkit("distill", "export", "dm_soft", "soft", *tiny()))
    assert "has soft labels, and form idc holds class numbers only; export dm, or look at it with --form png" in line
    run("export", "dm_soft", "soft.png", "--form", "png")
    assert Path("soft.png").is_file()


MISTAKES = {
    "make": "NAME",
    "make rnd": "unknown set 'rnd'",
    "make hreding": "did you mean herding",
    "make idc --seed 9": "seed must be 0 for idc",
    "make idc --device tpu": "device must be auto, cpu or cuda",
    "make idc --set distill_memory=0.1": "distill_memory must be at least",
    "make idc --set widht=4": "did you mean width",
    "make idc=file.pt": "published must be NAME=FILE",
    "import theirs": "unknown set 'theirs'",
    "import idc": "import takes NAME=FILE",
    "import theirs=nowhere.pt": "nowhere.pt does not exist",
    "import theirs=noise.pt": "noise.pt cannot be read",
    "import theirs=cut.pt@2": "cut.pt cannot be read",
    "import theirs=code.pt": "wants to run",
    "import theirs=pair.pt": "does not say its factor",
    "import theirs=pair.pt@40": "factor must be 1 to",
    "import theirs=pair.pt@sideways": "published must be NAME=FILE",
    "import theirs=small.pt@1": "use the data set that it was made from",
    "import theirs=nan.pt@1": "NaN or infinite",
    "import theirs=alone.pt": "does not say what its values are",
    "import theirs=alone.pt@whitened": "has no labels",
    "export": "NAME",
    "list --profile nope": "unknown profile 'nope'",
    "lst": "No such command 'lst'",
}


@pytest.fixture(scope="module")
def crooked(tmp_path_factory) -> Path:
    """A checkout with published files that are not right. Nothing may be written into it."""
    folder = make_checkout(tmp_path_factory.mktemp("crooked") / "checkout")
    images, labels = torch.rand(10, *plan().identity["shape"]), torch.arange(10)
    torch.save([images, labels], folder / "pair.pt")
    (folder / "cut.pt").write_bytes((folder / "pair.pt").read_bytes()[:-300])
    (folder / "noise.pt").write_bytes(b"no tensors here")
    torch.save([images[..., :5], labels], folder / "small.pt")
    torch.save([images / 0 * 0, labels], folder / "nan.pt")
    torch.save(images, folder / "alone.pt")
    torch.save({"data": Path("x")}, folder / "code.pt")
    return folder


@pytest.mark.parametrize(("words", "reason"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(dpkit, crooked, tmp_path, monkeypatch, words, reason):
    for name in NOT_OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(crooked)
    before = files(crooked)
    options = [] if "--profile" in words or " " not in words else ["--profile", "smoke"]
    assert reason in one_line(dpkit("distill", *words.split(), *options))
    assert files(crooked) == before
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["make", "import", "export", "list"])
def test_every_command_has_help_of_its_own(dpkit, command):
    answer = dpkit("distill", command, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert f"Usage: dpkit distill {command}" in answer.out
