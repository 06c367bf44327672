"""What later passes may do less of (attention, halt, routing), depth that changes from token to token, traces and lens.

Identities of the looped library with itself; the torch reference of test_reference.py says what the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import archs, tiny, zoo

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec

TinyModel = Callable[[str], Path]
Rows = np.ndarray
FAMILIES = ("llama", "qwen3moe", "gemma3", "deepseek2")
KV_OF_ONE_SLOT = ("first", "last", "frozen")
TOKENS = np.random.default_rng(5).integers(0, 256, 36).tolist()
PROMPT = 24
SHOWS = 0.02
"""Least difference of some logit between settings that differ; equal ones differ by 0.0."""


def load(path: Path, **settings: object) -> LoopedLlama:
    return LoopedLlama(
        path, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False, **settings
    )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Iterator[LoopedLlama]:
    model = load(tiny_model(request.param))
    yield model
    model.close()


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> Iterator[LoopedLlama]:
    model = load(tiny_model("llama"))
    yield model
    model.close()


def window(llm: LoopedLlama) -> str:
    a, b = tiny.FAMILIES[llm.metadata["general.architecture"]].window
    return f"{a}:{b}"


def rows(llm: LoopedLlama, settings: str | None, tokens: Sequence[int] = TOKENS) -> Rows:
    """Logits of a prompt and of the tokens after it, one by one, under a loop of the family's window."""
    llm.set_loop(None if settings is None else f"{window(llm)} {settings}")
    llm.reset()
    return np.concatenate([llm.logits(tokens[:PROMPT]), *(llm.logits([t]) for t in tokens[PROMPT:])])


def spread(a: Rows, b: Rows) -> float:
    return float(abs(a - b).max())


@pytest.mark.parametrize("kv", ["first", "last", "each", "frozen"])
def test_attention_to_all_positions_is_the_full_loop(llm: LoopedLlama, kv: str) -> None:
    full = rows(llm, f"k=3 kv={kv}")
    assert spread(rows(llm, f"k=3 kv={kv} attention={len(TOKENS)}"), full) == 0
    assert spread(rows(llm, f"k=3 kv={kv} attention=1 sinks={len(TOKENS)}"), full) == 0
    some = rows(llm, f"k=3 kv={kv} attention=4")
    assert spread(some, full) > SHOWS
    assert spread(rows(llm, f"k=3 kv={kv} attention=4 sinks=2"), some) > SHOWS
    # positions that see no further than 4 back anyway
    assert spread(some[:4], full[:4]) == 0


@pytest.mark.parametrize("arch", ["deepseek32", "dots3note", "glm-dsa", "minimax-m3"])
def test_what_an_indexer_chooses_is_not_limited(arch: str, tmp_path: Path) -> None:
    """None of the chosen keys may be among the last positions, and then there is nothing to attend to."""
    llm = load(zoo.write(tmp_path / "model.gguf", archs.ROWS[arch]))
    a, b = archs.ROWS[arch].window
    with pytest.raises(UsageError, match=f"attention 4 cannot run on {arch}"):
        llm.set_loop(f"{a}:{b} k=3 attention=4")
    llm.set_loop(f"{a}:{b} k=3")
    assert np.isfinite(llm.logits(TOKENS)).all()
    llm.close()


@pytest.mark.parametrize("flash_attn", [False, True])
def test_attention_of_sequences_that_share_a_cache(tiny_model: TinyModel, flash_attn: bool) -> None:
    """The mask is filled from the cells of the cache, whose order is not that of the positions once it was used."""
    path = tiny_model("llama")
    llm = load(path, flash_attn=flash_attn)
    expected = rows(llm, "k=3 attention=4 sinks=1")
    llm.reset()
    llm.logits(TOKENS[::-1])
    for t in TOKENS:  # forget the first cells, so that new tokens go there
        llm.n_tokens = 0
        llm.logits([t])
    llm.n_tokens = 0
    again = np.concatenate([llm.logits(TOKENS[:PROMPT]), *(llm.logits([t]) for t in TOKENS[PROMPT:])])
    assert spread(again, expected) == 0
    llm.close()


def test_attention_is_cut_like_the_full_loop(llm: LoopedLlama) -> None:
    settings = "k=3 kv=frozen attention=5 sinks=1"
    expected = rows(llm, settings)
    llm.reset()
    cut = np.concatenate([llm.logits(TOKENS[a:b]) for a, b in pairwise((0, 7, 8, 20, len(TOKENS)))])
    assert spread(cut, expected) < 2e-4


