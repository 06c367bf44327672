"""`LoopedLlama`: llama_cpp.Llama with a window of its layers looped. The only module that imports llama_cpp.

    llm = LoopedLlama("m.gguf", n_ctx=4096, loop=LoopSpec((14, 20), k=3))    # every llama_cpp.Llama keyword works
    llm.create_chat_completion(messages=[...])                               # streaming, grammar, tools: inherited
    llm.set_loop(None)                                                       # plain again; the cache is cleared
    llm.reset(); rows = llm.logits(tokens)                                   # float32 (n_tokens, n_vocab)

Everything generated or scored goes through `eval`, so that is where the decode policy is carried out: one C call
switches the plan on or off before a step. What a cache holds depends on the loop that filled it, so every way in
(prefix reuse, saved states, llama_cpp caches) is tied to the loop.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufloop import backend
from ggufloop.architectures import check_architecture
from ggufloop.errors import BackendError, GgufloopError, UsageError
from ggufloop.loop import KV_POLICIES, MODES, LoopSpec
from ggufloop.modelfile import check_model_file

ACTIVE = backend.activate()

import llama_cpp  # noqa: E402  # the library it loads is chosen by activate()
from llama_cpp._logger import GGML_LOG_LEVEL_TO_LOGGING_LEVEL  # noqa: E402
from llama_cpp.llama_cache import BaseLlamaCache  # noqa: E402
from llama_cpp.llama_tokenizer import LlamaTokenizer  # noqa: E402

# llama_cpp is one off in ggml's log levels: it prints warnings and hides errors. Here verbose shows both, else neither,
# and debug lines (one per graph node) are never shown.
GGML_LOG_LEVEL_TO_LOGGING_LEVEL.update(
    {1: logging.NOTSET, 2: logging.INFO, 3: logging.WARNING, 4: logging.WARNING, 5: logging.DEBUG}
)

ABI = 1
_UNQUANTISED = (0, 1, 30)  # ggml type numbers of f32, f16 and bf16

_ERRORS = {
    -1: "the window is out of range",
    -2: "the plan is malformed",
    -3: "its graph does not pass through the window",
    -4: "the window holds a layer with recurrent state",
    -5: "its kind of memory cannot keep what kv={kv} needs",
    -6: "out of memory",
}


def _bind() -> ctypes.CDLL:
    """Declare our C functions on the library llama_cpp loaded. Raises BackendError if it is not ours."""
    lib: ctypes.CDLL = llama_cpp.llama_cpp._lib
    if not hasattr(lib, "llama_loop_abi"):
        raise BackendError("the llama.cpp library in use has no loops.", "run: ggufloop build")
    lib.llama_loop_abi.restype = ctypes.c_int32
    if lib.llama_loop_abi() != ABI:
        raise BackendError(
            f"the llama.cpp library in use has loop interface {lib.llama_loop_abi()}, this version needs {ABI}.",
            "run: ggufloop build",
        )
    doubles = ctypes.POINTER(ctypes.c_double)
    i32 = ctypes.c_int32
    lib.llama_loop_set.argtypes = [ctypes.c_void_p, i32, i32, i32, doubles, doubles, i32, i32]
    lib.llama_loop_set.restype = i32
    lib.llama_loop_enable.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    lib.llama_loop_enable.restype = None
    lib.llama_loop_memory_size.argtypes = [ctypes.c_void_p]
    lib.llama_loop_memory_size.restype = ctypes.c_size_t
    return lib


_lib = None if ACTIVE.stock else _bind()


@dataclass(frozen=True)
class Timings:
    """What the last completion evaluated, in tokens and seconds; cached prompt tokens are not counted.

    The first generated token is sampled from the prompt's logits, so n new tokens take n - 1 evaluations.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generated_seconds: float = 0.0


class _LoopCache(BaseLlamaCache):  # type: ignore[misc]  # llama_cpp is untyped here
    """A llama_cpp prompt cache whose keys start with the loop, so that loops never meet each other's states."""

    def __init__(self, inner: BaseLlamaCache, llm: LoopedLlama) -> None:
        self._inner = inner
        self._llm = llm

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        digest = hashlib.sha256(str(self._llm.loop).encode()).digest()
        return (-1 - int.from_bytes(digest[:6], "little"), *tokens)  # negative: never a token

    @property
    def cache_size(self) -> int:
        return int(self._inner.cache_size)

    def _find_longest_prefix_key(self, key: tuple[int, ...]) -> tuple[int, ...] | None:
        found = self._inner._find_longest_prefix_key(self._key(key))
        return None if found is None else tuple(found[1:])

    def __getitem__(self, key: Sequence[int]) -> Any:
        return self._inner[self._key(key)]

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._key(key) in self._inner

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        self._inner[self._key(key)] = value


