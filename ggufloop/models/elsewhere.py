"""Models that other programs have downloaded: Ollama, LM Studio, llama.cpp, and whatever shares Hugging Face's cache.

    for each in found(): print(each.name, each.bytes, each.program)
    find("ollama:qwen2.5:0.5b").file()        # a path, as `resolve` gives it for that name
    holding(sha256, size)                     # the same bytes, whoever has them

Nothing is ever written into their folders. What they keep is theirs to change: a manifest that cannot be read, a blob
that is no GGUF and a model that lacks a part are as if they were not there. Ollama's blobs are named by their sha256,
which nobody would recognise in a result, so they get a link with the model's name in our cache.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import platformdirs

from ggufloop import files, reading
from ggufloop.errors import UsageError, nearest
from ggufloop.models import hubfiles
from ggufloop.models.hubfiles import HubFile

OLLAMA, LM_STUDIO, LLAMA_CPP, HUB = "Ollama", "LM Studio", "llama.cpp", "Hugging Face's cache"
PREFIXES = {"ollama": OLLAMA, "lmstudio": LM_STUDIO, "llama.cpp": LLAMA_CPP}
_MODEL_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Elsewhere:
    """A model of another program. name: what MODEL may be; path: its (first) file; bytes: of all; sha256: '' if the
    program does not say."""

    program: str
    name: str
    path: Path
    bytes: int
    sha256: str = ""

    def file(self) -> Path:
        """Its file, by a name that says what it is."""
        if self.program != OLLAMA:
            return self.path
        link = files.cache_dir() / "ollama" / f"{re.sub('[/:]', '-', self.name.partition(':')[2])}.gguf"
        with suppress(OSError):  # a cache that cannot be written, a system without links
            if not (link.exists() and link.samefile(self.path)):
                link.parent.mkdir(parents=True, exist_ok=True)
                new = link.with_name(f".{link.name}.{os.getpid()}")
                new.symlink_to(self.path)
                os.replace(new, link)
            return link
        return self.path


def found() -> list[Elsewhere]:
    """All of them, program by program."""
    models: list[Elsewhere] = []
    for look in (_ollama, _lm_studio, _llama_cpp, _hub):
        with suppress(OSError):  # a folder that is somebody else's
            models.extend(look())
    return models


def find(text: str) -> Elsewhere | None:
    """The model of such a name, case aside; None for text that begins with no program's. Raises UsageError if that
    program has no such model."""
    prefix, _, rest = text.partition(":")
    program = PREFIXES.get(prefix.lower())
    if program is None:
        return None
    known = {each.name.lower(): each for each in found() if each.program == program}
    wanted = text.lower()
    tagged = wanted if program != OLLAMA or ":" in rest else f"{wanted}:latest"
    if tagged in known:
        return known[tagged]
    if not known:
        raise UsageError(f"{program} has no models here.", f"it is looked for in {_listed(_FOLDERS[program]())}.")
    raise UsageError(f"{program} has no model {rest!r} here.", nearest(text, [each.name for each in known.values()]))


def holding(sha256: str, size: int) -> Elsewhere | None:
    """Another program's model in one file of exactly these bytes; huggingface-hub answers for its own cache.

    A sha256 is computed only for a file of this size, and remembered.
    """
    for each in found():
        if each.program != HUB and each.bytes == size and each.path.stat().st_size == size:
            with suppress(OSError):
                if (each.sha256 or files.file_sha256(each.path)) == sha256:
                    return each
    return None


def _listed(folders: Iterable[Path]) -> str:
    return " and ".join(map(str, folders))


def _named(variable: str, *default: Path) -> list[Path]:
    chosen = os.environ.get(variable)
    return [Path(chosen).expanduser()] if chosen else list(default)


def _ollama_folders() -> list[Path]:
    service = [Path("/usr/share/ollama/.ollama/models")] if sys.platform == "linux" else []
    return _named("OLLAMA_MODELS", Path.home() / ".ollama" / "models", *service)


def _lm_studio_folders() -> list[Path]:
    return [Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"]


def _llama_cpp_folders() -> list[Path]:
    return _named("LLAMA_CACHE", Path(platformdirs.user_cache_dir("llama.cpp", appauthor=False)))


def _hub_folder() -> Path:
    """Where huggingface-hub keeps models, without loading it."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"),
                        ("XDG_CACHE_HOME", "huggingface/hub")):  # fmt: skip
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / below
    return Path.home() / ".cache" / "huggingface" / "hub"


