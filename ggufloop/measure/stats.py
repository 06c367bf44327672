"""Intervals and tests for small effects: every function returns its estimate with the n it rests on.

    paired_bootstrap(looped, plain, seed=1)      # mean difference on the same items, interval and p
    wilson(k=171, n=282)                         # an accuracy
    flips_interval(gained=32, lost=2, n=1200)    # the difference of two accuracies on the same questions
    ratio_interval(looped_seconds, plain_seconds)
    holm([p1, p2, p3])                           # p-values of several tests, corrected

Needs numpy alone. An item is what was drawn independently of the others: a question or a chunk of text. Tokens of one
text are not independent, so an interval over tokens is too narrow; hand over the mean of each chunk.

Everything is two-sided. What is random takes a seed and is a function of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggufloop.errors import UsageError

Values = NDArray[np.float64]

RESAMPLES = 10_000
_EXACT = 1024  # up to this many items they are resampled one by one
_CELLS = 64  # beyond, so many distinct differences are, and more share cells
_CHUNK = 1 << 19  # resampled items held at once
_SERIES_DF = 120  # from here on the expansion of t in 1/df is exact to 1e-8 at any level in use

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    mean        the estimate (of `ratio_interval` a median, of `wilson` the share itself)
    low, high   the interval
    n           items it rests on
    level       what the interval covers: as asked, or what so few items allow
    """

    mean: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def show(self, form: str = ".4f") -> str:
        """`0.0123 [-0.0010, 0.0256], n = 282`, every number in the format `form`; a level other than 95 % is named."""
        level = "" if math.isclose(self.level, 0.95) else f" ({100 * self.level:.4g} %)"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]{level}, n = {self.n}"

    def mapped(self, rising: Callable[[float], float]) -> Estimate:
        """Of a rising function of it: its ends are those of the interval."""
        return Estimate(rising(self.mean), rising(self.low), rising(self.high), self.n, self.level)


@dataclass(frozen=True)
class PairedEstimate(Estimate):
    """A mean paired difference. p: of the null hypothesis that it is 0; sd: of one difference, for `n_for_power`."""

    p: float = 1.0
    sd: float = 0.0

    def __neg__(self) -> PairedEstimate:
        """Of b - a instead of a - b."""
        return replace(self, mean=-self.mean, low=-self.high, high=-self.low)


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood, and its standard error."""

    ppl: float
    error: float


def mean_interval(x: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of x with Student's interval, mean +- t(n - 1) s / sqrt(n) (Student 1908).

    Raises UsageError for fewer than 2 values, values that are not finite, or a level outside 0..1.
    """
    x = numbers(x, "values", 2)
    _check_share(level, "level")
    mean, n = float(x.mean()), len(x)
    half = t_quantile((1 + level) / 2, n - 1) * float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, level)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike | None = None, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> PairedEstimate:
    """Mean of a - b over items, or of the differences a when b is None, with its bootstrap interval.

    Items are resampled, so what a and b share on an item cancels. The interval is the expanded percentile one
    (Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician 69): percentiles of the
    resampled means, moved outwards by what Student's t has over the normal, as the plain ones are too narrow for few
    items. BCa and the bootstrap t, better for skewed data, rejected a true null too often in simulations of what scores
    look like, heavy tails and rare flips. p is the smallest 1 - level whose interval excludes 0; it is never below
    2 / (resamples + 1), nor below 2^(1-n), which is all that the signs of n differences can say.

    Differences that are all the same have no spread to resample: the interval is then that one point, whatever n.

    Raises UsageError for fewer than 2 items, unequal lengths, values that are not finite, or a level outside 0..1.
    """
    diff = numbers(a, "items", 2) if b is None else np.subtract(*pairs(a, b, 2))
    _check_share(level, "level")
    if resamples < 100:
        raise UsageError(
            f"{resamples} resamples are too few for an interval.", f"use 100 at least, {RESAMPLES} is good."
        )
    n = len(diff)
    floor = min(1.0, max(2 / (resamples + 1), 2.0 ** (1 - n)))
    if (diff == diff[0]).all():
        value = float(diff[0])
        return PairedEstimate(value, value, value, n, level, p=floor if value else 1.0, sd=0.0)
    mean, means = _resampled_means(diff, seed, resamples)
    wider = math.sqrt(n / (n - 1))
    tail = _NORMAL.cdf(-wider * t_quantile((1 + level) / 2, n - 1))
    low, high = (float(v) for v in np.quantile(means, (tail, 1 - tail)))
    p = 1 - t_within(abs(_NORMAL.inv_cdf(_share_below(means, 0.0))) / wider, n - 1)  # the same, solved for the level
    return PairedEstimate(mean, low, high, n, level, p=min(1.0, max(floor, p)), sd=float(diff.std(ddof=1)))


