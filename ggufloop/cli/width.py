"""Results as wide as the terminal that shows them; into a file or a pipe they go whole.

    tell(f"{name}\\n\\n{table.render('md')}")          # the table folds where it is too wide
    remark("note: ...")                              # on stderr, cut between words
    columns(sys.stderr)                              # 0 for what is no terminal

Nothing heavy is imported here: `ggufloop version` prints by it.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

import click

from ggufloop.table import fold

_COLUMNS = 80  # of a terminal that does not say


def columns(stream: TextIO) -> int:
    """Of a terminal, as COLUMNS or the terminal itself says; 0 for what is none."""
    if not stream.isatty():
        return 0
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def fitted(text: str, stream: TextIO) -> str:
    """A text laid out for the terminal that a stream is, or as it is."""
    width = columns(stream)
    return fold(text, width) if width else text


def tell(text: str) -> None:
    """Print a result for eyes, line feeds and all, with its tables as wide as a terminal is."""
    click.echo(fitted(text, sys.stdout), nl=False)


def remark(text: str) -> None:
    """Print a line of words on stderr, which a terminal that is narrower would cut within them."""
    click.echo(fitted(text, sys.stderr), err=True)
