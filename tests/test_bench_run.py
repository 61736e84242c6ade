"""Benchmarks, the running of them: processes, pairs, the floor's arithmetic, checkouts, the command and the page's tables."""
from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from dpkit import bench, cores
from dpkit.bench import ceilings, checkout, floor, harness, rows, runner
from dpkit.bench.harness import Failed, Job, Team
from dpkit.cli import app
from dpkit.models import ModelSpec, Work
from dpkit.training.evaluation import pays

ROOT = Path(__file__).resolve().parents[1]
HERE = "test_bench_run:"
LIMITS = ceilings.Ceilings({"fp32": 100.0, "bf16": 200.0, "memory": 10.0}, {"fp32": 200.0, "bf16": 400.0, "memory": 20.0}, 2)


# --- tasks that spawned processes build by name --------------------------------------------------------------------------
def about(worker: int = -1, workers: int = -1):
    """A task that says where it runs."""
    return lambda: (worker, workers, torch.get_num_threads())


def broken(when: str):
    """A task that fails while it is built or when it runs."""
    if when == "build":
        raise ValueError("it cannot be\nbuilt")
    return lambda: 1 / 0


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


# --- processes -----------------------------------------------------------------------------------------------------------
def test_teams_run_share_and_keep_a_peers_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `make test` sets it; a peer must not inherit it
    monkeypatch.setattr(cores, "available", lambda: 2)
    teams = {"ours": Team(Job(f"{HERE}about", 6.0, everywhere=True, threads=1, keep=True, share=True)),
             "peer": Team(Job(f"{HERE}about", 6.0))}
    try:
        for team in teams.values():
            team.begin()
        for team in teams.values():
            team.finish()
        assert teams["ours"].results() == [(0, 2, 1), (1, 2, 1)]
        (place, count, threads), = teams["peer"].results()
        assert (place, count) == (-1, -1)
        expected = subprocess.run([sys.executable, "-c", "import torch; print(torch.get_num_threads())"], text=True,
                                  capture_output=True, env={"PATH": ""}, check=True)
        assert threads == int(expected.stdout)
        told = []
        rates = harness.alternate(teams, 3, told.append)
        assert told == [1, 2, 3]
        assert all(len(found) == 3 and min(found) > 0 for found in rates.values())
    finally:
        for team in teams.values():
            team.end()
    assert not any(member.process.is_alive() for team in teams.values() for member in team.members)


def test_failures_are_one_line():
    with pytest.raises(Failed, match=r"^ValueError: it cannot be$"), Team(Job(f"{HERE}broken", 1.0, {"when": "build"})):
        pass
    team = Team(Job(f"{HERE}broken", 1.0, {"when": "run"}, warm=0))
    with team:
        with pytest.raises(Failed, match="ZeroDivisionError"):
            team.run()
        team.members[0].process.terminate()
        team.members[0].process.join()
        with pytest.raises(Failed, match="ended, most likely out of memory"):
            team.run()


class Scripted:
    """A team whose rates are known."""

    calls: list[str] = []

    def __init__(self, job: Job) -> None:
        self.job, self.rates = job, iter(job.arguments["rates"])

    def begin(self) -> None:
        if self.job.arguments.get("fails"):
            raise Failed("it broke")

    def finish(self) -> None:
        pass

    end = finish

    def last(self) -> str:
        return self.job.build

    def run(self) -> float:
        self.calls.append(self.job.build)
        return next(self.rates)


def scripted(label: str, *rates: float, **extra) -> Job:
    return Job(label, 1.0, {"rates": rates, **extra})


@pytest.fixture
def ratios(monkeypatch):
    """Measures a row whose rates are given."""
    monkeypatch.setattr(runner, "Team", Scripted)
    Scripted.calls = []

    def measured(verdict=None, **extra):
        row = rows.Row("x", "work", "images/s", "the reference", 4.0, scripted("ours", 10, 30, 20),
                       scripted("peer", 5, 5, 4, **extra), {"kept": scripted("kept", 10, 10, 10)}, 3, Work(2.0, 0.1), "fp32",
                       verdict=verdict)
        return list(runner._measured(row, LIMITS, lambda text: None))

    return measured


