"""What passes share, see and leave out, backend against reference: routing, attention and sinks, halt, entropy decode.

The settings meet each other, and modes and kv policies, in pairs. Where two of them must be the same function, the
reference is also compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from oracles.pairs import MOVED, PROMPT, TOKENS, TOLERANCE, Pair, by_backend, by_reference, cut, opened
from support import covering, tiny

from ggufloop.errors import UsageError
from ggufloop.loop import KV_POLICIES, MODES, ROUTINGS, LoopSpec

# Per family: residuals at which a euler and a naive loop of four passes halt early for some batches and not for
# others, and an entropy that the plain model exceeds at some of the tokens it is given. The naive ones of the first
# two lie between the mean over tokens, which counts, and the residual of the prompt's states taken as one matrix.
THRESHOLDS = {
    "llama": (0.27, 0.511, 3.8),
    "qwen2moe": (0.22, 0.501, 4.0),
    "qwen3moe": (0.207, 0.5, 4.0),
    "olmoe": (0.22, 0.55, 4.0),
    "gemma3": (0.135, 0.37, 3.0),
    "deepseek2": (0.235, 0.6, 3.75),
}
MOE = ("qwen2moe", "qwen3moe", "olmoe", "deepseek2")
BATCHES = cut(TOKENS, PROMPT)
DENSE_AND_MOE = pytest.mark.parametrize("pair", ["llama", "qwen3moe"], indirect=True, scope="module")
"""For what says nothing about the backend or about a family."""


def halts(family: str) -> tuple[str, str]:
    """An euler and a naive loop that halt."""
    euler, naive, _ = THRESHOLDS[family]
    return f"k=4 halt={euler}", f"k=4 solver=naive halt={naive}"


def doubt(family: str) -> str:
    """The decode policy that loops some tokens by their entropy."""
    return f"decode=entropy:{THRESHOLDS[family][2]}"


def axes(family: str) -> list[tuple[str, ...]]:
    """Every setting's values."""
    return [
        ("k=3", "k=2 solver=heun", *halts(family)),
        tuple(f"mode={mode}" for mode in MODES),
        tuple(f"kv={kv}" for kv in KV_POLICIES),
        ("decode=full", "decode=first:2", doubt(family)),
        tuple(f"routing={routing}" for routing in ROUTINGS) if family in MOE else ("",),
        ("", "attention=5", "attention=5 sinks=3"),
    ]


def allowed(settings: str) -> bool:
    """Whether LoopSpec takes them."""
    try:
        LoopSpec.parse(f"1:2 {settings}")
    except UsageError:
        return False
    return True


CASES = [(family, settings) for family in THRESHOLDS for settings in covering.pairwise(axes(family), allowed)]


@pytest.fixture(scope="module", params=list(THRESHOLDS))
def pair(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Pair]:
    with opened(tiny_model(request.param), request.param, tiny.FAMILIES[request.param].window) as pair:
        yield pair


@pytest.mark.parametrize(("pair", "settings"), CASES, indirect=["pair"], scope="module")
def test_backend_is_the_definition(pair: Pair, settings: str) -> None:
    pair.set_loop(settings)
    expected = by_reference(pair.ref, BATCHES)
    assert abs(by_backend(pair.llm, BATCHES) - expected).max() < TOLERANCE
    assert abs(expected - pair.plain)[:PROMPT].max() > MOVED


@pytest.mark.parametrize("settings", ["kv=first attention=7 sinks=2", "kv=last halt", "kv=frozen attention=4"])
def test_prompt_in_three_batches(pair: Pair, settings: str) -> None:
    settings = settings.replace("halt", f"halt={THRESHOLDS[pair.family][0]}")
    pair.set_loop(f"k=4 routing=frozen {settings}")
    batches = cut(TOKENS, 9, 8, PROMPT - 17)
    assert abs(by_backend(pair.llm, batches) - by_reference(pair.ref, batches)).max() < TOLERANCE


