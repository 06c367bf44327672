"""`echo` of /v1/completions: a prompt's log-probabilities against `LoopedLlama.logits`, and lm-eval asking for them.

lm-eval's local-completions is the one who needs it: it finds the server's tokenizer by itself, and its scores are those
of `ggufloop eval` wherever a loop does not depend on how a text is cut (there an answer is a step of its own, and here
prompt and answer are one).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rewrite import rewritten
from support.serving import ENGINE, SMALL, Server, served

from ggufloop.engine import LoopedLlama

Serve = Callable[..., Server]
LOOPS = [None, "2:5 k=3", "2:5 k=2 solver=naive kv=last", "2:5 k=3 kv=frozen"]
TEXT = "The h\u00e9llo \U0001f642 of 12 words"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def server(serve: Serve, model: Path) -> Server:
    return serve(model, *SMALL, "-np", "1")


def echoed(server: Server, prompt: Any, **fields: Any) -> Any:
    body = {"prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 1, "temperature": 0, "loop": None}
    reply = server.post("/v1/completions", {**body, **fields})
    assert reply.status == 200, reply.body
    return reply.json


def logprobs(model: Path, tokens: list[int], loop: str | None, **cuts: int) -> np.ndarray:
    """float64 (n, n_vocab): what the model thinks of each place, in one step."""
    llm = LoopedLlama(model, loop=loop, verbose=False, **ENGINE | cuts)
    try:
        rows = llm.logits(tokens).astype(np.float64)
    finally:
        llm.close()
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("n", [1, 2, 40, 500])
def test_every_token_of_the_prompt_has_its_logprob(loop: str | None, n: int, server: Server, model: Path) -> None:
    tokens = [5 + i * i % 250 for i in range(n)]
    wanted = logprobs(model, tokens, loop)
    found = echoed(server, tokens, loop=loop)["choices"][0]["logprobs"]
    given, top = found["token_logprobs"], found["top_logprobs"]
    assert len(given) == len(top) == len(found["tokens"]) == len(found["text_offset"]) == n + 1
    assert given[0] is None
    assert top[0] is None
    np.testing.assert_allclose(given[1:-1], wanted[range(n - 1), tokens[1:]], rtol=0, atol=1e-9)
    assert given[-1] == pytest.approx(wanted[-1].max(), abs=1e-9)
    for place, row in zip(top[1:], wanted, strict=True):
        np.testing.assert_allclose(sorted(place.values(), reverse=True)[:3], np.sort(row)[::-1][:3], rtol=0, atol=1e-9)


@pytest.mark.parametrize("loop", ["2:5 k=3", "2:5 k=2 solver=naive kv=last"])
def test_a_prompt_is_cut_where_it_always_is(loop: str, model: Path) -> None:
    """64, 36, 64, 36, ...: under these loops another cut has other results."""
    tokens = [5 + i * i % 250 for i in range(250)]
    cuts = {"n_batch": 100, "n_ubatch": 64}
    with served(model, "-t", "1", "-c", "512", "-fa", "on", "-b", "100", "-ub", "64", "-np", "1") as server:
        found = echoed(server, tokens, loop=loop)["choices"][0]["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(found[1:-1], logprobs(model, tokens, loop, **cuts)[range(249), tokens[1:]], atol=1e-9)
    other = logprobs(model, tokens, loop)[range(249), tokens[1:]]
    assert np.abs(np.array(found[1:-1]) - other).max() > 1e-3


def test_offsets_are_those_of_the_text(model: Path, tmp_path: Path) -> None:
    """A BOS that the tokenizer puts before it is a token, and no part of it."""
    with_bos = rewritten(model, tmp_path / "bos.gguf", {"tokenizer.ggml.add_bos_token": True})
    with served(with_bos, *SMALL, "-np", "1") as server:
        choice = echoed(server, "hello \U0001f642 you", max_tokens=0)["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert choice["text"] == "hello \U0001f642 you"
    assert offsets[:3] == [0, 0, 1], "BOS, h, e"
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)


def test_sampling_on_the_device_has_no_logits_to_echo(server: Server) -> None:
    """It is left for the CPU then: it used to end everybody's answer."""
    found = echoed(server, [5, 6, 7, 8], n_probs=2, post_sampling_probs=True, backend_sampling=True)["choices"][0]
    assert found["logprobs"] == echoed(server, [5, 6, 7, 8], n_probs=2)["choices"][0]["logprobs"]


