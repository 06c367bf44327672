"""A loop per request: the server's tokens are those of a model of its own, whatever else it was asked before.

Tiny random models and SmolLM2 through `ggufloop serve`; and the same requests to the stock llama-server, where nothing
loops.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.serving import CLI, SMALL, Reply, Server, alone, served, started

from ggufloop.backend import library
from ggufloop.errors import BackendError

TinyModel = Callable[[str], Path]
Serve = Callable[..., Server]

PROMPT = [(7 * i * i + 3 * i) % 256 for i in range(60)]
LOOPS = [
    f"2:5 k=3 kv={kv} decode={decode}" for kv in ("first", "last", "frozen") for decode in ("full", "bypass", "first:5")
]
OTHERS = [
    "2:5 k=2 mode=layer", "3:5 k=4 solver=naive", "2:4 k=2 solver=rk4 kv=frozen", "2:5 k=6 passes=3",
    "2:5 k=3 beta=0.5", "2:5 k=3 halt=0.2", "2:5 k=3 attention=16 sinks=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


@pytest.fixture
def one(serve: Serve, model: Path) -> Server:
    """A server that gives one answer at a time, looped where a request says nothing."""
    return serve(model, *SMALL, "-np", "1", "--window", "2:5", "--K", "3")


@pytest.mark.parametrize("loop", [None, *LOOPS, *OTHERS])
def test_a_loop_of_a_request_gives_what_a_model_of_its_own_gives(loop: str | None, one: Server, model: Path) -> None:
    expected = alone(model, PROMPT, 12, loop)
    assert one.tokens(PROMPT, 12, loop=loop) == expected
    assert one.tokens(PROMPT, 12, loop=loop) == expected, "with what the first one left"


EACH = ("--window", "2:5", "--K", "3", "--kv", "each")


def test_the_loop_of_a_server_with_slots_for_each(serve: Serve, model: Path) -> None:
    server = serve(model, *SMALL, "-np", "1", *EACH)
    for loop in ("2:5 k=3 kv=each", None, "2:5 k=3 kv=each"):
        assert server.tokens(PROMPT, 12, loop=loop) == alone(model, PROMPT, 12, loop)
    reply = server.post("/completion", {"prompt": PROMPT, "loop": "2:5 k=4 kv=each"})
    assert reply.status == 400
    assert reply.error.startswith("the K/V slots of this server are those of the loop 2:5 k=3 kv=each; ")


@pytest.mark.parametrize("parallel", [1, 2])
def test_loops_of_one_server_with_slots_for_each_do_not_meet(parallel: int, model: Path) -> None:
    """Another plan for the same slots leaves in them what they hold, of this sequence and of others."""
    loops = ["2:5 k=3 kv=each", "2:5 k=3 kv=each decode=bypass", None, "2:5 k=3 kv=each solver=naive"]
    expected = {loop: alone(model, PROMPT, 12, loop) for loop in loops}
    with served(model, *SMALL, "-np", str(parallel), *EACH) as server:
        for i, loop in enumerate([*loops, *loops, *reversed(loops)]):
            assert server.tokens(PROMPT, 12, loop=loop, id_slot=i % parallel) == expected[loop], (i, loop)


def test_a_hybrid_loops_as_it_does_alone(serve: Serve, tiny_model: TinyModel) -> None:
    hybrid = tiny_model("qwen35")
    server = serve(hybrid, *SMALL, "-np", "1")
    for loop in ("2:5 k=3", None, "2:5 k=2"):
        assert server.tokens(PROMPT, 8, loop=loop) == alone(hybrid, PROMPT, 8, loop)


def test_every_way_to_say_a_loop(one: Server, model: Path) -> None:
    looped, wild, plain = (alone(model, PROMPT, 8, loop) for loop in ("2:5 k=3", "2:5 k=4 solver=naive", None))
    assert len({tuple(tokens) for tokens in (looped, wild, plain)}) == 3
    assert one.tokens(PROMPT, 8) == looped
    for said in ({"loop": None}, {"loop": "off"}, {"model": "llama@off"}, {"loop": None, "model": "llama@2:5x3"}):
        assert one.tokens(PROMPT, 8, **said) == plain
    for said in (
        {"loop": "2:5 k=4 solver=naive"},
        {"loop": "  solver=naive   2:5 k=4 "},
        {"loop": {"window": "2:5", "k": 4, "solver": "naive"}},
        {"loop": {"window": [2, 5], "k": 4, "solver": "naive", "beta": None}},
        {"model": "llama@2:5x4,solver=naive"},
    ):
        if said.get("loop") != "  solver=naive   2:5 k=4 ":
            assert one.tokens(PROMPT, 8, **said) == wild


def test_what_ran_is_told(one: Server) -> None:
    for loop, told in (({"window": "2:5", "k": 2}, "2:5 k=2"), (None, None), ("3:5  k=3", "3:5 k=3")):
        body = {"max_tokens": 3, "loop": loop}
        usage = one.chat("Hi", **body).json["usage"]
        assert usage.get("loop") == told
        assert 1 <= usage["completion_tokens"] <= 3
        last = one.chat("Hi", **body, stream=True, stream_options={"include_usage": True}).events[-1]
        assert last["usage"].get("loop") == told
        assert last["timings"].get("loop") == told
    props = one.get("/props").json
    assert (props["loop"], props["n_layer"]) == ("2:5 k=3", 7)
    names = [model["id"] for model in one.get("/v1/models").json["data"]]
    assert names[0] == "llama"
    assert {"llama@off", "llama@2:5x3"} < set(names)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("2-5 k=3", "window 2-5 is not of the form first:end."),
        ("2:5", "has no k."),
        ("2:70 k=3", "window 2:70 is out of range: this model has 7 layers."),
        ("5:2 k=3", "window 5:2"),
        ("2:5 k=0", "K 0 is not a whole number"),
        ("2:5 k=3 kv=firts", "did you mean first?"),
        ("2:5 k=3 nonsense=1", "nonsense"),
        ("2:5 k=3 decode=entropy:1", "evaluates a token twice, which the server does not"),
        ("2:5 k=3 kv=each", "start it with --loop '2:5 k=3 kv=each'"),
        ("2:5 k=3 beta=nan", "beta"),
        ({"k": 3}, "loop is neither null, nor text, nor an object with a window"),
        ({"window": "2:5", "k": "3 kv=each"}, "is one word"),
        ({"window": {}, "k": 3}, "window '{}'"),
        ({"window": "2:5", "k": 1e99}, "k"),
        ([], "loop is neither null"),
        (3, "loop is neither null"),
        (True, "loop is neither null"),
        ("2:5 k=3 " * 5000, ""),
    ],
)
def test_a_loop_that_cannot_be_is_refused_with_the_reason(loop: Any, message: str, one: Server) -> None:
    for path, body in (
        ("/completion", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        reply = one.post(path, {**body, "loop": loop, "n_predict": 2, "max_tokens": 2})
        assert reply.status == 400, reply.body[:300]
        assert message in reply.error
        assert len(reply.error) < 1000
    assert len(one.tokens(PROMPT, 2)) == 2


def test_two_endless_streams_with_different_loops_both_advance(serve: Serve, model: Path) -> None:
    """Neither gets less than a third of the tokens while both run."""
    server = serve(model, *SMALL, "-np", "2")
    counts = [0, 0]
    shares: list[tuple[int, int]] = []

    def stream(index: int, loop: str) -> None:
        body = {"prompt": PROMPT[:9], "n_predict": 400, "loop": loop, "stream": True, "ignore_eos": True}
        with server.connection() as connection:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            while answer.readline():
                counts[index] += 1
                if counts[index] == 400:  # a line of data and an empty one for each token
                    shares.append((counts[0], counts[1]))
                    return

    threads = [threading.Thread(target=stream, args=pair) for pair in enumerate(("2:5 k=3", "2:5 k=6"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    first, second = shares[0]
    assert min(first, second) * 2 >= max(first, second), "a third of all"


def test_a_conversation_goes_on_where_it_stood(one: Server, model: Path) -> None:
    """What was read is kept under its loop, and what another loop left is not taken for it."""
    said = PROMPT[:30]
    for loop in ("2:5 k=3 kv=frozen", None):
        answer = one.tokens(said, 10, loop=loop)
        one.tokens(said, 4, loop="3:5 k=2")
        one.tokens(said, 10, loop=loop)
        more = [*said, *answer, *PROMPT[40:50]]
        body = {"prompt": more, "n_predict": 6, "temperature": 0, "return_tokens": True, "loop": loop}
        reply = one.post("/completion", {**body, "ignore_eos": True}).json
        assert reply["tokens"] == alone(model, more, 6, loop)
        assert reply["timings"]["cache_n"] >= 30


@pytest.mark.model
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_run_and_the_server_say_the_same(temp: float, serve: Serve, smollm2: Path) -> None:
    question = "Name three colours."
    context = ["-c", "1024", "-t", "1"]
    server = serve(smollm2, *context, "-np", "1", "--window", "12:16", "--K", "3")
    for flags, loop in (
        (["--window", "12:16", "--K", "3"], "12:16 k=3"),
        (
            ["--window", "12:16", "--K", "2", "--kv", "frozen", "--decode", "bypass"],
            "12:16 k=2 kv=frozen decode=bypass",
        ),
        ([], None),
    ):
        words = [
            *CLI,
            "run",
            str(smollm2),
            *context,
            *flags,
            "-s",
            "5",
            "-n",
            "16",
            "--temp",
            str(temp),
            "-p",
            question,
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        reply = server.chat(question, seed=5, max_tokens=16, temperature=temp, loop=loop)
        assert done.stdout == reply.text.removesuffix("\n") + "\n"  # a terminal's line is ended, once


QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("/completion", {"prompt": "Hello", "n_predict": 12, "seed": 3}),
    ("/completion", {"prompt": PROMPT, "n_predict": 12, "temperature": 0, "n_probs": 3}),
    ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 6, "seed": 4, "logprobs": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "seed": 1, "n": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "seed": 1,
                              "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "temperature": 0}),
    ("/completion", {"prompt": "x", "n_predict": 12, "seed": 2, "grammar": 'root ::= "yes" | "no"'}),
    ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
    ("/tokenize", {"content": "Hello"}),
    ("/completion", {"prompt": ""}),
    ("/completion", {}),
]  # fmt: skip


@pytest.mark.parametrize("base", [(), ("--loop", "2:5 k=3")], ids=["no loop", "looped"])
def test_without_a_loop_every_answer_is_the_stock_server_s(base: tuple[str, ...], model: Path) -> None:
    """To the byte, in the same order, but for times and the names drawn for answers."""
    try:
        stock = library.program("llama-server", stock=True)
    except BackendError as e:
        pytest.skip(f"{e.message} {e.hint}")

    def answers(program: Path, extra: dict[str, Any], *flags: str) -> list[tuple[int, Any]]:
        with started(program, model, *flags) as server:
            replies = [server.post(path, {**body, **extra}) for path, body in QUESTIONS]
        return [(reply.status, _settled(reply)) for reply in replies]

    said = {"loop": None} if base else {}
    assert answers(library.program("llama-server"), said, *base) == answers(stock, {})


def _settled(reply: Reply) -> Any:
    """An answer without what differs from one time to the next."""
    passing = {"timings", "created", "id", "system_fingerprint", "created_at", "completed_at"}

    def settled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: settled(inner) for name, inner in value.items() if name not in passing}
        return [settled(inner) for inner in value] if isinstance(value, list) else value

    if reply.headers["content-type"].startswith("text/event-stream"):
        return settled(reply.events)
    return settled(reply.json)
