"""A ladder of quantised files: what `ggufloop quantize` makes.

    plan = LadderPlan(("Q8_0", "Q4_0"), window=(12, 16), keep="Q8_0", matrix=MatrixText("notes", text))
    files = quantize_ladder(path, plan, Path("."))

An importance matrix may be computed from a text on the way. Each file gets its record beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggufloop.backend.settings import cores
from ggufloop.errors import UsageError
from ggufloop.models.info import describe
from ggufloop.progress import Progress, named, note, silent
from ggufloop.quant import imatrix
from ggufloop.quant.files_report import write_record
from ggufloop.quant.quantize import (
    NEEDS_IMATRIX,
    UNQUANTISED,
    Log,
    Overrides,
    Quantized,
    default_name,
    parse_override,
    quantize,
    tensor_type,
    window_override,
)


@dataclass(frozen=True)
class MatrixText:
    """A text to compute importances from, the first `chunks` of it; all if None."""

    name: str
    text: str
    chunks: int | None = None


@dataclass(frozen=True)
class LadderPlan:
    """What to make: a file of each type.

    overrides      PATTERN=TYPE for tensors whose name has the pattern; the first that fits counts
    window, keep   the layers of the window at this type
    matrix         importances: a file of llama-imatrix, or a text

    Raises UsageError for what cannot be made.
    """

    types: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    window: tuple[int, int] | None = None
    keep: str | None = None
    matrix: Path | MatrixText | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            tensor_type(self.keep)
        for text in self.overrides:
            parse_override(text)
        needs = [type_ for type_ in self.types if type_ in NEEDS_IMATRIX]
        if needs and self.matrix is None:
            raise UsageError(f"type {needs[0]} needs an importance matrix.", "give --imatrix FILE or --imatrix TEXT.")

    def tensors(self, n_layer: int) -> tuple[Overrides, list[str]]:
        """The overrides, and the marks of them in a file's name. Raises UsageError.

        Those of `overrides` come first, so that they can make an exception of `keep`.
        """
        overrides = [parse_override(text) for text in self.overrides]
        marks = [hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:6]] if overrides else []
        if self.window is not None and self.keep is not None:
            a, b = self.window
            if b > n_layer:
                raise UsageError(
                    f"window {a}:{b} is out of range: this model has {n_layer} layers.", f"use {a}:{n_layer} at most."
                )
            overrides += window_override((a, b), self.keep)
            marks = [f"w{a}_{b}", self.keep.upper(), *marks]
        named = next((type_ for type_ in self.types if type_ in UNQUANTISED), None)
        if overrides and named is not None:
            raise UsageError(f"a file of type {named} has no tensors of other types.", "make it in a call of its own.")
        return overrides, marks


def quantize_ladder(
    path: Path,
    plan: LadderPlan,
    folder: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
    each: Callable[[Quantized], None] = lambda made: None,
    log: Log | None = None,
) -> list[Quantized]:
    """Make every file in `folder`, or find it made in the same way; force: replace one that was made otherwise.

    threads: None for all. each: gets a file when it is there. log: gets llama.cpp's own words. Raises UsageError,
    GgufloopError.
    """
    info, n_threads = describe(path), threads or cores()
    overrides, marks = plan.tensors(info.n_layer)
    matrix = plan.matrix
    if isinstance(matrix, MatrixText):
        target = folder / f"{path.stem}-imatrix-{Path(matrix.name).stem}.gguf"
        made = imatrix.compute(path, matrix.text, matrix.name, target, chunks=matrix.chunks, threads=n_threads,
                               progress=progress, force=force)  # fmt: skip
        note(
            progress, f"importance matrix: {target}, {made.chunks} chunks of {imatrix.CONTEXT} tokens of {matrix.name}"
        )
        matrix = target
    marks += ["imatrix"] * (matrix is not None)
    before = {t.type for t in info.types} - set(UNQUANTISED)
    if before:
        note(progress, f"{path.name} is quantised already ({', '.join(sorted(before))}): what that lost stays lost.")
    files = []
    for type_ in plan.types:
        file = quantize(path, folder / default_name(path, type_, *marks), type_, overrides=overrides, imatrix=matrix,
                        threads=n_threads, progress=named(progress, type_), log=log, force=force)  # fmt: skip
        each(file)
        write_record(file)
        files.append(file)
    return files
