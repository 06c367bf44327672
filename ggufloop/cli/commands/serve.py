"""`ggufloop serve`: llama-server with a loop per request, and a page; words on stderr, until Ctrl-C."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.backend import library
from ggufloop.cli import terminal
from ggufloop.cli.context import context_from_flags, context_options, model_and_loop, sampling_options
from ggufloop.cli.diffusion import refuse_diffusion
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_options
from ggufloop.cli.options import model_options, template_from_flags, template_options
from ggufloop.cli.progress import shown
from ggufloop.errors import BackendError, UsageError
from ggufloop.generate.sampling import Sampling
from ggufloop.interrupts import end_on_sigterm
from ggufloop.server.words import check_more, check_webui, model_name, server_words

_FILE = click.Path(exists=True, dir_okay=False)


def program() -> Path:
    """llama-server, built if it is not there. Raises BackendError."""
    try:
        return library.program("llama-server")
    except BackendError:
        if os.environ.get("GGUFLOOP_LIB_DIR"):  # whose library it is, builds it
            raise
        from ggufloop.backend.build import BuildRequest, build

        terminal.note("building llama-server, once; that takes some minutes.")
        with shown() as progress:
            build(BuildRequest(library.requested_name() or "auto", server=True), progress)
        return library.program("llama-server")


@click.command(name="serve", cls=Command, context_settings={"allow_interspersed_args": True})
@model_options
@click.option("-H", "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="Address to listen at; one that other machines can reach needs --api-key.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N",
              help="Port to listen at; 0: any that is free.")  # fmt: skip
@click.option("--api-key", envvar=["GGUFLOOP_API_KEY", "LLAMA_API_KEY"], metavar="KEY",
              help="What requests must carry as a bearer token (or set GGUFLOOP_API_KEY).")  # fmt: skip
@click.option("-np", "--parallel", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N",
              help="Answers generated at a time, each with a context of -c tokens.")  # fmt: skip
@click.option("--cors", metavar="ORIGIN", help="A page elsewhere whose scripts may use the server; *: any.")
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder whose sweeps and comparisons the page shows.")  # fmt: skip
@click.option("--webui", type=click.Path(path_type=Path), metavar="DIR",
              help="Show llama.cpp's own page, built into DIR, instead of ggufloop's.")  # fmt: skip
@click.option("--jinja", is_flag=True, help="Use the model's chat template as it is (llama-server's default).")
@template_options
@click.option("--reasoning-budget", type=int, metavar="N", help="Tokens a model may think; 0: none, -1: any.")
@click.option("--embeddings", is_flag=True, help="Serve embeddings, and nothing else.")
@click.option("--mmproj", type=_FILE, metavar="FILE", help="The projector of a model that sees or hears.")
@click.option("-md", "--model-draft", "model_draft", type=_FILE, metavar="FILE",
              help="A draft model, for speculative decoding.")  # fmt: skip
@loop_options
@sampling_options
@context_options
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA-SERVER FLAGS]")
@click.pass_context
def command(ctx: click.Context, /, **flags: Any) -> None:
    """Serve a model with llama-server, a loop per request, and a page that shows plain and looped side by side.

    The loop and the sampling flags hold where a request says nothing; a request chooses its own by "loop", or by the
    model's name as in MODEL@12:16x3. What follows -- goes to llama-server as it is.

    \b
    ggufloop serve smollm2-135m --window 12:16 --K 3
    ggufloop serve smollm2-135m -np 4 -- --metrics --slots
    curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "loop": {"window": "12:16", "k": 6}}'
    """
    from ggufloop.server.results import check_folder
    from ggufloop.server.serve import Site, check_address, check_origin, free_port, serve

    settings = context_from_flags(flags)
    sampling = Sampling(**{name: flags.pop(name) for name in Sampling.__dataclass_fields__})  # its seed is not drawn
    key, host, results = flags.pop("api_key"), flags.pop("host"), flags.pop("results")
    check_address(host, key)
    check_origin(flags["cors"] or "*")
    check_more(flags["more"])
    check_webui(flags["webui"])
    if results is not None:
        check_folder(results)
    path, loop, _ = model_and_loop(flags)
    refuse_diffusion(path)
    template = template_from_flags(flags, path)
    if loop is not None and loop.decode_entropy() is not None:
        raise UsageError(f"decode {loop.decode} evaluates tokens twice, which the server does not.", "use run or chat.")
    parallel = flags.pop("parallel")
    replace(settings, n_ctx=parallel * settings.context(path)).check_memory([path], [loop])
    server = program()
    port = free_port(host, flags.pop("port"))
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def ready() -> None:
        click.echo(
            f"serving {model_name(path)}, {terminal.describe(loop)}, at {url} (the API: {url}/v1). Ctrl-C ends it.",
            err=True,
        )

    end_on_sigterm()
    terminal.note(f"loading {path.name} ...")
    with Site(results) as site:
        words = [str(server), *server_words(path, settings, sampling, loop, parallel, flags, template)]
        words += ["--host", host, "--port", str(port), "--path", str(flags["webui"] or site.folder)]
        words += ["--check-host", "--cors-origins", flags["cors"] or "localhost"]
        words += [*(["-v"] if ctx.obj["verbose"] else []), *flags["more"]]
        library.spin_briefly()
        env = {"LLAMA_LOOP": "", "LLAMA_ARG_LOOP": ""} | ({} if key is None else {"LLAMA_API_KEY": key})
        try:
            serve(words, (host, port), site, env, ready, ctx.obj["verbose"])
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
