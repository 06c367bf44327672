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

from ggufloop.cli.streams import OutputLost, guarded
from ggufloop.errors import GgufloopError, nearest

COMMANDS = {
    "run": "Answer one prompt, or chat, with a model's window looped.",
    "chat": "Chat with a model.",
    "serve": "Serve a model with llama-server, a loop per request, and a page.",
    "exec": "Run one of llama.cpp's own programs with a loop.",
    "trace": "How a loop converges on a text, pass by pass and layer by layer.",
    "perplexity": "Perplexity and KL divergence on a text, looped against plain (alias: ppl).",
    "eval": "Run tasks of lm-eval, and compare a loop with the plain model on them.",
    "sweep": "Which window, K, solver or kv helps: many loops against plain, with a verdict.",
    "quantize": "Quantise a model with llama.cpp's own quantiser.",
    "snr": "How far quantised weights are from their originals, layer by layer.",
    "compare": "Bits against loops: a ladder of quantisations, each under each loop.",
    "advise": "What to spend on next, bits, a loop or a bigger model, from studies of compare.",
    "bench": "Measure speed: llama-bench's table, with loops.",
    "shannon": "Fit scaling laws of size, tokens and bits, and say what they cannot tell.",
    "inspect": "What a model file holds, and whether and where it can loop.",
    "pull": "Download a model.",
    "list": "The models known by name, and which are downloaded.",
    "rpc-server": "Lend this machine to another that runs a model.",
    "build": "Build the patched llama.cpp.",
    "doctor": "Check the installation and say what is wrong.",
    "version": "Print versions.",
    "completion": "Print the shell completion script.",
}

ALIASES = {"ppl": "perplexity"}


def _note_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    found = ctx.find_root().ensure_object(dict)
    found["verbose"] = value or found.get("verbose", False)


def _verbose(command: click.Command) -> click.Command:
    """Give a command, and those below it, the -v that `ggufloop` has: hints say "run with -v", and people append it."""
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _verbose(below)
    if all("-v" not in param.opts for param in command.params):
        command.params.append(
            click.Option(
                ["-v", "--verbose"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_note_verbose,
                help="Show llama.cpp's log and, on an error, the traceback.",
            )
        )
    return command


class _Group(click.Group):
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in (*COMMANDS, *ALIASES) and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}; {nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # from the table above: help must not import every command
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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
        click.echo(f"error: {error.message}", err=True)
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
