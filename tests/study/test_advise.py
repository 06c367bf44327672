"""`ggufloop advise`: every branch of the rule on constructed studies, its verdicts under noise, and the command."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import Cli

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import PLAIN
from ggufloop.measure import dependence, stats
from ggufloop.measure.stats import Estimate
from ggufloop.study import advise as rule
from ggufloop.study import bits_per_byte
from ggufloop.study import file as study
from ggufloop.study.advise import KEEP, LOOP, MORE_BITS, NO, NOT_ENOUGH, OPEN, ROUTE_UP, SKIPPED, YES, Advice, advise
from ggufloop.study.bits_per_byte import Losses, rate
from ggufloop.study.file import Cell, Chunk, File, Study, StudyHeader

CHUNKS = 64
N_CTX, SCORED = 64, 31
MS = 1.0  # per token of the small model

# Constructed studies


@dataclass(frozen=True)
class Quant:
    """A file of a constructed study. loops: name -> (gain in nats per token, A_K, times as slow as plain)."""

    nll: float
    kl: float = 0.02
    snr: float = 22.0
    bits: float = 4.5
    slower: float = 1.0
    loops: dict[str, tuple[float, float, float]] = field(default_factory=dict)


REFERENCE = Quant(3.0, 0.0, math.inf, 16.0)
BETTER = {"2:5 k=2": (0.04, 1.1, 1.25)}  # 0.16 nats per millisecond
WORSE = {"2:5 k=2": (-0.03, 1.1, 1.25)}


def built(
    files: dict[str, Quant],
    seed: int | None = None,
    chunks: int = CHUNKS,
    params: int = 100_000_000,
    tokens_per_byte: float = 0.25,
    name: str = "small.gguf",
) -> Study:
    """A study of these files, the reference first. seed: of noise; None gives every chunk the same, true numbers.

    As in real studies a chunk's difficulty is common to all of its cells, and what is paired varies much less.
    """
    rng = np.random.default_rng(seed)
    text = np.random.default_rng(seed)  # common to studies of one seed
    sd = 0.0 if seed is None else 1.0
    hard = sd * 0.3 * text.standard_normal(chunks)
    n_bytes = np.rint(SCORED / tokens_per_byte * (1 + sd * 0.1 * text.standard_normal(chunks))).astype(int)
    rng.standard_normal(params % 97)  # another model, other noise
    header = StudyHeader(
        name, "a" * 64, "F16", "llama", 7, params, 300, "F16", (2, 5), "text", "b" * 64, N_CTX, {"threads": "1"},
        "0.1.0", "p1",
    )  # fmt: skip
    cells = {}
    for type_, q in files.items():
        here = q.nll + hard + sd * 0.01 * rng.standard_normal(chunks)
        kl = q.kl * np.exp(sd * (0.3 * rng.standard_normal(chunks) - 0.045))  # of mean q.kl
        for loop, (gain, a_k, slower) in {PLAIN: (0.0, 1.0, 1.0), **q.loops}.items():
            change = -gain + (sd * 0.02 * rng.standard_normal(chunks) if loop != PLAIN else 0.0)
            noise = a_k * kl * (1 + sd * 0.1 * rng.standard_normal(chunks) if loop != PLAIN else 1.0)
            seconds = N_CTX * MS / 1000 * q.slower * slower * (1 + sd * 0.03 * np.abs(rng.standard_normal(chunks)))
            rows = zip((here + change).tolist(), n_bytes.tolist(), noise.tolist(), seconds.tolist(), strict=True)
            cells[type_, loop] = Cell(
                type_,
                loop,
                tuple(Chunk(i, SCORED, b, nll, nll**2 + 4, kld, 0.9, s) for i, (nll, b, kld, s) in enumerate(rows)),
            )
    made = tuple(
        File(t, t * 8, int(q.bits * params / 8), q.bits, q.snr, q.snr, "" if i else "the model itself")
        for i, (t, q) in enumerate(files.items())
    )
    return Study(header, made, cells)


def small(q: Quant, **more: Quant) -> dict[str, Quant]:
    return {"F16": REFERENCE, "Q4_0": q, **more}


def big(nll: float, slower: float) -> dict[str, Quant]:
    """The bigger model: its reference, and Q4_0 with this loss."""
    return {"F16": Quant(nll - 0.01, 0.0, math.inf, 16.0, slower), "Q4_0": Quant(nll, slower=slower)}


@dataclass(frozen=True)
class Case:
    """Studies and what the rule says of Q4_0."""

    verdict: str
    files: dict[str, Quant]
    bigger: dict[str, Quant] | None = None

    def advice(self, seed: int | None = None, **more: Any) -> Advice:
        other = None
        if self.bigger is not None:
            other = built(self.bigger, seed, params=400_000_000, name="big.gguf")
        return advise(built(self.files, seed), "Q4_0", bigger=other, **more)


CASES = {
    "distance": Case(MORE_BITS, small(Quant(3.2, kl=0.3))),
    "weights": Case(MORE_BITS, small(Quant(3.02, snr=14))),
    "share of the gap": Case(MORE_BITS, small(Quant(3.08)), big(2.98, 4)),
    "the loop, alone": Case(LOOP, small(Quant(3.02, loops=BETTER))),
    "the loop is the better buy": Case(LOOP, small(Quant(3.02, loops=BETTER)), big(2.82, 4)),
    "the bigger model is no better": Case(LOOP, small(Quant(3.02, loops=BETTER)), big(3.2, 4)),
    "the bigger model is the better buy": Case(ROUTE_UP, small(Quant(3.02, loops=BETTER)), big(2.62, 1.5)),
    "the loop does harm": Case(ROUTE_UP, small(Quant(3.02, loops=WORSE)), big(2.82, 4)),
    "the loop amplifies noise": Case(ROUTE_UP, small(Quant(3.02, loops={"2:5 k=2": (0.04, 3, 1.25)})), big(2.82, 4)),
    "no loop was measured": Case(ROUTE_UP, small(Quant(3.02)), big(2.82, 4)),
    "nothing helps": Case(KEEP, small(Quant(3.02, loops=WORSE))),
    "nothing helps, bigger neither": Case(KEEP, small(Quant(3.02, loops=WORSE)), big(3.2, 4)),
    "a loop that amplifies noise, alone": Case(KEEP, small(Quant(3.02, loops={"2:5 k=2": (0.04, 3, 1.25)}))),
}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of studies in seconds: each quantile of Student's t once."""
    quantile = functools.cache(stats.t_quantile)
    for module in (stats, bits_per_byte, dependence):
        monkeypatch.setattr(module, "t_quantile", quantile)


