"""The look of llama-bench's table, and its other forms: rows are printed as they are measured.

Columns that say nothing (library, loop settings left at their defaults) are left out of md.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import click

from ggufloop.flat import loop_cells
from ggufloop.measure.bench import Variant
from ggufloop.measure.bench_run import BenchRecord


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

    def begin(self) -> None:
        if self.form in ("text", "md"):
            self._line(column.name for column in self._shown)
            self._line("-" * (abs(c.width) - 1) + (":" if c.width > 0 else "-") for c in self._shown)

    def row(self, record: BenchRecord) -> None:
        if self.form in ("text", "md"):
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
            click.echo(f"\nbuild: {self._build}")
        elif self.form == "json":
            click.echo("[]" if self._n == 0 else "\n]")

    def _line(self, cells: Iterator[str]) -> None:
        click.echo("| " + " | ".join(c.pad(text) for c, text in zip(self._shown, cells, strict=True)) + " |")
