"""Standard streams as scripts, cron and odd locales leave them: of another encoding, closed, full, left by the reader.

Every case is a process of its own: what happens at the interpreter's exit counts too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CLI = [sys.executable, "-c", "from ggufloop.cli import main; main()"]
CLOSED, FULL, LEFT, KEPT = "closed", "full", "left", "kept"
REASONS = {CLOSED: "it is closed", FULL: "No space left on device", LEFT: "its reader left"}

COMMANDS = {
    "list": ["list"],
    "inspect": ["inspect", "MODEL"],
    "run": ["run", "MODEL", "-p", "Hi", "-n", "8", "-t", "1", "-s", "1"],
    "chat": ["chat", "MODEL", "-n", "8", "-t", "1", "-s", "1"],
    "perplexity": ["perplexity", "MODEL", "--text", "TEXT", "-c", "32", "--chunks", "2", "-t", "1"],
    "version": ["version"],
    "completion": ["completion", "bash"],
    "help": ["--help"],
    "help of a command": ["run", "--help"],
    "completion of a word": ["COMPLETE"],
}
MAKES_NO_NOTES = {"list", "inspect", "version", "completion", "help", "help of a command", "completion of a word"}


@pytest.fixture
def words(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], list[str]]:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    known = {"MODEL": str(tiny_model("llama")), "TEXT": str(tmp_path / "text")}
    return lambda name: [known.get(word, word) for word in COMMANDS[name]]


def run(words: list[str], stdout: str, stderr: str, **env: str) -> tuple[int, str]:
    """Exit code and standard error of a command, whose standard streams are these."""

    def prepare() -> None:
        for fd, what in ((1, stdout), (2, stderr)):
            if what == CLOSED:
                os.close(fd)
            elif what == FULL:
                os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
            elif what == LEFT:
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, fd)

    if words == ["COMPLETE"]:
        words, env = [], {"_GGUFLOOP_COMPLETE": "bash_complete", "COMP_WORDS": "ggufloop ", "COMP_CWORD": "1"}
    done = subprocess.run(
        [*CLI, *words], input=b"Hi\n" if words[:1] == ["chat"] else b"", capture_output=True, timeout=120,
        preexec_fn=prepare, env=os.environ | env, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr.decode()


def test_an_output_that_cannot_be_written_is_one_line(words: Callable[[str], list[str]]) -> None:
    # every command with one fault, `version` and `run` with all
    cases = [(name, FULL) for name in COMMANDS]
    cases += [(name, fault) for name in ("version", "run") for fault in (CLOSED, LEFT)]
    for name, fault in cases:
        code, err = run(words(name), fault, KEPT)
        told = [line for line in err.splitlines() if not line.startswith(("note: ", "[ ", "loading"))]
        assert code == 1, (name, fault, err)
        assert told[-1:] == [f"error: cannot write to standard output: {REASONS[fault]}."], (name, fault, err)
        assert "Traceback" not in err, (name, err)
        assert "Exception ignored" not in err, (name, err)


def test_a_lost_standard_error_costs_no_answer(words: Callable[[str], list[str]]) -> None:
    for name, fault, code in (("version", CLOSED, 0), ("run", CLOSED, 0), ("run", FULL, 1), ("run", LEFT, 1)):
        assert run(words(name), KEPT, fault)[0] == code, (name, fault)
    answers = {}
    for fault in (KEPT, CLOSED, FULL, LEFT):
        program = [*CLI, *words("run")]
        script = {KEPT: "", CLOSED: "2>&-", FULL: "2>/dev/full", LEFT: "2> >(true)"}[fault]
        done = subprocess.run(["bash", "-c", f'"$@" {script}', "bash", *program], input=b"", capture_output=True)
        answers[fault] = done.stdout
    assert answers[KEPT]
    assert set(answers.values()) == {answers[KEPT]}


def test_both_lost_is_an_exit_code(words: Callable[[str], list[str]]) -> None:
    for name in ("version", "run"):
        for fault in (CLOSED, FULL, LEFT):
            assert run(words(name), fault, fault) == (1, "")


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """With its number free, the next file opened would get what is meant for standard output."""
    code = (
        "from ggufloop.cli.streams import guarded\n"
        "with guarded():\n"
        "    print(open('/dev/null').fileno() > 2, file=open('told', 'w'))"
    )
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-", "<&- 2>&-"):
        command = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", code]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert (tmp_path / "told").read_text() == "True\n", closed


def test_output_that_a_slow_reader_takes_late_is_whole() -> None:
    """A pipe that another program made non-blocking refuses what does not fit at once."""
    code = (
        "import os, click\nfrom ggufloop.cli.streams import guarded\nos.set_blocking(1, False)\n"
        "with guarded():\n    click.echo('x' * 1_000_000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert (len(out), err, process.returncode) == (1_000_001, b"", 0)


def test_an_input_that_cannot_be_read_is_one_line(words: Callable[[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for name in ("run", "chat"):
        program = [*CLI, *(word for word in words(name) if word not in ("-p", "Hi"))]
        command = ["bash", "-c", f'"$@" 0>{tmp_path}/out', "bash", *program]  # open for writing only
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        told = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("note: "))
        assert told == ("error: cannot read standard input: Bad file descriptor.\n"
                        "  give it a file or a pipe; </dev/null is none.")  # fmt: skip


ENCODINGS = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
}
TEXT = "caf\u00e9 \u2019 \u65e5 \U0001f600"
WRITTEN = {
    "cp1252": b"caf\xe9 \x92 \\u65e5 \\U0001f600",
    "latin-1": b"caf\xe9 \\u2019 \\u65e5 \\U0001f600",
    "ascii": b"caf\\xe9 \\u2019 \\u65e5 \\U0001f600",
    "C": b"caf\\xe9 \\u2019 \\u65e5 \\U0001f600",
    "utf-8": TEXT.encode(),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_letters_an_encoding_lacks_are_escaped(name: str) -> None:
    """By each way something is written; bytes of file names that are no text come out as they were."""
    code = (
        "import sys, click\nfrom ggufloop.cli.streams import guarded\n"
        f"text = {TEXT!a} + '\\udcff\\n'\n"
        "with guarded():\n    sys.stdout.write(text)\n    click.echo(text, nl=False)\n    print(text, end='')\n"
        "    sys.stdout.flush()\n    click.echo(text, nl=False, err=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ENCODINGS[name], capture_output=True)
    line = WRITTEN[name] + b"\xff\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, 3 * line, line)


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_answer_in_any_encoding(name: str, words: Callable[[str], list[str]]) -> None:
    """The tiny model's text is full of what is no letter; all of it is the same answer."""

    def answer(env: dict[str, str]) -> bytes:
        command = [*CLI, *words("run")]
        done = subprocess.run(command, env=os.environ | env, input=b"", capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = answer(ENCODINGS["utf-8"]).decode()
    assert not expected.isascii()
    plain = "ascii" if name == "C" else name
    assert answer(ENCODINGS[name]) == expected.encode(plain, "backslashreplace")
