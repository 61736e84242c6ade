"""Rules about the code itself: imports go downwards, randomness has one source, files stay short."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dpkit

PACKAGE = Path(dpkit.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"spec", "tree"}
LOOP = BASE | {"cores", "data", "models", "training"}
METHODS = ("distill", "prune", "connectivity", "alignment", "landscape", "hessian", "robustness")
#: what each room may import; everything that is not named here stands above and is imported by none of them
LADDER = {
    "spec": set(), "barriers": set(), "statistics": set(), "cores": set(), "files": set(), "tree": {"spec"}, "store": BASE,
    "data": BASE, "models": BASE,
    "training": BASE | {"cores", "data", "models"},
    **dict.fromkeys(METHODS, LOOP | {"barriers", "statistics", "files"}),
    "stages": LOOP | {*METHODS, "store", "statistics"},
    "report": BASE | {"barriers", "store", "statistics"},
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(code: ast.AST) -> set[str]:
    """The rooms that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name, as everywhere else"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dpkit.")}
    return {name for name in found if not name.startswith("__")}


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_the_walk_sees_every_kind_of_import():
    code = "import dpkit.a.b\nfrom dpkit import c, __version__\nfrom dpkit.d import e\ndef f():\n    from dpkit.g.h import i"
    assert imported(ast.parse(code)) == {"a", "c", "d", "g"}


@pytest.mark.parametrize("room", LADDER)
def test_imports_go_downwards_and_never_sideways(room):
    files = [f for f in FILES if room_of(f) == room]
    assert files, f"there is no room {room}; the ladder is out of date"
    for file in files:
        upward = imported(parsed(file)) - LADDER[room] - {room}
        assert not upward, f"{file.relative_to(ROOT)} imports {', '.join(sorted(upward))}; {room} may not"


def test_the_ladder_has_no_way_round():
    for room, below in LADDER.items():
        assert all(room not in LADDER[other] for other in below)


def test_the_architecture_page_names_every_room():
    page = (ROOT / "book" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("| room |")[1]
    for room in LADDER:
        assert f"| `{room}` |" in table, f"book/architecture.md does not say what {room} owns"


def calls(file: Path):
    """(dotted name, node) for each call in a module."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


#: where the places may be that set a generator's state: the second one starts a network that another library draws
SEEDING = ("dpkit/tree.py", "dpkit/distill/generator.py")


def test_seeds_come_from_one_place():
    for file in FILES:
        for name, node in calls(file):
            where = f"{file.relative_to(ROOT)}, line {node.lineno}"
            if file.relative_to(ROOT).as_posix() not in SEEDING:
                assert not name.endswith((".manual_seed", "manual_seed_all", ".seed")), f"{where}: use tree.generator_for"
            assert name != "hash", f"{where}: hash() differs from process to process; use tree.seed_for"
            assert not name.startswith("random."), f"{where}: draw from a generator"
            if name.startswith("np.random."):
                assert name.removeprefix("np.random.") in ("Generator", "PCG64", "SeedSequence"), f"{where}: draws globally"


DRAWS = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "_standard_gamma")
IN_PLACE = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_")


def test_random_numbers_come_from_a_generator():
    for file in FILES:
        for name, node in calls(file):
            if name in [f"torch.{draw}" for draw in DRAWS] or name.split(".")[-1] in IN_PLACE:
                assert any(k.arg == "generator" for k in node.keywords), (
                    f"{file.relative_to(ROOT)}, line {node.lineno}: {name} needs a generator")


@pytest.mark.parametrize("folder", ["dpkit", "tests", "book/_ext"])
def test_files_stay_short(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= 350, f"{file.relative_to(ROOT)} has {lines} lines; cut it where its subject changes"
