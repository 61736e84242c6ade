"""Artifacts through the command line: made once, shown, checked, carried, traced back; divergence and Ctrl-C."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import NOT_OURS, clean_environment, make_checkout

from dpkit import cli, project, stages
from dpkit.store import Store

# a study of seconds: every chapter once, on a network of two channels
TINY = """train_images: 100
test_images: 50
width: 2
epochs: 1
sets: [idc]
ipc: 1
factor: 1
distill_outer: 1
distill_inner: 1
distill_network_images: 20
set_epochs: 1
evaluation_seeds: 2
arms: [imp, distilled]
rounds: 1
at_rounds: [1]
rewind_epochs: 0.5
seeds: 2
points: 3
plane_arms: [dense]
plane_resolution: 3
plane_images: 20
hessian_arms: [dense, distilled]
hessian_images: 20
probes: 2
lanczos_steps: 2
"""
ROW = re.compile(r" *([a-z]+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) *")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A checkout whose store holds the tiny study."""
    folder = make_checkout(tmp_path_factory.mktemp("filled") / "checkout")
    (folder / "tiny.yml").write_text(TINY, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "dpkit", "compute", "--profile", "tiny.yml", "--workers", "1"], cwd=folder,
                          env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # a line of progress comes even where nobody watches, so that a log shows how far a machine is
    assert re.search(r"^compute: \d+ of \d+ units, \d+%, .* left", done.stderr, re.MULTILINE)
    first, outlook, second = done.stdout.splitlines()
    assert re.fullmatch(r"about \d+ s on 1 core \(\d+ to \d+\), \d+ MB of memory, [\d.]+ MB on disk; from a table, as this "
                        r"machine has no timings in the store yet", outlook)
    count = int(re.fullmatch(r"(\d+) units, \1 to make, device \w+", first)[1])
    assert second.startswith(f"made {count} in ")
    assert second.endswith("0 without a result, 0 errors")
    assert len(list(Store(folder / "results" / "store").keys())) == count
    return folder


@pytest.fixture
def here(filled, monkeypatch) -> Path:
    """The filled checkout, and the current folder."""
    for name in NOT_OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(filled)
    return filled


def table(out: str) -> dict[str, list[int]]:
    """Rows of ``dpkit status``: units, done, missing, no result, errors by chapter."""
    rows = filter(None, map(ROW.fullmatch, out.splitlines()))
    return {row[1]: [int(v) for v in row.groups()[1:]] for row in rows}


def numbers(dpkit) -> list[dict]:
    answer = dpkit("numbers", "--profile", "tiny.yml", "--json")
    assert (answer.code, answer.err) == (0, "")
    return [json.loads(line) for line in answer.out.splitlines()]


def test_status_says_what_is_done(dpkit, here, tmp_path, monkeypatch):
    answer = dpkit("status", "--profile", "tiny.yml")
    rows = table(answer.out)
    assert set(rows) == set(stages.CHAPTERS)
    assert all(units == done and missing == failed == errors == 0 for units, done, missing, failed, errors in rows.values())
    assert "complete" in answer.out
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "empty"))
    answer = dpkit("status", "--profile", "tiny.yml")
    assert all(units == missing > 0 == done for units, done, missing, *_ in table(answer.out).values())
    assert re.search(r"^time left: about \d+ s on this machine \(\d+ to \d+\)$", answer.out, re.MULTILINE)


def test_nothing_is_made_twice(dpkit, here):
    before = {path: path.stat().st_mtime_ns for path in (here / "results" / "store").rglob("meta.json")}
    answer = dpkit("compute", "--profile", "tiny.yml")
    assert answer.code == 0
    assert ", 0 to make," in answer.out
    assert "made 0 in" in answer.out
    assert {path: path.stat().st_mtime_ns for path in (here / "results" / "store").rglob("meta.json")} == before


def test_status_tells_what_a_changed_parameter_would_cost(dpkit, here):
    rows = table(dpkit("status", "--profile", "tiny.yml", "--set", "probes=3").out)
    assert rows["hessian"][2] == 4  # a spectrum for each arm and seed, and nothing else
    assert {rows[name][2] for name in stages.CHAPTERS[:-1]} == {0}
    answer = dpkit("status", "--profile", "tiny.yml", "--set", "probes=3")
    assert re.search(r"time left: about \d+ s on this machine \(\d+ to \d+\)", answer.out)


