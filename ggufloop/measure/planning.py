"""What an evaluation or a sweep will take, before it is run: `--plan`.

    found = plan_eval(path, loop, plan, settings, shards=4)              # times a short prefill of the model
    found = plan_eval(path, loop, plan, settings, shards=4, speed=600)   # tokens per second; loads no model
    found.table().render("md"), found.sentences()

A cell is a task or a text under a loop. Tokens are counted of the first questions of every task: what a slice's prompts
begin with is read once. An answer that is written counts at its greatest length. A loop costs a plain run's time by its
layer count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufloop.backend.settings import ContextSettings
from ggufloop.loop import LoopSpec, loop_text
from ggufloop.measure.bench import Workload, sample
from ggufloop.measure.corpus import Text
from ggufloop.measure.eval_run import EvalPlan
from ggufloop.measure.items import TextMeasure
from ggufloop.measure.multiple_choice import SEQUENCES, SHARED
from ggufloop.measure.perplexity import count_chunks
from ggufloop.measure.selection import planned_cost
from ggufloop.measure.slices import GENERATE, Slice, sizes_of, slices_of
from ggufloop.measure.sweep_run import SweepPlan
from ggufloop.models.gguf import read_header
from ggufloop.models.info import layer_count
from ggufloop.opening import check_loops, open_model
from ggufloop.progress import Progress, duration, silent
from ggufloop.table import Cell, Column, Table
from ggufloop.tasks.loading import Tasks, load_tasks

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

SAMPLE = 16
"""Questions of each task that are looked at."""
CHARACTERS = 4.0
"""Of a token, where no model is there to ask."""
_PREFILL, _TIMES = 512, 3

Count = Callable[[str], int]


@dataclass(frozen=True)
class PlannedCell:
    """A task or text under a loop: items, tokens, and the tokens times what the loop costs over plain."""

    measure: str
    loop: str
    items: int
    tokens: float
    work: float


@dataclass(frozen=True)
class Planned:
    """cells: in the order they are run. speed: tokens per second of the plain model, measured or given; counted:
    whether the model's own tokens were. tasks: whether any is asked. at_most: a race, or answers, may end earlier."""

    cells: tuple[PlannedCell, ...]
    slices: int
    shards: int
    speed: float
    measured: bool
    counted: bool
    at_most: bool
    tasks: bool

    def hours(self, work: float) -> float:
        """So many tokens of the plain model take."""
        return work / self.speed / 3600

    @property
    def total(self) -> float:
        """Hours of all cells one after the other."""
        return self.hours(sum(cell.work for cell in self.cells))

    @property
    def per_shard(self) -> float:
        """Hours of the shard that has the most slices."""
        return self.total * -(-self.slices // self.shards) / max(self.slices, 1)

    def table(self) -> Table:
        """A row per cell."""
        columns = (Column("measure"), Column("loop"), Column("items", "d"), Column("tokens", ".0f"),
                   Column("hours", ".3f"))  # fmt: skip
        rows: list[list[Cell]] = [[c.measure, c.loop, c.items, c.tokens, self.hours(c.work)] for c in self.cells]
        return Table(columns, rows)

    def sentences(self) -> list[str]:
        """What the table does not say."""
        most = "at most " if self.at_most else ""
        how = "measured" if self.measured else "as given"
        shards = f"; each of {self.shards} shards {duration(3600 * self.per_shard)}" if self.shards > 1 else ""
        counted = "counted by the model" if self.counted else f"{CHARACTERS:g} characters to a token"
        judged = f"; those of tasks are judged by {SAMPLE} questions, {counted}" if self.tasks else ""
        return [
            f"{_some(len(self.cells), 'cell')}, {_some(self.slices, 'slice')}: {most}{duration(3600 * self.total)}"
            f"{shards}.",
            f"Plain reads {self.speed:.0f} tokens per second, {how}{judged}.",
        ]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"cells": self.table().records(), "slices": self.slices, "shards": self.shards, "hours": self.total,
                "hours_per_shard": self.per_shard, "tokens_per_second": self.speed, "measured": self.measured,
                "tokens_counted": self.counted, "at_most": self.at_most}  # fmt: skip


