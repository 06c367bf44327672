"""`ggufloop longctx MODEL`: what loops do to long contexts, on RULER's tasks that need no download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import terminal
from ggufloop.cli.context import batch_options, context_from_flags, resolve_model
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_list_options, loop_suggestion, loops_from_flags
from ggufloop.cli.options import (
    check_template,
    model_options,
    split_list,
    template_from_flags,
    template_options,
    whole_numbers,
)
from ggufloop.cli.progress import shown
from ggufloop.cli.texts import text_from_flags, text_options
from ggufloop.cli.types import output_option, show_table
from ggufloop.cli.width import tell
from ggufloop.measure import longctx_run as run
from ggufloop.opening import check_loops
from ggufloop.tasks.ruler import PROSE_TASKS, TASKS


@click.command(name="longctx", cls=Command)
@model_options
@loop_list_options
@text_options
@click.option("--tasks", metavar="NAME,...", help=f"RULER's {', '.join(TASKS)} (default: all); with --text also "
              f"{', '.join(PROSE_TASKS)}.")  # fmt: skip
@click.option("-c", "--ctx-size", "lengths", metavar="N,...", default=",".join(map(str, run.LENGTHS)),
              show_default=True, help="Lengths in tokens of this model, prompt and answer together.")  # fmt: skip
@click.option("-n", "--samples", "samples", type=click.IntRange(min=2), metavar="N", default=run.SAMPLES,
              show_default=True, help="Samples of each task at each length.")  # fmt: skip
@click.option("-s", "--seed", type=click.IntRange(min=0), default=run.SEED, show_default=True, help="Of the samples.")
@click.option("--apply-chat-template", "chat", is_flag=True, help="Ask in the model's chat template.")
@template_options
@click.option("--journal", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
              help="Keep every answer here and go on from it (default: longctx-MODEL.jsonl).")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png",
              help="Draw scores over length, a line per loop.")  # fmt: skip
@output_option()
@batch_options
@click.pass_context
def command(
    ctx: click.Context, /, text: str | None, dataset: str | None, tasks: str | None, lengths: str, samples: int,
    seed: int, chat: bool, journal: Path | None, plot: Path | None, form: str, **flags: Any,
) -> None:  # fmt: skip
    """What loops do to long contexts: RULER's tasks at several lengths, each loop against plain on the same samples.

    Answers are greedy and kept in a file; after Ctrl-C the same command goes on. docs/longctx.md says what is asked.

    \b
    ggufloop longctx smollm2-135m --window 12:16 --K 2,4,8 -c 1024,2048
    """
    if plot is not None:
        from ggufloop.figures import style

        style.check_target(plot)
    if not chat:
        check_template(flags)
    source = text_from_flags(text, dataset, flags["offline"]) if text or dataset else None
    named = tuple(split_list(tasks, "--tasks")) if tasks else TASKS
    plan = run.LongPlan(tuple(whole_numbers(lengths, "-c")), named, samples, seed, chat, source)
    settings = context_from_flags(flags, n_ctx=max(plan.lengths))
    path = resolve_model(flags)
    plan = replace(plan, template=template_from_flags(flags, path))
    loops = loops_from_flags(flags.pop("window"), loop_suggestion(path), **flags)
    check_loops(path, loops)
    try:
        with shown() as progress:
            found = run.run_long_context(path, loops, plan, journal, settings, verbose=ctx.obj["verbose"],
                                     progress=progress)  # fmt: skip
    except KeyboardInterrupt:
        click.echo(f"stopped; {run.journal_path(path, journal)} keeps what is done.", err=True)
        raise
    if form == "text":
        tell(f"{run.table(found).render('md')}\n{run.notes(found)}\n")
    else:
        show_table(form, lambda: run.table(found) if form == "md" else run.numbers(path, found))
    if plot is not None:
        from ggufloop.figures import style
        from ggufloop.figures.longctx import length_figure

        style.save(length_figure(found, path.stem), plot)
        terminal.note(f"drew {plot}.")
