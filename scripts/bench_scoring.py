"""What scoring costs beside reading: questions of tasks, and chunks of a text, over the raw speed of a prompt.

    python3 scripts/bootstrap.py python scripts/bench_scoring.py [MODEL] [--tasks wordnet_definitions,mmlu_dev] [-r 5]

A round measures each row once, in turn: 512 tokens on an empty cache with the logits of the last one (what `ggufloop
bench` calls pp512); --limit questions of each task as `eval` asks them, packed, and a fifth of them one question at a
time, which is what packing replaced; and chunks of a text as `perplexity` and `sweep` score them. Then all but the
first again under the loop. Tokens are those that must be read: each prompt once, of each answer all but the last.
"share" is tokens per second over pp512 of the same round, for the loop over pp512 through its count of layers: 1 is a
scorer that costs its tokens. "difference" is the largest of an answer's log-probability from being asked alone, in
nats. Medians over rounds, with the lowest and highest share. "cpu" is the share by CPU time, for busy machines.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import click
import numpy as np

from ggufloop.engine import LoopedLlama
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import local
from ggufloop.measure.lm_eval_model import LoopedLM
from ggufloop.measure.multiple_choice import SEQUENCES, ChoiceQuestion, ScoredChoice, score_questions
from ggufloop.measure.perplexity import chunk_at, tokenize
from ggufloop.measure.score import score
from ggufloop.measure.tasks import evaluate
from ggufloop.models import registry
from ggufloop.table import FORMS, Column, Table
from ggufloop.tasks.loading import load_tasks

TOKENS = 512


@dataclass(frozen=True)
class Row:
    """Something to measure. questions: 0 where there are none; tokens: how many it must read."""

    name: str
    questions: int
    tokens: int
    run: Callable[[], Any]


class Asked(LoopedLM):
    """Keeps the questions lm-eval asks, and answers nothing."""

    def __init__(self, llm: LoopedLlama) -> None:
        super().__init__(llm)
        self.questions: list[ChoiceQuestion] = []

    def _score(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        prompts: dict[tuple[int, ...], list[list[int]]] = {}
        for _, prompt, choice in requests:
            prompts.setdefault(tuple(prompt), []).append(choice)
        self.questions += [ChoiceQuestion(prompt, choices) for prompt, choices in prompts.items()]
        return [(0.0, False)] * len(requests)


def questions_of(llm: LoopedLlama, tasks: Any, limit: int) -> list[ChoiceQuestion]:
    """What lm-eval asks of a task."""
    import lm_eval

    asked = Asked(llm)
    lm_eval.simple_evaluate(asked, tasks=tasks.loaded, task_manager=tasks.manager, limit=limit, bootstrap_iters=0)
    return asked.questions


def one_by_one(llm: LoopedLlama, questions: Sequence[ChoiceQuestion]) -> list[list[ScoredChoice]]:
    return [next(scored for _, scored in score_questions(llm, [q])) for q in questions]


def rows_of(llm: LoopedLlama, names: Sequence[str], limit: int) -> tuple[list[Row], dict[str, list[ChoiceQuestion]]]:
    """The rows besides pp512, and the questions of each task."""
    rows, quizzes = [], {}
    for name in names:
        tasks = load_tasks([name])
        quiz = quizzes[name] = questions_of(llm, tasks, limit)
        few = quiz[: max(len(quiz) // 5, 1)]

        def need(some: Sequence[ChoiceQuestion]) -> int:
            return sum(len(q.prompt) + sum(len(c) - 1 for c in q.choices) for q in some)

        rows.append(Row(f"{name}, eval", len(quiz), need(quiz), lambda t=tasks: evaluate(llm, t, limit)))
        rows.append(Row(f"{name}, one by one", len(few), need(few), lambda some=few: one_by_one(llm, some)))
    tokens = tokenize(llm, local("pydoc").text)
    chunks = [chunk_at(llm, tokens, TOKENS, i) for i in range(4)]
    rows.append(Row("text, chunks of 512", 0, 4 * TOKENS, lambda: [score(llm, chunk, TOKENS // 2) for chunk in chunks]))
    return rows, quizzes


def raw(llm: LoopedLlama) -> None:
    """512 tokens, the last one's logits."""
    llm.reset()
    llm.eval(np.random.default_rng(0).integers(1, llm.n_vocab() - 1, TOKENS).tolist())


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    clock, cpu = perf_counter(), process_time()
    run()
    return perf_counter() - clock, process_time() - cpu


