"""`ggufloop trace MODEL -p TEXT`: how far each pass of a loop moves the states, and what each layer would predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ggufloop.cli import input as lines
from ggufloop.cli import terminal
from ggufloop.cli.context import Opened, context_from_flags, context_options, open_from_flags
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_options
from ggufloop.cli.options import model_options
from ggufloop.cli.progress import shown
from ggufloop.cli.types import output_option, show
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.figures import style
from ggufloop.figures.trace import trace_figure
from ggufloop.generate.complete import encode, prompt_tokens
from ggufloop.measure import trace_report
from ggufloop.measure.trace import trace
from ggufloop.models.template import ChatTemplate
from ggufloop.progress import doing


def _text(prompt: str | None, file: Path | None) -> str:
    """The prompt of -p or -f. Raises UsageError, GgufloopError."""
    if prompt is not None and file is not None:
        raise UsageError("the prompt is given twice.", "give -p or -f, not both.")
    if prompt is None and file is None:
        raise UsageError("no prompt is given.", "give one with -p, or a text file with -f.")
    text = prompt if file is None else lines.read_file(file)
    if not text:
        raise UsageError(f"{file or 'the prompt'} is empty.", "give a text of some sentences.")
    encode(text, "the prompt")
    return text


def _tokens(opened: Opened, text: str, chat: bool, batch: int) -> list[int]:
    """The prompt as tokens that fit one batch. Raises UsageError, GgufloopError."""
    llm = opened.llm
    if chat:
        template = ChatTemplate.needed(llm, "leave out --chat: the text is then taken as it is.")
        text = template.render([{"role": "user", "content": text}])
    tokens = prompt_tokens(llm, text)
    if len(tokens) > llm.n_ctx():
        raise GgufloopError(
            f"the prompt has {len(tokens)} tokens, and the context holds {llm.n_ctx()}.",
            "give a larger context with -c, or a shorter prompt.",
        )
    if len(tokens) > batch:
        raise GgufloopError(
            f"the prompt has {len(tokens)} tokens; a trace is one batch, which holds {batch}.",
            f"give -b {max(len(tokens), 2048)} -ub {len(tokens)}, or a shorter prompt.",
        )
    return tokens


@click.command(name="trace", cls=Command)
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="The text to trace, taken as it is.")
@click.option("-f", "--file", "file", type=click.Path(path_type=Path), metavar="FILE", help="Read the text from FILE.")
@click.option("--chat", is_flag=True, help="Ask the text as a chat message, in the model's chat template.")
@loop_options
@output_option(help="How to print it; all but text and json have one row per state.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw it too; the suffix says the format. Needs matplotlib (the extra 'lab').")  # fmt: skip
@click.option("--no-lens", is_flag=True, help="Leave out the logit lens: one output matrix per state less.")
@context_options
@click.pass_context
def command(
    ctx: click.Context, /, prompt: str | None, file: Path | None, chat: bool, form: str, plot: Path | None,
    no_lens: bool, **flags: Any,
) -> None:  # fmt: skip
    """Show how a loop converges on a text: how far each pass moves the states, and what each layer would predict.

    The text is one batch. Without --window it is the plain model's logit lens alone. docs/convergence.md says how to
    read the numbers.

    \b
    ggufloop trace smollm2-135m --window 12:16 --K 6 -p "The quick brown fox jumps over the lazy dog."
    ggufloop trace smollm2-135m --window 12:16 --K 6 -f notes.txt --plot trace.png
    """
    text = _text(prompt, file)
    if no_lens and flags["window"] is None and flags["recipe"] is None:
        raise UsageError("without --window there is only the logit lens.", "leave out --no-lens, or give a window.")
    settings = context_from_flags(flags)
    if plot is not None:
        style.check_target(plot)
    batch = min(settings.n_batch, settings.n_ubatch)
    opened = open_from_flags(flags, settings, ctx.obj["verbose"])
    tokens = _tokens(opened, text, chat, batch)
    loop = opened.llm.loop
    if loop is None or not loop.is_loop:
        what = "nothing loops" if loop is None else f"{loop} is one evaluation"
        terminal.note(f"{what}: this is the logit lens of the plain model.")
        if no_lens:
            raise UsageError("a plain model has only the logit lens.", "leave out --no-lens, or give --K 2 or more.")
    tau = None if loop is None else loop.halt
    with shown() as progress, doing(progress, "tracing ..."):
        result = trace(opened.llm, tokens, lens=not no_lens)
    if plot is not None:
        style.save(trace_figure(result, f"{opened.path.stem}, {result.loop or 'no loop'}", tau), plot)
    given = (result, opened.llm, opened.path, tau)
    show(form, lambda: trace_report.text(*given), lambda: trace_report.record(*given),
         lambda: trace_report.table(result), lambda: trace_report.numbers(result, opened.path))  # fmt: skip
