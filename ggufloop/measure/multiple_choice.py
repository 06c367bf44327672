"""Scoring the answers that questions offer: the log-probability of each continuation of each prompt.

    for i, choices in score_questions(llm, [ChoiceQuestion(prompt, [answer_a, answer_b]), ...]):     # all of it tokens
        choices[0].logprob, choices[0].greedy                                                        # of question i

A prompt is one step, read once for all its continuations; a continuation is a second step on top of it. That cut is
part of the definition wherever the result of a loop depends on cuts (kv first and last, halt): a continuation sees
the prompt's K/V as the cache keeps it, as an answer being generated would. It is the same for the plain model, for
every loop and for every continuation of a prompt, however many tokens it has; and because a continuation is part of
what is asked, it loops like a prompt, whatever the decode policy.

Questions are packed, or short ones would cost many times what their tokens do: as many prompts as one computation
holds are read as sequences of it, then their continuations, each as a sequence that begins as its prompt's. Nothing
that fits is cut, so the others in a batch change a score by rounding alone. Halting loops look at all tokens of a batch
and recurrent states advance in step, so there a batch is one sequence. What many prompts begin with, as examples before
a question, is read once and shared where the loop does not depend on cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Protocol

import numpy as np

from ggufloop.backend.batches import Part, TakeRows
from ggufloop.errors import UsageError
from ggufloop.logits import Logits, Normalisers, log_probabilities
from ggufloop.loop import LoopSpec

SEQUENCES = 128
"""How many sequences to open a model with that is to answer questions: `LoopedLlama(..., n_seq=SEQUENCES)`."""
SHARED = 32
"""Tokens that prompts must have in common before they are read apart from the rest."""


class ChoiceEngine(Protocol):
    """What scoring choices asks of a LoopedLlama."""

    n_batch: int

    @property
    def loop(self) -> LoopSpec | None: ...
    @property
    def n_seq(self) -> int: ...
    @property
    def n_together(self) -> int: ...
    @property
    def in_step(self) -> bool: ...
    def n_ctx(self) -> int: ...
    def reset(self) -> None: ...
    def evaluate_parts(self, parts: Sequence[Part], take: TakeRows) -> None: ...
    def copy_sequence(self, source: int, target: int) -> None: ...
    def drop_sequence(self, sequence: int) -> None: ...


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt and the continuations it offers, in tokens."""

    prompt: Sequence[int]
    choices: Sequence[Sequence[int]]


@dataclass(frozen=True)
class ScoredChoice:
    """One continuation. logprob: of all its tokens, in nats. greedy: whether each of them was the likeliest."""

    logprob: float
    greedy: bool


def score_questions(llm: ChoiceEngine, questions: Sequence[ChoiceQuestion]) -> Iterator[tuple[int, list[ScoredChoice]]]:
    """Yield the place of each question and the scores of its choices, under the loop in force, in no given order.

    The model must have been opened with n_seq=SEQUENCES, or 2 at least. What is cached is lost.
    Raises UsageError for an empty prompt or continuation, GgufloopError if one does not fit the context.
    """
    for question in questions:
        if not question.prompt or not all(question.choices):
            what = f"choice {[len(c) for c in question.choices].index(0)}" if question.prompt else "the prompt"
            raise UsageError(f"{what} has no tokens.", "score a continuation of one token at least after one at least.")
    if llm.n_seq < 2:
        raise UsageError(
            "this model was opened for a single sequence, and an answer is one beside its prompt.",
            f"open it with n_seq={SEQUENCES}.",
        )
    llm.reset()
    for shared, members in _shared(llm, questions):
        packed = _Packed(llm, shared)
        try:
            yield from packed.score([(i, questions[i]) for i in members])
        finally:
            packed.close()


