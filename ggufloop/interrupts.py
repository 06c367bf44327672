"""Signals that end the process. Ctrl-C while llama.cpp is at work is kept until the call returns, because what a
callback from C raises is lost.

    with Held() as interrupted:
        load(progress=lambda: not interrupted())     # give up early if asked to

llama.cpp calls back into Python for every line of its log. Python runs signal handlers whenever Python code runs,
so there as well, and ctypes can only print and forget the KeyboardInterrupt. Here the handler that was set before is
called when the block ends, however it ends: what that raises takes the place of the failure the interrupt caused.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


def end_on_sigterm() -> None:
    """Make SIGTERM an exception, so that child processes are taken along and what is half made is cleaned up."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))


class Held:
    """Hold SIGINT back in a block; calling it says whether one came. In other threads it does nothing."""

    def __init__(self) -> None:
        self._frame: FrameType | None = None
        self._came = self._holds = False
        self._before: Any = None

    def __call__(self) -> bool:
        return self._came

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._came, self._frame = True, frame

    def __enter__(self) -> Held:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            self._holds = callable(self._before)  # ignored, left to the system, or not Python's: nothing to hold
        if self._holds:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if not self._holds:
            return
        signal.signal(signal.SIGINT, self._before)
        frame, self._frame = self._frame, None
        if self._came:
            self._before(signal.SIGINT, frame)