def mcnemar_exact(b: int, c: int) -> float:
    """p of McNemar's exact test (McNemar 1947): b items flipped one way and c the other.

    Under the null hypothesis each of the b + c flips goes either way with probability 1/2, so p is twice the lower
    binomial tail at min(b, c), at most 1. Items that did not flip do not enter. Raises UsageError for a negative count.
    """
    if b < 0 or c < 0:
        raise UsageError(f"flips {b} and {c} are counts, so not negative.", "count the items that changed each way.")
    n, k = int(b + c), int(min(b, c))
    if 2 * k == n:
        return 1.0
    i = np.arange(1, k + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))])  # log of n over 0..k
    return min(1.0, 2 * math.exp(logs[-1] - n * math.log(2)) * float(np.exp(logs - logs[-1]).sum()))


def flips_interval(gained: int, lost: int, n: int, level: float = 0.95) -> PairedEstimate:
    """Difference of two accuracies on the same n items, of which `gained` turned right and `lost` wrong; p: McNemar's.

    The exact limits of the two counts, each taken as Poisson (Garwood 1936), which is a little wider than the
    multinomial, are joined as MOVER joins limits (Zou and Donner 2008, Statistics in Medicine 27): d - lower is the
    root of (gained - its lower limit)^2 + (upper limit of lost - lost)^2, and so upwards. It leaves out 0 where
    McNemar's exact test says so, but for a few counts. Without a flip it is the rule of three, +- 3.7/n at 95 %, and
    no point; Tango's score interval is then +- 3.8/(n + 3.8) and 2.7/(n + 2.7) at 90 %, too short for one in 20.

    Raises UsageError for counts that are negative or more than n together.
    """
    _check_share(level, "level")
    if min(gained, lost) < 0 or gained + lost > n or n < 1:
        raise UsageError(f"{gained} and {lost} flips of {n} items are no counts.", "count the items that changed.")
    (up_low, up_high), (down_low, down_high) = (_poisson_limits(int(k), (1 - level) / 2) for k in (gained, lost))
    low = gained - lost - math.hypot(gained - up_low, down_high - lost)
    high = gained - lost + math.hypot(up_high - gained, lost - down_low)
    mean = (gained - lost) / n
    sd = math.sqrt(max(0.0, (gained + lost) / n - mean * mean) * n / max(1, n - 1))
    return PairedEstimate(mean, max(-1.0, low / n), min(1.0, high / n), n, level, p=mcnemar_exact(gained, lost), sd=sd)


def wilson(k: float, n: int, level: float = 0.95) -> Estimate:
    """A share k/n with Wilson's score interval (Wilson 1927); k may be a sum of n numbers from 0 to 1.

    Raises UsageError unless 0 <= k <= n and n >= 1.
    """
    _check_share(level, "level")
    if n < 1:
        raise UsageError(f"a share of {n} items is not defined.", "score one item at least.")
    if not 0 <= k <= n:
        raise UsageError(f"{k} of {n} items is not a share.", f"the count must be in the range 0<=x<={n}.")
    z = _NORMAL.inv_cdf((1 + level) / 2)
    share = k / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if k == 0 else max(0.0, middle - half)
    high = 1.0 if k == n else min(1.0, middle + half)
    return Estimate(share, low, high, n, level)


def holm(pvalues: ArrayLike) -> Values:
    """p-values corrected for how many there are (Holm 1979), in the order given.

    Rejecting those at or below alpha makes a false rejection among them in at most a share alpha of all such families,
    however the tests depend on each other. Raises UsageError for a value outside 0..1.
    """
    p = numbers(pvalues, "p-values", 0)
    if ((p < 0) | (p > 1)).any():
        raise UsageError(f"p-value {p[(p < 0) | (p > 1)][0]:g} is not in the range 0<=x<=1.", "hand over p-values.")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(stepped, 1.0)
    return out