def _shared(llm: ChoiceEngine, questions: Sequence[ChoiceQuestion]) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Groups of questions, and the tokens their prompts begin with that are to be read once."""
    order = sorted(range(len(questions)), key=lambda i: list(questions[i].prompt))
    cut = llm.loop is not None and llm.loop.is_loop and llm.loop.depends_on_cuts
    if cut or llm.n_seq < 3:
        yield (), order
        return
    rest: list[int] = []
    for _, group in groupby(order, key=lambda i: tuple(questions[i].prompt[:SHARED])):
        members = list(group)
        # sorted, so what the first and the last have in common all have; the last token has to be read for its logits
        ends = (questions[members[0]].prompt[:-1], questions[members[-1]].prompt[:-1])
        common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))]
        if len(members) > 1 and len(common) >= SHARED:
            yield common, members
        else:
            rest += members
    if rest:
        yield (), rest


class _Packed:
    """Questions whose prompts begin alike, in packs. Prompts take the first sequences, then answers; the last one holds
    what they begin with, if anything."""

    def __init__(self, llm: ChoiceEngine, shared: Sequence[int]) -> None:
        self._llm, self._shared = llm, len(shared)
        alone = llm.in_step or (llm.loop is not None and llm.loop.halt is not None)
        self._prompts = 1 if alone else max(llm.n_seq // 4, 1)
        self._answers = 1 if alone else llm.n_seq - self._prompts - bool(shared)
        self._cells = llm.n_ctx() - self._shared
        self.close()
        if shared:
            self._evaluate([Part(llm.n_seq - 1, 0, shared)], lambda i, rows: None)

    def score(self, questions: Sequence[tuple[int, ChoiceQuestion]]) -> Iterator[tuple[int, list[ScoredChoice]]]:
        """The scores of questions, by their places; short ones together."""
        waiting = sorted(questions, key=lambda q: len(q[1].prompt), reverse=True)
        while waiting:
            n = len(waiting[-1][1].prompt) - self._shared
            pack, longest = [waiting.pop()], 0
            while waiting and len(pack) < self._prompts:
                _, following = waiting[-1]
                n += len(following.prompt) - self._shared
                longest = max(longest, *map(len, following.choices), *map(len, pack[-1][1].choices))
                if n > self._llm.n_together or n + longest > self._cells:
                    break
                pack.append(waiting.pop())
            scored = self._score_pack([question for _, question in pack])
            yield from zip((place for place, _ in pack), scored, strict=True)

    def close(self) -> None:
        """Leave an empty cache."""
        for sequence in range(self._llm.n_seq):
            self._llm.drop_sequence(sequence)

    def _score_pack(self, pack: list[ChoiceQuestion]) -> list[list[ScoredChoice]]:
        found = self._read(pack)
        self._continue(pack, found)
        for i in range(len(pack)):
            self._llm.drop_sequence(i)
        return found

    def _read(self, pack: list[ChoiceQuestion]) -> list[list[ScoredChoice]]:
        """Evaluate the prompts, as sequences 0, 1, ...; score the first token of each choice."""
        found: list[list[ScoredChoice]] = [[] for _ in pack]

        def take(i: int, rows: Logits) -> None:
            norms, top = Normalisers.of(rows), int(rows[0].argmax())
            for choice in pack[i].choices:
                logprob = float(rows[0, choice[0]] - norms.tops[0]) - float(norms.log_sums[0])
                found[i].append(ScoredChoice(logprob, choice[0] == top))

        if self._shared:
            for i in range(len(pack)):
                self._llm.copy_sequence(self._llm.n_seq - 1, i)
        self._evaluate([Part(i, self._shared, q.prompt[self._shared :], 1) for i, q in enumerate(pack)], take)
        return found

    def _continue(self, pack: list[ChoiceQuestion], found: list[list[ScoredChoice]]) -> None:
        """Add the scores of the other tokens of choices, each a sequence of its own after its prompt."""
        room = min(self._llm.n_together, self._cells - sum(len(q.prompt) - self._shared for q in pack))
        waiting = [(i, j) for i, q in enumerate(pack) for j, choice in enumerate(q.choices) if len(choice) > 1]
        waiting.reverse()
        while waiting:
            some, n = [waiting.pop()], 0
            while waiting and len(some) < self._answers:
                n += len(pack[some[-1][0]].choices[some[-1][1]]) - 1
                if n + len(pack[waiting[-1][0]].choices[waiting[-1][1]]) - 1 > room:
                    break
                some.append(waiting.pop())
            self._continue_some(pack, found, some)

    def _continue_some(
        self, pack: list[ChoiceQuestion], found: list[list[ScoredChoice]], some: Sequence[tuple[int, int]]
    ) -> None:
        parts = []
        for sequence, (i, j) in enumerate(some, self._prompts):
            self._llm.copy_sequence(i, sequence)
            tokens = pack[i].choices[j][:-1]
            parts.append(Part(sequence, len(pack[i].prompt), tokens, len(tokens)))

        def take(n: int, rows: Logits) -> None:
            i, j = some[n]
            rest = log_probabilities(rows, np.array(pack[i].choices[j][1:], dtype=np.intp)[done[n] :][: len(rows)])
            done[n] += len(rows)
            before = found[i][j]
            found[i][j] = ScoredChoice(
                before.logprob + float(rest.logprob.sum()), before.greedy and bool(rest.top.all())
            )

        done = [0] * len(some)
        self._evaluate(parts, take)
        for part in parts:
            self._llm.drop_sequence(part.sequence)

    def _evaluate(self, parts: Sequence[Part], take: TakeRows) -> None:
        """Evaluate parts at once; a single one that is longer than a batch in several."""
        most = self._llm.n_batch
        if len(parts) > 1 or len(parts[0].tokens) <= most:
            self._llm.evaluate_parts(parts, take)
            return
        part = parts[0]
        for at in range(0, len(part.tokens), most):
            some = part.tokens[at : at + most]
            wanted = max(part.rows - max(len(part.tokens) - at - len(some), 0), 0)
            self._llm.evaluate_parts([Part(part.sequence, part.start + at, some, min(wanted, len(some)))], take)
