"""Several sequences in one batch: what scoring thousands of short prompts at the speed of prefill needs.

    llm = LoopedLlama(path, n_ctx=2048, n_seq=64)
    llm.evaluate_parts([Part(0, 0, prompt, 1), Part(1, 0, other, 1)], take)     # take(i, rows): of part i's last tokens
    llm.copy_sequence(0, 2)                                                     # sequence 2 begins as 0 is now
    llm.evaluate_parts([Part(2, len(prompt), answer, len(answer))], take)
    llm.drop_sequence(2)

A batch of at most n_ubatch tokens is computed at once, so no sequence in it is cut, and what a loop computes of one
does not depend on the others, whatever the K/V policy; halt alone looks at the whole batch. Everything here is a
prompt: it loops, whatever the decode policy. Other methods of LoopedLlama know sequence 0 and want the others gone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec

IN_STEP = 3
"""Most sequences of a model with recurrent layers, whose state takes memory for each: what all prompts begin with, a
prompt, and an answer to it."""


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence. start: position of the first; rows: of how many of the last ones logits are wanted."""

    sequence: int
    start: int
    tokens: Sequence[int]
    rows: int = 0


TakeRows = Callable[[int, NDArray[np.float32]], None]
"""Called with the index of a part and its logits, (rows, n_vocab), llama.cpp's own memory, good until it returns."""


class Batched:
    """Part of `LoopedLlama`; what it uses of it is declared here."""

    ctx: Any
    n_batch: int
    context_params: Any
    _ctx: Any
    _batch: Any
    _n_vocab: int

    if TYPE_CHECKING:  # theirs, so that nothing here can stand in for them

        def _loops(self) -> ctypes.CDLL | None: ...
        @property
        def loop(self) -> LoopSpec | None: ...
        def _evaluate(self, n: int, decode: Callable[[], object]) -> None: ...
        def _check_finite(self, rows: NDArray[np.float32]) -> None: ...

    @property
    def n_seq(self) -> int:
        """How many sequences the cache can hold apart."""
        return int(self.context_params.n_seq_max)

    @property
    def n_together(self) -> int:
        """Most tokens that are computed at once."""
        return int(min(self.n_batch, self.context_params.n_ubatch))

    def copy_sequence(self, source: int, target: int) -> None:
        """Let sequence `target`, which is empty, begin with all that `source` holds; no K/V is copied."""
        self._ctx.kv_cache_seq_cp(source, target, -1, -1)

    def drop_sequence(self, sequence: int) -> None:
        """Forget a sequence."""
        if self._ctx.memory is not None:
            self._ctx.kv_cache_seq_rm(sequence, -1, -1)

    def evaluate_parts(self, parts: Sequence[Part], take: TakeRows) -> None:
        """Evaluate parts of different sequences as one batch, and hand out the logits they ask for, part by part.

        Raises UsageError if they are more tokens than a batch holds, or a token is not in the vocabulary;
        GgufloopError as `eval`.
        """
        counts = [len(part.tokens) for part in parts]
        n = sum(counts)
        if not 0 < n <= self.n_batch:
            raise UsageError(f"{n} tokens are not a batch of 1 to {self.n_batch}.", "evaluate fewer at once.")
        tokens = np.concatenate([np.asarray(part.tokens, dtype=np.int32) for part in parts])
        if tokens.min() < 0 or tokens.max() >= self._n_vocab:
            raise UsageError(f"a token is not in the vocabulary of {self._n_vocab}.", "tokenize with this model.")
        wanted = np.concatenate([np.arange(c) >= c - part.rows for c, part in zip(counts, parts, strict=True)])
        place = np.concatenate([part.start + np.arange(c) for c, part in zip(counts, parts, strict=True)])
        if self._ctx.memory is None and any(part.start for part in parts):
            raise UsageError(
                "this model has no cache: tokens cannot follow others.", "score answers of one token, or another model."
            )
        lib = self._loops()
        if lib is not None and self.loop is not None and self.loop.is_loop:
            lib.llama_loop_enable(self.ctx, True)
        batch = _Batch(type(self._batch.batch), tokens, place, np.repeat([p.sequence for p in parts], counts), wanted)
        self._evaluate(n, lambda: self._ctx.decode(batch))
        if not wanted.any():
            return
        rows = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(int(wanted.sum()), self._n_vocab))
        self._check_finite(rows)
        begin = 0
        for i, part in enumerate(parts):
            end = begin + min(part.rows, counts[i])
            if end > begin:
                take(i, rows[begin:end])
            begin = end


class _Batch:
    """A llama_batch on numpy's memory, in the form llama_cpp's context takes. struct: llama_cpp's ctypes structure."""

    def __init__(
        self,
        struct: type[ctypes.Structure],
        tokens: NDArray[np.int32],
        positions: NDArray[np.int64],
        sequences: NDArray[np.int64],
        wanted: NDArray[np.bool_],
    ) -> None:
        n = len(tokens)
        ids = np.ascontiguousarray(sequences, dtype=np.int32)
        pointers = ids.ctypes.data + ids.itemsize * np.arange(n, dtype=np.uintp)  # one sequence for each token
        arrays: dict[str, NDArray[Any]] = {
            "token": tokens,
            "pos": positions.astype(np.int32),
            "n_seq_id": np.ones(n, dtype=np.int32),
            "seq_id": pointers.astype(np.uintp),
            "logits": wanted.astype(np.int8),
        }
        self._kept = (ids, arrays)
        self.batch: Any = struct()
        self.batch.n_tokens = n
        for name, array in arrays.items():
            setattr(self.batch, name, ctypes.cast(array.ctypes.data, type(getattr(self.batch, name))))