def test_numbers_follow_their_schema(dpkit, here):
    found = numbers(dpkit)
    names = [record["name"] for record in found]
    assert len(set(names)) == len(names)
    assert {"distill.idc.accuracy", "tickets.imp.accuracy@20", "tickets.dense.accuracy", "connectivity.dense.barrier",
            "connectivity.distilled.barrier@20", "hessian.dense.trace"} <= set(names)
    store = Store(here / "results" / "store")
    for record in found:
        assert list(record) == ["name", "value", "n", "low", "high", "key"]
        assert re.fullmatch(r"(distill|tickets|masks|robustness|connectivity|landscape|hessian)(\.[a-z0-9_]+){2,3}(@\d+)?",
                            record["name"])
        # planes are of one initialisation, two starts are one pair, and a ratio leaves out a seed whose estimate is not positive
        assert record["n"] == 2 or (record["n"] == 1 and re.match(r"landscape|connectivity\.starts\.|.*_over_", record["name"]))
        assert store.get(record["key"]).result["value"] == record["value"]
        if record["low"] is not None:
            assert record["low"] <= record["value"] <= record["high"]
        *_, arm, measure = record["name"].split("@")[0].split(".")
        if measure in ("accuracy", "barrier", "stable", "highest_error") and "_minus_" not in arm:
            assert 0 <= (record["low"] or 0) <= record["value"] <= (record["high"] or 1) <= 1


def test_numbers_of_two_settings_are_compared_by_initialisation(dpkit, here, tmp_path, monkeypatch):
    shutil.copytree(here / "results" / "store", tmp_path / "store")
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))
    numbers_of = ("numbers", "--profile", "tiny.yml")
    assert dpkit("compute", "--profile", "tiny.yml", "--chapter", "distillation", "--set", "set_epochs=2").code == 0
    answer = dpkit(*numbers_of, "--set", "set_epochs=2", "--minus", "set_epochs=1", "--json")
    first = {r["name"]: r for r in numbers(dpkit)}
    second = {r["name"]: r for r in map(json.loads, dpkit(*numbers_of, "--set", "set_epochs=2", "--json").out.splitlines())}
    found = {r["name"]: r for r in map(json.loads, answer.out.splitlines())}
    assert answer.code == 0
    assert "distill.idc.accuracy_change" in found
    for name, record in found.items():
        assert record["value"] == pytest.approx(second[name.replace("_change", "")]["value"]
                                                - first[name.replace("_change", "")]["value"])
    assert "distill.all_data.accuracy_change" not in found  # the same networks in both
    answer = dpkit(*numbers_of, "--minus", "run=5")
    assert answer.code == 2
    assert answer.err.strip().endswith("first run `dpkit compute --profile tiny.yml` with no --set and with --set run=5")
    assert "--minus takes key=value, got 'run'" in dpkit(*numbers_of, "--minus", "run").err


def test_the_table_of_numbers_holds_whole_names(dpkit, here):
    out = dpkit("numbers", "--profile", "tiny.yml").out
    assert all(f" {record['name']} " in out and record["key"][:12] in out for record in numbers(dpkit))


def test_verify_finds_one_changed_byte(dpkit, here, tmp_path, monkeypatch):
    shutil.copytree(here / "results" / "store", tmp_path / "store")
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))
    answer = dpkit("verify")
    assert answer.code == 0
    assert re.search(r"\d+ artifacts, 0 wrong; 0 recorded results, 0 stale", answer.out)
    file = sorted((tmp_path / "store").rglob("tensors.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    answer = dpkit("verify")
    assert answer.code == 1
    assert f"{file.parent.name[:12]}: its tensors are not the bytes that were written" in answer.out
    assert ", 1 wrong;" in answer.out


def test_a_packed_store_gives_the_same_numbers_elsewhere(dpkit, here, tmp_path, monkeypatch):
    first = numbers(dpkit)
    units = len(stages.closure(e.unit for part in (*stages.CHAPTERS, "searches")
                               for e in _entries(cli.plan_of("tiny.yml", {}), part)))
    answer = dpkit("store", "pack", tmp_path / "study.tar", "--profile", "tiny.yml")
    assert f"{units} artifacts in" in answer.out
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "other"))
    assert f"{units} new artifacts" in dpkit("store", "unpack", tmp_path / "study.tar").out
    assert "0 new artifacts" in dpkit("store", "unpack", tmp_path / "study.tar").out
    assert numbers(dpkit) == first
    assert dpkit("verify").code == 0
    assert "complete" in dpkit("status", "--profile", "tiny.yml").out


