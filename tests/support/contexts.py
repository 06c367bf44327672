"""A llama_context spelt out: several sequences, batches of tokens or of embeddings, operations on the cache, adapters.

    with Context(path, "2:4 k=2 solver=repeat", n_seq=2) as c:
        rows = c.decode(Part([3, 4, 5]))                  # sequence 0
        c.copy(0, 1)
        rows += c.decode(Part([6]), Part([7], seq=1))     # both go on, in one batch

`LoopedLlama` has one sequence and only ever goes on or starts over; servers do all of this. Loops are given as text,
None is the plain model: with the plan off a graph is the stock library's (test_engine.py), so what is compared with
here can be computed in the same process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ggufloop.backend import capi
from ggufloop.engine import llama_cpp
from ggufloop.loop import LoopSpec
from support import archs, tiny, zoo

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
"""Types of K and V, as ggml numbers them."""
ROUNDING = 2e-4
"""Most the same sum may differ when it is computed in other batches or in another order: logits of size 1 to 10."""
SHOWS = 0.02
"""Least a difference must be for a comparison to mean anything."""

_lib = llama_cpp.llama_cpp._lib


@dataclass(frozen=True)
class Part:
    """What one sequence brings to a batch: tokens, or rows of embeddings, after what it holds."""

    content: Sequence[int] | np.ndarray
    seq: int = 0


class Context:
    """A model and one context of it. type_k, type_v: F32 if nothing is said. flash: flash attention."""

    def __init__(
        self, path: Path, loop: str | None = None, *, n_seq: int = 1, unified: bool = False, n_ctx: int = 256,
        n_ubatch: int = 256, type_k: int = F32, type_v: int = F32, flash: bool = False, swa_full: bool = True,
    ) -> None:  # fmt: skip
        self.model = self.ctx = None
        llama_cpp._logger.set_verbose(False)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        assert self.model
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx * n_seq, 1024, n_ubatch, n_seq
        params.type_k, params.type_v, params.flash_attn_type = type_k, type_v, int(flash)
        params.kv_unified, params.swa_full = unified, swa_full
        params.n_threads = params.n_threads_batch = 1
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert self.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_layer = llama_cpp.llama_model_n_layer(self.model)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.set_loop(loop)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self.ctx = self.model = None

    # the loop

    def set_loop(self, loop: str | None) -> None:
        """Give the context a plan, or take it away."""
        capi.install(_lib, self.ctx, None if loop is None else LoopSpec.parse(loop))

    def enable(self, on: bool) -> None:
        """Switch the plan on or off between two batches: a decode policy."""
        _lib.llama_loop_enable(self.ctx, on)

    # batches

    def decode(self, *parts: Part) -> list[np.ndarray]:
        """Evaluate all parts in one batch. Returns their logits, float32 (len(content), n_vocab) each."""
        embeddings = isinstance(parts[0].content, np.ndarray)
        n = sum(len(part.content) for part in parts)
        batch = llama_cpp.llama_batch_init(n, self.n_embd if embeddings else 0, 1)
        batch.n_tokens = n
        i = 0
        for part in parts:
            start = llama_cpp.llama_memory_seq_pos_max(self.memory, part.seq) + 1
            for position, x in enumerate(part.content, start):
                if embeddings:
                    row = np.ascontiguousarray(x, np.float32)
                    ctypes.memmove(ctypes.addressof(batch.embd.contents) + i * row.nbytes, row.ctypes.data, row.nbytes)
                else:
                    batch.token[i] = x
                batch.pos[i], batch.n_seq_id[i], batch.logits[i] = position, 1, True
                batch.seq_id[i][0] = part.seq
                i += 1
        code = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        assert code == 0, f"llama_decode: {code}"
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), shape=(n, self.n_vocab)).copy()
        assert np.isfinite(rows).all()
        return np.split(rows, np.cumsum([len(part.content) for part in parts])[:-1])

    def read(self, tokens: Sequence[int], size: int) -> np.ndarray:
        """Evaluate tokens of sequence 0 in batches of `size`. Returns all their logits."""
        return np.concatenate([self.decode(Part(tokens[i : i + size]))[0] for i in range(0, len(tokens), size)])

    # the cache

    def remove(self, seq: int, start: int, end: int = -1) -> None:
        """Forget positions [start, end) of a sequence."""
        assert llama_cpp.llama_memory_seq_rm(self.memory, seq, start, end)

    def shift(self, seq: int, start: int, end: int, by: int) -> None:
        """Move positions [start, end) of a sequence; K is rotated before the next batch."""
        assert llama_cpp.llama_memory_can_shift(self.memory)
        llama_cpp.llama_memory_seq_add(self.memory, seq, start, end, by)

    def divide(self, seq: int, start: int, end: int, by: int) -> None:
        """Divide positions [start, end) of a sequence."""
        llama_cpp.llama_memory_seq_div(self.memory, seq, start, end, by)

    def copy(self, source: int, target: int) -> None:
        """Let `target` be what `source` is."""
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def clear(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(self.memory, True)

    def memory_bytes(self) -> int:
        """Bytes of the cache."""
        return int(_lib.llama_loop_memory_size(self.ctx))

    def save(self, seq: int) -> Any:
        """The state of a sequence."""
        size = llama_cpp.llama_state_seq_get_size(self.ctx, seq)
        buffer = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data(self.ctx, buffer, size, seq) == size
        return buffer

    def restore(self, state: Any, seq: int) -> None:
        """Let a sequence be what was saved."""
        assert llama_cpp.llama_state_seq_set_data(self.ctx, state, len(state), seq) == len(state)

    # adapters

    def control(self, vectors: np.ndarray, start: int, end: int) -> None:
        """Add vectors[il] to the state that leaves layer il, for layers [start, end]; float32 (n_layer, n_embd)."""
        data = np.ascontiguousarray(vectors[1 : self.n_layer], np.float32)  # layer 0 never has one
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(self.ctx, pointer, data.size, self.n_embd, start, end) == 0

    def lora(self, path: Path, scale: float) -> None:
        """Apply the LoRA of a file, which is freed with the model."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(scale)
        assert llama_cpp.llama_set_adapters_lora(self.ctx, adapters, 1, scales) == 0


