"""A real server on a port of its own for tests, and a client for it that can send anything.

with Server(path, loop=None, parallel=2) as server:
    server.post("/v1/completions", {"prompt": "Hello"})          # Reply(status, json, headers)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop.engine import LoopedLlama
from ggufloop.generate import complete
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling
from ggufloop.server.limits import Limits
from ggufloop.server.run import Config, Running, listen
from ggufloop.server.worker import Settings

SMALL = {"n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
"""How the tests run tiny models, alone and served."""


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
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]" or "error" in lines[-1]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class Server:
    """Serves a model file in threads of this process until the block ends."""

    def __init__(
        self,
        model: Path,
        n_ctx: int = 512,
        cuts: tuple[int, int] = (512, 512),
        open_model: Callable[[], LoopedLlama] | None = None,
        engine: dict[str, Any] = SMALL,
        wait: bool = True,
        limits: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        def load() -> LoopedLlama:
            return LoopedLlama(model, n_ctx=256, n_batch=64, n_ubatch=64, **engine)

        self.key = config.get("key")
        self._listener = listen("127.0.0.1", 0)
        self.running = Running(
            Config(
                config.pop("name", "tiny"),
                open_model or load,
                Settings(n_ctx, *cuts),
                limits=Limits(**{"stop_seconds": 1.0, **(limits or {})}),
                **config,
            ),
            self._listener,
        )
        self._wait = wait
        self._ready = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.running.run(lambda url: self._ready.set())
        except BaseException as e:
            self.error = e
        self._ready.set()

    def __enter__(self) -> Server:
        self._thread.start()
        if self._wait:
            assert self._ready.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self.running.stop(at_once=True)
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive(), "the server did not stop"

    @property
    def url(self) -> str:
        return self.running.url

    @contextlib.contextmanager
    def connection(self, timeout: float = 300) -> Iterator[http.client.HTTPConnection]:
        host, port = self.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
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

    def complete(self, prompt: str | list[int], **fields: Any) -> Reply:
        return self.post("/v1/completions", {"prompt": prompt, **fields})


def alone(
    model: Path,
    prompt: str | list[int],
    loop: LoopSpec | str | None,
    sampling: Sampling,
    n_ctx: int = 512,
    **engine: Any,
) -> str:
    """What a model of its own answers: the oracle of everything served."""
    llm = LoopedLlama(model, n_ctx=n_ctx, loop=loop, **{"n_batch": 512, "n_ubatch": 512, **SMALL, **engine})
    try:
        tokens = llm.tokenize(prompt.encode(), add_bos=True, special=True) if isinstance(prompt, str) else prompt
        return complete(llm, tokens, sampling).text
    finally:
        llm.close()
