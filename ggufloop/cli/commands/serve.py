"""`ggufloop serve`: llama-server with a loop per request, and a page; words on stderr, until Ctrl-C."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import click

from ggufloop.backend import library
from ggufloop.cli import terminal
from ggufloop.cli.context import (
    check_context,
    check_loops,
    check_memory,
    context_options,
    context_size,
    cores,
    sampling_options,
)
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_from_flags, loop_options, loop_suggestion
from ggufloop.cli.options import MODEL_FLAGS, model_from_flags, model_options
from ggufloop.cli.progress import shown
from ggufloop.errors import BackendError, UsageError
from ggufloop.generate.sampling import Sampling
from ggufloop.interrupts import end_on_sigterm
from ggufloop.loop import LoopSpec
from ggufloop.models.registry import suggest_window

MENU = ("k=3", "k=6 passes=3")
"""What the list of models offers of the suggested window: what every model that loops can run."""
_SAMPLING = {
    "n": "-n", "seed": "-s", "temp": "--temp", "top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty",
}  # fmt: skip
_CONTEXT = {
    "batch_size": "-b", "ubatch_size": "-ub", "gpu_layers": "-ngl", "rpc_servers": "--rpc", "split_mode": "-sm",
    "tensor_split": "-ts", "main_gpu": "-mg", "device": "-dev", "flash_attn": "-fa", "type_k": "-ctk", "type_v": "-ctv",
}  # fmt: skip
_FILE = click.Path(exists=True, dir_okay=False)
_OURS = {"-m": "MODEL", "--model": "MODEL", "--host": "--host", "--port": "--port", "--loop": "--window"}
"""What ggufloop has to know of llama-server's flags, and how it is told."""
_HANDED = {"mmproj": "--mmproj", "model_draft": "-md", "reasoning_budget": "--reasoning-budget"}


def model_name(path: Path) -> str:
    """What the API calls a model: its name of `ggufloop list`, else its file's."""
    from ggufloop.models import registry

    entry = registry.entry_for(path)
    return entry.name if entry is not None else path.stem.replace("@", "-")


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


def menu(path: Path, loop: LoopSpec | None) -> list[LoopSpec]:
    """Loops the list of models offers: the one served, and two of the suggested window."""
    found = [] if loop is None else [loop]
    if loop is None or loop.kv != "each":  # the slots of kv each serve no other loop
        try:
            window = "{}:{}".format(*suggest_window(path)[0])
            found += [LoopSpec.parse(f"{window} {settings}") for settings in MENU]
            check_loops(path, found)
        except UsageError:  # a model too small, or one that does not loop there
            found = found[:1] if loop is not None else []
    return list(dict.fromkeys(found))


def server_words(path: Path, flags: dict[str, Any], loop: LoopSpec | None) -> list[str]:
    """The arguments of llama-server that the flags mean."""
    threads = str(flags["threads"] or cores())
    words = ["-m", str(path), "-a", model_name(path), "-t", threads, "-tb", threads]
    # every answer has a context, and K/V, of its own: what it computes does not depend on the others
    words += [
        "-np",
        str(flags["parallel"]),
        "-c",
        str(flags["parallel"] * context_size(path, flags)),
        "--no-kv-unified",
    ]
    for names in (_CONTEXT, _SAMPLING, _HANDED):
        words += [word for name, flag in names.items() if flags[name] is not None for word in (flag, str(flags[name]))]
    words += ["--embeddings"] * flags["embeddings"] + ["--jinja"] * flags["jinja"]
    if loop is not None:
        words += ["--loop", str(loop)]
    return words + [word for each in menu(path, loop) for word in ("--loop-menu", str(each))]


def check_more(words: tuple[str, ...]) -> None:
    """Raise UsageError for a flag of llama-server that ggufloop has to be told itself."""
    for word in words:
        flag = word.split("=")[0]
        if flag in _OURS:
            raise UsageError(f"{flag} after -- would go past ggufloop.", f"give {_OURS[flag]} before it.")


def check_webui(folder: Path | None) -> None:
    """Raise UsageError unless a page is there."""
    if folder is not None and not (folder / "index.html").is_file():
        raise UsageError(
            f"{folder} holds no index.html, so it is not llama.cpp's page as it is when built.",
            "build tools/ui of a llama.cpp (npm install, npm run build), and name the folder that makes.",
        )


@click.command(name="serve", context_settings={"allow_interspersed_args": True})
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

    check_context(flags)
    key, host, results = flags.pop("api_key"), flags.pop("host"), flags.pop("results")
    check_address(host, key)
    check_origin(flags["cors"] or "*")
    check_more(flags["more"])
    check_webui(flags["webui"])
    if results is not None:
        check_folder(results)
    find = cache(lambda: model_from_flags(*(flags.pop(name) for name in MODEL_FLAGS)))
    loop = loop_from_flags(
        flags.pop("window"), lambda: loop_suggestion(find())(), **{name: flags.pop(name) for name in LOOP_FLAGS}
    )
    if loop is not None and loop.decode_entropy() is not None:
        raise UsageError(f"decode {loop.decode} evaluates tokens twice, which the server does not.", "use run or chat.")
    path = find()
    terminal.note_horizon(loop)
    check_loops(path, [] if loop is None else [loop])
    check_memory([path], flags | {"ctx_size": flags["parallel"] * context_size(path, flags)}, [loop])
    Sampling(**{name: flags[name] for name in Sampling.__dataclass_fields__})  # refuses what no sampler takes
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
        words = [str(server), *server_words(path, flags, loop), "--host", host, "--port", str(port)]
        words += ["--path", str(flags["webui"] or site.folder)]
        words += ["--check-host", "--cors-origins", flags["cors"] or "localhost"]
        words += [*(["-v"] if ctx.obj["verbose"] else []), *flags["more"]]
        library.spin_briefly()
        env = {"LLAMA_LOOP": "", "LLAMA_ARG_LOOP": ""} | ({} if key is None else {"LLAMA_API_KEY": key})
        try:
            serve(words, (host, port), site, env, ready, ctx.obj["verbose"])
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