FAMILIES = ("llama", "qwen3moe", "gemma3", "deepseek2")
"""Rows of archs.py: K and V, a mixture of experts, sliding windows, a latent cache."""


def write(family: str, folder: Path, *, deaf: bool = False) -> Path:
    """A tiny model of a row of archs.py, once, with heads of 64: llama.cpp rotates such where K or V is quantised.

    deaf: behind the window of the row nothing is taken from other positions, so the logits of plain tokens depend on
    what the layers up to there have stored, and on nothing else.
    """
    row, path = archs.ROWS[family], folder / f"{family}{'-deaf' if deaf else ''}.gguf"
    if path.exists():
        return path
    if family == "deepseek2":
        wide = {"rope.dimension_count": 32, "attention.key_length": 64, "attention.key_length_mla": 48}
    else:
        wide = {} if row.recurrent else {"attention.key_length": 64, "attention.value_length": 64}
    row = replace(row, meta={**row.meta, **wide})
    return zoo.write(path, row, deaf_from=row.window[1] if deaf else None)


def write_repeated(path: Path, times: int = 2) -> Path:
    """The model that `write` wrote with its window physically there `times` times."""
    target = path.with_name(f"{path.stem}-{times}.gguf")
    return target if target.exists() else tiny.repeat_window(path, target, archs.ROWS[path.stem].window, times)


def loop(family: str, settings: str) -> str:
    """A loop of the window of a row, as text."""
    return "{}:{} {}".format(*archs.ROWS[family].window, settings)


def spread(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(a - b).max())


def text(n: int, seed: int = 0) -> list[int]:
    """n random byte tokens."""
    return np.random.default_rng(seed).integers(0, 256, n).tolist()
