"""The server's endpoints, as a Starlette application.

    app = make_app(service)         # service: the worker, the reader of requests, and what they are configured with

Bodies are checked against the schemas that /openapi.json shows; every error is told in OpenAI's form. A streamed answer
is cancelled when its client goes away, and so is one that is not streamed: somebody listens for that all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.server import schema
from ggufloop.server.assets import read_asset
from ggufloop.server.forms import Form, error, error_of
from ggufloop.server.guard import Guard, too_large
from ggufloop.server.jobs import Done, Event, Failed, Job, Logprob, Piece
from ggufloop.server.limits import Limits
from ggufloop.server.loops import Served, UnknownModel, loop_to_json
from ggufloop.server.metrics import Metrics
from ggufloop.server.openapi import document, own_version
from ggufloop.server.requests import Reader, TooLong
from ggufloop.server.results import listing, read_result
from ggufloop.server.validate import Invalid, check, parse
from ggufloop.server.worker import Worker

INVALID = "invalid_request_error"

_BODY_SECONDS = 60.0
_GONE = 499  # what others write into their logs of a client that went away; nobody reads this answer


@dataclass
class Service:
    """What the endpoints work with. reader: once the model is loaded. results: the folder the page shows."""

    worker: Worker
    served: Served
    limits: Limits
    key: str | None = None
    origins: tuple[str, ...] = ()
    results: Path | None = None
    reader: Reader | None = None
    started: int = field(default_factory=lambda: int(time.time()))


class Refused(Exception):
    """A request that gets an error: its status, its body and further headers."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


def busy(message: str) -> Refused:
    """The one server error there is: try again."""
    return Refused(503, error(message, "server_error", code="busy"), {"Retry-After": "1"})


