"""Intervals and tests against scipy, published values, enumeration, and simulations of what they promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from ggufloop.errors import UsageError
from ggufloop.measure import stats
from ggufloop.measure.stats import (
    Estimate,
    holm,
    mcnemar_exact,
    mean_interval,
    n_for_power,
    paired_bootstrap,
    perplexity,
    ratio_interval,
    wilson,
)

RUNS = 1000


def agrees(hits: int, runs: int, share: float) -> bool:
    """Whether `hits` of `runs` is what a probability `share` gives, but for one simulation in 2,000."""
    return scipy.stats.binomtest(hits, runs, share).pvalue > 0.0005


def test_t_is_scipys() -> None:
    for df in [*range(1, 140), 300, 1000, 50_000]:
        for q in (0.5, 0.6, 0.9, 0.975, 0.9999):
            assert stats.t_quantile(q, df) == pytest.approx(scipy.stats.t.ppf(q, df), rel=1e-8, abs=1e-12)
            if q > 0.5:
                assert stats.t_within(scipy.stats.t.ppf(q, df), df) == pytest.approx(2 * q - 1, rel=1e-8)
            assert stats.t_quantile(1 - q, df) == pytest.approx(scipy.stats.t.ppf(1 - q, df), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (9, 0.9), (500, 0.99)])
def test_mean_interval_is_scipys(n: int, level: float) -> None:
    x = np.random.default_rng(n).normal(3, 2, n)
    theirs = scipy.stats.ttest_1samp(x, 0).confidence_interval(level)
    ours = mean_interval(x, level)
    assert (ours.mean, ours.n, ours.level) == (pytest.approx(x.mean()), n, level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-7)


def test_mean_interval_covers() -> None:
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(1, 1, 7)) for _ in range(RUNS)]
    assert agrees(sum(i.low <= 1 <= i.high for i in intervals), RUNS, 0.95)


def few(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 1, 12)


def heavy(rng: np.random.Generator) -> np.ndarray:
    return rng.laplace(0, 0.2, 200)


def flips(rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-1.0, 0.0, 1.0], size=600, p=[0.04, 0.92, 0.04])


def many(rng: np.random.Generator) -> np.ndarray:
    return rng.laplace(0, 0.2, 3000)


@pytest.mark.parametrize("draw", [few, heavy, flips, many])
def test_bootstrap_covers(draw: Callable[[np.random.Generator], np.ndarray]) -> None:
    """The interval covers the true difference, 0, as often as it says, and p is below 5 % as often as it should be."""
    rng = np.random.default_rng(2)
    found = [paired_bootstrap(draw(rng), seed=run, resamples=600) for run in range(RUNS)]
    assert agrees(sum(e.low <= 0 <= e.high for e in found), RUNS, 0.95)
    assert agrees(sum(e.p <= 0.05 for e in found), RUNS, 0.05)


def expanded(level: float, n: int) -> float:
    """The level at which the plain percentile interval is the expanded one."""
    bound = scipy.stats.t.ppf((1 + level) / 2, n - 1) * math.sqrt(n / (n - 1))
    return float(1 - 2 * scipy.stats.norm.sf(bound))


def percentile(x: np.ndarray, level: float) -> tuple[float, float]:
    found = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=50_000, batch=500, rng=4, method="percentile", confidence_level=level
    )
    return found.confidence_interval.low, found.confidence_interval.high


@pytest.mark.parametrize("n", [8, 60, 1500])
def test_bootstrap_is_scipys(n: int) -> None:
    """Resampled one by one, and by cells of neighbours; long, lopsided tails."""
    x = np.random.default_rng(3).exponential(size=n) ** 2 - 2
    ours = paired_bootstrap(x, seed=1, resamples=50_000)
    low, high = percentile(x, expanded(0.95, n))
    assert ours.mean == pytest.approx(x.mean())
    assert ours.sd == pytest.approx(x.std(ddof=1))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.02 * (high - low))
    if n < 100:  # a normal interval would be symmetric, as this one becomes with more items
        assert ours.high - ours.mean > 1.05 * (ours.mean - ours.low)


@pytest.mark.parametrize("body", ["two values", "normal"])
def test_cells_of_neighbours_keep_the_variance(body: str) -> None:
    """More outliers than have cells of their own, and a cell whose values come up thousands of times."""
    rng = np.random.default_rng(12)
    x = rng.choice([-20.0, 20.0], 6000) if body == "two values" else rng.normal(size=6000)
    far = 40 * rng.normal(size=200)
    x[:200] = far + 20 * np.sign(far)
    _, means = stats._resampled_means(x, 1, 20_000)
    assert means.std() == pytest.approx(x.std() / math.sqrt(6000), rel=0.02)  # 4 standard errors


def test_bootstrap_p_and_interval_agree() -> None:
    """p <= 1 - level exactly when the interval excludes 0, on either side of it."""
    rng = np.random.default_rng(5)
    rejected = 0
    for run in range(40):
        x = rng.choice([-1, 1]) * (rng.exponential(size=60) - 0.75)  # skewed either way
        e = paired_bootstrap(x, seed=run, resamples=2000)
        assert (e.p <= 0.05) == (not e.low <= 0 <= e.high) or abs(e.p - 0.05) < 0.001
        rejected += e.p <= 0.05
    assert 5 < rejected < 35  # both verdicts occurred


@pytest.mark.parametrize(("shift", "n"), [(0.6, 6), (-0.35, 60), (0.25, 60), (0.14, 300)])
def test_bootstrap_p_is_where_scipys_interval_ends_at_zero(shift: float, n: int) -> None:
    """Few items, where t matters, and both sides of where it changes from its series to its expansion."""
    x = np.random.default_rng(11).exponential(size=n) - 1 + shift
    p = paired_bootstrap(x, seed=1, resamples=50_000).p
    assert 0.001 < p < 0.5
    low, high = percentile(x, expanded(1 - p, n))
    assert min(abs(low), abs(high)) < 0.02 * (high - low)


def test_bootstrap_is_paired_and_repeats() -> None:
    """What both share on an item cancels, however large; the same seed gives the same digits, another one others."""
    rng = np.random.default_rng(6)
    shared, noise = rng.normal(0, 100, 400), rng.normal(0.1, 0.2, 400)
    e = paired_bootstrap(shared + noise, shared, seed=7)
    alone = paired_bootstrap(noise, seed=7)
    assert (e.low, e.high) == pytest.approx((alone.low, alone.high), abs=1e-3)
    assert e == paired_bootstrap(shared + noise, shared, seed=7)
    assert e != paired_bootstrap(shared + noise, shared, seed=8)


def test_bootstrap_of_few_or_equal_differences() -> None:
    """Three differences of one sign prove little, whatever their resamples say."""
    assert paired_bootstrap([1.0, 1.1, 1.2]).p == 0.25
    same = paired_bootstrap([0.5] * 4)
    assert (same.mean, same.low, same.high, same.n, same.p) == (0.5, 0.5, 0.5, 4, 0.125)
    assert paired_bootstrap([0.0] * 400).p == 1.0


def test_mcnemar_against_enumeration() -> None:
    for n in range(1, 11):
        ways = [sum(way) for way in itertools.product((0, 1), repeat=n)]
        for b in range(n + 1):
            extreme = sum(abs(w - n / 2) >= abs(b - n / 2) for w in ways) / 2**n
            assert mcnemar_exact(b, n - b) == pytest.approx(extreme, rel=1e-12)
    assert mcnemar_exact(0, 0) == 1.0
    for b, c in [(20_000, 20_700), (3, 900), (0, 5000)]:
        assert mcnemar_exact(b, c) == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue, rel=1e-8)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(k: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    e = wilson(k, n)
    assert (round(e.low, 4), round(e.high, 4), e.n, e.mean) == (low, high, n, k / n)
    mirrored = wilson(n - k, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((e.low, e.high), abs=1e-12)


def test_wilson_is_scipys_at_other_levels() -> None:
    for k, n, level in [(5, 9, 0.8), (700, 1000, 0.99), (12, 12, 0.95)]:
        theirs = scipy.stats.binomtest(k, n).proportion_ci(level, method="wilson")
        ours = wilson(k, n, level)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_holm_by_hand() -> None:
    """Sorted .005 .01 .03 .04: times 4, 3, 2, 1 is .02 .03 .06 .04, and the last may not be below the third."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == pytest.approx([0.03])
    assert len(holm([])) == 0


