"""The command line as a person meets it: help, one line for every mistake, and the way of an artifact from end to end."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import NOT_OURS, Answer, make_checkout

from dpkit import cli


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def one_line(answer: Answer) -> str:
    """The one line of an error; fails unless there is exactly that."""
    assert answer.code not in (0, None)
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("dpkit: ")
    assert "Traceback" not in line
    return line


# --- help and words ---------------------------------------------------------------------------------------------------

def test_help_names_every_command_and_teaches_by_example():
    done = subprocess.run([sys.executable, "-m", "dpkit", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    listed = done.stdout.split("Commands:")[1]
    names = set(typer.main.get_command(cli.app).commands)
    assert names >= {"study", "run", "compute", "status", "verify", "lineage", "store", "numbers", "book", "profiles", "bench"}
    assert set(re.findall(r"^  ([a-z]+)", listed, re.MULTILINE)) == names
    for example in re.findall(r"^ +dpkit ([a-z]+)", done.stdout, re.MULTILINE):
        assert example in names


@pytest.mark.parametrize("command", ["study", "run", "compute", "status", "lineage", "numbers", "book", "store", "profiles"])
def test_every_command_has_help_of_its_own(dpkit, command):
    answer = dpkit(command, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "Usage: dpkit " + command in answer.out


def test_version_and_profiles(dpkit):
    assert re.fullmatch(r"dpkit \d+\.\d+\.\d+\S*\n", dpkit("--version").out)
    assert {"smoke", "quick", "cifar10-small"} <= {line.split()[0] for line in dpkit("profiles").out.splitlines() if line.strip()}
    shown = dict(line.split(maxsplit=1) for line in dpkit("profiles", "smoke").out.splitlines())
    assert (shown["epochs"], shown["dataset"]) == ("2", '"shapes"')


def test_settings_are_key_and_value():
    assert cli.settings_of(["width=4", " lr = 0.1", "dataset=npz:a=b.npz"]) == {
        "width": "4", "lr": " 0.1", "dataset": "npz:a=b.npz"}
    assert cli.settings_of(None) == {}
    for word in ("width", "=4"):
        with pytest.raises(ValueError, match="key=value"):
            cli.settings_of([word])


def test_a_parameter_is_two_words_or_one():
    assert cli.joined(["run", "03", "-p", "width", "24", "-p", "lr=0.1", "-o", "x"]) == [
        "run", "03", "-p", "width=24", "-p", "lr=0.1", "-o", "x"]
    assert cli.joined(["run", "-p", "at_rounds", "2,4"]) == ["run", "-p", "at_rounds=2,4"]
    assert cli.joined(["study", "--", "-p", "width"]) == ["study", "--", "-p", "width"]
    with pytest.raises(ValueError, match="width has no value"):
        cli.joined(["run", "03", "-p", "width"])


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "study --profile nope": "unknown profile 'nope'",
    "study --profile quik": "did you mean quick",
    "study --profile missing.yml": "missing.yml does not exist",
    "study --profile list.yml": "must be a list of `name: value` lines",
    "study --profile broken.yml": "not readable YAML",
    "study --profile smoke --set bogus=1": "unknown parameter 'bogus'",
    "study --profile smoke --set widht=4": "did you mean width",
    "study --profile smoke --set width=wide": "width must be a whole number, got 'wide'",
    "study --profile smoke --set compile=perhaps": "compile must be true or false",
    "study --profile smoke --set fraction=0": "fraction must lie in (0, 1)",
    "study --profile smoke --set fraction=1": "fraction must lie in (0, 1)",
    "study --profile smoke --set fraction=1.0": "fraction must lie in (0, 1)",
    "study --profile smoke --set fraction=1.5": "fraction must lie in (0, 1)",
    "study --profile smoke --set fraction=-0.2": "fraction must lie in (0, 1)",
    "study --profile smoke --set fraction=nan": "fraction must be a",
    "study --profile smoke --set at_rounds=9": "at_rounds must lie in",
    "study --profile smoke --set arms=imp,magic": "unknown arm 'magic'",
    "study --profile smoke --set width": "--set takes key=value",
    "study --profile smoke --set =4": "--set takes key=value",
    "study --profile smoke --device tpu": "device must be auto, cpu or cuda",
    "study --profile smoke --shares 0": "--shares",
    "study --profile smoke --set dataset=cifar11": "dataset must be shapes, cifar10",
    "study --profile smoke --set dataset=npz:missing.npz": "missing.npz does not exist",
    "compute --profile smoke --set dataset=npz:cut.npz": "cut.npz cannot be read",
    "compute --profile smoke --set dataset=npz:shape.npz": "(N, H, W, C) uint8",
    "compute --profile smoke --set dataset=npz:labels.npz": "labels are out of range",
    "compute --profile smoke --set dataset=folder:nowhere": "lacks the folder train",
    "compute --profile smoke --set train_images=-5": "train",
    "compute --profile smoke --share 0/3": "share must be i/n",
    "compute --profile smoke --share 4/3": "share must be i/n",
    "compute --profile smoke --share half": "share must be i/n",
    "compute --profile smoke --chapter ticket": "did you mean tickets",
    "compute --profile smoke --device tpu": "device must be auto, cpu or cuda",
    "compute --profile smoke --workers many": "--workers",
    "compute --profil smoke": "--profil",
    "status --profile nope": "unknown profile 'nope'",
    "run 99-nothing": "unknown notebook '99-nothing'",
    "run 03-tikets": "did you mean 03-tickets",
    "run": "notebook",
    "run 03-tickets -p bogus 1": "unknown parameter 'bogus'",
    "run 03-tickets -p width wide": "width must be a whole number",
    "run 03-tickets -p width": "width has no value",
    "run 03-tickets -p fraction 1.0": "fraction must lie in (0, 1)",
    "run 03-tickets -p workers some": "workers must be a whole number",
    "run 03-tickets --share 2": "share must be i/n",
    "numbers --profile smoke": "profile smoke has no numbers yet",
    "numbers --profile nope": "unknown profile 'nope'",
    "lineage tickets.imp.accuracy@67 --profile smoke": "unknown number 'tickets.imp.accuracy@67'",
    "lineage wrong": "6 hexadecimal digits",
    "lineage abcdef": "no artifact in",
    "book --profile smoke": "no executed notebooks",
    "store pack": "file",
    "store unpack nowhere.tar": "nowhere.tar does not exist",
    "store unpack cut.npz": "cut.npz cannot be read",
    "store unpack broken.yml": "broken.yml cannot be read",
    "bogus": "No such command 'bogus'",
}


@pytest.fixture(scope="module")
def crooked(tmp_path_factory) -> Path:
    """A checkout with data and profiles that are not right. Nothing may be written into it."""
    folder = make_checkout(tmp_path_factory.mktemp("crooked") / "checkout")
    images = {"train_images": np.zeros((20, 8, 8, 3), np.uint8), "train_labels": np.arange(20) % 2,
              "test_images": np.zeros((4, 8, 8, 3), np.uint8), "test_labels": np.arange(4) % 2}
    np.savez_compressed(folder / "whole.npz", **images)
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:-200])
    np.savez(folder / "shape.npz", **images | {"train_images": np.zeros((20, 192))})
    np.savez(folder / "labels.npz", **images | {"test_labels": np.arange(4) - 1})
    (folder / "list.yml").write_text("- width\n", encoding="utf-8")
    (folder / "broken.yml").write_text("width: [1\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("words", "reason"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(dpkit, crooked, tmp_path, monkeypatch, words, reason):
    for name in NOT_OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DPKIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(crooked)
    before = files(crooked)
    assert reason in one_line(dpkit(*words.split()))
    assert files(crooked) == before
    # commands that read may make an empty store, those that would make things have not begun
    reading = words.split()[0] in ("numbers", "lineage", "store")
    assert files(tmp_path) <= ({"store", "store/format.json", "store/tmp"} if reading else set())


@pytest.mark.parametrize("words", ["study --profile smoke", "compute --profile smoke", "status --profile smoke", "verify",
                                   "lineage abcdef", "store pack out.tar"])
def test_a_store_from_a_newer_version_is_left_alone(dpkit, checkout, words):
    marker = checkout / "results" / "store" / "format.json"
    marker.parent.mkdir(parents=True)
    marker.write_text('{"format": 99}', encoding="utf-8")
    before = files(checkout)
    assert "has format 99" in one_line(dpkit(*words.split()))
    assert files(checkout) == before


def test_without_a_network_a_download_fails_in_one_line(dpkit, checkout, monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    line = one_line(dpkit("compute", "--profile", "smoke", "--set", "dataset=cifar10"))
    assert "could not be downloaded" in line
    assert not (checkout / "results").exists()
    assert not list((checkout / "data").rglob("*.tar.gz*"))


def test_a_mistake_in_a_process_of_its_own_shows_no_traceback(checkout):
    done = subprocess.run([sys.executable, "-m", "dpkit", "compute", "--profile", "smoke", "--set", "fraction=1.0"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "dpkit: fraction must lie in (0, 1), got 1.0\n"
    assert done.stdout == ""
    assert not (checkout / "results").exists()
