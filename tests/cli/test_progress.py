"""What is shown of long work: in a log some lines with the time left, on a terminal a bar that is gone at the end."""

from __future__ import annotations

import io
import sys

import click
import pytest

from ggufloop.cli import progress, terminal
from ggufloop.cli.width import columns, tell
from ggufloop.progress import Step, doing, named, note

MIB = 2**20


class Terminal(io.StringIO):
    """A standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_per_tenth_with_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown() as shown:
        for i in range(201):
            shown(Step(f"blk.{i}", i, 200, "tensor"))
            clock[0] += 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "blk.20: 10 % of 200 tensors, about 6 min left"
    assert lines[-1] == "blk.200: 100 % of 200 tensors, about 0 s left"


def test_short_work_says_nothing_in_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown() as shown:
        for task in range(20):
            for i in range(1, 11):
                shown(Step(f"{task}", i, 10, "chunk"))
                clock[0] += 0.25
    assert capsys.readouterr().err == ""


def test_what_was_there_already_makes_nothing_faster(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on at 80 %: the time left is of what is done now."""
    with progress.shown() as shown:
        shown(Step("a sweep", 0.8, 1.0))
        clock[0] += 60
        shown(Step("a sweep", 0.9, 1.0))
    assert capsys.readouterr().err == "a sweep: 90 %, about 60 s left\n"


def test_a_download_and_a_remark(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown() as shown:
        shown(Step("waiting"))
        shown(Step("waiting"))
        for i in range(5):
            named(shown, "one")(Step("", 10 * i * MIB, 40 * MIB, "B"))
            clock[0] += 4
        shown(Step("two", 0, 40 * MIB, "B"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["waiting", "one, 40 MiB", "one: 25 %, about 12 s left"]
    assert lines[-1] == "two, 40 MiB"


@pytest.mark.parametrize(("unit", "left"), [("B", True), ("tensor", False)])
def test_a_terminal_has_a_bar(unit: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.shown() as shown:
        for i in range(5):
            shown(Step(f"blk.{i}", i * MIB, 4 * MIB, unit))
        shown(Step("a remark"))
    said = terminal.getvalue()
    assert "blk.0:   0%|" in said
    assert said.endswith("\na remark\n" if left else "\ra remark\n")


def test_a_narrow_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no room is the name: how far it is, of how many, and the time left stay."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "70")
    with progress.shown() as shown:
        for i in range(3):
            shown(Step(f"SmolLM2-135M-Instruct.Q4_1.gguf: Q4_K_M, 12:16 k=3, chunk {i}", i, 512, "evaluation"))
    lines = terminal.getvalue().split("\r")
    assert max(map(len, lines)) == 69
    assert lines[1].startswith("SmolLM2-135M-Instruc...:   0%|")
    assert lines[1].endswith("| 0/512 evaluations, ? left")


def test_how_wide_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert columns(io.StringIO()) == 0  # a file or a pipe gets tables as they are
    assert columns(Terminal()) == 80
    for word, width in (("132", 132), ("0", 80), ("wide", 80)):
        monkeypatch.setenv("COLUMNS", word)
        assert columns(Terminal()) == width
    assert columns(io.StringIO()) == 0


def test_a_table_folds_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    md = "| name | what         |\n| ---- | ------------ |\n| a    | some words   |\n"
    for stream, told in ((Terminal(), "name  what\n----  ----------\na     some words\n"), (io.StringIO(), md)):
        monkeypatch.setattr(sys, "stdout", stream)
        tell(md)
        assert stream.getvalue() == told


def test_a_remark_is_cut_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    for stream, told in ((Terminal(), "note: it is large, which\n  takes a while.\n"),
                         (io.StringIO(), "note: it is large, which takes a while.\n")):  # fmt: skip
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.note("it is large, which takes a while.")
        with progress.shown() as shown:
            note(shown, "it is large, which takes a while.")
        terminal.dim("note: it is large, which takes a while.")
        assert click.unstyle(stream.getvalue()) == told * 3


def test_words_stand_while_their_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal alone, where a sentence takes their place; a log has the sentence."""

    def work() -> None:
        with progress.shown() as shown, doing(named(shown, "one"), "loading"):
            note(shown, "it is large.")

    for stream, left in ((Terminal(), f"\rone: loading\r{' ' * 12}\r"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        work()
        assert stream.getvalue() == f"{left}note: it is large.\n"
