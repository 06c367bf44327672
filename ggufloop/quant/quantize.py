"""Quantising a model file with llama.cpp's own quantiser, in a process of its own.

    made = quantize(source, Path("m-Q4_K_M.gguf"), "Q4_K_M", overrides=window_override((12, 16), "Q8_0"))
    made.bits_per_weight, made.sha256, [t for t in made.tensors if t.wanted]

What was done is written into the file's own metadata, so that a file says what it was made from and is not made twice.
A source may be quantised already: what its first quantisation lost stays lost, and F32 or F16 then mean that file
without further loss, which is how a reference is made of a model that is only there quantised.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop.backend import library, process
from ggufloop.backend.process import Worker
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.files import atomic_path, check_writable, file_sha256, files_sha256, partial_path, writing
from ggufloop.models.gguf import Header, Tensor, read_header, read_model, split_paths, type_sizes
from ggufloop.progress import Progress, Step, silent
from ggufloop.quant import imatrix

INT4, INT8 = "Q4_0", "Q8_0"
"""4-bit and 8-bit whole numbers in [-8, 7] and [-127, 127], an F16 scale for every 32 weights, nothing else."""

FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32,
    "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q5_1": 9, "Q5_0": 8,
    "Q4_K_M": 15, "Q4_K_S": 14, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4_MOE": 38,
    "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "IQ3_M": 27, "IQ3_S": 26, "IQ3_XS": 22, "IQ3_XXS": 23,
    "Q2_K": 10, "Q2_K_S": 21, "IQ2_M": 29, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19, "Q2_0": 41, "TQ2_0": 37,
    "TQ1_0": 36, "IQ1_M": 31, "IQ1_S": 24, "Q1_0": 40,
}  # fmt: skip
"""llama_ftype by name: what a file can be made into. Most are mixtures: llama.cpp gives some tensors more bits."""
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "INT4": INT4, "INT8": INT8}
UNQUANTISED = ("F32", "F16", "BF16")
NEEDS_IMATRIX = ("IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q2_K_S", "IQ1_M", "IQ1_S")
"""Types llama.cpp does not make without an importance matrix (IQ3_XXS: for some of its tensors)."""

TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4",
    "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q2_0", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S",
    "Q1_0",
)  # fmt: skip
"""What a single tensor can be made into."""
_TENSORS_NEED_IMATRIX = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")

KEY = "ggufloop.quantize."
"""Prefix of the metadata that say how a file was made."""
_GIVE_IMATRIX = "give --imatrix FILE or --imatrix TEXT."
_MOST_VALUE = 127  # bytes of a metadata string that llama.cpp's quantiser can add

# what llama.cpp's log says of its work
_AT = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")
_FALLBACK = re.compile(r"(\S+)\s+- ncols\s+\d+ not divisible by\s+\d+ \(required for type\s+(\S+)\)")
_TOTAL = re.compile(r"quant size\s+=\s+([\d.]+) MiB")
_FAILED = re.compile(r"failed to quantize: (.*)")

Overrides = Sequence[tuple[str, str]]
Log = Callable[[str], None]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor of the result. source_type: what it was; wanted: the type whose blocks its rows do not fill, else ''."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    nbytes: int
    wanted: str


@dataclass(frozen=True)
class Quantized:
    """A file that `quantize` made, or found made. made: now; bytes: of the file; sha256: of its content."""

    path: Path
    type: str
    sha256: str
    bytes: int
    bits_per_weight: float
    tensors: tuple[QuantizedTensor, ...]
    provenance: dict[str, str]
    made: bool

    @property
    def requantized(self) -> bool:
        """Whether the source was quantised already, so that this file has its loss as well."""
        return any(t.source_type not in UNQUANTISED for t in self.tensors)


def file_type(name: str) -> str:
    """The name of a file type as this module spells it. Raises UsageError, with the nearest, for one it has not."""
    found = ALIASES.get(name.upper(), name.upper())
    if found not in FILE_TYPES:
        raise UsageError(f"type {name!r} is not known.", nearest(name.upper(), [*FILE_TYPES, *ALIASES]))
    return found


def tensor_type(name: str) -> str:
    """The name of a tensor's type as GGUF spells it. Raises UsageError, with the nearest, for one it has not."""
    if name.upper() not in TENSOR_TYPES:
        raise UsageError(f"tensor type {name!r} is not known.", nearest(name.upper(), TENSOR_TYPES))
    return name.upper()


