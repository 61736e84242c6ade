"""A bare GPU box has the core dependencies only: computing, packing and reading numbers must not need more."""
from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: refuses every import that the core dependencies do not bring along, then runs the command line
GUARD = """
import sys

class Guard:
    refused = set(sys.argv.pop(1).split(","))

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.refused:
            raise ImportError(f"{name} is not on a bare machine")

sys.meta_path.insert(0, Guard())

# what asks whether a package is there, instead of importing it, gets no for an answer
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in Guard.refused else found(name, package)
from dpkit.cli import main
main()
"""

TINY = ["train_images=200", "test_images=40", "width=2", "epochs=1", "ipc=1", "distill_outer=1", "distill_inner=1",
        "set_epochs=1",
        "evaluation_seeds=1", "seeds=1", "plane_resolution=2", "plane_images=10", "hessian_images=10", "probes=2",
        "lanczos_steps=1", "points=3"]


def test_computing_needs_the_core_dependencies_only(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {line.split(">")[0].split("<")[0].strip() for line in project["optional-dependencies"]["study"]}
    modules = {name.replace("-", "_").lower() for name in extra} - {"pillow"} | {"IPython", "jupyter", "sphinx"}
    assert {"papermill", "matplotlib", "snakemake", "scipy"} <= modules
    environment = os.environ | {"DPKIT_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}

    def dpkit(*words: str) -> str:
        settings = [part for setting in TINY for part in ("--set", setting)]
        done = subprocess.run([sys.executable, "-c", GUARD, ",".join(sorted(modules)), *words, "--profile", "smoke", *settings],
                              cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "0 errors" in dpkit("compute")
    assert "artifacts in" in dpkit("store", "pack", str(tmp_path / "study.tar"))
    assert '"name": "tickets.imp.accuracy@67"' in dpkit("numbers", "--json")
