"""`ggufloop quantize MODEL --types ...`: a ladder of quantised files, made by llama.cpp's own quantiser."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ggufloop.backend.settings import cores
from ggufloop.cli import terminal
from ggufloop.cli.options import model_from_flags, model_options, window_suggestion
from ggufloop.errors import UsageError, nearest
from ggufloop.files import atomic_path
from ggufloop.loop import LoopSpec
from ggufloop.measure import corpus
from ggufloop.models.info import describe
from ggufloop.quant import imatrix
from ggufloop.quant.quantize import (
    ALIASES,
    FILE_TYPES,
    INT4,
    INT8,
    NEEDS_IMATRIX,
    UNQUANTISED,
    Overrides,
    Quantized,
    default_name,
    file_type,
    parse_override,
    quantize,
    tensor_type,
    window_override,
)  # fmt: skip
from ggufloop.table import FORMS, Cell, Column, Table

SCHEMA_VERSION = 1

_FILES = (Column("file"), Column("type"), Column("MiB", ".1f"), Column("bits per weight", ".3f"), Column("tensors of"),
          Column("fallbacks"), Column("sha256"))  # fmt: skip
_TENSORS = (Column("file"), Column("tensor"), Column("shape"), Column("source type"), Column("type"),
            Column("bytes"), Column("instead of"))  # fmt: skip


def _types(types: str | None, int4: bool, int8: bool) -> list[str]:
    """The file types asked for, each once. Raises UsageError."""
    words = [] if types is None else [word.strip() for word in types.split(",")]
    if not all(words):
        raise UsageError(f"--types {types!r} has an empty entry.", "write it like --types Q8_0,Q4_K_M.")
    found = [file_type(word) for word in words] + [INT8] * int8 + [INT4] * int4
    if not found:
        raise UsageError("no type is given.", "give --types Q8_0,Q4_K_M for example, --int8 or --int4.")
    return list(dict.fromkeys(found))


def _overrides(path: Path, window: str | None, keep: str | None, given: tuple[str, ...]) -> tuple[Overrides, list[str]]:
    """What --tensor-type and --keep-window ask for, and the marks of it in a file's name. Raises UsageError.

    --tensor-type comes first, so that it can make an exception of --keep-window.
    """
    overrides = [parse_override(text) for text in given]
    if (window is None) != (keep is None):
        has, needs = ("--keep-window", "--window A:B") if window is None else ("--window", "--keep-window TYPE")
        raise UsageError(f"{has} does nothing by itself.", f"give {needs} as well.")
    marks = [hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:6]] if overrides else []
    if window is None or keep is None:
        return overrides, marks
    a, b = window_suggestion(path)() if window == "auto" else LoopSpec.parse(f"{window} k=2").window
    n = describe(path).n_layer
    if b > n:
        raise UsageError(f"window {a}:{b} is out of range: this model has {n} layers.", f"use {a}:{n} at most.")
    return [*overrides, *window_override((a, b), keep)], [f"w{a}_{b}", keep.upper(), *marks]


def _is_matrix(given: Path) -> bool:
    """Whether a file is an importance matrix, not a text: what is text has no zero bytes."""
    try:
        with given.open("rb") as f:
            start = f.read(4096)
    except OSError:
        return False  # `corpus.local` says what is wrong
    return start[:4] == b"GGUF" or b"\0" in start


def _matrix(given: str | None, chunks: int | None, path: Path, folder: Path, threads: int, force: bool) -> Path | None:
    """The file of importances that --imatrix means, computed if it names a text. Raises GgufloopError."""
    if given is None:
        if chunks is not None:
            raise UsageError("--imatrix-chunks does nothing by itself.", "give --imatrix TEXT as well.")
        return None
    if given not in corpus.NAMED and _is_matrix(Path(given)):
        return Path(given)
    if given not in corpus.NAMED and not Path(given).is_file():
        raise UsageError(
            f"--imatrix {given}: there is no such file.", f"give a file, or {' or '.join(corpus.NAMED)} for a text."
        )
    text = corpus.local(given)
    target = folder / f"{path.stem}-imatrix-{Path(text.name).stem}.gguf"

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\rimportance matrix: chunk {done}/{total} ", nl=done == total, err=True)

    made = imatrix.compute(path, text.text, text.name, target, chunks=chunks, threads=threads, progress=progress,
                           force=force)  # fmt: skip
    click.echo(
        f"importance matrix: {target}, {made.chunks} chunks of {imatrix.CONTEXT} tokens of {text.name}", err=True
    )
    return target


class _Progress:
    """One line on a terminal that follows the tensors."""

    def __init__(self, type: str) -> None:
        self._type, self._width = type, 0

    def __call__(self, i: int, n: int, name: str) -> None:
        if sys.stderr.isatty():
            line = f"{self._type} {i}/{n} {name}"
            click.echo("\r" + line.ljust(self._width), nl=False, err=True)
            self._width = len(line)

    def done(self) -> None:
        """Leave an empty line behind."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, err=True)


