"""The figures of a study: what a size buys with and without loops, the noise loops make of noise, KLD over SNR.

    for name, figure in figures(study, dark=False).items(): plots.save(figure, folder / f"{name}.png")

Needs matplotlib (style.py). KLD over size is size.py's. Loops that differ in K alone make one panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ggufloop.errors import UsageError
from ggufloop.figures.size import size_figure
from ggufloop.figures.style import GRID, INK, log_axis, new_figure, short, style
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.stats import Estimate
from ggufloop.scaling import noise
from ggufloop.study import analysis
from ggufloop.study.file import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, KLD, AMPLIFICATION, NOISE = "ppl-size", "kld-size", "amplification-snr", "kld-snr"
PAD = 34  # points between axes and title, where the files are named


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


def _colours(n: int) -> list[Any]:
    """n colours in order, readable on white and on black."""
    from matplotlib import colormaps

    return [colormaps["plasma"](0.83 - 0.48 * i / max(n - 1, 1)) for i in range(n)]


def _bars(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], **look: Any) -> None:
    """Points in order of x, with their intervals."""
    points = sorted(zip(x, estimates, strict=True), key=lambda p: p[0])
    means = [e.mean for _, e in points]
    off = [
        [max(0.0, d) for d in side]
        for side in zip(*((e.mean - e.low, e.high - e.mean) for _, e in points), strict=True)
    ]
    axes.errorbar([p for p, _ in points], means, yerr=off, capsize=2.5, elinewidth=0.9, **look)


def _named(axes: Axes, places: Mapping[str, float]) -> None:
    """Names of files above the axes, at their places or a little to the right where they would touch; call it last."""
    low, high = axes.get_xlim()
    at = -1.0
    for name, x in sorted(places.items(), key=lambda item: item[1]):
        axes.axvline(x, color=GRID, linewidth=0.6, zorder=0)
        at = max((x - low) / (high - low), at + 0.03)
        axes.annotate(
            short(name), (at, 1.015), xycoords="axes fraction", rotation=40, fontsize=7.5, rotation_mode="anchor"
        )
    axes.set_xlim(low, high)


def _title(study: Study) -> str:
    h = study.header
    n = study.cell(study.types[0]).n if (study.types[0], PLAIN) in study.cells else 0
    return f"{h.model}, window {h.window[0]}:{h.window[1]}, {n} tokens of {h.text}"


def _panels(study: Study) -> dict[str, list[tuple[int, str]]]:
    return families(study) or {"": []}


def _size(study: Study) -> Figure:
    """Perplexity over size; the reference is a line, for its size is another order."""
    panels = _panels(study)
    figure, all_axes = new_figure(len(panels), _title(study))
    keys = [key for key, cell in study.cells.items() if len(cell.chunks) > 1]
    ppl = {(c.type, c.loop): c.ppl[0] for c in (study.paired(*keys) if keys else ())}  # all on the same chunks
    reference, *others = [t for t in study.types if (t, PLAIN) in ppl]
    size = {t: study.file(t).nbytes / 2**20 for t in others}
    for axes, (kind, loops) in zip(all_axes, panels.items(), strict=True):
        colours = _colours(len(loops))
        series = [("plain", PLAIN, INK)] + [(f"K={k}", loop, c) for (k, loop), c in zip(loops, colours, strict=True)]
        drawn = []
        for label, loop, colour in series:
            points = sorted((size[t], ppl[t, loop]) for t in others if (t, loop) in ppl)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
                drawn += [y for _, y in points]
            if (reference, loop) in ppl:
                axes.axhline(ppl[reference, loop], color=colour, linewidth=0.9, linestyle=":")
        if drawn and max(drawn) > 3 * min(drawn):
            log_axis(axes)
        axes.set_title(f"Perplexity, {kind or 'no loops'} (dotted: {reference})", pad=PAD)
        axes.set_ylabel("perplexity")
        axes.set_xlabel("file size (MiB)")
        axes.margins(x=0.06, y=0.18)
        _named(axes, size)
        axes.legend(loc="best", ncols=2)
    return figure


def _amplification(study: Study, noisy: Sequence[str]) -> Figure:
    """A_K over the SNR of the window; 1: the loop leaves the noise as it is."""
    panels = families(study)
    figure, all_axes = new_figure(len(panels), _title(study))
    for axes, (kind, loops) in zip(all_axes, panels.items(), strict=True):
        axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="as without a loop")
        top = 1.0
        for i, ((k, loop), colour) in enumerate(zip(loops, _colours(len(loops)), strict=True)):
            x, found, shift = [], [], 0.12 * (i - (len(loops) - 1) / 2)  # so that bars do not hide each other
            for t in noisy:
                ratio = _ratio(study, t, loop)
                if ratio is not None:
                    x.append(study.file(t).window_snr + shift)
                    found.append(ratio)
                    top = max(top, ratio.high)
            if found:
                _bars(axes, x, found, color=colour, marker="o", label=f"K={k}")
        if top > 6:
            log_axis(axes)
        axes.set_title(f"Noise amplification A_K, {kind} (bars: 95 % interval over chunks)", pad=PAD)
        axes.set_ylabel("A_K")
        axes.set_xlabel("SNR of the window's weights (dB)")
        axes.margins(x=0.06, y=0.2)
        _named(axes, {t: study.file(t).window_snr for t in noisy})
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
    _bars(axes, snr, found, color=INK, marker="o", linestyle="none", label="plain", zorder=4)
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
    markers = iter("sD^v<>" * 4)
    for kind, loops in families(study).items():
        marker = next(markers)
        for (k, loop), colour in zip(loops, _colours(len(loops)), strict=True):
            points = [(study.file(t).snr, study.cell(t, loop).mean("kl")) for t in usable if (t, loop) in study.cells]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3.5, label=f"{kind}, K={k}")
    log_axis(axes)
    axes.set_title(f"KLD to the reference under the same loop ({said})", pad=PAD)
    axes.set_ylabel("KLD (nats per token)")
    axes.set_xlabel("SNR of all weights (dB)")
    axes.margins(x=0.06, y=0.15)
    _named(axes, dict(zip(usable, snr, strict=True)))
    axes.legend(loc="best", ncols=2, fontsize=8)
    return figure
