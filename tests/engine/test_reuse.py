"""What a cache may be reused for: prompts told again, prompts continued, saved states, and models that are closed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.loaded import F32, ROUNDING, load, spread, tokens

from ggufloop.backend.capi import Refused
from ggufloop.engine import LoopedLlama, llama_cpp
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec

TinyModel = Callable[[str], Path]


def prompt_row(llm: LoopedLlama, prompt: list[int], n: int = 1) -> np.ndarray:
    """Logits after the prompt, as generate() leaves them, and n tokens generated."""
    list(itertools.islice(llm.generate(prompt, temp=0.0), n))
    return llm.scores[len(prompt) - 1].copy()


@pytest.mark.parametrize("kv", ["first", "last", "each", "frozen"])
@pytest.mark.parametrize("decode", ["full", "bypass", "first:2"])
@pytest.mark.parametrize("told", ["again", "with its answer", "continued"])
def test_a_prompt_reads_the_same_from_a_warm_cache(kv: str, decode: str, told: str, tiny_model: TinyModel) -> None:
    """The prompt always loops, also the part an earlier answer evaluated plain; and telling it twice changes nothing.

    With kv first and last a prompt that goes on after a looped answer is cut where the answer was, so there only the
    prompt told again is the same as from an empty cache.
    """
    a, b = tiny.FAMILIES["llama"].window
    llm = load(tiny_model("llama"), f"{a}:{b} k=3 kv={kv} decode={decode}", logits_all=True, **F32)
    first = tokens(llm, 30)
    answer = list(itertools.islice(llm.generate(first, temp=0.0), 8))
    prompt = {"again": first, "with its answer": first + answer[:7], "continued": first + answer + tokens(llm, 5)}[told]
    warm = prompt_row(llm, prompt)
    llm.reset()
    cold = prompt_row(llm, prompt)
    if kv in ("each", "frozen") or told == "again":
        assert spread(warm, cold) < ROUNDING
    llm.set_loop(None)
    assert spread(prompt_row(llm, prompt), cold) > 0.05


def test_a_prompt_that_halts_is_not_cut_elsewhere(tiny_model: TinyModel) -> None:
    """A batch halts as a whole, so with halt frozen too depends on how a prompt was cut."""
    llm = load(tiny_model("llama"), logits_all=True, **F32)
    prompt = tokens(llm, 40)
    told = prompt[:25] + tokens(llm, 8, seed=9)
    shows = 0
    for tau in np.arange(0.06, 0.2, 0.01):
        llm.set_loop(f"2:5 k=6 kv=frozen halt={tau:.2f}")
        cold = prompt_row(llm, prompt)
        llm.reset()
        llm.logits(prompt[:25])
        shows += spread(llm.logits(prompt[25:])[-1], cold) > ROUNDING
        llm.reset()
        prompt_row(llm, told)
        assert spread(prompt_row(llm, prompt), cold) == 0
    assert shows, "some batches halted otherwise"


@pytest.mark.parametrize("kv", ["first", "frozen"])
def test_a_continued_prompt_evaluates_only_what_is_new(kv: str, tiny_model: TinyModel) -> None:
    a, b = tiny.FAMILIES["llama"].window
    llm = load(tiny_model("llama"), f"{a}:{b} k=3 kv={kv}")
    first = tokens(llm, 30)
    answer = list(itertools.islice(llm.generate(first, temp=0.0), 8))
    next(llm.generate([*first, *answer, 5, 6, 7], temp=0.0))
    assert llm.timings().prompt_tokens == 4  # the last token of the answer was never evaluated


def test_a_ring_of_a_sliding_window_is_not_reused_from_the_middle(tiny_model: TinyModel) -> None:
    llm = load(tiny_model("gemma3"), n_ctx=1024, n_batch=64, n_ubatch=64, swa_full=False, logits_all=True, **F32)
    long = tokens(llm, 700)
    next(llm.generate(long, temp=0.0))
    prompt = long[:50] + tokens(llm, 10, seed=9)
    warm = prompt_row(llm, prompt)
    llm.reset()
    assert spread(warm, prompt_row(llm, prompt)) < ROUNDING


def test_logits_fill_the_scores_that_later_completions_read(tiny_model: TinyModel) -> None:
    llm = load(tiny_model("llama"), "2:5 k=3", logits_all=True)
    text = tokens(llm, 20)
    rows = llm.logits(text)
    assert np.array_equal(llm.scores[:20], rows)


def test_a_prompt_cache_finds_only_what_shares_a_prefix(tiny_model: TinyModel) -> None:
    llm = load(tiny_model("llama"), "2:5 k=3")
    llm.set_cache(llama_cpp.LlamaRAMCache(capacity_bytes=1 << 24))
    llm.eval([3, 4, 5])
    llm.cache[[3, 4, 5]] = llm.save_state()
    assert [3, 4, 9] in llm.cache
    assert [4, 4, 9] not in llm.cache
    assert llm.cache.capacity_bytes == 1 << 24
    with pytest.raises(KeyError):
        llm.cache[[4, 4, 9]]


def test_a_state_that_does_not_fit_leaves_an_empty_model(tiny_model: TinyModel) -> None:
    large = load(tiny_model("llama"), "2:5 k=3", n_ctx=768)
    large.logits(tokens(large, 400))
    state = large.save_state()
    llm = load(tiny_model("llama"), "2:5 k=3")
    llm.logits([1, 2, 3])
    with pytest.raises(GgufloopError, match="this state of 400 tokens is of another model, or too large for 256"):
        llm.load_state(state)
    assert llm.n_tokens == 0
    other = load(tiny_model("qwen3"))
    other.logits([1, 2, 3])
    llm.set_loop(None)
    with pytest.raises(GgufloopError, match="of another model"):
        llm.load_state(other.save_state())
    assert llm.logits([1, 2, 3]).shape == (3, llm.n_vocab())
    assert len(llm.input_ids) == 256


def test_changing_the_loop_ends_a_running_generator(tiny_model: TinyModel) -> None:
    llm = load(tiny_model("llama"), "2:5 k=3")
    stream = llm.generate(tokens(llm, 10), temp=0.0)
    next(stream)
    llm.set_loop(None)
    with pytest.raises(GgufloopError, match="changed while an answer was being generated"):
        next(stream)


@pytest.mark.parametrize("lost", [False, True])
def test_a_loop_that_cannot_be_installed_leaves_the_one_before(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """With the cache as well, unless memory ran out while it was changed."""
    llm = load(tiny_model("llama"), "2:5 k=3")
    text = tokens(llm, 20)
    looped = llm.logits(text)

    def fail(self: LoopedLlama, loop: LoopSpec | None) -> None:
        raise Refused("out of memory", "", lost)

    monkeypatch.setattr(LoopedLlama, "_install", fail)
    with pytest.raises(GgufloopError, match="out of memory"):
        llm.set_loop(LoopSpec((2, 5), 4))
    assert (str(llm.loop), llm.n_tokens) == ("2:5 k=3", 0 if lost else len(text))
    llm.reset()
    assert np.array_equal(llm.logits(text), looped)


def test_use_after_close(tiny_model: TinyModel) -> None:
    llm = load(tiny_model("llama"), "2:5 k=3")
    llm.close()
    llm.close()
    for use in (lambda: llm.set_loop(None), lambda: llm.logits([1]), lambda: llm.eval([1]), llm.memory_bytes,
                llm.save_state, llm.n_layer):  # fmt: skip
        with pytest.raises(GgufloopError, match="this model is closed"):
            use()


@pytest.mark.parametrize("token", [-1, 100000])
def test_tokens_outside_the_vocabulary(token: int, tiny_model: TinyModel) -> None:
    llm = load(tiny_model("llama"), "2:5 k=3 decode=first:1")
    llm.logits([1, 2, 3])
    with pytest.raises(UsageError, match=f"token {token} is not in the vocabulary of {llm.n_vocab()}"):
        llm.logits([token])
    assert llm.n_tokens == 3
    looped = llm.logits([5])  # still the first generated token, so it loops
    llm.reset()
    whole = LoopSpec((2, 5), 3)
    llm.set_loop(whole)
    llm.logits([1, 2, 3])
    assert np.array_equal(llm.logits([5]), looped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_ctx": -1}, "n_ctx -1 is less than 0."),
        ({"n_batch": 0}, "n_batch 0 is less than 1."),
        ({"n_ubatch": -4}, "n_ubatch -4 is less than 1."),
        ({"type_k": 99}, "type_k 99 is not a type a K/V cache can have."),
        ({"type_v": 12}, "type_v 12 is not a type a K/V cache can have."),
    ],
)
def test_settings_that_would_end_the_process(settings: dict[str, int], message: str, tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError) as e:
        load(tiny_model("llama"), **settings)
    assert e.value.message == message


def test_a_context_that_is_no_multiple_of_256(tmp_path: Path) -> None:
    family = tiny.FAMILIES["llama"]
    path = tiny.write(tmp_path / "m.gguf", replace(family, meta={**family.meta, "context_length": 300}))
    llm = load(path, "2:5 k=3", n_ctx=0, logits_all=True)
    assert llm.n_ctx() == len(llm.input_ids) == len(llm.scores) == 512
    assert llm.logits(tokens(llm, 512)).shape == (512, llm.n_vocab())
