"""`trace` on the real engine: against the float64 reference, its own run, and what a loop that halts really does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from oracles.reference_trace import ReferenceTracer
from support import tiny

from ggufloop.cli import main
from ggufloop.engine import LoopedLlama
from ggufloop.loop import LoopSpec
from ggufloop.measure.trace import ENTER, LEAVE, _place, trace

TinyModel = Callable[[str], Path]
TOKENS = np.random.default_rng(7).integers(0, 256, 40).tolist()


@contextmanager
def opened(path: Path, loop: str | None = None) -> Iterator[LoopedLlama]:
    llm = LoopedLlama(
        path, n_ctx=256, n_batch=128, n_ubatch=128, n_threads=1, n_threads_batch=1, type_k=0, type_v=0,
        flash_attn=False, verbose=False, loop=loop,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.close()


def window(family: str) -> str:
    return "{}:{}".format(*tiny.FAMILIES[family].window)


@pytest.mark.parametrize(
    "settings", ["k=3", "k=3 mode=layer", "k=2 solver=naive", "k=2 kv=last", "k=6 passes=3 kv=frozen", "k=2 kv=each"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_number_is_the_references(tiny_model: TinyModel, family: str, settings: str) -> None:
    path, loop = tiny_model(family), f"{window(family)} {settings}"
    with opened(path, loop) as llm:
        found = trace(llm, TOKENS)
    expected = trace(ReferenceTracer(path, LoopSpec.parse(loop)), TOKENS)
    assert found.loop == expected.loop == LoopSpec.parse(loop)
    assert len(found.points) == len(expected.points)
    for p, q in zip(found.points, expected.points, strict=True):
        assert (p.kind, p.layer, p.evaluation) == (q.kind, q.layer, q.evaluation)
        whole = q.whole_residual
        assert p.whole_residual == (None if whole is None else pytest.approx(whole, rel=1e-5))
        for name in ("residual", "cosine", "entropy", "kl"):
            a, b = getattr(p, name), getattr(q, name)
            if b is None:
                assert a is None
                continue
            assert (a.mean, a.half, a.n) == pytest.approx((b.mean, b.half, b.n), rel=2e-5, abs=1e-6), (p, name)


@pytest.mark.parametrize("settings", ["k=4", "k=3 beta=0.5 mode=layer"])
def test_what_enters_and_leaves_is_what_the_graph_says(tiny_model: TinyModel, settings: str) -> None:
    """The engine reports the states between passes too; here they are combined from the layers' outputs."""
    with opened(tiny_model("llama"), f"2:5 {settings}") as llm:
        states = llm.trace(TOKENS)
        placed = _place(states, llm.loop, llm.n_layer())
    layers = [(s.layer, s.evaluation) for s in states]
    assert len(states) == len(placed)
    between = 0
    for state, p in zip(states, placed, strict=True):
        leaves = p.kind == LEAVE
        assert (state.layer, state.evaluation) == (p.layer, p.evaluation + leaves), layers
        np.testing.assert_allclose(state.rows, p.rows, rtol=1e-5, atol=1e-5)
        between += p.kind in (ENTER, LEAVE)
    assert between == (4 if settings == "k=4" else 9)


@pytest.mark.parametrize("mode", ["block", "layer"])
def test_a_loop_halts_where_the_trace_says(tiny_model: TinyModel, mode: str) -> None:
    loop = f"2:5 k=4 mode={mode}"
    with opened(tiny_model("llama"), loop) as llm:
        steps = trace(llm, TOKENS, lens=False).steps
        sizes = sorted(s.size for s in steps if s.evaluation < 4)
        assert min(b - a for a, b in pairwise(sizes)) > 1e-5, "told apart"
        for low, high in [(0.0, sizes[0]), *pairwise(sizes), (sizes[-1], 2 * sizes[-1])]:
            llm.set_loop(f"{loop} halt={(low + high) / 2!r}")
            result = trace(llm, TOKENS, lens=False)
            assert result.steps == steps, "traced in full"
            ran = result.passes((low + high) / 2)
            before = llm.skipped_evaluations()
            llm.logits(TOKENS)
            skipped = llm.skipped_evaluations() - before
            if mode == "block":
                assert skipped == 4 - ran[2, 5]
            else:  # what is said of later layers is a guess once an earlier one has halted
                first = next(iter(ran.values()))
                assert skipped >= 4 - first
                assert (skipped == 0) == (set(ran.values()) == {4})


def test_the_lens_of_the_last_state_is_the_models_answer(tiny_model: TinyModel) -> None:
    with opened(tiny_model("llama"), "2:5 k=3") as llm:
        logits = llm.logits(TOKENS).astype(np.float64)
        entropy = trace(llm, TOKENS).points[-1].entropy
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert entropy is not None
    assert entropy.mean == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-6)


@pytest.mark.model
def test_a_real_model(smollm2: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The first token's state is far longer than the others' and hardly moves, so all tokens as one move less."""
    plot = tmp_path / "trace.png"
    args = [
        "trace",
        str(smollm2),
        "--window",
        "12:16",
        "--K",
        "3",
        "-p",
        "The quick brown fox jumps over the lazy dog.",
    ]
    with pytest.raises(SystemExit) as e:
        main([*args, "-o", "json", "-t", "2", "--plot", str(plot)])
    assert not e.value.code
    data = json.loads(capsys.readouterr().out)
    assert (data["n"], data["layers"], len(data["states"])) == (10, 30, 30 + 2 * 4 + 2 + 1)
    assert plot.read_bytes().startswith(b"\x89PNG")
    for state in data["states"]:
        if state["state"] != "layer":
            assert 3 * state["whole_residual"] < state["residual"] < 1
            assert 0.9 < state["cosine"] < 1
        assert 0 < state["entropy"] < np.log(49152)
    assert data["states"][-1]["kl"] == 0
    assert data["states"][0]["kl"] > 1
