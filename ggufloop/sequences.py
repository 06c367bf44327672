"""Several texts side by side in one context, over the weights of a model that is loaded already: what a server needs.

    lane = Sequences(llm, n=4, n_ctx=4096, n_batch=2048, n_ubatch=512)
    lane.set_loop(LoopSpec.parse("12:16 k=3"))
    rows = lane.decode([Row(0, token, position)])      # float32 (rows that ask for logits, n_vocab)
    saved = lane.save(0); lane.restore(1, saved)

Every sequence has a stream of cells to itself, so what one holds never moves another's K/V about, and a sequence that
is evaluated alone is computed as a context of its own would: the graph sees its stream and no other. llama_cpp comes
from engine.py, which has chosen the library it loads.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufloop import capi
from ggufloop.engine import LoopedLlama, llama_cpp
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling

_SMALLER = "give a smaller context (-c), or fewer answers at a time (--parallel)."


@dataclass(frozen=True)
class Row:
    """One token to evaluate: of which sequence, where in it, and whether its logits are wanted."""

    sequence: int
    token: int
    position: int
    wanted: bool = True


class Aborted(Exception):
    """A decode was given up because `abort` asked for it; how far it came is unknown."""


class Sequences:
    """A context for n sequences of up to n_ctx tokens each; n_ctx is rounded up as llama.cpp does.

    llm: gives the weights and every other setting of the context; it must outlive this. Raises GgufloopError if
    llama.cpp cannot make the context, or the model keeps nothing between decodes.
    """

    def __init__(self, llm: LoopedLlama, n: int, n_ctx: int, n_batch: int, n_ubatch: int) -> None:
        self._llm = llm
        self.n = n
        padded = (n_ctx + 255) // 256 * 256  # of each sequence
        if n * padded >= 2**31:
            raise GgufloopError(f"{n} x {n_ctx} tokens of context are more than llama.cpp can count.", _SMALLER)
        params = type(llm.context_params).from_buffer_copy(llm.context_params)
        params.n_ctx, params.n_seq_max, params.kv_unified = n * padded, n, False
        params.n_batch, params.n_ubatch = max(n_batch, n), max(n_ubatch, n)
        params.n_outputs_max = n  # logits are only ever wanted at the end of a text
        try:
            self._ctx = llama_cpp._internals.LlamaContext(model=llm._model, params=params, verbose=llm.verbose)
        except ValueError as e:
            raise GgufloopError(
                f"llama.cpp cannot make a context of {n} x {n_ctx} tokens: {e}.".replace("..", "."),
                _SMALLER,
            ) from None
        if self._ctx.memory is None:
            self._ctx.close()
            raise GgufloopError(
                "this model keeps no cache between tokens.",
                "only models that generate text token by token can be served.",
            )
        self.n_ctx = int(llama_cpp.llama_n_ctx_seq(self._ctx.ctx))
        self._batch = llama_cpp._internals.LlamaBatch(n_tokens=params.n_batch, embd=0, n_seq_max=1, verbose=False)
        self._lib = capi.declare(llama_cpp.llama_cpp._lib)
        self._loop: LoopSpec | None = None
        self._abort = ctypes.create_string_buffer(b"0")
        self._watch_for_abort()

    def _watch_for_abort(self) -> None:
        """Let llama.cpp ask between two nodes of a graph whether to give up.

        It asks some thousand times a token, so the answer is read in C: atoi of a text that `abort` changes, with no
        Python and no lock in between.
        """
        libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        callback = ctypes.cast(libc.atoi, llama_cpp.ggml_abort_callback)
        llama_cpp.llama_set_abort_callback(self._ctx.ctx, callback, ctypes.cast(self._abort, ctypes.c_void_p))

    def abort(self, now: bool) -> None:
        """Let decodes raise Aborted, the running one as well, where the device can; may be called from any thread."""
        self._abort.value = b"1" if now else b"0"

    def close(self) -> None:
        """Free the context."""
        self._batch.close()
        self._ctx.close()

    @property
    def loop(self) -> LoopSpec | None:
        """The loop in force, None for the plain model."""
        return self._loop

    def set_loop(self, loop: LoopSpec | None) -> None:
        """Evaluate from now on with `loop`; sequences stay as they are, unless slots of kv each come or go.

        Then all of them are empty afterwards. Raises GgufloopError; then the loop that was in force stays.
        """
        if loop == self._loop:
            return
        try:
            capi.install(self._lib, self._ctx.ctx, loop)
        except capi.Refused as e:
            self._loop = None if e.plain else self._loop
            raise
        self._loop = loop

    def enable(self, looped: bool) -> None:
        """Whether the next decodes loop, where there is a loop."""
        if self._loop is not None and self._loop.is_loop:
            self._lib.llama_loop_enable(self._ctx.ctx, looped)

    def decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Evaluate tokens together; returns a copy of the logits of those that want them, in the order of `rows`.

        Raises Aborted, and GgufloopError if llama.cpp fails; then what the sequences hold is unknown.
        """
        batch = self._batch.batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.wanted
            batch.seq_id[i][0], batch.n_seq_id[i] = row.sequence, 1
        code = llama_cpp.llama_decode(self._ctx.ctx, batch)
        if code == 2:
            raise Aborted
        if code != 0:
            raise GgufloopError(
                f"llama.cpp could not evaluate {len(rows)} tokens (llama_decode returned {code}).",
                "run with -v to see llama.cpp's own log.",
            )
        n_vocab = self._llm.n_vocab()
        out = np.empty((sum(row.wanted for row in rows), n_vocab), dtype=np.float32)
        wanted = [i for i, row in enumerate(rows) if row.wanted]
        for j, i in enumerate(wanted):
            out[j] = np.ctypeslib.as_array(self._ctx.get_logits_ith(i), shape=(n_vocab,))
        return out

    def cut(self, sequence: int, length: int) -> bool:
        """Drop what a sequence holds from position `length` on; False if this kind of cache cannot, and keeps all."""
        return bool(llama_cpp.llama_memory_seq_rm(self._ctx.memory, sequence, length, -1))

    def save(self, sequence: int) -> NDArray[np.uint8]:
        """What a sequence holds, to be given back to `restore` under the same loop."""
        size = llama_cpp.llama_state_seq_get_size(self._ctx.ctx, sequence)
        data = np.empty(size, dtype=np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = llama_cpp.llama_state_seq_get_data(self._ctx.ctx, pointer, size, sequence)
        return data[:written]

    def restore(self, sequence: int, data: NDArray[np.uint8]) -> bool:
        """Let a sequence hold what was saved; False if that failed, and then it is empty."""
        self.cut(sequence, 0)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama_cpp.llama_state_seq_set_data(self._ctx.ctx, pointer, data.size, sequence) == 0:
            self.cut(sequence, 0)
            return False
        return True

    def memory_bytes(self) -> int:
        """Bytes of K/V cache this context holds."""
        return int(self._lib.llama_loop_memory_size(self._ctx.ctx))


@dataclass(frozen=True)
class Draw:
    """How one text's tokens are drawn. `sampling` is what `generate.complete` uses; the rest is off by default.

    bias: added to the logits of these tokens. grammar: GBNF the text obeys.
    """

    sampling: Sampling
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None


class Sampler:
    """Draws the tokens of one text: the very chain that LoopedLlama.generate draws with, for a row at a time.

    The grammar is applied by itself and before the chain, so that a grammar which allows nothing more is noticed: in
    llama.cpp it would end the process. Raises UsageError for a grammar that llama.cpp cannot read.
    """

    def __init__(self, llm: LoopedLlama, draw: Draw) -> None:
        sampling = draw.sampling
        llm.set_seed(sampling.seed)
        self._chain = llm._init_sampler(
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            temp=sampling.temp,
            repeat_penalty=sampling.repeat_penalty,
            frequency_penalty=draw.frequency_penalty,
            presence_penalty=draw.presence_penalty,
        )
        self._bias = draw.bias
        self._candidates = llama_cpp._internals.LlamaTokenDataArray(n_vocab=llm.n_vocab())
        self._grammar: Any = None
        if draw.grammar is not None:
            self._grammar = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, draw.grammar.encode(), b"root")
            if not self._grammar:
                self.close()
                raise UsageError("the grammar of this request is too large or malformed.", "give a simpler schema.")

    def close(self) -> None:
        """Free it."""
        self._chain.close()
        if self._grammar:
            llama_cpp.llama_sampler_free(self._grammar)
            self._grammar = None

    def pick(self, row: NDArray[np.float32]) -> int | None:
        """The next token after these logits; None if the grammar allows none."""
        array = self._candidates
        array.copy_logits(row)
        for token, bias in self._bias:
            array.candidates_data.logit[token] += bias
        pointer = ctypes.byref(array.candidates)
        if self._grammar:
            llama_cpp.llama_sampler_apply(self._grammar, pointer)
            if not np.isfinite(array.candidates_data.logit).any():
                return None
        array.candidates.selected = -1
        llama_cpp.llama_sampler_apply(self._chain.sampler, pointer)
        token = int(array.candidates_data.id[array.candidates.selected])
        llama_cpp.llama_sampler_accept(self._chain.sampler, token)
        if self._grammar:
            llama_cpp.llama_sampler_accept(self._grammar, token)
        return token


def grammar_of(schema: dict[str, Any]) -> str:
    """The GBNF of a JSON schema, as llama-cpp-python writes it. Raises UsageError for one it cannot."""
    try:
        return str(llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps(schema)))
    except (AssertionError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        reason = str(e).split("\n")[0][:200] or type(e).__name__
        raise UsageError(
            f"this JSON schema cannot be turned into a grammar: {reason}.", "give a simpler schema."
        ) from e