def test_lineage_leads_from_a_number_to_everything_behind_it(dpkit, here):
    record = next(r for r in numbers(dpkit) if r["name"] == "connectivity.distilled.barrier@20")
    answer = dpkit("lineage", record["name"], "--profile", "tiny.yml", "--full")
    assert answer.code == 0
    store = Store(project.store_folder())
    ancestors = [artifact for _, _, artifact in store.lineage(record["key"])]
    assert {artifact.meta["stage"] for artifact in ancestors} == {"number", "path", "network", "ticket", "distill"}
    for artifact in ancestors:
        assert artifact.key[:12] in answer.out
        assert json.dumps(artifact.meta["spec"]) in answer.out
    machine = ancestors[0].meta["machine"]
    for what in (record["key"], record["name"], f"commit {machine['commit']}", machine["torch"], '"init_seed": ',
                 '"noise_seed": ', '"width": 2', '"level": 0.95', json.dumps(machine)):
        assert what in answer.out
    short = dpkit("lineage", record["key"][:8])
    assert short.code == 0
    assert short.out.splitlines()[0] == answer.out.splitlines()[0]
    assert len(short.out.splitlines()) < len(answer.out.splitlines())


def test_shares_together_are_the_whole(dpkit, here, tmp_path, monkeypatch):
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "shares"))
    whole = set(Store(here / "results" / "store").keys())
    counts = []
    for share in ("1/2", "2/2"):
        assert dpkit("compute", "--profile", "tiny.yml", "--chapter", "hessian", "--share", share, "--workers", "1").code == 0
        counts.append(len(set(Store(tmp_path / "shares").keys()) & whole))
    made = set(Store(tmp_path / "shares").keys())
    assert 0 < counts[0] < counts[1] == len(made)
    assert made == set(stages.closure(e.unit for e in cli.plan_of("tiny.yml", {}).hessian()))
    # equal seeds give equal bits, whoever computes them
    one, other = Store(here / "results" / "store"), Store(tmp_path / "shares")
    assert {key: one.get(key).meta["sha256"] for key in made} == {key: other.get(key).meta["sha256"] for key in made}


def test_divergence_is_shown_and_the_rest_goes_on(dpkit, checkout):
    (checkout / "tiny.yml").write_text(TINY.replace("epochs: 1\nsets", "epochs: 1\nlr: 1e30\nsets"), encoding="utf-8")
    answer = dpkit("compute", "--profile", "tiny.yml", "--workers", "1")
    assert answer.code == 0
    assert re.search(r"[1-9]\d* without a result, 0 errors", answer.out)
    assert re.search(r"no result: diverged at step \d+", answer.out)
    answer = dpkit("status", "--profile", "tiny.yml")
    rows = table(answer.out)
    assert rows["data"] == [2, 2, 0, 2, 0]
    assert rows["connectivity"][3] > rows["tickets"][3]  # paths between networks that diverged have no result either
    assert re.search(r"no result: dense network 0, child 0: diverged at step \d+", answer.out)
    # what was trained on the small set only is there, with its numbers; dense networks have none
    names = {record["name"] for record in numbers(dpkit)}
    assert "distill.idc.accuracy" in names
    assert not any(name.startswith(("tickets.dense", "connectivity", "hessian", "distill.all_data")) for name in names)
    assert dpkit("verify").code == 0


