"""Scoring the answers a question offers: the log-probability of each continuation of one prompt.

    for choice in score_choices(llm, prompt, [answer_a, answer_b]):      # all of them tokens
        choice.logprob, choice.greedy

The prompt is one step, read once for all its continuations; a continuation is a second step on top of it. That cut is
part of the definition wherever the result of a loop depends on cuts (kv first and last, halt): a continuation sees
the prompt's K/V as the cache keeps it, as an answer being generated would. It is the same for the plain model, for
every loop and for every continuation of a prompt, however many tokens it has; and because a continuation is part of
what is asked, it loops like a prompt, whatever the decode policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ggufloop.errors import UsageError
from ggufloop.logits import Logits, Scores, log_probabilities


class ChoiceEngine(Protocol):
    """What scoring choices asks of a LoopedLlama."""

    n_tokens: int

    @property
    def can_rewind(self) -> bool: ...
    def reset(self) -> None: ...
    def each_logits(
        self, tokens: Sequence[int], first: int, take: Callable[[int, Logits], None], prompt: bool = False
    ) -> None: ...


@dataclass(frozen=True)
class ScoredChoice:
    """One continuation. logprob: of all its tokens, in nats. greedy: whether each of them was the likeliest."""

    logprob: float
    greedy: bool


def score_choices(llm: ChoiceEngine, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[ScoredChoice]:
    """The log-probability of each continuation of `prompt`, under the loop in force. What is cached is lost.

    Where the cache cannot go back (recurrent layers) the prompt is read again for each, which gives the same.
    Raises UsageError for an empty prompt or continuation, GgufloopError if one does not fit the context.
    """
    if not prompt or not all(choices):
        what = "the prompt" if not prompt else f"choice {[len(c) for c in choices].index(0)}"
        raise UsageError(f"{what} has no tokens.", "score a continuation of one token at least after one at least.")
    row = _read(llm, prompt)
    first = log_probabilities(np.repeat(row, len(choices), 0), np.array([c[0] for c in choices], dtype=np.intp))
    scored = []
    for i, choice in enumerate(choices):
        logprob, greedy = float(first.logprob[i]), bool(first.top[i])
        if len(choice) > 1:
            rest = _continue(llm, prompt, choice)
            logprob, greedy = logprob + float(rest.logprob.sum()), greedy and bool(rest.top.all())
        scored.append(ScoredChoice(logprob, greedy))
    return scored


def _read(llm: ChoiceEngine, prompt: Sequence[int]) -> Logits:
    """Evaluate the prompt on an empty cache; its last row of logits, (1, n_vocab)."""
    rows: list[Logits] = []
    llm.reset()
    llm.each_logits(prompt, len(prompt) - 1, lambda i, part: rows.append(part.copy()), prompt=True)
    return rows[0]


def _continue(llm: ChoiceEngine, prompt: Sequence[int], choice: Sequence[int]) -> Scores:
    """Scores of choice[1:] after the prompt, which has been read."""
    if llm.can_rewind:
        llm.n_tokens = len(prompt)
    elif llm.n_tokens != len(prompt):
        _read(llm, prompt)
    return score_step(llm, choice[:-1], choice[1:])


def score_step(llm: ChoiceEngine, tokens: Sequence[int], targets: Sequence[int]) -> Scores:
    """Evaluate tokens after what is cached, as one step of a prompt, and score targets under their last rows."""
    ids, first = np.asarray(targets, dtype=np.intp), len(tokens) - len(targets)
    logprob, top = np.empty(len(ids), dtype=np.float64), np.empty(len(ids), dtype=np.bool_)

    def take(i: int, rows: Logits) -> None:
        part = slice(i - first, i - first + len(rows))
        scores = log_probabilities(rows, ids[part])
        logprob[part], top[part] = scores.logprob, scores.top

    llm.each_logits(tokens, first, take, prompt=True)
    return Scores(logprob, top)
