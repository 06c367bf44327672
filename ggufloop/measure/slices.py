"""Questions in slices: what is packed together, scored, kept in one line of a journal, and given to one shard.

    answers = Answers(journal.records_of_this_kind, journal.add)
    Shard.parse("2/4").share(slices_of(tasks, limit))            # every fourth slice of all, from the second on

A slice is so many questions of one task by their numbers in it, whatever else is asked and however many shards there
are. Shards and a run by itself therefore compute the same batches, and get the same answers to the last bit; a run that
is killed loses at most one slice. A task of few questions, as MMLU has 57, is a slice of its own, and slices are dealt
out over all tasks, so that small ones do not all fall to the first shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ggufloop import reading
from ggufloop.errors import GgufloopError, UsageError

if TYPE_CHECKING:
    from ggufloop.tasks.loading import Tasks

SCORED, WRITTEN = 64, 8
"""Questions of a slice: those whose answers are scored, and those to which the model writes one, which takes longer."""

LOGLIKELIHOOD, ROLLING, GENERATE = KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""What lm-eval asks of a model."""

DRAWN = 1
"""Seed of the questions that are drawn: the same ones for everybody."""

T = TypeVar("T")


@dataclass(frozen=True)
class Slice:
    """Those questions `docs` of a task, by their numbers, that lie in the slice which begins at `start`."""

    task: str
    start: int
    docs: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Which part of the slices is done here: the number-th of every `of`, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """I/N. Raises UsageError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"{text!r} is no shard.", "write it like 2/4, the second of four; the first is 1/4.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of_array(cls, environment: Mapping[str, str] = os.environ) -> Shard | None:
        """The shard that a task of a Slurm array is, None outside of one. Raises UsageError for one with gaps."""
        names = ("ID", "COUNT", "MIN", "STEP")
        words = [environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
        if not words[0].isdecimal() or not words[1].isdecimal():
            return None
        number, count = int(words[0]), int(words[1])
        first, step = (int(word) if word.isdecimal() else least for word, least in zip(words[2:], (0, 1), strict=True))
        place, odd = divmod(number - first, max(step, 1))
        if odd or not 0 <= place < count:
            raise UsageError(
                f"task {number} of this Slurm array of {count} from {first} on is no shard of it.",
                "use an array without gaps, such as --array=0-3, or give --shard I/N.",
            )
        return cls(place + 1, count)

    def share(self, everything: Sequence[T]) -> list[T]:
        """What of all is this shard's."""
        return list(everything[self.number - 1 :: self.of])


@dataclass(frozen=True)
class ShardDone:
    """A shard has done its part, so many slices of `total`, or of `what` they are; `journal` keeps it. note: what else
    there is to say."""

    shard: Shard
    slices: int
    total: int
    journal: Path
    note: str = ""
    what: str = "slices"


def file_name(kind: str, shard: Shard | None) -> str:
    """What the journal of a measurement is called in a model's folder."""
    return f"{kind}.jsonl" if shard is None else f"{kind}-{shard.number}-of-{shard.of}.jsonl"


def sizes_of(tasks: Tasks) -> dict[str, int]:
    """How many questions a slice of each task holds."""
    return {name: WRITTEN if task.OUTPUT_TYPE == GENERATE else SCORED for name, task in tasks.leaves.items()}


def slices_of(tasks: Tasks, limit: int | None = None, drawn: int | None = None) -> list[Slice]:
    """All slices of the first `limit` questions of each task, or of those drawn, in the order they are dealt out in."""
    found, sizes = [], sizes_of(tasks)
    chosen = None if drawn is None else _draw(tasks, drawn)
    for name, n in tasks.sizes().items():
        asked, size = min(n, limit or n), sizes[name]
        for start in range(0, asked, size):
            docs = range(start, min(start + size, asked))
            some = tuple(docs if chosen is None else (i for i in docs if (name, i) in chosen))
            found += [Slice(name, start, some)] if some else []
    return found


def _draw(tasks: Tasks, n: int) -> set[tuple[str, int]]:
    """n questions at random of each name asked for, over all its tasks; these are among those of a larger n."""
    found: set[tuple[str, int]] = set()
    sizes = tasks.sizes()
    for members in tasks.members.values():
        every = [(task, i) for task in members for i in range(sizes[task])]
        found.update(every[j] for j in np.random.default_rng(DRAWN).permutation(len(every))[:n].tolist())
    return found


def docs_of(slices: Iterable[Slice]) -> dict[str, list[int]]:
    """The questions of slices by task, as `tasks.evaluate` takes them."""
    found: dict[str, list[int]] = {}
    for each in slices:
        found.setdefault(each.task, []).extend(each.docs)
    return found


