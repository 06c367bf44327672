"""`ggufloop` itself: finds a command, gives it -v, runs it, and says in a line what went wrong.

A command's module is imported only when it is asked for, so `ggufloop version` does not pay for numpy or llama.cpp.
Each module defines a click command called `command`. Errors this project raises become two lines on stderr and an
exit code here, and nowhere else: 1 failed, 2 usage, 3 backend, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
import traceback

import click

from ggufloop.cli.help import Group
from ggufloop.cli.streams import OutputLost, guarded
from ggufloop.cli.width import remark
from ggufloop.errors import GgufloopError

GROUPS = {
    "Run": {
        "run": "Answer one prompt, or chat, with a model's window looped.",
        "chat": "Chat with a model.",
        "serve": "Serve a model with llama-server, a loop per request, and a page.",
        "exec": "Run one of llama.cpp's own programs with a loop.",
        "rpc-server": "Lend this machine to another that runs a model.",
    },
    "Measure": {
        "answer": "Does looping help on my task, at which window, and is it worth more than bits?",
        "trace": "How a loop converges on a text, pass by pass and layer by layer.",
        "perplexity": "Perplexity and KL divergence on a text, looped against plain (alias: ppl).",
        "eval": "Run tasks of lm-eval, and compare a loop with the plain model on them.",
        "longctx": "What loops do to long contexts: RULER's tasks by length.",
        "sweep": "Which window, K, solver or kv helps: many loops against plain, with a verdict.",
        "compare": "Bits against loops: a ladder of quantisations, each under each loop.",
        "study": "A protocol on a model: tasks and texts under many loops, judged together.",
        "advise": "What to spend on next, bits, a loop or a bigger model, from studies of compare.",
        "merge": "Put the shards of a measurement together.",
        "bench": "Measure speed: llama-bench's table, with loops.",
        "shannon": "Fit scaling laws of size, tokens and bits, and say what they cannot tell.",
        "results": "The sweeps and studies in a folder, listed or as one table.",
    },
    "Quantise": {
        "quantize": "Quantise a model with llama.cpp's own quantiser.",
        "snr": "How far quantised weights are from their originals, layer by layer.",
    },
    "Models": {
        "list": "The models known by name, and which are downloaded.",
        "pull": "Download a model.",
        "inspect": "What a model file holds, and whether and where it can loop.",
    },
    "Install": {
        "build": "Build the patched llama.cpp.",
        "doctor": "Check the installation and say what is wrong.",
        "version": "Print versions.",
        "completion": "Print the shell completion script.",
    },
}
"""Commands by what they are for: help must not import every command."""
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}

ALIASES = {"ppl": "perplexity"}


def _note_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    found = ctx.find_root().ensure_object(dict)
    found["verbose"] = value or found.get("verbose", False)


def _verbose(command: click.Command) -> click.Command:
    """Give a command, and those below it, the -v that `ggufloop` has: hints say "run with -v", and people append it."""
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _verbose(below)
    if all("-v" not in param.opts for param in command.params):
        says = "Show llama.cpp's log and, on an error, the traceback."
        command.params.append(click.Option(["-v", "--verbose"], is_flag=True, is_eager=True, expose_value=False,
                                           callback=_note_verbose, help=says))  # fmt: skip
    return command


class _Commands(Group):
    aliases = ALIASES

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ggufloop.cli.commands.{cmd_name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command)
        return _verbose(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for name, commands in GROUPS.items():
            with formatter.section(name):
                formatter.write_dl([(command.ljust(10), text) for command, text in commands.items()])


def _tell_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        cli.main(["version"], prog_name="ggufloop", standalone_mode=False)
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_tell_version,
              help="Print versions, as `ggufloop version` does.")  # fmt: skip
def cli() -> None:
    """Run a window of a GGUF model's layers again, and measure whether it helps."""


_verbose(cli)


def main(args: list[str] | None = None) -> None:
    """Entry point of the `ggufloop` script: run, and leave with the exit code of what happened."""
    with guarded() as streams:
        try:
            try:
                code = _run(sys.argv[1:] if args is None else args)
            finally:
                sys.stdout.flush()
        except OutputLost as e:
            click.echo(f"error: cannot write to standard output: {e.reason}.", err=True)
            code = 1
        sys.exit(code or int(streams.errors_lost))


def _run(args: list[str]) -> int:
    """Run a command, tell what went wrong, and return the exit code."""
    told: dict[str, bool] = {}
    try:
        code = cli.main(args, prog_name="ggufloop", standalone_mode=False, obj=told)
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except (GgufloopError, OSError) as e:
        if told.get("verbose"):
            traceback.print_exc()
        error = e if isinstance(e, GgufloopError) else _outside(e)
        remark(f"error: {error.message}")
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _outside(e: OSError) -> GgufloopError:
    """What to say where the system refuses what nobody thought it would: a name too long, a disk that fails."""
    name = str(e.filename or "")
    of = f"{name[:60]}{'...' * (len(name) > 60)}: " if name else ""
    return GgufloopError(
        f"{of}{e.strerror or e}.", "check the path and its permissions; -v shows where it was asked for."
    )
