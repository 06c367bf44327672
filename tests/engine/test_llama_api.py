"""What users of llama_cpp.Llama rely on, on a real model and looped: streams, templates, grammars, tools, log-probs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufloop.engine import LoopedLlama, llama_cpp
from ggufloop.logits import log_softmax
from ggufloop.loop import LoopSpec

pytestmark = pytest.mark.model

LOOP = LoopSpec((12, 16), 3)
MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LoopedLlama]:
    model = LoopedLlama(smollm2, n_ctx=512, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, loop=LOOP)
    yield model
    model.close()


def answer(llm: LoopedLlama, **settings: Any) -> str:
    llm.reset()
    out = llm.create_chat_completion(MESSAGES, max_tokens=24, temperature=0.0, **settings)
    return out["choices"][0]["message"]["content"]


def test_the_loop_changes_a_chat_answer_and_off_gives_it_back(llm: LoopedLlama) -> None:
    looped = answer(llm)
    llm.set_loop(None)
    plain = answer(llm)
    llm.set_loop(LoopSpec((12, 16), 3, solver="naive"))
    naive = answer(llm)
    llm.set_loop(LOOP)
    assert answer(llm) == looped
    assert naive != plain


def test_a_stream_is_the_answer_in_pieces(llm: LoopedLlama) -> None:
    whole = answer(llm)
    llm.reset()
    chunks = llm.create_chat_completion(MESSAGES, max_tokens=24, temperature=0.0, stream=True)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == whole
    assert len(pieces) > 10


def test_a_grammar_binds(llm: LoopedLlama) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "red" | "green"', verbose=False)
    assert answer(llm, grammar=grammar) in ("red", "green")


def test_a_json_schema_binds(llm: LoopedLlama) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}
    text = answer(llm, response_format={"type": "json_object", "schema": schema})
    assert json.loads(text)["n"] in (1, 2, 3)


def test_a_tool_is_called(llm: LoopedLlama) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": parameters}}
    llm.reset()
    out = llm.create_chat_completion(
        MESSAGES,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=32,
        temperature=0.0,
    )
    call = out["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"])["city"] in ("Rome", "Oslo")


def test_log_probabilities_are_those_of_logits(llm: LoopedLlama) -> None:
    llm.reset()
    out = llm.create_completion("The capital of France is", max_tokens=1, temperature=0.0, logprobs=1)
    given = out["choices"][0]["logprobs"]["token_logprobs"][-1]
    llm.reset()
    row = llm.logits(llm.tokenize(b"The capital of France is", add_bos=False, special=True))[-1].astype(np.float64)
    assert given == pytest.approx(row.max() - np.log(np.exp(row - row.max()).sum()) - row.max(), abs=1e-4)


def test_a_pickled_model_comes_back_with_its_loop(llm: LoopedLlama) -> None:
    text = answer(llm)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.loop == LOOP
    assert answer(copy) == text
    copy.close()


def test_other_kernels_round_otherwise_and_are_kept(gemma: Path) -> None:
    """repack=False: weights stay as the file has them, and other kernels multiply them.

    Either rounds activations to 8 bits, which is 0.006 nats (KL) from exact arithmetic on this model and as much from
    each other. Whether there are other kernels at all is up to the CPU, so the parameter is looked at as well."""
    settings = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    seen = []
    for repack in (True, False):
        llm = LoopedLlama(gemma, repack=repack, **settings)
        tokens = llm.tokenize(b"The capital of France is Paris, and that of Italy is Rome.")
        plain = llm.logits(tokens)
        llm.set_loop(LoopSpec((7, 11), 1))
        assert np.array_equal(llm.logits(tokens), plain)
        copy = pickle.loads(pickle.dumps(llm))
        assert llm.model_params.use_extra_bufts is copy.model_params.use_extra_bufts is repack
        seen.append(log_softmax(plain))
        llm.close()
        copy.close()
    assert (np.exp(seen[0]) * (seen[0] - seen[1])).sum(axis=1).mean() < 0.03


def test_a_draft_model_needs_a_policy_that_is_exact_for_several_tokens(smollm2: Path) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = "one two three four one two three four one two"
    texts = []
    for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=4)):
        llm = LoopedLlama(
            smollm2, n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False,
            loop=LoopSpec((12, 16), 3, kv="frozen"), draft_model=draft,
        )  # fmt: skip
        texts.append(llm.create_completion(prompt, max_tokens=16, temperature=0.0)["choices"][0]["text"])
        if draft:
            with pytest.raises(ValueError, match="a draft model needs kv each or frozen and decode full"):
                llm.set_loop(LOOP)
            with pytest.raises(ValueError, match="without halt, not kv frozen, decode full, halt"):
                llm.set_loop(LoopSpec((12, 16), 3, kv="frozen", halt=0.1))
        llm.close()
    assert texts[0] == texts[1]