def test_a_row_is_the_median_of_paired_ratios(ratios):
    main, control = ratios()
    assert (main["ours"], main["peer"], main["ratio"], main["low"], main["high"], main["pairs"]) == (20, 5, 5.0, 2.0, 6.0, 3)
    assert (main["kind"], main["target"], main["why"]) == ("row", 4.0, "")
    assert (control["kind"], control["ratio"], control["target"], control["name"]) == ("control", 2.0, None, "work; kept")
    # 2 operations at 200 a second are 0.01 s; 20 a second of them are a fifth of the machine
    assert main["floor_fraction"] == pytest.approx(0.2)
    assert Scripted.calls == ["ours", "peer", "kept", "kept", "peer", "ours", "ours", "peer", "kept"]  # the order turns round


def test_a_failure_is_a_row_without_a_ratio(ratios):
    (row,) = ratios(fails=True)
    assert (row["ratio"], row["why"], row["target"]) == (None, "it broke", 4.0)


def test_a_row_may_judge_its_results(ratios):
    main, _ = ratios(verdict=lambda ours, peer: (f"{ours} before {peer}", ""))
    assert (main["note"], main["ratio"]) == ("ours before peer", 5.0)
    (row,) = ratios(verdict=lambda ours, peer: ("", "our error is larger"))
    assert (row["ratio"], row["why"]) == (None, "our error is larger")


# --- floors and ceilings -------------------------------------------------------------------------------------------------
def test_the_floor_is_the_slower_of_operations_and_bytes():
    assert floor.seconds(Work(50.0, 1.0), LIMITS.core, "fp32") == (0.5, 0.1)
    assert floor.fraction(Work(50.0, 1.0), 1.0, LIMITS.core, "fp32") == 0.5
    assert floor.fraction(Work(50.0, 8.0), 1.0, LIMITS.core, "bf16") == 0.8


def test_floors_are_listed_for_every_kernel_and_network():
    found = list(floor.kernels())
    assert len(found) == 4 * len(rows.NETWORKS) == len({(k.name, k.network) for k in found})
    assert all(k.work.flops > 0 and k.work.bytes > 0 for k in found)
    assert {k.network for k in floor.kernels(quick=True)} == {rows.SMALL}


def test_ceilings_know_what_they_count():
    started = []
    rate = ceilings._rate(1e6, lambda: started.append(1), 0.01)
    assert len(started) > 1
    assert rate > 1e6 / 0.01
    for dtype in (torch.float32, torch.bfloat16):
        operations, function = ceilings._compute(dtype, "cpu")[-1]
        output = function()
        assert output.dtype == dtype
        assert operations == 2 * output.numel() * 256 * 9


