"""What stands beside llama-perplexity's block: errors over chunks, and percentiles that rest on enough tokens."""

from __future__ import annotations

import numpy as np
import pytest

from ggufloop.measure.divergence import ChunkValues, KLStatistics, Record


def record(rng: np.random.Generator, chunks: int, length: int, shared: float) -> Record:
    """Tokens whose KL has a part common to their chunk."""
    kl = np.exp(rng.normal(-3, 1, (chunks, length)) + shared * rng.normal(size=(chunks, 1))).ravel()
    nll = rng.gamma(2, size=chunks * length).astype(np.float32)
    return Record(nll, (nll + rng.normal(0, 0.1, len(nll))).astype(np.float32), kl, rng.random(len(kl)) < 0.9)


def test_errors_over_tokens_are_too_narrow_where_chunks_differ() -> None:
    rng = np.random.default_rng(1)
    found = [record(rng, 100, 128, 0.3) for _ in range(300)]
    means = np.array([r.kl.mean() for r in found])
    tokens = np.mean([KLStatistics.of(r).kl.error for r in found])
    chunks = np.mean([ChunkValues.of(r, 100).kl.error for r in found])
    assert tokens < 0.6 * means.std()
    assert chunks == pytest.approx(means.std(), rel=0.15)
    few = [ChunkValues.of(record(rng, 20, 128, 0.3), 20).kl.error for _ in range(300)]
    assert np.mean(few) == pytest.approx(np.sqrt(5 * 1.4 / 0.6) * means.std(), rel=0.15)  # taken to correlate at .4


def test_means_are_the_blocks() -> None:
    r = record(np.random.default_rng(2), 8, 64, 0.0)
    block, ours = KLStatistics.of(r), ChunkValues.of(r, 8)
    assert ours.kl.mean == pytest.approx(block.kl.mean)
    assert ours.log_ratio.mean == pytest.approx(block.log_ratio.mean, abs=1e-6)
    assert ours.p_diff.mean == pytest.approx(block.p_diff.mean, abs=1e-7)
    assert ours.same_top.mean == pytest.approx(block.same_top.mean)
    said = ours.lines(512, 8)
    assert said.startswith("====== Errors over 8 chunks ======\n")
    assert "Fewer than 10 of 512 tokens lie beyond percentiles above 98.05 or below 1.953 %." in said
