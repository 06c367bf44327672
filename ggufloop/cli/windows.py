"""The loops of a sweep, from --start, --width and --window: `sweep_loops(path, flags)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggufloop.cli import terminal
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_suggestion, loops_from_flags
from ggufloop.cli.options import number_ranges
from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec
from ggufloop.models.gguf import read_header
from ggufloop.models.info import layer_count
from ggufloop.opening import check_loops

WIDTH, MOST = "4", 15


def grid(start: str | None, width: str | None, n_layer: int, most: int = MOST) -> str:
    """The windows of all starts and widths that fit the model, as --window takes them. most: starts, about, if none
    are named."""
    widths = number_ranges(width or WIDTH, "--width")
    starts = number_ranges(start, "--start") if start else list(range(1, n_layer - 1, max(1, n_layer // most)))
    if 0 in widths or 0 in starts:
        flag = "--width" if 0 in widths else "--start"
        raise UsageError(f"{flag} 0 makes no window.", "a window has a layer at least, and layer 0 cannot be looped.")
    windows = [f"{a}:{a + w}" for w in widths for a in starts if a + w <= n_layer - 1]
    if not windows:
        raise UsageError(
            f"no window of --start {start or 'any'} and --width {width or WIDTH} fits a model of {n_layer} layers.",
            f"windows lie in 1:{n_layer - 1}.",
        )
    return ",".join(dict.fromkeys(windows))


def sweep_loops(path: Path, flags: dict[str, Any], most: int = MOST) -> list[LoopSpec]:
    """Every loop the flags mean that this model can run. What is left out is said in one line. most: as in `grid`."""
    start, width, window = flags.pop("start"), flags.pop("width"), flags.pop("window")
    header = read_header(path)
    n_layer = layer_count(header, header.text("general.architecture") or "unknown")
    if window is not None and (start or width):
        raise UsageError("windows are given twice, by --window and by --start or --width.", "leave out one.")
    refused: list[UsageError] = []
    of_recipe = flags["recipe"] is not None and not (start or width)
    asked = loops_from_flags(
        window or (None if of_recipe else grid(start, width, n_layer, most)),
        loop_suggestion(path),
        refused,
        **{name: flags.pop(name) for name in LOOP_FLAGS},
    )
    loops = []
    for loop in dict.fromkeys(asked):
        try:
            check_loops(path, [loop])
        except UsageError as e:
            refused.append(e)
        else:
            loops += [loop] if loop.is_loop else []
    if refused and (window is not None or not loops):
        raise refused[0]
    if refused:
        terminal.note(f"{len(refused)} of {len(asked) + len(refused)} combinations are no loop of this model, such as: "
                      f"{refused[0].message}")  # fmt: skip
    if not loops:
        raise UsageError("every loop asked for is one evaluation, the plain model.", "give --K 2 or more.")
    return loops
