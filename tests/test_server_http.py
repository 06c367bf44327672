"""What a server says to requests of every kind: right ones, wrong ones, hostile ones. A tiny model, real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import SMALL, Server

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling
from ggufloop.sequences import Draw, Sampler
from ggufloop.server import app
from ggufloop.server.guard import is_local
from ggufloop.server.loops import Served, loop_from_json, parse_suffix, suffix
from ggufloop.server.run import check_address, listen

TinyModel = Callable[[str], Path]
KEY = "correct-horse"


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    limits = {"body_bytes": 100_000, "max_tokens": 20}
    with Server(model, limits=limits, suggested=(2, 5), sampling=Sampling(temp=0.0, n=4)) as server:
        yield server


def test_what_is_served(server: Server) -> None:
    assert server.get("/health").json == {"status": "ok"}
    models = server.get("/v1/models").json
    assert [m["id"] for m in models["data"]] == ["tiny", "tiny@2:5x3", "tiny@2:5x3,kv=frozen", "tiny@off"]
    assert models["data"][1]["loop"]["text"] == "2:5 k=3"
    assert server.get("/v1/models/tiny@2:4x6,kv=each").json["loop"]["text"] == "2:4 k=6 kv=each"
    props = server.get("/props").json
    assert (props["model"], props["n_layer"], props["n_ctx"]) == ("tiny", 7, 512)
    assert (props["default_loop"], props["suggested_window"]) == (None, "2:5")
    assert props["limits"] == {
        "body_bytes": 100_000, "prompt_tokens": 511, "max_tokens": 20, "queue": 256, "parallel": 2,
    }  # fmt: skip
    assert props["choices"]["kv"] == ["first", "last", "each", "frozen"]
    assert props["default_sampling"]["temp"] == 0.0


def test_texts_become_tokens_and_tokens_texts(server: Server) -> None:
    tokens = server.post("/tokenize", {"content": "the caf\u00e9 <|im_end|>"}).json["tokens"]
    assert tokens[-1] == 259
    assert server.post("/detokenize", {"tokens": tokens}).json == {"content": "the caf\u00e9 <|im_end|>"}
    assert len(server.post("/tokenize", {"content": "<|im_end|>", "parse_special": False}).json["tokens"]) > 1
    assert server.post("/tokenize", {"content": ""}).json == {"tokens": []}
    assert server.post("/detokenize", {"tokens": []}).json == {"content": ""}


def test_metrics_count_what_happened(server: Server) -> None:
    def read() -> dict[str, float]:
        lines = server.get("/metrics").body.decode().splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    before = read()
    server.complete("Hello", max_tokens=3, logit_bias={"65": 100})
    server.complete("", max_tokens=3)
    after = read()
    requests = 'ggufloop_requests_total{endpoint="/v1/completions",status="%d"}'
    assert after[requests % 200] == before.get(requests % 200, 0) + 1
    assert after["ggufloop_generated_tokens_total"] == before["ggufloop_generated_tokens_total"] + 3
    assert after["ggufloop_prompt_tokens_total"] > before["ggufloop_prompt_tokens_total"]
    assert after['ggufloop_answers_total{finish="length"}'] >= 1
    assert (after["ggufloop_running"], after["ggufloop_waiting"]) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "headers", "ran"),
    [
        ({}, {}, None),
        ({"loop": {"window": "2:4", "k": 2, "kv": "each"}}, {}, "2:4 k=2 kv=each"),
        ({"loop": {"window": "auto"}}, {}, "2:5 k=3"),
        ({"loop": {"window": "2:4", "kv": None, "k": 2}}, {}, "2:4 k=2"),
        ({"loop": "2:4 k=2 decode=bypass"}, {}, "2:4 k=2 decode=bypass"),
        ({"loop": "auto kv=frozen"}, {}, "2:5 k=3 kv=frozen"),
        ({}, {"X-Ggufloop-Loop": "2:4 k=2"}, "2:4 k=2"),
        ({"model": "tiny@2:4x2,kv=last"}, {}, "2:4 k=2 kv=last"),
        ({"model": "tiny@2:4"}, {}, "2:4 k=3"),
        ({"loop": None, "model": "tiny@2:4x2"}, {"X-Ggufloop-Loop": "2:4 k=3"}, None),
        ({"loop": "off"}, {"X-Ggufloop-Loop": "2:4 k=3"}, None),
        ({"loop": "2:4 k=4"}, {"X-Ggufloop-Loop": "2:4 k=3"}, "2:4 k=4"),
        ({"model": "tiny@2:4x2"}, {"X-Ggufloop-Loop": "off"}, None),
        ({"model": "tiny@off"}, {}, None),
    ],
)
def test_where_a_loop_is_said(fields: dict[str, Any], headers: dict[str, str], ran: str | None, server: Server) -> None:
    reply = server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 1, **fields}, headers)
    loop = reply.json["usage"]["loop"]
    assert (loop and loop["text"]) == ran
    assert reply.json["model"] == fields.get("model", "tiny")


@pytest.mark.parametrize("text", ["2:5 k=3", "2:5 k=6 kv=each beta=0.5", "2:5 k=2 decode=first:3 solver=naive"])
def test_loops_are_written_behind_names_and_read_back(text: str) -> None:
    loop = LoopSpec.parse(text)
    assert parse_suffix(suffix(loop)[1:]) == loop
    assert Served("m", loop, None).names() == ["m", "m" + suffix(loop), "m@off"]
    assert loop_from_json(text, None) == loop


def test_auto_needs_a_suggestion() -> None:
    with pytest.raises(UsageError, match="window 'auto' means nothing for this model"):
        loop_from_json("auto", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loop": 3}, "loop is not of a form that is allowed here."),
        ({"loop": {"k": 3}}, "loop.window is missing."),
        ({"loop": {"window": "2:5", "kay": 3}}, "loop.kay is not a field that is known here."),
        ({"loop": {"window": "2:5", "k": 0}}, "loop.k is not in the range 1 to 64."),
        ({"loop": {"window": "2:5", "kv": "all"}}, 'loop.kv is not one of "first", "last", "each", "frozen", null.'),
        ({"loop": {"window": "2:5", "decode": "some"}}, "decode 'some' is not known."),
        ({"loop": {"window": "2-5"}}, "window 2-5 is not of the form first:end."),
        ({"loop": {"window": "2:7"}}, "window 2:7 touches layer 6, the last one, which cannot be looped."),
        ({"loop": {"window": "2:70"}}, "window 2:70 is out of range: this model has 7 layers."),
        ({"loop": {"window": "0:2"}}, "window 0:2 touches layer 0, which cannot be looped."),
        ({"loop": "k=3"}, "loop 'k=3' does not start with a window."),
        ({"loop": ""}, "loop '' does not start with a window."),
        ({"model": "tiny@2:5xmany"}, "k 'many' is not a whole number."),
        ({"temperature": "hot"}, "temperature is not a number."),
        ({"temperature": -1}, "temperature is not in the range 0 to 100."),
        ({"top_p": 2}, "top_p is not in the range 0 to 1."),
        ({"max_tokens": 0}, "max_tokens is not in the range 1 to 2147483647."),
        ({"max_tokens": 1.5}, "max_tokens is not an integer."),
        ({"n": 2}, "n is not in the range 1 to 1."),
        ({"seed": 2**40}, "seed is not in the range -1 to 4294967294."),
        ({"stop": ["x"] * 17}, "stop has 17 entries; 0 to 16 are allowed."),
        ({"stop": [""]}, "stop[0] has 0 characters; 1 to 500 are allowed."),
        ({"stream": "yes"}, "stream is not a boolean."),
        ({"logit_bias": {"a": 1}}, "logit_bias has the key 'a', which is no token id."),
        ({"logit_bias": {"999": 1}}, "tokens holds 999, which is not in the vocabulary of 260."),
        ({"logit_bias": {"1": 1e9}}, "logit_bias.1 is not in the range -100 to 100."),
        ({"response_format": {"type": "xml"}}, "response_format.type is not one of"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing."),
        ({"prompt": ""}, "prompt has no tokens."),
        ({"prompt": []}, "prompt is not of a form that is allowed here."),
        ({"prompt": ["a", "b"]}, "prompt is not of a form that is allowed here."),
        ({"prompt": [1, 9999]}, "tokens holds 9999, which is not in the vocabulary of 260."),
        ({"prompt": {"a": 1}}, "prompt is not of a form that is allowed here."),
        ({"prompt": None}, "prompt is not of a form that is allowed here."),
        ({"prompt": "a" * 600}, "the prompt has 600 tokens, and 511 are the most here."),
        ({"echo": True, "logprobs": 1}, "echo cannot be combined with logprobs"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_rule(fields: dict[str, Any], message: str, server: Server) -> None:
    reply = server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 1, **fields})
    assert reply.status == 400
    assert reply.error.startswith(message)
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages has 0 entries; 1 to 10000 are allowed."),
        ({"messages": "Hi"}, "messages is not an array."),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing."),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing."),
        ({"messages": [{"role": "god", "content": "x"}]}, "messages[0].role is not one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"tool_choice": "required"}, "tool_choice 'required' needs exactly one tool"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice names 'f', which is not among"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name is missing."),
    ],
)
def test_a_wrong_message_is_refused_with_its_rule(fields: dict[str, Any], message: str, server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}
    reply = server.post("/v1/chat/completions", body)
    assert (reply.status, reply.error[: len(message)]) == (400, message)


def test_an_unknown_model_is_not_found(server: Server) -> None:
    reply = server.complete("Hi", model="gpt-5")
    assert (reply.status, reply.json["error"]["code"], reply.json["error"]["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert server.get("/v1/models/other").status == 404


def test_fields_that_mean_nothing_here_are_named(server: Server) -> None:
    reply = server.complete("Hi", max_tokens=1, store=True, **{"best, of\n\u00e9": 2})
    assert (reply.status, reply.headers["x-ggufloop-ignored"]) == (200, "best??of???, store".replace("???", "??"))
    assert "x-ggufloop-ignored" not in server.complete("Hi", max_tokens=1).headers


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe{}", b'{"prompt": "\xc3("}', b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}', b'{"prompt": "x", "seed": 1e999}', b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b"[" * 50_000, b'{"a":' * 20_000,
        b'{"prompt": "x", "\\ud800": 1}', b"\x00" * 100, b'{"prompt": "x"} trailing',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_what_is_no_request_is_refused(path: str, body: bytes, server: Server) -> None:
    reply = server.post(path, body)
    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_huge_bodies_are_refused_announced_or_not(server: Server) -> None:
    big = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    assert server.post("/v1/completions", big).status == 413
    reply = server.ask("POST", "/v1/completions", iter([big[:150_000], big[150_000:]]))  # type: ignore[arg-type]
    assert reply.status == 413
    assert reply.error == "the request's body is larger than 100000 bytes."
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as raw:
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n")
        assert raw.recv(1000).split()[1] in (b"400", b"413")


def test_other_paths_and_methods(server: Server) -> None:
    assert server.get("/nowhere").json["error"]["message"] == "GET /nowhere: not found."
    reply = server.ask("DELETE", "/v1/models")
    assert (reply.status, reply.error) == (405, "DELETE /v1/models: method not allowed.")
    assert server.get("/page/..%2f..%2fapp.py").status == 404
    assert server.get("/results/..%2f..%2fetc%2fpasswd").status == 404


def test_every_answer_has_the_headers_of_a_careful_server(server: Server) -> None:
    for reply in (server.get("/health"), server.get("/nowhere"), server.complete("Hi", max_tokens=1)):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "server" not in reply.headers
        assert "access-control-allow-origin" not in reply.headers


def test_limits_hold_whatever_a_request_says(server: Server) -> None:
    bias = {str(token): -100 for token in (257, 258, 259)}
    reply = server.complete("Hi", max_tokens=10_000, logit_bias=bias)
    assert reply.json["usage"]["completion_tokens"] == 20
    assert reply.json["choices"][0]["finish_reason"] == "length"
    assert server.complete("Hi", logit_bias=bias).json["usage"]["completion_tokens"] == 4, "the server's own -n"


def test_a_schema_binds(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    assert server.complete("Hi", max_tokens=10, response_format=form).text.strip() in ('"yes"', '"no"')


def nested(depth: int) -> dict[str, Any]:
    return {"type": "string"} if depth == 0 else {"type": "array", "items": nested(depth - 1)}


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": []},
        {"type": "no"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"$ref": "#/nowhere"},
        {"$ref": "file:///etc/passwd"},
        {"enum": ["x" * 70_000]},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "maxLength": 1e30},
        {"type": "array", "items": {"type": "string", "minLength": 100}, "minItems": 100},
        {"type": "string", "pattern": "^((a?){40}){40}$"},
        {"type": "string", "pattern": "^a{99999999999999999999}$"},
        {"type": "string", "pattern": "(" * 400},
        {"type": "string", "pattern": "a" * 501},
        {"type": "string", "pattern": 3},
        nested(300),
        {"properties": {"a": []}},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_schema_that_is_no_grammar_or_too_much_is_refused_at_once(schema: dict[str, Any], server: Server) -> None:
    started = time.monotonic()
    reply = server.complete("Hi", max_tokens=3, response_format={"type": "json_object", "schema": schema})
    assert reply.status == 400
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "pattern", ["^(a?){100}$", "^((((((a?)?)?)?)?)?)*$", "^(a*)*(a*)*(a*)*b$", "^(a|a)*$", "^[^x]{90}$"]
)
def test_a_schema_within_the_bounds_takes_no_time(pattern: str, server: Server) -> None:
    started = time.monotonic()
    form = {"type": "json_object", "schema": {"type": "string", "pattern": pattern}}
    assert server.complete("Hi", max_tokens=20, response_format=form, logit_bias={"97": 50}).status == 200
    assert time.monotonic() - started < 5


def test_a_grammar_that_allows_nothing_more_ends_the_text(model: Path) -> None:
    """llama.cpp would end the process."""
    llm = LoopedLlama(model, n_ctx=256, n_batch=64, n_ubatch=64, **SMALL)
    sampler = Sampler(llm, Draw(Sampling(seed=1), grammar='root ::= "AB"'))
    row = np.zeros(llm.n_vocab(), dtype=np.float32)
    a, b = (llm.tokenize(text, add_bos=False)[0] for text in (b"A", b"B"))
    assert sampler.pick(row) == a
    row[b] = -np.inf
    assert sampler.pick(row) is None
    sampler.close()
    with pytest.raises(UsageError, match="too large or malformed"):
        Sampler(llm, Draw(Sampling(seed=1), grammar="root ::= ("))
    llm.close()


def test_a_tool_is_called(server: Server) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    body = {
        "messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "tool_choice": "required", "max_tokens": 20,
    }  # fmt: skip
    message = server.post("/v1/chat/completions", body).json["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"]["name"] == "weather"
    events = server.post("/v1/chat/completions", {**body, "stream": True}).events
    deltas = [e["choices"][0]["delta"] for e in events]
    arguments = "".join(d["tool_calls"][0]["function"]["arguments"] for d in deltas if "tool_calls" in d)
    assert arguments == message["tool_calls"][0]["function"]["arguments"]
    assert deltas[0]["tool_calls"][0]["id"].startswith("call_")
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": message["tool_calls"]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
    ]
    assert server.post("/v1/chat/completions", {"messages": history, "max_tokens": 1}).status == 200


def test_without_the_key_nothing_but_the_page_and_health(model: Path) -> None:
    with Server(model, key=KEY) as server:
        assert server.complete("Hi", max_tokens=1).status == 200
        server.key = None
        for path in ("/v1/models", "/props", "/metrics", "/openapi.json", "/results"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer"}):
                reply = server.ask("GET", path, headers=headers)
                assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
        assert server.complete("Hi").status == 401
        assert server.get("/health").status == 200
        assert server.get("/v1/models", **{"X-Api-Key": KEY}).status == 200
        assert server.get("/v1/models", Authorization=f"bearer {KEY}").status == 200
        assert server.get("/v1/models", Host="my.server", Authorization=f"bearer {KEY}").status == 200


def test_other_pages_are_not_answered_unless_allowed(server: Server, model: Path) -> None:
    here = server.url
    assert server.get("/v1/models", Origin=here).status == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        reply = server.get("/v1/models", Origin=origin)
        assert (reply.status, reply.json["error"]["code"]) == (403, "cross_origin")
    assert server.get("/v1/models", Host="evil.example").json["error"]["code"] == "foreign_host"
    assert server.ask("OPTIONS", "/v1/models", headers={"Origin": "https://a.example"}).status == 403
    with Server(model, origins=("https://a.example",)) as server:
        reply = server.get("/v1/models", Origin="https://a.example")
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")
        assert server.get("/v1/models", Origin="https://b.example").status == 403
        reply = server.ask("OPTIONS", "/v1/completions", headers={"Origin": "https://a.example"})
        assert reply.status == 204
        assert "x-ggufloop-loop" in reply.headers["access-control-allow-headers"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "[::1]"])
def test_a_local_address_needs_no_key(host: str) -> None:
    assert is_local(host)
    check_address(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "localhost.evil.example"])
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="can be reached from other machines"):
        check_address(host, None)
    check_address(host, KEY)
    with pytest.raises(UsageError, match="fewer than 8 characters"):
        check_address(host, "short")


def test_an_address_that_is_taken_is_known_at_once(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(GgufloopError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
        listen("127.0.0.1", port)
    with pytest.raises(GgufloopError, match="is no address of this machine"):
        listen("no.such.host.invalid", 0)


def test_health_tells_of_a_model_that_is_loading_or_cannot_be_loaded(model: Path) -> None:
    go_on = threading.Event()

    def slowly() -> LoopedLlama:
        go_on.wait(30)
        return LoopedLlama(model, n_ctx=256, n_batch=64, n_ubatch=64, **SMALL)

    with Server(model, open_model=slowly, wait=False) as server:
        deadline = time.monotonic() + 10
        reply = None
        while reply is None and time.monotonic() < deadline:
            try:
                reply = server.get("/health")
            except OSError:
                time.sleep(0.02)
        assert reply is not None
        assert (reply.status, reply.error) == (503, "the model is loading.")
        assert server.complete("Hi").status == 503
        assert server.get("/props").headers["retry-after"] == "1"
        go_on.set()
        while server.get("/health").status == 503:
            time.sleep(0.02)
        assert server.complete("Hi", max_tokens=1).status == 200

    def never() -> LoopedLlama:
        raise GgufloopError("no such model.", "name another.")

    with Server(model, open_model=never) as server:
        server._thread.join(10)
        assert isinstance(server.error, GgufloopError)


def test_garbage_on_the_socket_harms_nobody(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    for garbage in (
        b"\x16\x03\x01\x00\xa5\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 5000,
        b"POST /v1/completions HTTP/1.1\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(garbage)
    assert server.get("/health").status == 200


def test_requests_that_end_in_the_middle_are_nobodys_fault(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    port = int(server.url.rsplit(":", 1)[1])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(head)
            time.sleep(0.02)
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(head)
        assert raw.recv(1000).split()[1] == b"408"
    assert server.get("/health").status == 200
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


def test_the_document_is_of_this_api(server: Server) -> None:
    document = server.get("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    fields = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "loop" in fields["properties"]
    assert json.dumps(document).isascii()
