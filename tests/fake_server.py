"""The page's server without a model: the routes and forms of `docs/server.md`, with answers written beforehand.

    with FakeServer(folder) as server:                # folder: of results, or None
        server.url, server.requests                   # every body /v1/chat/completions was sent

What an answer is follows from the message: a key of SCRIPTS, else both answers of the first. `fail` is refused, `break`
ends in the middle, `slow` is written until the client goes away, which `server.left` counts.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ggufloop.errors import UsageError
from ggufloop.server import assets, results

SCRIPTS = {
    "sky": (
        "The sky is blue because air scatters short waves of sunlight more than long ones.",
        "The sky is blue because small molecules of air scatter short waves of light far more than long ones.",
    ),
    "same": ("Four.", "Four."),
    "markup": (
        "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>",
        "<b>bold</b> <a href='javascript:window.hit=3'>link</a> <svg onload='window.hit=4'></svg>",
    ),
}
SPEED = {"plain": 31.25, "looped": 24.5}


class FakeServer:
    """A server in a thread, on a port of its own. loading: how often /health says 503 first; key: the one it wants."""

    def __init__(
        self,
        folder: Path | None = None,
        key: str = "",
        loading: int = 0,
        layers: int = 30,
        default_loop: str | None = None,
        pace: float = 0.0,
    ) -> None:
        self.folder, self.key, self.loading, self.layers = folder, key, loading, layers
        self.default_loop, self.pace = default_loop, pace
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.left = 0
        self.at_once = self.most_at_once = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        routes = [
            Route("/", self._asset), Route("/page/{name}", self._asset), Route("/health", self._health),
            Route("/props", self._props), Route("/results", self._results),
            Route("/results/{name:path}", self._result),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]  # fmt: skip
        config = uvicorn.Config(Starlette(routes=routes), log_level="error", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self._socket.close()

    def _locked(self, request: Request) -> Response | None:
        self.paths.append(request.url.path)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "This server wants an API key.")
        return None

    async def _asset(self, request: Request) -> Response:
        asset = assets.read_asset(request.path_params.get("name", ""))
        if asset is None:
            return _error(404, "there is no such page.")
        return Response(asset.content, headers=asset.headers)

    async def _health(self, request: Request) -> Response:
        if self.loading > 0:
            self.loading -= 1
            return _error(503, "The model is loading.")
        return JSONResponse({"status": "ok"})

    async def _props(self, request: Request) -> Response:
        props = {
            "model": "tiny-30",
            "n_layer": self.layers,
            "n_ctx": 2048,
            "default_loop": self.default_loop,
            "default_sampling": {"temp": 0.5, "n": -1},
        }
        return self._locked(request) or JSONResponse({**props, "suggested_window": "12:16"})

    async def _results(self, request: Request) -> Response:
        return self._locked(request) or JSONResponse(results.listing(self.folder))

    async def _result(self, request: Request) -> Response:
        locked = self._locked(request)
        if locked:
            return locked
        try:
            assert self.folder is not None
            content, headers = results.read_result(self.folder, request.path_params["name"])
        except UsageError as e:
            return _error(404, e.message)
        return Response(content, headers=headers)

    async def _chat(self, request: Request) -> Response:
        locked = self._locked(request)
        if locked:
            return locked
        body = await request.json()
        self.requests.append(body)
        words = body["messages"][-1]["content"]
        if words == "fail":
            return _error(400, f"window {body['loop'] and body['loop']['window']} is\nout of range.")
        return StreamingResponse(self._stream(body, words), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], words: str) -> AsyncIterator[str]:
        plain, looped = SCRIPTS.get(words, SCRIPTS["sky"])
        text = looped if body["loop"] else plain
        pieces = text.split(" ")
        pieces = [pieces[0], *(f" {piece}" for piece in pieces[1:])]
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if words == "slow":
                for i in range(10_000):
                    yield _event(_delta(f"word{i} "))
                    await asyncio.sleep(0.02)
            for i, piece in enumerate(pieces):
                if words == "break" and i == 3:
                    return
                yield _event(_delta(piece))
                await asyncio.sleep(self.pace)
            speed = SPEED["looped" if body["loop"] else "plain"]
            yield _event({**_delta("", "stop"), "timings": {"predicted_n": len(pieces), "predicted_per_second": speed}})
            loop = None
            if body["loop"]:
                loop = {**body["loop"], "text": "{window} k={k}".format(**body["loop"])}
            usage = {"completion_tokens": len(pieces), "prompt_tokens": 9, "loop": loop}
            yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.at_once -= 1


def _delta(text: str, finish: str | None = None) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}],
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": None}}, status)
