"""What a loop does, in four words, told from paired differences to plain: above 0 is better.

    v = judge(looped - plain, worth=0.01)                # helps, hurts, no effect larger than 0.01, cannot tell
    v = judge_flips(gained=32, lost=2, n=1200, worth=0.01)
    v.phrase("question", available=5153)                 # with the n it would take
    chances(n=1200, flips=0.03, worth=0.01)              # before the run: how likely each word is; see forecast()
    adjusted_level(0.05, look=2, planned=3)              # what a second look at growing data costs

"helps" and "hurts" are two-sided tests at `level`: McNemar's exact one of answers that are right or wrong, Student's of
other scores. "no effect larger than x" is equivalence (two one-sided tests, Schuirmann 1987): the 90 % interval lies
within +-x. What does both helps "by less than would matter". Else the data cannot tell, which is no word for "nothing".
Each is wrong in at most 5 % (`tests/measure/test_verdict.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from ggufloop.errors import UsageError
from ggufloop.measure.dependence import paired_mean
from ggufloop.measure.stats import Estimate, PairedEstimate, flips_interval, numbers

HELPS, HURTS, SAME, UNSURE = "helps", "hurts", "no effect larger than", "cannot tell"
SMALL = ", by less than would matter"

LEVEL = 0.05
EQUIVALENCE = 0.05  # to each side, so of a 90 % interval
POWER = 0.8
LEAST = 8  # scores other than right or wrong; fewer say nothing

ACCURACY, NATS, CHOICE, RECALL = "accuracy", "nats per token", "choice log-probability", "recall"
WORTHS = {
    ACCURACY: 0.01,  # a point
    NATS: 0.01,  # 1 % of perplexity
    CHOICE: 0.13,  # a point of accuracy is .13 to .19 nats of margin; the lower end, so that less is called nothing
    RECALL: 0.01,
}
"""The smallest gain that would matter, by the unit of a measure."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Verdict:
    """One of the four words and what it rests on.

    gain    mean difference with the interval and p of the test at `level`
    near    the interval of the equivalence
    worth   the x of "no effect larger than x"
    needed  items at which a gain of `worth` would be found, or excluded if there is none, with 80 % power
    """

    word: str
    gain: PairedEstimate
    near: Estimate
    worth: float
    needed: int

    @property
    def small(self) -> bool:
        """Whether the effect is known to be smaller than `worth` either way."""
        return -self.worth < self.near.low and self.near.high < self.worth

    def phrase(self, item: str = "item", available: int | None = None) -> str:
        """The verdict in words. available: how many items the task has, if that is known."""
        if self.word == SAME:
            return f"{SAME} {self.worth:g}"
        if self.word != UNSURE:
            return self.word + (SMALL if self.small else "")
        few = "" if available is None or available >= self.needed else f", and there are {available}"
        return f"{UNSURE}: {self.needed} {item}s would{few}"


def judge(
    diff: ArrayLike, worth: float, *, documents: ArrayLike | None = None, level: float = LEVEL,
    equivalence: float = EQUIVALENCE,
) -> Verdict:  # fmt: skip
    """The verdict on paired differences, looped minus plain. Differences of -1, 0 and 1 alone are flips of answers.

    documents: of each item, as `paired_mean` takes them, for items that are not independent.
    Raises UsageError for fewer than 2 items, values that are not finite or a worth not above 0.
    """
    x = numbers(diff, "items", 2)
    if documents is None and np.isin(x, (-1.0, 0.0, 1.0)).all():
        return judge_flips(int((x > 0).sum()), int((x < 0).sum()), len(x), worth, level=level, equivalence=equivalence)
    gain, near = (paired_mean(x, documents, share) for share in (1 - level, 1 - 2 * equivalence))
    return _verdict(gain, near, worth, level, equivalence, len(x) >= LEAST)


def judge_flips(
    gained: int, lost: int, n: int, worth: float, *, level: float = LEVEL, equivalence: float = EQUIVALENCE
) -> Verdict:
    """The verdict on n answers of which `gained` became right and `lost` wrong. Raises UsageError as `judge` does."""
    gain, near = (flips_interval(gained, lost, n, share) for share in (1 - level, 1 - 2 * equivalence))
    return _verdict(gain, near, worth, level, equivalence, True)


def _verdict(
    gain: PairedEstimate, near: Estimate, worth: float, level: float, equivalence: float, enough: bool
) -> Verdict:
    if not 0 < worth < math.inf:
        raise UsageError(f"worth {worth:g} is not a finite number above 0.", "use the smallest gain that would matter.")
    word = UNSURE
    if enough and gain.p <= level:
        word = HELPS if gain.mean > 0 else HURTS
    elif enough and -worth < near.low and near.high < worth:
        word = SAME
    return Verdict(word, gain, near, worth, needed(gain, worth, level, equivalence))


def corrected(v: Verdict, p: float, level: float = LEVEL, enough: bool = True) -> Verdict:
    """The verdict by its p after a correction for several tests; intervals stay. enough: whether anything is said."""
    word = UNSURE
    if enough and p <= level:
        word = HELPS if v.gain.mean > 0 else HURTS
    elif enough and v.small:
        word = SAME
    return replace(v, word=word)


