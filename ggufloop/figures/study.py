"""The figures of a study: what a size buys with and without loops, the noise loops make of noise, KLD over SNR.

    for name, figure in figures(study).items(): style.save(figure, folder / f"{name}.png")

Needs matplotlib (style.py). KLD over size is size.py's. Loops that differ in K alone make one panel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ggufloop.errors import UsageError
from ggufloop.figures.size import size_figure
from ggufloop.figures.style import GRID, INK, MARKERS, log_axis, new_figure, short, style
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.dependence import chunk_mean
from ggufloop.measure.stats import Estimate
from ggufloop.scaling import noise
from ggufloop.study import analysis
from ggufloop.study.file import Cell, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, KLD, AMPLIFICATION, NOISE = "ppl-size", "kld-size", "amplification-snr", "kld-snr"
PAD = 44  # points between axes and title, where the files are named


def families(study: Study) -> dict[str, list[tuple[int, str]]]:
    """Loops by what they are besides K, each a list of (K, name) in order of K."""
    found: dict[str, list[tuple[int, str]]] = {}
    for loop in study.loops:
        if loop != PLAIN:
            spec = LoopSpec.parse(loop)
            rest = [word for word in loop.split()[1:] if not word.startswith(("k=", "solver="))]
            kind = "damped" if spec.solver == "euler" and spec.damping is None else spec.solver
            found.setdefault(" ".join([kind, *rest]), []).append((spec.k, loop))
    return {name: sorted(loops) for name, loops in found.items()}


def figures(study: Study) -> dict[str, Figure]:
    """By name, of cells of two chunks at least; without loops there is no figure of amplification, without noisy files
    none over SNR."""
    found = {}
    whole = [t for t in study.types if (t, PLAIN) in study.cells and len(study.cell(t).chunks) > 1]
    with style():
        if len(whole) > 1 and whole[0] == study.types[0]:
            found[SIZE] = _size(study)
        sizes = size_figure([study])
        if sizes is not None:
            found[KLD] = sizes
        noisy = [t for t in whole[1:] if study.file(t).window_snr < analysis.MOST_SNR]
        if noisy:
            if families(study):
                found[AMPLIFICATION] = _amplification(study, noisy)
            found[NOISE] = _noise(study, noisy)
    return found


_PLAIN = {"color": INK, "marker": MARKERS[0]}


def _series(loops: Sequence[tuple[int, str]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Each loop as a label, its name and its look: colours in order, readable on white and on black."""
    from matplotlib import colormaps

    colours = [colormaps["plasma"](0.83 - 0.48 * i / max(len(loops) - 1, 1)) for i in range(len(loops))]
    return [
        (f"K={k}", loop, {"color": colour, "marker": marker})
        for (k, loop), colour, marker in zip(loops, colours, itertools.cycle(MARKERS[1:]), strict=False)
    ]


def _bars(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], **look: Any) -> None:
    """Points in order of x, with their intervals."""
    points = sorted(zip(x, estimates, strict=True), key=lambda p: p[0])
    means = [e.mean for _, e in points]
    off = [
        [max(0.0, d) for d in side]
        for side in zip(*((e.mean - e.low, e.high - e.mean) for _, e in points), strict=True)
    ]
    axes.errorbar([p for p, _ in points], means, yerr=off, capsize=2, elinewidth=0.9, **look)


def _beside(i: int, n: int, step: float) -> float:
    """How far the i-th of n series stands beside its place, so that none hides another."""
    return step * (i - (n - 1) / 2)


def _named(axes: Axes, places: Mapping[str, float]) -> None:
    """Names of files above the axes, with a line to their places where they would touch; call it last."""
    low, high = axes.get_xlim()
    at = -1.0
    for name, x in sorted(places.items(), key=lambda item: item[1]):
        axes.axvline(x, color=GRID, linewidth=0.6, zorder=0)
        at = max((x - low) / (high - low), at + 0.032)
        axes.annotate(
            short(name), (x, 1), (at, 1.04), axes.get_xaxis_transform(), "axes fraction",
            {"arrowstyle": "-", "linewidth": 0.6, "color": GRID, "shrinkA": 0, "shrinkB": 0},
            rotation=40, fontsize=7.5, rotation_mode="anchor",
        )  # fmt: skip
    axes.set_xlim(low, high)


