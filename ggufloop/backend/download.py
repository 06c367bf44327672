"""What a build takes from the package index, all through pip so that the user's index, proxy and certificates count:
the pinned source archive, the Python binding out of that same archive, and cmake and ninja where the system has none.

An archive put into <cache>/sdist by hand is used as it is, so a machine without network can build too.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

from ggufloop.backend import library
from ggufloop.backend.log import BuildLog
from ggufloop.errors import BackendError
from ggufloop.files import atomic_path, cache_dir, file_sha256, remove
from ggufloop.progress import Progress, Step

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
_OFFLINE = (
    "ConnectionError", "Connection refused", "Connection aborted", "NameResolution", "name resolution", "getaddrinfo",
    "Network is unreachable", "ProxyError", "timed out", "ReadTimeout", "ConnectTimeout",
    "No matching distribution", "from versions: none",
)  # fmt: skip
_ERROR_MARKS = ("ERROR", "error:", "Error:", "No space left")


def sdist(log: BuildLog, progress: Progress) -> Path:
    """The pinned source archive, downloaded if it is not in the cache. Raises BackendError; call it under the lock."""
    target = cache_dir() / "sdist" / library.SDIST
    if target.is_file():
        if file_sha256(target) == library.SDIST_SHA256:
            return target
        progress(Step(f"{target} is damaged and is downloaded again"))
        remove(target)
    requirement = f"{library.BINDING}=={library.BINDING_VERSION}"
    progress(Step(f"downloading {requirement}, which carries llama.cpp (73 MiB)"))
    with atomic_path(target) as partial:
        folder = partial.with_name(".download")
        remove(folder)
        try:
            _pip(log, ["download", "--no-deps", "--no-binary", library.BINDING, requirement, "-d", folder],
                 f"download {requirement}", progress,
                 offline=f"or put {library.SDIST} into {target.parent}")  # fmt: skip
            fetched = folder / library.SDIST
            found = file_sha256(fetched) if fetched.is_file() else "none"
            if found != library.SDIST_SHA256:
                raise BackendError(
                    f"the package index gave another {library.SDIST}: its sha256 is {found}, "
                    f"it must be {library.SDIST_SHA256}.",
                    "point pip to an index that carries the original file (pip config list shows which one is used).",
                )
            shutil.move(fetched, partial)
        finally:
            remove(folder)
    return target


def binding(log: BuildLog, progress: Progress, replace: bool = False) -> None:
    """Install llama_cpp, without a library, into this Python if it is not there in the version the library needs.

    replace: allow to put it in the place of another version. Raises BackendError.
    """
    found = library.binding_version()
    if found == library.BINDING_VERSION:
        return
    check_binding(replace)
    progress(Step(f"installing {library.BINDING} {library.BINDING_VERSION} (the binding, without a library)"))
    # pip's wheel cache does not look at CMAKE_ARGS: a cached wheel with a library in it would be taken for this one
    _pip(log, ["install", "--no-cache-dir", "--no-deps", sdist(log, progress)], f"install {library.BINDING}", progress,
         env={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"})  # fmt: skip
    importlib.invalidate_caches()  # this process has looked for it before


def check_binding(replace: bool) -> None:
    """Raise BackendError if another version of the binding is installed and `replace` does not allow to replace it."""
    found = library.binding_version()
    if found not in (None, library.BINDING_VERSION) and not replace:
        raise BackendError(
            f"{library.BINDING} {found} is installed, this version of ggufloop needs {library.BINDING_VERSION}.",
            "run: ggufloop build --replace-binding   (or use ggufloop in an environment of its own)",
        )


def build_tool(name: str, log: BuildLog, progress: Progress) -> str:
    """Path of cmake or ninja from its PyPI wheel, kept in the cache and away from the user's environment."""
    folder = cache_dir() / "programs" / name
    if not folder.is_dir():
        progress(Step(f"getting {name} from the package index, because this machine has no usable one"))
        with atomic_path(folder) as partial:
            _pip(log, ["install", "--no-deps", "--only-binary", ":all:", "--target", partial, name],
                 f"install {name}", progress)  # fmt: skip
    suffix = ".exe" if sys.platform == "win32" else ""
    places = (folder / name / "data" / "bin" / f"{name}{suffix}", folder / "bin" / f"{name}{suffix}")
    return str(next((place for place in places if place.is_file()), places[-1]))


def _pip(
    log: BuildLog,
    words: list[str | Path],
    what: str,
    progress: Progress,
    env: dict[str, str] | None = None,
    offline: str = "",
) -> None:
    if log.run([*PIP, *words], env=env) == 0:
        return
    lines = log.tail(4, _ERROR_MARKS)
    for line in lines:
        progress(Step(f"  {line}"))
    text = log.path.read_text(encoding="utf-8", errors="replace")
    if "No space left" in text:
        raise BackendError(
            f"pip could not {what}: the disk is full.", f"free some space and run again; log: {log.path}"
        )
    if any(mark in text for mark in _OFFLINE):
        raise BackendError(
            f"pip could not {what}: the package index cannot be reached or does not have it.",
            f"check the network and pip's settings, then run again{', ' + offline if offline else ''}; log: {log.path}",
        )
    raise BackendError(f"pip could not {what}.", f"log: {log.path}")
