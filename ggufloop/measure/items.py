"""What a sweep measures of a loop: a score for each item, items being what is independent of each other.

    measure = TextMeasure(llm, local("pydoc"), n_ctx=512)          # chunks; mean log-probability per token, in nats
    measure = TaskMeasure("brackets", load_tasks(["brackets"]))    # questions; 1 if answered right, else 0
    measure.score(llm, [0, 7])                                     # of items 0 and 7, under the loop in force

Higher is better. Looped minus plain on the same items is what `selection.py` decides on.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ggufloop.backend.capi import Refused
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import Text
from ggufloop.measure.perplexity import TextModel, chunk_at, count_chunks, halves, tokenize
from ggufloop.measure.score import score
from ggufloop.measure.slices import sizes_of
from ggufloop.measure.verdict import ACCURACY, NATS
from ggufloop.tasks.own import task_name

if TYPE_CHECKING:
    from ggufloop.backend.tracing import States
    from ggufloop.engine import LoopedLlama
    from ggufloop.measure.tasks import Item
    from ggufloop.tasks.loading import Tasks

_SEED = 1
UNUSABLE = -1000.0
"""The score in nats per token of a chunk whose logits are not finite: an overflowing loop is ranked last, not fatal."""


class Measure(Protocol):
    """A source of scores. n: items to score; available: those there are; item, unit: what an item and a score are, in
    words; least: how many say enough to drop the worse half of some loops."""

    name: str
    item: str
    unit: str
    least: int
    n: int
    available: int

    @property
    def places(self) -> Sequence[tuple[int, int]] | None:
        """(document, place in it) of each item; None where items are independent."""
        ...

    def slices(self) -> list[list[int]]:
        """Items that are best scored together, because they are packed: where one begins, a sweep is cut."""
        ...

    def identity(self) -> dict[str, Any]:
        """What must be the same for scores of two runs to belong together."""
        ...

    def score(self, llm: LoopedLlama, items: Sequence[int]) -> list[float]:
        """One finite number per item, higher is better, under the loop in force."""
        ...


def drawn(chunks: Sequence[int]) -> list[tuple[int, int]]:
    """The chunks of texts that have so many, as (text, place in it), in the order in which they are items."""
    every = [(d, i) for d, n in enumerate(chunks) for i in range(n)]
    return [every[i] for i in np.random.default_rng(_SEED).permutation(len(every))]


class TextMeasure:
    """Chunks of one text or several by llama-perplexity's protocol, the second half of each scored.

    Items are numbered in a random order, always the same: the first n of them are a sample of all, as the first n
    chunks of a text are not, and of more items they are the first too.
    """

    item, unit, least = "chunk", NATS, 8  # each is a mean over many tokens

    def __init__(self, llm: TextModel, text: Text | Sequence[Text], n_ctx: int, limit: int | None = None) -> None:
        """limit: so many chunks. Raises UsageError and GgufloopError as `perplexity.count_chunks` does."""
        texts = [text] if isinstance(text, Text) else list(text)
        self.name = ",".join(t.name for t in texts)
        self.n_ctx = n_ctx
        self._tokens = [tokenize(llm, t.text) for t in texts]
        self.chunks = [count_chunks(tokens, n_ctx) for tokens in self._tokens]
        self._order = drawn(self.chunks)
        self.available = len(self._order)
        self.n = min(self.available, limit or self.available)

    @property
    def places(self) -> Sequence[tuple[int, int]]:
        """Chunks of one text resemble their neighbours."""
        return self._order[: self.n]

    def slices(self) -> list[list[int]]:
        """Chunks are scored one by one."""
        return [[i] for i in range(self.n)]

    def identity(self) -> dict[str, Any]:
        """The texts by their tokens, and how they are cut and drawn."""
        ids = b"".join(t.to_bytes(4, "little") for tokens in self._tokens for t in tokens)
        return {"text": self.name, "tokens_sha256": hashlib.sha256(ids).hexdigest(), "n_ctx": self.n_ctx,
                "drawn": _SEED}  # fmt: skip

    def score(self, llm: LoopedLlama, items: Sequence[int]) -> list[float]:
        """Mean log-probability per scored token of each chunk, in nats."""
        return [self._score(llm, i) for i in items]

    def _score(self, llm: LoopedLlama, item: int) -> float:
        document, chunk = self._order[item]
        ids = chunk_at(llm, self._tokens[document], self.n_ctx, chunk)
        mean = float(score(llm, ids, halves(self.n_ctx)[0]).logprob.mean())
        return mean if math.isfinite(mean) else UNUSABLE

    def score_each(
        self, llm: LoopedLlama, loops: Mapping[str, LoopSpec | None], items: Sequence[int]
    ) -> dict[str, tuple[list[float], float]]:
        """`score` under several loops, None for plain, and the seconds each took.

        A chunk is evaluated plain once. The loops begin with the states it leaves, where they can: then a loop is its
        further passes and the layers behind them, and its scores are the same bits.
        """
        found: dict[str, list[float]] = {name: [] for name in loops}
        seconds = dict.fromkeys(loops, 0.0)
        share = len(loops) > 2 and self.n_ctx <= llm.n_together
        for i in items:
            start = time.perf_counter()
            states: States = {}
            if share or None in loops.values():
                llm.set_loop(None)
                recording: AbstractContextManager[States] = llm.recorded() if share else nullcontext({})
                with recording as states:
                    plain = self._score(llm, i)
            for name, loop in loops.items():
                if loop is None:
                    value = plain
                else:
                    llm.set_loop(loop)
                    value = self._resumed(llm, i, states) if share else self._score(llm, i)
                found[name].append(value)
                now = time.perf_counter()
                seconds[name] += now - start
                start = now
        return {name: (found[name], seconds[name]) for name in loops}

    def _resumed(self, llm: LoopedLlama, item: int, states: States) -> float:
        try:
            with llm.resumed(states):
                return self._score(llm, item)
        except Refused:
            return self._score(llm, item)


class TaskMeasure:
    """Questions of one of lm-eval's tasks or groups, or of several together, right or wrong."""

    item, unit, least = "question", ACCURACY, 30
    places = None

    def __init__(
        self, name: str, tasks: Tasks, limit: int | None = None, chat: bool = False,
        template: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """tasks: what `load_tasks` gives for this name, or for several. limit: only the first questions of each task
        it holds. chat, template: as `evaluate` has them."""
        self.name = task_name(name)
        self.chat, self.template = chat, dict(template or {})
        self._tasks = tasks
        sizes = {task: min(size, limit or size) for task, size in self._tasks.sizes().items()}
        self._docs = [(task, doc) for task, size in sizes.items() for doc in range(size)]
        self.available = sum(self._tasks.sizes().values())
        self.n = len(self._docs)

    def slices(self) -> list[list[int]]:
        """As `evaluate` packs them."""
        sizes, found = sizes_of(self._tasks), dict[tuple[str, int], list[int]]()
        for i, (task, doc) in enumerate(self._docs[: self.n]):
            found.setdefault((task, doc // sizes[task]), []).append(i)
        return list(found.values())

    def identity(self) -> dict[str, Any]:
        """The tasks, their sizes and versions."""
        tasks = self._tasks
        return {"task": self.name, "sizes": tasks.sizes(), "versions": tasks.versions(), "chat": self.chat,
                **({"chat_template_kwargs": self.template} if self.template else {})}  # fmt: skip

    def score(self, llm: LoopedLlama, items: Sequence[int]) -> list[float]:
        """1 for each question answered right, 0 for the others. Raises UsageError for a task that does not say."""
        return [each.right for each in self.asked(llm, items)]

    def asked(self, llm: LoopedLlama, items: Sequence[int]) -> list[Item]:
        """The questions with the log-probabilities of their answers. Raises UsageError as `score` does."""
        from ggufloop.measure.tasks import evaluate

        wanted: dict[str, list[int]] = {}
        for i in items:
            task, doc = self._docs[i]
            wanted.setdefault(task, []).append(doc)
        run = evaluate(llm, self._tasks, chat=self.chat, docs=wanted, template=self.template)
        found = {(item.task, item.doc): item for some in run.items.values() for item in some}
        missing = next((self._docs[i] for i in items if self._docs[i] not in found), None)
        if missing is not None:
            raise UsageError(
                f"task {missing[0]} does not say whether a question is answered right.",
                "take tasks that report acc or exact_match.",
            )
        return [found[self._docs[i]] for i in items]


def check_enough(measure: Measure) -> None:
    """Raise GgufloopError if there are too few items to compare loops on."""
    if measure.n < 4:
        raise GgufloopError(
            f"{measure.name} has {measure.n} {measure.item}{'s' if measure.n != 1 else ''}, too few to compare "
            "loops on.",
            "take a longer text, a smaller -c, or more questions; thousands give an answer.",
        )
