"""One ticket through the command line, and the page about it: what is exported is what the study has; mistakes are one line."""
from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import HERE, NOT_OURS
from test_cli import files as listing
from test_cli import one_line

from dpkit import cli, prune, stages
from dpkit.data import _torchvision
from dpkit.prune import files

torch.set_num_threads(1)  # as in a worker: equal bits

SETTINGS = {"train_images": "160", "test_images": "50", "width": "3", "epochs": "2", "batch_size": "32", "ipc": "1",
            "distill_outer": "2", "distill_inner": "1", "distill_network_images": "32", "set_epochs": "3", "fraction": "0.4",
            "rounds": "2", "at_rounds": "2", "seeds": "2"}
PAGE = (HERE / "book" / "tickets.md").read_text(encoding="utf-8")


def tiny(**more: str) -> list[str]:
    """Options that make the smallest study."""
    return ["--profile", "smoke", *(part for name, value in (SETTINGS | more).items() for part in ("--set", f"{name}={value}"))]


@functools.cache
def plan(**more):
    return cli.plan_of("smoke", SETTINGS | more)


@pytest.fixture
def run(dpkit):
    """Call `dpkit ticket`; the answer must be good."""
    def call(*words, **more):
        answer = dpkit("ticket", *words, *tiny(**more))
        assert answer.code == 0, answer.err
        return answer.out
    return call


# --- make and export --------------------------------------------------------------------------------------------------------
def test_a_ticket_is_made_once_and_is_the_studys(dpkit, run, here):
    out = run("make", "imp", "--seed", "0")
    units = stages.closure([plan().ticket("imp", 0, 2)])
    kinds = [u.stage for u in units.values()]
    assert kinds == ["network", "ticket", "network", "ticket"]
    assert re.match(r"to make: 3 units before, then 1 ticket\nabout \d+ s on 1 core .* of memory, .* on disk", out)
    key = plan().ticket("imp", 0, 2).key
    result = here.get(key).result
    counted = f"{result['surviving']:,} of {result['weights']:,} are kept"
    assert f"imp ticket 0, round 2\n  key       {key}\n  weights   {counted}" in out
    before = {path: path.stat().st_mtime_ns for path in here.root.rglob("meta.json")}
    assert len(before) == 4
    assert run("make", "imp", "--seed", "0").startswith("to make: nothing, all of it is in the store\nimp ticket 0, round 2\n")
    assert run("make", "imp", "--seed", "0", "--round", "1").startswith("to make: nothing, all of it is in the store\n")
    assert {path: path.stat().st_mtime_ns for path in here.root.rglob("meta.json")} == before
    # the command that it ends with works
    last = re.findall(r"^export it: dpkit (.*)$", out, re.MULTILINE)[0]
    assert dpkit(*shlex.split(last)).out.splitlines() == ["tickets/imp.safetensors", "tickets/imp.json"]
    assert files.load("tickets/imp.safetensors").about["key"] == key


def test_what_is_exported_is_what_the_store_has(run, here):
    run("make", "distilled")  # both initialisations
    unit = plan().ticket("distilled", 1, 2)
    artifact = here.get(unit.key)
    assert run("export", "distilled", "--seed", "1", "--out", "one/d").splitlines() == ["one/d.safetensors", "one/d.json"]
    found = files.load("one/d.safetensors")
    for group, tensors in (("params", found.ticket.params), ("buffers", found.ticket.buffers), ("mask", found.mask)):
        assert tensors.keys() == artifact.group(group).keys()
        assert all(torch.equal(tensors[n], t) for n, t in artifact.group(group).items())
    assert found.model.to_dict() == unit.spec["model"]
    assert found.ticket.round == 2
    about = json.loads(Path("one/d.json").read_text())["about"]
    assert about == found.about
    assert (about["arm"], about["seed"], about["key"]) == ("distilled", 1, unit.key)
    assert about["made"]["spec"] == artifact.meta["spec"]
    assert about["made"]["parents"] == artifact.meta["parents"]
    assert about["data"] == plan().identity
    assert run("export", "distilled", "--seed", "1", "--round", "1", "--out", "one/m.safetensors", "--mask-only")
    alone = files.load("one/m.safetensors")
    assert (alone.what, alone.ticket.round) == ("mask", 1)
    assert prune.sparsity(alone.mask) < prune.sparsity(found.mask)


def test_an_arm_that_the_profile_leaves_out(run, here):
    assert "random_real" in run("make", "random_real", "--round", "1", "--seed", "0", arms="imp,random", robust_arms="dense",
                                plane_arms="dense", hessian_arms="dense")
    assert here.has(plan().ticket("random_real", 0, 1).key)


