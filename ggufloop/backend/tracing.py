"""What `engine.LoopedLlama` shows of the inside of a model: states between layers, and the head applied to any of them.

states = llm.trace(tokens)                       # records.State, in order of execution
rows = llm.lens(states[3].rows, tokens)          # float32 (n_tokens, n_vocab)

with llm.recorded() as states:                   # what a plain evaluation of one batch leaves behind,
    llm.logits(tokens)
llm.set_loop("12:16 k=3")
with llm.resumed(states):                        # any loop of these tokens can begin with: the same results,
    llm.logits(tokens)                           # without layers 0 to 15
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.backend import capi
from ggufloop.errors import BackendError, GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.records import State

States = Mapping[int, NDArray[np.float32]]
"""Layer -> the state that left it, (n_tokens, n_embd)."""


class Traced:
    """Part of `LoopedLlama`; what it uses of it is declared here."""

    ctx: Any
    metadata: dict[str, str]
    n_batch: int
    context_params: Any

    if TYPE_CHECKING:  # theirs, so that nothing here can stand in for them

        @property
        def loop(self) -> LoopSpec | None: ...
        def _loops(self) -> ctypes.CDLL | None: ...
        def _forget(self) -> None: ...
        def n_embd(self) -> int: ...
        def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]: ...

    def trace(self, tokens: Sequence[int]) -> list[State]:
        """The states of a prompt on an empty cache where they leave each layer, in order of execution.

        Raises UsageError if the tokens do not fit one batch, and as `logits`.
        """
        lib = self._one_batch(tokens)
        lib.llama_loop_trace(self.ctx, True)
        try:
            self.logits(tokens)
            states = [self._state(lib, i) for i in range(lib.llama_loop_trace_count(self.ctx))]
        finally:
            lib.llama_loop_trace(self.ctx, False)
            self._forget()
        if not states:
            arch = self.metadata.get("general.architecture", "unknown")
            raise GgufloopError(
                f"architecture {arch} cannot be traced: its graph does not show the states between its layers.",
                "docs/architectures.md lists all that can loop; those can be traced.",
            )
        return states

    def _state(self, lib: ctypes.CDLL, i: int) -> State:
        layer, evaluation, ne = ctypes.c_int32(), ctypes.c_int32(), (ctypes.c_int64 * 4)()
        data = lib.llama_loop_trace_get(self.ctx, i, layer, evaluation, ne)
        shape = [n for n in reversed(ne[2:]) if n > 1] + [ne[1], ne[0]]
        return State(layer.value, evaluation.value, np.ctypeslib.as_array(data, shape=shape).copy())

    @contextmanager
    def recorded(self) -> Iterator[dict[int, NDArray[np.float32]]]:
        """The states that leave the plain model's layers, there once the block ends; in it one batch is evaluated.

        Raises BackendError on the stock library.
        """
        lib = self._patched()
        states: dict[int, NDArray[np.float32]] = {}
        lib.llama_loop_trace(self.ctx, True)
        try:
            yield states
            found = [self._state(lib, i) for i in range(lib.llama_loop_trace_count(self.ctx))]
            states.update({state.layer: state.rows for state in found})
        finally:
            lib.llama_loop_trace(self.ctx, False)

    @contextmanager
    def resumed(self, states: States) -> Iterator[None]:
        """Let the same tokens be evaluated under the loop in force without what `recorded` has seen of them: the layers
        before the window and its first evaluation. One batch, on an empty cache, which is of no use afterwards.

        Raises Refused for a model or a loop that needs more than the state, UsageError without states or a loop.
        """
        lib, loop = self._patched(), self.loop
        if loop is None or not states:
            raise UsageError("without a loop and recorded states nothing can be resumed.", "record a plain run first.")
        first, last = loop.window
        after = first if loop.mode == "layer" else last - 1
        arrays = [np.ascontiguousarray(states[il]) for il in (first - 1, after)]
        entered, left = (array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for array in arrays)
        capi.checked(lib, lib.llama_loop_resume(self.ctx, entered, left, arrays[0].size))
        try:
            yield
        finally:
            lib.llama_loop_resume(self.ctx, None, None, 0)
            self._forget()

    def lens(self, rows: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits of a state: the model's head, norm and all, applied to it (the 'logit lens').

        rows: the rows of a State that `trace` returned for these tokens. Returns float32 (n_tokens, n_vocab).
        Empties the cache. Raises as `trace`.
        """
        lib = self._one_batch(tokens)
        if rows.shape[-2:] != (len(tokens), self.n_embd()):
            raise UsageError(
                f"a state of shape {rows.shape} is not of {len(tokens)} tokens of {self.n_embd()} numbers.",
                "give rows and tokens of one trace.",
            )
        state = np.ascontiguousarray(rows, dtype=np.float32)
        lib.llama_loop_lens(self.ctx, state.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), state.size)
        try:
            return self.logits(tokens)
        finally:
            lib.llama_loop_lens(self.ctx, None, 0)
            self._forget()

    def _one_batch(self, tokens: Sequence[int]) -> ctypes.CDLL:
        lib = self._patched()
        most = min(self.n_batch, self.context_params.n_ubatch)
        if not 0 < len(tokens) <= most:
            raise UsageError(
                f"{len(tokens)} tokens are not one batch of 1 to {most}.",
                "shorten the text, or give larger batches: -b and -ub (n_batch and n_ubatch).",
            )
        self._forget()
        return lib

    def _patched(self) -> ctypes.CDLL:
        lib = self._loops()
        if lib is None:
            raise BackendError("the stock llama.cpp has no traces.", "run without --stock.")
        return lib
