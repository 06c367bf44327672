"""Loops kept in models.toml and what `--window auto` makes of them: a loop belongs to the file it was confirmed on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny
from support.cli import Cli
from support.own_models import OWN

from ggufloop.cli.loop_options import loop_from_flags, loop_suggestion, loops_from_flags
from ggufloop.loop import LoopSpec
from ggufloop.models import registry


def applied(path: Path) -> LoopSpec | None:
    """The whole loop that applies to a model file."""
    saved = registry.saved_loop(path)
    return saved.loop if saved is not None and saved.applies else None


HEUN = LoopSpec((1, 3), k=4, solver="heun", mode="layer")
LISTS = {"k": None, "mode": None, "solver": None, "beta": None, "kv": None}


def test_a_saved_loop_is_what_auto_means(tmp_path: Path, own_models: Callable[[str], None]) -> None:
    """For a shipped model, one of the user's own list and one that is in none; what else the file says stays."""
    model = tiny.write(tmp_path / "mine-Q8_0.gguf", tiny.FAMILIES["qwen3"])
    own, loop = registry.user_models_path(), LoopSpec((2, 5), k=4, kv="frozen", beta=0.5)
    for text in ("", OWN.replace("layers = 12", "layers = 6") + "\n# a comment\n[other]\nfile='o'\narchitecture='a'\n"
                     "layers=9\nsources=[]\n"):  # fmt: skip
        own_models(text)
        own.unlink() if not text else None
        assert applied(model) is None
        for saved in (loop, LoopSpec((1, 3), k=2)):
            assert registry.save_loop(model, saved, 'a "sweep"') == own
            assert applied(model) == saved
            assert registry.suggest_window(model) == (saved.window, 'a "sweep"')
        kept = [line for line in text.splitlines() if line.startswith(("#", "[", "file", "layers"))]
        assert all(line in own.read_text().splitlines() for line in kept)
        assert loop_suggestion(model)() == saved
        assert loop_from_flags("auto", loop_suggestion(model), k=None, kv=None) == saved
        assert loop_from_flags("auto", loop_suggestion(model), k=6, kv=None) == LoopSpec((1, 3), k=6)
    own.unlink()
    before = {m.name: m for m in registry.models()}["qwen3-4b"]
    own_models('["qwen3-4b"]\nloop = "15:19 k=6 beta=0.5"\norigin = "mine"\n')
    after = {m.name: m for m in registry.models()}["qwen3-4b"]
    assert (after.window, after.loop) == ((15, 19), LoopSpec((15, 19), k=6, beta=0.5))
    assert (after.sources, after.file, after.layers) == (before.sources, before.file, before.layers)


@pytest.fixture
def files(tmp_path: Path, own_cache: Path, own_models: Callable[[str], None]) -> tuple[Path, Path]:
    """Two quantisations of one model, as far as names and sums go."""
    first = tiny.write(tmp_path / "Mine-Q4_K_M.gguf", tiny.FAMILIES["qwen3"])
    second = tmp_path / "Mine-Q8_0.gguf"
    second.write_bytes(first.read_bytes() + bytes(32))
    return first, second


def inspect(cli: Cli, path: Path, *flags: str) -> tuple[str, str]:
    """The loop that inspect says these flags are, and its notes."""
    code, out, err = cli("inspect", path, "-o", "json", *flags)
    assert code == 0, err
    return json.loads(out)["loop"]["spec"], err


