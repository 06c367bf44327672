"""sha256 of model files, computed once: the result is kept in the cache and believed while size and time stay the same.

Hashing 18 GB takes half a minute, so what a download has checked is remembered here, and reports that must name the
model they measured cost nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ggufloop import reading
from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_path, cache_dir, lock

CHUNK = 1 << 20


def _records_path() -> Path:
    return cache_dir() / "sha256.json"


def _records() -> dict[str, tuple[int, int, str]]:
    """Size, time in ns and sha256 by path."""
    try:
        records: dict[str, tuple[int, int, str]] = reading.typed(
            reading.json(_records_path().read_bytes()), dict[str, tuple[int, int, str]], "it"
        )
    except (OSError, ValueError):  # none yet, or damaged: it is only a memory
        return {}
    return records


def _stamp(path: Path) -> tuple[str, tuple[int, int]]:
    real = path.resolve()
    stat = real.stat()
    return str(real), (stat.st_size, stat.st_mtime_ns)


def recall(path: Path) -> str | None:
    """The sha256 of a file if it was computed before and the file has not changed since."""
    name, stamp = _stamp(path)
    record = _records().get(name)
    return record[2] if record is not None and record[:2] == stamp else None


def remember(path: Path, sha256: str) -> None:
    """Keep a file's sha256. A cache that cannot be written only means it is computed again."""
    name, stamp = _stamp(path)
    target = _records_path()
    try:
        with lock(target.with_name("sha256.json.lock")), atomic_path(target) as partial:
            partial.write_text(json.dumps(_records() | {name: (*stamp, sha256)}, indent=1))
    except GgufloopError:
        pass


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex; reads it all unless the result is remembered. Raises OSError."""
    known = recall(path)
    if known is not None:
        return known
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(CHUNK):
            digest.update(block)
    remember(path, digest.hexdigest())
    return digest.hexdigest()


def files_sha256(paths: Sequence[Path]) -> str:
    """The sha256 of a model in one or several files: its own, or that of the list of its parts' sums."""
    sums = [file_sha256(path) for path in paths]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()