def window_override(window: tuple[int, int], type: str) -> tuple[tuple[str, str], ...]:
    """The override that keeps the layers of a window at `type`."""
    layers = "|".join(str(il) for il in range(*window))
    return ((rf"^blk\.({layers})\.", tensor_type(type)),)


def parse_override(text: str) -> tuple[str, str]:
    """PATTERN=TYPE, the pattern a regular expression found anywhere in a tensor's name. Raises UsageError."""
    pattern, equals, type = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"tensor type {text!r} is not PATTERN=TYPE.", r"write it like 'ffn_down=Q6_K' or '^blk\.3\.=F16'."
        )
    try:
        re.compile(pattern)
    except re.error as e:
        raise UsageError(f"{pattern!r} is no regular expression: {e}.", "a plain part of the name is one.") from None
    return pattern, tensor_type(type)


def default_name(source: Path, type: str, *marks: str) -> str:
    """What a result is called: the source's stem, the type, and marks of whatever else was asked for."""
    stem = source.stem if split_paths(source) == (source,) else re.sub(r"-\d{5}-of-\d{5}$", "", source.stem)
    return f"{'-'.join([stem, type, *marks])}.gguf"


def _provenance(headers: Sequence[Header], type: str, overrides: Overrides, matrix: Path | None) -> dict[str, str]:
    """What is written into the metadata; the same recipe gives the same, whatever the files are called."""
    out = {
        "source": headers[0].path.name.encode()[:_MOST_VALUE].decode(errors="ignore"),
        "source_sha256": files_sha256([h.path for h in headers]),
        "type": type,
        "llama_cpp": library.LLAMA_CPP_COMMIT,
        "overrides": "",  # written even if empty: the source may have been made here, and its metadata are copied
        "imatrix_sha256": "" if matrix is None else file_sha256(matrix),
    }
    if overrides:
        text = json.dumps([list(o) for o in overrides])
        digest = hashlib.sha256(text.encode()).hexdigest()
        out["overrides"] = text if len(text.encode()) <= _MOST_VALUE else f"sha256 {digest}"
    return out


_RECIPE = ("source_sha256", "type", "llama_cpp", "overrides", "imatrix_sha256")


def _recipe(provenance: dict[str, str]) -> dict[str, str]:
    return {key: provenance.get(key, "") for key in _RECIPE}


def read_provenance(header: Header) -> dict[str, str]:
    """What a file says of how it was made here; {} if it was not."""
    return {key.removeprefix(KEY): str(value) for key, value in header.metadata.items() if key.startswith(KEY)}


def _check(headers: Sequence[Header], target: Path, type: str, overrides: Overrides, matrix: Path | None) -> None:
    """Raise UsageError or GgufloopError for what cannot work, before anything is computed."""
    for header in headers:
        if target.exists() and target.samefile(header.path):
            raise UsageError(f"{target} is the source itself.", "name another file: a model is not quantised in place.")
    with writing(target):  # its folder is made
        check_writable(target)
    if target.is_dir():
        raise UsageError(f"{target} is a folder.", "name the file to write, in it for example.")
    names = [t.name for h in headers for t in h.tensors]
    if overrides and type in UNQUANTISED:
        raise UsageError(
            f"a file of type {type} has no tensors of other types.",
            "leave out the overrides, or name a quantised type.",
        )
    for pattern, kind in overrides:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(
                f"no tensor of {headers[0].path.name} matches {pattern!r}.", "its names are like blk.0.attn_q.weight."
            )
        if matrix is None and kind in _TENSORS_NEED_IMATRIX:
            raise UsageError(f"tensor type {kind} needs an importance matrix.", _GIVE_IMATRIX)
    if matrix is None and type in NEEDS_IMATRIX:
        raise UsageError(f"type {type} needs an importance matrix.", _GIVE_IMATRIX)
    if matrix is not None:
        _check_imatrix(imatrix.read(matrix), matrix, headers)


