"""Running the programs of a build: output to a log, and nothing left running.

log = BuildLog(path)
status = log.run([cmake, ...], on_line=...)       # the exit status; the output is in the log
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class BuildLog:
    """A log file that collects the commands of one build and their output."""

    def __init__(self, path: Path) -> None:
        """Start an empty log at `path`, whose folder is made. Raises OSError."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def run(
        self,
        argv: Sequence[str | Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> int:
        """Run a program, its output into the log and line by line to `on_line`; returns its exit status.

        env: variables on top of this process's. A program that cannot be started counts as status 127. On an exception
        (Ctrl-C, a full disk) the program and what it started are stopped before the exception goes on.
        """
        words = [str(word) for word in argv]
        with self.path.open("a", encoding="utf-8", errors="replace") as log:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            try:
                process = subprocess.Popen(
                    words,
                    cwd=cwd,
                    env={**os.environ, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # a group of its own, so that all of it can be stopped
                )
            except OSError as e:
                log.write(f"error: cannot start {words[0]}: {e.strerror}\n")
                return 127
            assert process.stdout is not None
            try:
                with process.stdout:
                    for line in process.stdout:
                        log.write(line)
                        on_line(line.rstrip())
                return process.wait()
            except BaseException:
                _stop(process)
                raise

    def tail(self, lines: int, marks: Sequence[str]) -> list[str]:
        """The first `lines` lines of the last command that hold one of `marks`, else its last `lines` lines."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        last = [line for line in text[text.rfind("\n$ ") + 1 :].splitlines()[1:] if line.strip()]
        marked = [line for line in last if any(mark in line for mark in marks)]
        return marked[:lines] or last[-lines:]


def _stop(process: subprocess.Popen[str]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=5)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