def test_every_setting_shows(pair: Pair) -> None:
    """No setting is so close to another that the comparison above could mistake one for the other."""
    euler, _ = halts(pair.family)
    shown = ["k=4", euler, "k=4 halt=99", "k=4 attention=5", "k=4 attention=6", "k=4 attention=5 sinks=3"]
    shown += [f"k=4 {doubt(pair.family)}"]
    if pair.family in MOE:
        shown.append("k=4 routing=frozen")
        layer = ["k=4 mode=layer", "k=4 mode=layer routing=free"]
    else:
        layer = []
    for group in (shown, layer):
        rows = {settings: pair.reference(settings, BATCHES)[PROMPT:] for settings in group}
        for a, b in combinations(group, 2):
            assert abs(rows[a] - rows[b]).max() > 10 * TOLERANCE, f"{a} and {b}"


@DENSE_AND_MOE
@pytest.mark.parametrize(
    ("kv", "mode"), [("first", "block"), ("last", "layer"), ("each", "layer"), ("frozen", "block")]
)
def test_what_must_be_the_same_is_the_same(pair: Pair, kv: str, mode: str) -> None:
    base = f"k=3 kv={kv} mode={mode}"
    all_see = pair.reference(base, BATCHES)
    bypass = pair.reference(f"{base} decode=bypass", BATCHES)

    def same(settings: str, expected: np.ndarray) -> None:
        np.testing.assert_allclose(pair.reference(f"{base} {settings}", BATCHES), expected, atol=1e-9)

    same(f"attention={len(TOKENS)}", all_see)
    same(f"attention=1 sinks={len(TOKENS)}", all_see)
    same("decode=entropy:0", all_see)
    same("decode=entropy:99", bypass)
    if pair.family not in MOE:
        same("routing=frozen", all_see)
    if kv != "each":
        same("halt=1e-9", all_see)
        naive = pair.reference(f"{base} solver=naive halt=99", BATCHES)
        if kv != "last":  # whose stored K/V is the result's all the same
            np.testing.assert_allclose(naive, pair.plain, atol=1e-9)
        np.testing.assert_allclose(naive[:PROMPT], pair.plain[:PROMPT], atol=1e-9)


@DENSE_AND_MOE
@pytest.mark.parametrize(("solver", "h"), [("euler damping=0.6", 0.6), ("naive", 1)])
def test_halting_is_fewer_passes(pair: Pair, solver: str, h: float) -> None:
    """As the threshold falls, the prompt's batch runs one pass, then two, three, and all four."""
    prompt = [TOKENS[:PROMPT]]
    fewer = [pair.reference(f"k={k} damping={h}", prompt) for k in (2, 3, 4)]
    ran = []
    for halt in np.geomspace(1.5, 0.2, 30):
        rows = pair.reference(f"k=4 solver={solver} halt={halt}", prompt)
        equal = [k for k, others in zip((2, 3, 4), fewer, strict=True) if abs(rows - others).max() < 1e-9]
        ran.append(equal[0] if equal else 1)
    assert ran == sorted(ran)
    assert {1, 4} < set(ran), "no threshold halts in between"


@DENSE_AND_MOE
@pytest.mark.parametrize("reach", ["attention=5", "attention=5 sinks=3"])
@pytest.mark.parametrize("kv", ["each", "frozen"])
def test_a_shorter_reach_keeps_batches_apart(pair: Pair, kv: str, reach: str) -> None:
    settings = f"k=3 kv={kv} routing=frozen {reach}"
    rows = [pair.reference(settings, cut(TOKENS, *sizes)) for sizes in ((PROMPT,), (9, 8, 7), (1,))]
    np.testing.assert_allclose(rows[1:], rows[:1] * 2, atol=1e-9)


