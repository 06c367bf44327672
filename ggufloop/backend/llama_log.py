"""llama.cpp's log: shown on stderr when asked for; and the reason of a failure, which it gives there and nowhere else.

    log = LlamaLog(shown=lambda: verbose)             # called with a level and a line, from C
    log.clear(); load(); log.reason              # "missing tensor 'blk.0.attn_q.weight'", "" if it gave none

The first error is the reason: those after it are the callers' ("failed to load model").
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable

DEBUG, WARNING, ERROR, CONTINUED = 1, 3, 4, 5  # enum ggml_log_level
_CALLERS = re.compile(
    r"(?:\w+: |error loading model(?: \w+)?: |failed to initialize the context: )*"  # functions, and what they all say
)


class LlamaLog:
    """Takes llama.cpp's lines. shown: whether they are printed; debug lines (one per graph node) never are."""

    def __init__(self, shown: Callable[[], bool]) -> None:
        self._shown = shown
        self._level = ERROR
        self.reason = ""

    def clear(self) -> None:
        """Forget the reason of an earlier failure."""
        self.reason = ""

    def __call__(self, level: int, text: bytes, user_data: object = None) -> None:
        """One line, or a part of one. Nothing may be raised here: C is above, and could not pass it on."""
        self._level = self._level if level == CONTINUED else level
        line = (text or b"").decode("utf-8", "replace")
        if level == ERROR and not self.reason:
            self.reason = _reason(line)
        if self._level != DEBUG and self._shown() and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
                print(line, end="", flush=True, file=sys.stderr)


def _reason(line: str) -> str:
    """What a line of the log says, without the functions it went through."""
    return " ".join(_CALLERS.sub("", line.strip(), count=1).split()).rstrip(".")
