"""`ggufloop chat`: a conversation at the terminal, or line by line from a pipe; cli/repl.py holds it."""

from __future__ import annotations

from typing import Any

import click

from ggufloop.cli.context import (
    context_from_flags,
    context_options,
    open_from_flags,
    sampling_from_flags,
    sampling_options,
)
from ggufloop.cli.diffusion import chatting
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_options
from ggufloop.cli.options import check_model, model_options, template_options
from ggufloop.cli.repl import converse


@click.command(name="chat", cls=Command)
@model_options
@click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="What the model is told first.")
@template_options
@loop_options
@sampling_options
@context_options
@click.pass_context
def command(ctx: click.Context, /, system: str | None, **flags: Any) -> None:
    """Chat with a model, its window looped if --window says so.

    MODEL is a GGUF file, a name of `ggufloop list`, or user/repo[:quant]. Lines piped to standard input are answered
    one by one.
    """
    check_model(flags)
    sampling, settings = sampling_from_flags(flags), context_from_flags(flags)
    converse(open_from_flags(flags, settings, ctx.obj["verbose"], fit=chatting), sampling, system)
