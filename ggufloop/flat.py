"""A table as programs read it: plain names of columns, and every setting of a loop in a column of its own.

    flat(table).render("csv")            # pandas.read_csv reads it
    frame(table)                         # or a DataFrame at once

Names are words joined by _, as pandas likes them: "p (Holm)" is p_holm, "+/-" an error. Behind a column `loop` come the
settings of LoopSpec's table, so that a new one has its column here too; those of the plain model are empty, and so is
whatever else there is nothing to say of.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

from ggufloop.errors import UsageError
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.setting import settings
from ggufloop.table import Cell, Column, Table

LOOP = "loop"


def flat(table: Table) -> Table:
    """The table for programs."""
    names = [plain_name(column.name) for column in table.columns]
    if LOOP not in names:
        return Table(tuple(map(Column, names)), [list(map(_cell, row)) for row in table.rows])
    at = names.index(LOOP)
    more = [name for name in settings(LoopSpec) if name not in names]
    columns = [*names[: at + 1], *more, *names[at + 1 :]]
    rows = []
    for row in table.rows:
        loop = loop_cells(row[at])
        rows.append([_cell(v) for v in (*row[: at + 1], *(loop[name] for name in more), *row[at + 1 :])])
    return Table(tuple(map(Column, columns)), rows)


def plain_name(name: str) -> str:
    """A column's name in plain words: 'KL +/-' is kl_error, 't/s' t_per_s."""
    words = name.lower().replace("+/-", " error ").replace("/", " per ")
    return re.sub(r"\W+", "_", words).strip("_")


def loop_cells(text: Cell) -> dict[str, Cell]:
    """The settings of a loop by name, all None for the plain model and for a text that is none."""
    none: dict[str, Cell] = dict.fromkeys(settings(LoopSpec))
    if not isinstance(text, str) or text == PLAIN:
        return none
    try:
        loop = LoopSpec.parse(text)
    except UsageError:
        return none
    return {name: getattr(loop, name) for name in none} | {"window": "{}:{}".format(*loop.window)}


def frame(table: Table) -> Any:
    """What pandas reads of the table for programs. Raises UsageError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise UsageError("a DataFrame needs pandas, which is not installed.", "pip install 'ggufloop[lab]'") from None
    return pandas.read_csv(io.StringIO(flat(table).render("csv")))


def _cell(value: Cell) -> Cell:
    return None if isinstance(value, float) and math.isnan(value) else value
