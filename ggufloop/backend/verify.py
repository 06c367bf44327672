"""Does a llama.cpp library compute what it should on this machine? Asked by build, doctor and, once per CPU, by a run.

    found = check(directory)           # found.failures is empty if all was right; str(found) is one line
    trust(backend)                     # the same for a library.Backend, remembered; raises BackendError

Loading proves nothing: a kernel may crash, or multiply wrongly and say nothing. So a process of its own (verifier.py)
computes small models of every weight type on every device, plain and looped, and compares with numpy (oracle.py). It
says what it begins, so that its end by a signal, or a hang, has a name. Only what was right is remembered: a failure
may have been the machine's, for lack of memory say, and is looked into again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufloop.backend import library, process
from ggufloop.backend.library import Backend
from ggufloop.errors import BackendError, GgufloopError
from ggufloop.files import writing

_START = process.main_of("ggufloop.backend.verifier")


@dataclass(frozen=True)
class Failure:
    """A case that failed: kind of weights, columns (0 while loading), device, loop ("plain" for none), and how."""

    kind: str
    columns: int
    device: str
    loop: str
    what: str

    def __str__(self) -> str:
        columns = "loading" if not self.columns else "1 column" if self.columns == 1 else f"{self.columns} columns"
        loop = "" if self.loop == "plain" else f"{self.loop} loop"
        return ", ".join(filter(None, (self.kind, columns, self.device, loop))) + f": {self.what}"


@dataclass(frozen=True)
class Verification:
    """What was computed, and what of it failed. The tuples are empty if the process ended before its end."""

    types: tuple[str, ...]
    devices: tuple[str, ...]
    loops: tuple[str, ...]
    failures: tuple[Failure, ...]
    seconds: float

    def __str__(self) -> str:
        if self.failures:
            more = len(self.failures) - 1
            return f"{self.failures[0]}" + (f" (and {more} more)" if more else "")
        loops = ", ".join(self.loops)
        return f"{len(self.types)} weight types on {', '.join(self.devices)}, {loops}: right ({self.seconds:.1f} s)"


def check(directory: Path, timeout: float = 300, types: Sequence[str] = ()) -> Verification:
    """Verify the library in `directory`.

    Raises BackendError if it does not load, other than by a crash, and if what failed was not the library: no memory
    or no disk for the check.

    types: the weight types, all of oracle.TYPES if none is given.
    """
    begun = time.monotonic()
    ended = process.run(_START, *types, timeout=timeout, env={"LLAMA_CPP_LIB_PATH": str(directory)})
    status = ended.status
    events = [json.loads(line) for line in ended.out.split("\n")[:-1]]  # a line that was cut off is left out
    cases: list[tuple[str, int, str, str]] = [tuple(event["begin"]) for event in events if "begin" in event]
    failures = [Failure(*event["wrong"]) for event in events if "wrong" in event]
    seconds = time.monotonic() - begun
    finished = next((event["done"] for event in events if "done" in event), None)
    if finished:
        return Verification(failures=tuple(failures), seconds=seconds, **{k: tuple(v) for k, v in finished.items()})
    error = next((event["error"] for event in events if "error" in event), None)
    if error or ended.killed:
        raise BackendError(
            f"the library in {directory} could not be verified: {error or 'the process was killed'}.",
            "free memory and disk space, and run again.",
        )
    words = ended.errors.strip().splitlines()[-1:]
    how = f"no end after {timeout:.0f} s" if status is None else ": ".join([process.ending(status), *words])
    last = cases[-1] if cases else ("", 0, "CPU", "plain")
    if not last[0] and status is not None and not ended.crashed:
        raise BackendError(f"the library in {directory} does not load: {how}", "run: ggufloop build --force")
    return Verification((), (), (), (*failures, Failure(*last, how)), seconds)


def trust(backend: Backend) -> None:
    """Verify `library` unless that was done on this CPU before. Raises BackendError, one line, if it fails."""
    if library.is_verified(backend):
        return
    note = library.note(backend)  # of the files as they are before the check
    found = check(backend.directory)
    if found.failures:
        given = "GGUFLOOP_STOCK_LIB_DIR" if backend.stock else "GGUFLOOP_LIB_DIR"
        raise BackendError(
            f"the library in {backend.directory} does not compute right on this CPU: {found}.",
            f"build it anew, or unset {given}."
            if os.environ.get(given)
            else "run: ggufloop build" + (" --stock" if backend.stock else ""),
        )
    remember(note)


def remember(note: Path) -> None:
    """Leave a note of what was found right; a cache that cannot be written means asking again."""
    try:
        with writing(note):
            note.touch()
    except GgufloopError:
        pass
