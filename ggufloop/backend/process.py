"""Processes of our own that llama.cpp may end: the parent's side and the child's.

    _START = process.main_of("ggufloop.backend.trier")       # a module of ours that is started, never imported
    ended = process.run(_START, "m.gguf", timeout=10)        # status (None: out of time), out, errors
    with process.Worker(_START) as worker:                   # one that does several jobs
        done = worker.run({"kind": "quantise", ...}, on_event)

An assert of llama.cpp ends the child alone, and becomes a line here; whatever ends the block takes the child along.
What a child says are JSON objects, one a line, by the function that `answers` gives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ggufloop import errors
from ggufloop.backend import library
from ggufloop.errors import GgufloopError
from ggufloop.files import PACKAGE

Send = Callable[[dict[str, Any]], None]

POLITE = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
"""For a short check, unless the user says otherwise: spinning threads take many times as long on a busy machine."""


def main_of(module: str) -> str:
    """The code that runs a module's main() in a process of its own."""
    return f"import sys; sys.path[0] = sys.argv[1]; from {module} import main; main()"


def _words(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, str(PACKAGE.parent), *arguments]


def _environment(polite: bool, env: Mapping[str, str]) -> dict[str, str]:
    """An assert is reported in one line, without a debugger."""
    return {**(POLITE if polite else {}), **os.environ, "GGML_NO_BACKTRACE": "1", **env}


def ending(status: int) -> str:
    """What ended a process, in words: SIGSEGV, exit status 1."""
    if status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            return f"signal {-status}"
    return f"exit status {status:#x}" if status >= 0xC0000000 else f"exit status {status}"  # Windows' crashes


@dataclass(frozen=True)
class Ended:
    """A process that is gone. status: None if it had to be ended after its time."""

    status: int | None
    out: str
    errors: str

    @property
    def killed(self) -> bool:
        """Whether the system ended it, for want of memory most likely."""
        return self.status == -getattr(signal, "SIGKILL", 0)

    @property
    def crashed(self) -> bool:
        """Whether a signal, or what Windows has instead, ended it."""
        return self.status is not None and (self.status < 0 or self.status >= 0xC0000000)


def run(code: str, *arguments: str, timeout: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run Python code in a process of its own until its end, or for `timeout` seconds. arguments: its sys.argv[2:]."""
    try:
        done = subprocess.run(
            _words(code, *arguments),
            env=_environment(True, env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
        )
        status, out, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as e:
        status, out, errors = None, e.stdout or b"", e.stderr or b""
    return Ended(status, *(text.decode(errors="replace") for text in (out, errors)))


class Worker:
    """A process that does jobs, one after the other, until `close`. Raises BackendError if there is no llama.cpp."""

    def __init__(self, code: str) -> None:
        library.usable()  # says what is missing better than the end of a process
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close(); a pipe nobody reads would fill
        self._process = subprocess.Popen(
            _words(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8",
            env=_environment(False, {}),
        )  # fmt: skip

    def run(self, job: dict[str, Any], on_event: Send) -> dict[str, Any]:
        """Do one job and return what it answers; what happens meanwhile goes to on_event.

        Raises the child's GgufloopError, or one that says how it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # it may have ended; its last words follow
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # half a line, its last words
                break
            if "done" in event:
                done: dict[str, Any] = event["done"]
                return done
            if "error" in event:
                kind, message, hint = event["error"]
                raise getattr(errors, kind)(message, hint)
            on_event(event)
        raise self._ended()

    def _ended(self) -> GgufloopError:
        how = ending(self._process.wait())
        self._errors.seek(0)
        words = self._errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        last = f": {words[-1]}" if words else ""
        hint = "run with -v to see its log up to there."
        if how == "SIGKILL":
            hint = "the system may have run out of memory."
        return GgufloopError(f"llama.cpp ended its process ({how}){last}", hint)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent words for a process that has ended
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# In the child


def answers() -> Send:
    """What sends an answer to the parent. From here on what C, or print, writes to stdout goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")

    return send


def serve_jobs(send: Send, do: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The life of a Worker: what `do` makes of each job, until the other end is gone."""
    for line in sys.stdin:
        try:
            send({"done": do(json.loads(line))})
        except GgufloopError as e:
            send_error(send, e)
        except Exception as e:  # a bug of ours: the parent should say more than that the process ended
            send({"error": ["GgufloopError", f"the process failed: {type(e).__name__}: {e}", ""]})


def send_error(send: Send, e: GgufloopError) -> None:
    """Raise `e` in the parent."""
    send({"error": [type(e).__name__, e.message, e.hint]})
