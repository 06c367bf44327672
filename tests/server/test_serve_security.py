"""Who is answered, and what hostile requests come to: a 4xx, and the server lives. A tiny model, `ggufloop serve`."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.serving import SMALL, Server, served

from ggufloop.errors import UsageError
from ggufloop.server.serve import check_address, check_origin, is_local

Serve = Callable[..., Server]

KEY = "a-key-of-tests"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def server(serve: Serve, model: Path) -> Server:
    return serve(model, *SMALL, "-np", "2", "--window", "2:5", "--K", "3")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "[::1]"])
def test_a_local_address_needs_no_key(host: str) -> None:
    assert is_local(host)
    check_address(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "localhost.evil.example", ""])
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="can be reached from other machines"):
        check_address(host, None)
    check_address(host, KEY)
    with pytest.raises(UsageError, match="fewer than 8 characters"):
        check_address(host, "short")


def test_origins_are_what_a_browser_calls_them() -> None:
    for right in ("*", "https://a.example", "http://localhost:3000"):
        check_origin(right)
    for wrong in ("a.example", "https://a.example/", "https://a.example,https://b.example", "null", "file://", ""):
        with pytest.raises(UsageError, match="is no origin"):
            check_origin(wrong)


def test_without_the_key_nothing_but_the_page_and_health(serve: Serve, model: Path) -> None:
    server = serve(model, *SMALL, key=KEY)
    assert len(server.tokens([1, 2, 3], 2)) == 2
    for path in ("/props", "/slots", "/metrics", "/results.json", "/tokenize", "/nothing"):
        for wrong in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
            reply = server.get(path, **wrong)
            assert (path, reply.status) == (path, 401)
    for path in ("/completion", "/v1/chat/completions", "/v1/messages", "/v1/embeddings"):
        assert server.post(path, {"prompt": "Hi"}, {"Authorization": "Bearer wrong"}).status == 401
    for path in ("/health", "/", "/main.js", "/style.css"):
        assert (path, server.get(path, Authorization="").status) == (path, 200)
    assert server.get("/props", Authorization="", **{"X-Api-Key": KEY}).status == 200
    assert server.get("/props", Host="my.server").status == 200, "who has the key may call it as he likes"


def test_other_pages_and_other_names_are_not_answered(server: Server) -> None:
    here = server.url
    for origin in (here, "http://localhost:3000"):
        reply = server.get("/v1/models", Origin=origin)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, origin)
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example:80"):
        for reply in (
            server.get("/v1/models", Origin=origin),
            server.post("/completion", {"prompt": "Hi", "n_predict": 1}, {"Origin": origin}),
            server.ask("OPTIONS", "/completion", headers={"Origin": origin}),
        ):
            assert (origin, reply.status) == (origin, 403)
            assert "access-control-allow-origin" not in reply.headers
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example"):
        assert server.get("/v1/models", Host=host).status == 403
    for host in ("localhost", "127.0.0.1:1", "[::1]:8080"):
        assert server.get("/v1/models", Host=host).status == 200


def test_a_page_that_is_allowed_is_answered(serve: Serve, model: Path) -> None:
    server = serve(model, *SMALL, "--cors", "https://a.example")
    reply = server.get("/v1/models", Origin="https://a.example")
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    reply = server.ask("OPTIONS", "/v1/chat/completions", headers=asked)
    assert reply.status in (200, 204)
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert server.get("/v1/models", Origin="https://b.example").status == 403


def test_nothing_outside_the_site_is_sent(server: Server) -> None:
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/results/..%2f..%2fetc/passwd", "//etc/passwd"):
        reply = server.get(path)
        assert reply.status in (400, 403, 404)
        assert b"root:" not in reply.body


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{", b'"x"', b"{}" * 1000, b"[" * 100_000, b'{"messages": ' + b"[" * 5000,
        b'{"messages": null}', b'{"messages": [1]}', b'{"messages": [{"role": 1}]}',
        b'{"messages": [{"role": "user", "content": {"a": 1}}]}', b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": "many"}',
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "grammar": "root ::= nothing"}',
        b'{"messages": [{"role": "user", "content": "a"}], "loop": {"window": [2, 5], "k": [[[1]]]}}',
    ],
)  # fmt: skip
def test_what_is_no_request_is_answered_so(body: bytes, server: Server) -> None:
    reply = server.post("/v1/chat/completions", body)
    assert 400 <= reply.status < 600
    assert reply.json["error"]["message"]
    assert server.get("/health").status == 200


def test_prompts_that_are_too_long_one_after_another(model: Path) -> None:
    with served(model, *SMALL, "-np", "2", "--window", "2:5", "--K", "3") as server:
        for n in (600, 3000, 20_000, 100, 5000):
            for loop in ("2:5 k=3", None, "2:5 k=2 kv=frozen"):
                reply = server.post("/completion", {"prompt": [7] * n, "n_predict": 2, "loop": loop})
                assert reply.status == (200 if n < 500 else 400)
                if n > 500:
                    assert "exceeds the available context size (512 tokens)" in reply.error


def test_clients_that_leave(server: Server) -> None:
    body = json.dumps({"prompt": [7] * 300, "n_predict": 200, "stream": True, "ignore_eos": True}).encode()
    head = b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    for cut in (len(body), 10, len(body), 0, len(body)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            raw.sendall(head + b"%d\r\n\r\n" % len(body) + body[:cut])
            time.sleep(0.05)
    for garbage in (
        b"\x16\x03\x01\x00\xa5\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 5000,
        b"POST /completion HTTP/1.1\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            raw.sendall(garbage)
    assert server.get("/health").status == 200
    assert len(server.tokens([1, 2, 3], 3)) == 3


def test_megabytes_by_clients_that_leave_and_an_end_in_the_middle(model: Path) -> None:
    with served(model, *SMALL) as server:
        body = json.dumps({"content": "word " * 400_000}).encode()

        def send(wait: bool) -> None:
            with server.connection(60) as connection:
                connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
                if wait:
                    assert connection.getresponse().status == 200

        for _ in range(3):
            send(False)
        send(True)
        assert server.get("/health").status == 200

        def send_to_an_ending_server() -> None:
            with contextlib.suppress(OSError):  # where the end comes before the last byte, the socket is reset
                send(False)

        threads = [threading.Thread(target=send_to_an_ending_server) for _ in range(3)]
        for thread in threads:
            thread.start()
        started = time.monotonic()
        server.process.terminate()
        assert server.process.wait(10) == 143
        assert time.monotonic() - started < 6
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-45, "grammar": 'root ::= "yes" | "no"'},
        {"temperature": 1e-45, "json_schema": {"type": "integer", "minimum": 3, "maximum": 9}},
        {"logit_bias": [[token, 100.0] for token in range(260)]},
        {"logit_bias": [[token, False] for token in range(250)]},
        {"loop": "2:5 k=3 decode=first:4", "n_predict": 4},
        {"loop": "2:5 k=3 decode=first:1", "n_predict": 1},
        {"loop": "2:5 k=64"},
        {"n_predict": 0},
        {"prompt": ""},
        {"prompt": [[1, 2], [3, 4]]},
        {"n_probs": 260},
        {"seed": -1, "temperature": 1e30, "top_k": -5, "top_p": -1},
        {"stop": [""] * 1000},
        {"loop": "2:5 k=3", "cache_prompt": False, "n_keep": -1},
    ],
)
def test_what_a_request_may_ask_at_its_edges(fields: dict[str, Any], server: Server) -> None:
    reply = server.post("/completion", {"prompt": [1, 2, 3], "n_predict": 6, **fields})
    assert reply.status in (200, 400)
    assert server.get("/health").status == 200


def test_a_loop_that_no_memory_holds_is_refused(server: Server, model: Path) -> None:
    reply = server.post("/completion", {"prompt": [1], "loop": "1:6 k=64 kv=each"})
    assert reply.status == 400
    assert "start it with --loop '1:6 k=64 kv=each'" in reply.error
    refused = Server([*served_words(model), "-c", "400000000", "--window", "1:6", "--K", "64", "--kv", "each"])
    try:
        assert refused.process.wait(60) in (1, 2)
        refused._reader.join(5)
        assert refused.said[-2].startswith("error: ")
        assert "GiB" in refused.said[-2] or "memory" in refused.said[-2]
    finally:
        refused.close()


def served_words(model: Path) -> list[str]:
    from support.serving import CLI

    return [*CLI, "serve", str(model), "--port", "0", "-t", "1"]