class LoopedLlama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is untyped here
    """A llama.cpp model, looped.

    model_path: a GGUF file. loop: what to loop, None for the plain model. Every other argument is
    llama_cpp.Llama's.

    Raises GgufloopError for a file that is no usable model, UsageError for a loop or setting it cannot run.
    """

    def __init__(self, model_path: str | Path, *args: Any, loop: LoopSpec | None = None, **kwargs: Any) -> None:
        self._loop: LoopSpec | None = None
        self._prompt_next = False  # the next eval is the prompt of generate(), whatever its length
        self._decoded = 0  # generated tokens since the last prompt
        self._timings = Timings()
        self._evaluated = 0
        check_model_file(Path(model_path))
        quantised_v = kwargs.get("type_v") not in (None, *_UNQUANTISED)
        if quantised_v and not kwargs.get("flash_attn", False):
            raise UsageError("a quantised V cache needs flash attention.", "switch it on: flash_attn=True (-fa on).")
        if kwargs.get("n_ctx"):
            kwargs["n_ctx"] = -(-kwargs["n_ctx"] // 256) * 256  # as llama.cpp does, so that llama_cpp's arrays fit it
        try:
            super().__init__(str(model_path), *args, **kwargs)
        except ValueError as e:
            raise GgufloopError(
                f"llama.cpp cannot use {model_path}: {e}".rstrip(".") + ".", "run with -v to see llama.cpp's own log."
            ) from None
        try:
            self.set_loop(loop)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the model; nothing to do if it never loaded."""
        if hasattr(self, "_stack"):
            super().close()

    @property
    def loop(self) -> LoopSpec | None:
        """The loop in force, None for the plain model."""
        return self._loop

    def is_eog(self, token: int) -> bool:
        """Whether a token ends an answer: end of text, of turn, or of message."""
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """The bytes of tokens. llama_cpp's own returns none for a piece of more than 32, which loses indentation."""
        if not isinstance(self.tokenizer_, LlamaTokenizer):
            return bytes(super().detokenize(tokens, prev_tokens, special))
        text, buffer = b"", ctypes.create_string_buffer(32)
        for token in tokens:
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, len(buffer), 0, special)
            if n < 0:
                buffer = ctypes.create_string_buffer(-n)
                n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, len(buffer), 0, special)
            text += buffer.raw[:n]
        return text[1:] if text[:1] == b" " and tokens[0] == self.token_bos() else text

    def n_layer(self) -> int:
        """Number of layers of the model."""
        return int(llama_cpp.llama_model_n_layer(self.model))

    def memory_bytes(self) -> int:
        """Bytes of K/V cache the context holds, the slots of kv='each' included."""
        return int(_lib.llama_loop_memory_size(self.ctx)) if _lib else 0

    def timings(self) -> Timings:
        """How long the last completion took; complete once its generator is used up or closed."""
        return self._timings

    def set_loop(self, loop: LoopSpec | None) -> None:
        """Loop from now on as `loop` says; None for the plain model.

        What the cache holds depends on the loop, so any change clears it. Raises UsageError for a window or model
        that cannot loop, and then the loop that was in force stays.
        """
        if loop == self._loop:
            return
        if loop is not None:
            self._check(loop)
        if _lib is None:
            raise BackendError("the stock llama.cpp has no loops.", "run without --stock.")
        try:
            self._install(loop)
        except GgufloopError:
            self._install(self._loop)
            raise
        finally:
            self._ctx.kv_cache_clear()
            super().reset()
            self._decoded = 0
        self._loop = loop

    def _check(self, loop: LoopSpec) -> None:
        check_architecture(self.metadata.get("general.architecture", "unknown"))
        loop.check(self.n_layer())
        if self.context_params.embeddings:
            raise UsageError("embeddings cannot be looped.", "leave out the loop, or embedding=True.")
        if self.draft_model is not None and (loop.kv not in ("each", "frozen") or loop.decode != "full"):
            raise UsageError(
                f"a draft model needs kv each or frozen and decode full, not kv {loop.kv}, decode {loop.decode}.",
                "its tokens are checked several at once, which is exact only there.",
            )

    def _install(self, loop: LoopSpec | None) -> None:
        """Give the context the plan of `loop`. Raises GgufloopError; then the context has no plan."""
        assert _lib is not None
        doubles = ctypes.POINTER(ctypes.c_double)
        if loop is None or not loop.is_loop:
            code = _lib.llama_loop_set(self.ctx, 0, 0, 0, doubles(), doubles(), 0, 0)
        else:
            t = loop.tableau()
            a, b = (np.ascontiguousarray(m, dtype=np.float64).ctypes.data_as(doubles) for m in (t.A, t.B))
            mode, kv = MODES.index(loop.mode), KV_POLICIES.index(loop.kv)
            code = _lib.llama_loop_set(self.ctx, *loop.window, t.evaluations, a, b, mode, kv)
        if code != 0:
            arch = self.metadata.get("general.architecture", "unknown")
            reason = _ERRORS.get(code, f"error {code}").format(kv=loop.kv if loop else "-")
            raise GgufloopError(f"cannot loop {arch} with {loop}: {reason}.", "run: ggufloop inspect MODEL")

    def _begin_step(self, n_tokens: int) -> None:
        """Switch the plan on or off for a step of n_tokens: the decode policy.

        A step is a decode step if it evaluates exactly one token on a non-empty cache and is not the prompt that
        generate() was given.
        """
        prompt, self._prompt_next = self._prompt_next, False
        if n_tokens == 1 and self.n_tokens > 0 and not prompt:
            self._decoded += 1
        else:
            self._decoded = 0
        if self._loop is not None and self._loop.is_loop:
            assert _lib is not None
            limit = self._loop.decode_loops()
            _lib.llama_loop_enable(self.ctx, self._decoded == 0 or limit is None or self._decoded <= limit)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after what is cached, as one step. Raises GgufloopError if they do not fit the context."""
        self._check_fits(len(tokens))
        self._begin_step(len(tokens))
        self._evaluated += len(tokens)
        super().eval(tokens)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Evaluate tokens after what is cached, as one step, and return all their logits.

        Returns float32 (n_tokens, n_vocab). Raises GgufloopError if they do not fit the context.
        """
        self._check_fits(len(tokens))
        self._begin_step(len(tokens))
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        rows = np.empty((len(tokens), self._n_vocab), dtype=np.float32)
        for i in range(0, len(tokens), self.n_batch):
            batch = list(tokens[i : i + self.n_batch])
            self._batch.set_batch(batch=batch, n_past=self.n_tokens, logits_all=True)
            self._ctx.decode(self._batch)
            rows[i : i + len(batch)] = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch), self._n_vocab))
            self.input_ids[self.n_tokens : self.n_tokens + len(batch)] = batch
            self.n_tokens += len(batch)
            self._requires_eval = False
        return rows

    def _check_fits(self, n: int) -> None:
        if self.n_tokens + n > len(self.input_ids):
            raise GgufloopError(
                f"{self.n_tokens} tokens in the context and {n} more do not fit its {len(self.input_ids)}.",
                "give a larger context (-c), or shorten the text.",
            )

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """llama_cpp's generate, timed, its first evaluation marked as the prompt."""
        self._prompt_next = True
        self._timings = Timings()
        self._evaluated = 0
        inner = super().generate(tokens, *args, **kwargs)
        sent: Sequence[int] | None = None
        try:
            while True:
                start = perf_counter()
                try:
                    token = inner.send(sent)
                except StopIteration:
                    return
                self._record(perf_counter() - start)
                sent = yield token
        finally:
            inner.close()

    def _record(self, seconds: float) -> None:
        t, n, self._evaluated = self._timings, self._evaluated, 0
        if self._decoded == 0:
            self._timings = Timings(t.prompt_tokens + n, t.prompt_seconds + seconds, 0, 0.0)
        else:
            self._timings = Timings(
                t.prompt_tokens, t.prompt_seconds, t.generated_tokens + n, t.generated_seconds + seconds
            )

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """llama_cpp's prompt cache; entries made under one loop are not seen under another."""
        super().set_cache(None if cache is None else _LoopCache(cache, self))

    def save_state(self) -> Any:
        """llama_cpp's state, with the loop it was made under."""
        state = super().save_state()
        state.loop = self._loop
        state.decoded = self._decoded
        return state

    def load_state(self, state: Any) -> None:
        """Restore a saved state. Raises GgufloopError if it was made under another loop."""
        made_under = getattr(state, "loop", None)
        if made_under != self._loop:
            raise GgufloopError(
                f"this state was saved under the loop {made_under}, the model runs {self._loop}.",
                "set_loop to the state's loop first.",
            )
        super().load_state(state)
        self._decoded = getattr(state, "decoded", 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "loop": self._loop}
