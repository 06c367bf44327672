"""A study: the quantisations of one model, each measured under each loop on the same chunks of a text.

    study = read(path)                                   # a .jsonl that `ggufloop compare` wrote
    study.types, study.loops                             # ("F32", "Q8_0", ...), ("plain", "12:16 k=2", ...)
    cell = study.cell("Q4_K_M", "12:16 k=3")
    cell.values("nll")                                   # float64, one mean per chunk, in order of the chunks
    check_comparable(study, other)                       # refuses another text or version, naming the difference

The file is JSON lines: what the study is of, then each model file of the ladder, then one line per (type, loop, chunk)
and per (type, loop, task), in the order they were measured. Lines are only ever appended, so a run that was stopped
leaves whole measurements behind, and more types, loops, chunks or tasks extend the same file, a `Journal`. A damaged
end is left out, and `Study.dropped` says so; damage with measurements behind it is an error that names the line.

Names of loops are str(LoopSpec), and PLAIN without one. Every KL is llama-perplexity's direction: sum over the
vocabulary of p_ref (ln p_ref - ln p_model), with the reference under the *same* loop as the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ggufloop import reading
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.loop import PLAIN
from ggufloop.measure.journal import Journal, append
from ggufloop.measure.stats import Values

SCHEMA_VERSION = 1

_RANGES = {
    "index": (0, 2**31), "n": (1, 2**31), "n_bytes": (0, 2**40), "nll": (0, 700), "nll_squares": (0, 1e9),
    "kl": (-1, 1e9), "same_top": (0, 1), "seconds": (0, 1e9),
}  # fmt: skip
"""What a chunk's numbers can be: e^700 is about the largest perplexity there is a number for; rounding takes a KL a
little below 0."""


@dataclass(frozen=True)
class StudyHeader:
    """What every measurement of a study has in common; two studies are comparable if `check_comparable` says so.

    model          file the ladder was made from, source_sha256 its hash, source_type what it is said to be quantised to
    architecture, n_layer, n_params, n_vocab    of that model
    reference      type of the reference: the source itself, or the source dequantised to this type
    window         layers (a, b), half-open, of every loop; `File.window_snr` is of theirs
    text           name of the text, text_sha256 of its UTF-8 bytes
    n_ctx          tokens of a chunk, evaluated on an empty cache; those after its middle are scored
    settings       what else may change a number: cache types, flash attention, batch sizes, threads
    ggufloop, patch_id    versions that measured
    shard          which part of the chunks and questions it is of, '' for all: `study/merge.py`
    """

    model: str
    source_sha256: str
    source_type: str
    architecture: str
    n_layer: int
    n_params: int
    n_vocab: int
    reference: str
    window: tuple[int, int]
    text: str
    text_sha256: str
    n_ctx: int
    settings: dict[str, str]
    ggufloop: str
    patch_id: str
    shard: str = ""


@dataclass(frozen=True)
class File:
    """A model file of the ladder.

    type           its name in the study: what it was quantised to, or the name of a file that was measured as it is
    sha256, nbytes of the file; bits_per_weight over all tensors, true size
    snr            signal to noise of all weight matrices against the reference's, in dB; inf where they are the same
    window_snr     the same of the window's
    note           what is worth knowing of it, such as tensors that fell back to another type
    """

    type: str
    sha256: str
    nbytes: int
    bits_per_weight: float
    snr: float
    window_snr: float
    note: str = ""


@dataclass(frozen=True)
class Chunk:
    """One chunk under one loop: means over its n scored tokens, which are n_bytes of text.

    nll, nll_squares   negative log-likelihood in nats, and its square
    kl                 from the reference under the same loop, in nats; 0 for the reference
    same_top           share of tokens at which both find the same token likeliest; 1 for the reference
    seconds            to evaluate all n_ctx tokens, without scoring them
    """

    index: int
    n: int
    n_bytes: int
    nll: float
    nll_squares: float
    kl: float
    same_top: float
    seconds: float


@dataclass(frozen=True)
class TaskResult:
    """A task's questions: (lm-eval's task, number); right: 1 or 0; gold: the right answer's log-probability or None.

    limit: questions of each lm-eval task that were asked for, None for all. order: lm-eval's tasks, of a shard.
    """

    docs: tuple[tuple[str, int], ...]
    right: tuple[float, ...]
    gold: tuple[float | None, ...]
    limit: int | None = None
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One type under one loop: its chunks in order, and its tasks by name."""

    type: str
    loop: str
    chunks: tuple[Chunk, ...]
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    def values(self, name: str) -> Values:
        """One number per chunk, float64: a field of Chunk."""
        return np.array([getattr(chunk, name) for chunk in self.chunks], dtype=np.float64)

    @property
    def n(self) -> int:
        """Tokens scored."""
        return sum(chunk.n for chunk in self.chunks)

    def mean(self, name: str) -> float:
        """Mean over all tokens of a per-token field of Chunk."""
        return float(np.average(self.values(name), weights=self.values("n")))

    @property
    def ppl(self) -> tuple[float, float]:
        """Perplexity and its standard error over tokens, llama-perplexity's."""
        nll = self.mean("nll")
        variance = max(0.0, self.mean("nll_squares") - nll * nll)
        return math.exp(nll), math.exp(nll) * math.sqrt(variance / max(1, self.n - 1))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: what models of different tokenizers can be compared by."""
        return float(self.values("nll") @ self.values("n") / math.log(2) / self.values("n_bytes").sum())


@dataclass(frozen=True)
class Study:
    """What was measured. files: the reference first, then in the order they were added; cells in no order.

    dropped: a sentence on a damaged end that was left out of the file, '' if there is none.
    """

    header: StudyHeader
    files: tuple[File, ...]
    cells: dict[tuple[str, str], Cell]
    dropped: str = field(default="", compare=False)

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the files that were measured, the reference first."""
        return tuple(f.type for f in self.files if any(key[0] == f.type for key in self.cells))

    @property
    def loops(self) -> tuple[str, ...]:
        """Names of the loops, PLAIN first, others in the order they were measured."""
        found = dict.fromkeys(loop for _, loop in self.cells)
        return tuple(sorted(found, key=lambda loop: loop != PLAIN))

    def same_weights(self, type_: str) -> str | None:
        """An earlier type whose file gave exactly the same numbers: llama.cpp made the same tensors of both."""
        i = self.types.index(type_)
        mine = self.cells.get((type_, PLAIN))
        for other in self.types[1:i]:
            theirs = self.cells.get((other, PLAIN))
            if mine is not None and theirs is not None and self.file(other).snr == self.file(type_).snr:
                a, b = ({c.index: (c.nll, c.kl) for c in cell.chunks} for cell in (mine, theirs))
                if a.keys() & b.keys() and all(a[j] == b[j] for j in a.keys() & b.keys()):
                    return other
        return None

    def file(self, type_: str) -> File:
        """The file of this name. Raises UsageError if there is none."""
        for f in self.files:
            if f.type == type_:
                return f
        raise UsageError(f"this study has no type {type_!r}.", nearest(type_, [f.type for f in self.files]))

    def cell(self, type_: str, loop: str = PLAIN) -> Cell:
        """What was measured of a type under a loop. Raises UsageError if nothing was."""
        if (type_, loop) not in self.cells:
            self.file(type_)
            raise UsageError(
                f"this study has nothing of {type_} under {loop!r}.",
                nearest(loop, [b for a, b in self.cells if a == type_]),
            )
        return self.cells[type_, loop]

    def paired(self, *keys: tuple[str, str]) -> tuple[Cell, ...]:
        """These cells (type, loop), cut down to the chunks that all of them have. Raises UsageError if none is."""
        cells = [self.cell(*key) for key in keys]
        shared = set.intersection(*({c.index for c in cell.chunks} for cell in cells))
        if not shared:
            raise UsageError(
                f"{' and '.join(f'{t} under {loop}' for t, loop in keys)} have no chunk in common.",
                "measure them again: ggufloop compare with the same --out continues the study.",
            )
        return tuple(
            dataclasses.replace(cell, chunks=tuple(c for c in cell.chunks if c.index in shared)) for cell in cells
        )

    def lacks_task(self, type_: str, loop: str, task: str, limit: int | None) -> bool:
        """Whether a task was not asked yet, or up to another limit."""
        cell = self.cells.get((type_, loop))
        return cell is None or task not in cell.tasks or cell.tasks[task].limit != limit

    def lacks(self, type_: str, loop: str, chunks: Iterable[int]) -> list[int]:
        """Which of these chunks were not measured yet."""
        cell = self.cells.get((type_, loop))
        have = {c.index for c in cell.chunks} if cell is not None else set()
        return [i for i in chunks if i not in have]


