"""Each word is wrong in at most 5 %: exactly for answers, whose counts can be enumerated, and by simulation for scores.

CALIBRATION_RUNS=20000 pytest tests/measure/test_verdict.py        # the same at length
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.stats
from scipy.stats import binom, binomtest

from ggufloop.errors import UsageError
from ggufloop.measure.stats import flips_interval, paired_bootstrap
from ggufloop.measure.verdict import (
    EFFECTS,
    HELPS,
    HURTS,
    SAME,
    UNSURE,
    adjusted_level,
    chances,
    chances_of_mean,
    judge,
    judge_flips,
)

RUNS = int(os.environ.get("CALIBRATION_RUNS", "400"))
SIZES = (8, 60, 282, 1200, 14_042)


def counts(n: int, up: float, down: float) -> Iterator[tuple[int, int, float]]:
    """(gained, lost, probability) of n answers, all but 1e-3 of it."""
    for b in range(int(binom.ppf(2e-4, n, up)), int(binom.isf(2e-4, n, up)) + 1):
        rest = down / (1 - up)
        likely = float(binom.pmf(b, n, up))
        for c in range(int(binom.ppf(2e-4, n - b, rest)), int(binom.isf(2e-4, n - b, rest)) + 1):
            yield b, c, likely * pmf(c, n - b, rest)


def pmf(k: int, n: int, p: float) -> float:
    """The binomial's; scipy's is slow one by one."""
    if p == 0:
        return float(k == 0)
    return math.exp(
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    )


def said(n: int, effect: float, flips: float, worth: float) -> dict[str, float]:
    """The probability of each word."""
    found = dict.fromkeys((HELPS, HURTS, SAME, UNSURE), 0.0)
    for b, c, likely in counts(n, (flips + effect) / 2, (flips - effect) / 2):
        found[judge_flips(b, c, n, worth).word] += likely
    return found


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("flips", [0.01, 0.06])
def test_no_effect_is_seldom_called_one(n: int, flips: float) -> None:
    found = said(n, 0.0, flips, 0.01)
    assert found[HELPS] == pytest.approx(found[HURTS], abs=1e-3)
    assert found[HELPS] <= 0.025
    if n == 14_042:
        assert found[SAME] > 0.95


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("worth", "flips"), [(0.01, 0.01), (0.01, 0.02), (0.05, 0.05), (0.05, 0.06)])
def test_an_effect_of_worth_is_seldom_called_none(n: int, worth: float, flips: float) -> None:
    """Even where each flip goes one way, so that a few questions show none."""
    assert said(n, worth, flips, worth)[SAME] <= 0.05
    if worth == 0.01:
        assert said(n, -worth, flips, worth)[SAME] <= 0.05


def tango(n: int, level: float) -> float:
    """Upper end of Tango's score interval where nothing flipped."""
    z = scipy.stats.norm.ppf((1 + level) / 2) ** 2
    return float(z / (n + z))


def test_what_was_taken_for_an_interval_before() -> None:
    """Without a flip the bootstrap's is a point, so that 8 questions excluded everything; Tango's is a little short."""
    old = paired_bootstrap(np.zeros(8))
    assert (old.low, old.high) == (0.0, 0.0)
    ours = flips_interval(0, 0, 8)
    assert ours.low == -ours.high
    assert ours.high == pytest.approx(-math.log(0.025) / 8)  # the rule of three, two-sided
    n, worth = 272, 0.01
    assert tango(n, 0.9) < worth
    assert (1 - worth) ** n > 0.06  # so often nothing flips where each flip helps, in one of a hundred
    assert judge_flips(0, 0, n, worth).word == UNSURE


def test_few_flips_are_no_gain() -> None:
    """4 of 282 became right: the bootstrap's floor counts all items and says p = .02; the coins of 4 flips say .125."""
    diff = np.zeros(282)
    diff[:4] = 1.0
    assert paired_bootstrap(diff, seed=1).p < 0.05
    v = judge(diff, 0.01)
    assert (v.word, v.gain.p) == (UNSURE, 0.125)
    assert v.gain.low < 0 < v.gain.high
    assert v.phrase("question", 282) == f"cannot tell: {v.needed} questions would, and there are 282"


def test_the_gain_that_was_overlooked() -> None:
    """32 right and 2 wrong of 1,200 is no close call; the 60 held-out questions of the sweep could not have told."""
    v = judge_flips(32, 2, 1200, 0.01)
    assert (v.word, v.phrase()) == (HELPS, "helps")
    assert v.gain.p == pytest.approx(6.9e-8, rel=0.02)
    assert v.gain.low > 0.015
    assert {c.effect: c.helps for c in chances(60, 34 / 1200, 0.01, [0.025])}[0.025] < 0.1
    assert {c.effect: c.helps for c in chances(1200, 34 / 1200, 0.01, [0.025])}[0.025] > 0.99


def test_helps_by_less_than_would_matter() -> None:
    v = judge_flips(60, 20, 14_042, 0.01)
    assert v.phrase() == "helps, by less than would matter"
    assert judge_flips(20, 60, 14_042, 0.01).phrase() == "hurts, by less than would matter"
    assert judge_flips(20, 20, 14_042, 0.01).phrase() == "no effect larger than 0.01"


