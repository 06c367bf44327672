"""Which of several loops helps, told by items that had no part in choosing it. Pure functions: no model in here.

    steps = decide(["12:16 k=2", "12:16 k=3", ...], n_items=5000, seed=1)
    request = next(steps)
    while True:                                    # until StopIteration, whose value is the Decision
        request = steps.send({name: looped[name] - plain for name in request.names})  # on request.items
    select_and_confirm(plain, {name: scores}, seed=1)      # the same, when every score is at hand already

A score is higher for better: 0 or 1 for a question, mean log-probability per token for a chunk of text. Items must be
independent of each other.

The items are split at random into halves. On the first, successive halving (Karnin, Koren and Somekh 2013; Jamieson and
Talwalkar 2016): all loops are scored on a few items, the worse half is dropped, the others get twice as many, until
`finalists` are left. Only these are scored on the second half, and tested there: paired bootstrap, Holm's correction
over the finalists. The loops dropped before need no correction, because the items that dropped them do not vote again:
whatever the first half did, each finalist's difference on the second is unbiased. A single loop is not selected from
anything, so all items confirm it.

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
from ggufloop.measure.stats import (
    RESAMPLES,
    Estimate,
    PairedEstimate,
    Values,
    holm,
    mean_interval,
    n_for_power,
    numbers,
    paired_bootstrap,
)

Items = NDArray[np.intp]

HELPS, NONE_HELPS, NOT_ENOUGH = "helps", "no window helps", "not enough data"
SELECT, CONFIRM = "select", "confirm"

FINALISTS = 3
WORTH = 0.01  # one point of accuracy, or about 1 % of perplexity
LEAST_ITEMS = 30  # a half with fewer says nothing about effects of a few per cent
_FEW_CHANGES = 10  # an interval made of fewer items that changed is not to be trusted


@dataclass(frozen=True)
class Request:
    """What to score next: the loops `names` on `items` (indices, ascending), none of which these have seen before."""

    stage: str
    names: tuple[str, ...]
    items: Items


@dataclass(frozen=True)
class Selected:
    """How a loop fared in the selection. gain: on those items; of the best one it is too good to be quoted."""

    name: str
    gain: Estimate


@dataclass(frozen=True)
class Confirmed:
    """A finalist on the held-out items. gain: its interval holds for all finalists together; p: corrected by Holm."""

    name: str
    gain: PairedEstimate
    p: float


@dataclass(frozen=True)
class Decision:
    """The verdict and everything behind it.

    verdict     HELPS: `winner` is better than plain. NONE_HELPS: no finalist was shown to be, and if one is, then by
                less than `worth`. NOT_ENOUGH: the held-out items cannot tell
    winner      of the finalists that help the one the selection ranked first; None if none does
    finalists   in the order of the selection, tested on n_confirm items
    selection   every loop, best first
    n_needed    items in all that would find a gain of `worth` with 80 % power
    scored      loops times items scored, the plain runs not among them
    """

    verdict: str
    winner: str | None
    finalists: tuple[Confirmed, ...]
    selection: tuple[Selected, ...]
    n_select: int
    n_confirm: int
    n_needed: int
    scored: int
    seed: int
    level: float
    worth: float


Answer = Mapping[str, ArrayLike]


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
    resamples: int = RESAMPLES,
) -> Generator[Request, Answer, Decision]:
    """Ask for scores, return the Decision.

    Yields Requests; send back {name: looped - plain on request.items} for request.names. worth: the smallest gain that
    would matter; "no window helps" is said only if the finalists' intervals stay below it and, where hardly an item
    changed, by the rule of three (Hanley and Lippman-Hand 1983) as well: 3 / n < worth, for scores of 0 or 1.
    racing=False scores all loops on the whole selection half; racing begins with `least` items at least. level: a
    false "helps" is at most this likely.

    Raises UsageError, when first advanced, for no names, a name twice, fewer than 4 items, fewer than 1 finalist or a
    worth not above 0; and on an answer that does not fit its request.
    """
    left = _checked(names, n_items, finalists, worth, level)
    order = np.random.default_rng(seed).permutation(n_items)
    n_select = n_items // 2 if len(left) > 1 else 0
    held_out = np.sort(order[n_select:])
    seen: dict[str, Values] = {name: np.empty(0) for name in left}
    dropped: list[str] = []
    done = 0
    for total, keep in _rounds(len(left), n_select, finalists, racing, least):
        answer = yield (request := Request(SELECT, tuple(left), np.sort(order[done:total])))
        for name, diff in _differences(answer, request).items():
            seen[name] = np.concatenate([seen[name], diff])
        ranked = sorted(left, key=lambda name: -seen[name].mean())  # equal ones stay in the order given
        left, dropped, done = ranked[:keep], ranked[keep:] + dropped, total
    scored = sum(map(len, seen.values())) + len(left) * len(held_out)
    selection = tuple(Selected(name, mean_interval(seen[name])) for name in [*left, *dropped] if n_select)

    answer = yield (request := Request(CONFIRM, tuple(left), held_out))
    diffs = list(_differences(answer, request).values())
    share = level / len(left)
    gains = [paired_bootstrap(diff, seed=seed, level=1 - share, resamples=resamples) for diff in diffs]
    confirmed = tuple(map(Confirmed, left, gains, map(float, holm([gain.p for gain in gains]))))
    enough = len(held_out) >= LEAST_ITEMS
    winner = next((c.name for c in confirmed if c.p <= level and c.gain.mean > 0), None) if enough else None
    rare = min(map(np.count_nonzero, diffs)) < _FEW_CHANGES
    needed = max(n_for_power(worth, gain.sd, level=share) for gain in gains)
    if rare:
        needed = max(needed, math.ceil(3 / worth) + 1)
    excluded = all(gain.high < worth for gain in gains) and not (rare and 3 / len(held_out) >= worth)
    return Decision(
        verdict=HELPS if winner else NONE_HELPS if enough and excluded else NOT_ENOUGH,
        winner=winner,
        finalists=confirmed,
        selection=selection,
        n_select=n_select,
        n_confirm=len(held_out),
        n_needed=max(needed, LEAST_ITEMS) * (2 if n_select else 1),
        scored=scored,
        seed=seed,
        level=level,
        worth=worth,
    )


def select_and_confirm(
    plain: ArrayLike,
    looped: Mapping[str, ArrayLike],
    seed: int = 0,
    *,
    finalists: int = FINALISTS,
    racing: bool = False,
    worth: float = WORTH,
    level: float = 0.05,
    resamples: int = RESAMPLES,
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
    steps = decide(
        gains, len(base), seed, finalists=finalists, racing=racing, worth=worth, level=level, resamples=resamples
    )
    try:
        request = next(steps)
        while True:
            request = steps.send({name: gains[name][request.items] for name in request.names})
    except StopIteration as e:
        decision: Decision = e.value
        return decision


def planned_cost(
    n_names: int, n_items: int, finalists: int = FINALISTS, racing: bool = True, least: int = LEAST_ITEMS
) -> int:
    """Loops times items that `decide` will ask for in all, known beforehand: for a budget or a progress bar."""
    n_select = n_items // 2 if n_names > 1 else 0
    cost, left, done = 0, n_names, 0
    for total, keep in _rounds(n_names, n_select, finalists, racing, least):
        cost, left, done = cost + left * (total - done), keep, total
    return cost + left * (n_items - n_select)


def _rounds(n_names: int, n_select: int, finalists: int, racing: bool, least: int) -> Sequence[tuple[int, int]]:
    """(items seen after the round, loops kept after it), the items doubling up to n_select."""
    if not n_select:
        return []
    keep = [max(min(finalists, n_names), math.ceil(n_names / 2))]
    while keep[-1] > finalists:
        keep.append(max(finalists, math.ceil(keep[-1] / 2)))
    if not racing:
        return [(n_select, keep[-1])]
    sizes = [max(n_select >> (len(keep) - 1 - i), min(least, n_select)) for i in range(len(keep))]
    # Rounds without new items (few items, many loops) are one round: it decides as they would one after the other.
    return [(size, k) for i, (size, k) in enumerate(zip(sizes, keep, strict=True)) if size not in sizes[i + 1 :]]


def _differences(answer: Answer, request: Request) -> dict[str, Values]:
    """The answer, checked against its request, in the order of its names."""
    out = {}
    for name in request.names:
        if name not in answer:
            raise UsageError(f"no scores for {name}.", "answer a request with the differences of all its names.")
        out[name] = numbers(answer[name], f"differences of {name}", 0)
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
        raise UsageError(
            f"{n_items} items cannot be split into two halves.", "use 4 at least, thousands for an answer."
        )
    if finalists < 1:
        raise UsageError(f"{finalists} finalists cannot be confirmed.", "use 1 at least.")
    if not 0 < worth < math.inf:
        raise UsageError(f"worth {worth:g} is not a finite number above 0.", "use the smallest gain that would matter.")
    if not 0 < level < 1:
        raise UsageError(f"level {level:g} is not in the range 0<x<1.", "5 % is 0.05.")
    return left
