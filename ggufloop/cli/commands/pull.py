"""`ggufloop pull MODEL`: download a model and print where it is."""

from __future__ import annotations

import click

from ggufloop.cli.help import Command
from ggufloop.cli.options import model_from_flags, model_options


@click.command(name="pull", cls=Command)
@model_options
def command(model: str | None, model_path: str | None, hf: str | None, hf_file: str | None, offline: bool) -> None:
    """Download a model, check it, and print its path.

    MODEL is a name of `ggufloop list` or user/repo[:quant] on Hugging Face. A file that is there already is not
    downloaded again; an interrupted download goes on where it stopped.
    """
    click.echo(model_from_flags(model, model_path, hf, offline, hf_file))
