"""The diffusion sampler on models whose right answer is known: what it returns, in which order, in how many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufloop.errors import UsageError
from ggufloop.generate.diffusion import Decided, Head, Schedule, denoise

MASK, VOCABULARY = 9, 12
PROMPT = [1, MASK, 2]
TEXT = [3, 4, 5, 6, 7, 8, 0, 1]
RANKS = [2, 7, 0, 5, 1, 6, 3, 4]  # the position the model is most certain of has rank 0

Answer = Callable[[list[int]], tuple[list[int], list[float]]]


class Known:
    """A model that knows the answer: `answer(text so far)` gives a token and a logit margin for each of its places.

    Every row that is not asked for wants token 11, and every row wants the mask most of all.
    """

    def __init__(self, shifted: bool, answer: Answer | None = None, n_ctx: int = 64) -> None:
        self.head = Head(MASK, shifted)
        self.answer: Answer = answer or (lambda text: (TEXT, [9.0 - rank for rank in RANKS]))
        self.seen: list[list[int]] = []
        self._n_ctx = n_ctx
        self._empty = True

    def n_ctx(self) -> int:
        return self._n_ctx

    def reset(self) -> None:
        self._empty = True

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        assert self._empty, "evaluated after something else"
        self._empty = False
        self.seen.append(list(tokens[len(PROMPT) :]))
        assert list(tokens[: len(PROMPT)]) == PROMPT
        rows = np.zeros((len(tokens), VOCABULARY), dtype=np.float32)
        rows[:, 11] = 5.0
        rows[:, MASK] = 20.0
        start = len(PROMPT) - self.head.shifted
        for i, (token, margin) in enumerate(zip(*self.answer(self.seen[-1]), strict=True)):
            rows[start + i] = 0.0
            rows[start + i, token] = margin
            rows[start + i, MASK] = 20.0
        return rows


def order(steps: Sequence[Decided]) -> list[list[int]]:
    return [[position for position, _ in step.kept] for step in steps]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("n_steps", [1, 3, 8])
def test_the_known_text_comes_out_most_certain_places_first(shifted: bool, n_steps: int) -> None:
    model = Known(shifted)
    shown: list[list[int]] = []
    result = denoise(model, model.head, PROMPT, Schedule(8, n_steps), lambda step, answer: shown.append(list(answer)))
    assert list(result.tokens) == TEXT
    assert len(model.seen) == len(result.steps) == n_steps
    by_rank = sorted(range(8), key=lambda position: RANKS[position])
    assert [p for step in order(result.steps) for p in step] == by_rank
    assert [len(step.kept) for step in result.steps] == {1: [8], 3: [3, 3, 2], 8: [1] * 8}[n_steps]
    assert [step.number for step in result.steps] == list(range(1, n_steps + 1))
    text = [MASK] * 8
    for step, seen, after in zip(result.steps, model.seen, shown, strict=True):
        assert seen == text
        for position, token in step.kept:
            assert token == TEXT[position]
            text[position] = token
        assert after == text


def test_blocks_are_filled_from_the_left() -> None:
    model = Known(False)
    result = denoise(model, model.head, PROMPT, Schedule(8, 4, block=4))
    assert list(result.tokens) == TEXT
    assert order(result.steps) == [[2, 0], [3, 1], [4, 6], [7, 5]]


def test_what_is_not_kept_is_drawn_anew() -> None:
    """The model is wrong about every place until the ones before it are known."""

    def answer(text: list[int]) -> tuple[list[int], list[float]]:
        known = text.index(MASK)
        right = [TEXT[i] if i <= known else 10 for i in range(8)]
        return right, [8.0 - i for i in range(8)]

    model = Known(False, answer)
    result = denoise(model, model.head, PROMPT, Schedule(8, 8))
    assert list(result.tokens) == TEXT
    hasty = denoise(model, model.head, PROMPT, Schedule(8, 4))
    assert list(hasty.tokens) == [t if i % 2 == 0 else 10 for i, t in enumerate(TEXT)], "two at once: every other wrong"


def test_a_text_of_equal_certainty_is_written_from_the_left() -> None:
    model = Known(False, lambda text: ([4] * 8, [3.0] * 8))
    assert order(denoise(model, model.head, PROMPT, Schedule(8, 4)).steps) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_temperature_draws_from_the_softmax_and_certainty_stays_the_models_own() -> None:
    n, temp = 4000, 0.7
    logits = np.array([1.0, 0.0, -1.0])

    class Flat:
        def n_ctx(self) -> int:
            return n + 1

        def reset(self) -> None: ...

        def logits(self, tokens: Sequence[int]) -> np.ndarray:
            return np.tile(np.array([*logits, 50.0], dtype=np.float32), (len(tokens), 1))

    def run(seed: int, temp: float = temp, steps: int = 1) -> list[tuple[int, int]]:
        head, schedule = Head(mask=3, shifted=False), Schedule(n, steps, temp=temp, seed=seed)
        return [kept for step in denoise(Flat(), head, [0], schedule).steps for kept in step.kept]

    drawn = run(1)
    counts = np.bincount([token for _, token in drawn], minlength=4)
    expected = np.exp(logits / temp) / np.exp(logits / temp).sum()
    chi_square = (((counts[:3] - n * expected) ** 2) / (n * expected)).sum()
    assert counts[3] == 0
    assert chi_square < 13.8, "2 degrees of freedom, 0.1 %"
    certain = [token for _, token in drawn]
    assert certain == sorted(certain), "the likelier token is the more certain one, however it was drawn"
    assert run(1) == drawn
    assert run(2) != drawn
    assert run(1, temp=0.0) == run(2, temp=0.0) == [(i, 0) for i in range(n)]


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_counts_share_the_answer_out(blocks: int, width: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, width))
    counts = Schedule(blocks * width, blocks * steps, block=width).counts()
    assert len(counts) == blocks
    for each in counts:
        assert (sum(each), len(each)) == (width, steps)
        assert max(each) - min(each) <= 1
        assert min(each) >= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n 0 is less than 1."),
        ({"n": 8, "steps": 9}, "steps 9 is not in the range 1 to 8, the tokens of the answer."),
        ({"n": 8, "steps": 0}, "steps 0 is not in the range 1 to 8, the tokens of the answer."),
        ({"temp": -0.1}, "temp -0.1 is not a number of 0 or more."),
        ({"temp": float("nan")}, "temp nan is not a number of 0 or more."),
        ({"seed": -1}, "seed -1 is negative."),
        ({"n": 8, "steps": 8, "block": 3}, "block 3 does not divide n 8."),
        ({"n": 8, "steps": 8, "block": 0}, "block 0 does not divide n 8."),
        ({"n": 8, "steps": 3, "block": 4}, "steps 3 cannot be shared by 2 blocks."),
    ],
)
def test_schedules_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as e:
        Schedule(**values)  # type: ignore[arg-type]
    assert e.value.message == message
    assert e.value.hint


def test_texts_that_do_not_fit() -> None:
    model = Known(False, n_ctx=10)
    with pytest.raises(UsageError, match=r"^the prompt has 3 tokens and the answer 8; the context holds 10\.$"):
        denoise(model, model.head, PROMPT, Schedule(8, 8))
    with pytest.raises(UsageError, match=r"^the prompt is empty\.$"):
        denoise(model, Head(MASK, shifted=True), [], Schedule(8, 8))
    assert model.seen == []


def test_the_head_is_what_the_file_says() -> None:
    def head(**metadata: str) -> Head:
        return Head.of(SimpleNamespace(metadata={k.replace("__", "."): v for k, v in metadata.items()}))

    llada = {"tokenizer__ggml__mask_token_id": "126336", "diffusion__shift_logits": "false"}
    assert head(**llada) == Head(126336, shifted=False)
    assert head(tokenizer__ggml__mask_token_id="5") == Head(5, shifted=True)
    assert head(tokenizer__ggml__mask_token_id="5", diffusion__shift_logits="true") == Head(5, shifted=True)
    with pytest.raises(UsageError, match=r"^this model has no mask token"):
        head()
