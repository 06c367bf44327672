"""Importance matrices: how large the inputs of each weight are, so that quantising errs least where it matters.

    matrix = read(path)                                          # llama-imatrix's file, GGUF or the older .dat
    compute(model, text, "notes.txt", target)                    # the same from a text, here

For every column of a weight matrix, the mean square of the activations that meet it. A file holds sums and counts, as
llama-imatrix writes them, so files are good in both directions.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.backend import process
from ggufloop.backend.process import Worker
from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_path, files_sha256
from ggufloop.models.gguf import read_header, read_model
from ggufloop.models.weights import decode, locate, slabs
from ggufloop.progress import Progress, Step, silent

CONTEXT = 512
"""Tokens of a chunk, llama-imatrix's default."""
KEY = "ggufloop.imatrix."
"""Prefix of the metadata that say how a file was made here."""
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_NAME, _MOST_VALUES = 256, 1 << 28


@dataclass(frozen=True)
class Imatrix:
    """entries: mean squares by tensor name, float32 (matrices, columns). chunks: of text that they are of."""

    entries: Mapping[str, NDArray[np.float32]]
    chunks: int


@dataclass(frozen=True)
class Computed:
    """An importance matrix that `compute` made, or found made. chunks: of CONTEXT tokens or as asked; made: now."""

    path: Path
    chunks: int
    made: bool


def read(path: Path) -> Imatrix:
    """Read an importance matrix. Raises GgufloopError for a file that is none, or holds what is no number."""
    try:
        if path.exists() and not path.is_file():
            raise _none(path, f"it is {'a folder' if path.is_dir() else 'no file'}")
        with path.open("rb") as f:
            is_gguf = f.read(4) == b"GGUF"
        matrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror or e}.", "check the path.") from e
    for name, squares in matrix.entries.items():
        if not np.isfinite(squares).all() or (squares < 0).any():
            raise GgufloopError(
                f"{path} has values for {name} that are no mean squares.", "compute the importance matrix again."
            )
    return matrix


def _none(path: Path, why: str) -> GgufloopError:
    return GgufloopError(f"{path} is no importance matrix: {why}.", "give a file of llama-imatrix, or a text.")


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    names = {t.name for t in header.tensors}
    wanted = sorted(name.removesuffix(_SUMS) for name in names if name.endswith(_SUMS))
    if not wanted:
        raise _none(path, "it holds no sums of squares")
    missing = next((name for name in wanted if name + _COUNTS not in names), None)
    if missing is not None:
        raise _none(path, f"{missing} has sums and no counts")
    odd = next((t for t in header.tensors if t.type != "F32" and t.name.endswith((_SUMS, _COUNTS))), None)
    if odd is not None:
        raise _none(path, f"{odd.name} is {odd.type} instead of F32")
    stored = locate([header])

    def values(name: str) -> NDArray[np.float32]:
        return np.concatenate([decode(blocks, "F32") for blocks in slabs(stored[name])] or [np.empty(0, np.float32)])

    entries = {}
    for name in wanted:
        counts, sums = np.rint(values(name + _COUNTS)), values(name + _SUMS)
        if not counts.size or not sums.size or sums.size % counts.size:
            raise _none(path, f"{name} has {sums.size} sums for {counts.size} counts")
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise _none(path, f"{name} has counts that are none")
        by_matrix = sums.reshape(counts.size, -1)
        some = np.maximum(counts, 1)[:, None]
        met = counts[:, None] > 0  # an expert that no token met has all columns alike
        entries[name] = np.where(met, by_matrix / some, np.float32(1))
    chunks = header.number("imatrix.chunk_count") or 0
    return Imatrix(entries, chunks)


def _read_legacy(path: Path) -> Imatrix:
    """The format before GGUF: a count, then name, calls and sums of each tensor, then chunks and text."""
    data, at = path.read_bytes(), 0

    def number() -> int:
        nonlocal at
        if at + 4 > len(data):
            raise _none(path, "it ends in the middle of an entry" if at else "it is too short")
        value: int = struct.unpack_from("<i", data, at)[0]
        at += 4
        return value

    def block(n: int, most: int) -> bytes:
        nonlocal at
        if not 0 < n <= most:
            raise _none(path, "it is no GGUF file, and no .dat file of llama-imatrix")
        if at + n > len(data):
            raise _none(path, "it ends in the middle of an entry")
        at += n
        return data[at - n : at]

    entries = {}
    for _ in range(number()):
        name = block(number(), _MOST_NAME).decode(errors="replace")
        calls, n = number(), number()
        sums = np.frombuffer(block(4 * min(n, _MOST_VALUES), 4 * _MOST_VALUES), dtype="<f4")
        entries[name] = (sums / max(calls, 1)).astype(np.float32)[None, :]
    if not entries:
        raise _none(path, "it holds no entries")
    chunks = number() if at < len(data) else 0
    return Imatrix(entries, chunks)  # the name of the text, which may follow, says nothing here


def write(
    path: Path,
    sums: Mapping[str, NDArray[np.float64]],
    counts: Mapping[str, NDArray[np.int64]],
    dataset: str,
    chunks: int,
    n_ctx: int,
    recipe: Mapping[str, str],
) -> None:
    """Write sums (matrices, columns) and counts (matrices) as llama-imatrix does, and our recipe. Raises OSError."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # it is no model
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", n_ctx)
    for key, value in recipe.items():
        writer.add_string(KEY + key, value)
    for name in sorted(sums):
        writer.add_tensor(name + _SUMS, sums[name].astype(np.float32))
        writer.add_tensor(name + _COUNTS, counts[name].astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compute(
    model: Path,
    text: str,
    name: str,
    target: Path,
    *,
    n_ctx: int = CONTEXT,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
    force: bool = False,
) -> Computed:
    """The importance matrix of the plain model on a text, in `target`; one made so before is left as it is.

    name: what the file calls the text. chunks: read that many of n_ctx tokens, each on an empty cache; None: all.
    force: replace a file at `target` that was made otherwise. Raises GgufloopError.
    """
    headers = read_model(model)
    recipe = {
        "model_sha256": files_sha256([h.path for h in headers]),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "chunks": f"{chunks or 'all'} of {n_ctx}",
    }
    if target.exists():
        header = read_header(target)
        if all(header.text(KEY + key) == value for key, value in recipe.items()):
            return Computed(target, header.number("imatrix.chunk_count") or 0, False)
        if not force:
            raise GgufloopError(
                f"{target} exists, and was not made from this model and text.", "give --force to replace it."
            )

    def on_event(event: dict[str, Any]) -> None:
        if "chunk" in event:
            done, total = event["chunk"]
            progress(Step(name, done, total, "chunk"))

    with atomic_path(target) as partial, Worker(process.main_of("ggufloop.quant.child")) as worker:
        job = {"kind": "imatrix", "model": str(model), "target": str(partial), "text": text, "dataset": name,
               "n_ctx": n_ctx, "chunks": chunks, "threads": threads or 0, "recipe": recipe}  # fmt: skip
        return Computed(target, int(worker.run(job, on_event)["chunks"]), True)