def steps_of(llm: LoopedLlama, settings: str, tokens: Sequence[int]) -> list[float]:
    """The mean over tokens of ||y_{j+1} - y_j|| / ||y_j|| of each pass of a batch, from the states a trace shows."""
    llm.set_loop(f"{window(llm)} {settings}")
    first, last = llm.loop.window
    states = {(s.layer, s.evaluation): s.rows.astype(np.float64) for s in llm.trace(tokens)}
    n = llm.loop.tableau().evaluations
    y = [states[first - 1, j] for j in range(1, n + 1)] + [states[last - 1, n + 1]]
    return [float((np.linalg.norm(b - a, axis=-1) / np.linalg.norm(a, axis=-1)).mean()) for a, b in pairwise(y)]


@pytest.mark.parametrize("kv", KV_OF_ONE_SLOT)
def test_halt_runs_as_many_passes_as_the_steps_say(llm: LoopedLlama, kv: str) -> None:
    k, tokens = 6, TOKENS[:PROMPT]
    steps = steps_of(llm, f"k={k} kv={kv}", tokens)
    never = min(steps) / 2
    assert spread(rows(llm, f"k={k} kv={kv} halt={never!r}"), rows(llm, f"k={k} kv={kv}")) == 0
    lows = [j for j in range(2, k) if steps[j - 1] < min(steps[: j - 1])]  # passes whose step is the smallest so far
    assert len(lows) >= 2, "or too little is tested"
    for j in lows:
        tau = (steps[j - 1] + min(steps[: j - 1])) / 2
        llm.set_loop(f"{window(llm)} k={k} kv={kv} halt={tau!r}")
        llm.reset()
        halted = llm.logits(tokens)
        assert llm.skipped_evaluations() == k - j
        llm.set_loop(f"{window(llm)} k={j} damping={1 / k!r} kv={kv}")
        llm.reset()
        assert spread(llm.logits(tokens), halted) == 0


@pytest.mark.parametrize("settings", ["k=6", "k=6 mode=layer", "k=3 solver=naive", "k=6 kv=frozen attention=3"])
def test_halting_at_once_is_one_pass_everywhere(llm: LoopedLlama, settings: str) -> None:
    """With a huge threshold all thresholds are met after the first pass, however many were planned."""
    one = rows(llm, f"{settings} halt=1e9")
    layers = llm.loop.layers if llm.loop.mode == "layer" else 1
    per_batch = (llm.loop.tableau().evaluations - 1) * layers
    assert llm.skipped_evaluations() == per_batch * (1 + len(TOKENS) - PROMPT)
    k, naive = llm.loop.k, llm.loop.solver == "naive"
    more = settings.replace(f"k={k}", f"k={k + 3}" if naive else f"k={k + 3} damping={1 / k!r}")
    assert spread(rows(llm, f"{more} halt=1e9"), one) == 0
    assert spread(rows(llm, settings), one) > SHOWS
    if naive:
        assert spread(rows(llm, None), one) == 0


def test_a_batch_after_a_halted_one_runs_all_its_passes(llama: LoopedLlama) -> None:
    """The graph is reused from token to token, so nodes left out once must come back."""
    steps = [steps_of(llama, "k=4 kv=frozen", TOKENS[: n + 1])[0] for n in (0, 1)]
    llama.set_loop("2:5 k=4 kv=frozen halt=1e9")
    llama.reset()
    for t in TOKENS[:6]:
        llama.logits([t])
    assert llama.skipped_evaluations() == 18
    llama.set_loop(f"2:5 k=4 kv=frozen halt={min(steps) / 1e3!r}")
    llama.reset()
    got = np.concatenate([llama.logits([t]) for t in TOKENS[:6]])
    assert llama.skipped_evaluations() == 0
    llama.set_loop("2:5 k=4 kv=frozen")
    llama.reset()
    assert spread(np.concatenate([llama.logits([t]) for t in TOKENS[:6]]), got) == 0


def entropies(logits: Rows) -> Rows:
    """Nats, of each row's distribution."""
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


@pytest.mark.parametrize("kv", ["first", "each"])
def test_entropy_decides_token_by_token(llm: LoopedLlama, kv: str) -> None:
    full, bypass = rows(llm, f"k=3 kv={kv}"), rows(llm, f"k=3 kv={kv} decode=bypass")
    assert spread(rows(llm, f"k=3 kv={kv} decode=entropy:0"), full) == 0
    assert spread(rows(llm, f"k=3 kv={kv} decode=entropy:99"), bypass) == 0
    got = rows(llm, f"k=3 kv={kv} decode=entropy:{np.median(entropies(bypass)[PROMPT:])}")
    assert spread(got, full) > SHOWS
    assert spread(got, bypass) > SHOWS


