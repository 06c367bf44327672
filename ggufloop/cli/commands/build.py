"""`ggufloop build`: progress on stderr, the library's folder on stdout."""

from __future__ import annotations

import click

from ggufloop.backend.build import PROGRAMS, BuildRequest, build
from ggufloop.backend.library import NAMES
from ggufloop.cli.help import Command
from ggufloop.cli.progress import shown
from ggufloop.interrupts import end_on_sigterm


@click.command("build", cls=Command)
@click.option(
    "--backend", "name", default="auto", show_default=True, metavar="NAME", envvar="GGUFLOOP_BACKEND",
    help=f"One of auto, {', '.join(NAMES)}.",
)  # fmt: skip
@click.option("--stock", is_flag=True, help="The unpatched llama.cpp, for comparisons; kept beside the patched one.")
@click.option("--with-tools", "tools", is_flag=True, help=f"Also {', '.join(PROGRAMS)}; all of them loop.")
@click.option("--server", "server", is_flag=True, help="Also llama-server, which `ggufloop serve` starts.")
@click.option("--force", is_flag=True, help="Build even if the library is in the cache.")
@click.option("--replace-binding", is_flag=True, help="Replace another version of llama-cpp-python.")
def command(name: str, stock: bool, tools: bool, server: bool, force: bool, replace_binding: bool) -> None:
    """Build the patched llama.cpp for this machine and install its Python binding.

    Prints the library's folder. Built once and kept in the cache; asking again takes no time and makes this library
    the one that is used.
    """
    end_on_sigterm()
    with shown() as progress:
        built = build(BuildRequest(name, stock, tools, server, force, replace_binding), progress)
    click.echo(built.directory)
