"""The forest plot of a protocol: what each loop gains on each measure, with its interval, and all of them together.

style.save(forest(rows, "Damped loops on 4-bit files"), path)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ggufloop.figures.style import INK, short, style
from ggufloop.measure.verdict import ACCURACY
from ggufloop.study.protocol_report import ALL, JudgedLoop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"helps": "#1a7f4b", "hurts": "#b3261e"}


def forest(rows: Sequence[JudgedLoop], title: str) -> Figure:
    """Primary loops on tasks, in points of accuracy; right of the line the loop is better. Pooled rows are diamonds."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if r.role == "primary" and r.unit == ACCURACY and not r.at_chance]
    shown.sort(key=lambda r: (r.model == ALL, r.model, r.measure == ALL, r.measure, r.loop))
    with style():
        figure = Figure(figsize=(8.0, 1.2 + 0.24 * max(len(shown), 4)), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        axes = figure.add_subplot()
        for i, r in enumerate(shown):
            color = COLORS.get(r.verdict.word, INK)
            mean, low, high = (100 * x for x in (r.gain.mean, r.gain.low, r.gain.high))
            axes.plot([low, high], [-i, -i], color=color, linewidth=2.2 if r.measure == ALL else 1.2)
            axes.plot([mean], [-i], marker="D" if r.measure == ALL else "o", color=color)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks([-i for i in range(len(shown))], [_label(r) for r in shown])
        axes.set_ylim(-len(shown) + 0.4, 0.6)
        axes.set_xlabel("points gained over plain, 95 % intervals")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    return figure


def _label(r: JudgedLoop) -> str:
    model = "all models" if r.model == ALL else short(r.model.removesuffix(".gguf"), 26)
    return f"{model}  {'all tasks' if r.measure == ALL else r.measure}  {r.loop}  n={r.gain.n:,}"
