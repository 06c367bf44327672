"""Which of several loops helps, and what can be said of each of the others. Pure functions: no model in here.

    steps = decide(["12:16 k=2", "12:16 k=3", ...], n_items=5000, seed=1)
    request = next(steps)
    while True:                                    # until StopIteration, whose value is the Decision
        request = steps.send(RaceAnswer({name: looped[name] - plain for name in request.names}))  # on request.items
    judge_all(plain, {name: scores}, seed=1)       # the same, when every score is at hand already

A score is higher for better: 0 or 1 for a question, mean log-probability per token for a chunk of text. Items are
independent of each other, or their documents are named.

All loops are scored on a few items in random order, then on more. A loop is settled, and costs no more, once its gain
is known to be below `worth`. Racing drops the worse half as well (successive halving, Karnin, Koren and Somekh 2013;
Jamieson and Talwalkar 2016) until `finalists` are left for the last items.

"helps" is said of a loop scored on all items, by a test on all of them, with Holm's correction over *all* loops asked
about. Dropping a loop only takes away a chance to be found, so it costs no level, and no item is set aside for
choosing: with 25 loops, 12,000 questions and 6 % flips a gain of a point stands at 4.5 standard errors against a bound
of 3.1; half of the items and three finalists leave 3.2 against 2.4. What a sweep reports of its best loop is too good,
as the best of many is; the intervals hold for all loops together, that one included.

"no window helps" is said if every loop asked about is settled, and not where racing dropped one before it was. Limits
that settle are at 5 % over the rounds at which they may be looked at.

Same names, n_items, seed and scores, same requests and same decision: an interrupted sweep resumes by answering again
from its file.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggufloop.errors import UsageError
from ggufloop.measure.stats import PairedEstimate, Values, holm, numbers
from ggufloop.measure.verdict import EQUIVALENCE, HURTS, WORTHS, Verdict, corrected, judge
from ggufloop.measure.verdict import HELPS as HELPS

Items = NDArray[np.intp]

NONE_HELPS, NOT_ENOUGH = "no window helps", "not enough data"
RACE = "race"

FINALISTS = 3
WORTH = WORTHS["accuracy"]
LEAST_ITEMS = 30  # fewer say nothing about effects of a few per cent
_LAST_CUT = 0.4  # share of the items at which racing drops loops for the last time


@dataclass(frozen=True)
class Request:
    """What to score next: the loops `names` on `items` (indices, ascending), none of which these have seen before."""

    stage: str
    names: tuple[str, ...]
    items: Items


@dataclass(frozen=True)
class Judged:
    """A loop and what is said of it on the items it was scored on.

    verdict  its word; verdict.gain: the interval holds for all loops together
    p        of no effect, corrected by Holm over all loops; for a loop that was dropped, over the rounds too
    settled  whether a gain of `worth` is ruled out
    whole    whether it was scored on all items
    """

    name: str
    verdict: Verdict
    p: float
    settled: bool
    whole: bool

    @property
    def gain(self) -> PairedEstimate:
        """Mean gain over plain with its interval."""
        return self.verdict.gain


@dataclass(frozen=True)
class Decision:
    """The verdict and everything behind it.

    verdict     HELPS: `winner` is better than plain. NONE_HELPS: no loop gains `worth` or more. NOT_ENOUGH: the items
                cannot tell
    winner      of the loops that help the one that gains most; None if none does
    loops       all that were asked about: scored on more items first, then by gain
    n_needed    items at which a gain of `worth` would be found in each loop, or ruled out, with 80 % power
    scored      loops times items scored, the plain runs not among them
    """

    verdict: str
    winner: str | None
    loops: tuple[Judged, ...]
    n: int
    n_needed: int
    scored: int
    seed: int
    level: float
    worth: float

    @property
    def unsettled(self) -> tuple[Judged, ...]:
        """Loops that may gain `worth` and were not shown to help."""
        return tuple(c for c in self.loops if not c.settled and c.verdict.word != HELPS)

    def sentence(self, item: str = "item", available: int | None = None) -> str:
        """The verdict in words, with the numbers behind it. available: how many items there are, if that is known."""
        harm = sum(c.verdict.word == HURTS for c in self.loops)
        tail = f" Worse than plain: {harm} of {len(self.loops)}." if harm else ""
        if self.winner is not None:
            best = next(c for c in self.loops if c.name == self.winner)
            return (
                f"{best.name} {best.verdict.phrase()}: {best.gain.show('+.5f')} {item}s, p = {best.p:.3g} after Holm's "
                f"correction over {len(self.loops)} loops."
            )
        if self.verdict == NONE_HELPS:
            most = max(c.verdict.near.high for c in self.loops)
            return (
                f"no window helps: each of {len(self.loops)} loops gains {most:+.5f} at most, less than the "
                f"{self.worth:g} that would matter.{tail}"
            )
        if self.n < LEAST_ITEMS:
            return f"not enough data to tell ({self.n} {item}s are under {LEAST_ITEMS}).{tail}"
        dropped = sum(not c.whole for c in self.unsettled)
        few = "" if available is None or available >= self.n_needed else f", and there are {available}"
        raced = f", {dropped} of them dropped by the race before that was known" if dropped else ""
        return (
            f"not enough data to tell: {len(self.unsettled)} of {len(self.loops)} loops may gain {self.worth:g} or "
            f"more{raced}; about {self.n_needed} {item}s for each would find such a gain with 80 % power{few}.{tail}"
        )


Places = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class RaceAnswer:
    """To a Request: looped - plain on its items by name; ranks: what tells the loops apart so far, higher for better.

    Without ranks it is the mean difference. Ranks choose what the race drops and nothing else, so they need not be what
    decides: the choice log-probability tells loops apart from fewer questions than accuracy, which decides.
    """

    differences: Mapping[str, ArrayLike]
    ranks: Mapping[str, float] | None = None


def decide(
    names: Iterable[str],
    n_items: int,
    seed: int = 0,
    *,
    finalists: int = FINALISTS,
    racing: bool = True,
    least: int = LEAST_ITEMS,
    worth: float = WORTH,
    level: float = 0.05,
    places: Places | None = None,
) -> Generator[Request, RaceAnswer, Decision]:
    """Ask for scores, return the Decision.

    Yields Requests; send back the RaceAnswer of request.names on request.items. worth: the smallest gain that
    would matter. racing=False scores all loops on all items; racing begins with `least` items at least. level: a false
    "helps" of any loop is at most this likely, and so is a false "hurts". places: (document, place in it) of each item,
    where items are not independent.

    Raises UsageError, when first advanced, for no names, a name twice, fewer than 4 items, fewer than 1 finalist or a
    worth not above 0; and on an answer that does not fit its request.
    """
    asked = left = _checked(names, n_items, finalists, worth, level)
    order = np.random.default_rng(seed).permutation(n_items)
    rounds = _rounds(len(asked), n_items, finalists, racing, least)
    seen = {name: np.empty(0) for name in asked}

    def judged(name: str) -> Verdict:
        """On the items so far, put back into the order of their texts."""
        items, documents = order[: len(seen[name])], None
        where = np.argsort(items)
        if places is not None:
            where = np.array(sorted(where.tolist(), key=lambda i: places[int(items[i])]))
            documents = [places[int(items[i])][0] for i in where]
        return judge(seen[name][where], worth, documents=documents, level=level / len(asked),
                     equivalence=EQUIVALENCE / len(rounds))  # fmt: skip

    done = 0
    found: dict[str, Verdict] = {}
    for total, keep in rounds:
        items = order[done:total]
        where = np.argsort(items)
        answer = yield (request := Request(RACE, tuple(left), items[where]))
        for name, diff in _differences(answer, request).items():
            part = np.empty(len(diff))
            part[where] = diff
            seen[name] = np.concatenate([seen[name], part])
            found[name] = judged(name)
        open_ = [name for name in left if not found[name].near.high < worth]
        ranks = answer.ranks or {name: found[name].gain.mean for name in open_}
        left = sorted(open_, key=lambda name: -ranks[name])[:keep]  # equal ones stay in the order given
        done = total
        if not left:
            break

    enough = n_items >= LEAST_ITEMS
    whole = {name: len(seen[name]) == n_items for name in asked}
    # A loop is dropped for being low, so what says that it is low pays for each round, and nothing says it is high.
    raw = [found[name].gain.p * (1 if found[name].gain.mean > 0 else len(rounds)) for name in asked]
    each = holm([min(1.0, p) if whole[n] or found[n].gain.mean < 0 else 1.0 for n, p in zip(asked, raw, strict=True)])
    loops = [
        _loop(name, found[name], float(p), level, whole[name], enough) for name, p in zip(asked, each, strict=True)
    ]
    loops.sort(key=lambda c: (-len(seen[c.name]), -c.gain.mean))
    helping = [c for c in loops if c.verdict.word == HELPS]
    winner = max(helping, key=lambda c: c.gain.mean).name if helping else None
    return Decision(
        verdict=HELPS if winner else NONE_HELPS if enough and all(c.settled for c in loops) else NOT_ENOUGH,
        winner=winner,
        loops=tuple(loops),
        n=n_items,
        n_needed=max(LEAST_ITEMS, *(c.verdict.needed for c in loops)),
        scored=sum(map(len, seen.values())),
        seed=seed,
        level=level,
        worth=worth,
    )


def _loop(name: str, v: Verdict, p: float, level: float, whole: bool, enough: bool) -> Judged:
    """The word of one loop by its corrected p."""
    return Judged(name, corrected(v, p, level, enough), p, v.near.high < v.worth, whole)


def judge_all(
    plain: ArrayLike,
    looped: Mapping[str, ArrayLike],
    seed: int = 0,
    *,
    finalists: int = FINALISTS,
    racing: bool = False,
    worth: float = WORTH,
    level: float = 0.05,
    places: Places | None = None,
) -> Decision:
    """`decide` over scores that are all known: plain (n items), and of each loop on the same items in the same order.

    Raises UsageError as `decide` does, and for scores of another length than plain's or that are not finite numbers.
    """
    base = numbers(plain, "plain scores", 0)
    gains = {}
    for name, scores in looped.items():
        mine = numbers(scores, f"scores of {name}", 0)
        if len(mine) != len(base):
            raise UsageError(f"{name} has {len(mine)} scores, plain {len(base)}.", "score both on the same items.")
        gains[name] = mine - base
    steps = decide(gains, len(base), seed, finalists=finalists, racing=racing, worth=worth, level=level,
                   places=places)  # fmt: skip
    try:
        request = next(steps)
        while True:
            request = steps.send(RaceAnswer({name: gains[name][request.items] for name in request.names}))
    except StopIteration as e:
        decision: Decision = e.value
        return decision


def planned_cost(
    n_names: int, n_items: int, finalists: int = FINALISTS, racing: bool = True, least: int = LEAST_ITEMS
) -> int:
    """Loops times items that `decide` will ask for at most, known beforehand: for a budget or a progress bar."""
    cost, left, done = 0, n_names, 0
    for total, keep in _rounds(n_names, n_items, finalists, racing, least):
        cost, left, done = cost + left * (total - done), keep, total
    return cost


def _rounds(n_names: int, n_items: int, finalists: int, racing: bool, least: int) -> Sequence[tuple[int, int]]:
    """(items seen after the round, loops kept after it at most): the items double up to `_LAST_CUT`, then all."""
    last = (n_items, n_names)
    if not racing or n_names <= finalists:
        return [last]
    keep = [max(finalists, n_names // 2)]
    while keep[-1] > finalists:
        keep.append(max(finalists, keep[-1] // 2))
    sizes = [max(int(_LAST_CUT * n_items) >> (len(keep) - 1 - i), min(least, n_items)) for i in range(len(keep))]
    # Rounds without new items (few items, many loops) are one round: it decides as they would one after the other.
    found = [(size, k) for i, (size, k) in enumerate(zip(sizes, keep, strict=True))
             if size not in sizes[i + 1 :] and size < n_items]  # fmt: skip
    return [*found, last]


def _differences(answer: RaceAnswer, request: Request) -> dict[str, Values]:
    """The answer, checked against its request, in the order of its names."""
    out = {}
    for name in request.names:
        if name not in answer.differences:
            raise UsageError(f"no scores for {name}.", "answer a request with the differences of all its names.")
        out[name] = numbers(answer.differences[name], f"differences of {name}", 0)
        if len(out[name]) != len(request.items):
            have, need = len(out[name]), len(request.items)
            raise UsageError(f"{have} differences of {name} for {need} items.", "send one per item of the request.")
    return out


def _checked(names: Iterable[str], n_items: int, finalists: int, worth: float, level: float) -> list[str]:
    left = list(names)
    if not left:
        raise UsageError("no loops to choose from.", "name one at least.")
    twice = next((name for i, name in enumerate(left) if name in left[:i]), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice.", "compare each loop once.")
    if n_items < 4:
        raise UsageError(f"{n_items} items are too few to tell anything.", "use 4 at least, thousands for an answer.")
    if finalists < 1:
        raise UsageError(f"{finalists} finalists cannot win a race.", "use 1 at least.")
    if not 0 < worth < math.inf:
        raise UsageError(f"worth {worth:g} is not a finite number above 0.", "use the smallest gain that would matter.")
    if not 0 < level < 1:
        raise UsageError(f"level {level:g} is not in the range 0<x<1.", "5 % is 0.05.")
    return left
