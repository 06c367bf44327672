"""The choice log-probability and its temperature, the guard at chance, and the floor of noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure.endpoints import choice_log_probability, fit_temperature, guard, noise_floor, nudged
from ggufloop.measure.tasks import Item, compare
from ggufloop.measure.verdict import HELPS, HURTS, UNSURE, judge


def questions(rng: np.random.Generator, n: int, sharpness: float = 3.0) -> tuple[list[list[float]], list[int]]:
    """Answers of 2 to 5 each, whose right one is drawn from their softmax; scored `sharpness` times too sure."""
    answers, gold = [], []
    for _ in range(n):
        logits = rng.normal(size=int(rng.integers(2, 6)))
        p = np.exp(log_softmax(logits))
        gold.append(int(rng.choice(len(p), p=p / p.sum())))
        answers.append([float(v) for v in sharpness * logits - rng.normal(40, 10)])
    return answers, gold


def test_choice_is_scipys_softmax() -> None:
    answers, gold = questions(np.random.default_rng(1), 50)
    known = [log_softmax(np.array(row) / 2.5)[g] for row, g in zip(answers, gold, strict=True)]
    assert choice_log_probability(answers, gold, 2.5) == pytest.approx(known)


def test_the_temperature_is_the_one_they_were_drawn_at() -> None:
    answers, gold = questions(np.random.default_rng(2), 4000)
    t = fit_temperature(answers, gold)
    assert t == pytest.approx(3.0, rel=0.1)
    best = minimize_scalar(
        lambda x: -choice_log_probability(answers, gold, x).mean(), bounds=(0.5, 20), method="bounded"
    )
    assert t == pytest.approx(best.x, rel=1e-3)
    assert fit_temperature([[0.0, -1.0]], [0]) == pytest.approx(0.01)  # always right: the coldest
    assert fit_temperature([[0.0, -1.0]], [1]) == pytest.approx(1000)


def test_it_finds_what_accuracy_misses_and_the_raw_one_gets_wrong() -> None:
    """A loop that makes all answers likelier and the right one less so: raw says helps, the choice says hurts."""
    rng = np.random.default_rng(3)
    answers, gold = questions(rng, 800)
    looped = [
        [v + 1.0 - 0.3 * (i == g) + rng.normal(0, 0.3) for i, v in enumerate(row)]
        for row, g in zip(answers, gold, strict=True)
    ]
    raw = [b[g] - a[g] for a, b, g in zip(answers, looped, gold, strict=True)]
    assert judge(raw, 0.01).word == HELPS
    c = compare(items(answers, gold), items(looped, gold))
    assert c.choice is not None
    assert c.choice.word == HURTS
    assert c.verdict.word in (HURTS, UNSURE)
    assert c.verdict.gain.p > 100 * c.choice.gain.p
    assert c.guard is not None
    assert not c.guard.at_chance


def items(answers: list[list[float]], gold: list[int]) -> list[Item]:
    return [
        Item("t", i, float(int(np.argmax(row)) == g), row[g], tuple(row), g)
        for i, (row, g) in enumerate(zip(answers, gold, strict=True))
    ]


def test_tasks_without_answers_have_no_choice() -> None:
    some = [Item("t", i, 1.0, None) for i in range(9)]
    assert (compare(some, some).choice, compare(some, some).guard) == (None, None)


def test_a_model_at_chance_cannot_judge() -> None:
    rng = np.random.default_rng(4)
    gold = rng.integers(4, size=100)
    chosen = np.where(rng.random(100) < 0.9, 1, rng.integers(4, size=100))
    g = guard((chosen == gold).astype(float), chosen.tolist(), [4] * 100)
    assert g.at_chance
    assert (g.chance, sum(g.letters)) == (0.25, pytest.approx(1))
    assert g.letters[1] > 0.85
    assert "not above chance, 0.250; 9" in g.sentence()
    assert "of its answers are B" in g.sentence()
    good = guard(np.ones(60), gold[:60].tolist(), [4] * 60)
    assert (good.at_chance, good.sentence()) == (False, "")


def test_noise_floor() -> None:
    assert nudged(LoopSpec((2, 5), k=2)).damping == pytest.approx(0.5 - 1e-5, abs=1e-12)
    assert nudged(LoopSpec((2, 5), k=2, solver="naive")) == LoopSpec((2, 5), k=2, damping=1 - 1e-5)
    scores = np.random.default_rng(5).normal(size=50)
    floor = noise_floor(scores, scores + np.tile([0.01, -0.01], 25))
    assert floor.difference.mean == pytest.approx(0)
    assert floor.typical == pytest.approx(0.01)
    assert floor.changed == 50
    same = noise_floor([1.0, 0.0] * 50, [1.0, 0.0] * 50)
    assert (same.changed, same.difference.high) == (0, pytest.approx(-math.log(0.025) / 100))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choice_log_probability([[0.0]], [1]), "question 0 offers 1 answers, not number 1."),
        (lambda: choice_log_probability([[0.0]], [0, 0]), "1 questions and 2 right answers."),
        (lambda: choice_log_probability([[0.0]], [0], 0.0), "temperature 0 is not a finite number above 0."),
        (
            lambda: choice_log_probability([[0.0, math.inf]], [0]),
            "1 of 2 answers of question 0 are not finite numbers.",
        ),
        (lambda: guard([1.0], [4], [4]), "question 0 offers 4 answers, not number 4."),
        (lambda: guard([1.0], [4, 1], [4]), "1, 2 and 1 questions are not the same."),
        (lambda: noise_floor([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3 items are not pairs."),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as e:
        call()
    assert e.value.message == message
    assert e.value.hint
