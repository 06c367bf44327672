"""The figure of `longctx`: scores over length, a line per loop, with intervals.

save(length_figure(cells, "SmolLM2"), path)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ggufloop.figures.style import INK, MARKERS, new_figure, shades, style
from ggufloop.loop import PLAIN
from ggufloop.measure.longctx import LengthCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def length_figure(found: Sequence[LengthCell], title: str) -> Figure:
    """All tasks together, or the only one; points of a length stand side by side."""
    task = found[0].task
    shown = [cell for cell in found if cell.task == task]
    loops = [loop for loop in dict.fromkeys(cell.loop for cell in shown) if loop != PLAIN]
    lengths = sorted({cell.length for cell in shown})
    with style():
        figure, (axes,) = new_figure(1, title)
        for i, (loop, color) in enumerate(zip([PLAIN, *loops], [INK, *shades(len(loops))], strict=True)):
            line = sorted((c for c in shown if c.loop == loop), key=lambda c: c.length)
            places = [lengths.index(c.length) + 0.06 * (i - len(loops) / 2) for c in line]
            scores = [c.score.mean for c in line]
            spread = [[c.score.mean - c.score.low for c in line], [c.score.high - c.score.mean for c in line]]
            axes.errorbar(
                places, scores, yerr=spread, marker=MARKERS[i % len(MARKERS)], capsize=2, color=color, label=loop
            )
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("tokens of prompt and answer")
        axes.set_ylabel("score")
        axes.set_title(f"RULER, {'all tasks' if task == 'all' else task}; bars: 95 % intervals")
        figure.legend(loc="outside right upper")
    return figure