def test_a_loop_belongs_to_the_file_it_was_confirmed_on(files: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    first, second = files
    registry.save_loop(first, HEUN, "sweep")
    assert inspect(cli, first, "--window", "auto") == (str(HEUN), "")
    assert inspect(cli, second, "--window", "auto") == (
        "2:4 k=3",  # the rule of thumb
        f"note: the loop {HEUN} was confirmed on Mine-Q4_K_M.gguf and is not used for Mine-Q8_0.gguf; to try it: "
        f"--window 1:3 --K 4 --mode layer --solver heun\nnote: --window 2:4 rests on {registry.rests_on(second)}\n",
    )
    assert registry.rests_on(first) == "a sweep of this very file."
    assert registry.rests_on(second) == (
        "a rule of depth from published work, not on a gain measured on this file: it may harm. "
        "`ggufloop sweep` measures."
    )
    assert applied(second) is None
    assert registry.suggest_window(second) == ((2, 4), registry.RULE_OF_THUMB)
    renamed = tmp_path / "other-name.gguf"
    first.rename(renamed)
    assert inspect(cli, renamed, "--window", "auto") == (str(HEUN), "")  # by what is in it
    assert inspect(cli, second, "--window", "2:5") == ("2:5 k=3", "")


def test_each_file_keeps_its_own_loop(files: tuple[Path, Path], tmp_path: Path) -> None:
    third = tmp_path / "Mine-Q6_K.gguf"
    third.write_bytes(files[0].read_bytes() + bytes(64))
    same_name = tmp_path / "below" / files[0].name
    same_name.parent.mkdir()
    same_name.write_bytes(files[0].read_bytes() + bytes(96))
    paths = [*files, third, same_name]
    loops = {path: LoopSpec((1, 2 + i), k=2 + i) for i, path in enumerate(paths)}
    for path, loop in loops.items():
        registry.save_loop(path, loop, path.name)
    assert {path: applied(path) for path in loops} == loops
    assert {registry.suggest_window(path)[1] for path in loops} == {path.name for path in loops}
    again = LoopSpec((3, 5), k=6)
    before = registry.user_models_path().read_text().count("loop =")
    registry.save_loop(files[1], again, "later")
    assert {path: applied(path) for path in loops} == loops | {files[1]: again}
    assert registry.user_models_path().read_text().count("loop =") == before


def test_a_shipped_window_stays_for_other_quantisations(
    files: tuple[Path, Path],
    own_models: Callable[[str], None],
) -> None:
    own_models(OWN.replace("layers = 12", "layers = 6"))
    registry.save_loop(files[0], HEUN, "sweep")
    assert registry.suggest_window(files[0]) == ((1, 3), "sweep")
    assert registry.suggest_window(files[1]) == ((3, 5), "my sweep")


def test_an_entry_that_does_not_name_its_file_works_and_says_so(
    files: tuple[Path, Path],
    cli: Cli,
    own_models: Callable[[str], None],
) -> None:
    old = 'file = "Mine-Q4_K_M.gguf"\narchitecture = "qwen3"\nlayers = 6\nsources = []\n'
    own_models(f'[mine]\n{old}loop = "{HEUN}"\norigin = "old"\n')
    note = (f"note: the loop {HEUN} of entry mine does not say which file it was confirmed on; "
            "`ggufloop sweep --save` would.\n")  # fmt: skip
    for path in files:
        assert inspect(cli, path, "--window", "auto") == (str(HEUN), note)
        assert registry.suggest_window(path) == ((1, 3), "old")
    registry.save_loop(files[1], HEUN, "new")
    assert "old" not in registry.user_models_path().read_text()
    assert inspect(cli, files[1], "--window", "auto") == (str(HEUN), "")
    assert applied(files[0]) is None


@pytest.mark.parametrize(
    ("flags", "loop"),
    [
        ("", str(HEUN)),
        ("--solver euler --mode block", "1:3 k=3"),
        ("--mode block", "1:3 k=3"),
        ("--beta 0", "1:3 k=3"),
        ("--decode full", "1:3 k=3"),
        ("--loop-sinks 0", "1:3 k=3"),
        ("--K 3", "1:3 k=3"),
        ("--mode layer", "1:3 k=3 mode=layer"),
    ],
)
def test_a_flag_given_at_its_default_counts(files: tuple[Path, Path], cli: Cli, flags: str, loop: str) -> None:
    registry.save_loop(files[0], HEUN, "sweep")
    assert inspect(cli, files[0], "--window", "auto", *flags.split())[0] == loop


def test_lists_of_flags_too(files: tuple[Path, Path]) -> None:
    registry.save_loop(files[0], HEUN, "sweep")
    suggest = loop_suggestion(files[0])
    assert loops_from_flags("auto", suggest, **LISTS) == [HEUN]
    assert loops_from_flags("auto", suggest, **LISTS | {"solver": "euler"}) == [LoopSpec((1, 3), k=3)]
    assert loops_from_flags("2:4", suggest, **LISTS) == [LoopSpec((2, 4), k=3)]


def test_a_note_is_said_once(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    registry.save_loop(files[0], HEUN, "sweep")
    loops_from_flags("auto", loop_suggestion(files[1]), **LISTS | {"k": "2,3,4"})
    err = capsys.readouterr().err
    assert (err.count("note: the loop"), err.count("note: --window 2:4 rests on"), err.count("note: ")) == (1, 1, 2)


@pytest.mark.parametrize(
    "text", ["2:4 k=3", "1:3 k=4 solver=heun mode=layer", "2:4 k=3 halt=0.01",
             "2:4 k=6 passes=3 kv=frozen decode=first:8 attention=9 sinks=2", "2:4 k=3 damping=0.25 beta=0.5"]
)  # fmt: skip
def test_a_loop_as_flags_is_that_loop(text: str, files: tuple[Path, Path], cli: Cli) -> None:
    loop = LoopSpec.parse(text)
    assert inspect(cli, files[0], *loop.flags.split())[0] == str(loop)


def test_a_damaged_identity(own_models: Callable[[str], None]) -> None:
    from ggufloop.errors import GgufloopError

    entry = 'file="m.gguf"\narchitecture="llama"\nlayers=9\nsources=[]\nloop="2:4 k=3"\norigin="x"\nloop_file='
    for value in ('"m"', "{}", '{name="m", bytes="1", sha256="a"}', '{name="m", bytes=1, sha256="a", more=1}'):
        own_models(f"[m]\n{entry}{value}\n")
        with pytest.raises(GgufloopError, match=r"^model m in .* cannot be understood: "):
            registry.models()
