"""A file nobody has computed on here is tried once, in a process of its own: what ends llama.cpp there is a line here.

    check(path)          # raises GgufloopError if computing on it ends a process; milliseconds once it was tried

`modelfile` refuses what a header can tell. What it cannot, llama.cpp may answer by an assert or a crash, which would
end a command without a word of ours. The file is known again by its header, its size and the library, so a copy needs
no other trial; only what did not fail is remembered. A trial is short or none: files larger than half the free memory
are not tried, and one that takes longer than `LIMIT` is as good as tried, for it has not crashed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ggufloop.backend import library, process
from ggufloop.backend.library import Backend
from ggufloop.backend.memory import free_bytes
from ggufloop.backend.verify import remember
from ggufloop.errors import BackendError, GgufloopError
from ggufloop.files import cache_dir
from ggufloop.models.gguf import Header, read_model

LIMIT = 10.0
"""Seconds a trial may take."""
_OWN = 2 << 30  # bytes a trial may allocate beside the weights, which some kernels copy

_START = process.main_of("ggufloop.backend.trier")
_LAST_WORDS = re.compile(r"\S+:\d+: (GGML_ASSERT|.*(fatal|abort|not implemented|unsupported|failed)).*|.*what\(\):.*")


def check(path: Path, repack: bool = True) -> None:
    """Raise GgufloopError if computing on this model for the first time ends a process, or raises what no caller could.

    repack: with which kernels. What the engine itself refuses is left to it, and so is what is not the file's fault: no
    library, no memory.
    """
    headers = read_model(path)
    try:
        backend = library.usable()
    except BackendError:
        return
    note = _note(headers, backend, repack)
    if note.is_file():
        return
    free, size = free_bytes(), sum(h.file_bytes for h in headers)
    if free is not None and size > free / 2:
        return
    most = 0 if free is None or backend.name not in ("", "cpu") else min(size + _OWN, free)  # a GPU's maps much more
    wrong = _try(path, most, repack)
    if wrong:
        raise GgufloopError(
            f"llama.cpp cannot compute {path}: {wrong}.",
            "get the file from another source, or convert it again; --no-try runs it as it is.",
        )
    if wrong is None:
        return
    remember(note)


def _note(headers: Sequence[Header], backend: Backend, repack: bool) -> Path:
    """The empty file that says that these files were tried with this library, on this CPU."""
    digest = hashlib.sha256(library.note(backend).name.encode())
    for header in headers:
        with header.path.open("rb") as f:
            digest.update(f.read(header.data_start))
        digest.update(str(header.file_bytes).encode())
    if not repack:
        digest.update(b"other kernels")
    return cache_dir() / "tried" / digest.hexdigest()[:24]


def _try(path: Path, most: int, repack: bool) -> str | None:
    """What ended the process that computed on a file, '' if nothing did in time; None if that was not the file."""
    ended = process.run(_START, str(path), str(most), str(int(repack)), timeout=LIMIT)
    if ended.status is None:
        return ""
    words = ended.errors.splitlines()
    if ended.status == 0:
        answer = json.loads(ended.out.splitlines()[-1])
        if answer.get("done"):
            return ""
        return None if answer["ours"] else f"llama_cpp fails with {answer['failed']}".rstrip(".")
    if ended.killed or any("bad_alloc" in line for line in words):
        return None  # by the system, for want of memory
    last = next((line.strip() for line in reversed(words) if _LAST_WORDS.match(line)), "")
    return f"it ends its process ({process.ending(ended.status)})" + (f": {last[:300]}".rstrip(".") if last else "")
