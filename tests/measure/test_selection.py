"""The decision procedure on simulated scores: what a null effect reads as, what a real one, and who sees which item."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ggufloop.errors import UsageError
from ggufloop.measure import selection
from ggufloop.measure.selection import (
    CONFIRM,
    HELPS,
    NONE_HELPS,
    NOT_ENOUGH,
    SELECT,
    Decision,
    Request,
    decide,
    planned_cost,
    select_and_confirm,
)
from ggufloop.measure.stats import holm, paired_bootstrap

RUNS = 1000
WINDOWS = tuple(f"{a}:{a + 4}" for a in range(1, 26))
Answers = Callable[[Request], dict[str, Any]]


@dataclass
class World:
    """Loops whose differences to plain share half of their variance item by item, as neighbouring windows do."""

    rng: np.random.Generator
    n: int

    def __post_init__(self) -> None:
        self.shared = self.rng.standard_normal(self.n, dtype=np.float32)

    def noise(self, request: Request) -> np.ndarray:
        """Standard normal, correlated by 1/2 between loops; drawn for what is asked, as a model would score it."""
        own = self.rng.standard_normal(len(request.items), dtype=np.float32)
        return math.sqrt(0.5) * (self.shared[request.items] + own)

    def flips(self, request: Request, rate: float, effects: dict[str, float]) -> dict[str, Any]:
        """Answers turn right (+1) or wrong (-1) on a share `rate` of the questions; by `effect` more turn right."""
        out = {}
        for name in request.names:
            z, effect = self.noise(request), effects.get(name, 0.0)
            up, down = (NormalDist().inv_cdf((rate + sign * effect) / 2) for sign in (1, -1))
            out[name] = (-z < up).astype(float) - (z < down)
        return out

    def nll(self, request: Request) -> dict[str, Any]:
        """Differences of log-probability of sd 0.2 with the tails of a Laplace distribution."""
        noise = {name: self.noise(request) for name in request.names}
        return {name: 0.2 / math.sqrt(1.5958) * np.sign(z) * np.abs(z) ** 1.5 for name, z in noise.items()}


def run(steps: Generator[Request, Any, Decision], answers: Answers) -> Decision:
    try:
        request = next(steps)
        while True:
            request = steps.send(answers(request))
    except StopIteration as e:
        decision: Decision = e.value
        return decision


def is_at_most(hits: int, runs: int, share: float) -> bool:
    """Observed at most `share`, and the upper end of what the simulation leaves open is not far above it."""
    return hits <= share * runs and binomtest(hits, runs).proportion_ci(0.95).high < 1.5 * share


def test_calibration_null_accuracy() -> None:
    """25 correlated windows, none of which helps, flips 5 %: the race says "helps" in at most 5 % of 1,000 sweeps.

    And what it reports of its finalists is unbiased, while their gains in the selection are not.
    """
    rng = np.random.default_rng(1)
    found = []
    for seed in range(RUNS):
        world = World(rng, 4000)
        found.append(run(decide(WINDOWS, 4000, seed, resamples=800), lambda r, w=world: w.flips(r, 0.05, {})))
    assert is_at_most(sum(d.verdict == HELPS for d in found), RUNS, 0.05)
    assert {d.n_confirm for d in found} == {2000}
    held_out = np.array([d.finalists[0].gain.mean for d in found])
    chosen = np.array([d.selection[0].gain.mean for d in found])
    error = math.sqrt(0.05 / 2000 / RUNS)
    assert abs(held_out.mean()) < 4 * error
    assert chosen.mean() > 20 * error


def test_calibration_null_nll() -> None:
    """The same of log-probabilities whose differences have sd 0.2 and heavy tails, without racing."""
    rng = np.random.default_rng(2)
    helps = 0
    for seed in range(RUNS):
        world = World(rng, 400)
        helps += run(decide(WINDOWS[:12], 400, seed, racing=False, resamples=600), world.nll).verdict == HELPS
    assert is_at_most(helps, RUNS, 0.05)


def test_calibration_would_notice_a_leak() -> None:
    """Choosing and judging on the same items, what the procedure is there to prevent, fails the same calibration."""
    rng = np.random.default_rng(3)
    helps = 0
    for seed in range(200):
        world = World(rng, 2000)
        gains = world.flips(Request(SELECT, WINDOWS, np.arange(2000)), 0.05, {})
        best = max(gains.values(), key=lambda diff: float(diff.mean()))
        judged = paired_bootstrap(best, seed=seed, resamples=800)
        helps += judged.p <= 0.05 and judged.mean > 0
    assert not is_at_most(helps, 200, 0.05)
    assert helps > 30


def test_power_at_the_published_size() -> None:
    """One window of 25 gains 1.3 points, flips 6 %, 12,000 questions: the race finds that window in at least 80 %."""
    rng = np.random.default_rng(4)
    runs, effects = 400, {WINDOWS[11]: 0.013}
    found = []
    for seed in range(runs):
        world = World(rng, 12_000)
        found.append(
            run(decide(WINDOWS, 12_000, seed, resamples=1500), lambda r, w=world: w.flips(r, 0.06, effects))
        )  # fmt: skip
    right = sum(d.verdict == HELPS and d.winner == WINDOWS[11] for d in found)
    assert binomtest(right, runs).proportion_ci(0.95).low >= 0.8
    assert sum(d.verdict == HELPS for d in found) - right <= 0.05 * runs


def test_no_and_not_enough_are_different_answers() -> None:
    """Null effects: 20,000 questions exclude a gain of one point, 400 do not, and say how many would."""
    rng = np.random.default_rng(5)

    def sweep(n: int, seed: int) -> Decision:
        world = World(rng, n)
        return run(decide(WINDOWS, n, seed, resamples=2000), lambda r: world.flips(r, 0.05, {}))

    few, many = ([sweep(n, seed) for seed in range(20)] for n in (400, 20_000))
    assert sum(d.verdict == NONE_HELPS for d in many) >= 19
    assert sum(d.verdict == NOT_ENOUGH for d in few) >= 18
    assert all(7_000 < d.n_needed < 13_000 for d in many)  # 2 (2.39 + 0.84)^2 0.05 / 0.01^2 = 10,400


def test_loops_that_change_nothing() -> None:
    """No flip among 200 questions leaves room for 1.5 % that flip; among 2,000 it does not."""
    assert select_and_confirm(np.ones(400), {"a": np.ones(400), "b": np.ones(400)}).verdict == NOT_ENOUGH
    assert select_and_confirm(np.ones(400), {"a": np.ones(400), "b": np.ones(400)}).n_needed == 602
    assert select_and_confirm(np.ones(4000), {"a": np.ones(4000), "b": np.ones(4000)}).verdict == NONE_HELPS
    tiny = select_and_confirm(np.zeros(40), {"a": np.linspace(1, 2, 40), "b": np.zeros(40)})
    assert (tiny.verdict, tiny.winner, tiny.n_confirm) == (NOT_ENOUGH, None, 20)


@pytest.mark.parametrize("racing", [True, False])
@pytest.mark.parametrize(("n_names", "n_items"), [(25, 5000), (25, 200), (4, 1001), (2, 10), (1, 50)])
def test_who_sees_which_item(n_names: int, n_items: int, racing: bool) -> None:
    """Halves without a common item, which together are all; no loop is scored twice on one; the cost is as planned."""
    asked: list[Request] = []
    world = World(np.random.default_rng(6), n_items)

    def answers(request: Request) -> dict[str, Any]:
        asked.append(request)
        return world.nll(request)

    names = WINDOWS[:n_names]
    decision = run(decide(names, n_items, 3, racing=racing, resamples=200), answers)
    *select, confirm = asked
    assert [r.stage for r in asked] == [SELECT] * len(select) + [CONFIRM]
    first = [i for r in select for i in r.items]
    assert sorted([*first, *confirm.items]) == list(range(n_items))
    assert len(confirm.items) == decision.n_confirm == (n_items - n_items // 2 if n_names > 1 else n_items)
    assert all((np.diff(r.items) > 0).all() for r in asked)
    left = set(names)
    for request in asked:
        assert set(request.names) <= left
        left = set(request.names)
    assert len(left) == min(3, n_names)
    assert (
        decision.scored == sum(len(r.names) * len(r.items) for r in asked) == planned_cost(n_names, n_items, 3, racing)
    )
    if n_names == 1:
        assert not decision.selection
        return
    assert [s.name for s in decision.selection[: len(left)]] == [c.name for c in decision.finalists]
    assert {s.name for s in decision.selection} == set(names)
    assert {s.gain.n for s in decision.selection[: len(left)]} == {n_items // 2}


def test_racing_costs_under_ten_plain_runs() -> None:
    assert planned_cost(25, 12_000) / 12_000 + 1 < 7
    assert planned_cost(25, 12_000, racing=False) / 12_000 + 1 == 15


def test_harm_is_dropped_early_and_never_helps() -> None:
    """Half of the loops are catastrophic, as early windows are: none gets past round one, and tested they fail."""
    rng = np.random.default_rng(7)
    harm = dict.fromkeys(WINDOWS[:12], -0.2)
    world = World(rng, 2000)
    asked: list[Request] = []

    def answers(request: Request) -> dict[str, Any]:
        asked.append(request)
        return world.flips(request, 0.3, harm)

    run(decide(WINDOWS, 2000, 1), answers)
    assert not set(asked[1].names) & set(harm)
    worse = run(decide(WINDOWS[:3], 2000, 1), answers)
    assert (worse.verdict, worse.winner) == (NONE_HELPS, None)
    assert max(c.p for c in worse.finalists) < 0.05  # significant, the wrong way


def test_confirmation_is_the_bootstrap_and_holm() -> None:
    """The winner is the finalist that the selection ranked first, not the one that looks best on the held-out half."""
    rng = np.random.default_rng(8)
    plain = rng.normal(-2, 1, 1000)
    looped = {name: plain + rng.normal(gain, 0.2, 1000) for name, gain in [("a", 0.05), ("b", 0.1), ("c", 0.012)]}
    decision = select_and_confirm(plain, looped, seed=5, level=0.1)
    held_out = np.sort(np.random.default_rng(5).permutation(1000)[500:])
    assert [c.name for c in decision.finalists] == ["b", "a", "c"]
    for confirmed in decision.finalists:
        diff = looped[confirmed.name] - plain
        assert confirmed.gain == paired_bootstrap(diff[held_out], seed=5, level=1 - 0.1 / 3)
    assert [c.p for c in decision.finalists] == list(holm([c.gain.p for c in decision.finalists]))
    assert (decision.verdict, decision.winner) == (HELPS, "b")


def test_same_scores_same_decision() -> None:
    """Racing over known scores is the generator answered by hand; another seed splits otherwise."""
    rng = np.random.default_rng(9)
    plain = rng.normal(-2, 1, 800)
    looped = {name: plain + rng.normal(0, 0.2, 800) for name in WINDOWS}
    one = select_and_confirm(plain, looped, seed=5, racing=True)
    by_hand = run(decide(WINDOWS, 800, 5), lambda r: {name: (looped[name] - plain)[r.items] for name in r.names})
    assert one == by_hand
    assert one != select_and_confirm(plain, looped, seed=6, racing=True)


@given(st.integers(2, 300), st.integers(2, 10_000), st.integers(1, 12), st.booleans(), st.integers(1, 60))
def test_rounds(n_names: int, n_select: int, finalists: int, racing: bool, least: int) -> None:
    rounds = selection._rounds(n_names, n_select, finalists, racing, least)
    sizes, keeps = zip(*rounds, strict=True)
    assert sizes[-1] == n_select
    assert sizes[0] >= min(least, n_select)
    assert keeps[-1] == min(finalists, n_names)
    assert list(sizes) == sorted(set(sizes))
    assert list(keeps) == sorted(keeps, reverse=True)


ONES = [1.0] * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: next(decide([], 9)), "no loops to choose from."),
        (lambda: next(decide(["a", "b", "a"], 9)), "a is named twice."),
        (lambda: next(decide(["a"], 3)), "3 items cannot be split into two halves."),
        (lambda: next(decide(["a"], 9, finalists=0)), "0 finalists cannot be confirmed."),
        (lambda: next(decide(["a"], 9, worth=0.0)), "worth 0 is not a finite number above 0."),
        (lambda: next(decide(["a"], 9, level=5)), "level 5 is not in the range 0<x<1."),
        (lambda: run(decide(["a"], 8), lambda r: {"b": ONES}), "no scores for a."),
        (lambda: run(decide(["a"], 9), lambda r: {"a": ONES}), "8 differences of a for 9 items."),
        (lambda: select_and_confirm(ONES, {"a": ONES[1:]}), "a has 7 scores, plain 8."),
        (
            lambda: select_and_confirm(ONES, {"a": [math.nan, *ONES[1:]]}),
            "1 of 8 scores of a are not finite numbers.",
        ),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as e:
        call()
    assert e.value.message == message
    assert e.value.hint