# --- what can be asked for -----------------------------------------------------------------------------------------------
def test_unknown_rows_and_missing_gpus_are_said(monkeypatch):
    with pytest.raises(ValueError, match="there is no benchmark called traning; there are ceilings, floor, train-convnet3"):
        next(bench.run(only=["traning"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {row.why for row in rows.accelerator_rows(long=True)} == {"no CUDA GPU on this machine"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [bool(row.why) for row in rows.accelerator_rows()] == [False, False, True, True]
    assert not any(row.why for row in rows.accelerator_rows(long=True))
    ids = bench.names(long=True)
    assert len(ids) == len(set(ids))


def test_a_share_of_a_path_is_timed_as_the_whole_would_be():
    found = {row.id: row for row in rows.processor_rows(long=True)}
    for name in ("path", "path-fp32"):  # 6,000 images pay for compiling and 800 do not
        model = ModelSpec(**found[name].ours.arguments["model"])
        assert pays(model, 11 * 6000)
        assert not pays(model, 11 * 800)
        assert found[name].ours.arguments["compiled"] is True
    for quick in (True, False):
        row = next(row for row in rows.processor_rows(quick) if row.id == "path-passes")
        assert row.target == pytest.approx(0.91, abs=0.005)
        assert row.ours.arguments == row.peer.arguments == {"model": rows.NETWORKS[rows.SMALL], "points": 25,
                                                            "images": 1000 if quick else 6000}
        assert row.ours.work == row.peer.work == 25 * row.ours.arguments["images"]
        assert not row.ours.everywhere
        assert row.ours.threads == row.peer.threads == 1
    targets = {row.id: row.target for row in rows.processor_rows(quick=True)}
    assert [name for name, target in targets.items() if target is not None] == ["path-passes"]


def test_a_folder_without_scripts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="takes a folder"):
        checkout.check(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no train.py, as the authors' checkout does, and no dpkit_peer.py"):
        checkout.check(tmp_path)


OWN = "def make(arch, width, images, labels):\n    return lambda: (arch, width, tuple(images.shape), len(labels))\n"
TRAIN = """import torch
from efficientnet_pytorch import EfficientNet
from misc.augment import DiffAug
scale = torch.tensor([1.0], device='cuda')
def train_epoch(args, train_loader, model, criterion, optimizer, epoch=0, logger=None, aug=None, mixup='vanilla'):
    seen = 0
    for images, labels in train_loader:
        loss = criterion(model(aug(images.cuda()) * scale), labels.cuda()[torch.randperm(len(labels)).to('cuda')])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        seen += len(images)
    return seen, mixup, args.mix_p
"""
NETWORK = """import torch
class ConvNet(torch.nn.Sequential):
    def __init__(self, classes, net_norm, net_depth, net_width, im_size):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * im_size[0] ** 2, classes))
"""
AUGMENT = """class DiffAug:
    def __init__(self, strategy, batch): pass
    def __call__(self, x): return x
"""


def test_both_layouts_of_a_checkout_train(tmp_path):
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    for name, text in {"own/dpkit_peer.py": OWN, "theirs/train.py": TRAIN, "theirs/misc/augment.py": AUGMENT,
                       "theirs/models/convnet.py": NETWORK, "theirs/models/resnet.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [row.id for row in checkout.rows(theirs, quick=False)] == ["peer-convnet3", "peer-resnet10"]
    # in a process of its own: what "cuda" means is changed there
    code = ("import sys; from dpkit.bench import checkout; "
            "print(checkout.train(sys.argv[1], dict(arch='convnet3', width=5, image_size=8), 70)())")
    found = [subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout.strip()
             for folder in (own, theirs)]
    assert found == ["('convnet3', 5, (70, 3, 8, 8), 70)", "(70, 'cut', 0.5)"]


def test_the_extra_for_peers_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(found.name): found for found in map(Requirement, (t for t in text if t and not t.startswith("#")))}
    for wanted in map(Requirement, project["optional-dependencies"]["peers"]):
        (pin,) = pins[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version)


# --- the command and the page --------------------------------------------------------------------------------------------
MACHINE = {"processor": "A chip", "torch": "2"}
RECORDS = [
    {"kind": "ceilings", "name": "ceilings", **runner._empty(), **LIMITS.to_dict(), "machine": MACHINE},
    {"kind": "row", "id": "train-x", "name": "training x", "ours": 2000.0, "peer": 500.0, "ratio": 4.1, "target": 4.0, "low": 3.9,
     "high": 4.25, "pairs": 5, "unit": "images/s", "floor_fraction": 0.66, "why": "", "reference": "r", "machine": MACHINE},
    {"kind": "control", "id": "train-x+", "name": "training x; kept", "reference": "memory kept", "ours": 2000.0, "peer": 900.0,
     "ratio": 2.2, "target": None, "low": 2.1, "high": 2.3, "pairs": 5, "unit": "images/s", "floor_fraction": 0.66, "why": "",
     "machine": MACHINE},
    {"kind": "row", "id": "gpu-x", "name": "GPU x", **runner._empty(), "target": 20.0, "low": None, "high": None, "pairs": 0,
     "unit": "images/s", "why": "no GPU [here]", "machine": MACHINE},
    {"kind": "floor", "name": "training step, N", "kernel": "training step", "network": "N", "precision": "bf16",
     "form": "compiled", "flops": 3e8, "bytes": 2e6, "seconds_flops": 6e-4, "seconds_bytes": 5e-5, "floor_fraction": 0.6,
     "ours": 1000.0, "peer": None, "ratio": None, "target": None, "unit": "images/s", "why": "", "machine": MACHINE},
]


def test_the_command_prints_json_lines_or_tables(monkeypatch):
    asked = {}
    monkeypatch.setattr(bench, "run", lambda **options: asked.update(options) or iter(RECORDS))
    runner = CliRunner()
    lines = runner.invoke(app, ["bench", "--json", "--only", "train-x, floor"])
    assert [json.loads(line) for line in lines.stdout.splitlines()] == json.loads(json.dumps(RECORDS))
    assert asked["only"] == ["train-x", "floor"]
    for record in map(json.loads, lines.stdout.splitlines()):
        assert {"name", "ours", "peer", "ratio", "target", "floor_fraction", "machine"} <= record.keys()
    table = runner.invoke(app, ["bench"]).stdout
    for text in ("train-x", "4.10", "5 3.90 to 4.25", "66%", "memory kept", "2.20", "not measured: GPU x: no GPU [here]",
                 "training step, N", "0.6"):
        assert text in table, text


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Builds a page with the extension; returns its HTML and the warnings."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    def build(text: str) -> tuple[str, str]:
        source = tmp_path / "source"
        source.mkdir()
        (source / "index.md").write_text(f"# Title\n\n{text}\n", encoding="utf-8")
        (source / "b.jsonl").write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
        (source / "a.csv").write_text("seed,form,accuracy\n0,ours,0.49\n1,ours,0.67\n" + "".join(
            f'{s},"reference, an operation an image",{a}\n' for s, a in ((0, 0.5), (1, 0.7))), encoding="utf-8")
        (source / "r.csv").write_text("network,seed,rounding,trace,error,shift,left,top,top_left\n"
                                      "N,0,0.004,9,2,-0.1,0.02,0.01,1e-4\nN,1,0.006,9,1,0.2,0.01,0.03,2e-4\n", encoding="utf-8")
        (source / "g.csv").write_text("seed,quantity,tool,value,error,products\n0,trace,dpkit,1234.5,6.25,30\n"
                                      "0,top eigenvalue,dpkit,99.5,0.01,20\n1,trace,PyHessian,1200,7,30\n", encoding="utf-8")
        (source / "conf.py").write_text("extensions = ['myst_parser', 'speed_tables']\n", encoding="utf-8")
        warnings = io.StringIO()
        with docutils_namespace():
            Sphinx(source, source, tmp_path / "html", tmp_path / "trees", "html", status=None, warning=warnings).build()
        return (tmp_path / "html" / "index.html").read_text(encoding="utf-8"), warnings.getvalue()

    return build


def test_the_page_shows_what_was_recorded(page):
    html, warnings = page("\n\n".join(f"```{{speed}} {kind} b.jsonl\n```" for kind in ("ratios", "floor", "absent", "machine"))
                          + "".join(f"\n\n```{{speed}} {kind} {kind[0] if kind != 'agreement' else 'g'}.csv\n```"
                                    for kind in ("accuracy", "rounding", "agreement")))
    assert not warnings
    for text in ("training x", "4.10\u00d7", "3.90 to 4.25 (n\u00a0=\u00a05)", "the same; memory kept", "2.20\u00d7",
                 "GPU x", "no GPU [here]", "training step", "60%", "A chip, torch 2", "60.00%", "\u22122.00 points",
                 "0.005 (at most 0.006)", "0.12 (at most 0.2)", "0.01 (at most 0.01)", "0.02 (at most 0.03)",
                 "PyHessian", "1,234", "6.25", "99.5"):
        assert text in html, text


@pytest.mark.parametrize(("text", "message"), [
    ("```{speed} ratios nothing.jsonl\n```", "nothing.jsonl is missing"),
    ("```{speed} rations b.jsonl\n```", "there is no table 'rations'; there are accuracy, rounding, agreement, ratios"),
    ("```{speed} ratios a.csv\n```", "a.csv"),
])
def test_a_table_that_cannot_be_made_is_a_warning(page, text, message):
    assert message in page(text)[1]
