"""Runs a command of the command line in a fork of this process, and says how it ended.

    prepare()                                   # once: everything is imported, and child processes become forks too
    ended = run(["inspect", "m.gguf"], timeout=20)

A new Python takes longer to import llama_cpp than a tiny model to answer, so thousands of commands are forks of one
process that has imported everything and computed nothing. The processes that ggufloop starts itself (`python -c ...`)
are made forks as well. Linux and other Unixes only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WORKED, LINE, SILENT = "worked", "one line", "silent"
TRACEBACK, ASSERT, SIGNAL, HANG, MEMORY = "traceback", "assert", "signal", "hang", "memory"
OUTCOMES = (WORKED, LINE, SILENT, TRACEBACK, ASSERT, SIGNAL, HANG, MEMORY)
"""How a command ends: it worked; an error of ours in its two lines; failed without one; and what must not be."""
BAD = OUTCOMES[2:]
_HEAVY = (
    "ggufloop.measure.tasks",
    "ggufloop.measure.lm_eval_model",
    "ggufloop.tasks.data",
)  # torch makes each fork ten times as slow


@dataclass(frozen=True)
class Ended:
    """How a command ended. words: what it said last; peak: bytes of memory it had at most."""

    outcome: str
    words: str
    peak: int


def prepare() -> None:
    """Import what commands import, and let the processes they start be forks."""
    os.environ |= {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    import jinja2.sandbox  # noqa: F401

    import ggufloop

    for module in pkgutil.walk_packages(ggufloop.__path__, "ggufloop."):
        if module.name not in _HEAVY:
            with contextlib.suppress(ImportError):  # of what only an extra installs
                importlib.import_module(module.name)
    gc.freeze()  # a collection in a fork would write to every page
    subprocess.Popen = _Forked  # type: ignore[misc]


class _Forked(subprocess.Popen):  # type: ignore[type-arg]
    """subprocess.Popen, but `python -c CODE WORDS` is a fork of this process that runs CODE."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        words = [os.fspath(word) for word in args] if not isinstance(args, str) else [args]
        if words[:2] != [sys.executable, "-c"]:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        environment, (stdin, to, out, stdout, err, stderr) = rest[5], rest[9:15]
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            self._close_pipe_fds(*rest[9:15])  # type: ignore[attr-defined]
            return
        with _no_return():
            for theirs, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
                if theirs != -1:
                    os.dup2(theirs, number)
            for ours in {to, out, err} - {-1}:
                os.close(ours)
            os.environ.clear()
            os.environ.update(environment if environment is not None else {})
            _streams()
            sys.argv = ["-c", *words[3:]]
            exec(compile(words[2], "<string>", "exec"), {"__name__": "__main__"})


def _streams() -> None:
    """Python's streams, on whatever is 0, 1 and 2 now."""
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(i, mode, encoding="utf-8", closefd=False) for i, mode in enumerate(("r", "w", "w"))
    )


def quiet() -> None:
    """From now on what this process and C print goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        os.dup2(nowhere, number)


@contextlib.contextmanager
def _no_return() -> Any:
    """End this process with the block, as Python would."""
    code = 0
    try:
        yield
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def run(words: Sequence[str], timeout: float, most: int | None = None) -> Ended:
    """Run a command; words like NAME=value in front of it go into its environment.

    most: bytes of memory beyond which that is what is wrong with it.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            with _no_return():
                os.setsid()  # its own children end with it
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _streams()
                from ggufloop.cli import main

                left = list(words)
                while "=" in left[0]:
                    name, _, value = left.pop(0).partition("=")
                    os.environ[name] = value
                main(left)
        status, peak = _wait(pid, timeout)
        err.seek(0)
        said = err.read().decode(errors="replace")
    outcome, line = _judge(status, said)
    if outcome in (WORKED, LINE) and most is not None and peak > most:
        outcome, line = MEMORY, f"{peak >> 20} MiB of {most >> 20}: {line}"
    return Ended(outcome, line[:300], peak)


def _wait(pid: int, timeout: float) -> tuple[int | None, int]:
    """The exit code of a process (negative: its signal; None: it was still there), and its peak memory."""
    end, pause = time.monotonic() + timeout, 0.001
    try:
        while time.monotonic() < end:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        os.killpg(pid, signal.SIGKILL)
        _, _, usage = os.wait4(pid, 0)
        return None, usage.ru_maxrss * 1024
    finally:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)  # children that outlived it


def _judge(status: int | None, said: str) -> tuple[str, str]:
    lines = [line for line in said.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if re.search(r"GGML_ASSERT|Error|error", line)), "".join(lines[-1:]))
    if status is None:
        return HANG, last
    if status < 0:
        how = ASSERT if "GGML_ASSERT" in said or "terminate called" in said or "GGML_ABORT" in said else SIGNAL
        return how, f"{signal.Signals(-status).name}: {last}"
    if "Traceback (most recent call last)" in said:
        return TRACEBACK, lines[-1]
    if status == 0:
        return WORKED, ""
    ours = [line for line in lines if re.match(r"(error|Error): ", line)]
    if not ours or status not in (1, 2, 3):
        return SILENT, f"exit code {status}: {last}"
    return LINE, ours[0]
