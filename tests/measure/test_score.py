"""Scoring a text: the arithmetic against float64, the batches against `logits`, memory, and packed distributions.

`scalar_*` restate llama-perplexity's formulas one number at a time, as written in its source: float32 where it has
float, float64 where it has double.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.logits import Normalisers, entropy, expf, log_probabilities
from ggufloop.measure.divergence import PERCENTILES, KLStatistics, Packed, Record
from ggufloop.measure.score import each_target, score

TinyModel = Callable[[str], Path]
F = np.float32
TOKENS = np.random.default_rng(3).integers(0, 256, 100).tolist()
LOOP = "2:5 k=3 kv=frozen"


def log_softmax(rows: np.ndarray) -> np.ndarray:
    """Float64."""
    rows = rows.astype(np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def some_logits(n: int = 50, n_vocab: int = 4001, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(n, n_vocab)) * 3 + rng.normal(size=(n, 1)) * 20).astype(F)
    return rows, rng.integers(n_vocab, size=n)


@pytest.fixture(scope="module")
def llm(tiny_model: TinyModel) -> Iterator[LoopedLlama]:
    """Batches of 32 tokens, so that a text is several."""
    model = LoopedLlama(
        tiny_model("llama"), n_ctx=256, n_batch=32, n_ubatch=32, n_threads=1, n_threads_batch=1, verbose=False
    )
    yield model
    model.close()


def test_log_probabilities_are_those_of_float64() -> None:
    rows, targets = some_logits()
    rows[7, 3] = -np.inf  # a token that cannot come
    targets[8] = rows[8].argmax()
    scores = log_probabilities(rows, targets)
    expected = log_softmax(rows)
    np.testing.assert_allclose(scores.logprob, expected[np.arange(50), targets], rtol=0, atol=4e-6)
    assert scores.top.tolist() == (expected.argmax(axis=1) == targets).tolist()
    assert scores.top[8]
    np.testing.assert_array_equal(scores.nll, -scores.logprob)


def test_entropy() -> None:
    assert entropy(np.zeros(8, F)) == pytest.approx(math.log(8))
    assert entropy(np.array([0, -np.inf, -np.inf], F)) == 0


@pytest.mark.parametrize("loop", [None, LOOP])
@pytest.mark.parametrize("first", [0, 31, 32, 50, 98])
def test_scores_are_those_of_all_the_logits(llm: LoopedLlama, loop: str | None, first: int) -> None:
    """`first` before, at and after the edges of batches; the last one scores a single token."""
    llm.set_loop(loop)
    llm.reset()
    expected = log_softmax(llm.logits(TOKENS))[np.arange(99), TOKENS[1:]][first:]
    scores = score(llm, TOKENS, first)
    np.testing.assert_allclose(scores.logprob, expected, rtol=0, atol=4e-6)
    assert len(scores.top) == 99 - first


def test_each_part_is_handed_over_once_and_in_place(llm: LoopedLlama) -> None:
    parts: list[tuple[slice, int, list[int]]] = []
    each_target(llm, TOKENS, 40, lambda part, rows, targets: parts.append((part, len(rows), targets.tolist())))
    assert [(p.start, p.stop) for p, _, _ in parts] == [(0, 24), (24, 56), (56, 59)]  # cut at 64, 96 of 100
    assert [n for _, n, _ in parts] == [24, 32, 3]
    assert [t for _, _, targets in parts for t in targets] == TOKENS[41:]


def test_a_part_with_no_target_is_left_out(llm: LoopedLlama) -> None:
    """97 tokens: the last batch holds only the last token, which predicts nothing."""
    parts: list[slice] = []
    each_target(llm, TOKENS[:97], 0, lambda part, rows, targets: parts.append(part))
    assert parts[-1] == slice(64, 96)


def test_evaluating_goes_on_after_scoring(llm: LoopedLlama) -> None:
    """What is scored is evaluated as any other step: what follows continues it."""
    llm.set_loop(None)
    score(llm, TOKENS[:60], 58)
    rest = llm.logits(TOKENS[60:])
    llm.reset()
    llm.logits(TOKENS[:60])
    np.testing.assert_allclose(rest, llm.logits(TOKENS[60:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tokens", "first"), [([], 0), ([1], 0), ([1, 2], 1), ([1, 2, 3], -1)])
def test_nothing_to_score(llm: LoopedLlama, tokens: list[int], first: int) -> None:
    with pytest.raises(UsageError, match=f"^{len(tokens)} tokens hold none to score after token {first}.$"):
        score(llm, tokens, first)


def test_a_text_longer_than_the_context(llm: LoopedLlama) -> None:
    with pytest.raises(GgufloopError, match="300 more do not fit"):
        score(llm, [1] * 300)


def test_memory_does_not_grow_with_the_text(llm: LoopedLlama) -> None:
    """Ten batches may take the numbers they return more than two, not eight more batches of logits."""
    llm.set_loop(None)

    def peak(n: int) -> int:
        tracemalloc.start()
        score(llm, [65] * n)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(64)
    assert peak(256) - peak(64) < 0.25 * 32 * llm.n_vocab() * 4


def scalar_pack(row: np.ndarray) -> tuple[F, F, list[int]]:
    top, low = row.max(), row.min()
    low = max(low, top - F(16))
    total = 0.0
    for x in row:
        total += float(np.exp(x - top))
    log_sum = F(math.log(total))
    scale = (top - low) / F(65535)
    inverse = F(1) / scale if scale else F(0)
    return scale, low - top - log_sum, [int(np.rint(inverse * (x - low))) if x > low else 0 for x in row]


def packed(rows: np.ndarray) -> Packed:
    out = Packed.empty(*rows.shape)
    out.put(slice(0, len(rows)), rows, Normalisers.of(rows))
    return out


def test_packing_is_llama_perplexitys() -> None:
    rows, targets = some_logits(6, 500)
    rows[4] = 1.5  # all alike: no scale
    rows[5, :20] = -np.inf
    found = packed(rows)
    for i, row in enumerate(rows):
        scale, lowest, steps = scalar_pack(row)
        assert found.scale[i] == scale
        assert found.lowest[i] == pytest.approx(lowest, rel=3e-7)  # the order of a float64 sum
        assert found.steps[i].tolist() == steps
    kept = np.delete(np.arange(6), 5)
    exact = -log_softmax(rows[kept])[np.arange(5), targets[kept]]
    shown = found.nll(targets)[kept]
    near = exact < 16
    np.testing.assert_allclose(shown[near], exact[near], rtol=0, atol=0.51 * 16 / 65535)


def scalar_compare(row: np.ndarray, target: int, scale: F, lowest: F, steps: np.ndarray) -> tuple[float, ...]:
    top, total = row.max(), 0.0
    for x in row:
        total += float(np.exp(x - top))
    end = top + F(math.log(total))
    kl, best, best_base = 0.0, 0, 0
    for i, x in enumerate(row):
        p = scale * F(steps[i]) + lowest
        best = i if x > row[best] else best
        best_base = i if steps[i] > steps[best_base] else best_base
        if p > F(-16):
            kl += float(np.exp(p) * (p - x + end))
    return float(end - row[target]), float(-(scale * F(steps[target]) + lowest)), kl, best == best_base


def test_comparing_is_llama_perplexitys() -> None:
    rows, targets = some_logits(5, 600)
    other = rows + np.random.default_rng(1).normal(size=rows.shape).astype(F)
    base = packed(rows)
    record = Record.empty(7)
    record.put(slice(1, 6), other, Normalisers.of(other), targets, base)
    for i, row in enumerate(other):
        nll, nll_base, kl, same = scalar_compare(row, targets[i], base.scale[i], base.lowest[i], base.steps[i])
        assert record.nll[i + 1] == pytest.approx(nll, rel=3e-7)
        assert record.nll_base[i + 1] == nll_base
        assert record.kl[i + 1] == pytest.approx(kl, rel=1e-6)
        assert record.same_top[i + 1] == same


def test_a_distribution_does_not_diverge_from_itself() -> None:
    rows, targets = some_logits(40, 3000)
    record = Record.empty(40)
    record.put(slice(0, 40), rows, Normalisers.of(rows), targets, packed(rows))
    assert abs(record.kl).max() < 16 / 65535
    assert record.same_top.all()


def test_statistics_of_few_tokens_and_of_no_spread() -> None:
    """Values llama-perplexity prints as 0 or nan must not end in an error here."""
    nll = np.array([1, 2, 3], F)
    few = KLStatistics.of(Record(nll, nll, np.zeros(3), np.ones(3, bool)))
    assert few.n == 3
    assert few.ppl.error == 0
    assert math.isnan(few.correlation)
    assert math.isnan(few.p_diff_rms.error)
    assert few.same_top == (1, 0)
    assert few.kl_at == dict.fromkeys(PERCENTILES, 0.0)
    assert few.block().count("\n") == 39


def test_the_exponential_is_that_of_float64_on_every_cpu() -> None:
    """numpy's own for float32 differs from it in the last place, more or fewer values by CPU."""
    x = np.linspace(-104, 0, 100_003, dtype=np.float32)
    exact = np.exp(x.astype(np.float64)).astype(np.float32)
    assert np.array_equal(expf(x), exact)
    assert np.array_equal(expf(x, out=x), exact)