def test_holm_keeps_the_family_error() -> None:
    """Some of the tests are of true effects; still at most 5 % of families reject a null that holds."""
    rng = np.random.default_rng(8)
    p = rng.uniform(size=(4000, 5))
    p[:, :2] /= 1e6
    false = sum(bool((holm(row)[2:] <= 0.05).any()) for row in p)
    assert agrees(false, 4000, 1 - (1 - 0.05 / 3) ** 3)


@pytest.mark.parametrize(("effect", "sd", "power"), [(0.5, 1.0, 0.8), (0.1, 0.5, 0.8), (-0.3, 1.0, 0.9)])
def test_n_for_power(effect: float, sd: float, power: float) -> None:
    """The exact power of the t test at that n, from the noncentral t; a simulation; and too few below it."""

    def exact(n: int) -> float:
        shift, bound = abs(effect) / sd * math.sqrt(n), scipy.stats.t.ppf(0.975, n - 1)
        return float(scipy.stats.nct.sf(bound, n - 1, shift) + scipy.stats.nct.cdf(-bound, n - 1, shift))

    n = n_for_power(effect, sd, power)
    assert exact(n) >= power - 0.001
    assert exact(n - 2) < power
    rng = np.random.default_rng(9)
    samples = rng.normal(effect, sd, (2000, n))
    found = int((scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue <= 0.05).sum())
    assert agrees(found, 2000, exact(n))


