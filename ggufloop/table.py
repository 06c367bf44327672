"""One row source, four forms: md for eyes (llama-bench's look), csv, json and jsonl for programs.

    Table(columns("model", "t/s:.2f"), rows).render("md")

A column's format is used by md alone; the others carry every digit. None is an empty cell, null in json. NaN and
infinity, which JSON has no word for, become null there.

    fold(text, 80)                               # where md is to be read on a terminal: tables that are too wide fold

A table that is wider loses its bars; then its cells are wrapped; then its columns are printed in groups, one below the
other, each with those that tell the rows apart; if even that has no room, each row is a block of "name: value". Nothing
is cut, and what goes into a file or a pipe is md.
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
_NAMED = re.compile(r" *\S(?:.{0,20}?\S)?  +")
_TOGETHER = re.compile(r"\[[^]]*\]|(?:\+/-|\u00b1) \S+")  # an interval, an error: one word


def fold(text: str, width: int) -> str:
    """A text whose md tables, and lines of words, are laid out to fit `width` columns."""
    out: list[str] = []
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        end = at
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        if end == at:
            out += _sentence(lines[at], width)
            at += 1
            continue
        table, at = lines[at:end], end
        wide = max(map(len, table)) > width
        out += _folded(table, width) if wide and len(table) > 1 and _RULE.fullmatch(table[1]) else table
    return "\n".join(out)


def _sentence(line: str, width: int) -> list[str]:
    """A line of words, cut between them; behind a name and spaces it goes on below what stands there."""
    if len(line) <= width:
        return [line]
    lead = len(line) - len(line.lstrip())
    named = _NAMED.match(line)
    indent = " " * (lead + 2 if named is None else named.end())
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


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
    right = [mark.endswith(":") for mark in rule]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    least = [max(len(word) for cell in column for word in cell.split(" ")) for column in zip(*cells, strict=True)]
    least[0] = widths[0]  # a line without it goes on with the row above
    room = width - len(_GAP) * (len(widths) - 1)
    if sum(least) <= room:
        narrow = list(widths)
        while sum(narrow) > room:  # the widest column gives way
            narrow[max((w, i) for i, w in enumerate(narrow) if w > least[i])[1]] -= 1
        out = [_laid(row, narrow, right) for row in cells]
        if max(map(len, out)) <= _TALLEST:
            return [*out[0], _GAP.join("-" * w for w in narrow), *(line for row in out[1:] for line in row)]
    parts = _parts(cells, widths, width)
    if not parts:
        blocks = [block(head, row, width) for row in rows]
        return [line for i, lines in enumerate(blocks) for line in ([""] * (i > 0) + lines)]
    found = []
    for i, part in enumerate(parts):
        lines = [_laid([row[c] for c in part], [widths[c] for c in part], [right[c] for c in part]) for row in cells]
        found += [""] * (i > 0) + [
            *lines[0],
            _GAP.join("-" * widths[c] for c in part),
            *(x for y in lines[1:] for x in y),
        ]
    return found


def _parts(cells: Sequence[Sequence[str]], widths: Sequence[int], width: int) -> list[list[int]]:
    """The columns in groups that fit, each after those that tell the rows apart; none if that cannot be."""
    rows, columns = cells[1:], range(len(widths))
    pairs = [[0], *([0, i] for i in columns[1:])]
    keys = next((k for k in pairs if len({tuple(row[i] for i in k) for row in rows}) == len(rows)), None)
    if keys is None:
        return []
    parts = [keys]
    for i in columns:
        if i in keys:
            continue
        if sum(widths[c] + len(_GAP) for c in parts[-1]) + widths[i] > width:
            parts.append(keys)
        parts[-1] = [*parts[-1], i]
    fits = all(sum(widths[c] + len(_GAP) for c in part) - len(_GAP) <= width for part in parts)
    return [part for part in parts if part != keys] if fits else []


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
