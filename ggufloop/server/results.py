"""What the page's second tab shows: the results of sweeps and comparisons in one folder. Pure functions, no server.

    check_folder(folder)                              # once, at start
    list_results(folder)                              # [Result(name="qwen3/sweep.jsonl", kind="jsonl", ...), ...]
    content, headers = read_result(folder, name)      # UsageError unless the list has that very name

A request never becomes a path: a name is looked up in the list, which walks the folder afresh, and what is not in
it does not exist. So there is no path to escape with. The list holds regular files of known kinds, in the folder
and two levels below it; hidden files, symbolic links and anything too large to look at in a browser are left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggufloop.errors import GgufloopError, UsageError

KINDS = {
    "jsonl": "application/jsonl; charset=utf-8",
    "json": "application/json; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "png": "image/png",
    "html": "text/html; charset=utf-8",
}
"""Suffix of what is shown -> its media type."""

MOST_FILES = 1000
MOST_BYTES = 32 * 2**20
_LEVELS = 3

HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Of every file: a report that somebody else wrote is looked at, its scripts do not run and it has no origin."""


@dataclass(frozen=True)
class Result:
    """A file of the results folder.

    name      its path in the folder, with '/' on every system; what `read_result` takes.
    kind      one of KINDS.
    size      in bytes.
    modified  when it was last written, in seconds since 1970.
    """

    name: str
    kind: str
    size: int
    modified: float


def check_folder(folder: Path) -> None:
    """Raise GgufloopError unless `folder` is one that can be listed."""
    try:
        with os.scandir(folder):
            pass
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        reason = getattr(e, "strerror", None) or e
        raise GgufloopError(f"cannot read the results folder {folder}: {reason}.", "name a folder of results.") from e


def list_results(folder: Path) -> list[Result]:
    """What can be shown, newest first, MOST_FILES at most. A folder that is gone is empty."""
    found = [result for result in _walk(folder, "", _LEVELS) if result.size <= MOST_BYTES]
    found.sort(key=lambda result: (-result.modified, result.name))
    return found[:MOST_FILES]


def listing(folder: Path | None) -> dict[str, Any]:
    """The answer to `GET /results`. folder: None where the server was given none; its name is told, not its path."""
    return {
        "folder": None if folder is None else folder.resolve().name,
        "results": [] if folder is None else [asdict(result) for result in list_results(folder)],
    }


def read_result(folder: Path, name: str) -> tuple[bytes, dict[str, str]]:
    """A file's content and its response headers. Raises UsageError if the list does not have it."""
    known = {result.name: result.kind for result in list_results(folder)}
    if name in known:
        content = _read(folder / name)
        if content is not None:
            return content, {"Content-Type": KINDS[known[name]], **HEADERS}
    raise UsageError(f"there is no result {name[:200]!r}.", "GET /results lists what is there.")


def _walk(folder: Path, prefix: str, levels: int) -> Iterator[Result]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or not _is_text(entry.name):
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # gone meanwhile
            continue
        if stat.S_ISDIR(status.st_mode) and levels > 1:
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", levels - 1)
        elif stat.S_ISREG(status.st_mode):
            kind = Path(entry.name).suffix.lower().removeprefix(".")
            if kind in KINDS:
                yield Result(prefix + entry.name, kind, status.st_size, status.st_mtime)


def _is_text(name: str) -> bool:
    """Whether a file name can be written in JSON; names may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path) -> bytes | None:
    """The file, unless it has meanwhile gone, grown or become a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError:
        return None
    return content if len(content) <= MOST_BYTES else None
