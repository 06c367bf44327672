"""The figure of sensitivities: KLD by one part at a lower type, part by part, the window shaded.

style.save(sensitivity_figure(study), folder / "sensitivity.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ggufloop.figures.style import INK, SHADE, log_axis, new_figure, style
from ggufloop.study.file import Study
from ggufloop.study.sensitivity import BASE, lower_type, parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sensitivity_figure(study: Study) -> Figure:
    """Points with their 95 % intervals over chunks, in the order of the model."""
    found, h = parts(study), study.header
    with style():
        title = f"{h.model}: one {'layer' if found[0].layer is not None else 'kind of tensor'} at {lower_type(study)}"
        figure, (axes,) = new_figure(1, f"{title}, all else {BASE}", height=3.6)
        x = [i if p.layer is None else p.layer for i, p in enumerate(found)]
        means = [p.more.mean for p in found]
        log = min(means) > 0 and max(means) > 8 * min(means)
        least = min(means) / 3 if log else float("-inf")
        off = [[p.more.mean - max(p.more.low, least) for p in found], [p.more.high - p.more.mean for p in found]]
        axes.errorbar(x, means, yerr=off, fmt="o", color=INK, capsize=2.5, elinewidth=0.9)
        if found[0].layer is not None:
            a, b = h.window
            axes.axvspan(a - 0.5, b - 0.5, color=SHADE, zorder=0, label=f"window {a}:{b}")
            axes.set_xlabel("layer")
            axes.legend(loc="upper right")
        else:
            axes.set_xticks(x, [p.name for p in found], rotation=40, ha="right", fontsize=8)
        if log:
            log_axis(axes)
        else:
            axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("KLD added (nats per token)")
        axes.set_title(f"{h.text}, {found[0].more.n} chunks of {h.n_ctx} tokens (bars: 95 % interval over chunks)")
    return figure
