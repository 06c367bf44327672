"""`ggufloop sweep MODEL`: many loops against plain on the same items, a verdict on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import outcomes, terminal
from ggufloop.cli.context import batch_options, context_from_flags, resolve_model
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_list_options
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
from ggufloop.cli.texts import text_from_flags, text_options
from ggufloop.cli.types import output_option
from ggufloop.cli.windows import WIDTH, sweep_loops
from ggufloop.errors import UsageError
from ggufloop.measure.planning import plan_sweep
from ggufloop.measure.selection import FINALISTS
from ggufloop.measure.slices import ShardDone, file_name
from ggufloop.measure.sweep_run import (
    CONTEXT,
    SEED,
    SweepPlan,
    SweepResult,
    journal_path,
    run_shard,
    run_sweep,
    save_winner,
)
from ggufloop.measure.verdict import ACCURACY, NATS, WORTHS
from ggufloop.measure.workers import sweep_by_workers


@click.command(name="sweep", cls=Command)
@model_options
@click.option("--start", metavar="N,A:B,...", help="First layers of the windows, without --window: 8,10,12 or 8:20:2 "
              "(half-open; default: about 15, spread over the model).")  # fmt: skip
@click.option("--width", metavar="N,A:B,...", help=f"Their widths (default {WIDTH}); 1:7 is 1 to 6.")
@loop_list_options
@text_options
@tasks_options("Measure accuracy on tasks of lm-eval, one verdict for each.")
@click.option("-c", "--ctx-size", "chunk", type=click.IntRange(min=4), metavar="N", default=CONTEXT,
              show_default=True, help="Tokens of a chunk of the text; half of them are scored.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Use the first N chunks (default: all).")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use the first N questions of each task.")
@click.option("--apply-chat-template", "chat", is_flag=True, help="Ask in the model's chat template.")
@template_options
@click.option("--budget", metavar="TIME", help="Use as many items as fit into this time: 90s, 30m, 2h.")
@click.option("--no-racing", is_flag=True, help="Score every loop on all items.")
@click.option("--worth", type=float, metavar="X", help="The smallest gain that would matter (default: "
              f"{WORTHS[ACCURACY]:g} of accuracy, {WORTHS[NATS]:g} nats per token).")  # fmt: skip
@click.option(
    "--looks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Verdicts planned on this journal as it grows, which share the 5 %; one more confirms nothing.",
)
@click.option("--finalists", type=click.IntRange(min=1), default=FINALISTS, show_default=True, metavar="N",
              help="How many loops the race leaves for the last items.")  # fmt: skip
@click.option(
    "-s", "--seed", type=click.IntRange(min=0), default=SEED, show_default=True, help="Of the random order of items."
)
@click.option("--noise-floor", "floor", is_flag=True, help="Score the leading loop again with its damping moved by "
              "1e-5: a gain no larger than that difference is arithmetic.")  # fmt: skip
@click.option("--journal", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
              help="Keep every score here and go on from it (default: sweep-MODEL.jsonl).")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Keep it in DIR/MODEL/sweep.jsonl instead, where `ggufloop results` finds it.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png",
              help="Draw gains over start, width and K; with several measures one file each.")  # fmt: skip
@click.option("--save", is_flag=True, help="Write a loop that helps into your models.toml, for --window auto.")
@shard_options
@output_option()
@batch_options
@click.pass_context
def command(
    ctx: click.Context, /, text: str | None, dataset: str | None, tasks: str | None,
    include_path: str | None, budget: str | None,
    no_racing: bool, journal: Path | None, out: Path | None, plot: Path | None, save: bool, form: str, **flags: Any,
) -> None:  # fmt: skip
    """Which window, K, solver, beta, mode or kv helps this model? Every loop is scored against plain on the same items.

    The worse loops are dropped early, and each is judged on all items it was scored on, with Holm's correction over all
    loops: it helps, hurts, has no effect larger than --worth, or the data cannot tell. Scores are kept in a file; after
    Ctrl-C the same command goes on.

    \b
    ggufloop sweep smollm2-135m --start 8:20:2 --width 2,4 --K 2,3 --text pydoc --chunks 120
    ggufloop sweep smollm2-135m --window 10:14,12:16 --K 2:5 --kv first,frozen --tasks wordnet_definitions
    """
    if not flags["chat"]:
        check_template(flags)
    parts = parts_from_flags(flags, out or journal)
    if parts.workers > 1 and out is None and not parts.plan:
        raise UsageError("--workers keep several journals.", "give --out DIR instead of --journal.")
    if save and tasks is None:
        terminal.note("a gain in log-probability on one text says little about answers; --tasks measures those.")
    if plot is not None:
        from ggufloop.figures import style

        style.check_target(plot)
    named = tasks_from_flags(tasks, include_path)
    own = {
        name: flags.pop(name) for name in ("chunk", "chunks", "limit", "chat", "worth", "looks", "finalists", "seed",
                                       "floor")
    }  # fmt: skip
    source = text_from_flags(text, dataset, flags["offline"]) if text or dataset else None
    plan = SweepPlan(
        source, named, budget=budget, racing=not no_racing, offline=flags["offline"], include_path=include_path, **own
    )
    settings = context_from_flags(flags, n_ctx=plan.context)
    path = resolve_model(flags)
    plan = replace(plan, template=template_from_flags(flags, path))
    loops = sweep_loops(path, flags)
    journal = journal or (out and out / path.stem / file_name("sweep", parts.shard))
    try:
        with shown() as progress:
            how: Any = {"verbose": ctx.obj["verbose"], "progress": progress}
            result: SweepResult | ShardDone
            if parts.plan:
                planned = plan_sweep(path, loops, plan, settings, shards=parts.of, speed=parts.speed,
                                     progress=progress)  # fmt: skip
                outcomes.print_plan(path, planned, form)
                return
            if parts.workers > 1 and out is not None:
                result = sweep_by_workers(parts.workers, path, loops, plan, out, settings, **how)
            elif parts.shard is None:
                result = run_sweep(path, loops, plan, journal, settings, **how)
            else:
                result = run_shard(path, loops, plan, parts.shard, journal_path(path, journal), settings, **how)
    except KeyboardInterrupt:
        where = out and out / path.stem if parts.workers > 1 else journal_path(path, journal)
        click.echo(f"stopped; {where} keeps what is done, and the same command goes on.", err=True)
        raise
    if isinstance(result, ShardDone):
        outcomes.print_shard(result)
        return
    outcomes.print_sweep(result, form)
    if plot is not None:
        _draw(plot, result)
    if save:
        terminal.note(save_winner(path, loops, result.outcomes))


def _draw(plot: Path, result: SweepResult) -> None:
    from ggufloop.figures import style
    from ggufloop.figures.sweep import heat_map

    for outcome in result.outcomes:
        target = plot if len(result.outcomes) == 1 else plot.with_stem(f"{plot.stem}-{Path(outcome.measure.name).stem}")
        style.save(heat_map(outcome, result.loops, result.path.name), target)
        terminal.note(f"drew {target}.")
