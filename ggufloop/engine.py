"""`LoopedLlama`: llama_cpp.Llama with a window of its layers looped. It imports llama_cpp, few others do.

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
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.backend import capi, library, memory
from ggufloop.backend.batches import IN_STEP, Batched
from ggufloop.backend.chatting import Chatted
from ggufloop.backend.devices import Placed, Placement
from ggufloop.backend.llama_log import LlamaLog
from ggufloop.backend.prompt_cache import LoopCache
from ggufloop.backend.settings import check_settings, drawn
from ggufloop.backend.tracing import Traced
from ggufloop.errors import BackendError, Closed, GgufloopError, UsageError
from ggufloop.interrupts import Held
from ggufloop.logits import entropy
from ggufloop.loop import LoopSpec, as_loop
from ggufloop.models.architectures import check_loop
from ggufloop.models.gguf import check_model_file, read_header
from ggufloop.models.template import lazily_compiled
from ggufloop.records import Timings

ACTIVE = library.activate()

import llama_cpp as llama_cpp  # noqa: E402  # the library it loads is chosen by activate(); re-exported
from llama_cpp import llama_chat_format  # noqa: E402  # as above
from llama_cpp._logger import logger  # noqa: E402  # as above
from llama_cpp.llama_cache import BaseLlamaCache  # noqa: E402  # as above
from llama_cpp.llama_tokenizer import LlamaTokenizer  # noqa: E402  # as above

_log = LlamaLog(shown=lambda: logger.level <= logging.DEBUG)  # llama_cpp's own is one off in the levels
_log_callback = llama_cpp.llama_log_callback(_log)
llama_cpp.llama_log_set(_log_callback, None)

_SEE_LOG = "run with -v (verbose=True) to see llama.cpp's own log."
_lib = None if ACTIVE.stock else capi.declare(llama_cpp.llama_cpp._lib)


llama_chat_format.Jinja2ChatFormatter = lazily_compiled(llama_chat_format.Jinja2ChatFormatter)

Take = Callable[[int, NDArray[np.float32]], None]


def _token_list(tokens: Any) -> Sequence[int]:
    """Tokens as a sequence, from an array of any library too. Raises UsageError for text and for other arrays."""
    if isinstance(tokens, (str, bytes)):
        raise UsageError("this is text, and what is evaluated are tokens.", "llm.tokenize(text.encode()) makes them.")
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UsageError("this array is no row of whole numbers, as tokens are.", "give one text's, 1-dimensional.")
    found: Sequence[int] = tokens
    return found


@dataclass(frozen=True)
class _Step:
    """One evaluation: the position it began at, the loop in force, and whether the decode policy let it loop."""

    start: int
    loop: LoopSpec | None
    looped: bool


class LoopedLlama(Placed, Chatted, llama_cpp.Llama, Batched, Traced):  # type: ignore[misc]  # llama_cpp is untyped here
    """A llama.cpp model, looped.

    model_path: a GGUF file. loop: what to loop (`as_loop`), None for the plain model. rpc_servers, device: where it is
    computed (devices.Placement). n_seq: how many sequences its cache holds apart (backend.batches). repack: as in
    backend.settings. verbose: show llama.cpp's own log. Every other argument is llama_cpp.Llama's.

    With kv first and last, and with halt, what a prompt computes depends on how it was cut, so the same prompt is read
    again as it was read before instead of from the middle.

    Raises GgufloopError for a file that is no usable model, UsageError for a loop or setting it cannot run.
    """

    n_tokens: int
    input_ids: NDArray[np.intc]
    _model: Any = Closed()
    _ctx: Any = _model
    _batch: Any = _model
    tokenizer_: Any = _model

    def __init__(
        self, model_path: str | Path, *args: Any, loop: LoopSpec | str | Mapping[str, Any] | None = None,
        n_seq: int = 1, repack: bool = True, verbose: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._repack = repack
        self._loop: LoopSpec | None = None
        self._steps: list[_Step] = []  # what filled the cache
        self._prompt_next = False  # the next eval is the prompt of generate(), whatever its length
        self._decoded = 0  # generated tokens since the last prompt
        self._timings = Timings()
        self._evaluated = 0
        self._epoch = 0  # changes when a running generator loses its footing
        check_model_file(Path(model_path))
        check_settings(kwargs, read_header(Path(model_path)).text("general.architecture") or "unknown")
        self._n_seq = min(n_seq, IN_STEP) if read_header(Path(model_path)).keeps_state else n_seq
        self._placement = Placement.take(kwargs, ACTIVE.directory, Path(model_path))
        self._load(model_path, *args, verbose=verbose, **kwargs)
        self.set_seed(kwargs.get("seed", -1))  # llama_cpp takes 0 for none
        self._plain_memory = self.memory_bytes()
        if len(self.input_ids) < self.n_ctx():  # llama.cpp rounds the context up; llama_cpp's arrays do not
            self.input_ids = np.zeros(self.n_ctx(), dtype=np.intc)
            if self._logits_all:
                self.scores = np.empty((self.n_ctx(), self._n_vocab), dtype=np.single)
        try:
            self.set_loop(loop)
        except BaseException:
            self.close()
            raise

    def _load(self, model_path: str | Path, *args: Any, **kwargs: Any) -> None:
        _log.clear()
        with Held() as self._interrupted:
            try:
                super().__init__(str(model_path), *args, **kwargs)
            except (ValueError, RuntimeError, MemoryError) as e:
                reason = _log.reason or str(e).rstrip(".")
                hint = self._placement.hint(reason)
                raise GgufloopError(f"llama.cpp cannot use {model_path}: {reason}.", hint) from None

    def _prepare(self, params: Any) -> None:
        """A model that is being loaded is given up when Ctrl-C is pressed."""
        params.use_extra_bufts = self._repack
        interrupted = self._interrupted  # no reference to self: params would keep it alive
        params.progress_callback = llama_cpp.llama_progress_callback(lambda share, user_data: not interrupted())

    @property
    def context_params(self) -> Any:
        """llama.cpp's parameters of the context."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        """llama_cpp begins with llama.cpp's defaults and sets what it knows of."""
        if self._n_seq > 1:
            params.n_seq_max, params.kv_unified = self._n_seq, True
        self._context_params = params

    def close(self) -> None:
        """Free the model; nothing to do if it never loaded. Whatever needs it raises GgufloopError from then on."""
        if hasattr(self, "_stack"):
            super().close()
            self._placement.release()
        for name in ("_model", "_ctx", "_batch", "tokenizer_"):
            self.__dict__.pop(name, None)

    def set_seed(self, seed: int | None) -> None:
        """Draw tokens from this seed; none, -1 or llama.cpp's mark for none draws one, which llama_cpp does not."""
        super().set_seed(drawn(seed))

    @property
    def loop(self) -> LoopSpec | None:
        """The loop in force, None for the plain model."""
        return self._loop

    def is_eog(self, token: int) -> bool:
        """Whether a token ends an answer: end of text, of turn, or of message."""
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """llama_cpp's. Raises GgufloopError for a model that has no tokenizer or is closed: llama.cpp would abort."""
        assert self.ctx
        if llama_cpp.llama_vocab_type(self._model.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise GgufloopError(
                f"{self.model_path} has no tokenizer: it takes tokens, no text.", "get a file that has one."
            )
        return list(super().tokenize(text, add_bos, special))

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

    def model_type(self) -> str:
        """Architecture, size class and quantisation as llama.cpp words them: 'llama 256M Q4_1'."""
        return str(self._model.desc())

    def _loops(self) -> ctypes.CDLL | None:
        """The library's loop interface, None for the stock library."""
        return _lib

    def synchronize(self) -> None:
        """Wait until everything evaluated is computed; a GPU still computes when `eval` returns."""
        llama_cpp.llama_synchronize(self.ctx)

    def memory_bytes(self) -> int:
        """Bytes of K/V cache the context holds, the slots of kv='each' included."""
        return int(_lib.llama_loop_memory_size(self.ctx)) if _lib else 0

    def timings(self) -> Timings:
        """How long the last completion took; complete once its generator is used up or closed."""
        return self._timings

    def set_loop(self, loop: LoopSpec | str | Mapping[str, Any] | None, keep_cache: bool = False) -> None:
        """Loop from now on as `loop` says (`as_loop`); None for the plain model.

        What the cache holds depends on the loop, so any change clears it, unless keep_cache: then tokens keep the
        K/V they were evaluated with, and the depth may change from token to token. That needs kv first, last or
        frozen, before and after; kv each has another number of slots for another number of passes.
        Raises UsageError for a window or model that cannot loop, and then the loop that was in force stays.
        """
        loop = as_loop(loop)
        assert self.ctx
        if loop == self._loop:
            return
        if loop is not None:
            self.check(loop)
        if _lib is None:
            raise BackendError("the stock llama.cpp has no loops.", "run without --stock.")
        if keep_cache:
            for spec in (self._loop, loop):
                if spec is not None and spec.is_loop and spec.kv == "each":
                    raise UsageError(
                        f"the loop {spec} cannot keep the cache: kv each has a slot for every pass.",
                        "use kv first, last or frozen, or let the cache be cleared.",
                    )
        try:
            self._install(loop)
        except capi.Refused as e:
            if e.lost:
                self._forget()
            if e.plain:
                self._loop = None
            raise
        self._loop = loop
        if not keep_cache:
            self._forget()

    def _forget(self) -> None:
        """Empty the cache."""
        self._ctx.kv_cache_clear()
        self.reset()
        self._decoded = 0

    def reset(self) -> None:
        """Start over: what is evaluated next is the first token."""
        super().reset()
        self._epoch += 1

    def check(self, loop: LoopSpec) -> None:
        """Raise UsageError unless this model, as it was opened, can run `loop`."""
        arch = self.metadata.get("general.architecture", "unknown")
        check_loop(arch, loop, self.n_layer(), read_header(Path(self.model_path)).metadata)
        if self.context_params.embeddings:
            raise UsageError("embeddings cannot be looped.", "leave out the loop, or embedding=True.")
        if self.draft_model is not None and (loop.depends_on_cuts or loop.decode != "full"):
            what = f"kv {loop.kv}, decode {loop.decode}" + (f", halt {loop.halt:g}" if loop.halt is not None else "")
            raise UsageError(
                f"a draft model needs kv each or frozen and decode full, without halt, not {what}.",
                "its tokens are checked several at once, which is exact only there.",
            )
        if self._keeps_state and loop.decode_entropy() is not None:
            raise UsageError(
                f"decode {loop.decode} evaluates tokens twice, and this model's recurrent state cannot go back.",
                "use decode full, bypass or first:n.",
            )
        if _lib is not None and any(_lib.llama_loop_is_recurrent(self.ctx, il) for il in range(*loop.window)):
            loop.check_recurrent()

    @property
    def _keeps_state(self) -> bool:
        """Whether some layer is recurrent: then the cache can only grow or be emptied."""
        return bool(self._is_recurrent or self._is_hybrid)

    @property
    def in_step(self) -> bool:
        """Whether llama.cpp cuts a batch where its shortest sequence ends, for recurrent states advance together."""
        return self._keeps_state

    @property
    def can_rewind(self) -> bool:
        """Whether n_tokens may be set back: nothing is recurrent or drops what leaves a sliding window."""
        slides = not self.context_params.swa_full and llama_cpp.llama_model_n_swa(self.model) > 0
        return not (slides or self._keeps_state)

    def _install(self, loop: LoopSpec | None) -> None:
        """Give the context the plan of `loop`. Raises capi.Refused; then the context is as it was."""
        assert _lib is not None
        if loop is not None and not self.devices:
            layers = [self._plain_memory // self.n_layer()] * self.n_layer()
            memory.check_slots(loop.extra_kv_bytes(layers), str(loop))
        with Held():
            capi.install(_lib, self.ctx, loop)

    def skipped_evaluations(self) -> int:
        """Evaluations of the window (in layer mode, of a layer) that halt saved since the loop was set."""
        return int(_lib.llama_loop_skipped(self.ctx)) if _lib else 0

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
        if self._ctx.memory is None and self.n_tokens > 0 and tokens:
            raise UsageError(
                f"this model has no cache: {len(tokens)} tokens cannot follow the {self.n_tokens} before them.",
                "call reset() and evaluate the whole text at once.",
            )
        while self._steps and self._steps[-1].start >= self.n_tokens:
            self._steps.pop()
        if tokens:
            self._steps.append(_Step(self.n_tokens, self._loop, looped))
        return decoded

    def eval(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        """Evaluate tokens after what is cached, as one step.

        Raises UsageError for text and for a token outside the vocabulary, GgufloopError if they do not fit the context.
        """
        self._step(_token_list(tokens), self._eval_step)

    def logits(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Evaluate tokens after what is cached, as one step, and return all their logits.

        Returns float32 (n_tokens, n_vocab). Raises as `eval`.
        """
        tokens = _token_list(tokens)
        rows = np.empty((len(tokens), self._n_vocab), dtype=np.float32)
        self.each_logits(tokens, 0, lambda i, part: np.copyto(rows[i : i + len(part)], part))
        return rows

    def each_logits(self, tokens: Sequence[int], first: int, take: Take, prompt: bool = False) -> None:
        """Evaluate tokens after what is cached, as one step; take(i, rows) gets the logits of tokens[first:], in parts.

        rows: float32 (n, n_vocab), llama.cpp's own memory, good until take returns; i: index of its first token.
        prompt: no decode step, even if it is one token. Raises as `eval`.
        """
        self._prompt_next = prompt
        self._step(tokens, lambda tokens: self._logits_step(tokens, first, take))

    def adds_tokens(self) -> tuple[bool, bool]:
        """Whether this model's tokenizer puts a token before a text (BOS), and one behind it (EOS)."""
        vocab = self._model.vocab
        return bool(llama_cpp.llama_vocab_get_add_bos(vocab)), bool(llama_cpp.llama_vocab_get_add_eos(vocab))

    def _step(self, tokens: Sequence[int], evaluate: Callable[[Sequence[int]], None]) -> None:
        decoded = self._begin_step(tokens)
        evaluate(tokens)
        limit = self._loop.decode_entropy() if self._loop is not None and self._loop.is_loop else None
        if limit is not None and decoded > 0 and self._entropy() > limit:
            assert _lib is not None
            self.n_tokens -= 1  # the next evaluation takes the place of this one
            _lib.llama_loop_enable(self.ctx, True)
            self._steps[-1] = _Step(self.n_tokens, self._loop, True)
            evaluated = self._evaluated  # tokens, however often they are evaluated
            evaluate(tokens)
            self._evaluated = evaluated
        self._decoded = decoded

    def _entropy(self) -> float:
        """Entropy in nats of the distribution after the last token evaluated, which was evaluated alone."""
        return entropy(np.ctypeslib.as_array(self._ctx.get_logits(), shape=(self._n_vocab,)))

    def _eval_step(self, tokens: Sequence[int]) -> None:
        if self._ctx.memory is None:
            self._logits_step(tokens, 0, lambda i, rows: None)
            return
        self._evaluate(len(tokens), partial(super().eval, tokens))
        self._evaluated += len(tokens)
        if tokens and not self.context_params.embeddings:
            rows = (len(tokens) - 1) % self.n_batch + 1 if self._logits_all else 1  # of the last batch
            self._check_finite(np.ctypeslib.as_array(self._ctx.get_logits(), shape=(rows, self._n_vocab)))

    def _evaluate(self, n: int, decode: Callable[[], object]) -> None:
        """Let llama.cpp evaluate n tokens. Raises GgufloopError with its reason."""
        _log.clear()
        with Held():
            try:
                decode()
            except RuntimeError as e:
                reason = _log.reason or str(e)
                raise GgufloopError(f"llama.cpp could not evaluate {n} tokens: {reason}.", _SEE_LOG) from e

    def _check_finite(self, rows: NDArray[np.float32]) -> None:
        """Raise GgufloopError if a row of logits has no finite largest entry: what follows would be noise."""
        if np.isfinite(rows.max(axis=1)).all():
            return
        self._forget()
        if self._loop is None or not self._loop.is_loop:
            raise GgufloopError(
                f"{self.model_path} computes logits that are not finite: its weights are damaged, or overflow.",
                "get it from another source, or convert or quantise it again.",
            )
        raise GgufloopError(
            f"under the loop {self._loop}, {self.model_path} computes logits that are not finite.",
            "try without the loop: either the file is damaged, or it wants fewer passes or a damped solver.",
        )

    def _logits_step(self, tokens: Sequence[int], first: int, take: Take) -> None:
        n_batch = self.n_batch
        if self._ctx.memory is not None:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        elif len(tokens) > min(n_batch, self.context_params.n_ubatch):
            raise UsageError(
                f"this model has no cache: {len(tokens)} tokens do not fit a batch of "
                f"{min(n_batch, self.context_params.n_ubatch)}.",
                "give larger batches: -b and -ub (n_batch and n_ubatch).",
            )
        for i in range(0, len(tokens), n_batch):
            batch = list(tokens[i : i + n_batch])
            n, end = self.n_tokens, self.n_tokens + len(batch)
            self._batch.set_batch(batch=batch, n_past=n, logits_all=True)
            skipped = min(max(first - i, 0), len(batch))
            for j in range(skipped):
                self._batch.batch.logits[j] = False
            self._evaluate(len(batch), lambda: self._ctx.decode(self._batch))
            self.input_ids[n:end] = batch
            self.n_tokens = end
            self._requires_eval = False
            if skipped < len(batch):
                rows = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch) - skipped, self._n_vocab))
                self._check_finite(rows)
                if self._logits_all:
                    self.scores[n + skipped : end] = rows
                take(i + skipped, rows)

    def _check_fits(self, n: int) -> None:
        if self.n_tokens + n > len(self.input_ids):
            raise GgufloopError(
                f"{self.n_tokens} tokens in the context and {n} more do not fit its {len(self.input_ids)}.",
                "give a larger context (-c), or shorten the text.",
            )

    def _reusable(self, tokens: Sequence[int]) -> int:
        """How many cached tokens a prompt may start from, so that what follows is what reading it anew would give.

        The common prefix; without tokens evaluated under another loop, or generated plain, for a prompt always
        loops; where the result depends on how a prompt is cut, up to the start of a step; and nothing of a cache that
        drops what leaves the sliding window, or of recurrent state, unless the prompt continues it.
        """
        n: int = self.longest_token_prefix(self._input_ids, tokens)
        if n < self.n_tokens and not self.can_rewind:
            return 0
        n = min([n, *(step.start for step in self._steps if step.loop != self._loop)])
        if self._loop is None or not self._loop.is_loop:
            return n
        n = min([n, *(step.start for step in self._steps if not step.looped)])
        if self._loop.depends_on_cuts and n < self.n_tokens:
            limit = min(n, len(tokens) - 1)
            n = max((step.start for step in self._steps if step.start <= limit), default=0)
        return n

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """llama_cpp's generate, timed, its first evaluation marked as the prompt.

        Raises GgufloopError if the loop or the cache is changed from outside before it ends.
        """
        reset = args[6] if len(args) > 6 else kwargs.get("reset", True)
        keep = self._reusable(tokens) if reset else self.n_tokens
        if keep < self.n_tokens and self._ctx.memory is not None:
            if not self._ctx.kv_cache_seq_rm(-1, keep, -1):
                keep = 0
                self._ctx.kv_cache_clear()
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
        super().set_cache(None if cache is None else LoopCache(cache, self))

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
        self._steps = list(getattr(state, "steps", (_Step(0, self._loop, True),)))
        self._decoded = getattr(state, "decoded", 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._placement.state(), "loop": self._loop, "n_seq": self._n_seq,
                "repack": self._repack}  # fmt: skip
