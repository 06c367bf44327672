"""Multiple-choice log-probabilities against those of `LoopedLlama.logits`, plain and under every K/V policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from ggufloop.backend.batches import IN_STEP
from ggufloop.engine import LoopedLlama
from ggufloop.errors import UsageError
from ggufloop.measure.multiple_choice import ChoiceQuestion, ScoredChoice, score_questions

TinyModel = Callable[[str], Path]
_RNG = np.random.default_rng(3)
PROMPT = _RNG.integers(0, 256, 37).tolist()
CHOICES = [_RNG.integers(0, 256, n).tolist() for n in (1, 2, 5, 2, 1, 9)]
LOOPS = [None, "k=3", "k=2 solver=naive kv=each", "k=3 kv=frozen", "k=2 kv=last", "k=3 beta=0.5 mode=layer"]


def score_choices(llm: LoopedLlama, prompt: list[int], choices: list[list[int]]) -> list[ScoredChoice]:
    """Those of a single question."""
    return next(scored for _, scored in score_questions(llm, [ChoiceQuestion(prompt, choices)]))


@contextmanager
def opened(path: Path, loop: str | None, n_seq: int = 16, **settings: object) -> Iterator[LoopedLlama]:
    llm = LoopedLlama(
        path, n_ctx=256, n_seq=n_seq, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn=False,
        verbose=False, loop=loop, **settings,
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
        check(backwards[::-1], found)  # rounding depends on the place in a batch


def quiz(seed: int, n: int, begin: int = 0) -> list[ChoiceQuestion]:
    """Questions of 1 to 60 tokens after `begin` common ones, with 1 to 5 choices of 1 to 9."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 256, begin).tolist()

    def some(most: int) -> list[int]:
        return rng.integers(0, 256, rng.integers(1, most + 1)).tolist()

    return [ChoiceQuestion(common + some(60), [some(9) for _ in range(rng.integers(1, 6))]) for _ in range(n)]


def check_quiz(llm: LoopedLlama, questions: list[ChoiceQuestion]) -> None:
    """Every question is answered, once, as it is alone."""
    found = dict(score_questions(llm, questions))
    assert sorted(found) == list(range(len(questions)))
    for i, question in enumerate(questions):
        check(found[i], [expected(llm, list(choice), list(question.prompt)) for choice in question.choices])


@pytest.mark.parametrize("settings", [*LOOPS, "k=4 halt=0.2", "k=3 attention=8 sinks=1"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3moe", "deepseek2"])
def test_questions_in_one_batch_do_not_see_each_other(tiny_model: TinyModel, family: str, settings: str | None) -> None:
    """Batches of 64 tokens, so several are needed, and four sequences, so answers take turns."""
    for n_seq in (8, 64):
        with opened(tiny_model(family), spec(family, settings), n_seq=n_seq, n_batch=64, n_ubatch=64) as llm:
            check_quiz(llm, quiz(1, 7))


@pytest.mark.parametrize("settings", [None, "k=3 kv=frozen", "k=2 solver=naive kv=each", "k=3"])
def test_a_common_beginning_is_read_once(tiny_model: TinyModel, settings: str | None) -> None:
    questions = quiz(2, 8, begin=50) + quiz(3, 3)
    with opened(tiny_model("llama"), spec("llama", settings), n_batch=128, n_ubatch=128) as llm:
        evaluated = 0
        whole = llm.evaluate_parts

        def counted(parts, take):
            nonlocal evaluated
            evaluated += sum(len(part.tokens) for part in parts)
            whole(parts, take)

        llm.evaluate_parts = counted
        check_quiz(llm, questions)
        tokens = sum(len(q.prompt) + sum(len(c) - 1 for c in q.choices) for q in questions)
        saved = 0 if settings == "k=3" else 7 * 50  # with kv first the cut would show
        assert tokens - evaluated == pytest.approx(saved, abs=7)  # chance may make beginnings longer


def test_questions_that_just_fit(tiny_model: TinyModel) -> None:
    """The context holds each with its longest answer, and no two; prompts and answers are longer than a batch."""
    rng = np.random.default_rng(4)
    some = lambda n: rng.integers(0, 256, n).tolist()  # noqa: E731
    questions = [
        ChoiceQuestion(some(200), [some(57), some(3)]),
        ChoiceQuestion(some(150), [some(100)]),
        ChoiceQuestion(some(3), [some(4)]),
    ]
    for settings in (None, "k=3 kv=frozen", "k=3"):
        with opened(tiny_model("llama"), spec("llama", settings), n_batch=32, n_ubatch=32) as llm:
            check_quiz(llm, questions)


@pytest.mark.parametrize("family", list(tiny.HYBRIDS))
def test_recurrent_states_advance_alone(tiny_model: TinyModel, family: str) -> None:
    for settings in (None, "k=2"):
        with opened(tiny_model(family), spec(family, settings)) as llm:
            assert llm.n_seq == IN_STEP  # each costs the memory of a state
            assert llm.in_step
            check_quiz(llm, [*quiz(5, 4), *quiz(6, 3, begin=40)])


def test_a_single_sequence_cannot_answer(tiny_model: TinyModel) -> None:
    with opened(tiny_model("llama"), None, n_seq=1) as llm, pytest.raises(UsageError, match="a single sequence"):
        score_choices(llm, PROMPT, CHOICES)
    with opened(tiny_model("llama"), None, n_seq=2) as llm:
        check(score_choices(llm, PROMPT, CHOICES), [expected(llm, choice) for choice in CHOICES])


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


@pytest.mark.model
@pytest.mark.parametrize("settings", [None, "k=3"])
def test_packing_a_real_model(smollm2_f32: Path, settings: str | None) -> None:
    """Questions of words, twelve in a batch, against each alone: in exact arithmetic the rest is rounding.

    Quantised files are computed with 8-bit activations, whose rounding depends on the kernel that a batch's size
    chooses: there the same answers differ by tenths of a nat.
    """
    words = ["tree", "river", "music", "iron", "winter", "dance", "paper", "cloud", "bread", "ship", "king", "glass"]
    with opened(smollm2_f32, None if settings is None else f"12:16 {settings}", n_seq=64, n_batch=512) as llm:
        choices = [llm.tokenize(f" a kind of {word}".encode(), add_bos=False) for word in words[:4]]
        questions = [ChoiceQuestion(llm.tokenize(f"The word {w} means".encode()), choices) for w in words]
        found = dict(score_questions(llm, questions))
        for i in (0, 5, 11):
            alone = score_choices(llm, questions[i].prompt, choices)
            assert [c.logprob for c in found[i]] == pytest.approx([c.logprob for c in alone], abs=2e-3)
