"""What names on Hugging Face mean: an address to a repository and a file, a repository's files to the model wanted.

    wanted = parse("hf.co/Qwen/Qwen3-4B-GGUF:Q8_0")      # Reference, or None for what is no address
    path = choose(files, wanted.quant)                   # files: HubFile, as the repository lists them

A name is taken only where it can mean one thing: of two models of one quantisation neither is, and -hff says which.
Drafters, vision projectors and importance matrices lie beside a model and are not it. Nobody is asked here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ggufloop.errors import GgufloopError, UsageError

DEFAULT_QUANT = "Q4_K_M"

_ALIASES = {"FP16": "F16", "FP32": "F32"}
_NAME = re.compile(
    r"(?P<stem>.+?)(?:[-._](?P<label>(?:UD-)?(?:I?Q\d\w*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4|TQ\d_\d)))?"
    r"(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.gguf",
    re.IGNORECASE,
)
_NO_MODEL = re.compile("mmproj|imatrix", re.IGNORECASE)
_DRAFTER = re.compile(r"draft|(?:^|[-._/])(?:assistant|eagle\d?|speculator)(?=[-._/]|$)", re.IGNORECASE)

_HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co", "www.hf.co")
_SCHEME = re.compile(r"(?:https?|hf)://", re.IGNORECASE)
_USER, _REPO = re.compile(r"[A-Za-z0-9][\w.-]*"), re.compile(r"[\w.-]+")
_PAGES = ("blob", "resolve", "raw", "tree")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. path: in it, '/' between folders; sha256, bytes: as the hub states them, else None."""

    path: str
    sha256: str | None
    bytes: int | None = None


@dataclass(frozen=True)
class Reference:
    """What an address names. file: a path in the repository, or a name in any folder of it; revision: None is main."""

    repo: str
    quant: str | None = None
    file: str | None = None
    revision: str | None = None


def parse(text: str, endpoint: str = "") -> Reference | None:
    """What an address of Hugging Face means; None for text that is none.

    user/repo, user/repo:quant, user/repo/file.gguf, all three after hf.co/ or https://huggingface.co/, and the
    addresses of a repository's pages and files. endpoint: another host that counts, as HF_ENDPOINT has it. Raises
    UsageError for a URL of another host, or of none of its repositories.
    """
    hosts = (*_HOSTS, urlsplit(endpoint).netloc) if endpoint else _HOSTS
    scheme = _SCHEME.match(text)
    rest = text[scheme.end() :] if scheme else text
    host, _, path = rest.partition("/")
    is_url = host.lower() in hosts
    if is_url:
        rest = re.split("[?#]", path)[0]
    elif scheme and scheme[0].lower() != "hf://":
        raise UsageError(f"{text} is no address of Hugging Face.", "download the file, and give its path.")
    parts = rest.rstrip("/").split("/")
    if is_url or scheme:
        parts = [unquote(part) for part in parts]
    user, name, below = parts[0], parts[1] if len(parts) > 1 else "", parts[2:]
    name, _, quant = name.partition(":") if not below else (name, "", "")
    if not _USER.fullmatch(user) or not _REPO.fullmatch(name):
        if scheme:  # else it may be a path
            raise UsageError(f"{text} names no repository.", "write it like https://huggingface.co/Qwen/Qwen3-4B-GGUF.")
        return None
    repo = f"{user}/{name}"
    if len(below) > 1 and below[0] in _PAGES:
        file = "/".join(below[2:]) if below[0] != "tree" else ""
        return Reference(repo, file=file or None, revision=None if below[1] == "main" else below[1])
    if below and not below[-1].lower().endswith(".gguf"):
        return None
    return Reference(repo, quant or None, "/".join(below) or None)


def split_name(file: str) -> tuple[str, str]:
    """'Qwen3-4B-Q4_K_M.gguf' -> ('Qwen3-4B', 'Q4_K_M'): the model and its quantisation, '' where the name has none."""
    match = _NAME.fullmatch(file)
    return (match["stem"], _label(match["label"] or "")) if match else (file, "")


def _label(text: str) -> str:
    return _ALIASES.get(text.upper(), text.upper())


