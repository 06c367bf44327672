"""Recurrent and hybrid models in use: sequences that share a batch, saved states, prompts that continue others.

That a loop computes the right thing on them is in test_architectures.py and test_reference.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import archs, zoo

from ggufloop.engine import LoopedLlama, llama_cpp
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.models.gguf import read_header

FAMILIES = ("qwen35", "granitehybrid", "lfm2", "mamba2", "falcon-h1", "rwkv7")
TEXT = np.random.default_rng(3).integers(0, 256, 40).tolist()
ROUNDING = 2e-4
"""Most the same sum may differ when it is computed in other batches: F32, logits of size 1 to 10."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recurrent")


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LoopedLlama]:
    path = zoo.write(folder / f"{request.param}.gguf", archs.ROWS[request.param])
    model = LoopedLlama(path, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False)
    yield model
    model.close()


def test_a_header_tells_whether_llama_cpp_keeps_a_state(tmp_path: Path) -> None:
    """Of every architecture that can loop; else a model that answers questions takes the memory of 128 states."""
    told, kept = {}, {}
    for name, row in archs.ROWS.items():
        path = zoo.write(tmp_path / "m.gguf", row)
        model = LoopedLlama(path, n_ctx=64, n_threads=1, verbose=False)
        told[name], kept[name] = read_header(path).keeps_state, model.in_step
        model.close()
    assert told == kept
    assert 0 < sum(kept.values()) < len(kept)


def loop(llm: LoopedLlama, settings: str) -> LoopSpec:
    a, b = archs.ROWS[llm.metadata["general.architecture"]].window
    return LoopSpec.parse(f"{a}:{b} {settings}")


def spread(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a - b).max())


class Sequences:
    """A context of the model for two sequences, under the model's own loop."""

    def __init__(self, llm: LoopedLlama) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 512, 256, 256, 2
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0
        params.flash_attn_type = llm.context_params.flash_attn_type
        self.llm, own = llm, llm._ctx.ctx
        self.ctx = llama_cpp.llama_init_from_model(llm.model, params)
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.batch = llama_cpp.llama_batch_init(256, 0, 2)
        llm._ctx.ctx = self.ctx
        try:
            llm._install(llm.loop)
        finally:
            llm._ctx.ctx = own

    def decode(self, *tokens: tuple[int, int, int]) -> np.ndarray:
        """Logits of (token, position, sequence) triples in one batch."""
        for n, (token, pos, seq) in enumerate(tokens):
            self.batch.token[n], self.batch.pos[n], self.batch.logits[n] = token, pos, True
            self.batch.n_seq_id[n], self.batch.seq_id[n][0] = 1, seq
        self.batch.n_tokens = len(tokens)
        assert llama_cpp.llama_decode(self.ctx, self.batch) == 0
        shape = (len(tokens), self.llm.n_vocab())
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), shape=shape).copy()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.ctx)


@pytest.mark.parametrize("settings", ["k=3", "k=3 kv=each", "k=2 mode=layer", "k=2 solver=repeat"])
def test_sequences_of_one_batch_do_not_meet(llm: LoopedLlama, settings: str) -> None:
    """Sequence 1 is a copy of 0 that goes its own way: states are gathered, moved and written for both at once."""
    llm.set_loop(loop(llm, settings))
    prompt, ways = TEXT[:20], (TEXT[20:30], TEXT[30:40])
    alone = []
    for way in ways:
        llm.reset()
        llm.logits(prompt)
        alone.append(np.concatenate([llm.logits([t]) for t in way]))
    assert spread(*alone) > 0.1
    both = Sequences(llm)
    both.decode(*((t, n, 0) for n, t in enumerate(prompt)))
    llama_cpp.llama_memory_seq_cp(both.memory, 0, 1, -1, -1)
    together = [both.decode(*((way[i], 20 + i, seq) for seq, way in enumerate(ways))) for i in range(6)]
    for seq in (0, 1):
        assert spread(np.stack([rows[seq] for rows in together]), alone[seq][:6]) < ROUNDING
    # sequence 0 ends, and 1 goes on alone in a cell that may move
    llama_cpp.llama_memory_seq_rm(both.memory, 0, -1, -1)
    rest = np.concatenate([both.decode((ways[1][i], 20 + i, 1)) for i in range(6, 10)])
    assert spread(rest, alone[1][6:]) < ROUNDING
    both.close()


