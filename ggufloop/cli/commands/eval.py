"""`ggufloop eval MODEL --tasks a,b`: lm-eval's tasks under a loop; with --paired, the loop against the plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.cli.context import context_from_flags, context_options, model_and_loop
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_options
from ggufloop.cli.options import (
    check_template,
    model_options,
    tasks_from_flags,
    tasks_options,
    template_from_flags,
    template_options,
)
from ggufloop.cli.progress import shown
from ggufloop.cli.shards import parts_from_flags, shard_options
from ggufloop.cli.types import output_option
from ggufloop.errors import UsageError
from ggufloop.tasks.loading import BENCHMARKS, TASKS


@click.command(name="eval", cls=Command)
@model_options
@tasks_options(f"Tasks, groups or tags of lm-eval. Without a hub: {', '.join((*TASKS, *BENCHMARKS))}.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions of each task.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N",
              help="N questions of each name in --tasks, drawn at random, always the same ones.")  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N",
              help="Worked examples before each question; without it, as many as the task has it.")  # fmt: skip
@click.option("--apply-chat-template", "chat", is_flag=True, help="Ask in the model's chat template.")
@template_options
@click.option("--paired", is_flag=True, help="Run plain and looped on the same questions and compare them.")
@click.option("--noise-floor", "floor", is_flag=True, help="With --paired: run the loop again with its damping "
              "moved by 1e-5, and say how far that differs.")  # fmt: skip
@click.option("--log-samples", "log", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
              help="Write each question with its answers and their scores to FILE, one per line.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Keep every answer in DIR/MODEL/eval.jsonl; a second loop finds plain's there.")  # fmt: skip
@shard_options
@loop_options
@output_option("json", "csv")
@context_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    tasks: str | None,
    include_path: str | None,
    limit: int | None,
    sample: int | None,
    num_fewshot: int | None,
    chat: bool,
    paired: bool,
    floor: bool,
    log: Path | None,
    out: Path | None,
    form: str,
    **flags: Any,
) -> None:
    """Run tasks of lm-eval, looped or not. Needs the extra 'eval'.

    The answers of a question are scored after its prompt, which is read once; docs/tasks.md says what that means for a
    loop and what the tasks that ship here ask. After Ctrl-C the same command goes on where it was.

    \b
    ggufloop eval smollm2-135m --tasks wordnet_definitions --limit 500
    ggufloop eval smollm2-135m --tasks mmlu_dev,brackets --window 12:16 --K 3 --paired
    ggufloop eval smollm2-135m --tasks mine.csv --window 12:16 --paired
    ggufloop eval smollm2-135m --tasks mmlu --window 12:16 --paired --out results --shard 2/4
    """
    names = tasks_from_flags(tasks, include_path)
    if not names:
        known = ", ".join((*TASKS, *BENCHMARKS))
        raise UsageError(
            "no task is named.", f"name some with --tasks: {known}, any of lm-eval's, or a file: mine.csv."
        )
    if not chat:
        check_template(flags)
    parts = parts_from_flags(flags, out)
    settings = context_from_flags(flags)
    if log is not None and parts.shard is not None:
        raise UsageError("--log-samples is of a whole run, and this is a shard of one.",
                         "give it to `eval --out DIR` after `ggufloop merge --out DIR`.")  # fmt: skip
    if log is not None and not log.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {log.absolute().parent}.", "make it, or choose another.")
    from ggufloop.cli import outcomes
    from ggufloop.measure import tasks_report
    from ggufloop.measure.eval_run import EvalPlan, EvalResult, run_eval
    from ggufloop.measure.planning import plan_eval
    from ggufloop.measure.slices import ShardDone
    from ggufloop.measure.workers import eval_by_workers

    plan = EvalPlan(names, limit, num_fewshot, chat, paired, floor, flags["offline"], sample, include_path)
    if flags["window"] is None and flags["recipe"] is None:
        plan.loops(None)  # refuses a comparison before anything is read
    with shown() as progress:
        loaded = plan.load(progress)
    path, loop, _ = model_and_loop(flags)
    plan = replace(plan, template=template_from_flags(flags, path))
    try:
        with shown() as progress:
            how: Any = {"verbose": ctx.obj["verbose"], "progress": progress}
            found: EvalResult | ShardDone
            if parts.plan:
                planned = plan_eval(path, loop, plan, settings, shards=parts.of, speed=parts.speed, tasks=loaded,
                                    progress=progress)  # fmt: skip
                outcomes.print_plan(path, planned, form)
                return
            if parts.workers > 1 and out is not None:
                found = eval_by_workers(parts.workers, path, loop, plan, out, settings, **how)
            else:
                found = run_eval(path, loop, plan, out, settings, tasks=loaded, shard=parts.shard, **how)
    except KeyboardInterrupt:
        click.echo("stopped; what is answered is kept, and the same command goes on.", err=True)
        raise
    if isinstance(found, ShardDone):
        outcomes.print_shard(found)
        return
    if log is not None:
        tasks_report.write_samples(log, found.runs)
    outcomes.print_eval(found, form)
