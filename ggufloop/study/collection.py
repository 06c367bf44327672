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
from ggufloop.flat import frame
from ggufloop.loop import PLAIN
from ggufloop.measure.verdict import NATS, WORTHS, judge
from ggufloop.study import file as studies
from ggufloop.table import Cell, Table, columns

SWEEP, STUDY = "sweep", "study"
_COLUMNS = columns("file", "kind", "model", "type", "measure", "loop", "n:d", "score:.5f", "gain:+.5f", "low:+.5f",
                   "high:+.5f")  # fmt: skip
_MORE = columns("p", "plain", "verdict", "worth")


@dataclass(frozen=True)
class Collection:
    """rows: of `numbers`. files: a line for each result file: name, kind, model, rows."""

    files: list[list[Cell]]
    rows: list[list[Cell]]
    skipped: list[str]

    def table(self) -> Table:
        """A row per measure, type and loop."""
        return Table(_COLUMNS, [row[: len(_COLUMNS)] for row in self.rows])

    def numbers(self) -> Table:
        """The same for programs, with p, the plain model's mean on the same items and the word of a verdict on this
        row alone: nothing is corrected for how many loops there are, nor for items that chose one of them."""
        return Table((*_COLUMNS, *_MORE), self.rows)

    def frame(self) -> Any:
        """`numbers` as a DataFrame; its attrs["skipped"] says what was left out. Raises UsageError without pandas."""
        found = frame(self.numbers())
        found.attrs["skipped"] = self.skipped
        return found

    def listing(self) -> Table:
        """A row per file."""
        return Table(columns("file", "kind", "model", "rows:d"), self.files)


def collect(folder: Path) -> Collection:
    """Read what `ggufloop sweep` and `ggufloop compare` kept in a folder and below. Raises GgufloopError."""
    if not folder.is_dir():
        raise GgufloopError(f"there is no folder {folder}.", "name one that holds results, such as studies.")
    found = Collection([], [], [])
    for path in sorted(folder.rglob("*.jsonl")):
        if path.match("answer.jsonl") or path.match("answer-*.jsonl"):
            continue  # some of its items chose the loop: answer.csv has what the others say
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


def results(folder: Path | str) -> Any:
    """What `ggufloop results DIR -o csv` prints, as a DataFrame. Raises as `collect` and `frame`."""
    return collect(Path(folder)).frame()


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
        pairs = np.array([(known[i], plain[i]) for i in items]).reshape(-1, 2)
        yield [None, *_row(measure, loop, np.array(list(known.values())), pairs)]


def _study(study: studies.Study) -> Iterator[list[Cell]]:
    for type_ in study.types:
        for loop in study.loops:
            cell = study.cells.get((type_, loop))
            if cell is None:
                continue
            plain = study.cells.get((type_, PLAIN))
            before = {} if plain is None else {chunk.index: chunk.nll for chunk in plain.chunks}
            both = [(-c.nll, -before[c.index]) for c in cell.chunks if c.index in before]
            scores = -np.array([c.nll for c in cell.chunks])
            yield [type_, *_row(study.header.text, loop, scores, np.array(both).reshape(-1, 2), neighbours=True)]
            for task, result in cell.tasks.items():
                other = None if plain is None else plain.tasks.get(task)
                known = {} if other is None else dict(zip(other.docs, other.right, strict=True))
                pairs = zip(result.docs, result.right, strict=True)
                both = [(right, known[doc]) for doc, right in pairs if doc in known]
                yield [type_, *_row(task, loop, np.array(result.right), np.array(both).reshape(-1, 2))]


def _row(measure: str, loop: str, scores: Any, pairs: Any, neighbours: bool = False) -> list[Cell]:
    """The gain with the interval of one verdict (`verdict.judge`): exact for answers, which may all be the same, and
    of chunks that are neighbours in one text wider. pairs: scores looped and plain of the items that have both."""
    told: list[Cell] = [None] * 7
    if loop != PLAIN and len(pairs) > 1:
        v = judge(pairs[:, 0] - pairs[:, 1], WORTHS[NATS], documents=[0] * len(pairs) if neighbours else None)
        told = [v.gain.mean, v.gain.low, v.gain.high, v.gain.p, float(pairs[:, 1].mean()), v.word, v.worth]
    return [measure, loop, len(scores), float(scores.mean()) if len(scores) else None, *told]