def _title(study: Study) -> str:
    h = study.header
    n = study.cell(study.types[0]).n if (study.types[0], PLAIN) in study.cells else 0
    return f"{h.model}, window {h.window[0]}:{h.window[1]}, {n} tokens of {h.text}"


def _panels(study: Study) -> dict[str, list[tuple[int, str]]]:
    return families(study) or {"": []}


def _size(study: Study) -> Figure:
    """Perplexity over size, the reference as a line, for its size is another order; and what looping gains in each."""
    panels, looped = _panels(study), bool(families(study))
    figure, all_axes = new_figure(len(panels) * (1 + looped), _title(study))
    keys = [key for key, cell in study.cells.items() if len(cell.chunks) > 1]
    cells = {(c.type, c.loop): c for c in (study.paired(*keys) if keys else ())}  # all on the same chunks
    reference, *others = [t for t in study.types if (t, PLAIN) in cells]
    size = {t: study.file(t).nbytes / 2**20 for t in others}
    step = 0.007 * (max(size.values()) - min(size.values()) or max(size.values()))
    for i, (kind, loops) in enumerate(panels.items()):
        axes = all_axes[i * (1 + looped)]
        drawn = []
        for at, (label, loop, look) in enumerate(series := [("plain", PLAIN, _PLAIN), *_series(loops)]):
            mine = [t for t in others if (t, loop) in cells]
            ppl = [_ppl(cells[t, loop], cells[reference, PLAIN]) for t in mine]
            if mine:
                x = [size[t] + _beside(at, len(series), step) for t in mine]
                line = {"linewidth": 0.8} if loop == PLAIN else {"linestyle": "none"}
                _bars(axes, x, ppl, **look, **line, label=label)
                drawn += [e.mean for e in ppl]
            if (reference, loop) in cells:
                axes.axhline(cells[reference, loop].ppl[0], color=look["color"], linewidth=0.9, linestyle=":")
        if drawn and max(drawn) > 3 * min(drawn):
            log_axis(axes)
        axes.set_title(f"Perplexity{kind and f', {kind}'}. Dotted: {reference}; bars: 95 % of the difference to it, "
                       "paired by chunk", pad=PAD)  # fmt: skip
        axes.set_ylabel("perplexity")
        axes.set_xlabel("file size (MiB)")
        axes.margins(x=0.06, y=0.12)
        _named(axes, size)
        axes.legend(loc="best", ncols=2)
        if looped:
            _gains(all_axes[2 * i + 1], study, kind, loops)
    return figure


def _ppl(cell: Cell, reference: Cell) -> Estimate:
    """Perplexity, its interval that of the difference to the reference: what texts have in common is in neither."""
    ppl, more = cell.ppl[0], chunk_mean(cell.values("nll") - reference.values("nll"))
    low, high = (ppl * math.exp(end - more.mean) for end in (more.low, more.high))
    return Estimate(ppl, low, high, more.n, more.level)


def _gains(axes: Axes, study: Study, kind: str, loops: Sequence[tuple[int, str]]) -> None:
    """What each loop gains in each file, side by side."""
    types = sorted((t for t in study.types if (t, PLAIN) in study.cells), key=lambda t: -study.file(t).nbytes)
    axes.axhline(0, color=INK, linewidth=0.8)
    for at, (label, loop, look) in enumerate(series := _series(loops)):
        found = {i: analysis.verdicts(study, t).get(loop) for i, t in enumerate(types)}
        shown = {i + _beside(at, len(series), 0.6 / len(series)): v.gain for i, v in found.items() if v is not None}
        if shown:
            _bars(axes, list(shown), list(shown.values()), **look, linestyle="none", label=label)
    axes.set_xticks(range(len(types)), [short(t) for t in types], fontsize=8)
    axes.set_xlim(-0.6, len(types) - 0.4)
    axes.set_ylabel("gain (nats per token)")
    axes.set_title(f"What looping gains, {kind} (above 0: better; bars hold for all loops of a file together)")


