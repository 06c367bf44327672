"""Every sweep and study kept in a folder, as one table: a row per measure, file type and loop.

    found = collect(Path("studies"))
    found.table().render("csv")                      # pandas.read_csv reads it
    found.skipped                                    # files that are neither, and why

Scores are higher where a model is better, as in a sweep: log-probability in nats per token for a text, the share of
right answers for a task. Gains are over the plain model of the same file on the same items, with 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggufloop import reading
from ggufloop.errors import GgufloopError
from ggufloop.loop import PLAIN
from ggufloop.measure.verdict import NATS, WORTHS, judge
from ggufloop.study import file as studies
from ggufloop.table import Cell, Table, columns

SWEEP, STUDY = "sweep", "study"
_COLUMNS = columns("file", "kind", "model", "type", "measure", "loop", "n:d", "score:.5f", "gain:+.5f", "low:+.5f",
                   "high:+.5f")  # fmt: skip


@dataclass(frozen=True)
class Collection:
    """rows: of `table`. files: a line for each result file: name, kind, model, rows."""

    files: list[list[Cell]]
    rows: list[list[Cell]]
    skipped: list[str]

    def table(self) -> Table:
        """A row per measure, type and loop."""
        return Table(_COLUMNS, self.rows)

    def listing(self) -> Table:
        """A row per file."""
        return Table(columns("file", "kind", "model", "rows:d"), self.files)


def collect(folder: Path) -> Collection:
    """Read what `ggufloop sweep` and `ggufloop compare` kept in a folder and below. Raises GgufloopError."""
    if not folder.is_dir():
        raise GgufloopError(f"there is no folder {folder}.", "name one that holds results, such as studies.")
    found = Collection([], [], [])
    for path in sorted(folder.rglob("*.jsonl")):
        name = path.relative_to(folder).as_posix()
        try:
            kind, model, rows = _read(path)
        except GgufloopError as e:
            found.skipped.append(f"{name}: {e.message}")
            continue
        if kind:
            found.files.append([name, kind, model, len(rows)])
            found.rows.extend([name, kind, model, *row] for row in rows)
    return found


def _read(path: Path) -> tuple[str, str, list[list[Cell]]]:
    """Kind, model and rows of a file; '' for one that is of something else."""
    data = reading.content(path, "name another folder.")
    lines = [r for _, r in reading.read_lines(path, data, "file of results", lambda record, first: record).records]
    head: dict[str, Any] = lines[0] if lines else {}
    if head.get("shard"):
        return "", "", []  # what `merge --out` makes of them is the result
    if "measures" in head:
        return SWEEP, str(head.get("model", "")), list(_sweep(lines[1:]))
    if "source_sha256" in head:
        study = studies.read(path)
        return STUDY, study.header.model, list(_study(study))
    return "", "", []


def _sweep(records: list[dict[str, Any]]) -> Iterator[list[Cell]]:
    """Rows of a journal; what was scored on fewer than two items that plain was scored on says nothing yet."""
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        if "loop" in record:
            known = scores.setdefault((record["measure"], record["loop"]), {})
            known.update(zip(record["items"], record["scores"], strict=True))
    for (measure, loop), known in scores.items():
        plain = scores.get((measure, PLAIN), {})
        items = sorted(known.keys() & plain.keys())
        gain = np.array([known[i] - plain[i] for i in items])
        yield [None, *_row(measure, loop, np.array(list(known.values())), gain)]


def _study(study: studies.Study) -> Iterator[list[Cell]]:
    for type_ in study.types:
        for loop in study.loops:
            cell = study.cells.get((type_, loop))
            if cell is None:
                continue
            plain = study.cells.get((type_, PLAIN))
            before = {} if plain is None else {chunk.index: chunk.nll for chunk in plain.chunks}
            gain = np.array([before[c.index] - c.nll for c in cell.chunks if c.index in before])
            scores = -np.array([c.nll for c in cell.chunks])
            yield [type_, *_row(study.header.text, loop, scores, gain, neighbours=True)]
            for task, result in cell.tasks.items():
                other = None if plain is None else plain.tasks.get(task)
                known = {} if other is None else dict(zip(other.docs, other.right, strict=True))
                pairs = zip(result.docs, result.right, strict=True)
                gain = np.array([right - known[doc] for doc, right in pairs if doc in known])
                yield [type_, *_row(task, loop, np.array(result.right), gain)]


def _row(measure: str, loop: str, scores: Any, gains: Any, neighbours: bool = False) -> list[Cell]:
    """The gain with the interval of one verdict (`verdict.judge`): exact for answers, which may all be the same, and
    of chunks that are neighbours in one text wider."""
    told: list[Cell] = [None] * 3
    if loop != PLAIN and len(gains) > 1:
        gain = judge(gains, WORTHS[NATS], documents=[0] * len(gains) if neighbours else None).gain
        told = [gain.mean, gain.low, gain.high]
    return [measure, loop, len(scores), float(scores.mean()) if len(scores) else None, *told]