# Reading and writing


def read(path: Path) -> Study:
    """The study in a file. Raises GgufloopError for one that cannot be read, is damaged, or of another schema."""
    hint = "name a study that ggufloop compare wrote."
    try:
        data = reading.content(path, hint)
    except FileNotFoundError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror}.", hint) from e
    found = reading.read_lines(path, data, "study", _record)
    header: StudyHeader | None = None
    files: dict[str, File] = {}
    chunks: dict[tuple[str, str], dict[int, Chunk]] = {}
    tasks: dict[tuple[str, str], dict[str, TaskResult]] = {}
    for number, line in found.records:
        if isinstance(line, StudyHeader):
            header = line
        elif isinstance(line, File):
            files[line.type] = line
        elif line[0][0] not in files:
            raise GgufloopError(
                f"line {number} of {path} is of {line[0][0]}, and no line before it says which file that is.",
                f"take all lines of {line[0][0]} out; it is measured again.",
            )
        elif len(line) == 2:
            chunks.setdefault(line[0], {})[line[1].index] = line[1]
        else:
            tasks.setdefault(line[0], {})[line[1]] = line[2]
    if header is None:
        raise GgufloopError(f"{path} holds no study.", "ggufloop compare writes one.")
    cells = {
        key: Cell(*key, tuple(c for _, c in sorted(chunks.get(key, {}).items())), tasks.get(key, {}))
        for key in {**chunks, **tasks}
    }
    return Study(header, tuple(files.values()), cells, found.dropped)


