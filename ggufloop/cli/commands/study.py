"""`ggufloop study run|report`: a protocol on a model, step by step, and what its scores say."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.backend.settings import ContextSettings
from ggufloop.cli import terminal
from ggufloop.cli.context import batch_options, context_from_flags, resolve_model
from ggufloop.cli.help import Command, Group
from ggufloop.cli.options import model_options, split_list
from ggufloop.cli.progress import shown
from ggufloop.cli.shards import Parts, parts_from_flags, shard_options
from ggufloop.cli.types import output_option, show
from ggufloop.errors import UsageError
from ggufloop.measure.planning import timed
from ggufloop.models.registry import entry_for
from ggufloop.study import protocol_report, scores
from ggufloop.study.protocol import Protocol, ProtocolStep, read_protocol
from ggufloop.study.protocol_run import plan_step, run_step

_PROTOCOL = click.argument("protocol", type=click.Path(path_type=Path, dir_okay=False))


@click.group(name="study", cls=Group)
def command() -> None:
    """A protocol, written before it is run: many tasks and texts under many loops, and what comes out.

    \b
    ggufloop study run docs/protocol.toml --model smollm2-135m --plan --tokens-per-second 700
    ggufloop study run docs/protocol.toml --model smollm2-135m --out results
    ggufloop study report docs/protocol.toml results/*.csv.xz --plot forest.png
    """


@command.command(name="run", cls=Command)
@_PROTOCOL
@model_options
@click.option("--steps", metavar="NAME,...", help="Only these steps of the protocol.")
@click.option("--loops", "only", metavar="NAME,...", help="Only these loops of them and no placebo, to be first "
              "where all takes too long; the rest is a later call.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", default="results",
              show_default=True, help="Journals by step, and the scores in MODEL.csv.xz.")  # fmt: skip
@shard_options
@batch_options
def run(
    protocol: Path,
    steps: str | None,
    only: str | None,
    out: Path,
    **flags: Any,
) -> None:
    """Run a protocol on a model, or the steps of it that are left. After Ctrl-C the same command goes on.

    Machines share it by --shard I/N into one DIR, or into folders that are copied into one. The same command without
    --shard then finds their answers there, and judges. --workers are for tasks and texts.
    """
    plan = read_protocol(protocol)
    parts = parts_from_flags(flags, out)
    settings = context_from_flags(flags)
    path = resolve_model(flags)
    entry = entry_for(path)
    todo = plan.steps_for("" if entry is None else entry.name)
    if steps is not None:
        words = split_list(steps, "--steps")
        unknown = next((word for word in words if word not in [step.name for step in todo]), None)
        if unknown is not None:
            raise UsageError(
                f"no step {unknown!r} is for this model.", f"its steps: {', '.join(s.name for s in todo)}."
            )
        todo = [step for step in todo if step.name in words]
    chosen = split_list(only, "--loops") if only is not None else []
    known = dict.fromkeys([*plan.loops, *(name for step in todo for name in step.loops)])
    if unknown_loop := next((name for name in chosen if name not in known), None):
        raise UsageError(f"no loop {unknown_loop!r} is in this protocol.", f"its loops: {', '.join(known)}.")
    if chosen:
        kept = [replace(step, loops=tuple(name for name in step.loops if name in chosen)) for step in todo]
        todo = [step for step in kept if step.loops]
        if not todo:
            raise UsageError(f"none of these steps has {' or '.join(chosen)}.", "name others with --steps or --loops.")
    if parts.plan:
        _tell_plan(path, plan, todo, settings, parts, bool(chosen))
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(step.types for step in todo):
        from ggufloop.figures import page

        page.check(out)
    target = out / f"{path.stem}.csv.xz"
    found = scores.read(target) if target.exists() else []
    try:
        for step in todo:
            with shown() as progress:
                new = run_step(path, plan, step, out, settings, part=bool(chosen), shard=parts.shard,
                               workers=parts.workers, progress=progress)  # fmt: skip
            if parts.shard is not None:
                terminal.note(f"{step.name}: shard {parts.shard} is done.")
                continue
            found, gone = scores.joined(found, new)
            if gone:
                terminal.note(f"left out, as plain was computed elsewhere and answers otherwise: {'; '.join(gone)}. "
                              "With these in --loops too they are measured beside it.")  # fmt: skip
            scores.write(target, found)
            for file in sorted((out / step.name / path.stem).rglob("study.jsonl")) if step.types else ():
                terminal.note(
                    f"{step.name}: what the files are worth is in {_published(file, protocol, path, step, out)}."
                )
            terminal.note(f"{step.name}: done, its scores are in {target}.")
    except KeyboardInterrupt:
        terminal.note("stopped; what is done is kept, and the same command goes on.")
        raise
    if parts.shard is not None:
        terminal.note(f"its answers are in {out}; when all shards are there, the same command without --shard judges.")
        return
    _tell(protocol_report.by_protocol(plan, found), "text")


def _published(file: Path, protocol: Path, model: Path, step: ProtocolStep, out: Path) -> Path:
    """The page of a ladder's study."""
    from ggufloop.figures import page
    from ggufloop.study import file as studies

    again = shlex.join(
        ["ggufloop", "study", "run", str(protocol), "--model", str(model), "--steps", step.name, "--out", str(out)]
    )
    return page.publish(studies.read(file), file.parent, again)


def _tell_plan(
    path: Path, plan: Protocol, todo: list[ProtocolStep], settings: ContextSettings, parts: Parts, part: bool
) -> None:
    with shown() as progress, timed(path, settings, True, parts.speed, progress) as (speed, _, _):
        how = "timed here" if parts.speed is None else "as given"
    total = 0.0
    for step in todo:
        with shown() as progress:
            planned = plan_step(path, plan, step, speed=speed, part=part, progress=progress)
        hours = sum(each.total for each in planned)
        items = sum(cell.items for each in planned for cell in each.cells)
        tokens = sum(cell.tokens for each in planned for cell in each.cells)
        total += hours
        click.echo(f"{step.name:16} {items:8,} items  {tokens / 1e6:8.2f} M tokens  {hours:7.2f} h")
    each = f", {total / parts.shard.of:.1f} h for each of {parts.shard.of} shards" if parts.shard is not None else ""
    click.echo(f"{path.name}: {total:.1f} h at {speed:.0f} plain tokens per second, {how}{each}.")


@command.command(name="report", cls=Command)
@_PROTOCOL
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, dir_okay=False), metavar="SCORES...")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png",
              help="Draw the primary loops as a forest plot.")  # fmt: skip
@output_option()
def report(protocol: Path, files: tuple[Path, ...], plot: Path | None, form: str) -> None:
    """What scores that `study run` wrote say, of one model or several. No model is run."""
    if not files:
        raise UsageError("no scores are named.", "name the MODEL.csv.xz that `ggufloop study run` wrote.")
    plan = read_protocol(protocol)
    rows = protocol_report.by_protocol(plan, [score for file in files for score in scores.read(file)])
    _tell(rows, form)
    if plot is not None:
        from ggufloop.figures import forest, style

        style.save(forest.forest(rows, "Loops against plain"), plot)
        terminal.note(f"drew {plot}.")


def _tell(rows: list[protocol_report.JudgedLoop], form: str) -> None:
    show(form, lambda: protocol_report.text(rows), lambda: protocol_report.table(rows).records(),
         lambda: protocol_report.table(rows), lambda: protocol_report.numbers(rows))  # fmt: skip
