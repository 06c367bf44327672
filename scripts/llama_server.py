"""A llama-server started for a script, and a client that waits for whole answers.

    with running(backend.program("llama-server"), model, slots=8, flags=["-t", "2"]) as server:
        seconds, answer = server.complete([1, 2, 3], 64, loop=None)

The program is started as it is, of either library, not by `ggufloop serve`: what is compared has the same flags.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec
from ggufloop.server.serve import free_port

CONTEXT = 1024
START_SECONDS, ANSWER_SECONDS = 120, 600


class Server:
    """A llama-server, process `pid`, that answers at a port of this machine."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid

    def cpu_seconds(self) -> float:
        """CPU time the process has taken so far, what waits for other processes not counted; nan where not Linux."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # what clock_getcpuclockid(3) returns
        except (OSError, AttributeError):
            return math.nan

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What it answers. Raises GgufloopError for anything but 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            content = None if body is None else json.dumps(body)
            connection.request("POST" if body else "GET", path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, found = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise GgufloopError(f"llama-server does not answer {path}: {e!r}.") from None
        finally:
            connection.close()
        if status != 200:
            raise GgufloopError(f"llama-server answers {path} with {status}: {found['error']['message']}")
        return found

    def complete(self, prompt: Sequence[int], n: int, loop: LoopSpec | None, slot: int = -1) -> tuple[float, Any]:
        """Seconds until the whole answer of n tokens is there, and the answer. slot: the server's choice if -1."""
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        body["id_slot"] = slot
        if loop is not None:
            body["loop"] = str(loop)
        start = time.perf_counter()
        answer = self.ask("/completion", body)
        took = time.perf_counter() - start
        if answer["tokens_predicted"] != n:
            raise GgufloopError(f"an answer has {answer['tokens_predicted']} tokens instead of {n}.")
        return took, answer

    def vocabulary(self) -> int:
        return int(self.ask("/v1/models")["data"][0]["meta"]["n_vocab"])


@contextmanager
def running(program: Path, model: Path, slots: int, flags: Sequence[str]) -> Iterator[Server]:
    """llama-server with slots of CONTEXT tokens and these flags, until the block ends.

    Raises GgufloopError if it does not start.
    """
    port = free_port("127.0.0.1", 0)
    words = [program, "-m", model, "-a", "model", "--host", "127.0.0.1", "--port", port,
             "-np", slots, "-c", slots * CONTEXT, "--no-kv-unified", *flags]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_ARG_", "LLAMA_LOOP"))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        try:
            server, until = Server(port, process.pid), time.monotonic() + START_SECONDS
            while not _answers(server):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    said = log.read().decode("utf-8", "replace").strip().splitlines()
                    raise GgufloopError(f"{program} does not start: {said[-1] if said else 'it says nothing'}")
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _answers(server: Server) -> bool:
    try:
        return bool(server.ask("/health")["status"] == "ok")
    except GgufloopError:
        return False
