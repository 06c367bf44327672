"""The looped library against the stock one, repeated files, other ways to cut a batch, and the K/V it stores.

The torch reference of test_reference.py says what the numbers are; here are the identities that need no reference.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutations import gguf
from oracles import stock
from support import archs, tiny, zoo
from support.loaded import F32, ROUNDING, load, spread, tokens

from ggufloop.cli import main
from ggufloop.engine import LoopedLlama, llama_cpp
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec

TinyModel = Callable[[str], Path]


def prose(llm: LoopedLlama, n: int) -> list[int]:
    """n tokens of English, the same for everybody."""
    import pydoc_data.topics

    text = pydoc_data.topics.topics["class"] + pydoc_data.topics.topics["exceptions"]
    return llm.tokenize(text.encode())[:n]


def test_text_needs_a_tokenizer_and_an_open_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    """llama.cpp aborts, and a closed model's vocabulary is gone. Tokens can be evaluated all the same."""
    file = gguf.parse(tiny_model("llama").read_bytes())
    file.keys = [k for k in file.keys if k.name != b"tokenizer.ggml.tokens"]
    model = file.key(b"tokenizer.ggml.model")
    assert model is not None
    model.value = b"none"
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf.build(file))
    llm = load(path)
    assert np.isfinite(llm.logits([3, 4])).all()
    with pytest.raises(GgufloopError, match=r"m\.gguf has no tokenizer: it takes tokens, no text\.$"):
        llm.tokenize(b"text")
    llm.close()
    with pytest.raises(GgufloopError, match="this model is closed"):
        llm.tokenize(b"text")


# the same as stock


@pytest.mark.model
@pytest.mark.parametrize("model", ["smollm2", "gemma"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_off_is_stock_bit_for_bit(model: str, flash_attn: bool, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    settings = {"n_ctx": 256, "n_batch": 64, "n_threads": 2, "n_threads_batch": 2, "flash_attn": flash_attn}
    llm = load(path, "8:12 k=3", **settings)
    steps = [prose(llm, 100), *([t] for t in tokens(llm, 4))]
    looped = np.concatenate([llm.logits(s) for s in steps])
    llm.set_loop(None)
    plain = np.concatenate([llm.logits(s) for s in steps])
    expected = stock.logits(path, steps, **settings)
    assert np.array_equal(plain, expected)
    assert spread(looped, expected) > 0.1
    llm.set_loop(LoopSpec((8, 12), 1))
    assert np.array_equal(np.concatenate([llm.logits(s) for s in steps]), expected)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "gemma3"])
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_repeat_is_the_file_with_the_window_repeated(
    family: str, times: int, flash_attn: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path, window = tiny_model(family), tiny.FAMILIES[family].window
    if family == "deepseek2":
        window = (3, 5)  # the file can only count leading dense layers, so none may be repeated behind an MoE layer
    check_repeat(path, tiny.repeat_window(path, tmp_path / "repeated.gguf", window, times), window, times, flash_attn)


@pytest.mark.parametrize("times", [2, 3])
def test_repeat_with_sliding_windows(times: int, tmp_path: Path) -> None:
    """gemma3's layers alternate with a period of 6, so a repeated window of 6 keeps every layer's kind."""
    window = (3, 9)
    path = tiny.write(tmp_path / "m.gguf", replace(tiny.FAMILIES["gemma3"], n_layer=12, window=window))
    check_repeat(path, tiny.repeat_window(path, tmp_path / "r.gguf", window, times), window, times, False)


def check_repeat(path: Path, repeated: Path, window: tuple[int, int], times: int, flash_attn: bool) -> None:
    settings = {**F32, "n_ctx": 256, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "flash_attn": flash_attn}
    llm = load(path, **settings)
    llm.set_loop(LoopSpec(window, times, solver="repeat"))
    steps = [tokens(llm, 100), *([t] for t in tokens(llm, 10, seed=1))]
    looped = np.concatenate([llm.logits(s) for s in steps])
    expected = stock.logits(repeated, steps, **settings)
    assert np.array_equal(looped, expected)
    llm.set_loop(None)
    assert spread(np.concatenate([llm.logits(s) for s in steps]), expected) > 0.1


# however the batch is cut


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "loop", ["k=3 kv=each", "k=3 kv=frozen", "k=2 kv=each mode=layer solver=heun", "k=3 kv=frozen mode=layer"]
)
def test_each_and_frozen_do_not_depend_on_batches(family: str, loop: str, tiny_model: TinyModel) -> None:
    a, b = tiny.FAMILIES[family].window
    llm = load(tiny_model(family), f"{a}:{b} {loop}", n_ctx=512, n_batch=512, **F32)
    text = tokens(llm, 512)
    whole = llm.logits(text)
    assert spread(whole, plain_rows(llm, text)) > 0.05
    for size in (64, 1):
        llm.reset()
        cut = np.concatenate([llm.logits(text[i : i + size]) for i in range(0, len(text), size)])
        assert spread(cut, whole) < ROUNDING
    small = load(tiny_model(family), f"{a}:{b} {loop}", n_ctx=512, n_batch=512, n_ubatch=48, **F32)
    assert spread(small.logits(text), whole) < ROUNDING


def plain_rows(llm: LoopedLlama, text: list[int]) -> np.ndarray:
    loop = llm.loop
    llm.set_loop(None)
    rows = llm.logits(text)
    llm.set_loop(loop)
    return rows


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek2"])
def test_first_last_and_each_agree_in_one_batch(family: str, tiny_model: TinyModel) -> None:
    a, b = tiny.FAMILIES[family].window
    llm = load(tiny_model(family), f"{a}:{b} k=3", **F32)
    text = tokens(llm, 60)
    rows = [llm.logits(text)]
    for kv in ("last", "each"):
        llm.set_loop(LoopSpec((a, b), 3, kv=kv))
        rows.append(llm.logits(text))
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])