def test_perplexity_is_the_delta_method() -> None:
    """Through the numerical gradient of exp(mean) and the sample covariance of the tokens; and a simulation."""
    rng = np.random.default_rng(10)
    nll = rng.gamma(2, 1.5, 300)
    gradient = np.array([
        (math.exp((nll.sum() + h) / 300) - math.exp((nll.sum() - h) / 300)) / (2 * h) for h in [1e-3] * 300
    ])  # fmt: skip
    ppl, error = perplexity(nll)
    assert ppl == pytest.approx(float(scipy.stats.gmean(np.exp(nll))))
    assert error == pytest.approx(math.sqrt(float(gradient @ gradient) * nll.var(ddof=1)), rel=1e-6)
    texts = [perplexity(rng.gamma(2, 1.5, 3000)) for _ in range(400)]
    spread = np.std([t.ppl for t in texts], ddof=1)
    assert np.mean([t.error for t in texts]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(("n", "level"), [(2, 0.5), (5, 0.9375), (7, 0.984375), (24, 0.9773)])
def test_ratio_interval_covers_what_it_says(n: int, level: float) -> None:
    rng = np.random.default_rng(n)
    machine = rng.lognormal(0, 1, (RUNS, n))  # disturbs both times of a round
    found = [ratio_interval(1.2 * m * rng.lognormal(0, 0.3, n), m) for m in machine]
    assert found[0].level == pytest.approx(level, abs=1e-4)
    assert agrees(sum(e.low <= 1.2 <= e.high for e in found), RUNS, level)


def test_ratio_interval_by_hand() -> None:
    """Seven rounds: all below the median or all above it has 2/128, one more would be 16/128 > 5 %. Nine: 20/512."""
    a = [1.0, 7.0, 3.0, 4.0, 6.0, 2.0, 5.0]
    assert ratio_interval(a, [1.0] * 7) == Estimate(4.0, 1.0, 7.0, 7, 1 - 2 / 128)
    assert ratio_interval(np.arange(1, 10), [1.0] * 9) == Estimate(5.0, 2.0, 8.0, 9, 1 - 20 / 512)
    n = 1001
    e = ratio_interval(np.arange(1, n + 1), np.ones(n))
    depth = int(scipy.stats.binom.ppf(0.025, n, 0.5))
    assert (e.mean, e.n) == (501.0, n)
    assert (e.low, e.high) == pytest.approx((depth, n + 1 - depth), abs=1)


def test_it_says_what_it_rests_on() -> None:
    assert Estimate(0.5, 0.25, 0.75, 12).show(".2f") == "0.50 [0.25, 0.75], n = 12"
    assert ratio_interval([1.0] * 5, [1.0] * 5).show(".1f") == "1.0 [1.0, 1.0] (93.75 %), n = 5"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0]), "n = 1 values are too few for an interval."),
        (lambda: mean_interval([[1.0, 2.0]]), "values of shape (1, 2) are not a list of numbers."),
        (lambda: mean_interval([1.0, 2.0], level=95), "level 95 is not in the range 0<x<1."),
        (lambda: paired_bootstrap([], []), "n = 0 items are too few for an interval."),
        (lambda: paired_bootstrap([1, 2, 3], [1, 2]), "3 and 2 items are not pairs."),
        (lambda: paired_bootstrap([1, math.nan, math.inf]), "2 of 3 items are not finite numbers."),
        (lambda: paired_bootstrap([1, 2], resamples=9), "9 resamples are too few for an interval."),
        (lambda: mcnemar_exact(3, -1), "flips 3 and -1 are counts, so not negative."),
        (lambda: wilson(0, 0), "a share of 0 items is not defined."),
        (lambda: wilson(5, 4), "5 of 4 items is not a share."),
        (lambda: holm([0.5, 1.5]), "p-value 1.5 is not in the range 0<=x<=1."),
        (lambda: holm([math.nan]), "1 of 1 p-values are not finite numbers."),
        (lambda: n_for_power(0.0, 1.0), "effect 0 cannot be found by any n."),
        (lambda: n_for_power(0.1, -1.0), "standard deviation -1 is not a finite number >= 0."),
        (lambda: n_for_power(0.1, 1.0, power=1.0), "power 1 is not in the range 0<x<1."),
        (lambda: perplexity([2.0]), "n = 1 tokens are too few for an interval."),
        (lambda: perplexity([2.0, math.nan]), "1 of 2 tokens are not finite numbers."),
        (lambda: ratio_interval([1.0, 2.0], [1.0, 0.0]), "time 0 is not above 0."),
        (lambda: ratio_interval([1.0], [1.0, 2.0]), "n = 1 items are too few for an interval."),
        (lambda: stats.t_quantile(0.9, 0), "0 degrees of freedom are too few."),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as e:
        call()
    assert e.value.message == message
    assert e.value.hint
