"""A process of its own for the parts of llama.cpp that may end a process: the parent's side of child.py.

    with Worker() as worker:
        done = worker.run({"kind": "quantise", ...}, on_event)      # {"code": 0}

An assert of llama.cpp ends the child alone, and becomes one line here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from ggufloop import errors
from ggufloop.backend import library
from ggufloop.errors import GgufloopError
from ggufloop.files import PACKAGE

OnEvent = Callable[[dict[str, Any]], None]

_START = "import sys; sys.path[0] = sys.argv[1]; from ggufloop.quant.child import main; main()"


class Worker:
    """A quantiser process. Raises BackendError if there is no llama.cpp to run."""

    def __init__(self) -> None:
        library.usable()  # says what is missing better than the end of a process
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close(); a pipe nobody reads would fill
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(PACKAGE.parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # an assert is reported in one line, without a debugger
        )

    def run(self, job: dict[str, Any], on_event: OnEvent) -> dict[str, Any]:
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
        code = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
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
