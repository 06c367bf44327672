"""The figure of an answer: what was judged, with intervals, and below it what the loops did on the items that chose.

style.save(answer_figure(found), path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ggufloop.figures.style import BETTER, INK, WORSE, new_figure, short, style
from ggufloop.measure.verdict import ACCURACY, HELPS, HURTS
from ggufloop.study.answer import Finding
from ggufloop.study.answer_report import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {HELPS: BETTER, HURTS: WORSE}

_Line = tuple[str, float, float, float, str]  # label, gain, low, high, colour


def answer_figure(a: Finding) -> Figure:
    """A panel of the differences that were judged, and one of the loops that were tried, if several were."""
    scale, unit = (100, "points") if a.measure.unit == ACCURACY else (1, "nats per token")
    pairs = [(f"{a.loop} minus plain", a.verdict)]
    for o in a.others:
        name = short(o.name, 30)
        pairs += [(f"{a.loop} minus {name}", o.looped), (f"{name} minus plain", o.plain)]
    judged = [(label, v.gain.mean, v.gain.low, v.gain.high, _COLORS.get(v.word, INK)) for label, v in pairs]
    tried = [(c.name, c.gain.mean, c.gain.low, c.gain.high, INK if c.name == str(a.loop) else "#9aa1ac")
             for c in (a.chosen.loops if a.chosen is not None else ())]  # fmt: skip
    tried.sort(key=lambda line: -line[1])
    parts = [(f"judged on {len(a.judging)} {a.measure.item}s", judged)]
    parts += [(f"tried on {a.chosen.n} others; the chosen one is dark", tried)] if a.chosen is not None else []
    heights = [0.9 + 0.26 * len(lines) for _, lines in parts]
    with style():
        figure, axes = new_figure(len(parts), f"{short(a.name, 40)}, {short(a.measure.name, 30)}", width=8.0)
        figure.set_size_inches(8.0, sum(heights) + 0.5)
        grid = axes[0].get_gridspec()
        assert grid is not None
        grid.set_height_ratios(heights)
        for ax, (title, lines) in zip(axes, parts, strict=True):
            _draw(ax, title, lines, scale)
        for ax, level in zip(axes, (f"{percent(a)} intervals", "95 % for all loops together"), strict=False):
            ax.set_xlabel(f"gain in {unit}, {level}; above 0 the first is better")
    return figure


def _draw(ax: Axes, title: str, lines: list[_Line], scale: float) -> None:
    for i, (_, mean, low, high, color) in enumerate(lines):
        ax.plot([scale * low, scale * high], [-i, -i], color=color, linewidth=1.6)
        ax.plot([scale * mean], [-i], marker="o", color=color)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks([-i for i in range(len(lines))], [label for label, *_ in lines])
    ax.set_ylim(-len(lines) + 0.4, 0.6)
    ax.set_title(title)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
