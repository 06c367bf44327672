"""The looped backend against the float64 reference: every solver, mode, kv policy and decode policy, every family.

Each case is one prompt in one batch and ten decode steps. llama, qwen3moe, gemma3 and deepseek2 run the full product
of solver, mode, kv and decode; qwen2, qwen2moe, qwen3 and olmoe, and everywhere the variants of euler, a part of it in
which every pair of settings occurs. What passes may share, see or leave out is in test_reference_settings.py, and
families with recurrent layers are in test_reference_hybrid.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from oracles.pairs import MOVED, PROMPT, TOKENS, TOLERANCE, Pair, by_backend, by_reference, cut, load, opened
from reference import Reference
from support import tiny

from ggufloop.errors import GgufloopError
from ggufloop.loop import KV_POLICIES, MODES, SOLVERS, LoopSpec

DECODES = ("full", "bypass", "first:2")

EULERS = ("k=3 beta=0.5", "k=2 damping=0.7", "k=6 passes=2", "k=6 beta=0.5 passes=3")
PLANS = (
    "k=3",
    *EULERS,
    "k=2 solver=naive",
    "k=2 solver=repeat",
    "k=1 solver=midpoint",
    "k=2 solver=heun",
    "k=1 solver=rk4",
    "k=3 solver=input-anchor",
    "k=3 solver=heavy-ball",
    "k=3 solver=average",
)
LOOPS = [
    f"{plan} mode={mode} kv={kv} decode={decode}"
    for plan in PLANS
    for mode in MODES
    for kv in (("each",) if "repeat" in plan else KV_POLICIES)
    for decode in DECODES
]
PAIRWISE = [settings for i, settings in enumerate(LOOPS) if i % 5 == 0 or "repeat" in settings]
PRODUCT = [settings for settings in LOOPS if settings in PAIRWISE or not settings.startswith(EULERS)]
COVERED = ("qwen2", "qwen2moe", "qwen3", "olmoe")  # each is a relative of a family that runs the full product
CASES = [(family, settings) for family in tiny.FAMILIES for settings in (PAIRWISE if family in COVERED else PRODUCT)]


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def pair(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Pair]:
    with opened(tiny_model(request.param), request.param, tiny.FAMILIES[request.param].window) as pair:
        yield pair


def test_all_solvers_are_here() -> None:
    assert {LoopSpec.parse(f"1:2 {plan}").solver for plan in PLANS} == set(SOLVERS)


def test_plain(pair: Pair) -> None:
    pair.set_loop(None)
    assert abs(by_backend(pair.llm, cut(TOKENS, PROMPT)) - pair.plain).max() < TOLERANCE


def test_covered_families_meet_every_pair() -> None:
    def pairs(loops: Sequence[str]) -> set[tuple[str, str]]:
        axes = (settings.rsplit(maxsplit=3) for settings in loops)
        return {pair for values in axes for pair in combinations(values, 2)}

    assert pairs(PAIRWISE) == pairs(LOOPS)


@pytest.mark.parametrize(("pair", "settings"), CASES, indirect=["pair"], scope="module")
def test_backend_is_the_definition(pair: Pair, settings: str) -> None:
    pair.set_loop(settings)
    batches = cut(TOKENS, PROMPT)
    expected = by_reference(pair.ref, batches)
    assert abs(by_backend(pair.llm, batches) - expected).max() < TOLERANCE
    moved = abs(expected - pair.plain)
    assert moved[:PROMPT].max() > MOVED
    assert moved[PROMPT:].max() > MOVED / 2


@pytest.mark.parametrize("settings", ["k=5", "k=2 mode=layer solver=heun kv=each", "k=3 beta=0.5 kv=frozen"])
def test_first_last_and_widest_window(pair: Pair, settings: str) -> None:
    end = tiny.FAMILIES[pair.family].n_layer - 1
    for window in ((1, 2), (end - 1, end), (1, end)):
        pair.set_loop(settings, window)
        batches = cut(TOKENS, PROMPT)
        assert abs(by_backend(pair.llm, batches) - by_reference(pair.ref, batches)).max() < TOLERANCE


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_prompt_in_three_batches(pair: Pair, mode: str, kv: str) -> None:
    pair.set_loop(f"k=3 mode={mode} kv={kv}")
    batches = cut(TOKENS, 9, 8, PROMPT - 17)
    expected = by_reference(pair.ref, batches)
    assert abs(by_backend(pair.llm, batches) - expected).max() < TOLERANCE
    if kv in ("each", "frozen"):
        np.testing.assert_allclose(by_reference(pair.ref, cut(TOKENS, PROMPT)), expected, atol=1e-9)
    else:
        assert abs(by_reference(pair.ref, cut(TOKENS, PROMPT)) - expected)[PROMPT:].max() > 100 * TOLERANCE


@pytest.mark.parametrize("kv", KV_POLICIES)
def test_a_second_prompt_counts_anew(pair: Pair, kv: str) -> None:
    pair.set_loop(f"k=3 kv={kv} decode=first:2")
    batches = cut(TOKENS, 12, 1, 1, 1, 9, 1, 1, 1, 5)
    expected = by_reference(pair.ref, batches)
    assert abs(by_backend(pair.llm, batches) - expected).max() < TOLERANCE
    pair.set_loop(f"k=3 kv={kv} decode=first:3")
    third = abs(by_reference(pair.ref, batches) - expected)
    assert third[:14].max() == 0
    assert third[14].max() > 10 * TOLERANCE


def test_one_batch_hides_what_is_stored(pair: Pair) -> None:
    logits = []
    for kv in ("first", "last", "each"):
        pair.set_loop(f"k=3 kv={kv}")
        logits.append(by_reference(pair.ref, [TOKENS]))
    np.testing.assert_allclose(logits[1:], logits[:1] * 2, atol=1e-9)


def test_first_and_bypass_store_what_the_plain_model_stores(pair: Pair) -> None:
    batches, window = cut(TOKENS, PROMPT), range(*tiny.FAMILIES[pair.family].window)
    pair.set_loop(None)
    by_reference(pair.ref, batches)
    plain = [pair.ref.kv(il) for il in window]
    pair.set_loop("k=3 decode=bypass")
    by_reference(pair.ref, batches)
    for il, (k, v) in zip(window, plain, strict=True):
        torch.testing.assert_close(pair.ref.kv(il).k, k, rtol=0, atol=1e-12)
        torch.testing.assert_close(pair.ref.kv(il).v, v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", ["k=1", "k=1 kv=last", "k=6 beta=1", "k=6 beta=1 kv=each mode=layer"])
def test_one_evaluation_is_no_loop(pair: Pair, settings: str) -> None:
    pair.set_loop(settings)
    np.testing.assert_array_equal(by_reference(pair.ref, cut(TOKENS, PROMPT)), pair.plain)


def test_every_setting_shows_in_decode(pair: Pair) -> None:
    """No policy, mode or solver is so close to another that the comparison above could mistake one for the other."""
    base = "k=3"
    axes = (
        [base, *(f"{base} kv={kv}" for kv in KV_POLICIES[1:])],
        [base, *(f"{base} decode={decode}" for decode in DECODES[1:])],
        [base, f"{base} mode=layer"],
        [plan for plan in PLANS if "repeat" not in plan],
    )
    for axis in axes:
        rows = {}
        for settings in axis:
            pair.set_loop(settings)
            rows[settings] = by_reference(pair.ref, cut(TOKENS, PROMPT))[PROMPT:]
        for a, b in combinations(axis, 2):
            assert abs(rows[a] - rows[b]).max() > 10 * TOLERANCE, f"{a} and {b}"


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_naive_twice_is_the_window_twice(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    # deepseek2 cannot say that a dense layer comes after an MoE one, so its repeated window must not hold both
    window = (3, 5) if family == "deepseek2" else tiny.FAMILIES[family].window
    twice = tiny.repeat_window(tiny_model(family), tmp_path / "twice.gguf", window, 2)
    ref = Reference(tiny_model(family), LoopSpec(window, 2, solver="naive", kv="each"))
    batches = cut(TOKENS, PROMPT)
    looped = by_reference(ref, batches)
    np.testing.assert_allclose(by_reference(Reference(twice), batches), looped, atol=1e-9)
    llm = load(twice)
    assert abs(by_backend(llm, batches) - looped).max() < TOLERANCE
    llm.close()


def _without(meta: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in meta.items() if key not in keys}


_DEEPSEEK2 = tiny.FAMILIES["deepseek2"]
_GROUPS = ("expert_group_count", "expert_group_used_count")
VARIANTS = {
    "mixtral": (replace(tiny.FAMILIES["llama"], experts=4, n_ff=32, seed=2), TOLERANCE),
    "gemma3 without a sliding window": (
        replace(tiny.FAMILIES["gemma3"], meta=_without(tiny.FAMILIES["gemma3"].meta, "attention.sliding_window")),
        TOLERANCE,
    ),
    # the CPU backend reads GELU from a table in float16, and here its argument is where that matters
    "gemma3 with an ordinary gate": (replace(tiny.FAMILIES["gemma3"], gate_gain=1.0), 1e-2),
    # llama.cpp knows DeepSeek-V2-Lite, which has no low-rank queries, by its 27 layers
    "deepseek2 lite": (
        replace(
            _DEEPSEEK2,
            n_layer=27,
            meta=_without(_DEEPSEEK2.meta, "attention.q_lora_rank", *_GROUPS)
            | {"expert_gating_func": 1, "expert_weights_norm": False},
        ),
        TOLERANCE,
    ),
    "qwen2 with yarn": (
        replace(tiny.FAMILIES["qwen2"], meta={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
        TOLERANCE,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_families(name: str, tmp_path: Path) -> None:
    model, tolerance = VARIANTS[name]
    path = tiny.write(tmp_path / "variant.gguf", model)
    llm, ref = load(path), Reference(path)
    for loop in (None, LoopSpec(model.window, 3, kv="each")):
        llm.set_loop(loop)
        ref.set_loop(loop)
        assert abs(by_backend(llm, cut(TOKENS, PROMPT)) - by_reference(ref, cut(TOKENS, PROMPT))).max() < tolerance
    llm.close()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL divergence in nats between the distributions of two arrays of logits."""
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.model
def test_smollm2(smollm2: Path, smollm2_f32: Path) -> None:
    """A real model: exact with its weights in F32, and with Q4_1 within llama.cpp's 8-bit activations."""
    ref, llm, quantised = Reference(smollm2), load(smollm2_f32), load(smollm2)
    tokens = llm.tokenize(
        b"Photosynthesis is the process by which green plants turn sunlight, water and carbon dioxide into sugar "
        b"and oxygen. It takes place in the chloroplasts, whose chlorophyll absorbs mostly red and blue light."
    )
    batches = cut(tokens, len(tokens) - 4)
    plain = by_reference(ref, batches)
    for text in (
        None,
        "12:16 k=3",
        "12:16 k=3 kv=frozen",
        "14:18 k=6 passes=3 kv=each mode=layer",
        "14:18 k=3 kv=last",
    ):
        loop = None if text is None else LoopSpec.parse(text)
        for model in (ref, llm, quantised):
            model.set_loop(loop)
        expected = by_reference(ref, batches)
        assert abs(by_backend(llm, batches) - expected).max() < TOLERANCE
        # Q4_1 times 8-bit activations: 0.26 to 0.31 of logits that spread over 5.8, 0.003 to 0.004 nats
        rounded = by_backend(quantised, batches) - expected
        assert np.sqrt(np.mean(rounded**2)) < 0.4
        assert kl(expected, expected + rounded) < 0.006
        if loop:
            assert kl(expected, plain) > 0.015
    llm.close()
    quantised.close()


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 99)
    with pytest.raises(GgufloopError, match="cannot be read as a GGUF file"):
        Reference(tmp_path / "x.gguf")
    other = GGUFWriter(tmp_path / "other.gguf", "mamba")
    other.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(GgufloopError, match="does not know architecture mamba"):
        Reference(tmp_path / "other.gguf")