_FOLDERS: dict[str, Callable[[], list[Path]]] = {
    OLLAMA: _ollama_folders, LM_STUDIO: _lm_studio_folders, LLAMA_CPP: _llama_cpp_folders,
}  # fmt: skip


def _ollama() -> Iterator[Elsewhere]:
    for folder in _ollama_folders():
        for manifest in sorted((folder / "manifests").glob("*/*/*/*")):
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                host, space, model, tag = manifest.parts[-4:]
                layers = reading.json(manifest.read_bytes())["layers"]
                stated = [layer["digest"] for layer in layers if layer["mediaType"] == _MODEL_LAYER]
                found = [match[1] for match in map(_DIGEST.fullmatch, stated) if match]
                if not found:
                    continue
                blob = folder / "blobs" / f"sha256-{found[0]}"
                with blob.open("rb") as f:
                    if f.read(4) != b"GGUF":
                        continue
                where = [] if host == "registry.ollama.ai" else [host]
                named = [*where, *([] if (space, where) == ("library", []) else [space]), f"{model}:{tag}"]
                yield Elsewhere(OLLAMA, "ollama:" + "/".join(named), blob, blob.stat().st_size, found[0])


def _models(folder: Path, paths: Iterable[Path]) -> Iterator[tuple[str, list[Path]]]:
    """Whole models among these files below a folder, and the paths of their parts; no projectors, no drafters."""
    there = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    for firsts in hubfiles.models_in(HubFile(name, None) for name in there).values():
        for first in firsts:
            parts = [there.get(part) for part in hubfiles.part_paths(first)]
            whole = [part for part in parts if part is not None]
            if len(whole) == len(parts):
                yield first, whole


def _bytes(parts: Sequence[Path]) -> int:
    return sum(part.stat().st_size for part in parts)


def _files(program: str, prefix: str, folder: Path, pattern: str) -> list[Elsewhere]:
    """Models in files, by the shortest of their names that is theirs alone."""
    by_folder = groupby(sorted(folder.glob(pattern)), key=lambda path: path.parent)
    models = [parts for below, paths in by_folder for _, parts in _models(below, paths)]
    stems = [parts[0].stem for parts in models]
    paths = [parts[0].relative_to(folder).with_suffix("").as_posix() for parts in models]
    return [
        Elsewhere(program, f"{prefix}:{stem if stems.count(stem) == 1 else path}", parts[0], _bytes(parts))
        for stem, path, parts in zip(stems, paths, models, strict=True)
    ]


def _lm_studio() -> Iterator[Elsewhere]:
    for folder in _lm_studio_folders():
        yield from _files(LM_STUDIO, "lmstudio", folder, "*/*/*.gguf")


def _llama_cpp() -> Iterator[Elsewhere]:
    for folder in _llama_cpp_folders():
        yield from _files(LLAMA_CPP, "llama.cpp", folder, "*.gguf")
        if folder != _hub_folder():
            yield from _snapshots(LLAMA_CPP, "llama.cpp:", folder)


def _hub() -> Iterator[Elsewhere]:
    yield from _snapshots(HUB, "", _hub_folder())


def _snapshots(program: str, prefix: str, folder: Path) -> Iterator[Elsewhere]:
    """Models in a cache of huggingface-hub's form, of each repository's main revision or the newest."""
    for repo in sorted(folder.glob("models--*--*")):
        with suppress(OSError):
            main = repo / "refs" / "main"
            known = [repo / "snapshots" / main.read_text().strip()] if main.is_file() else []
            known += sorted(repo.glob("snapshots/*"), key=lambda path: -path.stat().st_mtime)
            snapshot = next((path for path in known if path.is_dir()), None)
            if snapshot is None:
                continue
            models = list(_models(snapshot, snapshot.rglob("*.gguf")))
            labels = [hubfiles.label_of(first) for first, _ in models]
            user_repo = repo.name.removeprefix("models--").replace("--", "/", 1)
            for label, (first, parts) in zip(labels, models, strict=True):
                alone = labels.count(label) == 1 and "/" not in label
                name = f"{user_repo}:{label}" if alone else f"{user_repo}/{first}"
                yield Elsewhere(program, prefix + name, parts[0], _bytes(parts))
