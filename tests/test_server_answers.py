"""What a server answers is what a model of its own answers: alone, in a crowd, in a conversation, after others left."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import archs
import numpy as np
import pytest
import tiny
import zoo
from serving import SMALL, Server, alone

from ggufloop import capi
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.generate import complete
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling
from ggufloop.sequences import Aborted, Row, Sequences
from ggufloop.server.lanes import Lane, Lanes
from ggufloop.server.slots import Cuts

TinyModel = Callable[[str], Path]

LOOPS = [
    None,
    "2:5 k=3",
    "2:5 k=2 kv=last",
    "2:5 k=3 kv=each",
    "2:5 k=2 kv=each",
    "2:5 k=3 kv=frozen decode=first:2",
    "2:5 k=3 decode=bypass",
    "2:5 k=3 kv=each decode=bypass",
    "2:5 k=3 decode=entropy:4.2",
    "2:5 k=6 kv=frozen halt=0.12",
    "2:5 k=3 mode=layer attention=8 sinks=2",
]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server(model, limits={"parallel": 3}) as server:
        yield server


def drawn(seed: int, n: int = 12, temp: float = 0.8) -> Sampling:
    return Sampling(seed=seed, n=n, temp=temp)


def fields(sampling: Sampling) -> dict[str, Any]:
    return {"seed": sampling.seed, "max_tokens": sampling.n, "temperature": sampling.temp}


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_an_answer_is_that_of_a_model_of_its_own(loop: str | None, server: Server, model: Path) -> None:
    for temp in (0.0, 0.8):
        sampling = drawn(7, temp=temp)
        reply = server.complete("The quick brown fox", loop=loop, **fields(sampling))
        assert reply.text == alone(model, "The quick brown fox", loop, sampling)
        ran = reply.json["usage"]["loop"]
        assert (ran and ran["text"]) == (loop and str(LoopSpec.parse(loop)))


def test_the_loops_of_this_test_are_told_apart(model: Path) -> None:
    texts = [alone(model, "The quick brown fox", loop, drawn(7, 30)) for loop in LOOPS]
    assert len(set(texts)) >= len(LOOPS) - 2


def test_in_a_crowd_every_answer_is_its_own(server: Server, model: Path) -> None:
    """Mixed loops, prompts longer than a cut, three at a time in sequences that others used before."""
    rng = np.random.default_rng(5)
    asked = []
    for i in range(33):
        prompt = bytes(rng.integers(97, 123, int(rng.integers(3, 200))).tolist()).decode()
        asked.append((prompt, LOOPS[i % len(LOOPS)], drawn(i, int(rng.integers(2, 16)))))
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda a: server.complete(a[0], loop=a[1], **fields(a[2])), asked))
    assert [r.status for r in replies] == [200] * len(asked)
    for (prompt, loop, sampling), reply in zip(asked, replies, strict=True):
        assert reply.text == alone(model, prompt, loop, sampling), (prompt, loop)
        assert reply.json["usage"]["completion_tokens"] <= sampling.n


@pytest.mark.parametrize("cuts", [(64, 16), (48, 20), (512, 512)])
def test_what_is_kept_of_others_changes_nothing(cuts: tuple[int, int], model: Path) -> None:
    """Prompts that begin alike share their whole cuts, and the answers are those of prompts read from the start."""
    same = "a long beginning that all of these have in common, word for word, up to here: "
    engine = {"n_batch": cuts[0], "n_ubatch": cuts[1]}
    with Server(model, cuts=cuts, limits={"parallel": 1}) as server:
        reused = 0
        for i, loop in enumerate([None, "2:5 k=3", None, "2:5 k=3", "2:5 k=3 kv=each", None, "2:5 k=3 kv=each"]):
            reply = server.complete(f"{same}{i}", loop=loop, **fields(drawn(3, 8)))
            reused += reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert reply.text == alone(model, f"{same}{i}", loop, drawn(3, 8), **engine)
    assert (reused > 0) == (cuts != (512, 512))


@pytest.mark.parametrize("loop", [None, "2:5 k=3", "2:5 k=3 kv=each", "2:5 k=3 decode=bypass"], ids=str)
def test_a_conversation_is_that_of_a_context_of_its_own(loop: str | None, model: Path) -> None:
    """Also when others use its sequence in between: it is kept, and found again."""
    llm = LoopedLlama(model, n_ctx=512, n_batch=512, n_ubatch=512, loop=loop, **SMALL)
    with Server(model, limits={"parallel": 1}) as server:
        said = llm.tokenize(b"Once upon a time in a land far away", add_bos=True)
        for turn in range(4):
            answer = complete(llm, said, drawn(turn, 10))
            reply = server.complete(said, loop=loop, **fields(drawn(turn, 10)))
            assert reply.text == answer.text
            details = reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert details == len(said) - answer.timings.prompt_tokens
            assert details > 0 or turn == 0
            said = [*said, *answer.tokens, *llm.tokenize(f" and then {turn}".encode(), add_bos=False)]
            for other in (None, "2:5 k=2", "2:5 k=2 kv=each"):
                server.complete("something else entirely", loop=other, max_tokens=3)
    llm.close()


def test_a_conversation_can_be_answered_as_if_it_were_new(model: Path) -> None:
    with Server(model, limits={"parallel": 1}) as server:
        first = server.complete("Once upon", loop="2:5 k=3", temperature=0, max_tokens=6).text
        said = f"Once upon{first} and so"
        reply = server.complete(said, loop="2:5 k=3", cache_prompt=False, **fields(drawn(1)))
        assert reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert reply.text == alone(model, said, "2:5 k=3", drawn(1))


@pytest.mark.parametrize("family", ["gemma3", "qwen3moe", "qwen35", "granitehybrid"])
def test_other_families_are_served_alike(family: str, tiny_model: TinyModel) -> None:
    model = tiny_model(family)
    a, b = (tiny.FAMILIES | tiny.HYBRIDS)[family].window
    with Server(model, limits={"parallel": 2}) as server, ThreadPoolExecutor(4) as pool:
        asked = [(f"text {i} " * 5, loop, drawn(i)) for i in range(3) for loop in (None, f"{a}:{b} k=3")]
        replies = list(pool.map(lambda x: server.complete(x[0], loop=x[1], **fields(x[2])), asked))
        for (prompt, loop, sampling), reply in zip(asked, replies, strict=True):
            assert reply.text == alone(model, prompt, loop, sampling)
        again = server.complete(asked[0][0], loop=None, **fields(asked[0][2]))
        assert again.text == replies[0].text


def test_a_stream_is_the_answer_in_pieces(server: Server, model: Path) -> None:
    body = {"prompt": "Count", "stream": True, "loop": "2:5 k=3", **fields(drawn(2, 20))}
    events = server.post("/v1/completions", {**body, "stream_options": {"include_usage": True}}).events
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == alone(
        model, "Count", "2:5 k=3", drawn(2, 20)
    )
    assert events[-1]["usage"]["completion_tokens"] <= 20
    assert events[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert events[-2]["timings"]["predicted_n"] > 0


def test_stop_strings_end_an_answer_before_them(server: Server, model: Path) -> None:
    text = alone(model, "Count", None, drawn(2, 30))
    stop = text[8:11]
    reply = server.complete("Count", stop=[stop, "never"], loop=None, **fields(drawn(2, 30)))
    assert reply.text == text[: text.index(stop)]
    assert reply.json["choices"][0]["finish_reason"] == "stop"


ENDS = {str(token): -100 for token in (257, 258, 259)}
"""A bias against every token that ends an answer."""


def test_logprobs_are_those_of_the_models_logits(server: Server, model: Path) -> None:
    """Before any bias: that is about sampling."""
    reply = server.complete("Hello there", logprobs=3, temperature=0, max_tokens=4, loop="2:5 k=3", logit_bias=ENDS)
    given = reply.json["choices"][0]["logprobs"]
    llm = LoopedLlama(model, n_ctx=512, n_batch=512, n_ubatch=512, loop="2:5 k=3", **SMALL)
    tokens = llm.tokenize(b"Hello there", add_bos=True, special=True)
    for i in range(4):
        row = llm.logits(tokens)[-1].astype(np.float64)
        values = row - row.max() - np.log(np.exp(row - row.max()).sum())
        best = int(values[:257].argmax())
        # the head of several rows is another kernel than that of one
        assert given["token_logprobs"][i] == pytest.approx(values[best], abs=1e-5)
        assert 1 <= len(given["top_logprobs"][i]) <= 3
        assert max(given["top_logprobs"][i].values()) == pytest.approx(values.max(), abs=1e-5)
        tokens = [best]
    llm.close()


def test_a_bias_decides(server: Server) -> None:
    reply = server.complete("Hello", logit_bias={"65": 100}, max_tokens=5, temperature=0)
    assert server.post("/tokenize", {"content": reply.text}).json["tokens"] == [65] * 5


def test_clients_that_go_away_are_not_answered_further(model: Path) -> None:
    """In the middle of a stream, while waiting in the queue, and without ever reading the answer."""
    with Server(model, limits={"parallel": 1}) as server:
        sampling = drawn(4, 12)
        before = server.complete("Hello", loop="2:5 k=3", **fields(sampling)).text
        for streamed in (True, False, True):
            with server.connection() as connection:
                body = {"prompt": "Hello", "max_tokens": 480, "stream": streamed, "logit_bias": ENDS}
                connection.request("POST", "/v1/completions", json.dumps(body))
                if streamed:
                    assert connection.getresponse().read(10)
                else:
                    time.sleep(0.05)
        started = time.monotonic()
        assert server.complete("Hello", loop="2:5 k=3", **fields(sampling)).text == before
        assert time.monotonic() - started < 10
        deadline = time.monotonic() + 10
        while server.running.worker.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.running.worker.counts["answers cancelled"] >= 2


def test_a_conversation_is_its_clients_own(model: Path) -> None:
    """What others said changes nothing, even if it is the same."""
    with Server(model, limits={"parallel": 1}) as server:
        said = list(range(40))
        first = server.complete(said, loop="2:5 k=3", user="a", **fields(drawn(1, 8)))
        tokens = server.post("/tokenize", {"content": first.text}).json["tokens"]
        more = [*said, *tokens[:4], 7, 8, 9]
        again = server.complete(more, loop="2:5 k=3", user="b", **fields(drawn(2, 8)))
        assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert again.text == alone(model, more, "2:5 k=3", drawn(2, 8))


def test_a_prompt_that_nobody_waits_for_is_given_up_and_read_again_right(model: Path) -> None:
    """llama.cpp stops between two nodes of a graph; what was read before stays, what was half read goes."""
    llm = LoopedLlama(model, n_ctx=256, n_batch=64, n_ubatch=64, **SMALL)
    sequences, own = Sequences(llm, 2, 512, 512, 512), Sequences(llm, 1, 512, 512, 512)
    tokens = np.random.default_rng(1).integers(0, 256, 60).tolist()
    rows = [Row(1, t, i, i == 59) for i, t in enumerate(tokens)]
    sequences.decode([*rows[:30]])
    sequences.abort(True)
    with pytest.raises(Aborted):
        sequences.decode(rows[30:])
    sequences.abort(False)
    sequences.cut(1, 30)
    own.decode([Row(0, r.token, r.position, False) for r in rows[:30]])
    alone = own.decode([Row(0, r.token, r.position, r.wanted) for r in rows[30:]])
    assert np.array_equal(sequences.decode(rows[30:]), alone)
    for context in (sequences, own):
        context.close()
    llm.close()


def test_a_model_that_keeps_nothing_between_tokens_is_not_served(tmp_path: Path) -> None:
    model = zoo.write(tmp_path / "llada.gguf", archs.ROWS["llada"])
    with Server(model, wait=False) as server:
        server._thread.join(30)
        assert isinstance(server.error, GgufloopError)
        assert server.error.message == "this model keeps no cache between tokens."


def test_a_context_nobody_can_have_is_refused(model: Path) -> None:
    llm = LoopedLlama(model, n_ctx=256, n_batch=64, n_ubatch=64, **SMALL)
    with pytest.raises(GgufloopError, match=r"2 x 2000000000 tokens of context are more than llama\.cpp can count"):
        Sequences(llm, 2, 2 * 10**9, 64, 64)
    llm.close()


def test_a_long_answer_does_not_hold_up_another_loops(model: Path) -> None:
    with Server(model, n_ctx=8192, limits={"parallel": 2}) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.complete, "Hello", loop=None, max_tokens=8000, logit_bias=ENDS)
        while not server.running.worker.running():
            time.sleep(0.01)
        for loop in ("2:5 k=3", "2:5 k=2 kv=each", None):
            assert server.complete("Hi", loop=loop, max_tokens=5).status == 200
        assert not long.done(), "this machine is too fast for this test"
        server.running.stop(at_once=True)
        assert long.result().status == 503


def test_a_full_server_says_so_and_recovers(model: Path) -> None:
    with Server(model, limits={"parallel": 1, "queue": 1}) as server:
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda i: server.complete(f"Hello {i}", max_tokens=200, loop=None), range(8)))
        statuses = [r.status for r in replies]
        assert set(statuses) == {200, 503}
        refused = next(r for r in replies if r.status == 503)
        assert refused.headers["retry-after"] == "1"
        assert refused.json["error"]["code"] == "busy"
        assert server.complete("Hello", max_tokens=2).status == 200


def test_a_server_that_is_stopped_ends_in_time(model: Path) -> None:
    """Answers may go on for a while and are then cut off; those waiting are refused at once."""
    with Server(model, n_ctx=4096, limits={"parallel": 1, "stop_seconds": 0.5}) as server:
        results: list[Any] = []

        def ask() -> None:
            try:
                results.append(server.complete("Hello", max_tokens=4000, logit_bias=ENDS))
            except OSError as e:
                results.append(e)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while not server.running.worker.running():
            time.sleep(0.01)
        started = time.monotonic()
        server.running.stop()
        for thread in threads:
            thread.join(10)
        assert server.running.worker.join(5)
        assert time.monotonic() - started < 5
    assert len(results) == 3
    assert {r.status for r in results if not isinstance(r, OSError)} <= {503}


def test_rows_are_computed_together_only_where_that_changes_nothing(model: Path) -> None:
    """Whatever kernels there are: the logits are bit for bit those of rows computed alone."""
    llm = LoopedLlama(model, n_ctx=256, n_batch=64, n_ubatch=64, **SMALL)
    lane, own = Lane(Sequences(llm, 3, 256, 64, 64)), [Sequences(llm, 1, 256, 64, 64) for _ in range(3)]
    tokens = np.random.default_rng(1).integers(0, 256, (3, 30)).tolist()
    for loop in (None, LoopSpec((2, 5), 3)):
        for s, single in enumerate(own):
            single.set_loop(loop)
            single.cut(0, 0)
            lane.sequences.set_loop(loop)
            lane.sequences.cut(s, 0)
            for holder, number in ((lane.sequences, s), (single, 0)):
                holder.decode([Row(number, t, i, i == 19) for i, t in enumerate(tokens[s][:20])])
        for i in range(20, 30):
            together = lane.decode(True, [Row(s, tokens[s][i], i) for s in range(3)], can_rewind=True)
            for s, single in enumerate(own):
                assert np.array_equal(together[s], single.decode([Row(0, tokens[s][i], i)])[0])
    found = lane.batches_exactly()
    assert found["equal"] + found["different"] == 2
    for sequences in (lane.sequences, *own):
        sequences.close()
    llm.close()


def test_seats_are_empty_where_they_say_so_after_a_refused_loop(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compute buffer that does not fit is refused before the context is emptied."""
    llm = LoopedLlama(tiny_model("llama"), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    lanes = Lanes(llm, 1, 256, Cuts(64, 64), 0)
    two, three = (LoopSpec.parse(f"2:4 k={k} kv=each") for k in (2, 3))

    def answer(loop: LoopSpec, tokens: list[int]) -> None:
        found = lanes.find_seat(loop, tokens, None)
        assert found
        seat, n, _ = found
        seat.lane.sequences.decode([Row(0, t, i, i == len(tokens) - 1) for i, t in enumerate(tokens)][n:])
        lanes.leave(seat, whole=True)

    def refuse(*arguments: object) -> None:
        raise capi.Refused("out of memory: failed to allocate compute pp buffers.", "use fewer passes.", lost=True)

    answer(two, [5, 6, 7, 8])
    with monkeypatch.context() as patch:
        patch.setattr(capi, "install", refuse)
        with pytest.raises(GgufloopError, match="out of memory"):
            answer(three, [1, 2, 3])
    answer(two, [9, 10])
    lanes.close()
    llm.close()
