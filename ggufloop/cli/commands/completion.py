"""`ggufloop completion SHELL`: print the script that makes the shell complete commands, options, models and words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ggufloop.cli.help import Command

_INSTALL = {
    "bash": 'Put  eval "$(ggufloop completion bash)"  into ~/.bashrc.',
    "zsh": 'Put  eval "$(ggufloop completion zsh)"  into ~/.zshrc, after compinit.',
    "fish": "Write it to ~/.config/fish/completions/ggufloop.fish.",
}


@click.command(
    name="completion", cls=Command, epilog="\b\n" + "\n".join(f"{shell:5} {text}" for shell, text in _INSTALL.items())
)
@click.argument("shell", type=click.Choice(list(_INSTALL)))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    kind = get_completion_class(shell)
    assert kind is not None  # the choices are click's own
    click.echo(kind(ctx.find_root().command, {}, "ggufloop", "_GGUFLOOP_COMPLETE").source())
