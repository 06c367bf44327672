"""Perplexity of a model file on a text, against a base, in one context or several: `ggufloop perplexity`.

    run = run_perplexity(path, local("notes.txt"), LoopSpec((12, 16), 3), base=PLAIN)
    run.results[0].model.ppl, run.results[0].against.change
    run_perplexity(path, text, save=Path("f16.kld"))                     # a KL base, as llama-perplexity writes it
    run_perplexity(path, base=KLBase.open(Path("f16.kld")))              # and compared with: it brings the text

Each context is scored in a model opened for it: what llama.cpp computes may depend on the room it has.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import atomic_file
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import Text
from ggufloop.measure.perplexity import (
    LEAST_CONTEXT,
    Base,
    KLBase,
    Other,
    TextScore,
    count_chunks,
    perplexity,
    stored_bytes,
    tokenize,
)
from ggufloop.models.info import describe
from ggufloop.opening import check_loops, open_model
from ggufloop.progress import Progress, named, note, silent

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

CONTEXT = 512
PLAIN = "plain"


@dataclass(frozen=True)
class PerplexityRun:
    """A result per context, and what was compared: base_path None for a stored base, base '' without one."""

    results: list[TextScore]
    path: Path
    base: str
    base_path: Path | None


def run_perplexity(
    path: Path,
    text: Text | None = None,
    loop: LoopSpec | None = None,
    *,
    contexts: Sequence[int] = (CONTEXT,),
    chunks: int | None = None,
    base: KLBase | Path | str | None = None,
    save: Path | None = None,
    settings: ContextSettings | None = None,
    verbose: bool = False,
    progress: Progress = silent,
) -> PerplexityRun:
    """Score the text, the first `chunks` of it, in chunks of each of `contexts` tokens; 0 is the model's own.

    base: PLAIN for the model without its loop, another model file, or a stored base, which brings text and context.
    save: write the model's distributions there. Raises UsageError, GgufloopError and BackendError; what was saved is
    there whole or not at all.
    """
    if isinstance(base, KLBase):
        contexts = (base.n_ctx,)
    elif text is None:
        raise UsageError("there is no text to score.", "give one, or a KLBase, which brings its own.")
    if base == PLAIN and loop is None:
        raise UsageError("the plain model compared with itself differs nowhere.", "give --window as well.")
    if save is not None and len(contexts) > 1:
        raise UsageError("--save-kl-base writes the chunks of one context.", "give one -c.")
    small = next((c for c in contexts if 0 < c < LEAST_CONTEXT), None)
    if small is not None:
        raise UsageError(f"-c {small} leaves nothing to score.", f"give {LEAST_CONTEXT} or more.")
    check_loops(path, [loop])
    if len(contexts) > 1:
        contexts = list(dict.fromkeys(c or describe(path).n_ctx_train for c in contexts))
    settings = settings or ContextSettings()
    replace(settings, n_ctx=max(contexts)).check_memory([path], [loop])
    results: list[TextScore] = []
    tokens: list[int] = []
    with _saving(save, progress) as file:
        for context in contexts:
            now = replace(settings, n_ctx=context)
            with contextlib.ExitStack() as stack:
                opened = partial(open_model, settings=now, verbose=verbose, progress=progress)
                llm = stack.enter_context(contextlib.closing(opened(path, loop=loop)))
                against: Base | None = base if isinstance(base, KLBase) else None
                if against is None and base is not None:
                    other = llm if base == PLAIN else stack.enter_context(contextlib.closing(opened(Path(str(base)))))
                    against = Other(other)
                n_ctx = context or llm.n_ctx()
                if not results:
                    tokens = _tokens(llm, text, against, path, base)
                    n_chunk = count_chunks(tokens, max(n_ctx, *contexts))  # before any is scored
                    if save is not None:
                        n = min(n_chunk, chunks or n_chunk)
                        _check_space(save, stored_bytes(n_ctx, llm.n_vocab(), n))

                told = named(progress, f"-c {n_ctx}") if len(contexts) > 1 else progress
                results.append(perplexity(llm, tokens, n_ctx, chunks, against, told, file))
    return PerplexityRun(results, path, _name(base), _file(path, base))


def _tokens(
    llm: LoopedLlama, text: Text | None, against: Base | None, path: Path, base: KLBase | Path | str | None
) -> list[int]:
    """The text in tokens. Raises GgufloopError if the base cuts it into others."""
    if isinstance(base, KLBase):
        return base.tokens
    assert text is not None
    tokens = tokenize(llm, text.text)
    if isinstance(against, Other) and against.model is not llm and tokenize(against.model, text.text) != tokens:
        raise GgufloopError(
            f"{_name(base)} cuts the text into other tokens than {path.name}.",
            "compare models of one family, such as quantisations of the same model.",
        )
    return tokens


def _name(base: KLBase | Path | str | None) -> str:
    if base is None:
        return ""
    return "the plain model" if base == PLAIN else str(base.path) if isinstance(base, KLBase) else Path(base).name


def _file(path: Path, base: KLBase | Path | str | None) -> Path | None:
    if base is None or isinstance(base, KLBase):
        return None
    return path if base == PLAIN else Path(base)


@contextlib.contextmanager
def _saving(path: Path | None, progress: Progress) -> Iterator[BinaryIO | None]:
    """The file of a KL base, which gets its name when the block ends well; None without one."""
    if path is None:
        yield None
        return
    with atomic_file(path) as partial, partial.open("wb") as file:
        yield file
    note(progress, f"{path} is written, {path.stat().st_size / 1e6:.1f} MB.")


def _check_space(path: Path, needed: int) -> None:
    """Raise GgufloopError if the disk cannot hold what is going to be written to `path`."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise GgufloopError(
            f"{path} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the disk are free.",
            "give fewer --chunks, or a file on another disk.",
        )