def test_nothing_is_replaced_and_what_is_missing_is_named(dpkit, run, here):
    run("make", "imp", "--seed", "0")
    run("export", "imp", "--out", "kept/t")
    before = {path: path.read_bytes() for path in Path("kept").iterdir()}
    missing = "random ticket 0, round 2 is not made yet; `dpkit ticket make random --round 2 --profile smoke --set train"
    for words, reason in ((["imp", "--out", "kept/t"], "kept/t.safetensors exists; choose another path"),
                          (["random", "--out", "kept/r"], missing),
                          (["imp", "--seed", "1", "--out", "kept/r"], "make imp --round 2 --seed 1 --profile smoke")):
        assert reason in one_line(dpkit("ticket", "export", *words, *tiny()))
    assert {path: path.read_bytes() for path in Path("kept").iterdir()} == before
    run("export", "imp", "--out", "kept/t", "--round", "1", "--overwrite")
    assert files.load("kept/t.safetensors").ticket.round == 1


def row(out: str, name: str) -> list[str]:
    """The cells of a table's row behind its name."""
    return re.search(rf"^ *{re.escape(name)} (.*)$", out, re.MULTILINE)[1].split()


# --- looking at them ----------------------------------------------------------------------------------------------------------
def test_the_list_says_what_is_there(run, here):
    run("make", "imp", "--seed", "0")
    run("make", "random", "--round", "2")
    children = [plan().child("random", seed, 2, child) for seed in range(2) for child in range(plan().study.children)]
    assert not stages.compute(here, children, device="cpu").errors
    out = run("list")
    rows = {tuple(line.split()[:2]): line.split() for line in out.splitlines()[1:-1]}
    for (arm, round), cells in rows.items():
        units = [plan().ticket(arm, seed, int(round)) for seed in range(2)]
        made = [here.get(u.key) for u in units if here.has(u.key)]
        assert cells[4:7] == [str(len(made)), "of", "2"]
        measured = sum(1 for child in children if arm == "random" and round == "2" and here.has(child.key))
        assert ("(n = 2)" in " ".join(cells)) == (measured == len(children))
        if made:
            assert cells[2] == f"{100 * made[0].result['sparsity']:.1f}%"
            assert cells[3] == f"{made[0].result['surviving']:,}"
            assert made[0].key.startswith(cells[-1])
    assert {arm for arm, _ in rows} == set(plan().study.arms)
    assert rows["random", "2"][4] == "2"
    accuracy = sum(1 - here.get(child.key).result["error"] for child in children) / len(children)
    assert f" {100 * accuracy:.1f}% [" in " ".join(rows["random", "2"])
    assert out.splitlines()[-1].startswith("make them: dpkit ticket make ARM --profile smoke --set train_images=160")


def test_show_counts_a_file_a_key_and_an_arm_alike(run, here):
    run("make", "imp", "--seed", "0")
    run("export", "imp", "--out", "shown")
    run("export", "imp", "--out", "alone", "--mask-only")
    artifact = here.get(plan().ticket("imp", 0, 2).key)
    mask = artifact.group("mask")
    outs = [run("show", word) for word in ("shown.safetensors", artifact.key[:10], "imp")]
    for out, name in zip(outs, ("shown.safetensors", "imp ticket 0, round 2", "imp ticket 0, round 2"), strict=True):
        assert out.splitlines()[0] == name
        assert f"  weights   {prune.surviving(mask):,} of {prune.size(mask):,} are kept, sparsity " in out
        for weight, m in mask.items():
            cells = row(out, weight)
            assert f"{int(m.sum()):,}" in cells
            assert f"{m.numel():,}" in cells
            assert f"{100 * float(m.float().mean()):.1f}%" in cells
        assert re.search(r"^  flops     .* for one image \([\d.]+%\) without any work on zeros$", out, re.MULTILINE)
        assert re.search(r"^  remnant   [\d.]+% of the dense flops", out, re.MULTILINE)
    reached = prune.surviving(prune.effective(files.load("shown.safetensors").model, mask))
    assert f"  effective {reached:,} of these lie on a path" in outs[0]
    assert "  arm       imp\n  seed      0\n" in outs[0]
    assert run("show", "alone.safetensors").splitlines()[0] == "alone.safetensors, masks alone"


def test_compare_counts_what_both_keep(run, here):
    run("make", "imp", "--seed", "0")
    run("make", "random", "--seed", "0")
    run("export", "random", "--out", "r")
    masks = [here.get(plan().ticket(arm, 0, 2).key).group("mask") for arm in ("imp", "random")]
    out = run("compare", "imp", "r.safetensors")
    assert out.startswith("A: imp ticket 0, round 2\nB: r.safetensors\n")
    for name in (*masks[0], "all layers"):
        a, b = (torch.cat([m[n].reshape(-1) for n in ([name] if name in m else m)]) for m in masks)
        cells = row(out, name)
        assert cells[:4] == [f"{n:,}" for n in (len(a), int(a.sum()), int(b.sum()), int((a & b).sum()))]
        assert cells[4] == f"{int((a & b).sum()) / int((a | b).sum()):.3f}"
        assert cells[7] == f"{int((a ^ b).sum()) / len(a):.3f}"
    assert re.search(r"^all layers, chance with each layer's counts given: Jaccard [\d.]+, excess", out, re.MULTILINE)
    same = run("compare", "imp", "imp")
    cells = row(same, "all layers")
    assert (cells[4], cells[6], cells[7]) == ("1.000", "1.000", "0.000")


