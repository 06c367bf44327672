"""Where a text to score comes from: a file, texts every installation has, or a data set of Hugging Face.

    text = local("notes.txt")                     # or 'pydoc', 'sdist-docs'
    text = hub_text("wikitext")                   # or USER/REPO:FILE, USER/REPO:ARCHIVE.zip:MEMBER

'pydoc' is the help of Python's own keywords and topics, which differs a little between versions of Python;
'sdist-docs' the markdown of llama.cpp in the pinned source archive, the same everywhere.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ggufloop import reading
from ggufloop.backend import library
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import cache_dir
from ggufloop.models import hub
from ggufloop.progress import Progress, silent

PYDOC, DOCS = "pydoc", "sdist-docs"
NAMED = (PYDOC, DOCS)

WIKITEXT = "ggml-org/ci:wikitext-2-raw-v1.zip:wikitext-2-raw/wiki.test.raw"
"""The raw test split of WikiText-2, as llama-perplexity's documentation names it."""

_NO_NETWORK = f"check the network, or score a text of this machine: --text FILE, --text {PYDOC} or --text {DOCS}."


@dataclass(frozen=True)
class Text:
    """A text and what to call it."""

    name: str
    text: str


def local(name: str) -> Text:
    """A text of this machine: 'pydoc', 'sdist-docs', or a UTF-8 file, without the line feed at its end.

    Raises GgufloopError for a file that cannot be read, is empty or not UTF-8, and if the source archive is missing.
    """
    if name == PYDOC:
        from pydoc_data.topics import topics

        return Text(name, "\n\n".join(topics[key] for key in sorted(topics)))
    if name == DOCS:
        return Text(name, "\n\n".join(markdown()))
    try:
        data = Path(name).expanduser().read_bytes()
    except OSError as e:
        raise GgufloopError(
            f"cannot read {name}: {e.strerror or e}.", f"give --text a text file, or one of {', '.join(NAMED)}."
        ) from e
    return Text(name, _decode(data, name))


def hub_text(name: str, offline: bool = False, progress: Progress = silent) -> Text:
    """A text file of a Hugging Face data set, 'wikitext' for WikiText-2's test split.

    Raises UsageError for a name of another form, GgufloopError if it cannot be had or is no UTF-8 text.
    """
    match = re.fullmatch(r"([^/:\s]+/[^/:\s]+):([^:]+?)(?::([^:]+))?", WIKITEXT if name == "wikitext" else name)
    if match is None:
        raise UsageError(f"data set {name!r} is not USER/REPO:FILE.", "write it so, or take 'wikitext'.")
    repo, file, member = match.groups()
    try:
        path = hub.fetch_dataset(repo, file, offline, progress)
    except GgufloopError as e:
        raise GgufloopError(e.message, f"{e.hint.rstrip('.')}; or {_NO_NETWORK}" if e.hint else _NO_NETWORK) from e
    if member is None:
        return Text(name, _decode(path.read_bytes(), file))
    try:
        with zipfile.ZipFile(path) as archive:
            return Text(name, _decode(archive.read(member), member))
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, RuntimeError, zlib.error) as e:  # RuntimeError: a password
        raise GgufloopError(
            f"{file} of {repo} is no zip archive with {member} in it.", "write USER/REPO:ARCHIVE.zip:MEMBER."
        ) from e


def markdown() -> list[str]:
    """The markdown files of llama.cpp in the pinned source archive, by path. Raises GgufloopError if it is missing."""
    archive = cache_dir() / "sdist" / library.SDIST
    if not archive.is_file():
        raise GgufloopError(
            f"the source archive {library.SDIST} is not in the cache.", f"run: ggufloop build; or take --text {PYDOC}."
        )
    texts = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and "/vendor/llama.cpp/" in member.name and member.name.endswith(".md"):
                    file = tar.extractfile(member)
                    assert file is not None
                    texts[member.name] = file.read().decode("utf-8", errors="replace")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise GgufloopError(f"{archive} is damaged ({type(e).__name__}).", "delete it, and run: ggufloop build") from e
    return [texts[name] for name in sorted(texts)]


def _decode(data: bytes, what: str) -> str:
    try:
        text = reading.text(data, bom=True).removesuffix("\n")  # llama.cpp's -f takes one off as well
    except ValueError as e:
        raise GgufloopError(
            f"{what}{str(e).removeprefix('it')}.", "convert it, for example with iconv -t UTF-8."
        ) from e
    if not text.strip():
        raise GgufloopError(f"{what} is empty.", "give a text of some thousand words.")
    return text
