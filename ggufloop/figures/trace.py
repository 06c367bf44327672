"""The figure of a trace: the logit lens over depth, and what changes from pass to pass.

save(trace_figure(result, "SmolLM2, 12:16 k=3"), path)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ggufloop.figures.labels import place
from ggufloop.figures.style import INK, MARKERS, SHADE, new_figure, shades, style
from ggufloop.measure.trace import LAYER, LEAVE, Point, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMES = 8
_LINES = ("-", (0, (6, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (1.5, 1.2)))


def _look(j: int, n: int) -> dict[str, Any]:
    """Of pass j of n: told apart without its colour."""
    return {"color": shades(n)[j - 1], "marker": MARKERS[(j - 1) % len(MARKERS)]}


def trace_figure(trace: Trace, title: str, tau: float | None = None) -> Figure:
    """Entropy of the logit lens over depth, if it was read, and the change from pass to pass, if there is a loop.

    tau: drawn as the line below which a step halts the loop.
    """
    has_lens = trace.points[0].entropy is not None
    with style():
        figure, axes = new_figure(has_lens + (trace.loop is not None), title)
        if has_lens:
            _draw_lens(axes[0], trace)
        if trace.loop is not None:
            _draw_change(axes[-1], trace, tau)
    return figure


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks, or 1, 2 and 5 of each decade if it is long, are written as plain numbers."""
    from matplotlib.ticker import FuncFormatter

    low, high = min(values) / 1.4, max(values) * 1.4
    written = "125" if high / low > 5 else "123456789"

    def text(value: float, position: int) -> str:
        return f"{value:g}" if f"{value:e}"[0] in written else ""

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(text))
    axes.yaxis.set_minor_formatter(FuncFormatter(text))


def _named(first: int, last: int) -> set[int]:
    """Which of some passes the legend names: all, or a few evenly spread that include both ends."""
    n = last - first + 1
    if n <= _MOST_NAMES:
        return set(range(first, last + 1))
    return {first + round(i * (n - 1) / (_MOST_NAMES - 1)) for i in range(_MOST_NAMES)}


def _line(axes: Axes, points: Sequence[Point], band: bool = True, **look: Any) -> None:
    """Entropy over depth, with the interval as a band."""
    estimates = [p.entropy for p in points if p.entropy is not None]
    depth, means = [p.layer for p in points], [e.mean for e in estimates]
    axes.plot(depth, means, **look)
    if band:
        halves = [e.half or 0.0 for e in estimates]
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes.fill_between(depth, low, high, color=look["color"], alpha=0.13, linewidth=0)


def _draw_lens(axes: Axes, trace: Trace) -> None:
    loop, points = trace.loop, trace.points
    a, b = (len(points), len(points)) if loop is None else loop.window
    layers = [p for p in points if p.kind == LAYER]
    once: dict[str, Any] = {"color": INK, "marker": "o", "markersize": 2.8}
    _line(axes, [p for p in layers if p.layer < a], **once, label="no loop" if loop is None else "outside")
    if loop is not None:
        axes.axvspan(a - 0.5, b - 0.5, color=SHADE, zorder=0)
        n = loop.tableau().evaluations
        ends = []
        for j in range(1, n + 1):
            inside = [p for p in layers if p.evaluation == j and a <= p.layer < b]
            if loop.mode == "block":
                before = next(p for p in points if (p.layer, p.evaluation) == (a - 1, j))  # what enters the pass
                inside = [before, *inside]
            label = f"pass {j}" if j in _named(1, n) else None
            _line(axes, inside, n <= 3 or j in (1, n), linestyle=_LINES[(j - 1) % len(_LINES)], label=label,
                  **_look(j, n))  # fmt: skip
            ends += [(p, label) for p in inside if label and p.entropy is not None]
        leave = [p for p in points if p.kind == LEAVE][-1]
        _line(axes, [leave, *(p for p in layers if p.layer >= b)], **once)
        if leave.entropy is not None:
            axes.plot([b - 1], [leave.entropy.mean], "D", color=INK, markersize=5.5, label="result", zorder=5)
    axes.set_title(f"What each layer would predict (mean of {trace.tokens} tokens, band: 95 % interval)")
    axes.set_xlabel("layer")
    axes.set_ylabel("logit-lens entropy (nats)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    _whole_ticks(axes)
    axes.legend(loc="best", ncols=2)
    if loop is not None:
        _name(axes, [(p.layer, p.entropy.mean, label) for p, label in ends if p.entropy is not None])


def _name(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Each line's name beside it, at the layer where they are furthest apart."""
    layers: dict[float, list[float]] = {}
    for x, y, _ in points:
        layers.setdefault(x, []).append(math.log(y) if y > 0 and axes.get_yscale() == "log" else y)
    if layers:
        most = max(map(len, layers.values()))
        at = max((x for x in layers if len(layers[x]) == most), key=lambda x: max(layers[x]) - min(layers[x]))
        place(axes, [p for p in points if p[0] == at])


def _draw_change(axes: Axes, trace: Trace, tau: float | None) -> None:
    """What changed from pass to pass, a line per pass, the steps of the whole window left and right of them.

    Twice, because they differ by far where one token is long: the mean over tokens, and all tokens as one.
    """
    loop = trace.loop
    assert loop is not None
    (a, b), n = loop.window, loop.tableau().evaluations
    looks = [*(_look(j, n) for j in range(1, n + 1)), {"color": INK, "marker": "d"}]
    named: list[tuple[float, float, str]] = []
    drawn = [] if tau is None else [tau]

    def draw(points: Sequence[Point], where: Sequence[int], look: dict[str, Any], label: str | None) -> None:
        means = [p.residual.mean for p in points if p.residual is not None]
        whole = [p.whole_residual for p in points if p.whole_residual is not None]
        axes.plot(where, means, **look, label=label)
        axes.plot(where, whole, **look, linestyle=":", linewidth=1, markerfacecolor="white")
        named.extend((x, y, label) for x, y in zip(where, means, strict=True) if label)
        drawn.extend([*means, *whole])

    for j in range(2, n + 1):  # nothing comes before the first
        moved = [p for p in trace.points if p.kind == LAYER and p.evaluation == j and a <= p.layer < b]
        draw(moved, [p.layer for p in moved], looks[j - 1], f"pass {j}" if j in _named(2, n) else None)
    ticks, names = list(range(a, b)), [str(il) for il in range(a, b)]
    if loop.mode == "block":
        between = [p for p in trace.points if p.kind != LAYER]
        for j, p in enumerate(between, 1):  # in the colour of the pass it leads to
            draw([p], [b if p.kind == LEAVE else a - 1], looks[j], None)
        ticks, names = [a - 1, *ticks, b], ["input", *names, "result"]
    axes.plot([], [], "o-", color=INK, label="mean over tokens (--halt)")
    axes.plot([], [], "o:", color=INK, linewidth=1, markerfacecolor="white", label="all tokens as one")
    if tau is not None:
        axes.axhline(tau, color=INK, linewidth=1, linestyle="--", label=f"halt {tau:g}")
    positive = [value for value in drawn if value > 0]
    if positive:
        _log_scale(axes, positive)
    axes.set_title("Change to the pass before")
    axes.set_ylabel("relative residual")
    axes.set_xticks(ticks, names)
    axes.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
    axes.set_xlabel("layer of the window")
    axes.legend(loc="best", ncols=2)
    _name(axes, named)
