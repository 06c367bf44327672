"""One row source, four forms: md for eyes (llama-bench's look), csv, json and jsonl for programs.

    Table(columns("model", "t/s:.2f"), rows).render("md")

A column's format is used by md alone; the others carry every digit. None is an empty cell, null in json. NaN and
infinity, which JSON has no word for, become null there.

    fold(text, 80)                               # where md is to be read on a terminal: tables that are too wide fold

A table that is wider loses its bars; then its cells are wrapped; if a word has no room even so, each row is a block of
"name: value". Nothing is cut, and what goes into a file or a pipe is md.
"""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
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


_GAP = "  "
_TALLEST = 6  # lines of a row; a block is easier to read than higher ones
_BAR = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"\|(?: *:?-+:? *\|)+")
_TOGETHER = re.compile(r"\[[^]]*\]|(?:\+/-|\u00b1) \S+")  # an interval, an error: one word


def fold(text: str, width: int) -> str:
    """A text with each md table in it that is wider than `width` columns laid out to fit them."""
    out: list[str] = []
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        end = at
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        table, at = (lines[at:end], end) if end > at else ([lines[at]], at + 1)
        wide = max(map(len, table)) > width
        out += _folded(table, width) if wide and len(table) > 1 and _RULE.fullmatch(table[1]) else table
    return "\n".join(out)


def block(names: Iterable[str], cells: Iterable[str], width: int) -> list[str]:
    """A row as lines of "name: value"; what is empty is left out."""
    lines: list[str] = []
    for name, cell in zip(names, cells, strict=True):
        part = f"{name}: {cell}" if name else cell
        if not cell:
            continue
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" | {part}"
        else:
            lines += textwrap.wrap(part, width, initial_indent=_GAP * bool(lines), subsequent_indent=_GAP * 2,
                                   break_on_hyphens=False)  # fmt: skip
    return lines


def _folded(table: Sequence[str], width: int) -> list[str]:
    """The lines of an md table that is too wide."""
    head, rule, *rows = [[c.strip().replace("\\|", "|") for c in _BAR.split(line.strip()[1:-1])] for line in table]
    cells = [[_TOGETHER.sub(lambda m: m[0].replace(" ", "\0"), c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    least = [max(len(word) for cell in column for word in cell.split(" ")) for column in zip(*cells, strict=True)]
    least[0] = widths[0]  # a line without it goes on with the row above
    room = width - len(_GAP) * (len(widths) - 1)
    if sum(least) > room:
        return _blocks(head, rows, width)
    while sum(widths) > room:  # the widest column gives way
        at = max((w, i) for i, w in enumerate(widths) if w > least[i])[1]
        widths[at] -= 1
    right = [mark.endswith(":") for mark in rule]
    out = [_laid(row, widths, right) for row in cells]
    if max(map(len, out)) > _TALLEST:
        return _blocks(head, rows, width)
    return [*out[0], _GAP.join("-" * w for w in widths), *(line for row in out[1:] for line in row)]


def _blocks(head: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> list[str]:
    blocks = [block(head, row, width) for row in rows]
    return [line for i, lines in enumerate(blocks) for line in ([""] * (i > 0) + lines)]


def _laid(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    """A row of as many lines as its tallest cell has."""
    wrapped = [textwrap.wrap(c, w, break_long_words=False, break_on_hyphens=False) if c else [""]
               for c, w in zip(cells, widths, strict=True)]  # fmt: skip
    lines = []
    for i in range(max(map(len, wrapped))):
        parts = [part[i] if i < len(part) else "" for part in wrapped]
        padded = [p.rjust(w) if r else p.ljust(w) for p, w, r in zip(parts, widths, right, strict=True)]
        lines.append(_GAP.join(padded).replace("\0", " ").rstrip())
    return lines