def n_for_power(effect: float, sd: float, power: float = 0.8, level: float = 0.05) -> int:
    """Items at which a paired test at significance `level` sees a mean difference `effect` with probability `power`.

    sd is of one item's difference (`PairedEstimate.sd`). ((z_a + z_b) sd / effect)^2 + z_a^2 / 2, the normal formula
    with Guenther's term for the t test (Guenther 1981, The American Statistician 35), 3 at least. Put in an *observed*
    effect and the answer is as uncertain as that effect. Raises UsageError for an effect of 0 or a negative sd.
    """
    if not math.isfinite(effect) or effect == 0:
        raise UsageError(f"effect {effect:g} cannot be found by any n.", "use the smallest effect that matters.")
    if not math.isfinite(sd) or sd < 0:
        raise UsageError(f"standard deviation {sd:g} is not a finite number >= 0.", "take it from the differences.")
    _check_share(power, "power")
    _check_share(level, "level")
    za, zb = _NORMAL.inv_cdf(1 - level / 2), _NORMAL.inv_cdf(power)
    return max(3, math.ceil((max(0.0, za + zb) * sd / effect) ** 2 + za * za / 2))


def perplexity(nll: ArrayLike) -> Perplexity:
    """exp(mean) of negative log-likelihoods in nats per token, and its error, as llama-perplexity prints them.

    The error is the delta method's, exp(mean) times the standard error of the mean, sqrt(var / (n - 1)) with var the
    mean square deviation. It takes the tokens as independent. Raises UsageError for fewer than 2 tokens.
    """
    x = numbers(nll, "tokens", 2)
    ppl = math.exp(float(x.mean()))
    return Perplexity(ppl, ppl * math.sqrt(float(x.var()) / (len(x) - 1)))


def ratio_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Median of the paired ratios a / b (times of the same round) with the sign test's interval.

    Order statistics, so any noise will do, outliers included (Conover, Practical Nonparametric Statistics).
    `level` of the result is what the interval covers: `level` at least, or with too few rounds for that (under 6 for
    95 %) 1 - 2^(1-n), the extremes. Raises UsageError for fewer than 2 pairs, unequal lengths or times not above 0.
    """
    times = pairs(a, b, 2)
    _check_share(level, "level")
    for x in times:
        if (x <= 0).any():
            raise UsageError(f"time {x[x <= 0][0]:g} is not above 0.", "ratios need positive times.")
    ratios = np.sort(times[0] / times[1])
    n = len(ratios)
    depth, tail, term = 1, 2.0**-n, 2.0**-n  # tail: probability of fewer than `depth` of n coins
    if n > 1000:  # 2^-n is 0; the normal tail is exact enough
        depth = max(1, math.floor(n / 2 - _NORMAL.inv_cdf((1 + level) / 2) * math.sqrt(n) / 2))
        covered = level
    else:
        while 2 * (tail + term * (n - depth + 1) / depth) <= 1 - level:
            term *= (n - depth + 1) / depth
            tail += term
            depth += 1
        covered = 1 - 2 * tail
    return Estimate(float(np.median(ratios)), float(ratios[depth - 1]), float(ratios[n - depth]), n, covered)


def numbers(x: ArrayLike, what: str, least: int) -> Values:
    """x as a flat float64 array of at least `least` finite values. Raises UsageError for anything else."""
    out = np.asarray(x, dtype=np.float64)
    if out.ndim != 1:
        raise UsageError(f"{what} of shape {out.shape} are not a list of numbers.", "hand over one number per item.")
    if len(out) < least:
        raise UsageError(f"n = {len(out)} {what} are too few for an interval.", f"use {least} at least.")
    bad = len(out) - int(np.isfinite(out).sum())
    if bad:
        raise UsageError(f"{bad} of {len(out)} {what} are not finite numbers.", "find out why before averaging.")
    return out


@lru_cache(maxsize=1 << 12)
def t_quantile(q: float, df: int) -> float:
    """Quantile q of Student's t with df degrees of freedom.

    Up to 120 degrees `t_within` is bisected, beyond it the expansion in 1/df is used (Abramowitz and Stegun 26.7.5).
    """
    _check_share(q, "quantile")
    if df < 1:
        raise UsageError(f"{df} degrees of freedom are too few.", "use two values at least.")
    if q < 0.5:
        return -t_quantile(1 - q, df)
    if df > _SERIES_DF:
        return _t_of_normal(_NORMAL.inv_cdf(q), df)
    # Bisected is the angle, whose range is finite.
    angle = bisect(lambda x: _within_angle(x, df) < 2 * q - 1, 0.0, math.pi / 2)
    return math.sqrt(df) * math.tan(angle)


def t_within(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with df degrees of freedom, t >= 0 (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if df > _SERIES_DF:
        return 2 * _NORMAL.cdf(bisect(lambda z: _t_of_normal(z, df) < t, 0.0, t)) - 1
    return _within_angle(math.atan(t / math.sqrt(df)), df)


def _t_of_normal(z: float, df: int) -> float:
    """The quantile of t where the normal's is z."""
    return z + (
        (z**3 + z) / 4 / df
        + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / df**2
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / df**3
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / df**4
    )


