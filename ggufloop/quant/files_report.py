"""What was quantised, in words, tables and the record beside a file: render(files, "csv"), write_record(made)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ggufloop.files import atomic_path
from ggufloop.quant.quantize import Quantized
from ggufloop.table import Cell, Table, columns

SCHEMA_VERSION = 1

_FILES = columns("file", "type", "MiB:.1f", "bits per weight:.3f", "tensors of", "fallbacks", "sha256")
_TENSORS = columns("file", "tensor", "shape", "source type", "type", "bytes", "instead of")


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


def text(files: Sequence[Quantized]) -> str:
    """A row per file, then what rows did not fit."""
    rows: list[list[Cell]] = [[f.path.name, f.type, f.bytes / 2**20, f.bits_per_weight, _counts(f),
             sum(bool(t.wanted) for t in f.tensors), f.sha256[:12]] for f in files]  # fmt: skip
    out = Table(_FILES, rows).render("md")
    for f in files:
        lines = _fallbacks(f)
        if lines:
            out += f"\n{f.type}: rows that do not divide into the blocks of the type, and what llama.cpp gave them:\n"
            out += "".join(f"{line}\n" for line in lines)
    return out


def record(made: Quantized) -> dict[str, Any]:
    """For JSON."""
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


def write_record(made: Quantized) -> None:
    """The record of a file beside it, which is where its own sha256 can be."""
    with atomic_path(made.path.with_name(f"{made.path.name}.json")) as partial:
        partial.write_text(json.dumps({"schema_version": SCHEMA_VERSION, **record(made)}, indent=1) + "\n")


def render(files: Sequence[Quantized], form: str) -> str:
    """In a form of -o."""
    if form == "text":
        return text(files)
    if form == "json":
        return json.dumps({"schema_version": SCHEMA_VERSION, "files": [record(f) for f in files]}, indent=2) + "\n"
    rows = [
        [f.path.name, t.name, "x".join(str(n) for n in t.shape), t.source_type, t.type, t.nbytes, t.wanted or None]
        for f in files
        for t in f.tensors
    ]
    return Table(_TENSORS, rows).render(form)
