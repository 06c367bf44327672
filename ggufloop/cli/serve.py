"""`ggufloop serve`: a model behind OpenAI's API, and a page; words on stderr, until Ctrl-C."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggufloop.cli import terminal
from ggufloop.cli.context import check_context, check_loops, context_options, engine_settings, sampling_options
from ggufloop.cli.options import (
    LOOP_FLAGS,
    MODEL_FLAGS,
    loop_from_flags,
    loop_options,
    loop_suggestion,
    model_from_flags,
    model_options,
)
from ggufloop.errors import UsageError
from ggufloop.registry import suggest_window
from ggufloop.sampling import Sampling

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama
    from ggufloop.server.run import Config


def model_name(path: Path) -> str:
    """What the API calls a model: its name of `ggufloop list`, else its file's."""
    from ggufloop import registry

    entry = registry.entry_for(path)
    return entry.name if entry is not None else path.stem.replace("@", "-")


def _config(flags: dict[str, Any], verbose: bool) -> Config:
    """The server that the flags describe. Raises UsageError, GgufloopError."""
    from ggufloop.server.limits import Limits
    from ggufloop.server.results import check_folder
    from ggufloop.server.run import Config, check_address, check_installed
    from ggufloop.server.worker import Settings

    check_context(flags)
    key, host = flags.pop("api_key"), flags.pop("host")
    check_address(host, key)
    check_installed()
    names = {"parallel": "parallel", "queue": "queue", "max_prompt": "prompt_tokens", "max_predict": "max_tokens"}
    values = {field: flags.pop(flag) for flag, field in names.items()}
    mib = 2**20
    limits = Limits(**values, body_bytes=flags.pop("max_body") * mib, cache_bytes=flags.pop("cache_ram") * mib)
    sampling = Sampling(**{name: flags.pop(name) for name in Sampling.__dataclass_fields__})
    origins = tuple(word.strip().rstrip("/") for word in (flags.pop("cors") or "").split(",") if word.strip())
    for origin in origins:
        if origin != "*" and "://" not in origin:
            raise UsageError(f"--cors {origin!r} is no origin.", "write it like https://example.org, or * for all.")
    results = flags.pop("results")
    if results is not None:
        check_folder(results)
    find = cache(lambda: model_from_flags(*(flags.pop(name) for name in MODEL_FLAGS)))
    loop = loop_from_flags(
        flags.pop("window"), lambda: loop_suggestion(find())(), **{name: flags.pop(name) for name in LOOP_FLAGS}
    )
    path = find()
    terminal.note_horizon(loop)
    check_loops(path, [] if loop is None else [loop])
    try:
        suggested = suggest_window(path)[0]
    except UsageError:
        suggested = None
    name = model_name(path)
    engine = engine_settings(path, flags)
    settings = Settings(engine["n_ctx"], min(engine["n_batch"], engine["n_ctx"]), engine["n_ubatch"])

    def open_model() -> LoopedLlama:
        from ggufloop.engine import LoopedLlama

        terminal.note(f"loading {name} ...")
        # its own context is for nothing but looking at the model: the worker makes those that answer
        llm = LoopedLlama(path, verbose=verbose, **{**engine, "n_ctx": 256, "n_batch": 64, "n_ubatch": 64})
        if llm.devices:
            terminal.note(f"layers go to {', '.join(f'{d.name} ({d.description})' for d in llm.devices)}.")
        return llm

    return Config(
        name,
        open_model,
        settings,
        loop,
        suggested,
        sampling,
        limits,
        host,
        flags.pop("port"),
        key,
        origins,
        results,
    )


@click.command(name="serve")
@model_options
@click.option(
    "-H",
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at; one that other machines can reach needs --api-key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="N",
    help="Port to listen at; 0: any that is free.",
)
@click.option(
    "--api-key",
    envvar="GGUFLOOP_API_KEY",
    metavar="KEY",
    help="What requests must carry as a bearer token (or set GGUFLOOP_API_KEY).",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    metavar="N",
    help="Answers generated at a time, each with a context of -c tokens.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    metavar="N",
    help="Requests that may wait; more are refused.",
)
@click.option(
    "--cache-ram",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    metavar="MIB",
    help="Memory for conversations that may come back.",
)
@click.option(
    "--max-body", type=click.IntRange(min=1), default=4, show_default=True, metavar="MIB", help="Largest request."
)
@click.option(
    "--max-prompt",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most tokens of a prompt (default: what the context holds).",
)
@click.option(
    "--max-predict",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most tokens of an answer, whatever a request says (default: what the context holds).",
)
@click.option("--cors", metavar="ORIGIN,...", help="Pages elsewhere whose scripts may use the server; *: all.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder whose sweeps and comparisons the page shows.",
)
@loop_options
@sampling_options
@context_options
@click.pass_context
def command(ctx: click.Context, /, **flags: Any) -> None:
    """Serve a model behind OpenAI's API, and a page that shows plain and looped answers side by side.

    The loop and the sampling flags are what holds where a request says nothing; a request can choose its own loop.

    \b
    ggufloop serve smollm2-135m --window 12:16 --K 3
    curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "loop": {"window": "12:16", "k": 6}}'
    """
    from ggufloop.server.run import serve

    config = _config(flags, ctx.obj["verbose"])

    def ready(url: str) -> None:
        click.echo(
            f"serving {config.name}, {terminal.describe(config.loop)}, at {url} (the API: {url}/v1). Ctrl-C ends it.",
            err=True,
        )

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that goes away
    ended = serve(config, ready)
    click.echo("stopped", err=True)
    if not ended:
        sys.stderr.flush()
        os._exit(0)  # its thread is in C and cannot be ended