def create(path: Path, header: StudyHeader) -> Study:
    """Begin a study in a new file, or go on with the one there. Raises GgufloopError if that is not of the same model,
    text, settings and version."""
    record = {"kind": "study", "schema_version": SCHEMA_VERSION, **dataclasses.asdict(header)}
    if not header.shard:
        del record["shard"]
    checks = {"check": partial(_record, first=False), "check_header": partial(_record, first=True)}
    with Journal.open(path, record, what="study", compare=_compare, **checks) as journal:
        return dataclasses.replace(read(path), dropped=journal.dropped)


def _compare(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise GgufloopError unless two first lines are of the same study."""
    names = tuple(f.name for f in dataclasses.fields(StudyHeader))
    found = _differences(_record(there, first=True), _record(here, first=True), names)
    _refuse(found, f"{path} holds another study", "choose another --out, or repeat it as it was.")


def add_file(path: Path, study: Study, file: File) -> Study:
    """Record a model file; the one of this name that is there must be the same. Raises GgufloopError."""
    for old in study.files:
        if old.type == file.type:
            if old.sha256 != file.sha256:
                raise GgufloopError(
                    f"{file.type} was measured on a file {old.sha256[:12]}..., and is {file.sha256[:12]}... now.",
                    "choose another --out; the two cannot be one row.",
                )
            return study
    record = dataclasses.asdict(file)
    for name in ("snr", "window_snr"):
        record[name] = None if math.isinf(record[name]) else record[name]  # JSON has no word for it
    append(path, {"kind": "file", **record})
    return dataclasses.replace(study, files=(*study.files, file))


def add_chunk(path: Path, type_: str, loop: str, chunk: Chunk) -> None:
    """Record one chunk of a cell. Raises GgufloopError for numbers that no model has, or a file not to be written."""
    bad = _bad(chunk)
    if bad:
        how = "usable" if math.isfinite(getattr(chunk, bad)) else "finite"
        raise GgufloopError(
            f"{type_} under {loop} has no {how} {bad} on chunk {chunk.index}.",
            "this model or loop computes no usable logits; leave it out.",
        )
    append(path, {"kind": "chunk", "type": type_, "loop": loop, **dataclasses.asdict(chunk)})


def add_task(path: Path, type_: str, loop: str, task: str, result: TaskResult) -> None:
    """Record a task of a cell."""
    record = {name: value for name, value in dataclasses.asdict(result).items() if name != "order" or value}
    append(path, {"kind": "task", "type": type_, "loop": loop, "task": task, **record})


def check_comparable(a: Study, b: Study) -> None:
    """Raise GgufloopError, naming the differences, unless two studies measured the same text in the same way.

    The models, windows and loops may differ; models of different tokenizers are compared in bits per byte.
    """
    names = ("text_sha256", "n_ctx", "settings", "ggufloop", "patch_id")
    _refuse(
        _differences(a.header, b.header, names),
        f"the studies of {a.header.model} and {b.header.model} cannot be compared",
        "measure both with the same text, -c and version.",
    )


def _differences(a: StudyHeader, b: StudyHeader, names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, dict):
            found += [f"{k} {x.get(k)} and {y.get(k)}" for k in sorted({*x, *y}) if x.get(k) != y.get(k)]
        elif x != y:
            short = [v[:12] + "..." if name.endswith("sha256") else _words(v) for v in (x, y)]
            found.append(f"{name} {short[0]} and {short[1]}")
    return found


def _words(value: object) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _refuse(differences: list[str], what: str, hint: str) -> None:
    if differences:
        raise GgufloopError(f"{what}: {'; '.join(differences)}.", hint)


def _record(record: dict[str, Any], first: bool) -> Any:
    """One line. Raises ValueError for what compare does not write, GgufloopError for a first line of another schema."""
    record = dict(record)
    kind = record.pop("kind", None)
    if first:
        version = record.pop("schema_version", None)
        if kind != "study" or version != SCHEMA_VERSION:
            raise GgufloopError(
                f"schema version {reading.shown(version)} is not {SCHEMA_VERSION}.",
                "measure it again with this ggufloop.",
            )
        return _header(record)
    if kind == "file":
        return _file(record)
    key = tuple(reading.typed(record.pop(name, None), str, name) for name in ("type", "loop"))
    if kind == "chunk":
        chunk = reading.build(Chunk, record)
        if bad := _bad(chunk):
            raise ValueError(f"{bad} is {getattr(chunk, bad)}, not in {_RANGES[bad][0]} to {_RANGES[bad][1]:g}")
        return key, chunk
    if kind == "task":
        return key, reading.typed(record.pop("task", None), str, "task"), _task(record)
    raise ValueError(f"its kind is {reading.shown(kind)}")


def _header(record: dict[str, Any]) -> StudyHeader:
    header = reading.build(StudyHeader, record)
    for name in ("n_layer", "n_params", "n_vocab", "n_ctx"):
        if getattr(header, name) < 1:
            raise ValueError(f"{name} is {getattr(header, name)}, not 1 or more")
    a, b = header.window
    if not 0 <= a < b <= header.n_layer:
        raise ValueError(f"its window is {a}:{b} of {header.n_layer} layers")
    return header


def _file(record: dict[str, Any]) -> File:
    for name in ("snr", "window_snr"):
        record[name] = math.inf if record.get(name, 0) is None else record.get(name)
    file = reading.build(File, record)
    if file.nbytes < 1 or not 0 < file.bits_per_weight <= 64:
        raise ValueError(f"it is {file.nbytes} bytes, {file.bits_per_weight:g} bits per weight")
    return file


def _task(record: dict[str, Any]) -> TaskResult:
    result = reading.build(TaskResult, record)
    if not len(result.docs) == len(result.right) == len(result.gold) or not (result.docs or result.order):
        raise ValueError(f"{len(result.docs)} questions have {len(result.right)} and {len(result.gold)} results")
    if not all(0 <= right <= 1 for right in result.right):
        raise ValueError("a question is neither right nor wrong")
    if not all(gold is None or abs(gold) <= 1e9 for gold in result.gold):
        raise ValueError("a log-probability is over 1e9")
    return result


def _bad(chunk: Chunk) -> str:
    """The first number of a chunk that it cannot have, '' if all are good."""
    return next((name for name, (low, high) in _RANGES.items() if not low <= getattr(chunk, name) <= high), "")
