"""What can go wrong, in the user's words: one line that says what, one that says what to do next.

Everything this project raises on purpose is a `GgufloopError`; the command line prints it as two lines and
leaves with `exit_code`, and a traceback means a bug. A class exists only where the exit code differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn


class GgufloopError(Exception):
    """Something failed while running: `message` says what (value and rule), `hint` the next step."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GgufloopError, ValueError):
    """A value that no run could accept: a window out of range, an unknown solver."""

    exit_code = 2


class BackendError(GgufloopError):
    """The patched llama.cpp is missing, cannot be built, or is not the one that was loaded."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """A ready hint: the closest of `known` to `word`, then all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    choices = ", ".join(known)
    return f"did you mean {close[0]}? Known: {choices}." if close else f"known: {choices}."


class Closed:
    """What stands in a model's place before it is loaded and once it is closed: asked anything it raises GgufloopError.

    llama.cpp is handed pointers, and a freed one ends the process.
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        raise GgufloopError("this model is closed.", "load it again.")
