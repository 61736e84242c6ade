"""The files that describe the project agree with each other: dependencies, pins, versions, commands."""
from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dpkit

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS["study"], *EXTRAS["test"])]
PYTHONS = ("3.11", "3.12", "3.13")


def lines(name: str) -> list[str]:
    """The lines of a file that are neither empty nor comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def pins() -> dict[str, Requirement]:
    """Constraints by canonical name."""
    return {canonicalize_name(found.name): found for found in map(Requirement, lines("constraints.txt"))}


def exact(requirement: Requirement) -> Version:
    """The one version that a requirement allows."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not a pin"
    return Version(specifier.version)


def test_constraints_are_pins_without_places():
    found = lines("constraints.txt")
    names = [canonicalize_name(Requirement(line).name) for line in found]
    assert len(names) == len(set(names))
    assert names == sorted(names)
    for line in found:
        requirement = Requirement(line)
        assert requirement.url is None, line
        assert exact(requirement).local is None, f"{line} names one machine's build"
        assert not re.match(r"(nvidia-|cuda-|triton)", canonicalize_name(requirement.name)), line
    assert "://" not in "\n".join(found)


@pytest.mark.parametrize("requirement", WANTED, ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is in pyproject.toml but not in constraints.txt"
    assert requirement.specifier.contains(exact(pin), prereleases=True)
    for python in PYTHONS:
        assert pin.marker is None or pin.marker.evaluate({"python_version": python}), f"no pin on {python}"


def test_conda_environment_names_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    (python,) = [d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1])
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip[0] == "-c constraints.txt"
    assert pip[-1] == "-e .[study,test]"
    named = {canonicalize_name(found.name): found for found in map(Requirement, pip[1:-1])}
    assert named.keys() == {canonicalize_name(r.name) for r in WANTED}
    assert {n: exact(found) for n, found in named.items()} == {n: exact(pins()[n]) for n in named}


def test_core_dependencies_are_what_computing_needs():
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert core == {"torch", "torchvision", "numpy", "pandas", "pyyaml", "safetensors", "tqdm", "rich",
                    "typer", "diffusers"}


def test_one_version_everywhere():
    version = PROJECT["version"]
    changes = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert dpkit.__version__ == version
    assert changes[0] == version
    assert str(citation["version"]) == version
    assert [author["name"] for author in citation["authors"]] == ["The dpkit authors"]


def test_package_data_exist():
    for pattern in ("dpkit/profiles/*.yml", "dpkit/workflow/Snakefile"):
        assert list(ROOT.glob(pattern)), f"{pattern} is declared as package data but there is none"


@pytest.mark.parametrize("target", ["help", "book", "test", "test-slow", "lint", "bench", "lab", "setup",
                                    "clean", "distclean"])
def test_make_target_exists_and_is_explained(target):
    dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert dry.returncode == 0, dry.stderr
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.search(rf"make {target}\s+\S", shown.stdout)


def test_make_names_the_python_that_it_needs(tmp_path):
    wrong = tmp_path / "python"
    wrong.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    wrong.chmod(0o755)
    found = subprocess.run(["make", f"PYTHON={wrong}", f"VENV={tmp_path}/venv", "setup"], cwd=ROOT, text=True,
                           capture_output=True, timeout=60)
    assert found.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in found.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text(encoding="utf-8")
    assert lines.index("make setup") < lines.index("'.[peers]' ||") < lines.index("exec make test")  # peers are no condition
    assert subprocess.run(["bash", "-n", str(script)], timeout=30).returncode == 0


RECORDED_APART = sorted(p for folder in ("arms", "distillers") for p in (ROOT / "book" / folder).glob("*/*.ipynb"))


@pytest.mark.parametrize("path", RECORDED_APART, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_chapters_recorded_apart_are_those_of_today(path):
    """A copy of a chapter that was executed for a page of its own has the cells of its source."""
    def cells(file):
        found = json.loads(file.read_text(encoding="utf-8"))["cells"]
        return ["".join(c["source"]) for c in found if "injected-parameters" not in c["metadata"].get("tags", [])]

    assert cells(path) == cells(ROOT / "notebooks" / path.name)
