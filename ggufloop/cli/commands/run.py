"""`ggufloop run`: one answer to -p, -f or piped input; without any of them, a chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ggufloop.cli import input as lines
from ggufloop.cli import terminal
from ggufloop.cli.context import (
    Opened,
    context_from_flags,
    context_options,
    open_from_flags,
    sampling_from_flags,
    sampling_options,
)
from ggufloop.cli.diffusion import Asked, chatting, diffusion_options, is_diffusion
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_options
from ggufloop.cli.options import check_model, check_template, model_options, template_options
from ggufloop.cli.repl import converse
from ggufloop.errors import UsageError
from ggufloop.generate.chat import Conversation
from ggufloop.generate.complete import Answer, complete, encode, prompt_tokens
from ggufloop.generate.sampling import Sampling


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    """What the user asks: -p or the file, then what is piped in; None to chat. Raises UsageError, GgufloopError."""
    if prompt is not None and file is not None:
        raise UsageError("the prompt is given twice.", "give -p or -f, not both.")
    given = prompt if file is None else lines.read_file(file)
    if given is None and lines.is_interactive():
        return None
    text = "\n".join(part for part in (given, lines.read_piped()) if part)
    if not text.strip():
        source = "standard input" if given is None else str(file or "the prompt")
        raise UsageError(f"{source} is empty.", "give a prompt with -p, -f or a pipe, or run in a terminal to chat.")
    encode(text, "the prompt")
    return text


def _answer(
    opened: Opened, text: str, sampling: Sampling, system: str | None, prefill: str | None, raw: bool
) -> Answer | None:
    """Stream the answer to `text`; a model without a chat template continues it."""
    llm = opened.llm
    template = None if raw else opened.template
    if template is not None:
        chat = Conversation(llm, template, sampling, system, opened.path.name)
        chat.set_prefill(prefill or "")
        return terminal.stream(lambda emit, stopped: chat.ask(text, emit, stopped), template.tags)
    if not raw:
        terminal.note_no_template({"-sys": system, "--prefill": prefill})
    tokens = prompt_tokens(llm, text)
    return terminal.stream(lambda emit, stopped: complete(llm, tokens, sampling, emit=emit, stopped=stopped))


@click.command(name="run", cls=Command)
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="What to answer; piped input is appended.")
@click.option(
    "-f", "--file", "file", type=click.Path(path_type=Path), metavar="FILE", help="Read the prompt from FILE."
)
@click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="What the model is told first.")
@click.option("--prefill", metavar="TEXT", help="What the answer begins with; the model goes on from there.")
@click.option("--raw", is_flag=True, help="Continue the prompt as text: no chat template.")
@template_options
@loop_options
@diffusion_options
@sampling_options
@context_options
@click.pass_context
def command(
    ctx: click.Context, /, prompt: str | None, file: Path | None, system: str | None, prefill: str | None, raw: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Answer one prompt, or chat, with a model's window looped.

    MODEL is a GGUF file, a name of `ggufloop list`, or user/repo[:quant]. With -p, -f or piped input there is one
    answer, on standard output; otherwise a chat. A diffusion model (LLaDA, Dream) writes all of its answer at once, and
    does not chat.

    \b
    ggufloop run smollm2-135m --window 12:16 --K 3 -p "Why is the sky blue?"
    ggufloop run smollm2-135m -p "Summarise this:" < notes.txt
    """
    check_model(flags)
    if raw:
        check_template(flags, "leave them out, or leave out --raw.")
        if system is not None or prefill is not None:
            what = "-sys" if system is not None else "--prefill"
            raise UsageError(f"{what} needs a chat template, and --raw uses none.", "put the text into the prompt.")
    sampling, settings = sampling_from_flags(flags), context_from_flags(flags)
    asked = Asked.from_flags(ctx, flags, sampling)
    if raw and prompt is None and file is None and lines.is_interactive():
        raise UsageError("--raw needs a prompt.", "give it with -p, -f or a pipe.")
    text = _prompt(prompt, file)
    if text is None and prefill is not None:
        raise UsageError("--prefill begins one answer, and this is a chat.", "give -p, or write /prefill TEXT there.")
    opened = open_from_flags(flags, settings, ctx.obj["verbose"], fit=asked.fit if text is not None else chatting)
    if text is not None and is_diffusion(opened.path):
        asked.answer(opened, text, system, raw)
        return
    if text is None:
        converse(opened, sampling, system)
        return
    answer = _answer(opened, text, sampling, system, prefill, raw)
    if answer is None or answer.finish == "interrupted":
        ctx.exit(130)
