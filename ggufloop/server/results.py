"""What the page's second tab shows: the results of sweeps and comparisons in one folder.

    check_folder(folder)                              # once, at start
    list_results(folder)                              # [ResultFile(name="qwen3/sweep.jsonl", kind="jsonl", ...), ...]

The list holds regular files of known kinds, in the folder and two levels below it; hidden files, symbolic links and
anything too large to look at in a browser are left out. What is in it, and nothing else, is offered by serve.Site.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ggufloop.errors import GgufloopError
from ggufloop.server.headlines import headline

KINDS = ("jsonl", "json", "csv", "md", "png", "html")
"""Suffixes of what is shown."""

MOST_FILES = 1000
MOST_BYTES = 32 * 2**20
_LEVELS = 3


@dataclass(frozen=True)
class ResultFile:
    """A file of the results folder.

    name      its path in the folder, with '/' on every system.
    kind      one of KINDS.
    size      in bytes.
    modified  when it was last written, in seconds since 1970.
    headline  what it says in a sentence (`headlines.py`), of a file that has a verdict.
    """

    name: str
    kind: str
    size: int
    modified: float
    headline: str = ""


def check_folder(folder: Path) -> None:
    """Raise GgufloopError unless `folder` is one that can be listed."""
    try:
        with os.scandir(folder):
            pass
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        reason = getattr(e, "strerror", None) or e
        raise GgufloopError(f"cannot read the results folder {folder}: {reason}.", "name a folder of results.") from e


def list_results(folder: Path) -> list[ResultFile]:
    """What can be shown, newest first, MOST_FILES at most. A folder that is gone is empty."""
    found = [result for result in _walk(folder, "", _LEVELS) if result.size <= MOST_BYTES]
    found.sort(key=lambda result: (-result.modified, result.name))
    return found[:MOST_FILES]


def listing(folder: Path | None) -> dict[str, Any]:
    """What the page gets as results.json. folder: None where there is none; its name is told, not its path."""
    if folder is None:
        return {"folder": None, "results": []}
    found = [replace(r, headline=headline(folder / r.name, r.size, r.modified)) for r in list_results(folder)]
    return {"folder": folder.resolve().name, "results": [asdict(result) for result in found]}


def _walk(folder: Path, prefix: str, levels: int) -> Iterator[ResultFile]:
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
                yield ResultFile(prefix + entry.name, kind, status.st_size, status.st_mtime)


def _is_text(name: str) -> bool:
    """Whether a file name can be written in JSON; names may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
