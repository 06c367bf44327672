"""Names beside points, none over another, over a point or outside the axes where there is room for that.

    place(axes, [(x, y, "Q4_K_M"), ...])                      # call it last: what moves the axes moves the points

Each takes the nearest of some places around its point that is free, the lowest points first; from far ones a thin line
leads back. What is measured are the boxes matplotlib will draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ggufloop.figures.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ANGLES = (45, 135, -45, -135, 10, 170, 90, -90)  # above a line that leads through the points first
_RADII = (9, 16, 24, 34, 46, 60, 76, 94)
_NEAR = 15  # points up to which no line is needed
_PAD = 1.5  # pixels that stay free around a name


def place(axes: Axes, points: Sequence[tuple[float, float, str]], size: float = 7.5) -> list[Any]:
    """Write the names, in points of `size`; returns the texts in the order given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()  # the layout, once
    renderer = FigureCanvasAgg(figure).get_renderer()
    room, scale = axes.get_window_extent(renderer), figure.dpi / 72
    marks = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in marks]
    out: dict[int, Any] = {}
    for i in sorted(range(len(points)), key=lambda i: tuple(marks[i])):
        x, y, name = points[i]
        text: Any = axes.annotate(name, (x, y), fontsize=size, color=INK, xytext=(0, 0), textcoords="offset points",
                                  ha="center", va="center", zorder=6,
                                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
                                  arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": INK})  # fmt: skip
        text.set_in_layout(False)
        box = Bbox.from_bounds(*text.get_window_extent(renderer).bounds)
        box = Bbox.from_bounds(marks[i][0] - box.width / 2, marks[i][1] - box.height / 2, box.width, box.height)
        best: tuple[float, float, float, Any] | None = None
        for radius in _RADII:
            for angle in _ANGLES:
                dx = _side(angle) * (radius * abs(math.cos(math.radians(angle))) + box.width / 2 / scale)
                dy = radius * math.sin(math.radians(angle))
                there = box.translated(dx * scale, dy * scale).padded(_PAD)
                lost = sum(_shared(there, other) for other in taken) + _outside(there, room)
                if best is None or lost < best[0]:
                    best = (lost, dx, dy, there)
            if best is not None and best[0] == 0:
                break
        assert best is not None
        text.set_position((best[1], best[2]))
        if math.hypot(max(0.0, abs(best[1]) - box.width / 2 / scale), best[2]) <= _NEAR:
            text.arrow_patch.set_visible(False)
        taken.append(best[3])
        out[i] = text
    return [out[i] for i in range(len(points))]


def _side(angle: int) -> int:
    """1 to the right of the point, -1 to the left, 0 above and below it."""
    return (abs(angle) < 90) - (abs(angle) > 90)


def _shared(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _outside(a: Any, room: Any) -> float:
    return float(a.width * a.height) - _shared(a, room)