def _within_angle(angle: float, df: int) -> float:
    """P(|T| < sqrt(df) tan(angle)), a finite sum in the cosine."""
    sin, cos = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cos if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df - 1, 2):
        term *= (k - 1) / k * cos * cos
        total += term
    return 2 / math.pi * (angle + sin * total) if odd else sin * total


@lru_cache(maxsize=1 << 14)
def _poisson_limits(k: int, tail: float) -> tuple[float, float]:
    """Means at which as few as k events, and as many, have probability `tail`; (lower, upper), lower 0 for k = 0."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, k + 1)))])  # of the factorials
    counts = np.arange(k + 1)

    def at_most(most: int, mean: float) -> float:
        return float(np.exp(counts[: most + 1] * math.log(mean) - mean - logs[: most + 1]).sum())

    far = k + 12 * math.sqrt(k) + 30  # further than tail >= 1e-12 reaches
    low = bisect(lambda mean: 1 - at_most(k - 1, mean) < tail, 1e-12, k + 1e-12) if k else 0.0
    return low, bisect(lambda mean: at_most(k, mean) > tail, max(k, 1e-12), far)


def bisect(is_low: Callable[[float], bool], low: float, high: float) -> float:
    """Where `is_low` turns from true to false between low and high."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return (low + high) / 2


def _resampled_means(diff: Values, seed: int, resamples: int) -> tuple[float, Values]:
    """The mean, and the means of `resamples` samples of n drawn with replacement; ties between them are exact.

    Drawing n items is drawing how often each distinct value comes up, which is cheaper for many items of few values.
    With many values too, neighbours in size share a cell (the outermost keep one each), and what a cell adds beyond its
    mean is drawn from the normal distribution of its variance, a small part of the whole.
    """
    rng = np.random.default_rng(seed)
    n = len(diff)
    values, counts = np.unique(diff, return_counts=True)
    if n <= _EXACT and len(values) > n / 16:
        rows = max(1, _CHUNK // n)
        parts = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        means = [diff.take(rng.integers(n, size=(part, n), dtype=np.int32)).mean(axis=1) for part in parts]
        return float(diff.mean()), np.concatenate(means)
    spread = None
    if len(values) > _CELLS:
        edge = _CELLS // 4
        starts = np.concatenate([
            np.arange(edge),
            np.linspace(edge, len(values) - edge, _CELLS // 2, endpoint=False).astype(int),
            np.arange(len(values) - edge, len(values)),
        ])  # fmt: skip
        cells = np.add.reduceat(counts, starts)
        centres = np.add.reduceat(counts * values, starts) / cells
        off = values - np.repeat(centres, np.diff(starts, append=len(values)))
        spread = np.add.reduceat(counts * off**2, starts) / cells
        values, counts = centres, cells
    drawn = rng.multinomial(n, counts / n, size=resamples)
    around = drawn @ values / n
    if spread is not None:
        around += rng.standard_normal(resamples) * np.sqrt(drawn @ spread) / n
    return float(counts @ values) / n, around


def _share_below(means: Values, value: float) -> float:
    """Share of the means below `value`, ties counted half, kept off 0 and 1 by one resample."""
    n = len(means)
    share = float(np.count_nonzero(means < value) + np.count_nonzero(means <= value)) / 2 / n
    return min(max(share, 1 / (n + 1)), n / (n + 1))


def pairs(a: ArrayLike, b: ArrayLike, least: int) -> Sequence[Values]:
    """Both as `numbers`, of one length."""
    pair = [numbers(x, "items", least) for x in (a, b)]
    if len(pair[0]) != len(pair[1]):
        lengths = " and ".join(str(len(x)) for x in pair)
        raise UsageError(f"{lengths} items are not pairs.", "score both on the same items, in the same order.")
    return pair


def _check_share(value: float, what: str) -> None:
    if not 0 < value < 1:
        raise UsageError(f"{what} {value:g} is not in the range 0<x<1.", "95 % is 0.95.")
