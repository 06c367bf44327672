"""What a model thinks of a given text: log-probabilities of its tokens, without ever holding the logits of all of them.

    scores = score(llm, tokens)                     # of tokens[1:], each given all before it
    scores = score(llm, tokens, first=256)          # of tokens[257:]; no logits are computed before them
    plain, looped = score_under(llm, (None, loop), tokens)           # the same tokens, paired

A batch's logits are read where llama.cpp left them and reduced to a few numbers per token before the next batch
overwrites them, so memory does not grow with the text. Arithmetic is llama-perplexity's: float32 logits and
exponentials, sums and logarithm in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec

Logits = NDArray[np.float32]


class Engine(Protocol):
    """What scoring asks of a LoopedLlama."""

    @property
    def loop(self) -> LoopSpec | None: ...
    def set_loop(self, loop: LoopSpec | str | None, keep_cache: bool = False) -> None: ...
    def reset(self) -> None: ...
    def each_logits(self, tokens: Sequence[int], first: int, take: Callable[[int, Logits], None]) -> None: ...


@dataclass(frozen=True)
class Scores:
    """One entry per scored token.

    logprob  float64, natural logarithm of the probability the model gave it.
    top      whether it was the likeliest (the first of several equally likely).
    """

    logprob: NDArray[np.float64]
    top: NDArray[np.bool_]

    @property
    def nll(self) -> NDArray[np.float64]:
        """Negative log-likelihood in nats per token."""
        return -self.logprob


class Normalisers(NamedTuple):
    """Of rows of logits: logit - top - log_sum is a log-probability."""

    tops: NDArray[np.float32]
    log_sums: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Logits) -> Normalisers:
        """The largest logit of each row, and the logarithm of the sum of exp(logit - largest)."""
        tops = np.empty(len(rows), dtype=np.float32)
        sums = np.empty(len(rows), dtype=np.float64)
        scratch = np.empty(rows.shape[-1], dtype=np.float32)  # one row stays in the CPU's cache, a batch does not
        for i, row in enumerate(rows):
            tops[i] = row.max()
            np.subtract(row, tops[i], out=scratch)
            np.exp(scratch, out=scratch)
            sums[i] = scratch.sum(dtype=np.float64)
        return cls(tops, np.log(sums))

    @classmethod
    def as_in_c(cls, rows: Logits) -> Normalisers:
        """The same to the last bit of a C program: numpy's float32 exp is off by an ulp or two, C's expf is not."""
        tops = rows.max(axis=1)
        sums = np.empty(len(rows), dtype=np.float64)
        for i, row in enumerate(rows):
            sums[i] = np.exp((row - tops[i]).astype(np.float64)).astype(np.float32).sum(dtype=np.float64)
        return cls(tops, np.log(sums))


def log_probabilities(rows: Logits, targets: NDArray[np.intp], norms: Normalisers | None = None) -> Scores:
    """Score token targets[i] under the logits rows[i]. norms: of these rows, if they are known already."""
    tops, log_sums = norms or Normalisers.of(rows)
    chosen = rows[np.arange(len(rows)), targets]
    return Scores((chosen - tops).astype(np.float64) - log_sums, rows.argmax(axis=1) == targets)


def entropy(row: Logits) -> float:
    """Entropy in nats of the distribution of one row of logits."""
    row = np.maximum(row - row.max(), -1e4)  # finite, for p log p is 0 where p is
    p = np.exp(row)
    total = p.sum(dtype=np.float64)
    return float(np.log(total) - np.dot(p, row) / total)


def each_target(
    llm: Engine, tokens: Sequence[int], first: int, take: Callable[[slice, Logits, NDArray[np.intp]], None]
) -> None:
    """Evaluate tokens on an empty cache; take(part, rows, targets) gets what predicts tokens[first + 1:], in parts.

    part: the place of these rows among all of them. The last token's logits predict nothing and are left out.
    Raises UsageError if no token is left to score, and what the engine raises.
    """
    if not 0 <= first < len(tokens) - 1:
        raise UsageError(
            f"{len(tokens)} tokens hold none to score after token {first}.", "score a text of two tokens at least."
        )
    ids = np.asarray(tokens, dtype=np.intp)

    def batch(i: int, rows: Logits) -> None:
        rows = rows[: len(tokens) - 1 - i]
        if len(rows):
            take(slice(i - first, i - first + len(rows)), rows, ids[i + 1 : i + 1 + len(rows)])

    llm.reset()
    llm.each_logits(tokens, first, batch)


def score(llm: Engine, tokens: Sequence[int], first: int = 0) -> Scores:
    """Score tokens[first + 1:], each given all tokens before it, on an empty cache under the loop in force.

    Raises UsageError if there is nothing to score, GgufloopError if the tokens do not fit the context.
    """
    n = max(len(tokens) - 1 - first, 0)
    logprob, top = np.empty(n, dtype=np.float64), np.empty(n, dtype=np.bool_)

    def take(part: slice, rows: Logits, targets: NDArray[np.intp]) -> None:
        scores = log_probabilities(rows, targets)
        logprob[part], top[part] = scores.logprob, scores.top

    each_target(llm, tokens, first, take)
    return Scores(logprob, top)


def score_under(
    llm: Engine, loops: Sequence[LoopSpec | str | None], tokens: Sequence[int], first: int = 0
) -> Iterator[Scores]:
    """`score` under one loop after the other, None for the plain model; the loop in force is the old one afterwards."""
    before = llm.loop
    try:
        for loop in loops:
            llm.set_loop(loop)
            yield score(llm, tokens, first)
    finally:
        llm.set_loop(before)