@pytest.mark.parametrize("family", ["llama", "qwen3moe", "gemma3", "deepseek2"])
@pytest.mark.parametrize("kv", ["first", "last", "each", "frozen"])
@pytest.mark.parametrize("unified", [False, True])
def test_two_sequences_in_one_batch_equal_each_alone(
    family: str, kv: str, unified: bool, tiny_model: TinyModel
) -> None:
    a, b = tiny.FAMILIES[family].window
    llm = load(tiny_model(family), f"{a}:{b} k=3 kv={kv}", **F32)
    texts = [tokens(llm, 40, seed=1), tokens(llm, 40, seed=2)]
    alone = []
    for text in texts:
        llm.reset()
        alone.append(np.concatenate([llm.logits(text[:30]), *(llm.logits([t]) for t in text[30:])]))
    context = sequences_context(llm, unified)
    try:
        both = [np.concatenate(rows) for rows in zip(*decode_sequences(context, llm, texts, 30), strict=True)]
    finally:
        llama_cpp.llama_free(context)
    for together, single in zip(both, alone, strict=True):
        assert spread(together, single) < ROUNDING


def sequences_context(llm: LoopedLlama, unified: bool) -> ctypes.c_void_p:
    """A context of the same model and plan for two sequences."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 512, 256, 256, 2
    params.type_k = params.type_v = 0
    params.flash_attn_type = 0
    params.kv_unified = unified
    context = llama_cpp.llama_init_from_model(llm.model, params)
    assert context
    inner, llm._ctx.ctx = llm._ctx.ctx, context
    try:
        llm._install(llm.loop)
    finally:
        llm._ctx.ctx = inner
    return context


def decode_sequences(
    context: ctypes.c_void_p, llm: LoopedLlama, texts: list[list[int]], prompt: int
) -> list[list[np.ndarray]]:
    """Rows of each step for each sequence: the prompts in one batch, then a token of each at a time."""
    steps = [(0, prompt), *((i, i + 1) for i in range(prompt, len(texts[0])))]
    batch = llama_cpp.llama_batch_init(256, 0, 2)
    out = []
    for start, end in steps:
        n = 0
        for seq, text in enumerate(texts):
            for pos in range(start, end):
                batch.token[n], batch.pos[n], batch.logits[n] = text[pos], pos, True
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, seq
                n += 1
        batch.n_tokens = n
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(n, llm.n_vocab())).copy()
        out.append(np.split(rows, len(texts)))
    llama_cpp.llama_batch_free(batch)
    return out


# what the cache holds


@pytest.mark.parametrize("family", ["llama", "qwen2moe", "deepseek2"])
@pytest.mark.parametrize("kv", ["first", "frozen"])
@pytest.mark.parametrize("decode", ["full", "bypass"])
def test_the_window_stores_the_unmodified_models_kv(family: str, kv: str, decode: str, tiny_model: TinyModel) -> None:
    """The window's layers see the plain model's states in their first pass, however often later passes run."""
    a, b = tiny.FAMILIES[family].window
    llm = load(tiny_model(family), f"{a}:{b} k=3 kv={kv} decode={decode}", flash_attn=True, **F32)
    prompt = tokens(llm, 50)
    looped = stored_kv(llm, [prompt, [5], [6]])
    llm.set_loop(None)
    plain = stored_kv(llm, [prompt, [5], [6]])
    for il, (mine, theirs) in enumerate(zip(looped, plain, strict=True)):
        assert (mine == theirs) == (il < b), f"layer {il}"


def stored_kv(llm: LoopedLlama, steps: list[list[int]]) -> list[bytes]:
    """The K and V rows of each layer, from the sequence state of a plain or K-only cache with V not transposed."""
    llm.reset()
    for step in steps:
        llm.logits(step)
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, buffer, size, 0) == size
    data, n, layers = bytes(buffer), llm.n_tokens, llm.n_layer()
    cells = 12 * n  # position, sequence count and sequence of every token come before the layers
    start = data.index(struct.pack("<III", 0, layers, 0), cells) + 8  # v_trans, n_layer; then F32, the first type
    rows: list[bytes] = [b""] * layers
    for _ in range(2):
        for il in range(layers):
            if start >= len(data):
                return rows  # K-only
            (row,) = struct.unpack_from("<Q", data, start + 4)
            rows[il] += data[start + 12 : start + 12 + n * row]
            start += 12 + n * row
    assert start == len(data)
    return rows


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek2"])
@pytest.mark.parametrize("type_k", [1, 8])
def test_kv_memory_is_what_the_spec_says(family: str, type_k: int, tiny_model: TinyModel) -> None:
    a, b = tiny.FAMILIES[family].window
    llm = load(tiny_model(family), type_k=type_k, type_v=type_k, flash_attn=True)
    plain = llm.memory_bytes()
    for kv in ("first", "last", "frozen"):
        llm.set_loop(LoopSpec((a, b), 4, kv=kv))
        assert llm.memory_bytes() == plain
    llm.set_loop(LoopSpec((a, b), 4, kv="each"))
    per_layer, rest = divmod(plain, llm.n_layer())
    assert rest == 0
    assert llm.memory_bytes() == plain + 3 * (b - a) * per_layer
    assert llm.loop.extra_kv_bytes([per_layer] * llm.n_layer()) == 3 * (b - a) * per_layer
    llm.set_loop(None)
    assert llm.memory_bytes() == plain


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek2"])
@pytest.mark.parametrize("kv", ["first", "last", "each", "frozen"])
def test_flash_attention_and_quantised_kv(family: str, kv: str, tiny_model: TinyModel) -> None:
    """Other kernels and rounded K/V move the looped logits no more than they move the plain ones."""
    a, b = tiny.FAMILIES[family].window
    loop = f"{a}:{b} k=3 kv={kv}"
    exact = load(tiny_model(family), loop, **F32)
    text = tokens(exact, 80)
    steps = [text[:70], *([t] for t in text[70:])]

    def run(llm: LoopedLlama) -> tuple[np.ndarray, np.ndarray]:
        looped = np.concatenate([llm.logits(s) for s in steps])
        llm.set_loop(None)
        return looped, np.concatenate([llm.logits(s) for s in steps])

    looped, plain = run(exact)
    for types in ({"type_k": 1, "type_v": 1}, {"type_k": 8, "type_v": 8}):
        other_looped, other_plain = run(load(tiny_model(family), loop, flash_attn=True, **types))
        moved = float(np.sqrt(np.mean((other_plain - plain) ** 2)))
        assert float(np.sqrt(np.mean((other_looped - looped) ** 2))) < 3 * moved + 1e-3
        assert spread(looped, plain) > 0.1


@pytest.mark.parametrize(("family", "tolerance"), [("llama", 0.0), ("deepseek2", 0.0), ("gemma3", ROUNDING)])
@pytest.mark.parametrize("kv", ["first", "last", "each", "frozen"])
@pytest.mark.parametrize("decode", ["full", "bypass", "first:2"])
def test_a_saved_state_continues_identically(
    family: str, tolerance: float, kv: str, decode: str, tiny_model: TinyModel
) -> None:
    """To the bit, but for a sliding window: it is saved without the cells that left it, plain or looped."""
    a, b = tiny.FAMILIES[family].window
    loop = f"{a}:{b} k=3 kv={kv} decode={decode}"
    llm = load(tiny_model(family), loop, **F32)
    text = tokens(llm, 60)
    llm.logits(text[:50])
    llm.logits(text[50:51])
    state = llm.save_state()
    expected = [llm.logits([t]) for t in text[51:]]
    other = load(tiny_model(family), loop, **F32)
    other.load_state(state)
    assert spread(np.concatenate([other.logits([t]) for t in text[51:]]), np.concatenate(expected)) <= tolerance
    other.set_loop(None)
    with pytest.raises(GgufloopError, match="saved under the loop"):
        other.load_state(state)


# reduced tableaux


@pytest.mark.model
@pytest.mark.parametrize(("k", "beta"), [(6, 0.0), (6, 0.5), (12, 0.0), (12, 0.5)])
def test_three_passes_do_what_k_passes_do(k: int, beta: float, smollm2_f32: Path) -> None:
    """Of KL(loop || plain), the reduced scheme misses under 1 % (0.14 % at K = 6, 0.42 % at K = 12 over 384 tokens)."""
    llm = load(smollm2_f32, n_threads=2, n_threads_batch=2)
    text = prose(llm, 128)
    plain = log_softmax(llm.logits(text))
    full = looped_log_softmax(llm, text, LoopSpec((12, 16), k, beta=beta))
    reduced = looped_log_softmax(llm, text, LoopSpec((12, 16), k, beta=beta, passes=3))
    assert kl(full, plain) > 5e-3
    assert kl(full, reduced) < 0.01 * kl(full, plain)


@pytest.mark.model
def test_three_passes_on_a_quantised_file(smollm2: Path) -> None:
    """On Q4_1 the reduction is lost in the noise of 8-bit activations, here that of a damping changed by 1e-5."""
    llm = load(smollm2, n_threads=2, n_threads_batch=2)
    text = prose(llm, 128)
    full = looped_log_softmax(llm, text, LoopSpec((12, 16), 6))
    noise = kl(full, looped_log_softmax(llm, text, LoopSpec((12, 16), 6, damping=(1 + 1e-5) / 6)))
    assert noise > 1e-4
    assert kl(full, looped_log_softmax(llm, text, LoopSpec((12, 16), 6, passes=3))) < 1.5 * noise


def looped_log_softmax(llm: LoopedLlama, text: list[int], loop: LoopSpec) -> np.ndarray:
    llm.set_loop(loop)
    return log_softmax(llm.logits(text))


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.mean((np.exp(p) * (p - q)).sum(-1)))


# a llama_cpp.Llama like any other


def test_generate_equals_logits_step_by_step(tiny_model: TinyModel) -> None:
    a, b = tiny.FAMILIES["llama"].window
    for decode in ("full", "bypass", "first:3"):
        llm = load(tiny_model("llama"), f"{a}:{b} k=3 decode={decode}")
        prompt = tokens(llm, 20)
        generated = list(itertools.islice(llm.generate(prompt, temp=0.0), 12))
        other = load(tiny_model("llama"), f"{a}:{b} k=3 decode={decode}")
        row, expected = other.logits(prompt)[-1], []
        for _ in range(12):
            expected.append(int(row.argmax()))
            row = other.logits(expected[-1:])[-1]
        assert generated == expected
        assert llm.timings().prompt_tokens == 20
        assert llm.timings().generated_tokens == 11


def test_a_prompt_of_one_token_is_a_prompt(tiny_model: TinyModel) -> None:
    """A cached conversation whose new prompt adds one token: generate() loops it, though one token is evaluated."""
    a, b = tiny.FAMILIES["llama"].window
    llm = load(tiny_model("llama"), f"{a}:{b} k=3 kv=each decode=bypass", logits_all=True)
    prompt = tokens(llm, 20)
    next(llm.generate(prompt, temp=0.0))
    fresh = llm.scores[19].copy()
    llm.reset()
    next(llm.generate(prompt[:19], temp=0.0))
    next(llm.generate(prompt, temp=0.0))
    assert spread(llm.scores[19], fresh) < ROUNDING


def test_changing_the_loop_forgets_the_cache(tiny_model: TinyModel) -> None:
    a, b = tiny.FAMILIES["llama"].window
    llm = load(tiny_model("llama"), f"{a}:{b} k=3")
    prompt = tokens(llm, 30)
    next(llm.generate(prompt, temp=0.0))
    llm.set_loop(LoopSpec((a, b), 3))
    assert llm.n_tokens == 30  # the same loop: nothing to forget
    llm.set_loop(None)
    assert llm.n_tokens == 0
    next(llm.generate(prompt, temp=0.0))
    assert llm.timings().prompt_tokens == 30
    next(llm.generate([*prompt, 3, 4], temp=0.0))
    assert llm.timings().prompt_tokens == 2


def test_prompt_caches_are_kept_apart_by_loop(tiny_model: TinyModel) -> None:
    a, b = tiny.FAMILIES["llama"].window
    llm = load(tiny_model("llama"), f"{a}:{b} k=3")
    llm.set_cache(llama_cpp.LlamaRAMCache())
    prompt = [3, *tokens(llm, 30)]

    def evaluated(loop: LoopSpec | None, prompt: list[int]) -> int:
        llm.set_loop(loop)
        llm.reset()
        llm.create_completion(prompt, max_tokens=2, temperature=0.0)
        return llm.timings().prompt_tokens

    loop = LoopSpec((a, b), 3)
    assert evaluated(loop, prompt) == 31
    assert evaluated(None, prompt) == 31
    assert evaluated(loop, [*prompt, 7]) < 31
    assert evaluated(replace(loop, k=4), prompt) == 31


def test_refusals(tiny_model: TinyModel, tmp_path: Path) -> None:
    llm = load(tiny_model("llama"), "2:5 k=3")
    with pytest.raises(UsageError, match="window 2:7 touches layer 6, the last one"):
        llm.set_loop(LoopSpec((2, 7), 2))
    llm.logits(tokens(llm, 250))
    with pytest.raises(GgufloopError, match="250 tokens in the context and 7 more do not fit its 256"):
        llm.logits(tokens(llm, 7))
    assert str(llm.loop) == "2:5 k=3"
    with pytest.raises(UsageError, match="embeddings cannot be looped"):
        load(tiny_model("llama"), "2:5 k=3", embedding=True)
    with pytest.raises(UsageError, match="quantised V cache needs flash attention"):
        load(tiny_model("llama"), type_v=8)


def test_flash_attention_that_would_end_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zoo.write(tmp_path / "plm.gguf", archs.ROWS["plm"])
    with pytest.raises(UsageError, match="cannot run plm with flash attention"):
        load(path, flash_attn=True)
    with pytest.raises(SystemExit) as e:
        main(["trace", str(path), "-p", "the cat", "--window", "2:4", "-t", "1"])  # -fa auto is off here
    assert not e.value.code, capsys.readouterr().err
