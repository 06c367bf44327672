"""The flags of a text to score, for the commands that measure on one: `text_options`, and `text_from_flags`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

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
        "--text", "-f", "--file", "text", metavar="FILE|pydoc|sdist-docs",
        help="The text: a UTF-8 file, Python's own help, or llama.cpp's documentation.",
    )(command)  # fmt: skip


def text_from_flags(text: str | None, dataset: str | None, offline: bool) -> corpus.Text:
    """The text they name. Raises UsageError unless exactly one does, GgufloopError if it cannot be had."""
    if (text is None) == (dataset is None):
        what = "no text is given." if text is None else "the text is given twice."
        raise UsageError(what, f"give --text FILE, --text {' or --text '.join(corpus.NAMED)}, or --hf-dataset.")
    if text is not None:
        return corpus.local(text)
    assert dataset is not None
    with shown() as progress:
        return corpus.hub_text(dataset, offline, progress)
