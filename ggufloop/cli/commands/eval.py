"""`ggufloop eval MODEL --tasks a,b`: lm-eval's tasks under a loop; with --paired, the loop against the plain model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ggufloop.cli import terminal
from ggufloop.cli.context import context_from_flags, context_options, open_from_flags
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_options
from ggufloop.cli.options import model_options
from ggufloop.cli.progress import shown
from ggufloop.cli.types import output_option
from ggufloop.errors import UsageError
from ggufloop.measure.multiple_choice import SEQUENCES
from ggufloop.progress import named
from ggufloop.tasks.loading import BENCHMARKS, TASKS, load_tasks

if TYPE_CHECKING:
    from ggufloop.measure.endpoints import NoiseFloor
    from ggufloop.measure.tasks import Comparison, Run


def _tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(before + comma + name) for name in (*TASKS, *BENCHMARKS) if name.startswith(last)]


def _compare(plain: Run, looped: Run) -> dict[str, Comparison]:
    """What can be compared, by task; a note says what cannot."""
    from ggufloop.measure.tasks import compare

    compared = {}
    for name, items in plain.items.items():
        if len(items) < 2:
            terminal.note(f"{name} has {len(items)} questions that are right or wrong: nothing to compare.")
        else:
            compared[name] = compare(items, looped.items[name])
    return compared


@click.command(name="eval", cls=Command)
@model_options
@click.option("--tasks", "names", metavar="NAME,...", shell_complete=_tasks,
              help=f"Tasks, groups or tags of lm-eval. Without a hub: {', '.join((*TASKS, *BENCHMARKS))}.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N",
              help="Worked examples before each question; without it, as many as the task has it.")  # fmt: skip
@click.option("--apply-chat-template", "chat", is_flag=True, help="Ask in the model's chat template.")
@click.option("--paired", is_flag=True, help="Run plain and looped on the same questions and compare them.")
@click.option("--noise-floor", "floor", is_flag=True, help="With --paired: run the loop again with its damping "
              "moved by 1e-5, and say how far that differs.")  # fmt: skip
@click.option("--log-samples", "log", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
              help="Write each question with its answers and their scores to FILE, one per line.")  # fmt: skip
@loop_options
@output_option("json")
@context_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    names: str | None,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    paired: bool,
    floor: bool,
    log: Path | None,
    form: str,
    **flags: Any,
) -> None:
    """Run tasks of lm-eval, looped or not. Needs the extra 'eval'.

    The answers of a question are scored after its prompt, which is read once; docs/tasks.md says what that means for a
    loop and what the tasks that ship here ask.

    \b
    ggufloop eval smollm2-135m --tasks wordnet_definitions --limit 500
    ggufloop eval smollm2-135m --tasks mmlu_dev,brackets --window 12:16 --K 3 --paired
    """
    if names is None:
        known = ", ".join((*TASKS, *BENCHMARKS))
        raise UsageError("no task is named.", f"name some with --tasks: {known}, or any of lm-eval's.")
    if paired and flags["window"] is None and flags["recipe"] is None:
        raise UsageError("--paired compares a loop with the plain model, and no loop is given.", "give --window A:B.")
    if floor and not paired:
        raise UsageError("--noise-floor is of a comparison.", "give --paired as well.")
    settings = replace(context_from_flags(flags), n_seq=SEQUENCES)
    if log is not None and not log.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {log.absolute().parent}.", "make it, or choose another.")
    from ggufloop.measure import tasks_report
    from ggufloop.measure.endpoints import nudged
    from ggufloop.measure.tasks import evaluate, noise_between

    with shown() as progress:
        tasks = load_tasks([name.strip() for name in names.split(",")], flags["offline"], num_fewshot, progress)
    opened = open_from_flags(flags, settings, ctx.obj["verbose"])
    loop = opened.llm.loop
    if paired and (loop is None or not loop.is_loop):
        raise UsageError(f"the loop {loop} is one evaluation, the plain model.", "give --K 2 or more.")
    runs: dict[str, Run] = {}
    specs = [None, loop] if paired else [loop]
    if floor and loop is not None:
        specs.append(nudged(loop))
    for spec in specs:
        opened.llm.set_loop(spec)
        with shown() as progress:
            runs["plain" if spec is None else str(spec)] = evaluate(
                opened.llm, tasks, limit, chat, named(progress, terminal.describe(spec))
            )
    if log is not None:
        tasks_report.write_samples(log, runs)
    compared: dict[str, Comparison] = {}
    noise: dict[str, NoiseFloor] = {}
    if paired:
        plain, looped, *again = runs.values()
        compared = _compare(plain, looped)
        noise = {name: noise_between(looped.items[name], run.items[name]) for run in again for name in compared}
    if form == "json":
        asked = {"limit": limit, "num_fewshot": num_fewshot, "chat_template": chat, "served": tasks.served}
        told = tasks_report.record(opened.path, runs, compared, asked, noise)
        click.echo(json.dumps(told, indent=2, default=str))
        return
    for name, run in runs.items():
        click.echo(f"{opened.path.name}, {name}\n\n{run.table()}")
    for name, comparison in compared.items():
        available = sum(tasks.sizes()[task] for task in tasks.members[name])
        click.echo(tasks_report.text(name, comparison, available, noise.get(name)))
    click.echo(tasks_report.others(opened.path, tasks.members), nl=False)
