"""The look of llama-bench's table, and its other forms: rows are printed as they are measured.

Columns that say nothing (library, loop settings left at their defaults) are left out of md. On a terminal that is too
narrow, what is the same in every row is said once; if that is not enough, each row is a block of lines.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import click

from ggufloop.cli import width
from ggufloop.flat import loop_cells
from ggufloop.measure.bench import Variant
from ggufloop.measure.bench_run import BenchRecord
from ggufloop.table import block


@dataclass(frozen=True)
class _Column:
    """A column of md. width: of its cells, negative for words, which start at the left, as in C's printf."""

    name: str
    width: int
    cell: Callable[[BenchRecord], str]

    def pad(self, text: str) -> str:
        return text.ljust(-self.width) if self.width < 0 else text.rjust(self.width)


def _size(r: BenchRecord) -> str:
    nbytes = r["model_size"]
    return f"{nbytes / 2**20:.2f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.2f} GiB"


def _params(r: BenchRecord) -> str:
    n = r["model_n_params"]
    return f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B"


def _settings(r: BenchRecord) -> str:
    """The settings of a loop that have no column."""
    words = (r["loop"] or "").split()[2:]
    return " ".join(word for word in words if not word.startswith("kv="))


def _ratio(r: BenchRecord) -> str:
    if r["ratio"] is None:
        return ""
    return f"{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]"


def _text(name: str, form: str = "") -> Callable[[BenchRecord], str]:
    return lambda r: "" if r[name] is None else format(r[name], form)


_MODEL = [
    _Column("model", -30, _text("model_type")),
    _Column("size", 10, _size),
    _Column("params", 10, _params),
    _Column("backend", -10, _text("backends")),
]
_NGL = _Column("ngl", 3, _text("n_gpu_layers"))
_THREADS = _Column("threads", 7, _text("n_threads"))
_OPTIONAL = [
    ("n_batch", 2048, _Column("n_batch", 7, _text("n_batch"))),
    ("n_ubatch", 512, _Column("n_ubatch", 8, _text("n_ubatch"))),
    ("type_k", "f16", _Column("type_k", 6, _text("type_k"))),
    ("type_v", "f16", _Column("type_v", 6, _text("type_v"))),
    ("repack", True, _Column("repack", 6, lambda r: str(int(r["repack"])))),
]
_LIBRARY = _Column("library", -7, _text("library"))
_LOOP = [_Column("window", -7, _text("window")), _Column("K", 3, _text("k")), _Column("kv", -6, _text("kv"))]
_SETTINGS = _Column("loop", -16, _settings)
_SPEED = [
    _Column("test", 15, _text("test")),
    _Column("t/s", 20, lambda r: f"{r['avg_ts']:.2f} \u00b1 {r['stddev_ts']:.2f}"),
]
_COMPARED = [
    _Column("over", -5, _text("over")),
    _Column("time ratio", 18, _ratio),
    _Column("layers", 6, _text("predicted_layers", ".2f")),
    _Column("weights", 7, _text("predicted_weights", ".2f")),
]
_VARIED = [_LIBRARY, *_LOOP, _SETTINGS, *_SPEED, *_COMPARED]


def columns(constant: BenchRecord, variants: Sequence[Variant], compared: bool) -> list[_Column]:
    """The columns of md, as llama-bench chooses them: settings only where one differs from its default."""
    chosen = [*_MODEL, *([_NGL] if constant["backends"] != "CPU" else []), _THREADS]
    chosen += [column for name, default, column in _OPTIONAL if constant[name] != default]
    if any(v.stock for v in variants):
        chosen.append(_LIBRARY)
    if any(v.loop for v in variants):
        chosen += _LOOP
    if any(_settings({"loop": str(v.loop)}) for v in variants if v.loop):
        chosen.append(_SETTINGS)
    return chosen + _SPEED + (_COMPARED if compared else [])


class Printer:
    """Prints records in a form of -o, each at once, so that what is measured is not lost if the rest is not."""

    def __init__(self, form: str, shown: list[_Column], build: str) -> None:
        self.form, self._shown, self._build = form, shown, build
        self._n = 0
        self._columns = width.columns(sys.stdout) if form == "text" else 0
        self._once = 0 < self._columns < self._width  # what is the same in every row stands above them
        if self._once:
            self._shown = [column for column in shown if column in _VARIED]
        self._blocks = self._once and self._columns < self._width
        self._same = [column for column in shown if column not in self._shown]

    @property
    def _width(self) -> int:
        return sum(abs(column.width) + 3 for column in self._shown) + 1

    def _say(self, shown: Sequence[_Column], record: BenchRecord) -> None:
        cells = (column.cell(record) for column in shown)
        click.echo("\n".join(block((column.name for column in shown), cells, self._columns)) + "\n" * self._blocks)

    def begin(self) -> None:
        if self.form in ("text", "md") and not self._once:
            self._head()

    def _head(self) -> None:
        self._line(column.name for column in self._shown)
        self._line("-" * (abs(c.width) - 1) + (":" if c.width > 0 else "-") for c in self._shown)

    def row(self, record: BenchRecord) -> None:
        if self._once and self._n == 0:
            self._say(self._same, record)
            if not self._blocks:
                click.echo()
                self._head()
        if self._blocks:
            self._say(self._shown, record)
        elif self.form in ("text", "md"):
            self._line(column.cell(record).replace("|", "\\|") for column in self._shown)
        elif self.form == "jsonl":
            click.echo(json.dumps(record))
        elif self.form == "json":
            click.echo(("[\n" if self._n == 0 else ",\n") + json.dumps(record, indent=2), nl=False)
        else:
            flat = {name: value for name, value in record.items() if not isinstance(value, list)}
            flat |= {name: value for name, value in loop_cells(record["loop"]).items() if name not in flat}
            out = io.StringIO()
            writer = csv.writer(out, lineterminator="\n")
            writer.writerows([flat] if self._n == 0 else [])
            writer.writerow(flat.values())
            click.echo(out.getvalue(), nl=False)
        self._n += 1

    def end(self) -> None:
        if self.form in ("text", "md"):
            click.echo("\n" * (not self._blocks) + f"build: {self._build}")
        elif self.form == "json":
            click.echo("[]" if self._n == 0 else "\n]")

    def _line(self, cells: Iterator[str]) -> None:
        click.echo("| " + " | ".join(c.pad(text) for c, text in zip(self._shown, cells, strict=True)) + " |")
