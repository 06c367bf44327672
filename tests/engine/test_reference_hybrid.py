"""Windows with recurrent layers, backend against reference: the delta net of qwen35 and the Mamba-2 of granitehybrid.

Both windows hold attention and recurrent layers. With kv=first later passes start from the state as it was before the
batch, and what stays is what the first pass wrote; with kv=each every pass has a state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.pairs import MOVED, PROMPT, TOKENS, TOLERANCE, Pair, by_backend, by_reference, cut, evaluated, load, opened
from reference import Reference
from support import covering, tiny

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import MODES, LoopSpec

BATCHES = cut(TOKENS, PROMPT)
PLANS = (
    "k=3",
    "k=6 passes=3",
    "k=2 solver=naive",
    "k=2 solver=repeat",
    "k=2 solver=heun",
    "k=1 solver=rk4",
    "k=4 halt=0.23",
    "k=4 solver=naive halt=0.5",
)
AXES = (
    PLANS,
    tuple(f"mode={mode}" for mode in MODES),
    ("kv=first", "kv=each"),
    ("decode=full", "decode=bypass", "decode=first:2"),
    ("", "attention=5", "attention=5 sinks=3"),
)


def allowed(settings: str) -> bool:
    """Whether such a loop is defined for recurrent layers."""
    try:
        LoopSpec.parse(f"1:2 {settings}").check_recurrent()
    except UsageError:
        return False
    return True


CASES = covering.pairwise(AXES, allowed)


@pytest.fixture(scope="module", params=list(tiny.HYBRIDS))
def pair(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Pair]:
    with opened(tiny_model(request.param), request.param, tiny.HYBRIDS[request.param].window) as pair:
        yield pair


def recurrent(pair: Pair, layers: range) -> list[int]:
    """Those of the layers that are."""
    return [il for il in layers if tiny.recurs(tiny.HYBRIDS[pair.family], il)]


def test_windows_hold_both_kinds_of_layers(pair: Pair) -> None:
    window = range(*pair.window)
    assert 0 < len(recurrent(pair, window)) < len(window)


def test_plain(pair: Pair) -> None:
    pair.set_loop(None)
    assert abs(by_backend(pair.llm, BATCHES) - pair.plain).max() < TOLERANCE
    batches = cut(TOKENS, 9, 8, PROMPT - 17)
    np.testing.assert_allclose(evaluated(pair.ref, batches), pair.plain, atol=1e-9)


@pytest.mark.parametrize("settings", CASES)
def test_backend_is_the_definition(pair: Pair, settings: str) -> None:
    pair.set_loop(settings)
    expected = by_reference(pair.ref, BATCHES)
    assert abs(by_backend(pair.llm, BATCHES) - expected).max() < TOLERANCE
    moved = abs(expected - pair.plain)
    assert moved[:PROMPT].max() > MOVED
    assert moved[PROMPT:].max() > MOVED / 2


@pytest.mark.parametrize("settings", ["k=4", "k=2 mode=layer solver=heun kv=each"])
def test_first_last_and_widest_window(pair: Pair, settings: str) -> None:
    end = tiny.HYBRIDS[pair.family].n_layer - 1
    for window in ((1, 2), (end - 1, end), (1, end)):
        pair.set_loop(settings, window)
        assert abs(by_backend(pair.llm, BATCHES) - by_reference(pair.ref, BATCHES)).max() < TOLERANCE


@pytest.mark.parametrize("kv", ["first", "each"])
@pytest.mark.parametrize("mode", MODES)
def test_prompt_in_batches(pair: Pair, mode: str, kv: str) -> None:
    """Two of the batches are shorter than what the convolutions look back."""
    settings = f"k=3 mode={mode} kv={kv}"
    pair.set_loop(settings)
    batches = cut(TOKENS, 9, 2, 8, 1, PROMPT - 20)
    expected = by_reference(pair.ref, batches)
    assert abs(by_backend(pair.llm, batches) - expected).max() < TOLERANCE
    others = [pair.reference(settings, cut(TOKENS, *sizes)) for sizes in ((PROMPT,), (1,))]
    if kv == "each":
        np.testing.assert_allclose(others, [expected] * 2, atol=1e-9)
    else:
        assert all(abs(rows - expected)[PROMPT:].max() > 100 * TOLERANCE for rows in others)


def test_a_second_prompt_counts_anew(pair: Pair) -> None:
    batches = cut(TOKENS, 12, 1, 1, 1, 9, 1, 1, 1, 5)
    pair.set_loop("k=3 decode=first:2")
    expected = by_reference(pair.ref, batches)
    assert abs(by_backend(pair.llm, batches) - expected).max() < TOLERANCE
    assert abs(pair.reference("k=3 decode=first:3", batches) - expected)[14].max() > 10 * TOLERANCE


def test_one_batch_hides_what_is_stored(pair: Pair) -> None:
    first, each = (pair.reference(f"k=3 kv={kv}", [TOKENS]) for kv in ("first", "each"))
    np.testing.assert_allclose(first, each, atol=1e-9)


@pytest.mark.parametrize("decode", ["full", "bypass"])
def test_first_stores_what_the_plain_model_stores(pair: Pair, decode: str) -> None:
    """Not after the window: there what enters a layer has been looped."""
    window = range(*pair.window)
    stores = []
    for settings in ("k=1", f"k=3 decode={decode}"):
        pair.reference(settings, cut(TOKENS, 9, 8, PROMPT - 17))
        stores.append([pair.ref.state(il) for il in recurrent(pair, range(tiny.HYBRIDS[pair.family].n_layer))])
    inside = len(recurrent(pair, range(window.stop)))
    for plain, looped in list(zip(*stores, strict=True))[:inside]:
        torch.testing.assert_close(looped.conv, plain.conv, rtol=0, atol=1e-12)
        torch.testing.assert_close(looped.s, plain.s, rtol=0, atol=1e-12)
    for plain, looped in list(zip(*stores, strict=True))[inside:]:
        assert abs(looped.s - plain.s).max() > 1e-3


def test_passes_of_each_have_their_own_state(pair: Pair) -> None:
    pair.reference("k=3 kv=each", BATCHES)
    il = recurrent(pair, range(*pair.window))[-1]
    states = [pair.ref.state(il, slot).s for slot in range(3)]
    for a, b in combinations(states, 2):
        assert abs(a - b).max() > 1e-3
    pair.reference("k=1", BATCHES)
    torch.testing.assert_close(states[0], pair.ref.state(il).s, rtol=0, atol=1e-12)


def test_k_changes_at_every_token(pair: Pair) -> None:
    pair.set_loop("k=3")
    pair.llm.reset()
    for batch, k in zip(BATCHES, (3, 1, 4, 2, 6, 2, 3, 1, 5, 2, 4), strict=True):
        for model in (pair.ref, pair.llm):
            model.set_loop(pair.spec(f"k={k}"), keep_cache=True)
        assert abs(pair.llm.logits(batch) - pair.ref.eval(batch).numpy()).max() < TOLERANCE


@pytest.mark.parametrize("settings", ["kv=last", "kv=frozen", "decode=entropy:1", "kv=each decode=bypass"])
def test_what_is_not_defined_is_refused(pair: Pair, settings: str) -> None:
    pair.set_loop("k=2")
    for model in (pair.ref, pair.llm):
        with pytest.raises(GgufloopError, match="recurrent"):
            model.set_loop(pair.spec(f"k=3 {settings}"))


@pytest.mark.parametrize("family", list(tiny.HYBRIDS))
def test_naive_twice_is_the_window_twice(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    window = tiny.HYBRIDS[family].window
    twice = tiny.repeat_window(tiny_model(family), tmp_path / "twice.gguf", window, 2)
    looped = evaluated(Reference(tiny_model(family), LoopSpec(window, 2, solver="naive", kv="each")), BATCHES)
    np.testing.assert_allclose(evaluated(Reference(twice), BATCHES), looped, atol=1e-9)
    llm = load(twice)
    assert abs(by_backend(llm, BATCHES) - looped).max() < TOLERANCE
    llm.close()