@DENSE_AND_MOE
def test_an_entropy_is_of_the_plain_model(pair: Pair) -> None:
    """Token by token: plain where its entropy stays below the threshold, else as if it had been looped at once."""
    _, _, limit = THRESHOLDS[pair.family]
    loops = pair.spec("k=3 kv=last")
    gated = pair.reference(f"k=3 kv=last decode=entropy:{limit}", BATCHES)
    pair.ref.set_loop(loops)
    pair.ref.reset()
    pair.ref.eval(TOKENS[:PROMPT])
    looped = []
    for i, row in enumerate(gated[PROMPT:], PROMPT):
        pair.ref.set_loop(None, keep_cache=True)
        before = [list(slots) for slots in pair.ref._slots]
        plain = pair.ref.eval([TOKENS[i]])[0].numpy()
        p = np.exp(plain - np.logaddexp.reduce(plain))
        looped.append(-sum(x * math.log(x) for x in p) > limit)
        if looped[-1]:
            pair.ref._slots, pair.ref._n_past = before, i
            pair.ref.set_loop(loops, keep_cache=True)
            plain = pair.ref.eval([TOKENS[i]])[0].numpy()
        np.testing.assert_allclose(row, plain, atol=1e-9)
    assert {True, False} == set(looped)


# Another loop on the same cache


@pytest.mark.parametrize("kv", ["first", "frozen"])
def test_k_changes_at_every_token(pair: Pair, kv: str) -> None:
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    pair.set_loop(f"k=3 kv={kv}")
    pair.llm.reset()
    for batch, k in zip(BATCHES, (3, 1, 4, 2, 6, 2, 3, 1, 5, 2, 4), strict=True):
        spec = pair.spec(f"k={k} kv={kv}")
        pair.ref.set_loop(spec, keep_cache=True)
        pair.llm.set_loop(spec, keep_cache=True)
        rows.append((pair.llm.logits(batch), pair.ref.eval(batch).numpy()))
    for ours, expected in rows:
        assert abs(ours - expected).max() < TOLERANCE
    fixed = pair.reference(f"k=3 kv={kv}", BATCHES)
    assert abs(np.concatenate([expected for _, expected in rows]) - fixed)[PROMPT:].max() > MOVED / 2


def test_everything_changes_at_every_token(pair: Pair) -> None:
    a, b = pair.window
    specs = [
        LoopSpec((a, b), 3),
        None,
        LoopSpec((a, b), 3, kv="last"),
        LoopSpec((1, 2), 2, kv="frozen"),
        LoopSpec((a, b), 2, mode="layer", solver="heun", kv="last"),
        LoopSpec((1, b), 4, kv="frozen", attention=5, sinks=1),
        None,
        LoopSpec((a, b), 1, solver="rk4", routing="frozen"),
        LoopSpec((a, a + 1), 6, passes=3, decode="bypass"),
        LoopSpec((a, b), 3, beta=0.5),
        LoopSpec((a, b), 2, solver="naive"),
    ]
    pair.set_loop(None)
    pair.llm.reset()
    for batch, spec in zip(BATCHES, specs, strict=True):
        for model in (pair.ref, pair.llm):
            model.set_loop(spec, keep_cache=True)
        assert abs(pair.llm.logits(batch) - pair.ref.eval(batch).numpy()).max() < TOLERANCE, str(spec)


@DENSE_AND_MOE
def test_a_kept_cache_is_the_cache(pair: Pair) -> None:
    kept = pair.reference("k=3 kv=last", BATCHES[:1])
    pair.ref.set_loop(None, keep_cache=True)
    rows = [pair.ref.eval(batch).numpy() for batch in BATCHES[1:]]
    bypass = pair.reference("k=3 kv=last decode=bypass", BATCHES)
    np.testing.assert_array_equal(np.concatenate([kept, *rows]), bypass)


def test_a_cache_with_slots_is_not_kept(pair: Pair) -> None:
    for old, new in (("kv=first", "kv=each"), ("kv=each", "kv=first"), ("kv=each", "kv=each")):
        pair.set_loop(f"k=3 {old}")
        for model in (pair.ref, pair.llm):
            with pytest.raises(UsageError):
                model.set_loop(pair.spec(f"k=2 {new}"), keep_cache=True)
