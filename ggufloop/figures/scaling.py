"""Figures of scaling laws: loss over size and tokens as contours, and a ladder's line. Needs matplotlib (extra `lab`).

save(contours(results), path)                    # one panel per level
save(ladder_figure(ladder, line), path)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.figures.labels import place
from ggufloop.figures.style import INK, fit, new_figure, short, style
from ggufloop.scaling.analysis import Level
from ggufloop.scaling.laws import best_budget, best_size
from ggufloop.scaling.noise import Line
from ggufloop.scaling.noise_data import Ladder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Grid = NDArray[np.float64]
_GRID = 120
_LEVELS = 18


def contours(results: Sequence[Level], title: str) -> Figure:
    """A panel per level: fitted loss as colour, measured points in the same colours, and N* and D* where they exist.

    Colours are the same in all panels, in equal ratios of loss, which a few bits may multiply. A point
    that stands out from its surroundings is one the law misses.
    """
    from matplotlib.figure import Figure

    columns = 1 if len(results) == 1 else 2
    rows = math.ceil(len(results) / columns)
    with style():
        figure = Figure(figsize=(5.2 * columns + 0.4, 4.1 * rows + 0.4), layout="constrained")
        figure.suptitle(fit(title, 5.2 * columns, 11), x=0.01, ha="left", fontsize=11, color=INK)
        fields = [_field(result) for result in results]
        values = [x for r, (_, _, loss) in zip(results, fields, strict=True) for x in (loss.ravel(), r.points.loss)]
        levels = np.geomspace(min(x.min() for x in values), max(x.max() for x in values), _LEVELS)
        panels = [figure.add_subplot(rows, columns, i + 1) for i in range(len(results))]
        for axes, result, field in zip(panels, results, fields, strict=True):
            filled = _panel(axes, result, field, levels)
        figure.colorbar(filled, ax=panels, label="loss, nats per token, one scale for all", format="%.2f")
    return figure


def _field(result: Level) -> tuple[Grid, Grid, Grid]:
    """ln N, ln D and the fitted loss at each."""
    found, p = result.fit, result.points
    n, d = (np.linspace(x[0] - 0.1, x[-1] + 0.1, _GRID) for x in (p.sizes, p.budgets))
    at = np.meshgrid(n, d)
    loss = found.law.loss(found.theta, at[0].ravel(), at[1].ravel(), float(p.bits[0])).reshape(_GRID, _GRID)
    return n, d, loss


def _panel(axes: Axes, result: Level, field: tuple[Grid, Grid, Grid], levels: Grid) -> Any:
    """Returns what the colour bar is of."""
    from matplotlib.colors import LogNorm

    found, p = result.fit, result.points
    n, d, loss = field
    look: dict[str, Any] = {"cmap": "viridis", "norm": LogNorm(levels[0], levels[-1])}
    filled = axes.contourf(np.exp(n), np.exp(d), loss, levels=levels, **look)
    axes.contour(np.exp(n), np.exp(d), loss, levels=levels, colors="white", linewidths=0.5)
    axes.scatter(np.exp(p.n), np.exp(p.d), c=p.loss, s=26, edgecolors="white", linewidths=0.6, zorder=3, **look)
    _optima(axes, result)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.set_xlabel("N, billions of parameters")
    axes.set_ylabel("D, billions of tokens")
    axes.grid(visible=False)
    axes.set_title(
        fit(f"{p.level}: {result.main}, R2 {found.r2:.3f}, RMSE {found.rmse:.3f} nat, n = {found.n}", 4.4, 10)
    )
    return filled


def _optima(axes: Axes, result: Level) -> None:
    """D* of each size and N* of each budget, as lines, where the data's range has them."""
    fit, p = result.fit, result.points
    sizes, budgets = ((float(x[0]), float(x[-1])) for x in (p.sizes, p.budgets))
    bits = float(p.bits[0])
    over = np.linspace(*sizes, 60)
    turns = [(n, best_budget(fit.law, fit.theta, float(n), budgets, bits)) for n in over]
    found = np.array([(n, d) for n, d in turns if d is not None])
    if len(found):
        axes.plot(*np.exp(found.T), color="white", linewidth=3.2)
        axes.plot(*np.exp(found.T), color="#d1495b", label="D*: beyond it, more tokens are worse")
    turns = [(best_size(fit.law, fit.theta, float(d), sizes, bits), d) for d in np.linspace(*budgets, 60)]
    found = np.array([(n, d) for n, d in turns if n is not None])
    if len(found):
        axes.plot(*np.exp(found.T), color="white", linewidth=3.2)
        axes.plot(*np.exp(found.T), color="#edae49", label="N*: beyond it, a larger model is worse")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", frameon=True, framealpha=0.85)


def _plain_ticks(axis: Any) -> None:
    """1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def ladder_figure(ladder: Ladder, line: Line, title: str) -> Figure:
    """KL divergence over SNR, the line, its 95 % interval for one more file, and the files that were left out."""
    with style():
        figure, (axes,) = new_figure(1, title, height=3.5)
        over = np.linspace(line.snr[0] - 1, line.snr[1] + 1, 80)
        predicted = [line.predict(float(x)) for x in over]
        axes.plot(over, [e.mean for e in predicted], color=INK, label=f"R2 {line.r2:.3f}, n = {line.n}")
        axes.fill_between(over, [e.low for e in predicted], [e.high for e in predicted], color=INK, alpha=0.12,
                          linewidth=0, label="95 % interval of one more file")  # fmt: skip
        named: list[tuple[float, float, str]] = []
        for points, form, label in ((ladder.used, "o", None), (ladder.left_out, "x", "left out (below 3 bits)")):
            drawn = [r for r in points if r.kld is not None and r.kld > ladder.floor and math.isfinite(r.snr_db)]
            if not drawn:
                continue
            values = [(r.kld or 0.0) - ladder.floor for r in drawn]
            axes.plot([r.snr_db for r in drawn], values, form, color="#d1495b", label=label)
            named += [(r.snr_db, value, short(r.name, 28)) for r, value in zip(drawn, values, strict=True)]
        axes.set_yscale("log")
        axes.set_xlabel("SNR of the weights (dB)")
        axes.set_ylabel("KL divergence (nats)" + (", less the floor" if ladder.floor else ""))
        axes.legend(loc="best")
        place(axes, named)
    return figure
