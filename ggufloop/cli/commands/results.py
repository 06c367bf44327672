"""`ggufloop results DIR`: every sweep and study kept in a folder, listed, or as one table."""

from __future__ import annotations

from pathlib import Path

import click

from ggufloop.cli import terminal
from ggufloop.cli.help import Command
from ggufloop.cli.types import output_option, show_table
from ggufloop.cli.width import tell


@click.command(name="results", cls=Command)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@output_option(help="text lists the files; the others have a row per measure, type and loop.")
def command(folder: Path, form: str) -> None:
    """List the sweeps and studies in a folder, or print all their scores as one table.

    `ggufloop serve --results DIR` shows the same folder in the browser.

    \b
    ggufloop results studies
    ggufloop results studies -o csv > all.csv
    """
    from ggufloop.study.collection import collect

    found = collect(folder)
    for why in found.skipped:
        terminal.note(f"left out: {why}")
    if not found.listing().rows and form == "text":
        others = ", but answers: read answer.md of each" if any(folder.rglob("answer.md")) else ""
        click.echo(f"{folder} holds no sweep and no study{others}.", err=True)
        return
    if form == "text":
        tell(found.listing().render("md"))
    else:
        show_table(form, found.table if form == "md" else found.numbers)
