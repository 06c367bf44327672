"""Generate one answer from prompt tokens, streaming whole characters to a callback; prints nothing.

    answer = complete(llm, llm.tokenize(b"The sky is"), Sampling(temp=0.0, n=16), emit=print)
    answer.text, answer.finish, answer.timings

Prompts go to `generate` as tokens instead of through `create_chat_completion`: a conversation has to know how long
its prompt is to leave out the oldest turns, comparing two answers needs their tokens, and a character whose bytes
are spread over several tokens must come out whole wherever the answer ends.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import LoopSpec
from ggufloop.records import Timings

Emit = Callable[[str], object]
Stopped = Callable[[], bool]


class Interrupted(Exception):
    """Raise it (from a signal handler) to give up an answer whose prompt is still being read."""


class Tokenizer(Protocol):
    """What tells a text's tokens."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...
    def token_bos(self) -> int: ...
    def adds_tokens(self) -> tuple[bool, bool]: ...


class TextGenerator(Tokenizer, Protocol):
    """What is used of `engine.LoopedLlama`."""

    @property
    def loop(self) -> LoopSpec | None: ...
    def set_loop(self, loop: LoopSpec | None) -> None: ...
    def n_ctx(self) -> int: ...
    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes: ...
    def is_eog(self, token: int) -> bool: ...
    def generate(
        self, tokens: Sequence[int], *, top_k: int, top_p: float, min_p: float, temp: float, repeat_penalty: float
    ) -> Generator[int, Sequence[int] | None, None]: ...
    def set_seed(self, seed: int) -> None: ...
    def reset(self) -> None: ...
    def timings(self) -> Timings: ...


@dataclass(frozen=True)
class Answer:
    """One generated text.

    tokens   ids, the end-of-turn token not included.
    finish   'stop': the model ended it; 'length': `n` tokens; 'context': the context is full; 'interrupted'.
    loop     the loop it was generated with.
    timings  of this answer: tokens evaluated and generated, and their seconds.
    context  tokens of the context in use at its end.
    dropped  oldest turns newly left out of the prompt to make room.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    loop: LoopSpec | None
    timings: Timings
    context: int
    dropped: int = 0


@dataclass(frozen=True)
class Totals:
    """Sums over answers: how many, their tokens, and what was evaluated in how many seconds.

    `generated_tokens` are evaluations, one fewer per answer than `tokens` where the last token needed none.
    """

    answers: int
    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    generated_tokens: int
    generated_seconds: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Totals:
        """The sums over `answers`."""
        timings = [answer.timings for answer in answers]
        return cls(
            len(answers),
            sum(t.prompt_tokens for t in timings),
            sum(t.prompt_seconds for t in timings),
            sum(len(answer.tokens) for answer in answers),
            sum(t.generated_tokens for t in timings),
            sum(t.generated_seconds for t in timings),
        )


class StreamedText:
    """Whole characters out of bytes, up to the first stop string; what may be the start of one is held back."""

    def __init__(self, stop: tuple[str, ...], emit: Emit, strip: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._emit, self._strip = stop, emit, strip
        self._held = ""
        self.value = ""

    def _put(self, text: str) -> None:
        if self._strip and not self.value:
            text = text.lstrip()
        if text:
            self.value += text
            self._emit(text)

    def feed(self, piece: bytes) -> bool:
        """Take the bytes of one token; True when a stop string is reached."""
        self._held += self._decoder.decode(piece)
        ends = [i for i in (self._held.find(s) for s in self._stop) if i >= 0]
        if ends:
            self._put(self._held[: min(ends)])
            self._held = ""
            return True
        keep = max((n for s in self._stop for n in range(len(s)) if self._held.endswith(s[:n])), default=0)
        cut = len(self._held) - keep
        self._put(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def close(self) -> None:
        """Let go what was held back; bytes that never became a character are dropped."""
        self._put(self._held)
        self._held = ""


def encode(text: str, what: str) -> bytes:
    """The UTF-8 bytes of `text`. Raises UsageError if it holds what no UTF-8 text can (undecodable input)."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not UTF-8 text.", "convert it, for example with iconv -t UTF-8.") from None


def prompt_tokens(model: Tokenizer, text: str, what: str = "the prompt") -> list[int]:
    """The tokens of a text, BOS first where the model's tokenizer adds it, and once where the text begins with it too.

    Chat templates write BOS, and so do people who know their model. Raises UsageError as `encode`.
    """
    tokens = model.tokenize(encode(text, what), add_bos=True, special=True)
    return tokens[1:] if model.adds_tokens()[0] and tokens[:2] == [model.token_bos()] * 2 else tokens


def complete(
    model: TextGenerator,
    prompt: list[int],
    sampling: Sampling,
    *,
    stop: tuple[str, ...] = (),
    strip: bool = False,
    emit: Emit = lambda text: None,
    stopped: Stopped = lambda: False,
) -> Answer:
    """Generate after `prompt`, at least one token and fewer than the context holds.

    stop: strings that end the answer. strip: leave out white space at its start. emit: called with each piece of
    text as soon as it is certain. stopped: asked after every token; True ends the answer there.
    Raises GgufloopError if the prompt does not fit. If anything is raised on the way the cache is emptied.
    """
    n_ctx = model.n_ctx()
    if len(prompt) >= n_ctx:
        raise GgufloopError(
            f"the prompt has {len(prompt)} tokens, and the context holds {n_ctx}.",
            "give a larger context with -c, or a shorter prompt.",
        )
    room = n_ctx - len(prompt)
    limit = room if sampling.n == -1 else min(sampling.n, room)
    text = StreamedText(stop, emit, strip)
    tokens: list[int] = []
    finish = "stop"
    model.set_seed(sampling.seed)
    stream = model.generate(
        prompt,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        temp=sampling.temp,
        repeat_penalty=sampling.repeat_penalty,
    )
    try:
        with contextlib.closing(stream):
            for token in stream:
                if model.is_eog(token):
                    break
                tokens.append(token)
                if text.feed(model.detokenize([token])):
                    break
                if len(tokens) == limit:
                    finish = "length" if limit == sampling.n else "context"
                    break
                if stopped():
                    finish = "interrupted"
                    break
    except BaseException:  # how far the evaluation came is unknown
        model.reset()
        raise
    text.close()
    return Answer(text.value, tuple(tokens), finish, model.loop, model.timings(), len(prompt) + len(tokens))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The index of the first token in which two answers differ, the shorter one's end included; None if equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)