def _check_imatrix(matrix: imatrix.Imatrix, path: Path, headers: Sequence[Header]) -> None:
    """Raise GgufloopError unless an importance matrix is of this model: llama.cpp passes over one that is not."""
    tensors = {t.name: t for h in headers for t in h.tensors}
    known = [name for name in matrix.entries if name in tensors]
    if not known:
        raise GgufloopError(
            f"{path} is of another model: none of its {len(matrix.entries)} entries is a tensor of {headers[0].path}.",
            "compute one for this model: --imatrix TEXT.",
        )
    for name in known:
        shape, n = tensors[name].shape, matrix.entries[name].size
        wanted = shape[0] * (shape[2] if len(shape) > 2 else 1)
        if n != wanted:
            raise GgufloopError(
                f"{path} is of another model: it has {n} values for {name}, which has {wanted} columns.",
                "compute one for this model: --imatrix TEXT.",
            )


class _Reader:
    """What the log of one run says."""

    def __init__(self, progress: Progress, log: Log | None) -> None:
        self.wanted: dict[str, str] = {}
        self.mib = 0.0
        self.failed = ""
        self._progress, self._log = progress, log

    def __call__(self, event: dict[str, Any]) -> None:
        text = str(event.get("log", ""))
        if self._log is not None:
            self._log(text)
        if " - ncols " in text and (found := _FALLBACK.search(text)) is not None:  # the search alone takes n^2 steps
            self.wanted[found[1]] = found[2].upper()
        if (found := _TOTAL.search(text)) is not None:
            self.mib = float(found[1])
        if (found := _FAILED.search(text)) is not None:
            self.failed = found[1].strip()
        if (found := _AT.match(text)) is not None:
            self._progress(Step(found[3], int(found[1]), int(found[2]), "tensor"))


def _check_room(target: Path, need: int) -> None:
    folder = next(p for p in target.absolute().parents if p.is_dir())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise GgufloopError(
            f"{target} needs {need / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free in {folder}.",
            "free some space, or name another folder with --out.",
        )


def quantize(
    source: Path,
    target: Path,
    type: str,
    *,
    overrides: Overrides = (),
    imatrix: Path | None = None,
    threads: int | None = None,
    progress: Progress = silent,
    log: Log | None = None,
    force: bool = False,
) -> Quantized:
    """Quantise `source` into `target`, which appears when it is whole; one made so before is returned as it is.

    type: a file type (FILE_TYPES, ALIASES). overrides: (pattern, tensor type), the first that is found in a tensor's
    name counts. imatrix: a file of importances (`imatrix.compute` makes one). threads: None for all. log: called with
    llama.cpp's words. force: replace a file at `target` that was made otherwise.

    Raises UsageError, GgufloopError, BackendError.
    """
    type = file_type(type)
    overrides = tuple((pattern, tensor_type(kind)) for pattern, kind in overrides)
    headers = read_model(source)
    _check(headers, target, type, overrides, imatrix)
    provenance = _provenance(headers, type, overrides, imatrix)
    there = target.exists() and _made_alike(target, provenance)
    if target.exists() and not there and not force:
        raise GgufloopError(
            f"{target} exists, and was not made from {source.name} in this way.",
            "give --force to replace it, or another folder with --out.",
        )
    numbers = {name: number for number, (name, _, _) in type_sizes().items()}
    job = _dry_run(source, partial_path(target), type) | {
        "threads": threads or 0,
        "overrides": [[pattern, numbers[kind]] for pattern, kind in overrides],
        "imatrix": None if imatrix is None else str(imatrix),
        "metadata": {KEY + key: value for key, value in provenance.items()},
    }
    with Worker(process.main_of("ggufloop.quant.child")) as worker:
        plan = _Reader(silent, log)
        _finish(worker.run(job, plan), plan, source, type)
        if not there:
            _check_room(target, _bytes(plan, headers))
            with atomic_path(target) as partial:
                run = _Reader(progress, log)
                _finish(worker.run(job | {"dry_run": False}, run), run, source, type)
                _check_whole(partial, target, provenance)
    return _describe(headers, target, type, plan.wanted, not there)


