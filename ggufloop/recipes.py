"""Loops as they were published: what `--recipe NAME` sets, and the window it has in a model of so many layers.

    recipe_loop("paper", n_layer=30)                            # 13:17 k=3 beta=0.5 decode=bypass
    recipe_loop("authors", 36, "qwen3-4b-instruct-2507")        # 15:19 k=6 beta=0.5 decode=bypass

`RECIPES` is the whole of it: settings of LoopSpec by name, those of a mixture of experts apart. The window is the one
published for the model, which its file's name begins with, else the four layers in the middle, the paper's rule. What
was published of a model is no measurement of its quantisations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ggufloop.errors import UsageError, nearest
from ggufloop.loop import LoopSpec

PAPER = "arXiv 2605.23872"
WIDTH = 4
"""Layers of a window nobody published."""

WINDOWS = {
    ("qwen3-1.7b", 28): (12, 16), ("qwen3-4b", 36): (15, 19), ("qwen3-30b-a3b", 48): (22, 26),
    ("llama-3.2-3b", 28): (12, 16), ("moonlight-16b-a3b", 27): (8, 12), ("qwen1.5-moe-a2.7b", 24): (13, 17),
    ("deepseek-v2-lite", 27): (13, 17),
}  # fmt: skip
"""The paper's, and its script's, by how a model's name begins and its number of layers; half-open."""


@dataclass(frozen=True)
class Recipe:
    """settings: of LoopSpec besides the window; experts: those that differ in a mixture of experts; source: of them."""

    settings: Mapping[str, Any]
    source: str
    experts: Mapping[str, Any] = field(default_factory=dict)


RECIPES = {
    "paper": Recipe(
        {"k": 3, "beta": 0.5, "mode": "block", "solver": "euler", "kv": "first", "decode": "bypass"},
        f"{PAPER}, out of the box",
        experts={"mode": "layer", "routing": "free"},
    ),
    "authors": Recipe(
        {"k": 6, "beta": 0.5, "mode": "block", "solver": "euler", "kv": "first", "decode": "bypass"},
        f"the script of {PAPER}",
    ),
    # Of the cell that was replicated, the paper's MMLU-Pro: no anchor, and answers loop.
    "replication": Recipe(
        {"k": 3, "beta": 0.0, "mode": "block", "solver": "euler", "kv": "first", "decode": "full"},
        f"{PAPER} on MMLU-Pro, as it was replicated",
    ),
    # The rule is published; K, and layers where nobody names any, are this project's defaults.
    "inner-loop": Recipe(
        {"k": 3, "mode": "block", "solver": "average", "kv": "first", "decode": "full"},
        "arXiv 2602.14759; K and window are ours",
    ),
}  # fmt: skip


def recipe_settings(name: str, experts: bool = False) -> dict[str, Any]:
    """What a recipe sets besides the window, in a mixture of experts or not. Raises UsageError for an unknown one."""
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} is not known.", nearest(name, RECIPES))
    recipe = RECIPES[name]
    return {**recipe.settings, **(recipe.experts if experts else {})}


def recipe_window(name: str, n_layer: int, model: str = "") -> tuple[int, int]:
    """The window published for a model whose name is, or begins with, one of `WINDOWS`, else the middle one.

    Raises UsageError for a model too small to have four layers between its first and its last.
    """
    recipe_settings(name)
    found = [known for known in WINDOWS if model.lower().startswith(known[0]) and n_layer == known[1]]
    if found and name != "inner-loop":
        return WINDOWS[max(found, key=lambda known: len(known[0]))]
    if n_layer < WIDTH + 2:
        raise UsageError(
            f"recipe {name} loops {WIDTH} layers between the first and the last, and this model has {n_layer} layers.",
            "give --window A:B as well, or a larger model.",
        )
    a = (n_layer - WIDTH) // 2
    return a, a + WIDTH


def recipe_loop(
    name: str, n_layer: int, model: str = "", experts: bool = False, window: str | tuple[int, int] | None = None
) -> LoopSpec:
    """The whole loop, of a window of one's own if one is given. Raises UsageError as its parts do."""
    found: Any = recipe_window(name, n_layer, model) if window is None else window
    return LoopSpec(found, **recipe_settings(name, experts))
