"""The figure of KLD against bytes, a panel for each text, the Pareto front drawn through its files.

style.save(size_figure([study_on_wiki, study_on_code]), folder / "kld-size.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ggufloop.figures.labels import place
from ggufloop.figures.style import log_axis, new_figure, short, style
from ggufloop.study.file import Study
from ggufloop.study.pareto import points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRONT, BEATEN = "#1a6fb0", "#9aa2ad"


def size_figure(studies: Sequence[Study]) -> Figure | None:
    """None where no study has two files to compare."""
    drawn = [s for s in studies if len(points(s)) > 1]
    if not drawn:
        return None
    with style():
        h = drawn[0].header
        figure, panels = new_figure(len(drawn), f"{h.model}: KLD to {drawn[0].types[0]} against size", height=3.4)
        for axes, study in zip(panels, drawn, strict=True):
            _draw(axes, study)
        for axes, study in zip(panels, drawn, strict=True):
            place(axes, [(p.file.nbytes / 2**20, p.kld.mean, short(p.file.type, 28)) for p in points(study)])
    return figure


def _draw(axes: Axes, study: Study) -> None:
    found = points(study)
    front = [p for p in found if p.best]
    for group, colour, label in (([p for p in found if not p.best], BEATEN, "not on the front"),
                                 (front, FRONT, "on the front")):  # fmt: skip
        if group:
            down = [max(0.0, p.kld.mean - max(p.kld.low, p.kld.mean / 10)) for p in group]  # a log axis ends somewhere
            off = [down, [p.kld.high - p.kld.mean for p in group]]
            axes.errorbar([p.file.nbytes / 2**20 for p in group], [p.kld.mean for p in group], yerr=off, fmt="o",
                          color=colour, label=label, capsize=2.5, elinewidth=0.9, zorder=4)  # fmt: skip
    x = [p.file.nbytes / 2**20 for p in front]
    axes.plot(x, [p.kld.mean for p in front], color=FRONT, linewidth=1, drawstyle="steps-post", zorder=3)
    means = [p.kld.mean for p in found]
    if min(means) > 0 and max(means) > 5 * min(means):
        log_axis(axes)
    n = study.cell(found[0].file.type).n
    axes.set_title(f"{study.header.text}, {n} tokens (bars: 95 % interval over chunks)")
    axes.set_ylabel("KLD (nats per token)")
    axes.set_xlabel("file size (MiB)")
    axes.margins(x=0.14, y=0.16)
    axes.legend(loc="upper right")
