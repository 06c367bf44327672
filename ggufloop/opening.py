"""A model file opened as its settings say, what can be refused without loading it refused first.

llm = open_model(path, ContextSettings(n_ctx=2048), LoopSpec((12, 16), 3))
llm = load("smollm2-135m", loop="12:16")         # the same from a name, for Python: `ggufloop.load`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop.backend.settings import ContextSettings, trained
from ggufloop.files import file_sha256
from ggufloop.loop import LoopSpec, as_loop
from ggufloop.models.architectures import check_loop
from ggufloop.models.gguf import read_header, read_model
from ggufloop.models.info import layer_count
from ggufloop.progress import Progress, doing, note, silent

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

SCHEMA_VERSION = 1


def record_head(path: Path) -> dict[str, Any]:
    """What a record for programs begins with: the model file, and the patch it ran with."""
    from ggufloop.engine import ACTIVE

    return {"schema_version": SCHEMA_VERSION, "model": path.name, "model_sha256": file_sha256(path),
            "patch_id": ACTIVE.patch_id}  # fmt: skip


def check_loops(path: Path, loops: Iterable[LoopSpec | None]) -> None:
    """Raise UsageError for a loop that this model file cannot run; the engine checks too, but after it has loaded."""
    header = read_header(path)
    architecture = header.text("general.architecture") or "unknown"
    for loop in loops:
        if loop is not None:
            check_loop(architecture, loop, layer_count(header, architecture), header.metadata)


def keywords(path: Path, settings: ContextSettings, progress: Progress = silent) -> dict[str, Any]:
    """The keywords of LoopedLlama that the settings mean for this file, which is tried if nobody has computed on it."""
    found = settings.keywords(path)
    if found["n_ctx"] > trained(path):
        note(
            progress,
            f"a context of {found['n_ctx']} tokens is more than the {trained(path)} this model was trained on.",
        )
    return found


def load(
    model: str | Path,
    loop: LoopSpec | str | Mapping[str, Any] | None = None,
    *,
    offline: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> LoopedLlama:
    """A model as the commands take it: a GGUF file, a name of `ggufloop list`, or user/repo[:quant]; looped or not.

    loop: as `loop.as_loop`. offline: download nothing. progress: told of downloads. settings: keywords of LoopedLlama
    and llama_cpp.Llama; left out they are the commands', so the context is 4096 tokens or the model's, if less.
    Raises UsageError, GgufloopError and BackendError.
    """
    from ggufloop.models import registry  # what a download needs is not imported by all who open a file

    path = registry.resolve(str(model), offline=offline, progress=progress)
    read_model(path)
    wanted = as_loop(loop)
    check_loops(path, [wanted])
    if "n_threads" in settings:
        settings = {"n_threads_batch": settings["n_threads"], **settings}
    from ggufloop.engine import LoopedLlama

    return LoopedLlama(path, loop=wanted, **{**keywords(path, ContextSettings(), progress), **settings})


def open_model(
    path: Path,
    settings: ContextSettings,
    loop: LoopSpec | None = None,
    *,
    verbose: bool = False,
    progress: Progress = silent,
) -> LoopedLlama:
    """The model, loaded. Raises UsageError, GgufloopError, BackendError."""
    from ggufloop.engine import LoopedLlama

    with doing(progress, f"loading {path.name} ..."):
        given = keywords(path, settings, progress)  # a file, or the library, is tried at its first use
        llm = LoopedLlama(path, loop=loop, verbose=verbose, **given)
    if llm.devices:
        note(progress, f"layers go to {', '.join(f'{d.name} ({d.description})' for d in llm.devices)}.")
    return llm
