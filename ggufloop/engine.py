"""`LoopedLlama`: llama_cpp.Llama with a window of its layers looped. The only module that imports llama_cpp.

    llm = LoopedLlama("m.gguf", n_ctx=4096, loop=LoopSpec((14, 20), k=3))    # every llama_cpp.Llama keyword works
    llm.create_chat_completion(messages=[...])                               # streaming, grammar, tools: inherited
    llm.set_loop(None)                                                       # plain again; the cache is cleared
    llm.reset(); rows = llm.logits(tokens)                                   # float32 (n_tokens, n_vocab)

Everything generated or scored goes through `eval`, so that is where the decode policy is carried out: one C call
switches the plan on or off before a step. What a cache holds depends on the loop that filled it and, for some K/V
policies, on the steps that did, so every way back in (prefix reuse, saved states, llama_cpp caches) asks for both.
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
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ggufloop import backend
from ggufloop.architectures import check_architecture
from ggufloop.errors import BackendError, GgufloopError, UsageError
from ggufloop.inspect import KV_TYPES
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
_KV_TYPES = {GGMLQuantizationType[name.upper()].value: name for name in KV_TYPES}

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


_SEE_LOG = "run with -v (verbose=True) to see llama.cpp's own log."
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

    @property
    def capacity_bytes(self) -> int:
        return int(self._inner.capacity_bytes)

    def _find_longest_prefix_key(self, key: tuple[int, ...]) -> tuple[int, ...] | None:
        found = self._inner._find_longest_prefix_key(self._key(key))
        # the loop counts as a token in common, so a key that shares nothing else is found as well
        return tuple(found[1:]) if found is not None and found[1:2] == self._key(key)[1:2] else None

    def __getitem__(self, key: Sequence[int]) -> Any:
        if key not in self:
            raise KeyError("no entry shares a prefix")
        return self._inner[self._key(key)]

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._find_longest_prefix_key(tuple(key)) is not None

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        self._inner[self._key(key)] = value


@dataclass(frozen=True)
class _Step:
    """One evaluation: the position it began at, and whether it looped."""

    start: int
    looped: bool


class LoopedLlama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is untyped here
    """A llama.cpp model, looped.

    model_path: a GGUF file. loop: what to loop, as a LoopSpec or its text, None for the plain model. Every other
    argument is llama_cpp.Llama's.

    With kv first and last, what a prompt computes depends on how it was cut, so the same prompt is read again as it
    was read before instead of from the middle.

    Raises GgufloopError for a file that is no usable model, UsageError for a loop or setting it cannot run.
    """

    n_tokens: int
    input_ids: NDArray[np.intc]

    def __init__(self, model_path: str | Path, *args: Any, loop: LoopSpec | str | None = None, **kwargs: Any) -> None:
        self._loop: LoopSpec | None = None
        self._steps: list[_Step] = []  # what filled the cache
        self._prompt_next = False  # the next eval is the prompt of generate(), whatever its length
        self._decoded = 0  # generated tokens since the last prompt
        self._timings = Timings()
        self._evaluated = 0
        self._epoch = 0  # changes when a running generator loses its footing
        check_model_file(Path(model_path))
        _check_settings(kwargs)
        try:
            super().__init__(str(model_path), *args, **kwargs)
        except ValueError as e:
            raise GgufloopError(
                f"llama.cpp cannot use {model_path}: {e}".rstrip(".") + ".",
                "run with -v to see llama.cpp's own log; if memory is short, a smaller context (-c) helps.",
            ) from None
        if len(self.input_ids) < self.n_ctx():  # llama.cpp rounds the context up; llama_cpp's arrays do not
            self.input_ids = np.zeros(self.n_ctx(), dtype=np.intc)
            if self._logits_all:
                self.scores = np.empty((self.n_ctx(), self._n_vocab), dtype=np.single)
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
    def ctx(self) -> Any:
        """llama_cpp's context pointer. Raises GgufloopError after close(), where llama.cpp would crash."""
        if not hasattr(self, "_ctx") or self._ctx.ctx is None:
            raise GgufloopError("this model is closed.", "load it again.")
        return self._ctx.ctx

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
        assert self.ctx
        return int(llama_cpp.llama_model_n_layer(self.model))

    def memory_bytes(self) -> int:
        """Bytes of K/V cache the context holds, the slots of kv='each' included."""
        return int(_lib.llama_loop_memory_size(self.ctx)) if _lib else 0

    def timings(self) -> Timings:
        """How long the last completion took; complete once its generator is used up or closed."""
        return self._timings

    def set_loop(self, loop: LoopSpec | str | None) -> None:
        """Loop from now on as `loop` says; None for the plain model.

        What the cache holds depends on the loop, so any change clears it. Raises UsageError for a window or model
        that cannot loop, and then the loop that was in force stays.
        """
        if isinstance(loop, str):
            loop = LoopSpec.parse(loop)
        assert self.ctx
        if loop == self._loop:
            return
        if loop is not None:
            self._check(loop)
        if _lib is None:
            raise BackendError("the stock llama.cpp has no loops.", "run without --stock.")
        before, self._loop = self._loop, None  # so that .loop is right whatever fails
        self._forget()
        try:
            self._install(loop)
        except GgufloopError:
            self._install(before)
            self._loop = before
            raise
        self._loop = loop

    def _forget(self) -> None:
        """Empty the cache."""
        self._ctx.kv_cache_clear()
        self.reset()
        self._decoded = 0

    def reset(self) -> None:
        """Start over: what is evaluated next is the first token."""
        super().reset()
        self._epoch += 1

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

    def _begin_step(self, tokens: Sequence[int]) -> int:
        """Switch the plan on or off for a step: the decode policy. Returns what _decoded is once it is evaluated.

        A step is a decode step if it evaluates exactly one token on a non-empty cache and is not the prompt that
        generate() was given.
        """
        assert self.ctx
        self._check_fits(len(tokens))
        bad = next((t for t in tokens if not 0 <= t < self._n_vocab), None)
        if bad is not None:
            raise UsageError(f"token {bad} is not in the vocabulary of {self._n_vocab}.", "tokenize with this model.")
        prompt, self._prompt_next = self._prompt_next, False
        decoded = self._decoded + 1 if len(tokens) == 1 and self.n_tokens > 0 and not prompt else 0
        looped = True
        if self._loop is not None and self._loop.is_loop:
            assert _lib is not None
            limit = self._loop.decode_loops()
            looped = decoded == 0 or limit is None or decoded <= limit
            _lib.llama_loop_enable(self.ctx, looped)
        while self._steps and self._steps[-1].start >= self.n_tokens:
            self._steps.pop()
        if tokens:
            self._steps.append(_Step(self.n_tokens, looped))
        return decoded

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after what is cached, as one step.

        Raises UsageError for a token outside the vocabulary, GgufloopError if they do not fit the context.
        """
        decoded = self._begin_step(tokens)
        try:
            super().eval(tokens)
        except RuntimeError as e:
            raise GgufloopError(f"llama.cpp could not evaluate {len(tokens)} tokens: {e}.", _SEE_LOG) from e
        self._evaluated += len(tokens)
        self._decoded = decoded

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Evaluate tokens after what is cached, as one step, and return all their logits.

        Returns float32 (n_tokens, n_vocab). Raises as `eval`.
        """
        decoded = self._begin_step(tokens)
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        rows = np.empty((len(tokens), self._n_vocab), dtype=np.float32)
        for i in range(0, len(tokens), self.n_batch):
            batch = list(tokens[i : i + self.n_batch])
            n, end = self.n_tokens, self.n_tokens + len(batch)
            self._batch.set_batch(batch=batch, n_past=n, logits_all=True)
            try:
                self._ctx.decode(self._batch)
            except RuntimeError as e:
                raise GgufloopError(f"llama.cpp could not evaluate {len(batch)} tokens: {e}.", _SEE_LOG) from e
            rows[i : i + len(batch)] = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch), self._n_vocab))
            if self._logits_all:
                self.scores[n:end] = rows[i : i + len(batch)]
            self.input_ids[n:end] = batch
            self.n_tokens = end
            self._requires_eval = False
        self._decoded = decoded
        return rows

    def _check_fits(self, n: int) -> None:
        if self.n_tokens + n > len(self.input_ids):
            raise GgufloopError(
                f"{self.n_tokens} tokens in the context and {n} more do not fit its {len(self.input_ids)}.",
                "give a larger context (-c), or shorten the text.",
            )

    def _reusable(self, tokens: Sequence[int]) -> int:
        """How many cached tokens a prompt may start from, so that what follows is what reading it anew would give.

        The common prefix; without tokens that were generated plain, for a prompt always loops; where the result
        depends on how a prompt is cut, up to the start of a step; and nothing of a cache that drops what leaves the
        sliding window, unless the prompt continues it.
        """
        n: int = self.longest_token_prefix(self._input_ids, tokens)
        if n < self.n_tokens and not self.context_params.swa_full and llama_cpp.llama_model_n_swa(self.model) > 0:
            return 0
        if self._loop is None or not self._loop.is_loop:
            return n
        n = min([n, *(step.start for step in self._steps if not step.looped)])
        if self._loop.kv in ("first", "last") and n < self.n_tokens:
            limit = min(n, len(tokens) - 1)
            n = max((step.start for step in self._steps if step.start <= limit), default=0)
        return n

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """llama_cpp's generate, timed, its first evaluation marked as the prompt.

        Raises GgufloopError if the loop or the cache is changed from outside before it ends.
        """
        reset = args[6] if len(args) > 6 else kwargs.get("reset", True)
        keep = self._reusable(tokens) if reset else self.n_tokens
        if keep < self.n_tokens:
            self._ctx.kv_cache_seq_rm(-1, keep, -1)
            self.n_tokens = keep
            self._requires_eval = True
        self._prompt_next = True
        self._timings = Timings()
        self._evaluated = 0
        inner = super().generate(tokens, *args, **kwargs)
        sent: Sequence[int] | None = None
        epoch: int | None = None
        try:
            while True:
                if epoch is not None and epoch != self._epoch:
                    raise GgufloopError(
                        "the loop or the cache was changed while an answer was being generated.",
                        "finish or close the generator first.",
                    )
                start = perf_counter()
                try:
                    token = inner.send(sent)
                except StopIteration:
                    return
                self._record(perf_counter() - start, prompt=epoch is None)
                epoch = self._epoch
                sent = yield token
        finally:
            inner.close()

    def _record(self, seconds: float, prompt: bool) -> None:
        t, n, self._evaluated = self._timings, self._evaluated, 0
        if prompt:
            self._timings = Timings(n, seconds)
        else:
            self._timings = Timings(
                t.prompt_tokens, t.prompt_seconds, t.generated_tokens + n, t.generated_seconds + seconds
            )

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """llama_cpp's prompt cache; entries made under one loop are not seen under another."""
        super().set_cache(None if cache is None else _LoopCache(cache, self))

    def _identity(self) -> tuple[int | str, ...]:
        name = self.metadata.get("general.architecture", ""), self.metadata.get("general.name", "")
        return (*name, self.n_layer(), self.n_embd(), self._n_vocab)

    def save_state(self) -> Any:
        """llama_cpp's state, with the model, the loop and the steps it was made by."""
        assert self.ctx
        state = super().save_state()
        state.model, state.loop = self._identity(), self._loop
        state.steps, state.decoded = tuple(self._steps), self._decoded
        return state

    def load_state(self, state: Any) -> None:
        """Restore a saved state.

        Raises GgufloopError if it was made by another model or under another loop, or does not fit the context;
        the cache is empty then.
        """
        self._forget()
        made_under = getattr(state, "loop", None)
        if made_under != self._loop:
            raise GgufloopError(
                f"this state was saved under the loop {made_under}, the model runs {self._loop}.",
                "set_loop to the state's loop first.",
            )
        if getattr(state, "model", self._identity()) != self._identity() or state.n_tokens > self.n_ctx():
            raise GgufloopError(
                f"this state of {state.n_tokens} tokens is of another model, or too large for {self.n_ctx()} tokens.",
                "load it into the model and context it was saved from.",
            )
        ids = self.input_ids
        try:
            super().load_state(state)
        except (RuntimeError, ValueError) as e:
            self.input_ids = ids
            self._forget()
            raise GgufloopError(f"llama.cpp could not restore this state: {e}.", _SEE_LOG) from e
        ids[: self.n_tokens] = self.input_ids[: self.n_tokens]
        self.input_ids = ids
        self._steps = list(getattr(state, "steps", (_Step(0, True),)))
        self._decoded = getattr(state, "decoded", 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "loop": self._loop}


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise UsageError for settings llama.cpp would answer with an assert or a crash."""
    for name, least in (("n_ctx", 0), ("n_batch", 1), ("n_ubatch", 1)):
        value = settings.get(name, least)
        if value < least:
            raise UsageError(f"{name} {value} is less than {least}.", f"give {least} or more.")
    for name in ("type_k", "type_v"):
        value = settings.get(name)
        if value is not None and value not in _KV_TYPES:
            known = ", ".join(f"{n} ({number})" for number, n in _KV_TYPES.items())
            raise UsageError(f"{name} {value} is not a type a K/V cache can have.", f"known: {known}.")
    quantised_v = _KV_TYPES.get(settings.get("type_v") or 0, "f32") not in ("f32", "f16", "bf16")
    if quantised_v and not settings.get("flash_attn", False):
        raise UsageError("a quantised V cache needs flash attention.", "switch it on: flash_attn=True (-fa on).")
