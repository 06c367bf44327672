"""Options that mean the same in every command: the model and its context, and the loop.

Spelled as llama.cpp spells them where it has them. `--window auto` is resolved by the command, which knows the
model; everything else about a loop is checked here, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ggufloop.loop import KV_POLICIES, MODES, SOLVERS, LoopSpec

C = TypeVar("C", bound=Callable[..., Any])

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
