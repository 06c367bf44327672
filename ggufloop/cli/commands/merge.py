"""`ggufloop merge JOURNAL...`: shards of one measurement put together."""

from __future__ import annotations

from pathlib import Path

import click

from ggufloop.cli import terminal
from ggufloop.cli.help import Command
from ggufloop.cli.progress import shown
from ggufloop.cli.types import output_option
from ggufloop.errors import UsageError


@click.command(name="merge", cls=Command)
@click.argument("journals", nargs=-1, metavar="JOURNAL...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Write the journal of the whole too, in DIR/MODEL: a run by itself goes on from it.")  # fmt: skip
@output_option()
def command(journals: tuple[Path, ...], out: Path | None, form: str) -> None:
    """Put the shards of an eval or a sweep together: the answer is that of a run by itself, to the last bit.

    Journals of different models, libraries, settings, tasks, seeds or loops are refused, and so are some of the shards.
    No model is loaded.

    \b
    ggufloop merge results/SmolLM2-135M-Instruct.Q4_1/eval-*-of-4.jsonl
    ggufloop merge results/SmolLM2-135M-Instruct.Q4_1/sweep-*-of-4.jsonl -o csv
    """
    from ggufloop.cli import outcomes
    from ggufloop.measure.merge import headers_of, merge_evals
    from ggufloop.measure.sweep_merge import merge_sweeps

    kinds = {"measures" in header for header in headers_of(journals)}
    if len(kinds) > 1:
        raise UsageError("some of these journals are of a sweep, and some are not.", "merge one measurement at a time.")
    if kinds == {True}:
        outcomes.print_sweep(merge_sweeps(journals, out, terminal.LISTENER), form)
        return
    with shown() as progress:
        found = merge_evals(journals, out, progress, terminal.LISTENER)
    outcomes.print_eval(found, form)
