"""`ggufloop inspect MODEL`: what a model file holds, whether and where it can loop, and what a loop would cost.

No model is loaded and no backend is needed; inspection.py computes it.
"""

from __future__ import annotations

from typing import Any

import click

from ggufloop import inspection
from ggufloop.backend.settings import DEFAULT_CONTEXT
from ggufloop.cli.context import resolve_model
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_from_flags, loop_options, loop_suggestion
from ggufloop.cli.options import model_options
from ggufloop.cli.types import OneOf, output_option, show
from ggufloop.models.architectures import check_architecture, refusal
from ggufloop.models.info import KV_TYPES, describe
from ggufloop.models.registry import suggest_window


@click.command(name="inspect", cls=Command)
@model_options
@loop_options
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=0), metavar="N",
              help=f"Tokens of context (default {DEFAULT_CONTEXT} or the model's, if less; 0: its own).")  # fmt: skip
@click.option("-ctk", "--cache-type-k", "type_k", type=OneOf(KV_TYPES), default="f16", show_default=True,
              metavar="TYPE",
              help=f"Type of the K cache: {', '.join(KV_TYPES)}.")  # fmt: skip
@click.option("-ctv", "--cache-type-v", "type_v", type=OneOf(KV_TYPES), default="f16", show_default=True,
              metavar="TYPE",
              help="Type of the V cache; the same types.")  # fmt: skip
@output_option("json")
def command(window: str | None, n_ctx: int | None, type_k: str, type_v: str, form: str, **flags: Any) -> None:
    """Show what a model file holds, whether and where it can loop, and the memory it takes with and without a loop.

    MODEL is a GGUF file, a name of `ggufloop list`, or user/repo[:quant] on Hugging Face.
    """
    loop_flags = {name: flags.pop(name) for name in list(flags) if name in LOOP_FLAGS}
    loop_from_flags(window, lambda: (1, 2), **loop_flags)  # a wrong flag is said before anything is downloaded
    info = describe(resolve_model(flags))
    if window is not None:
        check_architecture(info.architecture)
    loop = origin = None
    if refusal(info.architecture) is None and info.n_layer > 2:
        loop = loop_from_flags(window, loop_suggestion(info.files[0]), **loop_flags)
        origin = suggest_window(info)[1] if window == "auto" else ""
    report = inspection.inspect(info, n_ctx, (type_k, type_v), loop, origin or "")
    show(form, lambda: inspection.text(report), lambda: inspection.record(report))
