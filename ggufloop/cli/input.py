"""Where prompts come from: a file, a pipe, or lines typed at a terminal.

    text = read_file(Path("prompt.txt"))
    read = line_reader()                  # read() returns a message, raises EOFError at the end of the input

Lines end a message unless they end in a backslash, which continues it on the next line as in a shell. With
prompt-toolkit (the `chat` extra) Alt-Enter does the same, and lines are kept over runs.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import platformdirs

from ggufloop import reading
from ggufloop.cli.terminal import note
from ggufloop.errors import GgufloopError

Read = Callable[[], str]


class Unreadable(GgufloopError):
    """Nothing can be read from standard input, now or later."""


def _decode(data: bytes, what: str) -> str:
    try:
        return reading.text(data)
    except ValueError as e:
        raise GgufloopError(
            f"{what}{str(e).removeprefix('it')}.", "convert it, for example with iconv -t UTF-8."
        ) from e


def read_file(path: Path) -> str:
    """A prompt file's text without its last line's end. Raises GgufloopError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror or e}.", "give -f a text file.") from e
    return _decode(data, str(path)).removesuffix("\n")


def is_interactive() -> bool:
    """Whether somebody types at standard input."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_piped() -> str:
    """All of standard input, '' from a terminal; says so if it has to wait. Raises GgufloopError."""
    if sys.stdin is None or is_interactive():
        return ""
    with _waiting():
        data = _input(lambda: sys.stdin.buffer.read())
    return _decode(data, "standard input").removesuffix("\n")


def _input(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as e:  # such as one open for writing only
        raise Unreadable(
            f"cannot read standard input: {e.strerror or e}.", "give it a file or a pipe; </dev/null is none."
        ) from e


@contextlib.contextmanager
def _waiting(seconds: float = 2.0) -> Iterator[None]:
    """A pipe nobody writes to would look like a hang; a terminal user is told what is going on."""
    timer = threading.Timer(seconds, note, ["waiting for standard input to end; `</dev/null` gives none."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _piped_line() -> str:
    data = _input(lambda: sys.stdin.buffer.readline()) if sys.stdin is not None else b""
    if not data:
        raise EOFError
    return _decode(data, "standard input").rstrip("\r\n")


def _typed_line() -> str:
    click.echo("> ", nl=False, err=True)  # input() would write it to stdout, which may be a file
    try:
        return input()
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        raise


def _edited_line(commands: Sequence[str]) -> Read:
    """Lines from prompt-toolkit: history over runs, completion of commands. Raises ImportError without it."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    with contextlib.suppress(OSError):
        folder = Path(platformdirs.user_state_dir("ggufloop", appauthor=False))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "history").open("a"):
            history = FileHistory(str(folder / "history"))
    prompt: PromptSession[str] = PromptSession(
        "> ",
        history=history,
        key_bindings=keys,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        output=create_output(always_prefer_tty=True),
    )
    return prompt.prompt


def line_reader(commands: Sequence[str]) -> Read:
    """How messages are read: edited or typed lines at a terminal, else the lines of a pipe.

    commands: words to complete. The reader raises EOFError at the end, KeyboardInterrupt on Ctrl-C.
    """
    read = _piped_line
    if is_interactive():
        try:
            read = _edited_line(commands)
        except ImportError:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() line editing
            read = _typed_line

    def message() -> str:
        text = read()
        while text.endswith("\\"):
            text = text[:-1] + "\n"
            with contextlib.suppress(EOFError):
                text += read()
        return text

    return message
