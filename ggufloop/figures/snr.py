"""The figure of `snr`: how far quantised weights are from their originals over depth, and what they cost.

save(snr_figure(tensors, "SmolLM2 Q4_1", window=(12, 16)), path)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ggufloop.figures.style import INK, MARKERS, SHADE, new_figure, shades, style
from ggufloop.quant.snr import TensorSnr, by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def snr_figure(tensors: Sequence[TensorSnr], title: str, window: tuple[int, int] | None = None) -> Figure:
    """SNR and bits per weight over depth: a line for the layers, a point per matrix in the colour of its type."""
    from matplotlib.ticker import MaxNLocator

    layers = [share for share in by_layer(tensors) if share.layer is not None]
    points = [t for t in tensors if t.layer is not None and t.is_matrix]
    bits = {t.type: t.bits for t in points}
    kinds = sorted(bits, key=lambda kind: bits[kind])

    def draw(axes: Axes, of: Callable[[TensorSnr], float], line: list[float], name: str) -> None:
        if window is not None:
            axes.axvspan(window[0] - 0.5, window[1] - 0.5, color=SHADE, zorder=0)
        for kind, color, marker in zip(kinds, shades(len(kinds)), itertools.cycle(MARKERS), strict=False):
            known = [(t.layer or 0, of(t)) for t in points if t.type == kind and math.isfinite(of(t))]
            axes.plot([x for x, _ in known], [y for _, y in known], marker, color=color, label=kind)
        axes.plot([share.layer or 0 for share in layers], line, color=INK, drawstyle="steps-mid", label="layer")
        axes.set_ylabel(name)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))

    with style():
        figure, (upper, lower) = new_figure(2, title)
        heights = [share.snr_db if math.isfinite(share.snr_db) else math.nan for share in layers]
        draw(upper, lambda t: t.snr_db, heights, "SNR of the weights (dB)")
        draw(lower, lambda t: t.bits, [share.bits for share in layers], "bits per weight")
        how = "estimated from the file" if any(t.estimated for t in points) else "measured"
        upper.set_title(f"Signal to noise, {how}: each matrix, and each layer as one")
        lower.set_title("What they cost")
        figure.legend(*upper.get_legend_handles_labels(), loc="outside right upper")
    return figure
