"""What is measured of answers beside right and wrong, and what says that a measurement means nothing.

    t = fit_temperature(plain_answers, gold)                     # once, on the plain run
    choice_log_probability(looped_answers, gold, t)              # a score per question, higher is better
    guard(right, chosen, choices)                                # accuracy against chance, and the share of each letter
    noise_floor(scores, scores_nudged)                           # the same loop twice; nudged(loop) is the second

Accuracy keeps of a question whether the right answer is ahead. The log-probability of the right answer alone has the
wrong sign in two of four cases: what raises or lowers all answers is in it. A softmax over the offered ones takes that
out. On a loop that does help it needed 7 times fewer questions than accuracy [4.4, 13], on one that does
not 0.6 of them: choose with it, confirm with accuracy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure.dependence import paired_mean
from ggufloop.measure.stats import Estimate, PairedEstimate, Values, bisect, flips_interval, numbers, wilson

Answers = Sequence[Sequence[float]]
"""Log-probabilities of the answers each question offers; questions may offer different numbers of them."""

NUDGE = 1e-5
_COLDEST, _HOTTEST = 0.01, 1000.0


def choice_log_probability(answers: Answers, gold: Sequence[int], temperature: float = 1.0) -> Values:
    """Of the right answer after a softmax over the offered ones' log-probabilities over `temperature`; in nats, <= 0.

    Raises UsageError for a question without answers, a right answer it does not offer, values that are not finite or a
    temperature not above 0.
    """
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature {temperature:g} is not a finite number above 0.", "fit it on the plain run.")
    table, right = _padded(answers, gold)
    rows = np.arange(len(right))
    scaled = table / temperature
    return np.asarray(scaled[rows, right] - _log_sum(scaled), dtype=np.float64)


def fit_temperature(answers: Answers, gold: Sequence[int]) -> float:
    """The temperature at which the choice log-probability is highest on average, within 0.01 to 1000.

    In 1/T the mean is concave (its slope is that of logistic regression with one weight), so its root is bisected.
    Raises UsageError as `choice_log_probability` does.
    """
    table, right = _padded(answers, gold)
    rows = np.arange(len(right))
    finite = np.where(np.isfinite(table), table, 0.0)

    def slope(inverse: float) -> float:
        scaled = table * inverse
        weights = np.exp(scaled - _log_sum(scaled)[:, None])
        return float((table[rows, right] - (weights * finite).sum(axis=1)).mean())

    return math.exp(-bisect(lambda x: slope(math.exp(x)) > 0, math.log(1 / _HOTTEST), math.log(1 / _COLDEST)))


def _padded(answers: Answers, gold: Sequence[int]) -> tuple[Values, NDArray[np.intp]]:
    """As a table, missing answers at -inf; and the right ones."""
    if len(answers) != len(gold) or not len(gold):
        raise UsageError(f"{len(answers)} questions and {len(gold)} right answers.", "give one for each question.")
    table = np.full((len(answers), max(map(len, answers))), -np.inf)
    for i, (row, target) in enumerate(zip(answers, gold, strict=True)):
        if not 0 <= target < len(row):
            raise UsageError(f"question {i} offers {len(row)} answers, not number {target}.", "count them from 0.")
        table[i, : len(row)] = numbers(row, f"answers of question {i}", 1)
    return table, np.asarray(gold, dtype=np.intp)


def _log_sum(table: Values) -> Values:
    top = table.max(axis=1)
    return np.asarray(top + np.log(np.exp(table - top[:, None]).sum(axis=1)))


@dataclass(frozen=True)
class ChanceGuard:
    """Whether a model answers a task at all, which a loop can be judged by.

    accuracy  with Wilson's interval; chance: of a guess
    letters   how often each answer, by its place, was chosen; the model may not read the questions
    """

    accuracy: Estimate
    chance: float
    letters: tuple[float, ...]

    @property
    def at_chance(self) -> bool:
        """Whether the accuracy is not known to be above that of a guess."""
        return self.accuracy.low <= self.chance

    def sentence(self) -> str:
        """The warning, with its numbers; '' if there is none to give."""
        most = max(self.letters)
        stuck = f"; {100 * most:.0f} % of its answers are {chr(ord('A') + self.letters.index(most))}"
        if not self.at_chance:
            return ""
        return (f"accuracy {self.accuracy.show('.3f')} is not above chance, {self.chance:.3f}{stuck}: this model on "
                "this task cannot judge a loop.")  # fmt: skip


def guard(right: ArrayLike, chosen: Sequence[int], choices: Sequence[int]) -> ChanceGuard:
    """Accuracy against chance. chosen: the answer given to each question; choices: how many it offers.

    Raises UsageError for no question, other lengths, or an answer that is not offered.
    """
    scores = numbers(right, "questions", 1)
    if not len(scores) == len(chosen) == len(choices):
        raise UsageError(f"{len(scores)}, {len(chosen)} and {len(choices)} questions are not the same.",
                         "give an answer and a number of choices for each.")  # fmt: skip
    odd = next((i for i, (c, k) in enumerate(zip(chosen, choices, strict=True)) if not 0 <= c < k), None)
    if odd is not None:
        raise UsageError(f"question {odd} offers {choices[odd]} answers, not number {chosen[odd]}.", "count from 0.")
    letters = np.bincount(chosen, minlength=max(choices)) / len(chosen)
    chance = float(np.mean(1 / np.asarray(choices)))
    return ChanceGuard(wilson(int(scores.sum()), len(scores)), chance, tuple(letters.tolist()))


def nudged(loop: LoopSpec) -> LoopSpec:
    """The same loop with its damping moved by 1e-5: what differs between the two is noise of the arithmetic.

    Raises UsageError for a solver without damping, by `LoopSpec`'s rule; naive and repeat are euler with damping 1.
    """
    if loop.solver in ("naive", "repeat"):
        return dataclasses.replace(loop, solver="euler", damping=1 - NUDGE)
    return dataclasses.replace(loop, damping=(1 / loop.k if loop.damping is None else loop.damping) - NUDGE)


@dataclass(frozen=True)
class NoiseFloor:
    """The same loop twice. difference: its mean over items, whose interval an effect must leave to be told from the
    arithmetic; typical: the mean size of one item's; changed: items that differ."""

    difference: PairedEstimate
    typical: float
    changed: int


def noise_floor(scores: ArrayLike, again: ArrayLike) -> NoiseFloor:
    """How far two runs of one loop differ. Raises UsageError for fewer than 2 items or other lengths."""
    a, b = (numbers(x, "items", 2) for x in (scores, again))
    if len(a) != len(b):
        raise UsageError(f"{len(a)} and {len(b)} items are not pairs.", "score both on the same items.")
    diff = b - a
    if np.isin(diff, (-1.0, 0.0, 1.0)).all():
        mean = flips_interval(int((diff > 0).sum()), int((diff < 0).sum()), len(diff))
    else:
        mean = paired_mean(diff)
    return NoiseFloor(mean, float(np.abs(diff).mean()), int(np.count_nonzero(diff)))
