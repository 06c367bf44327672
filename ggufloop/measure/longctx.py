"""What a loop does to long contexts: RULER's tasks at several lengths, each loop against plain on the same samples.

    found = long_context(llm, [loop2, loop4], ["niah_single_1", "vt"], [1024, 2048], n=50, journal=journal)
    for cell in cells(found):                      # a row per length and loop, and per task
        cell.score, cell.gain                      # stats.Estimate; gain: paired with plain, None for plain itself

Answers are greedy. A score is a number from 0 to 1 per sample, and samples are independent. The interval of a mean is
Wilson's, which holds for such numbers too, as none of one mean vary more than zeros and ones. That of a paired gain is
Student's, and never narrower than what n samples of which none changed can rule out (1 - 0.025^(1/n)). A cell in which
plain answers almost nothing, or almost everything, cannot show much: it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ggufloop.errors import UsageError
from ggufloop.generate.complete import complete, prompt_tokens
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import PLAIN, LoopSpec, loop_text
from ggufloop.measure.journal import Journal
from ggufloop.measure.stats import Estimate, mean_interval, wilson
from ggufloop.models.template import ChatTemplate
from ggufloop.progress import Progress, Step, silent
from ggufloop.reading import storable
from ggufloop.tasks import ruler

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

FLOOR, CEILING = 0.05, 0.95
AnEstimate = TypeVar("AnEstimate", bound=Estimate)

Scores = Mapping[tuple[int, str, str], Sequence[float]]
"""By length, task and loop ('plain' for none): a score per sample."""


@dataclass(frozen=True)
class LengthCell:
    """One loop at one length, on one task or on all of them ('all'). floor, ceiling: of the plain model there."""

    length: int
    task: str
    loop: str
    score: Estimate
    gain: Estimate | None
    at_floor: bool
    at_ceiling: bool


def check_record(record: dict[str, Any]) -> None:
    """Raise ValueError for a record `long_context` cannot have written."""
    wanted = {"length": int, "task": str, "loop": str, "sample": int, "score": float, "answer": str}
    bad = next((name for name, kind in wanted.items() if not isinstance(record.get(name), kind)), None)
    if bad is not None or not 0 <= record["score"] <= 1:
        raise ValueError(f"its {bad or 'score'} is not what a sample has")


def long_context(
    llm: LoopedLlama,
    loops: Iterable[LoopSpec],
    tasks: Sequence[str],
    lengths: Sequence[int],
    n: int,
    journal: Journal,
    *,
    seed: int = 42,
    chat: bool = False,
    arguments: Mapping[str, Any] | None = None,
    prose: str = "",
    progress: Progress = silent,
) -> Scores:
    """Ask n samples of every task at every length of the plain model and under each loop; what the journal has is kept.

    chat: in the model's own template, rendered with these arguments. prose: for tasks that hide needles in it. The loop
    in force is the old one afterwards. Raises UsageError for an unknown task, a length that holds none of
    it or does not fit the context.
    """
    if max(lengths) > llm.n_ctx():
        raise UsageError(
            f"{max(lengths)} tokens do not fit the context of {llm.n_ctx()}.", "give a larger -c, or shorter lengths."
        )
    template = ChatTemplate.needed(llm).having(arguments or {}) if chat else None
    specs: list[LoopSpec | None] = [None, *loops]
    known = {(r["length"], r["task"], r["loop"], r["sample"]): r["score"] for r in journal.records}
    found: dict[tuple[int, str, str], list[float]] = {}
    before, total, done = llm.loop, len(lengths) * len(tasks) * len(specs) * n, 0
    count = _count(llm, template)
    asked = {
        (length, task): list(ruler.samples(task, count, length, n, seed, prose)) for length in lengths for task in tasks
    }
    try:
        for (length, task), spec in product(asked, specs):
            name = loop_text(spec)
            scores = found[length, task, name] = []
            for i, sample in enumerate(asked[length, task]):
                if (length, task, name, i) not in known:
                    llm.set_loop(spec)
                    answer = _answer(llm, template, sample)
                    score = ruler.score(task, answer, sample.references)
                    journal.add({"length": length, "task": task, "loop": name, "sample": i,
                                 "score": score, "answer": answer})  # fmt: skip
                    known[length, task, name, i] = score
                scores.append(known[length, task, name, i])
                done += 1
                progress(Step(f"{length} tokens, {task}, {name}", done, total, "sample"))
    finally:
        llm.set_loop(before)
    return found


def _text(template: ChatTemplate | None, prompt: str, prefix: str) -> str:
    """What the model reads: in a chat the answer has been begun for it."""
    if template is None:
        return prompt + prefix
    return template.render([{"role": "user", "content": prompt}, {"role": "assistant", "content": prefix}])


def _count(llm: LoopedLlama, template: ChatTemplate | None) -> ruler.Count:
    around = len(prompt_tokens(llm, _text(template, "", ""))) if template else 0
    return lambda text: len(prompt_tokens(llm, text)) + around


def _answer(llm: LoopedLlama, template: ChatTemplate | None, sample: ruler.Sample) -> str:
    tokens = prompt_tokens(llm, _text(template, sample.prompt, sample.prefix.rstrip() if template else sample.prefix))
    room = min(sample.new_tokens, llm.n_ctx() - len(tokens))
    return storable(complete(llm, tokens, Sampling(temp=0.0, seed=0, n=max(room, 1))).text)


def cells(found: Scores) -> list[LengthCell]:
    """Every length and loop: all tasks together first, then each."""
    lengths = list(dict.fromkeys(length for length, _, _ in found))
    tasks = list(dict.fromkeys(task for _, task, _ in found))
    loops = list(dict.fromkeys(loop for _, _, loop in found))
    rows = []
    for length in lengths:
        for task in ["all", *tasks] if len(tasks) > 1 else tasks:
            asked = tasks if task == "all" else [task]
            plain = np.concatenate([found[length, name, PLAIN] for name in asked])
            for loop in loops:
                looped = np.concatenate([found[length, name, loop] for name in asked])
                gain = None if loop == PLAIN else no_point(mean_interval(looped - plain))
                low, high = bool(plain.mean() <= FLOOR), bool(plain.mean() >= CEILING)
                rows.append(LengthCell(length, task, loop, wilson(float(looped.sum()), len(looped)), gain, low, high))
    return rows


def no_point(found: AnEstimate) -> AnEstimate:
    """The mean of paired differences of scores from 0 to 1, its interval no narrower than where nothing changed."""
    rare = 1 - ((1 - found.level) / 2) ** (1 / found.n)
    return replace(found, low=max(min(found.low, found.mean - rare), -1.0),
                   high=min(max(found.high, found.mean + rare), 1.0))  # fmt: skip
