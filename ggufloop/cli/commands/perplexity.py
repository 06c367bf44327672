"""`ggufloop perplexity MODEL --text FILE`: llama-perplexity's number, and looped against plain on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ggufloop.cli.context import batch_options, context_from_flags, model_and_loop
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_options
from ggufloop.cli.options import model_from_flags, model_options, split_list
from ggufloop.cli.progress import shown
from ggufloop.cli.texts import text_from_flags, text_options
from ggufloop.cli.types import output_option, show
from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure import perplexity_report
from ggufloop.measure.perplexity import KLBase
from ggufloop.measure.perplexity_run import CONTEXT, PLAIN, run_perplexity

NONE = "none"


def _contexts(text: str) -> list[int]:
    """The contexts of -c, each once. Raises UsageError."""
    words = split_list(text, "-c")
    bad = next((word for word in words if not (word.isascii() and word.isdecimal()) or len(word) > 10), None)
    if bad is not None:
        raise UsageError(f"-c {bad!r} is not a whole number of 0 or more.", "write it like -c 512, or -c 256,512,1024.")
    return list(dict.fromkeys(int(word) for word in words))


def _base(given: str | None, loop: LoopSpec | None, offline: bool) -> Path | str | None:
    """What --kl-base means where it is no stored base: nothing said, a loop is compared with the plain model."""
    if given == NONE or (given is None and (loop is None or not loop.is_loop)):
        return None
    return PLAIN if given in (None, PLAIN) else model_from_flags(given, None, None, offline)


@click.command(name="perplexity", cls=Command)
@model_options
@text_options
@click.option("-c", "--ctx-size", "contexts", metavar="N,...", default=str(CONTEXT), show_default=True,
              help="Tokens of a chunk; half of them are scored. 0: the model's. Several give a row each.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Score the first N chunks (default: all).")
@click.option("--kl-base", metavar="plain|none|MODEL|FILE",
              help="Compare with the plain model (default of a loop), another model, or a file that llama-perplexity "
                   "wrote with --kl-divergence-base, which brings its own text and -c.")  # fmt: skip
@click.option("--save-kl-base", "save", type=click.Path(path_type=Path), metavar="FILE",
              help="Write this model's distributions, looped if it is, to such a file: 2 bytes for each token of the "
                   "vocabulary at each token scored.")  # fmt: skip
@loop_options
@output_option()
@batch_options
@click.pass_context
def command(
    ctx: click.Context, /, text: str | None, dataset: str | None, contexts: str, chunks: int | None,
    kl_base: str | None, save: Path | None, form: str, **flags: Any,
) -> None:  # fmt: skip
    """Perplexity of a text, by llama-perplexity's protocol: chunks of -c tokens, their second halves scored.

    With --window, looped and plain are scored on the same tokens, and the change is printed with its interval, followed
    by llama-perplexity's KL statistics (Q: looped, base: plain; its +/- are single standard errors).

    \b
    ggufloop perplexity smollm2-135m --text notes.txt
    ggufloop perplexity smollm2-135m --window 12:16 --K 3 --text pydoc --chunks 20
    ggufloop perplexity small-Q4_K_M.gguf --kl-base small-F16.gguf --text pydoc
    ggufloop perplexity smollm2-135m --window 12:16 --text pydoc -c 256,512,1024
    """
    asked = _contexts(contexts)
    settings = context_from_flags(flags)
    stored = KLBase.open(Path(kl_base), chunks) if kl_base is not None and KLBase.is_one(Path(kl_base)) else None
    if stored is not None and (text is not None or dataset is not None or asked not in ([CONTEXT], [stored.n_ctx])):
        raise UsageError(
            f"{kl_base} brings its own text and -c {stored.n_ctx}.", "leave out --text, --hf-dataset and -c."
        )
    offline = flags["offline"]
    source = None if stored is not None else text_from_flags(text, dataset, offline)
    path, loop, _ = model_and_loop(flags)
    with shown() as progress:
        run = run_perplexity(
            path, source, loop, contexts=asked, chunks=chunks, base=stored or _base(kl_base, loop, offline), save=save,
            settings=settings, verbose=ctx.obj["verbose"], progress=progress,
        )  # fmt: skip
    name = f"that of {kl_base}" if source is None else source.name
    report = perplexity_report
    show(form, lambda: report.text(run, name), lambda: report.record(run, name), lambda: report.table(run),
         lambda: report.numbers(run, name))  # fmt: skip