def test_what_it_answers_with(server: Server) -> None:
    answer = echoed(server, TEXT, max_tokens=4)
    choice = answer["choices"][0]
    assert choice["text"].startswith(TEXT)
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["total_tokens"]
    none = echoed(server, TEXT, max_tokens=0)["choices"][0]
    assert none["text"] == TEXT
    assert len(none["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    plain = echoed(server, TEXT, logprobs=None)["choices"][0]
    assert plain["text"].startswith(TEXT)
    assert plain["logprobs"] is None
    again = echoed(server, TEXT, max_tokens=4)["choices"][0]["logprobs"]
    assert again == choice["logprobs"], "a prompt that was cached has its logits computed again"


def test_several_prompts_and_several_answers(serve: Serve, model: Path) -> None:
    two = serve(model, *SMALL, "-np", "2")
    prompts = ["One", "Two, three and four"]
    choices = echoed(two, prompts, n=2, max_tokens=2)["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    for place, prompt in enumerate(prompts):
        own = echoed(two, prompt, max_tokens=2)["choices"][0]
        for choice in choices[2 * place : 2 * place + 2]:
            assert choice["text"] == own["text"]
            assert choice["logprobs"]["tokens"] == own["logprobs"]["tokens"]
            np.testing.assert_allclose(
                choice["logprobs"]["token_logprobs"][1:], own["logprobs"]["token_logprobs"][1:], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"stream": True}, "echo is not streamed"), ({"logprobs": 101}, "echo takes logprobs up to 100")],
)
def test_what_is_refused(fields: dict[str, Any], words: str, server: Server) -> None:
    reply = server.post("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1, **fields})
    assert reply.status == 400
    assert words in reply.error


def test_the_words_of_lm_evals_tokenizer(server: Server) -> None:
    assert {"bos_token", "eos_token", "chat_template"} <= server.get("/tokenizer_info").json.keys()
    tokens = server.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False}).json["tokens"]
    assert tokens == server.post("/tokenize", {"content": TEXT}).json["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json["prompt"] == TEXT
    for bad in (-1, 10**6):
        reply = server.post("/detokenize", {"tokens": [bad]})
        assert (reply.status, reply.error) == (400, f"token {bad} is not in the vocabulary")


@pytest.mark.parametrize("loop", [None, "2:5 k=3 kv=frozen"])
def test_lm_eval_finds_what_ggufloop_eval_finds(loop: str | None, serve: Serve, model: Path) -> None:
    """200 questions, asked over HTTP and in this process. In F32: rounded K/V make even the plain model's scores depend
    on whether an answer is read with its prompt or after it, here by 0.02 nats in 67."""
    server = serve(model, "-t", "1", "-c", "512", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "-np", "1")
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")  # what lm-eval wants for servers
    from lm_eval.api.registry import get_model

    from ggufloop.measure.tasks import evaluate
    from ggufloop.tasks.loading import load_tasks

    tasks = load_tasks(["brackets"])
    suffix = "" if loop is None else "@2:5x3/kv=frozen"
    client = get_model("local-completions").create_from_arg_string(
        f"model=tiny{suffix},base_url={server.url}/v1/completions,max_length=512,num_concurrent=1"
    )
    theirs = lm_eval.simple_evaluate(
        client, tasks=tasks.loaded, task_manager=tasks.manager, limit=200, bootstrap_iters=0
    )
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}
    llm = LoopedLlama(model, loop=loop, n_seq=8, verbose=False, **ENGINE | exact)
    try:
        ours = evaluate(llm, tasks, limit=200)
    finally:
        llm.close()
    assert len(ours.samples) == len(theirs["samples"]["brackets"]) == 200
    for a, b in zip(ours.samples, sorted(theirs["samples"]["brackets"], key=lambda s: s["doc_id"]), strict=True):
        np.testing.assert_allclose(
            [score for score, _ in a["filtered_resps"]], [score for score, _ in b["filtered_resps"]], rtol=1e-5
        )
        assert [greedy for _, greedy in a["filtered_resps"]] == [greedy for _, greedy in b["filtered_resps"]]
    assert ours.results["results"]["brackets"]["acc,none"] == theirs["results"]["brackets"]["acc,none"]