def test_ctrl_c_stops_cleanly_and_keeps_what_is_finished(dpkit, checkout):
    (checkout / "long.yml").write_text("train_images: 2000\nwidth: 8\nepochs: 6\nseeds: 20\n", encoding="utf-8")
    words = ["compute", "--profile", "long.yml", "--chapter", "data", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "dpkit", *words], env=clean_environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               # a shell's background job hands down a SIGINT that is ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    store = checkout / "results" / "store"
    try:
        while process.poll() is None and not list(store.glob("??/*/meta.json")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert errors.rstrip().splitlines()[-1] == "dpkit: stopped; the same command continues where it was"
        assert "Traceback" not in errors
        for _ in range(200):  # the workers end with it
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("a process is left")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    units, done, missing, *_ = table(dpkit("status", "--profile", "long.yml").out)["data"]
    assert 0 < done < units == done + missing
    assert dpkit("verify").code == 0


# --- before it runs ---------------------------------------------------------------------------------------------------

def _entries(plan, part: str):
    return plan.chapter(part) if part in stages.CHAPTERS else getattr(plan, part)()


def test_predict_says_what_is_missing_and_what_it_takes(dpkit, here, tmp_path, monkeypatch):
    answer = dpkit("predict", "--profile", "tiny.yml", "--set", "probes=3", "--workers", "2")
    assert (answer.code, answer.err) == (0, "")
    rows = {line.split("  ")[0].strip(): line.split() for line in answer.out.splitlines() if line.startswith(" ")}
    assert list(rows)[:1 + len(stages.CHAPTERS)] == ["chapter", *stages.CHAPTERS]
    assert [rows[name][1] for name in stages.CHAPTERS] == [*["0"] * (len(stages.CHAPTERS) - 1), "4"]
    assert rows["hessian"][3] == "s"
    assert rows["dpkit compute"][2] == rows["dpkit study"][2] == "4"
    assert {"network/fp32", "idc/fp32", "hessian/float32"} <= set(rows)  # how far single units are off
    assert "past predictions: none yet of 10 seconds or more" in answer.out
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "empty"))
    answer = dpkit("predict", "--profile", "tiny.yml")
    units = len(stages.closure(e.unit for part in (*stages.CHAPTERS, "searches")
                               for e in _entries(cli.plan_of("tiny.yml", {}), part)))
    assert re.search(rf"^ dpkit compute +{units} ", answer.out, re.MULTILINE)
    assert "from the library's table" in answer.out


def test_the_coefficients_can_be_printed(dpkit, here):
    found = json.loads(dpkit("predict", "--profile", "tiny.yml", "--coefficients").out)
    assert set(found["network/fp32"]) >= {"step", "gflop", "gbyte"}
    assert all(value >= 0 for row in found.values() for value in row.values())


def test_a_computation_warns_where_there_is_no_room_and_notes_how_long_it_took(dpkit, here, tmp_path, monkeypatch):
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(stages.forecast, "free_memory", lambda: 1e6)
    answer = dpkit("compute", "--profile", "tiny.yml", "--chapter", "data", "--workers", "1")
    assert answer.code == 0
    assert re.search(r"^dpkit: warning: this needs about 0\.\d GB of memory and 0\.0 GB are free; lower workers", answer.err)
    line, = stages.forecast.records(Store(tmp_path / "store"))
    assert (line["what"], line["units"], line["complete"]) == ("compute", 2, True)
    (tmp_path / "store" / stages.forecast.FILE).write_text(
        json.dumps({"what": "compute", "expected": 20.0, "actual": 25.0}) + "\n", encoding="utf-8")
    answer = dpkit("predict", "--profile", "tiny.yml")
    assert "past predictions of `dpkit compute`: off by 20% (median of 1), at worst 20%" in answer.out


@pytest.mark.parametrize("stopped", [False, True])
def test_a_study_says_what_comes_and_notes_what_came_of_it(dpkit, here, tmp_path, monkeypatch, stopped):
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))

    def work(profile, settings, **_):
        plan = cli.plan_of(profile, settings)
        store = Store(tmp_path / "store")
        stages.compute(store, [e.unit for name in (["data"] if stopped else stages.CHAPTERS) for e in plan.chapter(name)])
        if stopped:
            raise KeyboardInterrupt
        return tmp_path

    monkeypatch.setattr("dpkit.studies.run", work)
    answer = dpkit("study", "--profile", "tiny.yml", "--device", "cpu")
    assert answer.code == (130 if stopped else 0)
    assert re.match(r"about \d+ s on 1 core \(\d+ to \d+\), [\d.]+ [MG]B of memory, [\d.]+ MB on disk; ", answer.out)
    line = stages.forecast.records(Store(tmp_path / "store"))[-1]
    assert (line["what"], line["complete"]) == ("study", not stopped)
    assert (0 < line["share"] < 0.5) if stopped else line["share"] == 1
    if not stopped:
        assert "about" not in dpkit("study", "--profile", "tiny.yml", "--device", "cpu").out  # nothing is left to make
