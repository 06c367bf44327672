"""`ggufloop build`: progress on stderr, the library's folder on stdout."""

from __future__ import annotations

import sys

import click

from ggufloop.backend.build import PROGRAMS, BuildRequest, build
from ggufloop.backend.library import NAMES
from ggufloop.backend.log import Step
from ggufloop.cli.help import Command
from ggufloop.interrupts import end_on_sigterm


class Progress:
    """Steps as lines; a count as one line that counts on a terminal, and as a line per tenth elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._counting = False
        self._tenth = 0

    def __call__(self, step: Step) -> None:
        if step.total:
            tenth = 10 * step.done // step.total
            line = f"  {step.done}/{step.total}"
            if self._live:
                click.echo(f"\r{line}", err=True, nl=False)
                self._counting = True
            elif tenth > self._tenth:
                click.echo(line, err=True)
            self._tenth = tenth
        else:
            self.finish()
            click.echo(step.text, err=True)

    def finish(self) -> None:
        """End the line that counts, if one is open."""
        if self._counting:
            click.echo(err=True)
        self._counting = False


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
    progress = Progress()
    try:
        built = build(BuildRequest(name, stock, tools, server, force, replace_binding), progress)
    finally:
        progress.finish()
    click.echo(built.directory)