def label_of(path: str) -> str:
    """The quantisation of a file of a repository; without one in its name its folder's, else its name."""
    folder, _, name = path.rpartition("/")
    stem, label = split_name(name)
    return label or split_name(f"x-{folder}.gguf".replace("/", "-"))[1] or stem


def part_paths(file: str) -> list[str]:
    """All parts of the split model this file is a part of, or the file alone."""
    match = _NAME.fullmatch(file)
    if match is None or match["part"] is None:
        return [file]
    head, count = file[: match.start("part") - 1], match["parts"]
    return [f"{head}-{i:05d}-of-{count}{file[match.end('parts') :]}" for i in range(1, int(count) + 1)]


def models_in(files: Iterable[HubFile]) -> dict[str, list[str]]:
    """Quantisation -> the (first) files of the models a repository has of it; drafters only where nothing else is."""
    paths = sorted((f.path for f in files), key=lambda path: (path.count("/"), path))
    names = [(path, path.rpartition("/")[2]) for path in paths]
    ggufs = [path for path, name in names if _NAME.fullmatch(name) and not _NO_MODEL.search(name)]
    found = list(dict.fromkeys(part_paths(path)[0] for path in ggufs))
    models: dict[str, list[str]] = {}
    for path in [path for path in found if not _DRAFTER.search(path)] or found:
        models.setdefault(label_of(path), []).append(path)
    return models


def choose(files: Sequence[HubFile], quant: str | None) -> str:
    """The model file to take of a repository: of the quantisation asked for, else of Q4_K_M or the nearest in bits.

    Raises GgufloopError if there is none, or more than one, listing what there is.
    """
    models = models_in(files)
    if not models:
        raise GgufloopError("it holds no GGUF model.", "look for a repository whose name ends in -GGUF.")
    label = min(models, key=_distance) if quant is None else _same(quant, models)
    if len(models[label]) > 1:
        raise GgufloopError(f"it has {len(models[label])} models of {label}: {', '.join(models[label])}.",
                            "say which with -hff FILE.")  # fmt: skip
    return models[label][0]


def _same(quant: str, models: Iterable[str]) -> str:
    by_name = {label.lower(): label for label in models}
    found = by_name.get(quant.lower()) or by_name.get(_label(quant).lower())
    if found is None:
        close = difflib.get_close_matches(quant.upper(), list(models), n=1)
        listed = ", ".join(models)
        raise GgufloopError(
            f"it has no {quant}.", (f"did you mean {close[0]}? " if close else "") + f"It has: {listed}."
        )
    return found


def _distance(label: str) -> tuple[bool, float, bool, str]:
    """How far a quantisation is from the default, to sort by."""
    digits = re.search(r"\d+", label)
    bits = int(digits[0]) if digits and split_name(f"x-{label}.gguf")[1] else 99
    return label != DEFAULT_QUANT, abs(bits - 4.5), not label.startswith("Q"), label


def find_file(files: Iterable[HubFile], name: str) -> str:
    """The file of this path, or of this name in any folder; of a split model its first part. Raises GgufloopError."""
    paths = [f.path for f in files]
    found = [path for path in paths if path == name] or [path for path in paths if path.rpartition("/")[2] == name]
    ggufs = [path for path in paths if path.lower().endswith(".gguf")]
    if not found:
        close = difflib.get_close_matches(name, ggufs, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise GgufloopError(f"it has no file {name}.", f"{hint}It has: {', '.join(ggufs) or 'no GGUF file'}.")
    if len(found) > 1:
        raise GgufloopError(f"it has {len(found)} files {name}: {', '.join(found)}.", "say which with its folder.")
    if found[0] not in ggufs:
        raise GgufloopError(f"{name} is no GGUF file.", f"it has: {', '.join(ggufs) or 'none'}.")
    return part_paths(found[0])[0]


def check_parts(files: Iterable[HubFile], file: str) -> None:
    """Raise GgufloopError unless every part of the split model this file begins is there."""
    paths, parts = {f.path for f in files}, part_paths(file)
    missing = [part.rpartition("/")[2] for part in parts if part not in paths]
    if missing:
        raise GgufloopError(
            f"{file} is one of {len(parts)} parts, and {len(missing)} of them {'is' if len(missing) == 1 else 'are'} "
            f"not there: {missing[0]}{' ...' if len(missing) > 1 else ''}.",
            "choose another quantisation, or another repository.",
        )
