"""Options that mean the same in every command: the model and its context, and the loop.

Spelled as llama.cpp spells them where it has them. `--window auto` is resolved by the command, which knows the
model; everything else about a loop is checked here, before any model is loaded. A command that runs a model reads

    @model_options
    @loop_options
    def command(model, model_path, hf, offline, window, **loop):
        path = model_from_flags(model, model_path, hf, offline)
        spec = loop_from_flags(window, window_suggestion(path), **loop)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ggufloop.errors import UsageError
from ggufloop.loop import KV_POLICIES, MODES, SOLVERS, LoopSpec

C = TypeVar("C", bound=Callable[..., Any])

_MODEL = [
    click.argument("model", required=False, metavar="MODEL"),
    click.option("-m", "--model", "model_path", metavar="FILE", help="A GGUF file, or any other spelling of MODEL."),
    click.option("-hf", "--hf-repo", "hf", metavar="USER/REPO[:QUANT]", help="A Hugging Face repository."),
    click.option("--offline", is_flag=True, help="Use only what is downloaded already."),
]

_LOOP = [
    click.option(
        "--window", metavar="A:B", help="Loop layers A to B-1 (half-open), or 'auto'. Without it nothing loops."
    ),
    click.option("--K", "k", type=int, default=None, help="Outer steps of the solver (default 3).", metavar="K"),
    click.option("--mode", default="block", show_default=True, help=f"One of {', '.join(MODES)}."),
    click.option("--solver", default="euler", show_default=True, help=f"One of {', '.join(SOLVERS)}."),
    click.option("--damping", type=float, default=None, help="Weight of one evaluation in one step (default 1/K)."),
    click.option(
        "--beta", type=float, default=0.0, show_default=True, help="Anchor: weight of the plain result, 0 to 1."
    ),
    click.option("--mu", type=float, default=None, help="Momentum of heavy-ball (default 0.5)."),
    click.option("--passes", type=int, default=None, help="Run the K euler steps in 2 or 3 evaluations."),
    click.option("--kv", default=None, help=f"What the cache holds: {', '.join(KV_POLICIES)} (default first)."),
    click.option(
        "--decode", default="full", show_default=True, help="Which generated tokens loop: full, bypass, first:n."
    ),
]


def model_options(command: C) -> C:
    """Add MODEL (a path, a name of `ggufloop list` or user/repo[:quant]), -m, -hf and --offline to a command."""
    for option in reversed(_MODEL):
        command = option(command)
    return command


def resolve_flags(model: str | None, model_path: str | None, hf: str | None, offline: bool) -> Path:
    """The model file the flags of `model_options` name, downloaded if need be; its content is not looked at.

    Raises UsageError unless exactly one of them names a model, GgufloopError if it cannot be had.
    """
    from ggufloop import registry  # what a download needs is not imported for --help
    from ggufloop.cli.progress import download_progress

    given = [text for text in (model, model_path, hf) if text is not None]
    if not given:
        raise UsageError(
            "no model is given.", "name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant]."
        )
    if len(given) > 1:
        raise UsageError(
            f"the model is given {len(given)} times: {', '.join(given)}.", "give MODEL, -m or -hf, not several."
        )
    with download_progress() as progress:
        return registry.resolve(given[0] if hf is None else None, hf, offline, progress)


def model_from_flags(model: str | None, model_path: str | None, hf: str | None, offline: bool) -> Path:
    """As `resolve_flags`, and the file is known to be a whole GGUF model. Raises UsageError, GgufloopError."""
    from ggufloop.modelfile import check_model_file

    path = resolve_flags(model, model_path, hf, offline)
    check_model_file(path)
    return path


def window_suggestion(path: Path) -> Callable[[], tuple[int, int]]:
    """What `--window auto` means for this model file, for `loop_from_flags`."""

    def suggest() -> tuple[int, int]:
        from ggufloop import registry

        return registry.suggest_window(path)[0]

    return suggest


def loop_options(command: C) -> C:
    """Add the loop flags to a command; their values go to `loop_from_flags`."""
    for option in reversed(_LOOP):
        command = option(command)
    return command


def loop_from_flags(window: str | None, suggest: Callable[[], tuple[int, int]], **flags: Any) -> LoopSpec | None:
    """The LoopSpec the loop flags say, None without --window.

    window: the flag's text; 'auto' calls `suggest()` for the model's window. flags: the other loop flags by name.
    Raises UsageError.
    """
    defaults = {"k": None, "mode": "block", "solver": "euler", "damping": None, "beta": 0.0, "mu": None,
                "passes": None, "kv": None, "decode": "full"}  # fmt: skip
    if window is None:
        given = [name for name in defaults if flags.get(name, defaults[name]) != defaults[name]]
        if given:
            flag = "--K" if given[0] == "k" else f"--{given[0]}"
            raise click.UsageError(f"{flag} needs --window A:B (or --window auto): without a window nothing loops.")
        return None
    if flags.get("k") is None:
        flags["k"] = 3
    return LoopSpec(suggest() if window == "auto" else window, **flags)  # type: ignore[arg-type]  # text is accepted