@dataclass(frozen=True)
class Answered:
    """A line of the journal: what a model answered under a loop to the questions of a slice.

    loop     its text, or plain
    start    number of the first question in its task
    kind     what was asked of the model, in lm-eval's word
    asked    digest of the prompts and continuations
    answers  of each question those to its requests: [log-probability, whether each token was the likeliest] of a
             continuation, a number for a whole text, the text that was written
    """

    loop: str
    task: str
    start: int
    kind: str
    asked: str
    answers: tuple[Any, ...]
    seconds: float

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What it is of."""
        return self.loop, self.task, self.start, self.kind


class Answers:
    """What was answered already, and what keeps the rest."""

    def __init__(
        self, known: Iterable[Answered] = (), keep: Callable[[Answered], None] = lambda answered: None
    ) -> None:
        self._known = {answered.key: answered for answered in known}
        self._keep = keep

    def find(self, loop: str, task: str, start: int, kind: str) -> Answered | None:
        """The answers under a loop to the slice of `task` that begins at `start`."""
        return self._known.get((loop, task, start, kind))

    def add(self, answered: Answered) -> None:
        """Keep the answers to a slice; on disk when this returns, where there is a journal."""
        self._keep(answered)
        self._known[answered.key] = answered


class Sliced:
    """Requests of lm-eval, answered slice by slice under one loop.

    docs: of the tasks of which not all is asked the questions that are, by their numbers; lm-eval counts
    from 0 within them. Without `compare`, prompts are not compared with those that were answered.
    """

    def __init__(
        self,
        answers: Answers,
        loop: str,
        sizes: Mapping[str, int],
        docs: Mapping[str, Sequence[int]] | None = None,
        compare: bool = True,
    ) -> None:
        self._answers, self._loop, self._sizes = answers, loop, sizes
        self._docs = {task: sorted(numbers) for task, numbers in (docs or {}).items()}
        self._compare = compare

    def answer(
        self, kind: str, requests: Sequence[Any], ask: Callable[[list[list[Any]]], Iterable[list[Any]]]
    ) -> list[Any]:
        """The answer to each request. ask: is given the requests of the slices that lack them, once and only if one
        does, and yields the answers of one after the other.

        Raises GgufloopError if a slice was answered that asked something else.
        """
        parts: dict[tuple[str, int], dict[int, list[int]]] = {}
        for i, request in enumerate(requests):
            doc = self._docs[request.task_name][request.doc_id] if self._docs else request.doc_id
            start = doc - doc % self._sizes[request.task_name]
            parts.setdefault((request.task_name, start), {}).setdefault(doc, []).append(i)
        found: list[Any] = [None] * len(requests)
        lacking = []
        for (task, start), questions in parts.items():
            asked = _digest(requests, questions)
            known = self._answers.find(self._loop, task, start, kind)
            if known is None:
                lacking.append((task, start, asked, questions))
                continue
            if (self._compare and known.asked != asked) or [*map(len, known.answers)] != [
                *map(len, questions.values())
            ]:
                raise GgufloopError(
                    f"questions {start} on of {task} are not those that were answered before.",
                    "its data have changed since: begin anew with another --out.",
                )
            _spread(found, questions, known)
        if not lacking:
            return found
        answered = iter(ask([[requests[i] for some in questions.values() for i in some] for *_, questions in lacking]))
        for task, start, asked, questions in lacking:
            begun = time.perf_counter()
            flat = iter(next(answered))
            told = tuple([_written(kind, next(flat)) for _ in some] for some in questions.values())
            seconds = round(time.perf_counter() - begun, 4)
            slice_ = Answered(self._loop, task, start, kind, asked, told, seconds)
            self._answers.add(slice_)
            _spread(found, questions, slice_)  # as they are read again, so that going on changes nothing
        return found


def _digest(requests: Sequence[Any], questions: Mapping[int, Sequence[int]]) -> str:
    words = [repr(requests[i].args) for some in questions.values() for i in some]
    return hashlib.sha256("\n".join(words).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _spread(found: list[Any], questions: Mapping[int, Sequence[int]], answered: Answered) -> None:
    for some, told in zip(questions.values(), answered.answers, strict=True):
        for i, answer in zip(some, told, strict=True):
            found[i] = _read(answered.kind, answer)


def _written(kind: str, answer: Any) -> Any:
    """An answer as JSON holds it: it has no word for infinity, and of text not all that a model may write."""
    if kind == LOGLIKELIHOOD:
        return [_number(answer[0]), bool(answer[1])]
    if kind == ROLLING:
        return _number(answer)
    return reading.storable(str(answer))


def _number(value: float) -> float | str:
    return float(value) if json.dumps(float(value))[-1].isdigit() else str(float(value))


def _read(kind: str, answer: Any) -> Any:
    """What lm-eval is told. Raises ValueError for what `_written` does not make."""
    if kind == LOGLIKELIHOOD:
        logprob, greedy = answer
        return float(logprob), bool(greedy)
    return float(answer) if kind == ROLLING else str(answer)


def check_answered(slices: Mapping[tuple[str, int], Slice], answered: Answered) -> None:
    """Raise ValueError for what is no answer to one of these slices, by task and first question."""
    asked = slices.get((answered.task, answered.start))
    if asked is None:
        raise ValueError(f"{answered.task} from question {answered.start} on is no slice of this run")
    if answered.kind not in KINDS:
        raise ValueError(f"{answered.kind!r} is nothing that is asked of a model")
    if not 0 < len(answered.answers) <= len(asked.docs):
        raise ValueError(f"{len(answered.answers)} of {len(asked.docs)} questions are answered")
    for told in answered.answers:
        try:
            if not isinstance(told, list) or not told:
                raise TypeError
            for answer in told:
                if (answered.kind == GENERATE) != isinstance(answer, str) and answered.kind == GENERATE:
                    raise TypeError
                _read(answered.kind, answer)
        except (TypeError, ValueError):
            raise ValueError("an answer is none") from None