def test_entropy_is_that_of_the_plain_pass(llama: LoopedLlama) -> None:
    """By hand: each generated token plain, its entropy, and where that is high once more with the loop."""
    threshold, looped = float(np.median(entropies(rows(llama, "k=3 decode=bypass"))[PROMPT:])), []
    expected = [rows(llama, "k=3", TOKENS[:PROMPT])]
    for n, token in enumerate(TOKENS[PROMPT:]):
        llama.set_loop(None, keep_cache=True)
        row = llama.logits([token])
        if entropies(row)[0] > threshold:
            looped.append(n)
            llama.n_tokens -= 1
            llama.set_loop("2:5 k=3", keep_cache=True)
            row = llama.logits([token])
        expected.append(row)
    assert 0 < len(looped) < len(TOKENS) - PROMPT, "some tokens of either kind, or nothing is tested"
    assert spread(rows(llama, f"k=3 decode=entropy:{threshold}"), np.concatenate(expected)) < 1e-6


def test_the_same_loop_set_again_changes_nothing(llm: LoopedLlama) -> None:
    for kv in KV_OF_ONE_SLOT:
        expected = rows(llm, f"k=3 kv={kv}")
        llm.reset()
        got = [llm.logits(TOKENS[:PROMPT])]
        for token in TOKENS[PROMPT:]:
            llm.set_loop(f"{window(llm)} k=5 kv={kv}", keep_cache=True)
            llm.set_loop(f"{window(llm)} k=3 kv={kv}", keep_cache=True)
            got.append(llm.logits([token]))
        assert spread(np.concatenate(got), expected) == 0


def test_depth_changes_at_every_token(llm: LoopedLlama) -> None:
    """What a token adds depends on its own depth and on the K/V before it, not on how the depth came about."""
    depths = [1, 4, 2, 6, 3, 1, 5, 2, 4, 3, 6, 2]

    def run(order: Sequence[int]) -> Rows:
        llm.set_loop(None)
        llm.reset()
        llm.set_loop(f"{window(llm)} k=3 kv=frozen", keep_cache=True)
        got = [llm.logits(TOKENS[:PROMPT])]
        for k, token in zip(order, TOKENS[PROMPT:], strict=True):
            llm.set_loop(f"{window(llm)} k={k} kv=frozen", keep_cache=True)
            assert llm.n_tokens == PROMPT + len(got) - 1, "the cache is kept"
            got.append(llm.logits([token]))
        return np.concatenate(got)

    mixed = run(depths)
    for k in (1, 6):
        fixed = run([k] * len(depths))
        assert spread(fixed[:PROMPT], mixed[:PROMPT]) == 0
        assert spread(fixed[PROMPT:], mixed[PROMPT:]) > SHOWS
    assert spread(run(depths), mixed) == 0
    first_two = run([1, 4] + [2] * 10)
    assert spread(first_two[: PROMPT + 2], mixed[: PROMPT + 2]) == 0


def test_each_has_no_depth_to_change(llama: LoopedLlama) -> None:
    llama.set_loop("2:5 k=3 kv=each")
    llama.logits(TOKENS[:4])
    for other in ("2:5 k=2 kv=each", "2:5 k=3 kv=first", None):
        with pytest.raises(UsageError, match="cannot keep the cache: kv each has a slot for every pass"):
            llama.set_loop(other, keep_cache=True)
        assert str(llama.loop) == "2:5 k=3 kv=each"
        assert llama.n_tokens == 4
    llama.set_loop("2:5 k=2")
    with pytest.raises(UsageError, match="cannot keep the cache"):
        llama.set_loop("2:5 k=2 kv=each", keep_cache=True)


def test_a_prompt_does_not_reuse_what_another_depth_left(llama: LoopedLlama) -> None:
    llama.set_loop("2:5 k=3")
    expected = [t for t, _ in zip(llama.generate(TOKENS, temp=0.0), range(4), strict=False)]
    llama.reset()
    llama.set_loop("2:5 k=6", keep_cache=True)
    llama.eval(TOKENS[:-1])
    llama.set_loop("2:5 k=3", keep_cache=True)
    assert [t for t, _ in zip(llama.generate(TOKENS, temp=0.0), range(4), strict=False)] == expected
    assert llama.timings().prompt_tokens == len(TOKENS)