def answers(advice: Advice) -> list[list[str]]:
    return [[c.answer for c in step.criteria] for step in advice.steps]


# Verdicts


@pytest.mark.parametrize("name", CASES)
def test_every_branch(name: str) -> None:
    """On true numbers, every chunk the same."""
    advice = CASES[name].advice()
    assert (advice.verdict, advice.could_be) == (CASES[name].verdict, (CASES[name].verdict,))


@pytest.mark.parametrize("name", CASES)
def test_noise_does_not_change_a_verdict(name: str, fast: None) -> None:
    """Of 60 noisy studies of each branch, 780 in all, 95 % say what the true numbers say."""
    case = CASES[name]
    said = [case.advice(seed).verdict for seed in range(60)]
    assert said.count(case.verdict) >= 57, {v: said.count(v) for v in said}


THRESHOLDS = {
    "distance": (small(Quant(3.02, kl=0.1)), None, {MORE_BITS, KEEP}),
    "share": (small(Quant(3.08)), big(2.92, 4), {MORE_BITS, ROUTE_UP}),
    "gain": (small(Quant(3.02, loops={"2:5 k=2": (0.0, 1.1, 1.25)})), None, {LOOP, KEEP}),
    "a_k": (small(Quant(3.02, loops={"2:5 k=2": (0.04, 2.0, 1.25)})), None, {LOOP, KEEP}),
    "race": (small(Quant(3.02, loops=BETTER)), big(2.54, 4), {LOOP, ROUTE_UP}),
    "slope": (
        small(Quant(3.02)),
        big(3.02, 4),
        {MORE_BITS, ROUTE_UP, KEEP},
    ),  # no gap: of nothing bits explain any share
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_on_a_threshold_it_says_that_it_cannot_tell(name: str, fast: None) -> None:
    """The true value is the threshold: of 200 studies (100 where there are two) at most 10 % say either side, for the
    intervals are 95 % ones. A gain of 0 is shown to be below `worth`: that is a right answer, the other one is not."""
    files, bigger, sides = THRESHOLDS[name]
    n = 200 if bigger is None else 100
    found = [Case("", files, bigger).advice(seed) for seed in range(n)]
    said = [a.verdict for a in found]
    wrong = [v for v in said if v != NOT_ENOUGH and not (name == "gain" and v == KEEP)]
    assert len(wrong) <= n / 10, {v: said.count(v) for v in said}
    assert set(said) <= {NOT_ENOUGH, *sides}
    open_ = [a for a in found if a.verdict == NOT_ENOUGH]
    assert {set(a.could_be) == sides for a in open_} == {True}
    assert all(c.answer == OPEN for a in open_ for s in a.steps for c in s.criteria if c.needed is not None)


def test_a_verdict_does_not_turn_back(fast: None) -> None:
    """As the true distance grows, keep becomes not enough data becomes more bits."""
    order = [KEEP, NOT_ENOUGH, MORE_BITS]
    for seed in range(5):
        said = [Case("", small(Quant(3.02, kl=kl))).advice(seed).verdict for kl in np.geomspace(0.05, 0.2, 24)]
        assert sorted(said, key=order.index) == said
        assert set(said) == set(order)


def test_few_chunks_do_not_tell() -> None:
    """A gain that 64 chunks show is not concluded from 16, and one chunk has no interval at all."""
    files = small(Quant(3.02, loops=BETTER))
    few = advise(built(files, 1, chunks=16), "Q4_0")
    assert (few.verdict, few.could_be) == (NOT_ENOUGH, (LOOP, KEEP))
    assert few.steps[1].criteria[0].needed is not None
    one = advise(built(files, chunks=1), "Q4_0")
    assert (one.verdict, one.steps) == (NOT_ENOUGH, ())
    three = advise(built(files, 1, chunks=3), "Q4_0")
    assert three.steps[1].criteria[0].answer == OPEN


def test_a_study_that_was_stopped() -> None:
    """A file with one chunk says nothing of itself nor of others, and a loop with few keeps others from being judged
    with it, not alone."""
    s = built(small(Quant(3.2, 0.3), Q8_0=Quant(3.0, 0.001, 44, 8.5, loops=BETTER | {"2:5 k=3": (0.0, 1.0, 1.5)})), 1)
    cells = dict(s.cells)
    for key, n in ((("Q4_0", PLAIN), 1), (("Q8_0", "2:5 k=3"), 20)):
        cells[key] = dataclasses.replace(cells[key], chunks=cells[key].chunks[:n])
    stopped = dataclasses.replace(s, cells=cells)
    assert advise(stopped, "Q4_0").could_be == (MORE_BITS, LOOP, KEEP)
    advice = advise(stopped, "Q8_0")
    assert advice.verdict == NOT_ENOUGH
    assert advice.steps[1].criteria[0].note.endswith("one alone could be judged on more")
    assert advise(stopped, "Q8_0", loop="2:5 k=2").verdict == LOOP
    light = built(small(Quant(3.2, 0.3), Q8_0=Quant(3.0, 0.001, 44, 8.5)))
    cells = dict(light.cells)
    cells["Q8_0", PLAIN] = dataclasses.replace(cells["Q8_0", PLAIN], chunks=cells["Q8_0", PLAIN].chunks[:1])
    enough = advise(dataclasses.replace(light, cells=cells), "Q4_0").enough_bits
    assert enough is not None
    assert enough.type == "F16"


def test_few_chunks_are_enough_to_see_harm() -> None:
    assert advise(built(small(Quant(3.02, loops=WORSE)), 1, chunks=10), "Q4_0").verdict == KEEP


def test_so_many_chunks_as_needed_says_would_tell(fast: None) -> None:
    """Studies of a distance of 0.105 say how many chunks would tell; of studies with so many about 80 % do."""
    files = small(Quant(3.02, kl=0.105))
    said = [advise(built(files, seed), "Q4_0").steps[0].criteria[0].needed for seed in range(30)]
    n = int(np.median([x for x in said if x is not None]))
    told = [advise(built(files, seed, chunks=n), "Q4_0").steps[0].criteria[0].answer == YES for seed in range(60)]
    assert 0.65 < np.mean(told) < 0.95


# The criteria


def test_criteria_are_skipped_or_open_for_want_of_a_bigger_model() -> None:
    """Without one nothing compares with it; with one of which the file was not measured nothing can be told."""
    files = small(Quant(3.02, loops=BETTER))
    assert answers(advise(built(files), "Q4_0")) == [[NO, NO, SKIPPED], [YES, YES, SKIPPED]]
    other = built({"F16": Quant(2.8), "Q8_0": Quant(2.8, slower=4)}, params=400_000_000)
    advice = advise(built(files), "Q4_0", bigger=other)
    assert answers(advice) == [[NO, NO, OPEN], [YES, YES, OPEN], [OPEN]]
    assert advice.could_be == (MORE_BITS, LOOP, ROUTE_UP, KEEP)
    assert "Q4_0 of small.gguf was not measured on two chunks, only F16, Q8_0" in advice.steps[2].criteria[0].note
    one = built(big(2.8, 4), params=400_000_000, chunks=1)
    assert answers(advise(built(files), "Q4_0", bigger=one)) == [[NO, NO, OPEN], [YES, YES, OPEN], [OPEN]]
    named = advise(built(files), "Q4_0", bigger=other, bigger_type="Q8_0")
    assert named.bigger is not None
    assert (named.verdict, named.bigger.type) == (LOOP, "Q8_0")


def test_the_budget_says_which_files_count() -> None:
    files = small(Quant(3.2, kl=0.3), Q6_K=Quant(3.01, bits=6.5), Q8_0=Quant(3.0, bits=8.5))
    other = {"F16": Quant(2.7, 0, math.inf, 16.0), "Q4_0": Quant(2.8), "Q2_K": Quant(3.5, bits=2.6)}
    pair = built(files), built(other, params=400_000_000)

    def found(budget: int | None) -> tuple[str | None, str | None]:
        a = advise(pair[0], "Q4_0", bigger=pair[1], budget=budget)
        return a.bigger and a.bigger.type, a.enough_bits and a.enough_bits.type

    assert found(None) == ("Q4_0", "Q6_K")
    assert found(10**9) == ("F16", "Q6_K")
    assert found(250_000_000) == ("Q4_0", "Q6_K")
    assert found(200_000_000) == ("Q2_K", "Q6_K")
    assert found(60_000_000) == (None, None)
    assert "fits the budget; the smallest, Q6_K" in advise(pair[0], "Q4_0", budget=60_000_000).note


def test_the_reference_needs_no_bits_and_has_no_noise() -> None:
    files = {"F16": dataclasses.replace(REFERENCE, loops=BETTER), "Q4_0": Quant(3.02)}
    advice = advise(built(files), "F16", bigger=built(big(2.9, 4), params=400_000_000))
    assert answers(advice)[0] == [NO, NO, NO]
    assert (advice.verdict, advice.steps[1].criteria[1].value) == (LOOP, None)


def test_types_of_two_bits_are_not_extrapolated() -> None:
    """More bits, yes; what they would do is not said, nor anything of a type that was not measured."""
    study_ = built({"F16": REFERENCE, "Q2_K": Quant(4.0, 0.9, 9, 2.6), "IQ2_XS": Quant(4.3, 1.2, 8, 2.3)})
    advice = advise(study_, "Q2_K")
    assert advice.verdict == MORE_BITS
    assert advice.note.startswith("only types of 2 bits were measured")
    assert advise(study_, "Q2_K", budget=40_000_000).enough_bits is None
    with pytest.raises(UsageError, match="Q4_0 was not measured in this study, and nothing is extrapolated"):
        rule.types_of(study_, ["Q4_0"])
    assert advise(built(small(Quant(3.2, 0.3), Q2_K=Quant(4.0, 0.9, 9, 2.6))), "Q2_K").note == ""


def test_the_best_of_ten_loops_is_judged_as_that(fast: None) -> None:
    """Ten loops without effect: the best of them looks good alone."""
    loops = {f"2:5 k={k}": (0.0, 1.1, 1.25) for k in range(2, 12)}
    gain = [advise(built(small(Quant(3.02, loops=loops)), seed), "Q4_0").steps[1].criteria[0] for seed in range(12)]
    assert [c.answer for c in gain].count(YES) <= 2
    assert all(isinstance(c.value, Estimate) and c.value.n == CHUNKS for c in gain)
    named = advise(built(small(Quant(3.02, loops=loops)), 1), "Q4_0", loop="2:5 k=3")
    assert named.loop == "2:5 k=3"
    value = named.steps[1].criteria[0].value
    assert isinstance(value, Estimate)
    assert value.n == CHUNKS
    with pytest.raises(UsageError, match="nothing of Q4_0 under 'k=9'"):
        advise(built(small(Quant(3.02, loops=loops))), "Q4_0", loop="k=9")


def test_a_loop_that_amplifies_noise_does_not_stand_in_the_way_of_one_that_does_not() -> None:
    loops = {"naive": (0.08, 4.0, 1.25), "damped": (0.04, 1.0, 1.25)}
    advice = advise(built(small(Quant(3.02, loops=loops)), 5), "Q4_0")
    assert (advice.verdict, advice.loop) == (LOOP, "damped")


def test_models_of_other_tokenizers_are_compared_in_bits_per_byte() -> None:
    """The bigger model has the lower loss per token, in twice as many tokens; and the other way round."""
    mine = built(small(Quant(3.02)), 1)
    more_tokens = built(big(2.0, 4), 1, params=400_000_000, tokens_per_byte=0.5)
    assert advise(mine, "Q4_0", bigger=more_tokens).verdict == KEEP
    fewer_tokens = built(big(4.0, 4), 1, params=400_000_000, tokens_per_byte=0.125)
    advice = advise(mine, "Q4_0", bigger=fewer_tokens)
    assert advice.verdict == ROUTE_UP


def test_milliseconds_are_of_the_same_text() -> None:
    """A bigger model with half the tokens costs half of what its time per token says: 0.5 more per token, not 2."""
    loops = {"2:5 k=2": (0.08, 1.1, 1.25)}  # 0.32 nats per ms
    mine = built(small(Quant(3.02, loops=loops)))
    per_token = 2 * (3.02 - 0.25)  # 0.25 nats per token of the small model better
    assert advise(mine, "Q4_0", bigger=built(big(2.77, 3), params=400_000_000)).verdict == LOOP
    halved = built(big(per_token, 3), params=400_000_000, tokens_per_byte=0.125)
    assert advise(mine, "Q4_0", bigger=halved).verdict == ROUTE_UP


def test_thresholds_are_where_the_options_say() -> None:
    """Each moved across the true value turns its criterion."""
    case = Case("", small(Quant(3.08, loops=BETTER)), big(2.92, 4))

    def criterion(step: int, i: int, **values: float) -> str:
        return case.advice(thresholds=rule.Thresholds(**values)).steps[step].criteria[i].answer

    for step, i, name, below, over in (
        (0, 0, "kld", (0.019, YES), (0.021, NO)),
        (0, 1, "snr", (21.9, NO), (22.1, YES)),
        (0, 2, "share", (0.49, YES), (0.51, NO)),
        (1, 1, "a_k", (1.09, NO), (1.11, YES)),
    ):
        for value, answer in (below, over):
            assert criterion(step, i, **{name: value}) == answer, name
    weak = built(small(Quant(3.02, loops={"2:5 k=2": (0.0115, 1.1, 1.25)})), 3)
    gain = [advise(weak, "Q4_0", rule.Thresholds(sigma=s)).steps[1].criteria[0].answer for s in (1.5, 4.0)]
    assert gain == [YES, OPEN]
    worth = [advise(weak, "Q4_0", rule.Thresholds(sigma=4.0, worth=w)).steps[1].criteria[0].answer for w in (0.01, 0.1)]
    assert worth == [OPEN, NO]


# Arithmetic


def sample(seed: int = 0, chunks: int = 20) -> tuple[Losses, np.ndarray]:
    """Of three files on the same chunks of equally many bytes, and bits per byte per chunk."""
    rng = np.random.default_rng(seed)
    nll = rng.normal(0, 0.3, chunks) + rng.normal([[3.1], [3.0], [2.6]], 0.05, (3, chunks))
    cells = [
        Cell("q", PLAIN, tuple(Chunk(i, 31, 120, float(x), 0.0, 0.0, 1.0, 1.0) for i, x in enumerate(row)))
        for row in nll
    ]
    return Losses.of(cells[:2], cells[2]), nll * 31 / math.log(2) / 120


def test_contrasts_are_those_of_neighbouring_chunks() -> None:
    found, bits = sample()
    for weights in ((1, -1, 0), (1, 0, -1), (0.5, -1, 0.5)):
        series = np.asarray(weights) @ bits
        expected = dependence.paired_mean(series, [0] * len(series))
        got = found.contrast(weights)
        assert (got.mean, got.low, got.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_fiellers_interval_is_where_the_contrast_holds_0(seed: int) -> None:
    found, _ = sample(seed)
    above, below = np.array([1.0, -1.0, 0.0]), np.array([1.0, 0.0, -1.0])
    share = found.ratio(above, below)
    assert share is not None
    for x in np.linspace(share.low - 0.2, share.high + 0.2, 41):
        c = found.contrast(above - x * below)
        assert (c.low <= 0 <= c.high) == (share.low <= x <= share.high)
    assert found.ratio(below, np.array([1e-6, -1e-6, 0.0])) is None or found.contrast([1, -1, 0]).low > 0


def test_other_tokens_are_another_sample() -> None:
    """The variance of a difference is then the sum of both, which is much more than the paired one."""
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 0.3, 40)

    def cell(n: int, n_bytes: int, nll: np.ndarray) -> Cell:
        return Cell("q", PLAIN, tuple(Chunk(i, n, n_bytes, float(x), 0, 0, 1, 1) for i, x in enumerate(nll)))

    a, b = cell(31, 120, hard), cell(31, 120, hard + rng.normal(0, 0.01, 40))
    paired, apart = Losses.of([a, a], b), Losses.of([a, a], cell(62, 240, b.values("nll")))
    assert paired.contrast((1, 0, -1)).mean == pytest.approx(apart.contrast((1, 0, -1)).mean)
    widths = [e.high - e.low for e in (paired.contrast((1, 0, -1)), apart.contrast((1, 0, -1)))]
    assert widths[1] > 10 * widths[0]
    one = Losses.of([a], None)
    assert widths[1] == pytest.approx(math.sqrt(2) * (one.contrast([1]).high - one.contrast([1]).low), rel=0.05)


def test_a_ratio_of_sums_is_linearised() -> None:
    """Chunks of unequal bytes: coverage of bits per byte over 400 samples is the 95 % it says."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        n_bytes = rng.integers(60, 180, 100)
        nll = 0.02 * n_bytes + rng.normal(0.6, 0.3, 100)  # longer texts are harder
        chunks = tuple(Chunk(i, 31, int(b), float(x), 0, 0, 1, 1) for i, (b, x) in enumerate(zip(n_bytes, nll)))  # noqa: B905
        found = Losses.of([Cell("q", PLAIN, chunks)], None).contrast([1.0])
        true = (0.02 * 119.5 + 0.6) * 31 / math.log(2) / 119.5
        inside += found.low <= true <= found.high
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize("gain", [(1, 3), (-1, 2), (-3, -1), (0, 0)])
@pytest.mark.parametrize("cost", [(1, 2), (-1, 2), (-2, -1)])
def test_a_rate_holds_every_ratio(gain: tuple[float, float], cost: tuple[float, float]) -> None:
    found = rate(Estimate(sum(gain) / 2, *gain, 9), Estimate(sum(cost) / 2, *cost, 9))
    for g in np.linspace(*gain, 7):
        for c in np.linspace(*cost, 7):
            if c > 0:
                assert found.low - 1e-9 <= g / c <= found.high + 1e-9
    if cost[0] <= 0 < gain[1]:
        assert found.high == math.inf  # better and no slower


# What is refused


def test_studies_that_do_not_belong_together() -> None:
    mine = built(small(Quant(3.02)))

    def other(**changes: Any) -> Study:
        s = built(big(2.8, 4), params=400_000_000, name="big.gguf")
        return dataclasses.replace(s, header=dataclasses.replace(s.header, **changes))

    for changes, difference in (
        ({"text_sha256": "c" * 64}, "text_sha256 bbbbbbbbbbbb... and cccccccccccc..."),
        ({"ggufloop": "0.2.0"}, "ggufloop 0.1.0 and 0.2.0"),
        ({"patch_id": "p2"}, "patch_id p1 and p2"),
        ({"n_ctx": 128}, "n_ctx 64 and 128"),
        ({"settings": {"threads": "2"}}, "threads 1 and 2"),
    ):
        message = f"the studies of small.gguf and big.gguf cannot be compared: {re.escape(difference)}"
        with pytest.raises(GgufloopError, match=message):
            advise(mine, "Q4_0", bigger=other(**changes))
    with pytest.raises(UsageError, match=r"big\.gguf has 100000000 weights, small\.gguf 100000000"):
        advise(mine, "Q4_0", bigger=other(n_params=100_000_000))
    with pytest.raises(UsageError, match="Q8_0 of which bigger model"):
        advise(mine, "Q4_0", bigger_type="Q8_0")
    with pytest.raises(UsageError, match="has no type 'Q8_0'"):
        advise(mine, "Q4_0", bigger=other(), bigger_type="Q8_0")


# The command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(cli: Cli) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        return cli("advise", *args)

    return call


def saved(s: Study, path: Path) -> Path:
    study.create(path, s.header)
    grown = study.read(path)
    for file in s.files:
        grown = study.add_file(path, grown, file)
    for (type_, loop), cell in s.cells.items():
        for chunk in cell.chunks:
            study.add_chunk(path, type_, loop, chunk)
    return path


def test_what_is_printed(run: Run, tmp_path: Path) -> None:
    files = {"F16": REFERENCE, "Q8_0": Quant(3.0, 0.001, 44, 8.5, loops=BETTER), "Q2_K": Quant(3.9, 0.7, 9, 2.6)}
    path = saved(built(files, chunks=32), tmp_path / "study.jsonl")
    code, out, err = run(tmp_path)
    assert (code, err) == (0, "")
    assert out == (
        "model   small.gguf, 100 million weights, reference F16 (the model itself)\n"
        "bigger  none: routing up was not considered\n"
        "text    text, chunks of 64; brackets are 95 % intervals where they say no other\n"
        "\n"
        "F16 (200.0 MB, 16.00 bits per weight): keep it, loop off\n"
        "  gain of looping, nats per token: -; > 2 sigma? no (no loop was measured)\n"
        "\n"
        "Q8_0 (106.2 MB, 8.50 bits per weight): loop, 2:5 k=2\n"
        "  gain of looping, nats per token: 0.04 [0.04, 0.04] (95.45 %), n = 32 chunks; > 2 sigma? yes\n"
        "  A_K, noise amplification: 1.1 [1.1, 1.1], n = 32 chunks; <= 2? yes\n"
        "  Q8_0 plain minus F16 plain = +0.0000 [+0.0000, +0.0000], n = 32 chunks: no effect larger than 0.01\n"
        "  Q8_0 2:5 k=2 minus F16 plain = +0.0400 [+0.0400, +0.0400], n = 32 chunks: better\n"
        "\n"
        "Q2_K (32.5 MB, 2.60 bits per weight): more bits first\n"
        "  KLD to F16, nats: 0.7 [0.7, 0.7], n = 32 chunks; > 0.1? yes\n"
        "  SNR of the window, dB: 9; < 17? yes\n"
        "  recoverable by more bits, at most: +0.9000 [+0.9000, +0.9000], n = 32 chunks, nats per token\n"
        "  the smallest measured file that needs no more: Q8_0, 106.2 MB\n"
        "  Q2_K plain minus Q8_0 plain = -0.9000 [-0.9000, -0.9000], n = 32 chunks: worse\n"
    )
    assert run(path) == (0, out, "")
    made = dataclasses.replace(built(files).files[0], note="small.gguf dequantised")
    shipped = dataclasses.replace(built(files), files=(made, *built(files).files[1:]))
    assert (
        "\n        what small.gguf lost when it was quantised is in none of these numbers\n"
        in (run(saved(shipped, tmp_path / "shipped.jsonl"))[1])
    )


def test_every_criterion_is_explained(run: Run, tmp_path: Path) -> None:
    """In either order of the two studies."""
    a = saved(built(small(Quant(3.02, loops=BETTER)), 1), tmp_path / "a.jsonl")
    b = saved(built(big(2.82, 4), 1, params=400_000_000, name="big.gguf"), tmp_path / "b.jsonl")
    code, out, _ = run(a, b, "--type", "Q4_0", "--explain")
    assert code == 0
    assert run(b, a, "--type", "Q4_0", "--explain")[1] == out
    for line in (
        "bigger  big.gguf, 400 million weights, reference F16",
        "Q4_0 (56.2 MB, 4.50 bits per weight): loop, 2:5 k=2",
        "  1. More bits first? no",
        "  2. Loop? (2:5 k=2) yes",
        "  3. Route up? no",
        "       <= 2? yes",
    ):
        assert f"\n{line}" in out
    interval = r"[-+\d.e]+ \[[-+\d.e]+, [-+\d.e]+\]( \(95\.45 %\))?, n = 64"
    assert len(re.findall(interval, out)) == 10  # five criteria, the gap, both sides of the race, and two against F16
    data = json.loads(run(a, b, "--type", "Q4_0", "-o", "json")[1])
    assert data["advice"][0]["verdict"] == LOOP
    assert data["advice"][0]["bigger"]["type"] == "Q4_0"
    assert data["thresholds"]["snr"] == 17.0
    assert [s["name"] for s in data["advice"][0]["steps"]] == ["more bits", "loop", "bigger model"]
    assert data["advice"][0]["steps"][1]["criteria"][0]["value"]["n"] == 64
    moved = json.loads(run(a, b, "--type", "Q4_0", "--min-snr", 30, "-o", "json")[1])
    assert moved["advice"][0]["verdict"] == MORE_BITS


def test_what_cannot_be_told_says_how_much_would_tell(run: Run, tmp_path: Path) -> None:
    path = saved(built(small(Quant(3.02, kl=0.1)), 1, chunks=16), tmp_path / "a.jsonl")
    out = run(path, "--type", "Q4_0")[1]
    assert (
        "Q4_0 (56.2 MB, 4.50 bits per weight): not enough data to tell: more bits first, or keep it, loop off\n" in out
    )
    assert re.search(r"KLD to F16, nats: .*; > 0\.1\? not enough data; about \d+ chunks would tell\n", out)
    one = saved(built(small(Quant(3.02)), chunks=1), tmp_path / "b.jsonl")
    end = "bits per weight): not enough data to tell\n  one chunk has no interval; measure some dozen.\n"
    assert run(one, "--type", "Q4_0")[1].endswith("Q4_0 (56.2 MB, 4.50 " + end)


def test_bad_input(run: Run, tmp_path: Path) -> None:
    good = saved(built(small(Quant(3.02))), tmp_path / "a.jsonl")
    study.create(empty := tmp_path / "empty.jsonl", built(small(Quant(3.02))).header)
    (torn := tmp_path / "torn.jsonl").write_text("{}\n")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((), 2, "0 studies are given.\n  name one, or two of models of different size.\n"),
        ((good, good), 2, "small.gguf has 100000000 weights, small.gguf 100000000.\n"
                          "  the second study must be of a bigger model.\n"),
        ((tmp_path / "no.jsonl",), 1, f"cannot read {tmp_path / 'no.jsonl'}: No such file or directory.\n"),
        ((torn,), 1, f"{torn}"),
        ((empty,), 1, "the study of small.gguf has no measurement of its reference yet.\n"),
        ((good, "--type", "Q4_1"), 2, "Q4_1 was not measured in this study, and nothing is extrapolated.\n"
                                      "  did you mean Q4_0? Known: F16, Q4_0.\n"),
        ((good, "-o", "csv"), 2, "output form 'csv' is not known.\n  known: text, json.\n"),
        ((good, "--max-kld", "-1"), 2, "--max-kld -1 is not in the range 0<x<inf.\n"),
        ((good, "--max-share", "nan"), 2, "--max-share nan is not in the range 0<x<1.\n"),
        ((good, "--size-budget", "4 apples"), 2, "'4 apples' is not a size.\n  write it like 500MB or 4GB.\n"),
        ((good, "--loop", "k=2"), 2, "this study has nothing of F16 under 'k=2'.\n"),
    ]  # fmt: skip
    for args, code, message in cases:
        found = run(*args)
        assert (*found[:2], found[2].startswith(f"error: {message}")) == (code, "", True), (args, found[2])
