"""`ggufloop list`: the models known by name, and those that other programs have here."""

from __future__ import annotations

from pathlib import Path

import click

from ggufloop.cli.help import Command
from ggufloop.cli.types import output_option
from ggufloop.models import elsewhere, registry
from ggufloop.table import Cell, Table, columns


@click.command(name="list", cls=Command)
@output_option()
def command(form: str) -> None:
    """List the models known by name, the window to try first on each, and which are downloaded.

    Models of Ollama, LM Studio, llama.cpp and Hugging Face's cache are a group of their own, with what to type.
    Names of your own go into a models.toml of the same form as the shipped one: docs/models.md.
    """
    head = columns("model", "architecture", "layers", "MiB:.1f", "downloaded", "window", "origin of the window")
    rows: list[tuple[Cell, ...]] = []
    shown: set[Path] = set()
    for model in registry.models():
        path = registry.downloaded(model)
        shown |= {path.resolve()} if path else set()
        size = model.bytes or (path.stat().st_size if path else None)
        (a, b), origin = model.suggested_window()
        mib = None if size is None else size / 2**20
        rows.append((model.name, model.architecture, model.layers, mib, path is not None, f"{a}:{b}", origin))
    others = [each for each in elsewhere.found() if each.path.resolve() not in shown]
    if form != "text":
        rows = [(*row, None) for row in rows] + [
            (each.name, None, None, each.bytes / 2**20, True, None, None, each.program) for each in others
        ]
        click.echo(Table((*head, *columns("found in")), rows).render(form), nl=False)
        return
    click.echo(Table(head, rows).render("md"), nl=False)
    click.echo("\nA window rests on published work, not on a gain measured on these files: it may harm.\n"
               "`ggufloop sweep MODEL` measures.")  # fmt: skip
    if others:
        click.echo("\nOther programs have these here; the name is what to type:\n")
        found = [(each.name, each.bytes / 2**20, each.program) for each in others]
        click.echo(Table(columns("model", "MiB:.1f", "found in"), found).render("md"), nl=False)
