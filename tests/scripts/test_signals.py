"""Signals without labels: the rank correlation against scipy's, and a small model's windows measured and read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import signals
from click.testing import CliRunner
from scipy.stats import rankdata, spearmanr

from ggufloop.backend.settings import ContextSettings
from ggufloop.loop import LoopSpec
from ggufloop.opening import open_model


def test_ranks_are_scipys() -> None:
    rng = np.random.default_rng(3)
    for n in (2, 5, 30):
        x, y = rng.integers(0, 6, n), rng.normal(size=n)
        assert signals.ranks(x) == pytest.approx(rankdata(x))
        if len(set(x)) > 1:
            assert signals.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert signals.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_neighbours_widen_the_interval() -> None:
    """Twenty windows that say the same four times over are no more than five."""
    rng = np.random.default_rng(5)
    x, noise = rng.normal(size=6), rng.normal(size=6)
    x, y = np.repeat(x, 4), np.repeat(x + noise, 4)
    blocks, alone = signals.correlation(x, y), signals.correlation(x, y, block=1)
    assert blocks.mean == alone.mean == pytest.approx(spearmanr(x, y).statistic)
    assert blocks.high - blocks.low > 1.4 * (alone.high - alone.low)


def test_signals_by_hand(tiny_model: Callable[[str], Path]) -> None:
    """The plain model as a loop moves no prediction; a loop's KL and the layers' cosines are what the states say."""
    llm = open_model(tiny_model("llama"), ContextSettings(n_ctx=64, n_threads=1))
    tokens = list(range(3, 40))
    loops = [LoopSpec((1, 4), 3), LoopSpec((2, 5), 3)]
    found = signals.signals(llm, tokens, loops)
    llm.set_loop(None)
    states = {s.layer: s.rows.astype(np.float64) for s in llm.trace(tokens)}
    llm.reset()
    plain = llm.logits(tokens).astype(np.float64)
    plain -= np.log(np.exp(plain).sum(-1, keepdims=True))
    for loop, each in zip(loops, found, strict=True):
        llm.set_loop(loop)
        llm.reset()
        looped = llm.logits(tokens).astype(np.float64)
        looped -= np.log(np.exp(looped).sum(-1, keepdims=True))
        assert each["kl"] == pytest.approx((np.exp(plain) * (plain - looped)).sum(-1).mean(), abs=1e-9)
        assert each["kl"] > 0
        a, b = loop.window
        turned = [
            np.sum(states[i - 1] * states[i], -1) / np.linalg.norm(states[i - 1], axis=-1)
            / np.linalg.norm(states[i], axis=-1) for i in range(a, b)
        ]  # fmt: skip
        assert each["coherence"] == pytest.approx(np.mean(turned))
        # The first pass of the loop is the plain window: x + (g(x) - x) / 3.
        moved = np.linalg.norm(states[b - 1] - states[a - 1], axis=-1) / np.linalg.norm(states[a - 1], axis=-1)
        assert each["step"] == pytest.approx(moved.mean(), rel=1e-3)
    llm.close()


def test_windows_are_measured_and_read_again(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "WIDTH", 2)
    monkeypatch.setattr(signals, "RESAMPLES", 200)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 400)
    words = ["--text", str(text), "--signals", str(text), "--chunks", "8", "-n", "64", "-t", "1"]
    saved = tmp_path / "data" / "w.csv"
    ran = CliRunner().invoke(signals.main, [str(tiny_model("llama")), *words, "--save", str(saved)])
    assert ran.exit_code == 0, ran.output
    again = CliRunner().invoke(signals.main, ["--read", str(saved)])
    assert (again.exit_code, again.output.splitlines()[-1]) == (0, ran.output.splitlines()[-1])
    windows = signals.read_windows(saved)
    assert [w.window for w in windows] == [f"{i}:{i + 2}" for i in range(1, 1 + len(windows))]
    best = max(windows, key=lambda w: w.gain)
    (row,) = signals.summary(windows).rows
    assert row[1:3] == [len(windows), 8]
    assert sum(int(str(count)) for count in row[3:6]) == len(windows)
    assert row[6:8] == [f"{best.window} k=3", best.gain]
    wrong = CliRunner().invoke(signals.main, [str(tmp_path / "none.gguf")])
    assert (wrong.exit_code, "--save" in wrong.output) == (1, False)
    wrong = CliRunner().invoke(signals.main, ["--read", str(saved), "--save", str(text / "w.csv")])
    assert (wrong.exit_code, wrong.output.count("\n")) == (1, 1)
    wrong = CliRunner().invoke(signals.main, ["--read", str(text)])
    assert (wrong.exit_code, wrong.output.count("\n")) == (1, 1)