@pytest.mark.parametrize("settings", ["k=3", "k=3 kv=each", "k=3 decode=bypass", "k=2 mode=layer kv=each"])
def test_a_saved_state_continues_identically(llm: LoopedLlama, settings: str) -> None:
    llm.set_loop(loop(llm, settings))
    llm.reset()
    llm.logits(TEXT[:25])
    state = llm.save_state()
    expected = np.concatenate([llm.logits([t]) for t in TEXT[25:32]])
    llm.reset()
    llm.logits(TEXT[::-1])
    llm.load_state(state)
    assert spread(np.concatenate([llm.logits([t]) for t in TEXT[25:32]]), expected) == 0
    llm.set_loop(loop(llm, "k=4 kv=each"))
    with pytest.raises(GgufloopError, match="saved under the loop"):
        llm.load_state(state)


def test_a_state_of_other_slots_is_refused_by_the_memory_itself(llm: LoopedLlama) -> None:
    """Whoever uses llama.cpp's own functions must not get states into the wrong slots."""
    llm.set_loop(loop(llm, "k=3 kv=each"))
    llm.reset()
    llm.logits(TEXT[:10])
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, data, size, 0) == size
    llm.reset()
    assert llama_cpp.llama_state_seq_set_data(llm.ctx, data, size, 0) == size
    for other in (None, "k=4 kv=each"):
        llm.set_loop(other if other is None else loop(llm, other))
        assert llama_cpp.llama_state_seq_set_data(llm.ctx, data, size, 0) == 0
    llm.reset()


@pytest.mark.parametrize("settings", [None, "k=3", "k=3 kv=each", "k=3 decode=bypass"])
def test_prompts_that_share_a_beginning(llm: LoopedLlama, settings: str | None) -> None:
    """A state cannot go back, so a prompt is read anew unless it continues the whole cache."""
    llm.set_loop(None if settings is None else loop(llm, settings))
    prompts = [TEXT[:12], TEXT[:20], TEXT[:12], [*TEXT[:8], 1, 2, 3], TEXT[:20]]

    def answer(prompt: list[int]) -> list[int]:
        return [t for _, t in zip(range(5), llm.generate(prompt, temp=0.0), strict=False)]

    expected = []
    for prompt in prompts:
        llm.reset()
        expected.append(answer(prompt))
    llm.reset()
    assert [answer(prompt) for prompt in prompts] == expected


def test_a_prompt_that_continues_the_cache_is_not_read_again(llm: LoopedLlama) -> None:
    llm.set_loop(loop(llm, "k=3 kv=each"))
    llm.reset()
    answer = [t for _, t in zip(range(4), llm.generate(TEXT[:12], temp=0.0), strict=False)]
    longer = [*TEXT[:12], *answer[:3], 5, 6, 7]
    assert llm.n_tokens == 15
    next(llm.generate(longer, temp=0.0))
    assert llm.timings().prompt_tokens == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("k=3 kv=last", "has recurrent layers, which store one state of all positions: kv last would need one of each"),
        ("k=3 kv=frozen", "has recurrent layers, which store one state of all positions: kv frozen would need one"),
        ("k=3 decode=entropy:2", "decode entropy:2 evaluates tokens twice, and this model's recurrent state cannot go"),
        ("k=3 kv=each decode=bypass", "and with kv each a state per pass: a token with one pass, as in decode bypass"),
    ],
)
def test_refusals(llm: LoopedLlama, settings: str, message: str) -> None:
    llm.set_loop(loop(llm, "k=2"))
    with pytest.raises(UsageError, match=message):
        llm.set_loop(loop(llm, settings))
    assert llm.loop == loop(llm, "k=2")


def test_each_takes_what_its_slots_hold(llm: LoopedLlama) -> None:
    llm.set_loop(None)
    plain = llm.memory_bytes()
    sizes = []
    for k in (2, 3, 5):
        llm.set_loop(loop(llm, f"k={k} kv=each"))
        sizes.append((llm.memory_bytes() - plain) / (k - 1))
    assert sizes[0] == sizes[1] == sizes[2] > 0
    llm.set_loop(loop(llm, "k=5"))
    assert llm.memory_bytes() == plain