def _amplification(study: Study, noisy: Sequence[str]) -> Figure:
    """A_K over the SNR of the window; 1: the loop leaves the noise as it is."""
    panels = families(study)
    figure, all_axes = new_figure(len(panels), _title(study))
    for axes, (kind, loops) in zip(all_axes, panels.items(), strict=True):
        axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="as without a loop")
        top, drawn = 1.0, set()
        for i, (label, loop, look) in enumerate(_series(loops)):
            x, found, shift = [], [], _beside(i, len(loops), 0.16)
            for t in noisy:
                ratio = _ratio(study, t, loop)
                if ratio is not None:
                    x.append(study.file(t).window_snr + shift)
                    found.append(ratio)
                    top = max(top, ratio.high)
                    drawn.add(t)
            if found:
                _bars(axes, x, found, **look, linewidth=0.8, label=label)
        if top > 6:
            log_axis(axes)
        axes.set_title(f"Noise amplification A_K, {kind} (bars: 95 % interval over chunks)", pad=PAD)
        axes.set_ylabel("A_K")
        axes.set_xlabel("SNR of the window's weights (dB)")
        axes.margins(x=0.06, y=0.2)
        _named(axes, {t: study.file(t).window_snr for t in drawn})
        axes.legend(loc="best", ncols=2)
    return figure


def _ratio(study: Study, type_: str, loop: str) -> Estimate | None:
    try:
        return analysis.amplification(study, type_, loop)
    except UsageError:  # not measured, or on one chunk
        return None


def _noise(study: Study, noisy: Sequence[str]) -> Figure:
    """KLD over the SNR of all weights, with the line through the plain ones."""
    figure, (axes,) = new_figure(1, _title(study), height=3.6)
    usable = [t for t in noisy if (t, PLAIN) in study.cells and len(study.cell(t).chunks) > 1]
    snr = [study.file(t).snr for t in usable]
    found = [analysis.kld(study, t) for t in usable]
    _bars(axes, snr, found, **_PLAIN, linestyle="none", label="plain", zorder=4)
    said = "no line through so few files"
    try:
        line = noise.fit_kld(*analysis.noise(study))
    except UsageError:
        pass
    else:
        ends = [line.snr[0], line.snr[1]]
        axes.plot(
            ends,
            [line.at(x) + analysis.floor(study) for x in ends],
            color=INK,
            linewidth=1,
            linestyle="--",
            label="fit, plain",
        )
        said = f"ln KLD = {line.u.mean:.2f} + {line.eta.mean:.2f} ln r, R2 {line.r2:.3f}, n = {line.n} files"
    for t in study.types[1:]:
        if study.file(t).snr >= analysis.MOST_SNR and (t, PLAIN) in study.cells and len(study.cell(t).chunks) > 1:
            label = f"{short(t)}: the reference's weights"
            axes.axhline(study.cell(t).mean("kl"), color=INK, linewidth=0.9, linestyle=":", label=label)
    fills = itertools.cycle(("full", "none", "left", "top"))
    looped = [(kind, fill, *one) for (kind, loops), fill in zip(families(study).items(), fills, strict=False)
              for one in _series(loops)]  # fmt: skip
    for i, (kind, fill, label, loop, look) in enumerate(looped):
        mine = [t for t in usable if (t, loop) in study.cells and len(study.cell(t, loop).chunks) > 1]
        if mine:
            x = [study.file(t).snr + 0.15 * (i + 1) for t in mine]  # right of plain
            _bars(axes, x, [analysis.kld(study, t, loop) for t in mine], **look, linestyle="none", fillstyle=fill,
                  label=f"{kind}, {label}")  # fmt: skip
    log_axis(axes)
    axes.set_title(f"KLD to the reference under the same loop ({said})", pad=PAD)
    axes.set_ylabel("KLD (nats per token)")
    axes.set_xlabel("SNR of all weights (dB)")
    axes.margins(x=0.06, y=0.15)
    _named(axes, dict(zip(usable, snr, strict=True)))
    axes.legend(loc="best", ncols=2, fontsize=8)
    return figure