# --- what is refused ----------------------------------------------------------------------------------------------------------
MISTAKES = {
    "make": "Missing argument 'ARM'",
    "make idk": "unknown arm 'idk'",
    "make dense": "arm must be one that prunes, got dense",
    "make imp --round 9": "round must lie in [1, 2], the rounds of this study, got 9; --set rounds=9",
    "make imp --round 0": "round must lie in [1, 2]",
    "make imp --seed 7": "seed must lie in [0, 1], the initialisations of this study, got 7; --set seeds=8",
    "make imp --device tpu": "device must be auto, cpu or cuda",
    "make imp --set widht=4": "did you mean width",
    "export imp": "Missing option '--out'",
    "export idk --out x": "unknown arm 'idk'",
    "show": "Missing argument 'WHAT'",
    "show nowhere.safetensors": "ticket file nowhere.safetensors does not exist",
    "show folder/t": "ticket file folder/t does not exist",
    "show noise.pt": "noise.pt cannot be read as safetensors",
    "show idk": "unknown arm 'idk'",
    "compare imp": "Missing argument 'B'",
    "compare noise.pt imp": "noise.pt cannot be read as safetensors",
    "list --profile nope": "unknown profile 'nope'",
    "lst": "No such command 'lst'",
}


@pytest.mark.parametrize(("words", "reason"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(dpkit, root, tmp_path, monkeypatch, words, reason):
    for name in NOT_OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(root)
    (root / "noise.pt").write_bytes(b"no tensors here")
    before = listing(root)
    options = [] if "--profile" in words or " " not in words else tiny()
    assert reason in one_line(dpkit("ticket", *words.split(), *options))
    assert listing(root) == before
    assert not (tmp_path / "store").exists()


def test_a_key_of_something_else(dpkit, run, here):
    run("make", "imp", "--seed", "0")
    key = plan().dense(0, "search").key
    assert f"artifact {key[:12]} is no ticket but a network (dense network 0, search)" in one_line(dpkit("ticket", "show", key))
    assert "no artifact in" in one_line(dpkit("ticket", "show", "0" * 12))


def test_a_ticket_without_result(dpkit, here):
    broken = tiny(lr="1e30")
    answer = dpkit("ticket", "make", "imp", "--seed", "0", *broken)
    assert answer.code == 2
    assert re.search(r"^dpkit: imp ticket 0, round 2 has no result: .*diverged", answer.err.splitlines()[-1])
    assert "has no result" in one_line(dpkit("ticket", "export", "imp", "--out", "never", *broken))
    assert not list(Path().glob("never*"))


def test_two_networks_are_not_compared(dpkit, run, here):
    run("make", "random", "--seed", "0")
    run("export", "random", "--out", "narrow")
    run("make", "random", "--seed", "0", width="4")
    line = one_line(dpkit("ticket", "compare", "narrow.safetensors", "random", *tiny(width="4")))
    assert "masks narrow.safetensors and random ticket 0, round 2 must have the same shapes" in line


@pytest.mark.parametrize("command", ["make", "list", "export", "show", "compare"])
def test_every_command_has_help_of_its_own(dpkit, command):
    answer = dpkit("ticket", command, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert f"Usage: dpkit ticket {command}" in answer.out


# --- the page -----------------------------------------------------------------------------------------------------------------
def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_all_code_of_the_page_runs(dpkit, here, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPKIT_STORE", str(here.root))  # what other tests made is made
    monkeypatch.chdir(tmp_path)
    assert len(re.findall("^```", PAGE, re.MULTILINE)) == 2 * len(blocks("bash") + blocks("python"))
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    for command in commands:
        start, *words = shlex.split(command, comments=True)
        assert (start, words[0]) == ("dpkit", "ticket")
        if "--profile" in words:
            at = words.index("--profile")
            assert words[at + 1] == "quick"
            words[at:at + 2] = tiny()
        answer = dpkit(*words)
        assert answer.code == 0, f"{command}: {answer.err}"
    assert {words.split()[2] for words in commands} == {"list", "make", "show", "export", "compare"}
    _torchvision.load()  # beside a torch for CPUs alone, a torchvision for GPUs does not import by itself
    space: dict = {}
    for block in blocks("python"):
        exec(compile(block, "book/tickets.md", "exec"), space)
    assert torch.equal(space["masks"]["conv0.weight"], space["found"].mask["conv0.weight"])
    assert (tmp_path / "tickets" / "trained.pt").is_file()
    assert space["saved"].weights == space["description"]["weights"]
