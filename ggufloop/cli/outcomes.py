"""Prints what a measurement found, for the command that made it and for `merge`, which puts it together from shards."""

from __future__ import annotations

import json

import click

from ggufloop.errors import UsageError
from ggufloop.measure import tasks_report
from ggufloop.measure.eval_run import EvalResult, ShardDone


def print_eval(found: EvalResult, form: str) -> None:
    """Tables and paired blocks, or json. Raises UsageError for another form."""
    if form == "json":
        told = tasks_report.record(found.header, found.runs, found.compared, found.noise)
        click.echo(json.dumps(told, indent=2, default=str))
        return
    if form != "text":
        raise UsageError(f"an evaluation has no form {form!r}.", "take -o text or -o json.")
    for name, run in found.runs.items():
        click.echo(f"{found.header['model']}, {name}\n\n{run.table()}")
    for name, comparison in found.compared.items():
        click.echo(tasks_report.text(name, comparison, found.available[name], found.noise.get(name)))


def print_shard(done: ShardDone) -> None:
    """What a shard did, and what is next."""
    click.echo(f"shard {done.shard}: {done.slices} of {done.total} slices are in {done.journal}")
    everyone = done.journal.with_name(f"eval-*-of-{done.shard.of}.jsonl")
    click.echo(f"when all {done.shard.of} are done: ggufloop merge {everyone}")
