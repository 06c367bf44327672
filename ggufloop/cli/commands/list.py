"""`ggufloop list`: the models known by name, and those that other programs have here."""

from __future__ import annotations

from pathlib import Path

import click

from ggufloop.cli.help import Command
from ggufloop.cli.types import output_option, show
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
    theirs: list[tuple[Cell, ...]] = [(each.name, each.bytes / 2**20, each.program) for each in others]
    every = Table(
        (*head, *columns("found in")),
        [(*row, None) for row in rows] + [(name, None, None, mib, True, None, None, at) for name, mib, at in theirs],
    )
    show(form, lambda: _text(Table(head, rows)) + _others(theirs), every.records, lambda: every)


def _text(table: Table) -> str:
    """The table, with what most rows say said once below it."""
    name, what = registry.RULE_OF_THUMB.split(": ")
    head = columns("model", "architecture", "layers", "MiB:.0f", "here", "window", "origin of the window")
    rows = [[*row[:-1], name if row[-1] == registry.RULE_OF_THUMB else row[-1]] for row in table.rows]
    return (
        f"{Table(head, rows).render('md')}\n{name}: {what}.\n"
        "A window rests on published work, not on a gain measured on these files: it may harm.\n"
        "`ggufloop sweep MODEL` measures.\n"
    )


def _others(rows: list[tuple[Cell, ...]]) -> str:
    """What other programs have, if they have anything."""
    table = Table(columns("model", "MiB:.0f", "found in"), rows).render("md")
    return f"\nOther programs have these here; the name is what to type:\n\n{table}" if rows else ""
