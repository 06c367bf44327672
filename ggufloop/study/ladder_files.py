"""The model files of a ladder: the reference, and what it is quantised to, with their sizes and the SNR of a window.

    ref = reference(source, folder, "F32")                    # the source itself if it is not quantised
    entry = make(ref, "Q4_K_M", source, folder, window=(12, 16))      # or a file as it is: its path, or SOURCE

A source that is quantised already is dequantised: the reference has the weights of the file that is there, without
further loss, and nobody's full precision. What its first quantisation lost is in no number of a study.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop.errors import UsageError
from ggufloop.files import file_sha256
from ggufloop.models.info import ModelInfo, describe
from ggufloop.progress import Progress, note, silent
from ggufloop.quant.quantize import (
    UNQUANTISED,
    Overrides,
    Quantized,
    default_name,
    file_type,
    planned_bytes,
    quantize,
)
from ggufloop.quant.snr import TensorSnr, decibel, tensor_snr, window_snr
from ggufloop.study.file import File

SOURCE = "source"
"""The model itself, as it is. Where the reference is made of it, their weights are the same and the KLD between them is
what quantised kernels, which round activations, do to it."""


@dataclass(frozen=True)
class LadderFile:
    """A file of the ladder: where it is, and what a study records of it."""

    path: Path
    file: File


def type_name(word: str, among: Iterable[str] = ()) -> str:
    """What a study calls an entry of --types: a file type, SOURCE, or an existing GGUF file. Raises UsageError.

    among: the other entries; a file of a name that another one has is called by its folder too, its uploader's perhaps.
    """
    if word == SOURCE:
        return SOURCE
    if not _is_path(word):
        return file_type(word)
    path = Path(word).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no file {word}.", "--types takes types to quantise to, and files as they are.")
    same = [Path(other) for other in among if _is_path(other) and Path(other).name == path.name and other != word]
    return f"{path.absolute().parent.name}/{path.name}" if same else path.name


def _is_path(word: str) -> bool:
    return word.lower().endswith(".gguf")


def is_made(word: str) -> bool:
    """Whether an entry of --types is a type, so that a file of it is made."""
    return word != SOURCE and not _is_path(word)


_MADE = ".made"
"""The names of files that were made beside it and are no longer wanted than a study lasts."""


def quantized(source: Path, target: Path, type_: str, **how: Any) -> Quantized:
    """`quantize`, and a note for `tidy` of a file that was not there before."""
    found = quantize(source, target, type_, **how)
    if found.made:
        with target.with_name(_MADE).open("a", encoding="utf-8") as file:
            file.write(f"{target.name}\n")
    return found


def tidy(folder: Path, named: Iterable[str] = (), keep: bool = False) -> None:
    """Delete the files that studies made in `folder`, but those that --types names as they are. What was there before,
    or was kept once, is the user's. keep: delete none, from now on either."""
    spared = [Path(word).expanduser().resolve() for word in named if _is_path(word)]
    note = folder / _MADE
    for name in note.read_text(encoding="utf-8").splitlines() if note.is_file() and not keep else ():
        if (folder / name).resolve() not in spared:
            (folder / name).unlink(missing_ok=True)
    note.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        folder.rmdir()


def say_room(progress: Progress, source: Path, types: Iterable[str], folder: Path, keep: bool) -> None:
    """Say what is going to be made, and how large it is, before it is."""
    todo = list(types)
    if todo:
        size = f"{planned_bytes(source, todo) / 1e6:,.0f} MB of quantised files are made in {folder}"
        note(progress, f"{size}, and {'stay there' if keep else 'deleted when all is measured (--keep leaves them)'}.")


def is_unquantized(info: ModelInfo) -> bool:
    """Whether all matrices of a model are F32, F16 or BF16."""
    return all(share.type in UNQUANTISED for share in info.types)


