"""The figure of a sweep: gain over start and width of the window for each K, and over window and K.

    plots.save(heat_map(outcome, loops, "SmolLM2"), path)

A cell is the mean gain on the items that the loop was scored on, which are fewer for loops that were dropped or settled
early; the largest of many is too good to be quoted. Loops scored on all items are framed. Needs the `lab` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.figures.style import INK, new_figure, style
from ggufloop.loop import LoopSpec
from ggufloop.measure.sweep import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_WRITTEN = 26  # columns up to which a cell's number can be read
_LEAST_SCALE = 1e-6


class _Panel:
    """Cells of one picture. rows, columns: their labels, ascending; loops by (row, column)."""

    def __init__(self, title: str, y: str, x: str, loops: dict[tuple[int, int], str]) -> None:
        self.title, self.y, self.x, self.loops = title, y, x, loops
        self.rows = sorted({row for row, _ in loops})
        self.columns = sorted({column for _, column in loops})


def heat_map(outcome: Outcome, loops: Sequence[LoopSpec], model: str) -> Figure:
    """One panel per K of each kind of loop (start x width), and one over window and K where K varies."""
    gains = {c.name: c.gain.mean for c in outcome.decision.loops}
    panels = _panels(loops)
    scale = max(float(np.quantile(np.abs(list(gains.values())), 0.75)), _LEAST_SCALE)
    whole = {c.name for c in outcome.decision.loops if c.whole}
    title = f"{model}: gain over plain in {outcome.measure.unit}, {outcome.measure.name} (blue is better)"
    with style():
        figure, axes = new_figure(len(panels), title, width=10.0)
        figure.set_size_inches(10.0, sum(1.15 + 0.32 * len(p.rows) for p in panels) + 0.5)
        grid = axes[0].get_gridspec()
        assert grid is not None
        grid.set_height_ratios([1.15 + 0.32 * len(p.rows) for p in panels])
        for ax, panel in zip(axes, panels, strict=True):
            image = _draw(ax, panel, gains, whole, outcome.decision.winner, scale)
        bar = figure.colorbar(image, ax=axes, extend="both", shrink=min(1.0, 3 / len(panels)), pad=0.01, aspect=30)
        bar.ax.tick_params(labelsize=8)
    return figure


def _panels(loops: Sequence[LoopSpec]) -> list[_Panel]:
    kinds: dict[str, list[LoopSpec]] = {}
    for loop in loops:  # a kind: all that is not window and K
        kinds.setdefault(_kind(loop), []).append(loop)
    panels = []
    for kind, members in kinds.items():
        ks = sorted({m.k for m in members})
        widths = {m.layers for m in members}
        if len(widths) > 1 or len(ks) == 1:
            for k in ks:
                cells = {(m.layers, m.window[0]): str(m) for m in members if m.k == k}
                panels.append(_Panel(f"K {k}{kind}", "width", "first layer of the window", cells))
        if len(ks) > 1:
            for width in sorted(widths):
                cells = {(m.k, m.window[0]): str(m) for m in members if m.layers == width}
                if len({start for _, start in cells}) > 1 or len(widths) == 1:
                    panels.append(_Panel(f"windows of {width}{kind}", "K", "first layer of the window", cells))
    return panels


def _kind(loop: LoopSpec) -> str:
    """Its settings besides window and K, as str(loop) writes them."""
    _, _, *others = str(replace(loop, window=(1, 2))).split()
    return "".join(f", {word}" for word in others)


def _draw(ax: Axes, panel: _Panel, gains: dict[str, float], whole: set[str], winner: str | None,
          scale: float) -> Any:  # fmt: skip
    from matplotlib.patches import Rectangle

    values: NDArray[np.float64] = np.full((len(panel.rows), len(panel.columns)), np.nan)
    for (row, column), name in panel.loops.items():
        i, j = panel.rows.index(row), panel.columns.index(column)
        values[i, j] = gain = gains[name]
        if name in whole:
            ax.add_patch(Rectangle((j - 0.47, i - 0.44), 0.94, 0.88, fill=False, edgecolor=INK, linewidth=1.6))
        if len(panel.columns) <= _MOST_WRITTEN:
            text = _short(gain) + ("\u2605" if name == winner else "")
            pale = abs(gain) < 0.6 * scale
            ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=INK if pale else "white")
    image = ax.imshow(values, cmap="RdBu", vmin=-scale, vmax=scale, origin="lower", aspect="auto")
    ax.grid(False)
    ax.set_title(panel.title)
    ax.set_xlabel(panel.x)
    ax.set_ylabel(panel.y)
    ax.set_xticks(range(len(panel.columns)), [str(c) for c in panel.columns])
    ax.set_yticks(range(len(panel.rows)), [str(r) for r in panel.rows])
    return image


def _short(gain: float) -> str:
    """Three digits after the point, without the zero before it: +.012, -1.3."""
    return f"{gain:+.3f}".replace("0.", ".", 1) if abs(gain) < 1 else f"{gain:+.1f}"
