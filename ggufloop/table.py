"""One row source, four forms: md for eyes (llama-bench's look), csv, json and jsonl for programs.

    Table(columns("model", "t/s:.2f"), rows).render("md")

A column's format is used by md alone; the others carry every digit. None is an empty cell, null in json. NaN and
infinity, which JSON has no word for, become null there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ggufloop.errors import UsageError, nearest
from ggufloop.reading import finite

FORMS = ("md", "csv", "json", "jsonl")

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Column:
    """A column of a table. form: format of its numbers in md."""

    name: str
    form: str = ""


def columns(*words: str) -> tuple[Column, ...]:
    """Columns, each written as its name or as name:form."""
    return tuple(Column(name, form) for name, _, form in (word.partition(":") for word in words))


@dataclass(frozen=True)
class Table:
    """Columns and rows of as many cells."""

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Cell]]

    def render(self, form: str) -> str:
        """The table as text, every line ended. Raises UsageError for a form that is not one of FORMS."""
        renderers = {"md": self._md, "csv": self._csv, "json": self._json, "jsonl": self._jsonl}
        if form not in renderers:
            raise UsageError(f"output form {form!r} is not known.", nearest(form, FORMS))
        return renderers[form]()

    def records(self) -> list[dict[str, Cell]]:
        """One mapping per row, as JSON has it."""
        return [finite({c.name: v for c, v in zip(self.columns, row, strict=True)}) for row in self.rows]

    def _md(self) -> str:
        cells = [[_shown(v, c.form) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]
        numeric = [not any(isinstance(row[i], (str, bool)) for row in self.rows) for i in range(len(self.columns))]
        widths = [max(3, len(c.name), *(len(row[i]) for row in cells)) for i, c in enumerate(self.columns)]
        lines = [[c.name for c in self.columns], *cells]
        text = [
            "| "
            + " | ".join(v.rjust(w) if n else v.ljust(w) for v, w, n in zip(line, widths, numeric, strict=True))
            + " |"
            for line in lines
        ]
        rule = (
            "| " + " | ".join("-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)) + " |"
        )
        return "\n".join([text[0], rule, *text[1:]]) + "\n"

    def _csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(c.name for c in self.columns)
        writer.writerows(self.rows)
        return out.getvalue()

    def _json(self) -> str:
        return json.dumps(self.records(), indent=2) + "\n"

    def _jsonl(self) -> str:
        return "".join(json.dumps(record) + "\n" for record in self.records())


def _shown(value: Cell, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form) if isinstance(value, (int, float)) else value.replace("|", "\\|").replace("\n", " ")