def needed(gain: PairedEstimate, worth: float, level: float = LEVEL, equivalence: float = EQUIVALENCE) -> int:
    """Items at which a gain of `worth` is found and no effect is known to be below it, each with 80 % power.

    The larger of the normal formulas of the test and of equivalence, and never fewer than the rule of three asks.
    """
    spread = gain.sd**2 or 1 / gain.n  # nothing changed: as if one item had
    test = (_NORMAL.inv_cdf(1 - level / 2) + _NORMAL.inv_cdf(POWER)) ** 2
    equal = (_NORMAL.inv_cdf(1 - equivalence) + _NORMAL.inv_cdf((1 + POWER) / 2)) ** 2
    return max(LEAST, math.ceil(max(test, equal) * spread / worth**2), math.ceil(-math.log(equivalence) / worth) + 1)


@dataclass(frozen=True)
class Chance:
    """Probabilities of the four words if the true difference is `effect`."""

    effect: float
    helps: float
    hurts: float
    same: float
    unsure: float


EFFECTS = (-0.01, -0.005, 0.0, 0.005, 0.01)


def chances(
    n: int, flips: float, worth: float, effects: Sequence[float] = EFFECTS, *, level: float = LEVEL, seed: int = 1,
    runs: int = 1000,
) -> list[Chance]:  # fmt: skip
    """How likely each word is at n questions of which a share `flips` changes, as a pilot showed; by simulation.

    More flips are taken where an effect needs them. Raises UsageError for a share outside 0..1 or no question.
    """
    if n < 1 or not 0 <= flips <= 1:
        raise UsageError(f"a share {flips:g} of {n} questions is none.", "take it from a pilot of some questions.")
    found = []
    for effect in effects:
        share = max(flips, abs(effect))
        up, down = (share + effect) / 2, (share - effect) / 2
        drawn = np.random.default_rng(seed).multinomial(n, (up, down, 1 - up - down), size=runs)
        kinds, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
        words = [judge_flips(int(b), int(c), n, worth, level=level).word for b, c in kinds]
        found.append(_chance(effect, words, counts / runs))
    return found


def chances_of_mean(
    n: int, sd: float, worth: float, effects: Sequence[float], *, level: float = LEVEL
) -> list[Chance]:  # fmt: skip
    """The same of n scores whose differences have standard deviation sd, by the normal distribution.

    Raises UsageError for an sd not above 0.
    """
    if n < 1 or not 0 < sd < math.inf:
        raise UsageError(f"n = {n} of standard deviation {sd:g} says nothing.", "take sd from a pilot.")
    error = sd / math.sqrt(n)
    far, near = _NORMAL.inv_cdf(1 - level / 2) * error, worth - _NORMAL.inv_cdf(1 - EQUIVALENCE) * error
    found = []
    for effect in effects:
        at = NormalDist(effect, error).cdf
        reach = min(near, far)
        same = max(0.0, at(reach) - at(-reach))
        helps, hurts = 1 - at(far), at(-far)
        found.append(Chance(effect, helps, hurts, same, max(0.0, 1 - helps - hurts - same)))
    return found


def forecast(
    pilot: Sequence[ArrayLike], n: int, worth: float, *, documents: ArrayLike | None = None, level: float = LEVEL
) -> list[Chance]:
    """The same at no effect and +-worth, whole and half, from a pilot: the differences of some loops on some items.

    Flips are shared by the loops; the spread of other scores is that of the middle loop. Empty if nothing differs.
    """
    effects = [share * worth for share in (-1, -0.5, 0, 0.5, 1)]
    gains = [numbers(x, "items", 2) for x in pilot]
    every = np.concatenate(gains)
    if documents is None and np.isin(every, (-1.0, 0.0, 1.0)).all():
        flips = max(1, int(np.count_nonzero(every))) / len(every)  # none seen: as if one had
        return chances(n, flips, worth, effects, level=level, runs=400)
    sd = float(np.median([paired_mean(x, documents).sd for x in gains]))
    return chances_of_mean(n, sd, worth, effects, level=level) if sd else []


def _chance(effect: float, words: Sequence[str], weights: ArrayLike) -> Chance:
    share = np.asarray(weights)
    each = [float(share[[w == word for w in words]].sum()) for word in (HELPS, HURTS, SAME, UNSURE)]
    return Chance(effect, *each)


def adjusted_level(level: float, look: int, planned: int = 1) -> float:
    """The level of look number `look`, so that all planned ones together are wrong in at most a share `level`.

    O'Brien and Fleming's spending (Lan and DeMets 1983, Biometrika 70) over looks at equal steps: by a share t of the
    data 2 - 2 Phi(z / sqrt t) is spent, each look testing at what it adds, which is a little less than its boundary
    allows. After the last planned look nothing is left to spend: one more is tested at level / look, and is to be
    marked, as an answer to "has it become significant yet?". Raises UsageError for numbers below 1.
    """
    if look < 1 or planned < 1:
        raise UsageError(f"look {look} of {planned} is none.", "count from 1.")
    if look > planned:
        return level / look
    z = _NORMAL.inv_cdf(1 - level / 2)

    def spent(share: float) -> float:
        return level if share == 1 else 2 - 2 * _NORMAL.cdf(z / math.sqrt(share)) if share else 0.0

    return spent(look / planned) - spent((look - 1) / planned)
