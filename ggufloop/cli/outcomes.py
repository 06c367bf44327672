"""Prints what a measurement found, for the command that made it and for `merge`, which puts it together from shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from ggufloop.cli.types import show_table
from ggufloop.cli.width import tell
from ggufloop.errors import UsageError
from ggufloop.measure import sweep_report, tasks_report
from ggufloop.measure.eval_run import EvalResult
from ggufloop.measure.planning import Planned
from ggufloop.measure.slices import ShardDone
from ggufloop.measure.sweep_run import SweepResult
from ggufloop.study import across, pareto, report
from ggufloop.study.file import Study


def print_eval(found: EvalResult, form: str) -> None:
    """Tables and paired blocks, json, or a row per loop and task. Raises UsageError for another form."""
    if form == "json":
        told = tasks_report.record(found.header, found.runs, found.compared, found.noise)
        click.echo(json.dumps(told, indent=2, default=str))
        return
    if form == "csv":
        show_table(form, lambda: tasks_report.numbers(found))
        return
    if form != "text":
        raise UsageError(f"an evaluation has no form {form!r}.", "take -o text, json or csv.")
    for name, run in found.runs.items():
        tell(f"{found.header['model']}, {name}\n\n{run.table()}\n")
    for name, comparison in found.compared.items():
        click.echo(tasks_report.text(name, comparison, found.available[name], found.noise.get(name)))
    click.echo(tasks_report.others(found.header, found.available), nl=False)


def print_sweep(found: SweepResult, form: str) -> None:
    """Words, a table, or json."""
    if form == "text":
        tell(sweep_report.text(found))
    elif form == "json":
        click.echo(json.dumps(sweep_report.record(found), indent=2))
    else:
        show_table(form, lambda: (sweep_report.table if form == "md" else sweep_report.numbers)(found))
        for outcome in found.outcomes:
            click.echo(f"{outcome.measure.name}: {sweep_report.verdict(outcome)}", err=True)


def print_study(study: Study, folder: Path, again: str, form: str, first: bool = True, text: bool = False) -> None:
    """Its page, made anew, and for eyes its table and verdicts; other forms are of all studies of a call together.
    again: the command that goes on with it. text: name its text as well."""
    from ggufloop.figures import page

    page_path = page.publish(study, folder, again)
    if form == "text":
        title = study.header.model + (f", {study.header.text}" if text else "")
        tell("\n" * (not first) + f"{title}\n\n{report.shown(study).render('md')}\n")
        tell("".join(f"{line}\n" for line in report.summary(study)))
        click.echo(f"\nreport: {page_path}")


def print_files(studies: Sequence[Study]) -> None:
    """For eyes: which files are worth their bytes, and loops against the next larger file."""
    for what in (pareto, across):
        if said := what.summary(studies):
            tell(f"\n{what.table(studies).render('md')}\n")
            tell("".join(f"{line}\n" for line in said))


def print_plan(path: Path, planned: Planned, form: str) -> None:
    """What it will take."""
    if form == "json":
        click.echo(json.dumps(planned.record(), indent=2))
    elif form == "text":
        tell(f"{path.name}\n\n{planned.table().render('md')}\n")
        tell("".join(f"{line}\n" for line in planned.sentences()))
    else:
        show_table(form, planned.table)


def print_shard(done: ShardDone) -> None:
    """What a shard did, and what is next."""
    click.echo(f"shard {done.shard}: {done.slices} of {done.total} {done.what} are in {done.journal}")
    if done.note:
        click.echo(done.note)
    everyone = done.journal.with_name(done.journal.name.replace(f"-{done.shard.number}-of-", "-*-of-"))
    click.echo(f"when all {done.shard.of} are done: ggufloop merge {everyone}")
