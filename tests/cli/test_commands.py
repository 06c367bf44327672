"""What holds for every command: -v goes before it or after it, and --help can be asked for twice in one process."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from support.cli import Cli

import ggufloop
from ggufloop.cli import cli as group
from ggufloop.cli.group import ALIASES, COMMANDS

PACKAGE = Path(ggufloop.__file__).parent


def paths(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """A command's words and those of the commands below it."""
    yield words
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below is not None
            yield from paths(below, (*words, name))


ALL = list(paths(group))


def test_help_twice_and_v_in_every_command(cli: Cli) -> None:
    assert len(ALL) > len(COMMANDS) + 4  # with the commands of shannon
    for words in [*ALL, *[(alias,) for alias in ALIASES]]:
        first, second = (cli(*words, "--help") for _ in range(2))
        assert first == second
        code, out, err = first
        assert (code, err) == (0, "")
        assert out.count("-v, --verbose") == 1, words


def test_the_version_as_other_programs_say_it(cli: Cli) -> None:
    assert cli("--version") == cli("version")


def test_v_before_and_after_a_command(cli: Cli, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.gguf")
    error = cli("inspect", missing)
    assert error[0] == 1
    assert "Traceback" not in error[2]
    for words in (("-v", "inspect", missing), ("inspect", "-v", missing), ("inspect", missing, "--verbose")):
        code, _, err = cli(*words)
        assert code == 1
        assert "Traceback" in err, words
        assert err.endswith(error[2])
    assert cli("inspect", missing) == error  # not remembered
    assert "Traceback" not in cli("snr", missing, "--ref", "-v")[2]  # a prompt is no flag


@pytest.mark.parametrize("init", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_no_module_shadows_a_builtin_that_its_package_uses(init: Path) -> None:
    """Importing ggufloop.cli.commands.list makes `list` in the package's __init__.py that module."""
    modules = {path.stem for path in init.parent.iterdir()} & set(dir(builtins))
    used = {node.id for node in ast.walk(ast.parse(init.read_text())) if isinstance(node, ast.Name)}
    assert not modules & used


LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        f"run {LONG}.gguf -p Hi", f"run -m {LONG} -p Hi", f"inspect {LONG}.gguf", f"pull {LONG}.gguf", f"advise {LONG}",
        f"snr {LONG}.gguf", f"compare --study {LONG}", f"shannon fit {LONG}.csv", f"perplexity MODEL --text {LONG}",
        f"perplexity MODEL --text TEXT --kl-base {LONG}", f"quantize MODEL --types Q8_0 --imatrix {LONG}",
        f"quantize MODEL --types Q8_0 --out {LONG}", f"compare MODEL --text TEXT --types {LONG}.gguf",
    ],
)  # fmt: skip
def test_a_name_the_system_does_not_take(
    words: str, tiny_model: Callable[[str], Path], tmp_path: Path, cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A path too long raises where nobody asks for it: even `Path.exists` does."""
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 50)
    given = {"MODEL": str(tiny_model("llama")), "TEXT": "text.txt"}
    code, out, err = cli(*(given.get(word, word) for word in words.split()))
    assert (code in (1, 2), out) == (True, ""), err
    assert "File name too long" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["GGUFLOOP_MODELS", "GGUFLOOP_CACHE"])
def test_a_folder_the_system_does_not_take(
    name: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(tmp_path / LONG))
    code, out, err = cli("list")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path}"[:60])
    assert err.endswith("-v shows where it was asked for.\n")
