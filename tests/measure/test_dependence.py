"""Chunks that resemble their neighbours: who is drawn, and how often an interval leaves out the truth."""

from __future__ import annotations

import os

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import binomtest

from ggufloop.errors import UsageError
from ggufloop.measure.dependence import paired_mean, paired_ratio
from ggufloop.measure.stats import Estimate, mean_interval, paired_bootstrap
from ggufloop.measure.verdict import HELPS, HURTS, SAME, judge

RUNS = int(os.environ.get("CALIBRATION_RUNS", "400"))


def text(rng: np.random.Generator, n: int, correlation: float) -> np.ndarray:
    """Differences of neighbouring chunks, an AR(1) process of variance 1."""
    steps = rng.standard_normal(n + 50)
    x: np.ndarray = lfilter([1], [1, -correlation], steps)[50:] * np.sqrt(1 - correlation**2)
    return x


def covers(x: np.ndarray, mean: float) -> bool:
    e = mean_interval(x)
    return e.low <= mean <= e.high


def is_at_most(hits: int, share: float) -> bool:
    return bool(binomtest(hits, RUNS, share, "greater").pvalue > 1e-3)


@pytest.mark.parametrize("correlation", [0.2, 0.4])
@pytest.mark.parametrize(("n", "documents"), [(8, 1), (30, 1), (64, 1), (120, 1), (1000, 1), (240, 4), (240, 12)])
def test_words_of_dependent_chunks(n: int, documents: int, correlation: float) -> None:
    rng = np.random.default_rng(n)
    labels = np.arange(n) * documents // n
    worth = 9 / np.sqrt(n)
    helps = hurts = same = 0
    for _ in range(RUNS):
        x = np.concatenate([text(rng, n // documents, correlation) for _ in range(documents)])
        word = judge(x, worth, documents=labels).word
        helps, hurts = helps + (word == HELPS), hurts + (word == HURTS)
        same += judge(x + worth, worth, documents=labels).word == SAME
    assert is_at_most(helps, 0.05)
    assert is_at_most(hurts, 0.05)
    assert is_at_most(same, 0.05)


def test_as_it_was_before() -> None:
    """Chunks taken as independent: a text of correlation .4 "helps" in nearly twice 5 %, and hurts as often."""
    rng = np.random.default_rng(3)
    found = [paired_bootstrap(text(rng, 120, 0.4), seed=i, resamples=300) for i in range(RUNS)]
    assert sum(e.p <= 0.05 and e.mean > 0 for e in found) > 0.07 * RUNS


def test_the_first_chunks_are_no_sample() -> None:
    """Of a text that changes as it goes, 60 consecutive chunks miss the mean of 240 far oftener than 60 random ones."""
    rng = np.random.default_rng(4)
    first = drawn = 0
    for seed in range(RUNS):
        whole = text(rng, 240, 0.2) + 0.5 * np.cumsum(text(rng, 240, 0.0)) / np.sqrt(60)
        mean = whole.mean()
        chosen = np.random.default_rng(seed).permutation(240)[:60]  # as `TextMeasure` numbers them
        first += covers(whole[:60], mean)
        drawn += covers(whole[chosen], mean)
    assert first < 0.75 * RUNS
    assert drawn > 0.94 * RUNS


def test_independent_items_are_students() -> None:
    x = np.random.default_rng(5).normal(1, 2, 30)
    ours, theirs = paired_mean(x), mean_interval(x)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    same = paired_mean([2.0, 2.0, 2.0])
    assert (same.low, same.high, same.p) == (2.0, 2.0, 0.25)


def test_clusters_of_one_size_are_their_means() -> None:
    x = np.random.default_rng(6).normal(1, 2, (12, 5))
    ours = paired_mean(x.ravel(), np.repeat(np.arange(12), 5))
    theirs = mean_interval(x.mean(axis=1))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize(("n", "correlation"), [(12, 0.0), (24, 0.4), (120, 0.4)])
def test_a_ratio_covers(n: int, correlation: float) -> None:
    """Ratios whose truth is 1.5, of numbers above 0 that share what makes a chunk hard, and whose noise is alike in
    neighbours: what is shared widens no interval, the noise does."""
    rng, held, widths = np.random.default_rng(4), 0, []
    for _ in range(RUNS):
        hard = np.exp(0.5 * text(rng, n, correlation))
        a, b = 1.5 * hard * (1 + 0.1 * text(rng, n, correlation)), hard
        e = paired_ratio(a, b, np.zeros(n))
        held += e.low <= 1.5 <= e.high
        widths.append(e.high - e.low)
    assert binomtest(held, RUNS, 0.95, alternative="less").pvalue > 0.001
    assert np.median(widths) < 6 * 1.5 * 0.1 / np.sqrt(n) * 1.8


def test_a_ratio_of_the_same_is_1() -> None:
    x = [0.1, 0.7, 0.2]
    assert paired_ratio(x, x) == Estimate(1.0, 1.0, 1.0, 3)
    with pytest.raises(UsageError, match="a ratio to 0 is not defined"):
        paired_ratio([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(UsageError, match="2 and 3 items are not pairs"):
        paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0])


def test_errors() -> None:
    with pytest.raises(UsageError, match="3 differences and 2 documents"):
        paired_mean([1.0, 2.0, 3.0], [0, 1])
