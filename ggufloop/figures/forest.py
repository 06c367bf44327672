"""The forest plot of a protocol: what each loop gains on each measure, with its interval, and all of them together.

style.save(forest(rows, "Damped loops on 4-bit files"), path)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ggufloop.figures.style import BETTER, INK, WORSE, fit, short, style
from ggufloop.measure.verdict import ACCURACY, HELPS, HURTS, SAME, UNSURE
from ggufloop.study.protocol_report import ALL, INCOMPLETE, JudgedLoop, repeats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {HELPS: (BETTER, ">"), HURTS: (WORSE, "<"), SAME: (INK, "s"), UNSURE: (INK, "o"), INCOMPLETE: (INK, "d")}
"""Colour and form by verdict. What cannot be told, or has not been yet, is hollow."""
_HOLLOW = (UNSURE, INCOMPLETE)
_ROW = 0.27  # inches


def forest(rows: Sequence[JudgedLoop], title: str) -> Figure:
    """Primary loops on tasks, in points of accuracy; right of the line the loop is better. Pooled rows are thick and
    their names bold once they are complete; the numbers stand at the right. Of several models each has a heading. A
    measure of another window than its model's names it."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if r.role == "primary" and r.unit == ACCURACY and not r.unfit and not repeats(r, rows)]
    shown.sort(key=lambda r: (r.model == ALL, r.model, r.measure == ALL, r.measure, r.loop))
    models = {r.model for r in shown}
    title = f"{title}, {models.pop()}" if len(models) == 1 else title
    windows = {r.model: _window(r) for r in rows if r.measure == ALL}
    several = len(models) > 1
    lines: list[JudgedLoop | str] = []
    for i, r in enumerate(shown):
        if several and (not i or r.model != shown[i - 1].model):
            lines.append("all models" if r.model == ALL else short(r.model.removesuffix(".gguf"), 40))
        lines.append(r)
    with style():
        figure = Figure(figsize=(9.0, 1.3 + _ROW * max(len(lines), 4)), layout="constrained")
        figure.suptitle(fit(title, 9.0, 11), x=0.01, ha="left", fontsize=11, color=INK)
        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            if isinstance(line, str):
                if i:
                    axes.axhline(0.5 - i, color=INK, linewidth=0.5)
                continue
            r = line
            color, form = LOOKS[r.short]
            mean, low, high = (100 * x for x in (r.gain.mean, r.gain.low, r.gain.high))
            axes.plot([low, high], [-i, -i], color=color, linewidth=2.6 if _decides(r) else 1.2)
            fill = "white" if r.short in _HOLLOW else color
            axes.plot([mean], [-i], form, color=color, markerfacecolor=fill, markersize=6)
            axes.annotate(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]  n = {r.gain.n:,}", (1.01, -i),
                          xycoords=axes.get_yaxis_transform(), va="center", fontsize=8.5,
                          annotation_clip=False)  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks([-i for i in range(len(lines))],
                        [line if isinstance(line, str) else _label(line, windows) for line in lines])  # fmt: skip
        for text, line in zip(axes.get_yticklabels(), lines, strict=True):
            text.set_fontstyle("italic" if isinstance(line, str) else "normal")
            text.set_fontweight("bold" if isinstance(line, JudgedLoop) and _decides(line) else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(lines) + 0.4, 0.6)
        axes.set_xlabel("points gained over plain, 95 % intervals")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=form, markerfacecolor="white" if word in _HOLLOW else color,
               label=f"{word} what would matter" if word == SAME else word)
        for word, (color, form) in LOOKS.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower left", ncols=len(LOOKS))


def _decides(r: JudgedLoop) -> bool:
    return r.measure == ALL and not r.lacks


def _window(r: JudgedLoop) -> str:
    return r.settings.split(" ")[0]


def _label(r: JudgedLoop, windows: Mapping[str, str]) -> str:
    usual = windows.get(r.model)
    measure = "all tasks" if r.measure == ALL else r.measure
    at = f" at {_window(r)}" if _window(r) and (r.measure == ALL or _window(r) != usual) else ""
    return f"{measure}{at}, {r.loop}"
