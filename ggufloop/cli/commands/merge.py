"""`ggufloop merge JOURNAL...`: shards of one measurement put together."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ggufloop.cli.help import Command
from ggufloop.cli.progress import shown
from ggufloop.cli.types import output_option, show_table
from ggufloop.errors import UsageError

_KINDS = ("measures", "source_sha256")
"""What the first line of a sweep and of a study has."""


@click.command(name="merge", cls=Command)
@click.argument("journals", nargs=-1, metavar="JOURNAL...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Write the journal of the whole too, in DIR/MODEL: a run by itself goes on from it.")  # fmt: skip
@output_option()
def command(journals: tuple[Path, ...], out: Path | None, form: str) -> None:
    """Put the shards of an eval, a sweep or a compare together: the answer is that of a run by itself, to the last bit.

    Journals of different models, libraries, settings, tasks, seeds or loops are refused, and so are some of the shards.
    No model is loaded.

    \b
    ggufloop merge results/SmolLM2-135M-Instruct.Q4_1/eval-*-of-4.jsonl
    ggufloop merge results/SmolLM2-135M-Instruct.Q4_1/sweep-*-of-4.jsonl -o csv
    ggufloop merge studies/SmolLM2-135M-Instruct.Q4_1/study-*-of-4.jsonl
    """
    from ggufloop.cli import outcomes
    from ggufloop.measure.merge import headers_of, merge_evals
    from ggufloop.measure.sweep_merge import merge_sweeps
    from ggufloop.study import report
    from ggufloop.study.merge import merge_studies

    headers = headers_of(journals)
    kinds = {next((name for name in _KINDS if name in header), "") for header in headers}
    if len(kinds) > 1:
        raise UsageError("these journals are of different kinds.", "merge one measurement at a time.")
    if kinds == {"measures"}:
        with shown() as progress:
            merged = merge_sweeps(journals, out, progress)
        outcomes.print_sweep(merged, form)
        return
    if kinds == {"source_sha256"}:
        model = Path(headers[0]["model"])
        folder = journals[0].parent if out is None else out / model.stem
        study = merge_studies(journals, folder)
        again = f"ggufloop compare --study {shlex.quote(str(folder / 'study.toml'))}"
        outcomes.print_study(study, folder, again, form)
        if form == "text":
            outcomes.print_files([study])
        if form != "text":
            show_table(form, lambda: report.numbers(study))
        return
    with shown() as progress:
        found = merge_evals(journals, out, progress)
    outcomes.print_eval(found, form)