def make_app(service: Service) -> Any:
    """The application, guarded."""
    return Guard(_Endpoints(service).starlette(), service.key, service.origins, service.limits.body_bytes)


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self.service = service
        self.metrics = Metrics(service.worker)
        self.document = document(service.served)

    def starlette(self) -> Starlette:
        routes = {
            ("POST", "/v1/chat/completions"): self.chat,
            ("POST", "/v1/completions"): self.completion,
            ("GET", "/v1/models"): self.models,
            ("GET", "/v1/models/{name:path}"): self.model,
            ("POST", "/tokenize"): self.tokenize,
            ("POST", "/detokenize"): self.detokenize,
            ("GET", "/health"): self.health,
            ("GET", "/props"): self.props,
            ("GET", "/metrics"): self.measured,
            ("GET", "/openapi.json"): self.openapi,
            ("GET", "/"): self.page,
            ("GET", "/page/{name}"): self.page,
            ("GET", "/results"): self.results,
            ("GET", "/results/{name:path}"): self.result,
        }
        return Starlette(
            routes=[Route(path, self._told(path, to), methods=[method]) for (method, path), to in routes.items()],
            exception_handlers={HTTPException: _http_error, Exception: _bug},
        )

    def _told(
        self, path: str, to: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint whose errors become answers, and which is counted."""

        async def endpoint(request: Request) -> Response:
            try:
                response = await to(request)
            except Refused as e:
                response = JSONResponse(e.body, e.status, e.headers)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Invalid as e:
                response = JSONResponse(error_of(e, INVALID, e.param or None), 400)
            except UnknownModel as e:
                response = JSONResponse(error_of(e, INVALID, "model", "model_not_found"), 404)
            except TooLong as e:
                response = JSONResponse(error_of(e, INVALID, None, "context_length_exceeded"), 400)
            except GgufloopError as e:  # a template that refuses the messages is the request's fault as well
                response = JSONResponse(error_of(e, INVALID), 400)
            self.metrics.request(path, response.status_code)
            return response

        return endpoint

    def _reader(self) -> Reader:
        if self.service.reader is None or self.service.worker.state != "ready":
            raise busy("the model is loading." if self.service.worker.state == "loading" else "the server is stopping.")
        return self.service.reader

    async def _body(self, request: Request, form: dict[str, Any]) -> dict[str, Any]:
        """The checked body of a request. Raises Refused, Invalid."""
        try:
            content = await asyncio.wait_for(request.body(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refused(408, error("the request's body did not come.", INVALID), {"Connection": "close"}) from None
        if request.scope["ggufloop.too_long"]():
            raise Refused(413, too_large(self.service.limits.body_bytes), {"Connection": "close"})

        def read() -> dict[str, Any]:
            body: dict[str, Any] = parse(content)
            check(body, form)
            return body

        checked: dict[str, Any] = await run_in_threadpool(read)  # a large one takes a while
        return checked

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, schema.CHAT, "chat")

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, schema.COMPLETION, "text")

    async def _answer(self, request: Request, form: dict[str, Any], kind: str) -> Response:
        begun = time.monotonic()
        reader = self._reader()
        body = await self._body(request, form)
        read = reader.chat if kind == "chat" else reader.completion
        order = await run_in_threadpool(read, body, request.headers.get("x-ggufloop-loop"))
        client = order.user or (request.client.host if request.client else "")
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(order.ask, client, send)
        if not self.service.worker.submit(job):
            raise busy("the server is full or stopping; send the request again later.")
        rid = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        answer = _Answer(self, Form(order, kind, rid, int(time.time())), job, events, begun)
        unknown = schema.ignored(body, form)
        headers = {"X-Ggufloop-Ignored": _header(unknown)} if unknown else {}
        if order.stream:
            first = await answer.wait_first(request)  # so that what fails at once fails with a status
            return _Events(answer, first, headers)
        return JSONResponse(await answer.whole(request), headers=headers)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self.service.served.names()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        loop = self.service.served.choose({"model": name}, None)
        if loop is not None and self.service.reader is not None:
            self.service.reader.llm.check(loop)
        return JSONResponse(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        loop = self.service.served.choose({"model": name}, None)
        head = {"id": name, "object": "model", "created": self.service.started, "owned_by": "local"}
        return {**head, "loop": loop_to_json(loop)}

    async def tokenize(self, request: Request) -> Response:
        reader = self._reader()
        body = await self._body(request, schema.TOKENIZE)
        special = body.get("parse_special")
        tokens = await run_in_threadpool(
            reader.tokenize, body["content"], bool(body.get("add_special")), special is None or special
        )
        return JSONResponse({"tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        reader = self._reader()
        body = await self._body(request, schema.DETOKENIZE)
        return JSONResponse({"content": await run_in_threadpool(reader.text, [int(t) for t in body["tokens"]])})

    async def health(self, request: Request) -> Response:
        state = self.service.worker.state
        if state == "ready" and self.service.reader is not None:
            return JSONResponse({"status": "ok"})
        told = "the model is loading." if state in ("loading", "ready") else "the server is stopping."
        raise busy(told)

    async def props(self, request: Request) -> Response:
        reader = self._reader()
        served, limits = self.service.served, self.service.limits
        values = asdict(reader.sampling)
        return JSONResponse(
            {
                "model": served.name,
                "model_type": reader.llm.model_type(),
                "n_layer": reader.llm.n_layer(),
                "n_ctx": reader.n_ctx,
                "default_loop": loop_to_json(served.default),
                "suggested_window": None if served.suggested is None else "{}:{}".format(*served.suggested),
                "default_sampling": values,
                "chat_template": reader.template is not None,
                "choices": schema.CHOICES,
                "limits": {
                    "body_bytes": limits.body_bytes,
                    "prompt_tokens": reader.most,
                    "max_tokens": limits.max_tokens,
                    "queue": limits.queue,
                    "parallel": limits.parallel,
                },
                "version": own_version(),
            }
        )

    async def measured(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.document)

    async def page(self, request: Request) -> Response:
        asset = await run_in_threadpool(read_asset, request.path_params.get("name", ""))
        if asset is None:
            raise HTTPException(404, "Not Found")
        return Response(asset.content, headers=asset.headers)

    async def results(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(listing, self.service.results))

    async def result(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            if self.service.results is None:
                raise UsageError(f"there is no result {name[:200]!r}.", "start the server with --results DIR.")
            content, headers = await run_in_threadpool(read_result, self.service.results, name)
        except UsageError as e:
            raise Refused(404, error_of(e, INVALID)) from None
        return Response(content, headers=headers)


class _Answer:
    """One answer on its way to its client."""

    def __init__(self, endpoints: _Endpoints, form: Form, job: Job, events: asyncio.Queue[Event], begun: float) -> None:
        self._endpoints = endpoints
        self._form = form
        self._job = job
        self._events = events
        self._begun = begun
        self._seen = False

    async def _next(self) -> Event:
        event = await self._events.get()
        seconds = time.monotonic() - self._begun
        if not self._seen:
            self._seen = True
            self._endpoints.metrics.first_token(seconds)
        if isinstance(event, Done):
            self._endpoints.metrics.answered(seconds)
        return event

    async def _next_or_gone(self, request: Request) -> Event:
        """The next event; cancels the job and raises Refused if the client goes away first."""
        event = asyncio.ensure_future(self._next())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
            raise Refused(_GONE, error("the client went away.", INVALID))
        finally:
            gone.cancel()
            if not event.done():
                event.cancel()
                self.cancel()

    def cancel(self) -> None:
        """Nobody waits for it any more, or it has ended."""
        self._endpoints.service.worker.cancel(self._job)

    async def wait_first(self, request: Request) -> Event:
        """The first event. Raises Refused if it is a failure."""
        event = await self._next_or_gone(request)
        if isinstance(event, Failed):
            raise _refused(event)
        return event

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer as one object. Raises Refused."""
        parts: list[str] = []
        logprobs: list[Logprob] = []
        while True:
            event = await self._next_or_gone(request)
            if isinstance(event, Failed):
                raise _refused(event)
            if isinstance(event, Piece):
                parts.append(event.text)
                logprobs += event.logprobs
                continue
            return self._form.whole("".join(parts), event, [*logprobs, *event.logprobs])

    async def chunks(self, event: Event) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        first = self._form.first()
        if first is not None:
            yield _sse(first)
        while isinstance(event, Piece):
            yield _sse(self._form.piece(event))
            event = await self._next()
        if isinstance(event, Failed):
            yield _sse(_refused(event).body)
            return
        yield _sse(self._form.last(event))
        if self._form.order.include_usage:
            yield _sse(self._form.usage_chunk(event))
        yield b"data: [DONE]\n\n"


class _Events(StreamingResponse):  # type: ignore[misc]  # mypy does not look at starlette
    """An answer as it comes; cancelled however the sending of it ends."""

    def __init__(self, answer: _Answer, first: Event, headers: dict[str, str]) -> None:
        super().__init__(answer.chunks(first), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def _refused(event: Failed) -> Refused:
    if event.busy:
        return busy(f"{event.error.message} {event.error.hint}")
    if isinstance(event.error, UsageError):
        return Refused(400, error_of(event.error, INVALID))
    return Refused(503, error_of(event.error, "server_error", code="engine"), {"Retry-After": "1"})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _header(names: list[str]) -> str:
    """Field names as a header's value, which cannot hold every character."""
    safe = ["".join(c if 32 < ord(c) < 127 and c != "," else "?" for c in name[:40]) for name in names[:20]]
    return ", ".join(safe)


async def _bug(request: Request, e: Exception) -> Response:
    """A bug of ours; what it was is on the server's own stderr, where uvicorn tells of it."""
    return JSONResponse(error("the server failed; its log says how.", "server_error"), 500)


async def _http_error(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    told = f"{request.method} {request.url.path[:200]}: {str(e.detail).lower()}."
    return JSONResponse(error(told, INVALID), e.status_code, e.headers)
