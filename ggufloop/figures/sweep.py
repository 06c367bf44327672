"""The figure of a sweep: gain over start and width of the window, a panel for each K; of one width over start and K.

    style.save(heat_map(outcome, loops, "SmolLM2"), path)

A cell is the mean gain on the items that the loop was scored on, which are fewer for loops that were dropped or settled
early; the largest of many is too good to be quoted. Loops scored on all items are framed. The colours of all panels are
full at three times the gain that would matter, or at the error of the best loop if that is larger: noise looks like
noise. Needs the `lab` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.figures.style import INK, fit, style
from ggufloop.loop import LoopSpec
from ggufloop.measure.selection import HELPS
from ggufloop.measure.sweep import Outcome
from ggufloop.measure.verdict import ACCURACY, NATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST_WIDTH, _WIDTH, _MARGIN = 6.5, 9.0, 0.75  # inches of the figure, and beside the cells of a panel
_CELL, _LEAST_CELL, _LEAST_PANEL, _ROW = 0.5, 0.3, 1.5, 0.33
_NUMBER = 7.5
_FULL = 3  # times the gain that would matter
_STAR = "\u2605"
_SCALES = {ACCURACY: (100, "points of accuracy", 1), NATS: (1000, "thousandths of a nat per token", 0)}
"""A gain as cells and bar say it, in few digits: by what it is multiplied, what it is then, decimals."""


class _Panel:
    """Cells of one picture. rows, columns: their labels, ascending; loops by (row, column)."""

    def __init__(self, title: str, y: str, loops: dict[tuple[int, int], str]) -> None:
        self.title, self.y, self.loops = title, y, loops
        self.rows = sorted({row for row, _ in loops})
        self.columns = sorted({column for _, column in loops})

    def inches(self, cell: float) -> float:
        return max(len(self.columns) * cell, _LEAST_PANEL) + _MARGIN


def heat_map(outcome: Outcome, loops: Sequence[LoopSpec], model: str) -> Figure:
    """Panels side by side as long as their numbers can be read; the verdict is the title."""
    from matplotlib.figure import Figure

    lines = _lines(_panels(loops))
    cell = min(_CELL, *((_WIDTH - _MARGIN * len(line)) / sum(len(p.columns) for p in line) for line in lines))
    width = max(_LEAST_WIDTH, *(sum(p.inches(cell) for p in line) for line in lines))
    heights = [0.75 + _ROW * max(len(p.rows) for p in line) for line in lines]
    factor, unit, _ = _scale(outcome)
    with style():
        title = fit(f"{model}, {outcome.measure.name}: {_verdict(outcome)}", width, 11)
        figure = Figure(figsize=(width, sum(heights) + 1.25 + 0.2 * title.count("\n")), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        grid = figure.add_gridspec(len(lines) + 1, 1, height_ratios=[*heights, 0.5])
        axes: list[Axes] = []
        for at, line in enumerate(lines):
            widths = [p.inches(cell) for p in line]
            rest = width - sum(widths)
            ratios = [*widths, rest] if rest > _MARGIN else widths
            row = grid[at].subgridspec(1, len(ratios), width_ratios=ratios)
            for i, panel in enumerate(line):
                axes.append(figure.add_subplot(row[i]))
                _draw(axes[-1], panel, outcome, numbers=cell >= _LEAST_CELL - 0.05)
                axes[-1].set_title(fit(panel.title, widths[i] - 0.5, 10))
        bar = figure.colorbar(
            axes[0].images[0], orientation="horizontal", extend="both",
            cax=figure.add_subplot(grid[-1].subgridspec(1, 2, width_ratios=[5, 4])[0]),
        )  # fmt: skip
        bar.set_label(f"gain over plain, {unit} (above 0, blue: better)", loc="left", fontsize=8.5)
        bar.ax.tick_params(labelsize=8)
        for sign in (-1, 1):
            bar.ax.axvline(sign * factor * outcome.decision.worth, color=INK, linewidth=1, linestyle=":")
        figure.legend(handles=_legend(outcome), loc="outside lower left", ncols=3, fontsize=8.5, handlelength=1.2,
                      columnspacing=1.6)  # fmt: skip
    return figure


def _scale(outcome: Outcome) -> tuple[float, str, int]:
    unit = outcome.measure.unit
    return _SCALES.get(unit, (1, unit, 3))


def _verdict(outcome: Outcome) -> str:
    """The verdict and the loop it rests on: the best of those scored on all items."""
    decision, measure = outcome.decision, outcome.measure
    factor, unit, digits = _scale(outcome)
    best = next((c for c in decision.loops if c.name == decision.winner), decision.loops[0])
    head = f"{best.name} {HELPS}, " if decision.winner else f"{decision.verdict}; the best is {best.name}, "
    mean, low, high = (f"{factor * x:+.{digits + 1}f}" for x in (best.gain.mean, best.gain.low, best.gain.high))
    return f"{head}{mean} [{low}, {high}] {unit}, n = {best.gain.n:,} {measure.item}s"


def _legend(outcome: Outcome) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    m, worth = outcome.measure, _scale(outcome)[0] * outcome.decision.worth
    all_items = f"scored on all {m.n:,} {m.item}s"
    found: list[Any] = [
        Patch(facecolor="none", edgecolor=INK, linewidth=1.6, label=all_items),
        Line2D([], [], color=INK, linestyle=":", linewidth=1, label=f"the smallest gain that would matter, {worth:g}"),
    ]
    if outcome.decision.winner is not None:
        look: dict[str, Any] = {"color": INK, "linestyle": "none", "marker": "*", "markersize": 7}
        found.append(Line2D([], [], **look, label="helps, and gains most"))
    return found


def _panels(loops: Sequence[LoopSpec]) -> list[_Panel]:
    kinds: dict[str, list[LoopSpec]] = {}
    for loop in loops:  # a kind: all that is not window and K
        kinds.setdefault(_kind(loop), []).append(loop)
    panels = []
    for kind, members in kinds.items():
        ks, widths = sorted({m.k for m in members}), {m.layers for m in members}
        if len(widths) == 1 and len(ks) > 1:
            cells = {(m.k, m.window[0]): str(m) for m in members}
            panels.append(_Panel(f"windows of {min(widths)} layers{kind}", "K", cells))
            continue
        for k in ks:
            cells = {(m.layers, m.window[0]): str(m) for m in members if m.k == k}
            panels.append(_Panel(f"K = {k}{kind}", "layers", cells))
    return panels


def _lines(panels: Sequence[_Panel]) -> list[list[_Panel]]:
    """Panels in lines that are no wider than the figure with the least cells."""
    lines: list[list[_Panel]] = []
    for panel in panels:
        if lines and sum(p.inches(_LEAST_CELL) for p in [*lines[-1], panel]) <= _WIDTH:
            lines[-1].append(panel)
        else:
            lines.append([panel])
    return lines


def _kind(loop: LoopSpec) -> str:
    """Its settings besides window and K, as str(loop) writes them."""
    _, _, *others = str(replace(loop, window=(1, 2))).split()
    return "".join(f", {word}" for word in others)


def _draw(ax: Axes, panel: _Panel, outcome: Outcome, numbers: bool) -> None:
    """numbers: whether there is room for them in the cells."""
    from matplotlib.patches import Rectangle

    factor, _, digits = _scale(outcome)
    best = outcome.decision.loops[0].gain
    full = factor * max(_FULL * outcome.decision.worth, (best.high - best.low) / 2)
    found = {c.name: c for c in outcome.decision.loops}
    values: NDArray[np.float64] = np.full((len(panel.rows), len(panel.columns)), np.nan)
    for (row, column), name in panel.loops.items():
        i, j = panel.rows.index(row), panel.columns.index(column)
        values[i, j] = gain = factor * found[name].gain.mean
        for color, line in (("white", 3.2), (INK, 1.4)) if found[name].whole else ():  # to be seen on dark cells too
            ax.add_patch(Rectangle((j - 0.45, i - 0.42), 0.9, 0.84, fill=False, edgecolor=color, linewidth=line))
        places = digits if abs(gain) < 10 else 0
        number = f"{gain:+.{places}f}" if round(gain, places) else "0"
        parts = [_STAR] * (name == outcome.decision.winner) + [number] * numbers
        text = "\n".join(parts)
        ax.text(
            j,
            i,
            text,
            ha="center",
            va="center",
            fontsize=_NUMBER,
            linespacing=0.9,
            color=INK if abs(gain) < 0.6 * full else "white",
        )
    ax.imshow(values, cmap="RdBu", vmin=-full, vmax=full, origin="lower", aspect="auto")
    ax.grid(False)
    ax.set_xlabel("first layer")
    ax.set_ylabel(panel.y)
    ax.set_xticks(range(len(panel.columns)), [str(c) for c in panel.columns])
    ax.set_yticks(range(len(panel.rows)), [str(r) for r in panel.rows])