def largest_difference(llm: LoopedLlama, quiz: Sequence[ChoiceQuestion]) -> float:
    few = quiz[: max(len(quiz) // 5, 1)]
    packed = dict(score_questions(llm, few))
    alone = one_by_one(llm, few)
    pairs = [(a, b) for i in range(len(few)) for a, b in zip(packed[i], alone[i], strict=True)]
    return max(abs(a.logprob - b.logprob) for a, b in pairs)


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option("--tasks", default="wordnet_definitions,mmlu_dev", show_default=True, metavar="NAME,...")
@click.option("--loop", "text", default="12:16 k=3", show_default=True, metavar="LOOP")
@click.option("--limit", default=200, show_default=True, type=click.IntRange(min=5), metavar="N")
@click.option("-r", "--repetitions", default=5, show_default=True, type=click.IntRange(min=1), metavar="N")
@click.option("-t", "--threads", default=2, show_default=True, type=click.IntRange(min=1), metavar="N")
@click.option("-o", "--output", "form", default="md", type=click.Choice(FORMS), show_default=True)
def main(model: str, tasks: str, text: str, limit: int, repetitions: int, threads: int, form: str) -> None:
    """Questions and tokens per second of scoring, over the raw speed of a prompt."""
    loop = LoopSpec.parse(text)
    llm = LoopedLlama(registry.resolve(model), n_ctx=2048, n_batch=2048, n_ubatch=512, n_seq=SEQUENCES,
                      n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)  # fmt: skip
    rows, quizzes = rows_of(llm, tasks.split(","), limit)
    loops: list[LoopSpec | None] = [None, loop]
    base: list[tuple[float, float]] = []
    times: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(repetitions + 1):  # the first is thrown away
        llm.set_loop(None)
        base.append(timed(lambda: [raw(llm) for _ in range(3)]))
        for i, spec in enumerate(loops):
            llm.set_loop(spec)
            for j, row in enumerate(rows):
                times.setdefault((i, j), []).append(timed(row.run))
    raw_speeds = [3 * TOKENS / clock for clock, _ in base[1:]]
    table: list[list[Any]] = [["pp512", "plain", None, statistics.median(raw_speeds), 1.0, None, None, 1.0, None]]
    for (i, j), found in times.items():
        spec, row = loops[i], rows[j]
        cost = 1.0 if spec is None else spec.relative_cost(llm.n_layer())
        pairs = list(zip(found[1:], base[1:], strict=True))
        shares, cpu = ([row.tokens * cost / mine[k] / (3 * TOKENS / his[k]) for mine, his in pairs] for k in (0, 1))
        clock = statistics.median(seconds for seconds, _ in found[1:])
        llm.set_loop(spec)
        name = row.name.split(",")[0]
        difference = largest_difference(llm, quizzes[name]) if row.name.endswith("eval") else None
        table.append([row.name, str(spec or "plain"), row.questions / clock or None, row.tokens / clock,
                      statistics.median(shares), min(shares), max(shares), statistics.median(cpu),
                      difference])  # fmt: skip
    columns = [Column("what"), Column("loop"), Column("questions/s", ".1f"), Column("tokens/s", ".0f"),
               Column("share", ".3f"), Column("low", ".3f"), Column("high", ".3f"), Column("cpu", ".3f"),
               Column("difference", ".1e")]  # fmt: skip
    click.echo(Table(tuple(columns), table).render(form), nl=False)
    click.echo(f"{model}: {limit} questions of each task, n = {repetitions} rounds, {threads} threads", err=True)


if __name__ == "__main__":
    main()
