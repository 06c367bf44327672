"""What stands before every request: the key, the size of the body, CORS, and headers of every answer. Pure ASGI.

    app = Guard(app, key=None, origins=(), body_bytes=4 * 2**20)

A request with too long a body is refused before it is read; one that says nothing of its length is read up to the
limit. The key is compared in constant time. Without --cors no other page's scripts may read an answer, and requests
that a browser sends for another page are refused, so that a page cannot use the server of whoever looks at it. Nor
can one whose name suddenly leads to this machine: without a key only a local name of the server is answered.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from ggufloop.server import forms

_OPEN_PATHS = ("/health", "/")  # and /page/*: the page asks for the key, and a load balancer has none
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
_EXPOSED = b"x-ggufloop-ignored, retry-after"


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: Any, key: str | None, origins: tuple[str, ...], body_bytes: int) -> None:
        self._app = app
        self._key = None if key is None else key.encode()
        self._origins = origins
        self._body_bytes = body_bytes
        self._local = key is None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        cors = self._cors(headers)

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                more = [(name, value) for name, value in {**_HEADERS, **cors}.items() if name not in there]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        refusal = self._refusal(scope, headers, cors)
        if refusal is not None:
            await _answer(sending, *refusal)
            return
        read = 0
        too_long = False

        async def receiving() -> Any:
            nonlocal read, too_long
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._body_bytes:
                    too_long = True
                    return {"type": "http.request", "body": b"", "more_body": False}
            return message

        scope = {**scope, "ggufloop.too_long": lambda: too_long}
        await self._app(scope, receiving, sending)

    def _cors(self, headers: dict[bytes, bytes]) -> dict[bytes, bytes]:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or not ("*" in self._origins or origin in self._origins):
            return {}
        return {
            b"access-control-allow-origin": origin.encode("latin-1"),
            b"access-control-expose-headers": _EXPOSED,
            b"vary": b"origin",
        }

    def _refusal(
        self, scope: Any, headers: dict[bytes, bytes], cors: dict[bytes, bytes]
    ) -> tuple[int, dict[str, Any] | None, dict[bytes, bytes]] | None:
        """Status, body and headers of the answer to a request that goes no further."""
        if scope["method"] == "OPTIONS":
            if not cors:
                return 403, forms.error("this server answers no other pages.", "invalid_request_error"), {}
            allowed = {
                b"access-control-allow-methods": b"GET, POST",
                b"access-control-allow-headers": b"authorization, content-type, x-api-key, x-ggufloop-loop",
                b"access-control-max-age": b"600",
            }
            return 204, None, allowed
        if not cors and _is_foreign(headers):
            told = "this server answers no other pages; start it with --cors for one it should."
            return 403, forms.error(told, "invalid_request_error", code="cross_origin"), {}
        if self._local and not is_local(_host_name(headers)):
            told = "without an API key this server answers to a local name only, such as 127.0.0.1 or localhost."
            return 403, forms.error(told, "invalid_request_error", code="foreign_host"), {}
        open_ = scope["path"] in _OPEN_PATHS or scope["path"].startswith("/page/")
        if not open_ and not self._has_key(headers):
            wrong = forms.error("the API key is missing or wrong.", "invalid_request_error", code="invalid_api_key")
            return 401, wrong, {b"www-authenticate": b"Bearer"}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._body_bytes:
            return 413, too_large(self._body_bytes), {b"connection": b"close"}
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._key is None:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given.strip(), self._key)


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine's own, out of reach for others."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _host_name(headers: dict[bytes, bytes]) -> str:
    try:
        return urlsplit("//" + headers.get(b"host", b"localhost").decode("latin-1")).hostname or "localhost"
    except ValueError:
        return ""


def too_large(limit: int) -> dict[str, Any]:
    """The error of a body over the limit."""
    return forms.error(f"the request's body is larger than {limit} bytes.", "invalid_request_error")


def _is_foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser sends this for a page that did not come from here."""
    origin = headers.get(b"origin")
    if origin is None:
        return headers.get(b"sec-fetch-site") == b"cross-site" and headers.get(b"sec-fetch-mode") != b"navigate"
    try:
        return urlsplit(origin.decode("latin-1")).netloc != headers.get(b"host", b"").decode("latin-1")
    except ValueError:
        return True


async def _answer(send: Any, status: int, body: dict[str, Any] | None, headers: dict[bytes, bytes]) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    more = [(b"content-type", b"application/json")] if body is not None else []
    length = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers.items(), *more, *length]})
    await send({"type": "http.response.body", "body": content})