def reference(
    source: Path, folder: Path, type_: str, threads: int | None = None, progress: Progress = silent,
    done: Iterable[File] = (),
) -> LadderFile:  # fmt: skip
    """What everything is compared with: the source, or the source dequantised to F32, F16 or BF16 in `folder`.

    done: what a study has measured in full; such a file is not made again, and may be gone.
    Raises UsageError for another type, and as `quantize`.
    """
    if type_ not in UNQUANTISED:
        raise UsageError(f"a reference of type {type_} would be quantised.", f"use {', '.join(UNQUANTISED)}.")
    info = describe(source)
    if is_unquantized(info):
        return LadderFile(source, _file(source, info.types[0].type, math.inf, math.inf, "the model itself"))
    target = folder / default_name(source, type_)
    for file in done:
        if file.type == type_:
            return LadderFile(target, file)
    quantized(source, target, type_, threads=threads, progress=progress)
    return LadderFile(target, _file(target, type_, math.inf, math.inf, f"{source.name} dequantised"))


def make(
    ref: LadderFile,
    word: str,
    source: Path,
    folder: Path,
    window: tuple[int, int],
    known: Iterable[File] = (),
    threads: int | None = None,
    progress: Progress = silent,
    name: str = "",
    done: Iterable[File] = (),
) -> LadderFile:
    """The file that an entry of --types means: quantised from the reference into `folder`, or one measured as it is.

    name: what the study calls it, if not by `type_name`. known: what a study has recorded already; a file that is
    still the same is not looked at again. done: as for `reference`.
    Raises GgufloopError for a file of another model, and as `quantize`.
    """
    name = name or type_name(word)
    if not is_made(word):
        path = source if word == SOURCE else Path(word).expanduser()
    else:
        path = folder / default_name(ref.path, file_type(word))
        for file in done:
            if file.type == name:
                return LadderFile(path, file)
    for file in known:
        if file.type == name and path.is_file() and file_sha256(path) == file.sha256:
            return LadderFile(path, file)
    how = f"{path.name} as it is"
    if is_made(word):
        how = _fallbacks(quantized(ref.path, path, file_type(word), threads=threads, progress=progress))
    tensors = tensor_snr(path, ref.path, progress=progress)
    matrices = [t for t in tensors if t.is_matrix]
    whole = decibel(sum(t.signal for t in matrices), sum(t.noise for t in matrices))
    return LadderFile(path, _file(path, name, whole, window_snr(tensors, window), how))


def varied(
    ref: LadderFile,
    base: str,
    name: str,
    overrides: Overrides,
    folder: Path,
    window: tuple[int, int],
    threads: int | None = None,
    progress: Progress = silent,
    known: dict[str, TensorSnr] | None = None,
) -> LadderFile:
    """A file of type `base` with some tensors at others, called `name`, quantised from the reference into `folder`.

    known: the SNR of tensors of the file without overrides, which is put there if it is empty.
    """
    path = folder / default_name(ref.path, base, *([re.sub(r"[^\w.]+", "-", name)] if overrides else []))
    how = _fallbacks(quantized(ref.path, path, base, overrides=overrides, threads=threads, progress=progress))
    tensors = tensor_snr(path, ref.path, known=known, progress=progress)
    if known is not None and not known:
        known |= {t.name: t for t in tensors}
    matrices = [t for t in tensors if t.is_matrix]
    whole = decibel(sum(t.signal for t in matrices), sum(t.noise for t in matrices))
    return LadderFile(path, _file(path, name, whole, window_snr(tensors, window), how))


def _file(path: Path, name: str, snr: float, of_window: float, note: str) -> File:
    info = describe(path)
    nbytes = sum(part.stat().st_size for part in info.files)
    return File(name, file_sha256(path), nbytes, info.bits_per_weight, snr, of_window, note)


def _fallbacks(made: Quantized) -> str:
    """Which tensors have rows that the type's blocks do not divide, and what they became."""
    n, types = 0, set()
    for tensor in made.tensors:
        if tensor.wanted:
            n += 1
            types.add(tensor.type)
    of = len([t for t in made.tensors if len(t.shape) > 1])
    return f"{n} of {of} matrices as {', '.join(sorted(types))}: their rows do not fill blocks" if n else ""
