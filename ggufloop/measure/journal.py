"""A file of JSON lines that outlives its writer: a run that was stopped goes on from what is in it.

    with Journal.open(path, {"model_sha256": ..., "text": ...}) as journal:
        for record in journal.records: ...           # of an earlier run with the same header
        journal.add({"loop": "12:16 k=2", ...})      # on disk when this returns
    append(path, {...})                              # the same to a journal that is not open, such as a study's
    for shard in beside(path, header): ...           # journals of shards of that run, in the same folder

The first line says what the run is of. A file with another first line is refused with what differs, so numbers of two
models never meet in one table. A line is written at once and synced. What a crash or a bad disk left at the end of the
file is dropped on opening, and `dropped` says what that was; `reading.py` tells such an end from damage before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import filelock

from ggufloop import reading
from ggufloop.errors import GgufloopError
from ggufloop.files import write_error
from ggufloop.progress import Progress, note, silent

Record = Mapping[str, Any]
Check = Callable[[dict[str, Any]], object]
"""Raises ValueError for a record that the run cannot have written, of a header GgufloopError too."""
Compare = Callable[[Path, dict[str, Any], dict[str, Any]], None]
"""Raises GgufloopError if the header there is of another run than the one here, naming what differs."""
_OF_SHARD = ("shard", "racing")
"""What the first line of a shard's journal says of its own."""


def _anything(record: dict[str, Any]) -> None:
    pass


class Journal:
    """An open journal, held by this process alone. records: what it held when it was opened, the header left out;
    dropped: a sentence on what could not be read behind them, '' if everything could."""

    def __init__(
        self, path: Path, file: IO[bytes], records: list[dict[str, Any]], dropped: str, lock: filelock.BaseFileLock
    ) -> None:
        self.path = path
        self.records = records
        self.dropped = dropped
        self._file = file
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: Path,
        header: Record,
        check: Check = _anything,
        *,
        what: str = "journal of a run",
        check_header: Check = _anything,
        compare: Compare | None = None,
    ) -> Journal:
        """Continue the journal at `path`, or begin it. what: it is called, in an error.

        Raises GgufloopError if it is of another run, is none, is damaged before its end, is being written by another
        process or cannot be written.
        """
        lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise GgufloopError(f"{path} is being written by another run.", "wait for it, or name another.") from None
        except OSError as e:
            raise write_error(e, path) from e
        try:
            begun = _read(path, what, check_header=check_header).records  # whose it is comes before what it holds
            if begun:
                (compare or _compare)(path, begun[0][1], json.loads(reading.line(header)))
            found = _read(path, what, check, check_header)
            lines = [record for _, record in found.records]
            file = path.open("r+b" if path.exists() else "w+b")
        except OSError as e:
            lock.release()
            raise write_error(e, path) from e
        except BaseException:
            lock.release()
            raise
        journal = cls(path, file, lines[1:], found.dropped, lock)
        file.truncate(found.end)
        file.seek(found.end)
        if not lines:
            journal.add(header)
        return journal

    @staticmethod
    def header(path: Path) -> dict[str, Any] | None:
        """The first line of the journal at `path`, None if there is none. Raises GgufloopError as `open` does."""
        lines = Journal.lines(path)
        return lines[0] if lines else None

    @staticmethod
    def lines(path: Path, check: Check = _anything, what: str = "journal of a run") -> list[dict[str, Any]]:
        """What the journal at `path` holds by now, its header first. Raises GgufloopError as `open` does."""
        return [record for _, record in _read(path, what, check).records]

    def add(self, record: Record) -> None:
        """Append a record. Raises GgufloopError if it cannot be written."""
        try:
            _write(self._file, record)
        except OSError as e:
            raise write_error(e, self.path) from e

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        self._lock.release()


def beside(path: Path, header: Record, progress: Progress = silent) -> Iterator[Path]:
    """The journals of shards in the folder of a journal that are of the run it is of; of others a note says so.

    Raises GgufloopError for a file called so that is damaged.
    """
    whole = {**json.loads(reading.line(header)), **dict.fromkeys(_OF_SHARD)}
    for shard in sorted(path.parent.glob(f"{escape(path.stem)}-*-of-*{path.suffix}")):
        there = {**(Journal.header(shard) or {}), **dict.fromkeys(_OF_SHARD)}
        differ = [key for key in whole if there.get(key) != whole[key]]
        if differ:
            note(progress, f"{shard} is of another run ({', '.join(differ)}), and left alone.")
        else:
            yield shard


def append(path: Path, record: Record) -> None:
    """Append a record to a journal that `open` has begun or mended. Raises GgufloopError if it cannot be written."""
    try:
        with path.open("ab") as file:
            _write(file, record)
    except OSError as e:
        raise write_error(e, path) from e


def _write(file: IO[bytes], record: Record) -> None:
    file.write(reading.line(record))
    file.flush()
    os.fsync(file.fileno())


def _read(
    path: Path, what: str = "journal of a run", check: Check = _anything, check_header: Check = _anything
) -> reading.Lines[dict[str, Any]]:
    """The records of a file that can be read; none of a file that is not there. A header cut short is none yet."""
    try:
        data = reading.content(path, "name another file.")
    except FileNotFoundError:
        data = b""

    def checked(record: dict[str, Any], first: bool) -> dict[str, Any]:
        (check_header if first else check)(record)
        return record

    return reading.read_lines(path, data, what, checked)


def _compare(path: Path, there: Record, here: Record) -> None:
    """Raise GgufloopError naming the first settings that differ."""
    keys = [key for key in [*here, *(k for k in there if k not in here)] if there.get(key) != here.get(key)]
    if keys:
        what = "; ".join(
            f"{key} is {_short(there.get(key))} there and {_short(here.get(key))} here" for key in keys[:3]
        )
        raise GgufloopError(f"{path} is of another run: {what}.", "name another file, or repeat that run's settings.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"