def _log() -> Callable[[str], None]:
    return lambda text: click.echo(text, nl=False, err=True)


def _counts(made: Quantized) -> str:
    """How many matrices each type has, the most frequent first."""
    kinds: dict[str, int] = {}
    for t in made.tensors:
        if len(t.shape) > 1:
            kinds[t.type] = kinds.get(t.type, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def _fallbacks(made: Quantized) -> list[str]:
    """What rows did not fit, a line for each change of type and kind of tensor."""
    groups: dict[tuple[str, str, int, str], list[str]] = {}
    for t in made.tensors:
        if t.wanted:
            first, *rest = t.name.split(".", 2)
            kind = f"blk.*.{rest[1]}" if first == "blk" and len(rest) == 2 else t.name
            groups.setdefault((t.wanted, t.type, t.shape[0], kind), []).append(t.name)
    return [
        f"  {kind}: {type} instead of {wanted}, rows of {row} ({len(names)} tensor{'s' * (len(names) > 1)})"
        for (wanted, type, row, kind), names in groups.items()
    ]


def _text(files: list[Quantized]) -> str:
    rows: list[list[Cell]] = [[f.path.name, f.type, f.bytes / 2**20, f.bits_per_weight, _counts(f),
             sum(bool(t.wanted) for t in f.tensors), f.sha256[:12]] for f in files]  # fmt: skip
    out = Table(_FILES, rows).render("md")
    for f in files:
        lines = _fallbacks(f)
        if lines:
            out += f"\n{f.type}: rows that do not divide into the blocks of the type, and what llama.cpp gave them:\n"
            out += "".join(f"{line}\n" for line in lines)
    return out


def _record(made: Quantized) -> dict[str, Any]:
    return {
        "file": made.path.name,
        "type": made.type,
        "sha256": made.sha256,
        "bytes": made.bytes,
        "bits_per_weight": made.bits_per_weight,
        "requantized": made.requantized,
        **{f"recipe_{key}": value or None for key, value in made.provenance.items()},
        "tensors": [
            {"name": t.name, "shape": t.shape, "source_type": t.source_type, "type": t.type, "bytes": t.nbytes,
             "instead_of": t.wanted or None}
            for t in made.tensors
        ],
    }  # fmt: skip


def _write_record(made: Quantized) -> None:
    """The record of a file beside it, which is where its own sha256 can be."""
    with atomic_path(made.path.with_name(f"{made.path.name}.json")) as partial:
        partial.write_text(json.dumps({"schema_version": SCHEMA_VERSION, **_record(made)}, indent=1) + "\n")


def _render(files: list[Quantized], form: str) -> str:
    if form == "text":
        return _text(files)
    if form == "json":
        return json.dumps({"schema_version": SCHEMA_VERSION, "files": [_record(f) for f in files]}, indent=2) + "\n"
    rows = [
        [f.path.name, t.name, "x".join(str(n) for n in t.shape), t.source_type, t.type, t.nbytes, t.wanted or None]
        for f in files
        for t in f.tensors
    ]
    return Table(_TENSORS, rows).render(form)


@click.command(name="quantize")
@model_options
@click.option("--types", metavar="TYPE,...", help=f"What to make: {', '.join((*FILE_TYPES, *ALIASES))}.")
@click.option("--int8", is_flag=True,
              help=f"{INT8}: 8-bit whole numbers, an F16 scale for every 32 weights; 8.5 bits per weight.")  # fmt: skip
@click.option("--int4", is_flag=True,
              help=f"{INT4}: 4-bit whole numbers, an F16 scale for every 32 weights; 4.5 bits per weight, "
                   "the output matrix in Q6_K. Q4_K_M is the better 4-bit file, and no plain INT4.")  # fmt: skip
@click.option("--imatrix", "matrix", metavar="FILE|TEXT|pydoc|sdist-docs",
              help="Importance matrix: a file of llama-imatrix, or a text to compute it from here.")  # fmt: skip
@click.option("--imatrix-chunks", "chunks", type=click.IntRange(min=1), metavar="N",
              help=f"Read the first N chunks of {imatrix.CONTEXT} tokens of the text (default: all).")  # fmt: skip
@click.option("--window", metavar="A:B", help="The window of --keep-window: layers A to B-1, or 'auto'.")
@click.option("--keep-window", "keep", metavar="TYPE", help="Keep the layers of --window at this type, such as Q8_0.")
@click.option("--tensor-type", "given", multiple=True, metavar="PATTERN=TYPE",
              help="Make tensors whose name has the pattern of this type, such as ffn_down=Q6_K; the first "
                   "that fits counts.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the files go (default: beside MODEL; the current folder for one known by name).")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files that are there and were made otherwise.")
@click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="Threads (default: all cores).")
@click.option("-o", "--output", "form", default="text", show_default=True, metavar="text|md|csv|json|jsonl",
              help="How to print it; all but text have every tensor.")  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    model_path: str | None,
    hf: str | None,
    hf_file: str | None,
    offline: bool,
    types: str | None,
    int8: bool,
    int4: bool,
    matrix: str | None,
    chunks: int | None,
    window: str | None,
    keep: str | None,
    given: tuple[str, ...],
    out: Path | None,
    force: bool,
    threads: int | None,
    form: str,
) -> None:
    """Quantise a model with llama.cpp's own quantiser, to one file per type: STEM-TYPE.gguf.

    Most types are mixtures: Q4_K_M has some tensors in Q6_K. The table says what each file has in truth. A model that
    is quantised already can be the source; F16 and F32 then mean the same weights in a wider type. A file that was
    made in the same way before is not made again; what was done is in its metadata and in FILE.json beside it.

    \b
    ggufloop quantize model-F16.gguf --types Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,Q3_K_M,Q2_K
    ggufloop quantize smollm2-135m --int4 --window 12:16 --keep-window Q8_0
    ggufloop quantize model-F16.gguf --types IQ2_M --imatrix pydoc --imatrix-chunks 100
    """
    if form not in ("text", *FORMS):
        raise UsageError(f"output form {form!r} is not known.", nearest(form, ("text", *FORMS)))
    wanted = _types(types, int4, int8)
    if keep is not None:
        tensor_type(keep)
    for text in given:
        parse_override(text)
    needs = [type for type in wanted if type in NEEDS_IMATRIX]
    if needs and matrix is None:
        raise UsageError(f"type {needs[0]} needs an importance matrix.", "give --imatrix FILE or --imatrix TEXT.")
    path = model_from_flags(model, model_path, hf, offline, hf_file)
    overrides, marks = _overrides(path, window, keep, given)
    if overrides and any(type in UNQUANTISED for type in wanted):
        named = next(type for type in wanted if type in UNQUANTISED)
        raise UsageError(f"a file of type {named} has no tensors of other types.", "make it in a call of its own.")
    by_path = any(text is not None and Path(text) == path for text in (model, model_path))
    folder = out or (path.parent if by_path else Path())
    n_threads = threads or cores()
    file = _matrix(matrix, chunks, path, folder, n_threads, force)
    marks += ["imatrix"] * (file is not None)
    before = {t.type for t in describe(path).types} - set(UNQUANTISED)
    if before:
        terminal.note(f"{path.name} is quantised already ({', '.join(sorted(before))}): what that lost stays lost.")
    files = []
    for type in wanted:
        target = folder / default_name(path, type, *marks)
        progress = _Progress(type)
        try:
            made = quantize(path, target, type, overrides=overrides, imatrix=file, threads=n_threads,
                            progress=progress, log=_log() if ctx.obj["verbose"] else None, force=force)  # fmt: skip
        finally:
            progress.done()
        click.echo(f"{'made' if made.made else 'there already:'} {target}", err=True)
        _write_record(made)
        files.append(made)
    click.echo(_render(files, form), nl=False)