def _some(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


@dataclass(frozen=True)
class _Read:
    """What a task takes under plain. written: whether answers are written, at most so long."""

    items: int
    tokens: float
    written: bool


def plan_eval(
    path: Path, loop: LoopSpec | None, plan: EvalPlan, settings: ContextSettings | None = None, *, shards: int = 1,
    speed: float | None = None, tasks: Tasks | None = None, progress: Progress = silent,
) -> Planned:  # fmt: skip
    """What `run_eval` will take. Raises UsageError, GgufloopError, BackendError as it does."""
    loops = plan.loops(loop)
    check_loops(path, loops)
    tasks = tasks or plan.load(progress)
    slices, layers = slices_of(tasks, plan.limit, plan.drawn), layers_of(path)
    with timed(path, settings, True, speed, progress) as (found, count, llm):
        reads = _reads(tasks, slices, plan.chat and llm is not None, count, llm, plan.template)
    cells = [
        PlannedCell(name, loop_text(each), sum(reads[t].items for t in members), tokens, tokens * cost(each, layers))
        for each in loops
        for name, members in tasks.members.items()
        for tokens in [sum(reads[t].tokens for t in members)]
    ]
    written = any(read.written for read in reads.values())
    return Planned(tuple(cells), len(slices), shards, found, speed is None, llm is not None, written, True)


def plan_sweep(
    path: Path, loops: Sequence[LoopSpec], plan: SweepPlan, settings: ContextSettings | None = None, *, shards: int = 1,
    speed: float | None = None, progress: Progress = silent,
) -> Planned:  # fmt: skip
    """What `run_sweep` will take at most: a race drops loops earlier, and so does what is known."""
    check_loops(path, loops)
    layers, racing = layers_of(path), plan.racing and shards == 1
    mean = float(np.mean([cost(loop, layers) for loop in loops]))
    cells, slices = [], 0
    with timed(path, settings, bool(plan.tasks), speed, progress) as (found, count, llm):
        reads: dict[str, _Read] = {}
        if plan.text is not None:
            reads[plan.text.name] = _text(plan.text, plan, count, llm)
            slices += reads[plan.text.name].items
        for name in plan.tasks:
            tasks = load_tasks([name], plan.offline, None, progress, plan.include_path)
            some = slices_of(tasks, plan.limit)
            each = _reads(tasks, some, plan.chat and llm is not None, count, llm, plan.template).values()
            slices += len(some)
            reads[name] = _Read(sum(r.items for r in each), sum(r.tokens for r in each), any(r.written for r in each))
    for name, read in reads.items():
        least = 8 if plan.text is not None and name == plan.text.name else 30
        times = planned_cost(len(loops), read.items, plan.finalists, racing, least)
        share = read.tokens / max(read.items, 1)
        cells += [
            PlannedCell(name, "plain", read.items, read.tokens, read.tokens),
            PlannedCell(name, f"{len(loops)} loop{'s' * (len(loops) > 1)}", times, times * share, times * share * mean),
        ]
    at_most = (racing and len(loops) > plan.finalists) or any(read.written for read in reads.values())
    return Planned(tuple(cells), slices, shards, found, speed is None, llm is not None, at_most, bool(plan.tasks))


def layers_of(path: Path) -> int:
    """Layers of a model file."""
    header = read_header(path)
    return layer_count(header, header.text("general.architecture") or "unknown")


def cost(loop: LoopSpec | None, layers: int) -> float:
    """Of a run under a loop, in plain runs."""
    return 1.0 if loop is None else loop.relative_cost(layers)


@contextmanager
def timed(
    path: Path, settings: ContextSettings | None, asked: bool, speed: float | None, progress: Progress
) -> Iterator[tuple[float, Count, LoopedLlama | None]]:
    """The speed of the plain model, how texts are counted, and the model itself unless a speed is given."""
    if speed is not None:
        yield speed, lambda text: round(len(text) / CHARACTERS), None
        return
    settings = replace(settings or ContextSettings(), n_seq=SEQUENCES if asked else 1)
    llm = open_model(path, settings, progress=progress)
    try:
        work = Workload(prompt=min(_PREFILL, llm.n_ctx()))
        times = [sample(llm, work, None, i, warm=i == 0) for i in range(_TIMES)]
        yield 1e9 * work.tokens / float(np.median(times)), lambda text: len(llm.tokenize(text.encode())), llm
    finally:
        llm.close()


def _text(text: Text, plan: SweepPlan, count: Count, llm: LoopedLlama | None) -> _Read:
    if llm is not None:
        n = TextMeasure(llm, text, plan.chunk, plan.chunks).n
    else:
        n = count_chunks(range(count(text.text)), plan.chunk)
        n = min(n, plan.chunks or n)
    return _Read(n, float(n * plan.chunk), False)


def _reads(
    tasks: Tasks, slices: Sequence[Slice], chat: bool, count: Count, llm: LoopedLlama | None,
    template: Mapping[str, Any],
) -> dict[str, _Read]:  # fmt: skip
    """What each task takes, judged by its first questions."""
    from ggufloop.measure.lm_eval_model import ListenLM
    from ggufloop.measure.tasks import ask

    firsts: dict[str, tuple[int, ...]] = {}
    for each in slices:
        firsts.setdefault(each.task, each.docs[:SAMPLE])
    listens = ListenLM(llm, template)
    ask(listens, tasks, chat=chat, docs={task: list(docs) for task, docs in firsts.items()})
    sizes, found = sizes_of(tasks), {}
    for task, docs in firsts.items():
        n = sum(len(each.docs) for each in slices if each.task == task)
        tokens, shared, written = _tokens(listens.asked[task], count)
        per_slice = -(-n // sizes[task]) * shared
        found[task] = _Read(n, per_slice + (tokens - shared * len(docs)) / len(docs) * n, written)
    return found


def _tokens(asked: Mapping[int, Sequence[Any]], count: Count) -> tuple[float, float, bool]:
    """Tokens of questions, those their prompts have in common, and whether answers are written."""
    total, prompts, written = 0.0, [], False
    for requests in asked.values():
        seen = dict.fromkeys(request.args[0] for request in requests)
        prompts += list(seen)
        total += sum(map(count, seen))
        for request in requests:
            if request.request_type == GENERATE:
                settings, written = request.args[1], True
                total += int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
            elif len(request.args) > 1:
                total += max(count(request.args[1]) - 1, 0)
    common = "".join(
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts), strict=False))
    )
    shared = count(common) if len(prompts) > 1 and not written else 0
    return total, float(shared if shared >= SHARED else 0), written
