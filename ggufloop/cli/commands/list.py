"""`ggufloop list`: the models known by name."""

from __future__ import annotations

import click

from ggufloop.cli.help import Command
from ggufloop.cli.types import output_option
from ggufloop.models import registry
from ggufloop.table import Table, columns


@click.command(name="list", cls=Command)
@output_option()
def command(form: str) -> None:
    """List the models known by name, the window to try first on each, and which are downloaded.

    Names of your own go into a models.toml of the same form as the shipped one: docs/models.md.
    """
    head = columns("model", "architecture", "layers", "MiB:.1f", "downloaded", "window", "origin of the window")
    rows = []
    for model in registry.models():
        path = registry.downloaded(model)
        size = model.bytes or (path.stat().st_size if path else None)
        (a, b), origin = model.suggested_window()
        mib = None if size is None else size / 2**20
        rows.append((model.name, model.architecture, model.layers, mib, path is not None, f"{a}:{b}", origin))
    click.echo(Table(head, rows).render("md" if form == "text" else form), nl=False)
    if form == "text":
        click.echo("\nA window rests on published work, not on a gain measured on these files: it may harm.\n"
                   "`ggufloop sweep MODEL` measures.")  # fmt: skip
