"""The rules of the code itself: ruff, mypy, who may import llama_cpp, who may print, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "ggufloop"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("words", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_tool(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything a module imports, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


def test_only_the_engine_and_two_processes_of_their_own_import_llama_cpp() -> None:
    importers = [name_of(path) for path in MODULES if "llama_cpp" in imported(ast.parse(path.read_text()))]
    assert importers == ["ggufloop/backend/verifier.py", "ggufloop/engine.py", "ggufloop/quant/child.py"]


PROCESSES = {
    "ggufloop.backend.trier",
    "ggufloop.backend.verifier",
    "ggufloop.measure.shard_child",
    "ggufloop.quant.child",
}
"""Started, never imported: llama.cpp is in them, and may end them."""

FLOORS = """
errors records
reading interrupts progress
files table
setting solvers
loop logits
recipes flat
models
backend
engine
opening
generate inspection tasks quant
measure
scaling
study
figures
server
cli
"""
"""From the ground. A package imports from itself and from floors below, also inside functions."""


def modules() -> dict[str, set[str]]:
    """Every module of the package, and which modules of it each imports."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    found = {}
    for name, path in names.items():
        wanted = found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names if alias.name in names}
            elif isinstance(node, ast.ImportFrom) and node.module in names:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {each if each in names else node.module for each in inside}
    return found


def test_imports_go_down() -> None:
    floor = {name: i for i, names in enumerate(FLOORS.split("\n")) for name in names.split()}
    for name, wanted in modules().items():
        if name == "ggufloop" or name in PROCESSES:
            continue
        room = name.split(".")[1]
        for other in wanted:
            there = other.split(".")[1]
            assert room == there or floor[there] < floor[room], f"{name} imports {other}, which is not below it"


def test_these_processes_are_never_imported() -> None:
    """What it imports would load llama.cpp into a process that may not survive it."""
    assert not PROCESSES & set().union(*modules().values())


def test_a_name_is_one_class() -> None:
    """A reader who meets `Request` need not ask whose."""
    where: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(name_of(path))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_the_map_is_complete() -> None:
    """CONTRIBUTING.md names every package and module, and none that is gone."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = text[text.index("## Where things are") : text.index("A new architecture")]
    drawn = "\n".join(line for line in drawn.splitlines() if line.startswith("    "))
    here = {path.name for path in MODULES if path.name != "__init__.py" and path.parent.name != "commands"}
    assert here - set(re.findall(r"\b\w+\.py\b", drawn)) == set()
    elsewhere = {path.name for folder in ("scripts", "tests", "research") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", drawn)) - here - elsewhere == set()


def test_nothing_below_the_command_line_prints_or_knows_click() -> None:
    for path in MODULES:
        if path.is_relative_to(PACKAGE / "cli") or path.name == "llama_log.py":  # verbose=True prints llama.cpp's log
            continue
        tree = ast.parse(path.read_text())
        assert "click" not in imported(tree), name_of(path)
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        told = {"print", "sys.stdout.write", "sys.stderr.write", "warnings.warn"} & set(calls)
        assert not told, f"{name_of(path)} calls {told}: return it, and let cli/ print it"


def test_a_command_only_parses_calls_and_prints() -> None:
    """What it does lies below, where Python reaches it too; what it takes longer to print lies beside it."""
    for path in (PACKAGE / "cli" / "commands").glob("*.py"):
        lines = path.read_text().count("\n")
        assert lines <= 200, f"{name_of(path)} has {lines} lines: move what it does into a function of a package below"


def test_activation_needs_nothing_heavy() -> None:
    """`backend.activate` runs before everything else: what it imports, everybody pays for."""
    heavy = {"numpy", "gguf", "llama_cpp", "click", "huggingface_hub"}
    code = f"import sys, ggufloop.backend.library; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_test_file_s_name_is_one_file() -> None:
    """pytest imports them by name; what they share lies in tests/support."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_files_are_short_ascii_and_say_what_they_are() -> None:
    for path in [
        *MODULES,
        *(ROOT / "scripts").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "patches").glob("*.[ch]*"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600, f"{name_of(path)} is over 600 lines: split it by what a user does"
        assert text.isascii(), name_of(path)
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no docstring"