def test_a_token_evaluated_twice_is_one_token(llama: LoopedLlama) -> None:
    for limit, looped in ((0, True), (99, False)):
        llama.set_loop(f"2:5 k=3 decode=entropy:{limit}")
        for _ in zip(range(6), llama.generate(TOKENS, temp=0.0), strict=False):
            pass
        assert (llama.timings().prompt_tokens, llama.timings().generated_tokens) == (len(TOKENS), 5)
        assert llama._steps[-1].looped == looped


def test_tokens_that_cannot_come_add_no_entropy(llama: LoopedLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.full(llama.n_vocab(), -np.inf, np.float32)
    row[:8] = 3.0
    monkeypatch.setattr(llama._ctx, "get_logits", lambda: np.ctypeslib.as_ctypes(row))
    assert llama._entropy() == pytest.approx(np.log(8))


@pytest.mark.parametrize("settings", [None, "k=3", "k=3 mode=layer kv=frozen", "k=2 kv=last solver=heun"])
def test_trace_and_lens(llm: LoopedLlama, settings: str | None) -> None:
    tokens = TOKENS[:PROMPT]
    expected = rows(llm, settings)
    states = llm.trace(tokens)
    assert llm.n_tokens == 0
    head = llm.lens(states[-1].rows, tokens)
    assert spread(head, expected[:PROMPT]) == 0, "the state that leaves the last layer gives the logits"
    assert spread(llm.lens(states[1].rows, tokens), head) > SHOWS
    assert spread(rows(llm, settings), expected) == 0, "nothing is left behind"
    if settings is None:
        assert [(s.layer, s.evaluation) for s in states] == [(il, 1) for il in range(llm.n_layer())]
        return
    spec, first_of = llm.loop, {}
    for s in states:
        first_of.setdefault((s.layer, s.evaluation), s.rows)
    (a, b), n = spec.window, spec.tableau().evaluations
    assert {e for il, e in first_of if a <= il < b - 1} >= set(range(1, n + 1))
    assert (b - 1, n + 1) in first_of
    llm.set_loop(None)
    plain = {s.layer: s.rows for s in llm.trace(tokens)}
    for il in range(a if spec.mode == "layer" else b):
        assert spread(first_of[il, 1], plain[il]) == 0, "the first pass is the plain model's"
    assert spread(first_of[b, 1], plain[b]) > SHOWS / 10


def test_states_obey_the_solver(llama: LoopedLlama) -> None:
    """y_{j+1} = y_j + h (g(y_j) - y_j), out of the traced states alone."""
    llama.set_loop("2:5 k=4")
    states = {(s.layer, s.evaluation): s.rows for s in llama.trace(TOKENS)}
    for j in range(1, 5):
        y, g = states[1, j], states[4, j]
        after = states[1, j + 1] if j < 4 else states[4, 5]
        np.testing.assert_allclose(after, y + (g - y) / 4, rtol=1e-5, atol=1e-5)


def test_trace_refusals(llama: LoopedLlama, tiny_model: TinyModel) -> None:
    llama.set_loop("2:5 k=3")
    with pytest.raises(UsageError, match="0 tokens are not one batch of 1 to 256"):
        llama.trace([])
    with pytest.raises(UsageError, match="a state of shape \\(3, 64\\) is not of 4 tokens of 64 numbers"):
        llama.lens(np.zeros((3, 64), np.float32), TOKENS[:4])
    with pytest.raises(UsageError, match="a state of shape \\(4, 32\\) is not of 4 tokens of 64 numbers"):
        llama.lens(np.zeros((4, 32), np.float32), TOKENS[:4])
    small = load(tiny_model("llama"), n_ubatch=8)
    with pytest.raises(UsageError, match="9 tokens are not one batch of 1 to 8"):
        small.trace(TOKENS[:9])
    small.close()


def test_a_graph_that_shows_no_states_is_not_traced(tmp_path: Path) -> None:
    llm = load(zoo.write(tmp_path / "hrm_text.gguf", archs.ROWS["hrm_text"]))
    with pytest.raises(GgufloopError, match="architecture hrm_text cannot be traced"):
        llm.trace(TOKENS)
    llm.close()


def test_frozen_routing_is_the_default_of_layer_mode(llm: LoopedLlama) -> None:
    is_moe = bool(tiny.FAMILIES[llm.metadata["general.architecture"]].experts)
    for mode, default in (("block", "free"), ("layer", "frozen")):
        by_routing = {r: rows(llm, f"k=3 mode={mode} routing={r}") for r in ("free", "frozen")}
        assert spread(rows(llm, f"k=3 mode={mode}"), by_routing[default]) == 0
        assert (spread(by_routing["free"], by_routing["frozen"]) > SHOWS) == is_moe
    assert LoopSpec((1, 2), 3).routing == "free"
