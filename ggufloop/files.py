"""Where built backends and downloaded models are kept, and how files get there whole.

    with lock(cache_dir() / "models" / "m.gguf.lock"), atomic_path(target) as partial:
        ...write partial...                  # target appears only when the block ends without an error

Files are written under a temporary name beside their target and moved with os.replace, so a reader never meets half
of one. Ours have a fixed temporary name: whatever an interrupted run leaves behind is the next run's to clean or
continue, and never piles up. That makes a lock around it necessary. What the user names has no lock, and the temporary
name this process's number: `atomic_file`, and `write_text` for a whole text.

sha256 of model files are computed once: the result is kept in the cache and believed while size and time stay the same,
for hashing 18 GB takes half a minute, and what a download has checked is known.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import platformdirs

from ggufloop import reading
from ggufloop.errors import GgufloopError

PACKAGE = Path(__file__).resolve().parent
"""The package's folder; its parent is what sys.path needs for a child process to find it."""


def shipped(name: str) -> Path:
    """What comes beside the code: package data of an installed ggufloop, in the folder above of a source checkout."""
    for path in (PACKAGE / name, PACKAGE.parent / name):
        if path.exists():
            return path
    raise GgufloopError(f"{name} of ggufloop is missing.", "install ggufloop again.")


def cache_dir() -> Path:
    """The cache folder: $GGUFLOOP_CACHE, else the user's cache folder of the system. Not created here."""
    chosen = os.environ.get("GGUFLOOP_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("ggufloop", appauthor=False))


def write_error(error: OSError, path: Path) -> GgufloopError:
    """What the user should read when writing `path`, in the cache or named by the user, failed."""
    ours = path.is_relative_to(cache_dir())
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):  # Windows has no quota errno
        other = "set GGUFLOOP_CACHE to another folder" if ours else "name another file"
        return GgufloopError(f"the disk is full: cannot write {path}.", f"free some space, or {other}.")
    return GgufloopError(
        f"cannot write {path}: {error.strerror or error}.",
        "set GGUFLOOP_CACHE to a folder you can write to." if ours else "name another file.",
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the parent folder of `path`; an OSError raised inside becomes a GgufloopError naming `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise write_error(e, path) from e


def partial_path(path: Path) -> Path:
    """The temporary name `path` is written under."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Delete a file or a folder, whether or not it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path (nothing is there) to write a file or a folder to, moved to `path` at the end.

    On any error or interrupt the temporary is removed and `path` is untouched. Call it under `lock`. An existing
    folder at `path` is not replaced. Raises GgufloopError when writing fails.
    """
    partial = partial_path(path)
    with writing(path):
        remove(partial)
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            remove(partial)
            raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`atomic_path` for a file that the user names: without a lock, and in a folder that is there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        partial.touch()
        try:
            yield partial
            os.replace(partial, path)
        finally:
            remove(partial)
    except OSError as e:
        raise write_error(e, path) from e
    except ValueError as e:
        if "\0" not in str(path):
            raise
        raise GgufloopError(f"cannot write {path}: {e}.", "name another file.") from e


def check_writable(path: Path) -> None:
    """Raise GgufloopError if a file that the user names could not be written; nothing is left there."""
    with suppress(_Enough), atomic_file(path):
        raise _Enough


class _Enough(Exception):
    """A file could be written, and is not to be."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; what no UTF-8 can hold of a file's name becomes '?'. Raises GgufloopError."""
    with atomic_file(path) as partial:
        partial.write_bytes(text.encode("utf-8", "replace"))


@contextmanager
def lock(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`; `waiting()` is called once if another process has it.

    The file stays (removing it would let two processes hold different files of the same name). The system drops the
    lock of a process that dies.
    """
    held = filelock.FileLock(path)
    with writing(path):
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            waiting()
            held.acquire()
    try:
        yield
    finally:
        held.release()


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