@pytest.mark.parametrize("n", [8, 60, 282])
def test_the_interval_of_flips_is_scipys_limits_joined(n: int) -> None:
    for b, c in [(0, 0), (3, 0), (0, 5), (4, 2)]:
        limits = [(scipy.stats.gamma.ppf(0.025, k) if k else 0.0, scipy.stats.gamma.ppf(0.975, k + 1)) for k in (b, c)]
        low = b - c - math.hypot(b - limits[0][0], limits[1][1] - c)
        ours = flips_interval(b, c, n)
        assert ours.low == pytest.approx(max(-1, low / n), abs=1e-7)
        assert ours.high == pytest.approx(-flips_interval(c, b, n).low)


@pytest.mark.parametrize("n", [20, 282, 1200])
def test_the_interval_of_flips_covers(n: int) -> None:
    for effect, flips in [(0.0, 0.06), (0.02, 0.06), (0.05, 0.05)]:
        inside = sum(
            likely
            for b, c, likely in counts(n, (flips + effect) / 2, (flips - effect) / 2)
            if flips_interval(b, c, n).low <= effect <= flips_interval(b, c, n).high
        )
        assert inside >= 0.95 - 1e-3


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal(n)


def laplace(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.laplace(0, 1 / math.sqrt(2), n)


def lopsided(rng: np.random.Generator, n: int) -> np.ndarray:
    """Skewness 0.5."""
    return (rng.gamma(16, size=n) - 16) / 4


@pytest.mark.parametrize("draw", [normal, laplace, lopsided])
@pytest.mark.parametrize("n", [8, 60, 1000])
def test_scores(draw: Callable[[np.random.Generator, int], np.ndarray], n: int) -> None:
    """sd 1. No effect; then one of x = 4 / sqrt(n), where equivalence can be said and would be wrong."""
    rng = np.random.default_rng(n)
    worth = 4 / math.sqrt(n)
    helps = hurts = same = 0
    for _ in range(RUNS):
        x = draw(rng, n)
        word = judge(x, worth).word
        helps, hurts = helps + (word == HELPS), hurts + (word == HURTS)
        sign = 1 if rng.random() < 0.5 else -1
        same += judge(sign * x + worth, worth).word == SAME
    for wrong in (helps, hurts, same):
        assert binomtest(wrong, RUNS, 0.05, "greater").pvalue > 1e-3


def test_chances_are_those_of_the_words() -> None:
    exact = said(1200, 0.01, 0.06, 0.01)
    simulated = chances(1200, 0.06, 0.01, [0.01], runs=4000)[0]
    assert simulated.helps == pytest.approx(exact[HELPS], abs=0.03)
    assert simulated.unsure == pytest.approx(exact[UNSURE], abs=0.03)
    assert [c.effect for c in chances(8, 0.06, 0.01)] == list(EFFECTS)
    rng = np.random.default_rng(5)
    mean = chances_of_mean(400, 0.2, 0.03, [0.02])[0]
    words = [judge(rng.normal(0.02, 0.2, 400), 0.03).word for _ in range(RUNS)]
    for word, chance in [(HELPS, mean.helps), (HURTS, mean.hurts), (SAME, mean.same), (UNSURE, mean.unsure)]:
        assert words.count(word) / RUNS == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize("paid", [False, True])
def test_five_growing_sizes(paid: bool) -> None:
    """Looking five times says "helps" or "hurts" of nothing in 14 % of runs, unless the looks are paid for."""
    rng = np.random.default_rng(9)
    wrong = 0
    for _ in range(RUNS):
        x = rng.standard_normal(500)
        levels = [adjusted_level(0.05, look, 5) if paid else 0.05 for look in range(1, 6)]
        wrong += any(judge(x[: 100 * i], 9.0, level=a).word in (HELPS, HURTS) for i, a in enumerate(levels, 1))
    if paid:
        assert binomtest(wrong, RUNS, 0.05, "greater").pvalue > 1e-3
    else:
        assert wrong > 0.1 * RUNS


def test_levels_of_looks() -> None:
    assert adjusted_level(0.05, 1) == pytest.approx(0.05)
    assert sum(adjusted_level(0.05, look, 5) for look in range(1, 6)) == pytest.approx(0.05)
    assert adjusted_level(0.05, 1, 2) == pytest.approx(0.00557, abs=1e-5)  # Lan and DeMets's table
    assert adjusted_level(0.05, 2) == 0.025


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judge([1.0], 0.01), "n = 1 items are too few for an interval."),
        (lambda: judge([1.0, 0.0], 0.0), "worth 0 is not a finite number above 0."),
        (lambda: judge_flips(3, 2, 4, 0.01), "3 and 2 flips of 4 items are no counts."),
        (lambda: judge_flips(-1, 2, 4, 0.01), "-1 and 2 flips of 4 items are no counts."),
        (lambda: chances(0, 0.1, 0.01), "a share 0.1 of 0 questions is none."),
        (lambda: chances_of_mean(9, 0.0, 0.01, [0.0]), "n = 9 of standard deviation 0 says nothing."),
        (lambda: adjusted_level(0.05, 0), "look 0 of 1 is none."),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as e:
        call()
    assert e.value.message == message
    assert e.value.hint
