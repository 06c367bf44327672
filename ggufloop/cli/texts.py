"""The flags of a text to score, for the commands that measure on one: `text_options`, and `text_from_flags`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ggufloop.cli import terminal
from ggufloop.cli.progress import shown
from ggufloop.errors import UsageError
from ggufloop.measure import corpus

C = TypeVar("C", bound=Callable[..., Any])


def text_options(command: C) -> C:
    """Add --text and --hf-dataset to a command, as its parameters `text` and `dataset`."""
    command = click.option(
        "--hf-dataset", "dataset", metavar="wikitext|USER/REPO:FILE",
        help="The text: a text file of a Hugging Face data set; ARCHIVE.zip:MEMBER reads a zip's.",
    )(command)  # fmt: skip
    return click.option(
        "--text", "-f", "--file", "text", metavar="FILE|pydoc|sdist-docs|NAME",
        help="The text: a UTF-8 file, Python's own help, llama.cpp's documentation; 'brown', the Brown corpus; "
        f"of exllamav2's calibration data {', '.join(corpus.DOMAINS)}.",
    )(command)  # fmt: skip


def texts_option(command: C) -> C:
    """As `text_options`, but --text may be repeated, its value a tuple: for `texts_from_flags`."""
    command = text_options(command)
    option = next(p for p in command.__click_params__ if p.name == "text")  # type: ignore[attr-defined]  # click's
    option.multiple, option.default = True, ()
    option.help = f"{option.help} Several, each with its own --text, are measured one by one."
    return command


def texts_from_flags(texts: tuple[str, ...], dataset: str | None, offline: bool) -> list[corpus.Text]:
    """The texts they name, one at least. Raises as `text_from_flags`."""
    if len(texts) > 1:
        twice = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
        if twice is not None:
            raise UsageError(f"the text {twice} is given twice.", "give each once.")
    return [text_from_flags(text, dataset, offline) for text in texts or (None,)]


def text_from_flags(text: str | None, dataset: str | None, offline: bool) -> corpus.Text:
    """The text they name. Raises UsageError unless exactly one does, GgufloopError if it cannot be had."""
    if (text is None) == (dataset is None):
        what = "no text is given." if text is None else "the text is given twice."
        raise UsageError(what, f"give --text a file or one of {', '.join(corpus.NAMED)}; or --hf-dataset.")
    if text in corpus.DOMAINS:
        terminal.note(f"{text} is {corpus.CALIBRATION}")
    with shown() as progress:
        if text is not None:
            return corpus.local(text, offline, progress)
        assert dataset is not None
        return corpus.hub_text(dataset, offline, progress)
