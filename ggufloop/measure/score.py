"""What a model thinks of a given text: log-probabilities of its tokens, without ever holding the logits of all of them.

    scores = score(llm, tokens)                     # of tokens[1:], each given all before it
    scores = score(llm, tokens, first=256)          # of tokens[257:]; no logits are computed before them

A batch's logits are read where llama.cpp left them and reduced to a few numbers per token before the next batch
overwrites them, so memory does not grow with the text. Arithmetic is llama-perplexity's: float32 logits and
exponentials, sums and logarithm in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import UsageError
from ggufloop.logits import Logits, Scores, log_probabilities
from ggufloop.loop import LoopSpec


class Engine(Protocol):
    """What scoring asks of a LoopedLlama."""

    @property
    def loop(self) -> LoopSpec | None: ...
    def set_loop(self, loop: LoopSpec | str | None, keep_cache: bool = False) -> None: ...
    def reset(self) -> None: ...
    def each_logits(self, tokens: Sequence[int], first: int, take: Callable[[int, Logits], None]) -> None: ...


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
