"""`ggufloop exec`: one of llama.cpp's own programs, with a loop."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import click

from ggufloop.backend import library
from ggufloop.backend.build import PROGRAMS
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_from_flags, loop_options
from ggufloop.errors import UsageError, nearest


@click.command(
    name="exec", cls=Command, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@loop_options
@click.option("--stock", is_flag=True, help="The program of the unpatched llama.cpp.")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="PROGRAM [ARGUMENTS]...")
def command(stock: bool, words: tuple[str, ...], **flags: Any) -> None:
    """Run one of llama.cpp's own programs with a loop: it gets LLAMA_LOOP, which this library reads.

    `ggufloop build --with-tools` builds them. What comes after PROGRAM is the program's own.

    \b
    ggufloop exec --window 12:16 --K 3 -- llama-bench -m model.gguf
    ggufloop exec --window 12:16 --K 3 -- llama-perplexity -m model.gguf -f text.txt
    """
    if words[0] not in PROGRAMS:
        raise UsageError(f"{words[0]} is no program of llama.cpp that ggufloop builds.", nearest(words[0], PROGRAMS))
    window = flags.pop("window")
    if window == "auto":
        raise UsageError(
            "--window auto needs a model, and the program's is not looked at.", "give a window like 12:16."
        )

    if flags["recipe"] is not None:
        raise UsageError(
            "--recipe needs a model, and the program's is not looked at.",
            "`ggufloop inspect MODEL --recipe NAME` says its flags: give those.",
        )

    def nothing() -> Any:
        raise AssertionError("auto was refused")

    loop = loop_from_flags(window, nothing, **{name: flags.pop(name) for name in LOOP_FLAGS})
    if stock and loop is not None:
        raise UsageError("the stock llama.cpp has no loops.", "leave out --window, or --stock.")
    program = library.program(words[0], stock)
    env = {name: value for name, value in os.environ.items() if name != "LLAMA_LOOP"}
    if loop is not None:
        env["LLAMA_LOOP"] = str(loop)
    if sys.platform == "win32":
        sys.exit(subprocess.run([program, *words[1:]], env=env).returncode)
    os.execve(program, [str(program), *words[1:]], env)
