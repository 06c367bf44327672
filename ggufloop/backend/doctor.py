"""What is installed, and what is wrong with it: one `Problem` per fault, each with its remedy.

report = diagnose()        # report.problems is empty when a looped model can run
versions()                 # only what is known without loading or building anything
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ggufloop.backend import bundled, library, toolchain
from ggufloop.backend.library import Backend
from ggufloop.backend.probe import FoundDevice, Probe, probe
from ggufloop.backend.verify import Verification, check, remember
from ggufloop.errors import BackendError, GgufloopError
from ggufloop.files import cache_dir


@dataclass(frozen=True)
class Versions:
    """binding, library and patch_id are None where there is none."""

    ggufloop: str
    python: str
    binding: str | None
    llama_cpp: str  # the commit the patch is for
    library: str | None
    patch_id: str | None


@dataclass(frozen=True)
class Problem:
    """A fault and what to do about it, a line each."""

    message: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """The state of an installation. Sizes in bytes; abi and devices are known only if the library loads.

    computes: what the library computed just now. gave_up: what its build left out, "" for nothing. variant: the CPU
    generation that a wheel's library was compiled for, "" for one compiled here. The stock library, which only
    comparisons need, is verified when it is built and not here.
    """

    versions: Versions
    directory: Path | None
    stock: Path | None  # the unpatched library, which only comparisons need
    abi: int | None
    devices: tuple[FoundDevice, ...]
    gave_up: str
    variant: str
    computes: Verification | None
    cache: Path
    cache_libraries: int
    cache_bytes: dict[str, int]
    problems: tuple[Problem, ...]


def versions() -> Versions:
    """The version of each component, from files alone."""
    backend = _library()
    try:
        own = importlib.metadata.version("ggufloop")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return Versions(
        ggufloop=own,
        python=platform.python_version(),
        binding=library.binding_version(),
        llama_cpp=library.LLAMA_CPP_COMMIT,
        library=backend.directory.name if backend else None,
        patch_id=backend.patch_id if backend else None,
    )


def diagnose() -> Report:
    """Look at everything a looped run needs; the library loads and computes in processes of its own (seconds)."""
    faults: list[GgufloopError] = []
    known = versions()
    if known.binding != library.BINDING_VERSION:
        has = f"{library.BINDING} {known.binding}" if known.binding else f"no {library.BINDING}"
        command = "ggufloop build --replace-binding" if known.binding else "ggufloop build"
        faults.append(BackendError(f"{has} is installed, {library.BINDING_VERSION} is needed.", f"run: {command}"))

    backend, found, computes = None, None, None
    try:
        backend = library.locate()
        if known.binding == library.BINDING_VERSION:
            if not backend.directory.is_dir():
                backend = bundled.unpack(backend)
            found = _loaded(backend)
            note = library.note(backend)
            computes = check(backend.directory)
            if not computes.failures and not library.is_verified(backend):
                remember(note)
    except BackendError as e:
        faults.append(e)
    if backend and computes:
        again = "run: ggufloop build --force" + (
            " --backend " + backend.name if backend.name not in ("", "cpu") else ""
        )
        shown = [f"{backend} does not compute right: {failure}." for failure in computes.failures]
        faults += [BackendError(line, again) for line in _few(shown)]
    if backend is None:  # one has to be built: can it be?
        try:
            toolchain.preflight(toolchain.choose(library.requested_name() or "auto").name, stock=False)
        except GgufloopError as e:
            if str(e) not in map(str, faults):
                faults.append(e)
    if not _writable(cache_dir()):
        faults.append(BackendError(f"the cache {cache_dir()} cannot be written.", "set GGUFLOOP_CACHE to your folder."))

    stock = _library(stock=True)
    return Report(
        versions=known,
        directory=backend.directory if backend else None,
        stock=stock.directory if stock else None,
        abi=found.abi if found else None,
        devices=found.devices if found else (),
        gave_up=backend.gave_up if backend else "",
        variant=backend.variant if backend else "",
        computes=computes,
        cache=cache_dir(),
        cache_libraries=len(library.installed()),
        cache_bytes={p.name: _size(p) for p in sorted(cache_dir().glob("*")) if p.is_dir()},
        problems=tuple(Problem(e.message, e.hint) for e in faults),
    )


def _few(lines: list[str], most: int = 3) -> list[str]:
    """The first lines, the last of them with the number of the others."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"{lines[most - 1]} There are {len(lines) - most} more cases like these."]


def _loaded(backend: Backend) -> Probe:
    """What the library says about itself. Raises BackendError if it is not what its manifest says."""
    found = probe(backend.directory)
    if backend.patch_id and found.patch_id != backend.patch_id:
        raise BackendError(
            f"the library in {backend.directory} carries patch {found.patch_id}, not {backend.patch_id}.",
            "run: ggufloop build --force",
        )
    return found


def _library(stock: bool = False) -> Backend | None:
    try:
        return library.locate(stock)
    except BackendError:
        return None


def _writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, links not followed."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