def planned_bytes(source: Path, types: Sequence[str]) -> int:
    """Of the files that `quantize` would make of `source`, as llama.cpp counts them. Raises as `quantize`."""
    headers, total = read_model(source), 0
    with Worker(process.main_of("ggufloop.quant.child")) as worker:
        for type in types:
            plan = _Reader(silent, None)
            _finish(worker.run(_dry_run(source, source, type), plan), plan, source, type)
            total += _bytes(plan, headers)
    return total


def _dry_run(source: Path, target: Path, type: str) -> dict[str, Any]:
    """A job of child.py that writes nothing."""
    return {"kind": "quantise", "source": str(source), "target": str(target), "ftype": FILE_TYPES[type], "threads": 0,
            "overrides": [], "imatrix": None, "metadata": {}, "dry_run": True}  # fmt: skip


def _bytes(plan: _Reader, headers: Sequence[Header]) -> int:
    """Of a file: its tensors as a dry run counted them, and a header like the source's."""
    return round(plan.mib * 2**20) + sum(h.data_end - sum(t.nbytes for t in h.tensors) for h in headers)


def _finish(done: dict[str, Any], reader: _Reader, source: Path, type: str) -> None:
    if done["code"] == 0:
        return
    if "imatrix" in reader.failed or "importance matrix" in reader.failed:
        raise GgufloopError(f"type {type} needs an importance matrix: {reader.failed}.", _GIVE_IMATRIX)
    hints = {
        "iostream": "nothing more could be written: free some space, or name another folder with --out.",
        "invalid data": "some of its weights are no numbers: get the file again.",
        "validation": "some weights are too large for this type: try BF16, or a type with fewer bits.",
    }
    raise GgufloopError(
        f"llama.cpp cannot quantise {source} to {type}: {reader.failed or 'it does not say why'}.",
        next((hint for part, hint in hints.items() if part in reader.failed), "run with -v to see its log."),
    )


def _check_whole(partial: Path, target: Path, provenance: dict[str, str]) -> None:
    """Raise GgufloopError unless the file is whole: llama.cpp does not notice when a write fails."""
    try:
        header = read_header(partial)
    except GgufloopError as e:
        free = shutil.disk_usage(partial.parent).free
        why = "the disk is full" if free < 1 << 20 else f"what was written is not whole ({e.message})"
        raise GgufloopError(f"cannot write {target}: {why}.", "free some space, or name another folder.") from None
    if _recipe(read_provenance(header)) != _recipe(provenance):
        raise GgufloopError(f"cannot write {target}: its metadata were not written.", "run with -v to see the log.")


def _made_alike(target: Path, provenance: dict[str, str]) -> bool:
    """Whether the file at `target` says that it was made by the same recipe."""
    try:
        return _recipe(read_provenance(read_header(target))) == _recipe(provenance)
    except GgufloopError:
        return False


def _describe(headers: Sequence[Header], path: Path, type: str, wanted: dict[str, str], made: bool) -> Quantized:
    before: dict[str, Tensor] = {t.name: t for h in headers for t in h.tensors}
    header = read_header(path)
    tensors = tuple(
        QuantizedTensor(t.name, t.shape, before[t.name].type, t.type, t.nbytes, wanted.get(t.name, ""))
        for t in header.tensors
    )
    bits = 8 * sum(t.nbytes for t in header.tensors) / sum(t.elements for t in header.tensors)
    return Quantized(path, type, file_sha256(path), header.file_bytes, bits, tensors, read_provenance(header), made)
