"""`ggufloop quantize MODEL --types ...`: a ladder of quantised files, made by llama.cpp's own quantiser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.cli.context import resolve_model
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import window_suggestion
from ggufloop.cli.options import model_options
from ggufloop.cli.progress import shown
from ggufloop.cli.types import output_option
from ggufloop.cli.width import tell
from ggufloop.errors import UsageError
from ggufloop.loop import parse_window
from ggufloop.measure import corpus
from ggufloop.quant import imatrix
from ggufloop.quant.files_report import render
from ggufloop.quant.ladder import LadderPlan, MatrixText, quantize_ladder
from ggufloop.quant.quantize import ALIASES, FILE_TYPES, INT4, INT8, Quantized, file_type


def _types(types: str | None, int4: bool, int8: bool) -> list[str]:
    """The file types asked for, each once. Raises UsageError."""
    words = [] if types is None else [word.strip() for word in types.split(",")]
    if not all(words):
        raise UsageError(f"--types {types!r} has an empty entry.", "write it like --types Q8_0,Q4_K_M.")
    found = [file_type(word) for word in words] + [INT8] * int8 + [INT4] * int4
    if not found:
        raise UsageError("no type is given.", "give --types Q8_0,Q4_K_M for example, --int8 or --int4.")
    return list(dict.fromkeys(found))


def _is_matrix(given: Path) -> bool:
    """Whether a file is an importance matrix, not a text: what is text has no zero bytes."""
    try:
        with given.open("rb") as f:
            start = f.read(4096)
    except OSError:
        return False  # `corpus.local` says what is wrong
    return start[:4] == b"GGUF" or b"\0" in start


def _matrix(given: str | None, chunks: int | None) -> Path | MatrixText | None:
    """What --imatrix means: a file of importances, or a text to compute them from. Raises GgufloopError."""
    if given is None:
        if chunks is not None:
            raise UsageError("--imatrix-chunks does nothing by itself.", "give --imatrix TEXT as well.")
        return None
    if given not in corpus.NAMED and _is_matrix(Path(given)):
        return Path(given)
    if given not in corpus.NAMED and not Path(given).is_file():
        raise UsageError(
            f"--imatrix {given}: there is no such file.", f"give a file, or {' or '.join(corpus.NAMED)} for a text."
        )
    text = corpus.local(given)
    return MatrixText(text.name, text.text, chunks)


def _made(file: Quantized) -> None:
    click.echo(f"{'made' if file.made else 'there already:'} {file.path}", err=True)


def _log(text: str) -> None:
    click.echo(text, nl=False, err=True)


@click.command(name="quantize", cls=Command)
@model_options
@click.option("--types", metavar="TYPE,...", help=f"What to make: {', '.join((*FILE_TYPES, *ALIASES))}.")
@click.option("--int8", is_flag=True,
              help=f"{INT8}: 8-bit whole numbers, an F16 scale for every 32 weights; 8.5 bits per weight.")  # fmt: skip
@click.option("--int4", is_flag=True,
              help=f"{INT4}: 4-bit whole numbers, an F16 scale for every 32 weights; 4.5 bits per weight, "
                   "the output matrix in Q6_K. Q4_K_M is the better 4-bit file, and no plain INT4.")  # fmt: skip
@click.option("--imatrix", "matrix", metavar="FILE|TEXT|pydoc|sdist-docs",
              help="Importance matrix: a file of llama-imatrix, or a text to compute it from here.")  # fmt: skip
@click.option("--imatrix-chunks", "chunks", type=click.IntRange(min=1), metavar="N",
              help=f"Read the first N chunks of {imatrix.CONTEXT} tokens of the text (default: all).")  # fmt: skip
@click.option("--window", metavar="A:B", help="The window of --keep-window: layers A to B-1, or 'auto'.")
@click.option("--keep-window", "keep", metavar="TYPE", help="Keep the layers of --window at this type, such as Q8_0.")
@click.option("--tensor-type", "given", multiple=True, metavar="PATTERN=TYPE",
              help="Make tensors whose name has the pattern of this type, such as ffn_down=Q6_K; the first "
                   "that fits counts.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the files go (default: beside MODEL; the current folder for one known by name).")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files that are there and were made otherwise.")
@click.option(
    "-t", "--threads", "n_threads", type=click.IntRange(min=1), metavar="N", help="Threads (default: all cores)."
)
@output_option(help="How to print it; all but text have every tensor.")
@click.pass_context
def command(
    ctx: click.Context, /, types: str | None, int8: bool, int4: bool, matrix: str | None, chunks: int | None,
    window: str | None, keep: str | None, given: tuple[str, ...], out: Path | None, force: bool,
    n_threads: int | None, form: str, **flags: Any,
) -> None:  # fmt: skip
    """Quantise a model with llama.cpp's own quantiser, to one file per type: STEM-TYPE.gguf.

    Most types are mixtures: Q4_K_M has some tensors in Q6_K. The table says what each file has in truth. A model that
    is quantised already can be the source; F16 and F32 then mean the same weights in a wider type. A file that was
    made in the same way before is not made again; what was done is in its metadata and in FILE.json beside it.

    \b
    ggufloop quantize model-F16.gguf --types Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,Q3_K_M,Q2_K
    ggufloop quantize smollm2-135m --int4 --window 12:16 --keep-window Q8_0
    ggufloop quantize model-F16.gguf --types IQ2_M --imatrix pydoc --imatrix-chunks 100
    """
    wanted = _types(types, int4, int8)
    if (window is None) != (keep is None):
        has, needs = ("--keep-window", "--window A:B") if window is None else ("--window", "--keep-window TYPE")
        raise UsageError(f"{has} does nothing by itself.", f"give {needs} as well.")
    plan = LadderPlan(tuple(wanted), given, None if window in (None, "auto") else parse_window(str(window)), keep,
                      _matrix(matrix, chunks))  # fmt: skip
    names = (flags["model"], flags["model_path"])
    path = resolve_model(flags)
    if window == "auto":
        plan = replace(plan, window=window_suggestion(path)())
    by_path = any(text is not None and Path(text) == path for text in names)
    folder = out or (path.parent if by_path else Path())
    with shown() as progress:
        files = quantize_ladder(path, plan, folder, threads=n_threads, force=force, progress=progress, each=_made,
                                log=_log if ctx.obj["verbose"] else None)  # fmt: skip
    if form == "text":
        tell(render(files, form))
    else:
        click.echo(render(files, form), nl=False)
