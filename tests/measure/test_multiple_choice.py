"""Multiple-choice log-probabilities against those of `LoopedLlama.logits`, plain and under every K/V policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from ggufloop.engine import LoopedLlama
from ggufloop.errors import UsageError
from ggufloop.measure.multiple_choice import ScoredChoice, score_choices

TinyModel = Callable[[str], Path]
_RNG = np.random.default_rng(3)
PROMPT = _RNG.integers(0, 256, 37).tolist()
CHOICES = [_RNG.integers(0, 256, n).tolist() for n in (1, 2, 5, 2, 1, 9)]
LOOPS = [None, "k=3", "k=2 solver=naive kv=each", "k=3 kv=frozen", "k=2 kv=last", "k=3 beta=0.5 mode=layer"]


@contextmanager
def opened(path: Path, loop: str | None, **settings: object) -> Iterator[LoopedLlama]:
    llm = LoopedLlama(
        path, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn=False, verbose=False,
        loop=loop, **settings,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.close()


def spec(family: str, settings: str | None) -> str | None:
    window = (tiny.FAMILIES | tiny.HYBRIDS)[family].window
    return None if settings is None else "{}:{} {}".format(*window, settings)


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def expected(llm: LoopedLlama, choice: list[int], prompt: list[int] = PROMPT) -> ScoredChoice:
    """By definition: the prompt is a step, the choice another one, both on an empty cache of their own."""
    llm.reset()
    rows = llm.logits(prompt)[-1:]
    if len(choice) > 1:
        rows = np.concatenate([rows, llm.logits(choice[:-1])])
    logs = log_softmax(rows)
    return ScoredChoice(float(logs[range(len(choice)), choice].sum()), bool((logs.argmax(-1) == choice).all()))


def check(found: list[ScoredChoice], wanted: list[ScoredChoice]) -> None:
    assert [c.greedy for c in found] == [c.greedy for c in wanted]
    np.testing.assert_allclose([c.logprob for c in found], [c.logprob for c in wanted], rtol=1e-6)


@pytest.mark.parametrize("settings", LOOPS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3moe"])
def test_equal_to_logits(tiny_model: TinyModel, family: str, settings: str | None) -> None:
    with opened(tiny_model(family), spec(family, settings)) as llm:
        row = llm.logits(PROMPT)[-1]
        choices = [*CHOICES, [int(row.argmax())]]  # one of them is greedy
        found = score_choices(llm, PROMPT, choices)
        check(found, [expected(llm, choice) for choice in choices])
        assert found[-1].greedy
        backwards = score_choices(llm, PROMPT, choices[::-1])  # no trace of the choice before
        assert backwards[::-1] == found


def test_small_batches_and_a_sliding_window_change_nothing_for_a_loop_that_does_not_look_at_cuts(
    tiny_model: TinyModel,
) -> None:
    loop = spec("gemma3", "k=3 kv=frozen")
    with opened(tiny_model("gemma3"), loop) as llm:
        wanted = score_choices(llm, PROMPT, CHOICES)
    with opened(tiny_model("gemma3"), loop, n_batch=8, n_ubatch=8) as llm:
        check(score_choices(llm, PROMPT, CHOICES), wanted)
    with opened(tiny_model("gemma3"), loop, n_batch=8, n_ubatch=8, swa_full=False) as llm:
        assert not llm.can_rewind
        check(score_choices(llm, PROMPT, CHOICES), wanted)


def test_recurrent_layers_read_the_prompt_again(tiny_model: TinyModel) -> None:
    for settings in (None, "k=2"):
        with opened(tiny_model("qwen35"), spec("qwen35", settings)) as llm:
            assert not llm.can_rewind
            check(score_choices(llm, PROMPT, CHOICES), [expected(llm, choice) for choice in CHOICES])


def test_a_choice_loops_whatever_the_decode_policy(tiny_model: TinyModel) -> None:
    """CHOICES has some of which one token is evaluated, which bypass would take for a decode step."""
    path = tiny_model("llama")
    with opened(path, spec("llama", "k=3 decode=bypass")) as bypass, opened(path, spec("llama", "k=3")) as full:
        assert score_choices(bypass, PROMPT, CHOICES) == score_choices(full, PROMPT, CHOICES)
        bypass.reset()
        bypass.logits(PROMPT)
        row = bypass.logits(CHOICES[1][:1])  # a decode step, which is plain there
        full.reset()
        full.logits(PROMPT)
        assert not np.allclose(row, full.logits(CHOICES[1][:1]), atol=1e-3)


def test_nothing_to_score_is_refused(tiny_model: TinyModel) -> None:
    with opened(tiny_model("llama"), None) as llm:
        with pytest.raises(UsageError, match="choice 1 has no tokens"):
            score_choices(llm, PROMPT, [[1], []])
        with pytest.raises(UsageError, match="the prompt has no tokens"):
            score_choices(llm, [], [[1]])


@pytest.mark.model
@pytest.mark.parametrize("settings", [None, "k=3", "k=3 kv=each", "k=3 kv=frozen"])
def test_a_real_model(smollm2: Path, settings: str | None) -> None:
    """Words it knows: the right answer is the likeliest, and every score is that of its logits."""
    with opened(smollm2, None if settings is None else f"12:16 {settings}") as llm:
        text = "The capital of France is"
        prompt = llm.tokenize(text.encode())
        choices = [
            llm.tokenize(f"{text} {word}".encode())[len(prompt) :]
            for word in ("Paris", "Reykjavik", "a cucumber", "Lyon")
        ]
        assert {len(choice) for choice in choices} > {1}
        found = score_choices(llm, prompt, choices)
        check(found, [expected(llm, choice, prompt) for choice in choices])
        assert max(range(4), key=lambda i: found[i].logprob) == 0
