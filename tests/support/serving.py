"""A llama-server in a process of its own for tests, and a client for it that can send anything.

with served(path, "--window", "2:5", "-np", "1") as server:            # through `ggufloop serve`
    server.post("/v1/completions", {"prompt": "Hello"})                # Reply(status, json, headers)

The fixture `serve` of conftest.py keeps one for each set of flags until the tests end.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop.engine import LoopedLlama
from ggufloop.generate.complete import complete
from ggufloop.generate.sampling import Sampling

CLI = [sys.executable, "-c", "from ggufloop.cli import main; main()"]
SMALL = ("-t", "1", "-c", "512", "-fa", "on")
"""How the tests serve tiny models; ENGINE is the same for one that is run alone."""
ENGINE = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True}


@dataclass
class Reply:
    """An answer: its status, its headers in lower case, and its body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"]["message"])

    @property
    def text(self) -> str:
        choice = self.json["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])

    @property
    def events(self) -> list[Any]:
        """The chunks of a stream, without its end mark."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class Server:
    """A process that answers at `url`, until the block ends."""

    def __init__(self, words: Sequence[str | Path], url: str = "", key: str | None = None, **env: str) -> None:
        self.url, self.key = url, key
        self.said: list[str] = []
        self._known = threading.Event()
        self.process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **env}, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            found = re.match(r"serving .* at (http://\S+) ", line)
            if found:
                self.url = found[1]
                self._known.set()
        self._known.set()

    def wait(self) -> Server:
        """Until it answers."""
        if not self.url:
            self._known.wait(120)
        until = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                if self.get("/health").status == 200:
                    return self
            time.sleep(0.05)
        self.close()
        raise AssertionError("".join(self.said) or "it does not answer")

    def __enter__(self) -> Server:
        return self.wait()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()

    def is_alive(self) -> bool:
        try:
            return self.get("/health").status == 200
        except OSError:
            return False

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @contextlib.contextmanager
    def connection(self, timeout: float = 120) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            yield connection
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        """One request, as it is."""
        sent = dict(headers or {})
        if self.key is not None:
            sent.setdefault("Authorization", f"Bearer {self.key}")
        with self.connection() as connection:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, {"Content-Type": "application/json", **(headers or {})})

    def chat(self, text: str, **fields: Any) -> Reply:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def tokens(self, prompt: Sequence[int], n: int, **fields: Any) -> list[int]:
        """The likeliest n tokens after these."""
        body = {"prompt": list(prompt), "n_predict": n, "temperature": 0, "return_tokens": True}
        reply = self.post("/completion", {**body, **fields})
        assert reply.status == 200, reply.body
        tokens = list(reply.json["tokens"])
        return tokens[:-1] if reply.json["stop_type"] == "eos" else tokens


def served(model: str | Path, *flags: str, key: str | None = None) -> Server:
    """`ggufloop serve`, at a port that is free."""
    env = {} if key is None else {"GGUFLOOP_API_KEY": key}
    return Server([*CLI, "serve", model, "--port", "0", *flags], key=key, **env)


def started(program: Path, model: str | Path, *flags: str) -> Server:
    """llama-server itself, of either library."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [program, "-m", model, "--port", str(port), *SMALL, "-tb", "1", "-np", "1", "-a", "model", *flags]
    return Server(words, f"http://127.0.0.1:{port}")


def alone(model: Path, prompt: Sequence[int], n: int, loop: str | None) -> list[int]:
    """What a model of its own says are the likeliest n tokens after these: the oracle of everything served."""
    llm = LoopedLlama(model, loop=loop, verbose=False, **ENGINE)
    try:
        return list(
            complete(
                llm,
                list(prompt),
                Sampling(temp=0, n=n),
            ).tokens
        )
    finally:
        llm.close()
