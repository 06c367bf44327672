"""One look for all figures, and how they are written. Needs matplotlib, which the `lab` extra brings.

    check_target(path)                               # before the run that the plot is of
    save(trace_figure(result, "SmolLM2, 12:16 k=3"), path)

Figures are made as objects, without pyplot, so that nothing global is touched and no display is needed. matplotlib is
imported inside the functions: it takes a while, and is not there in a base installation.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.files import atomic_file, check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf", "eps", "jpg", "jpeg", "tif", "tiff", "webp")
"""What matplotlib writes by itself; its other formats need LaTeX or are none to look at."""

INK, SHADE, GRID = "#30343b", "#eef1f6", "#d9dce2"
BETTER, WORSE = "#1a6fb0", "#c2410c"  # told apart by blind eyes too
MARKERS = "os^DvPX*<>"
"""Of series, so that no colour is needed to tell them apart."""
_STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings while a figure is made."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(panels: int, title: str, width: float = 8.0, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, one below the other. width and height of a panel in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * panels + 0.3), layout="constrained")
    figure.suptitle(fit(title, width, 11), x=0.01, ha="left", fontsize=11, color=INK)
    return figure, [figure.add_subplot(panels, 1, i + 1) for i in range(panels)]


def fit(text: str, inches: float, size: float) -> str:
    """A title cut into lines of so many inches, in letters of `size` points."""
    tied = text.replace(" = ", "\u00a0=\u00a0")  # a number stays with its name
    lines = textwrap.wrap(tied, max(8, int(72 * inches / (0.53 * size))), break_on_hyphens=False)
    return "\n".join(lines).replace("\u00a0", " ")


def log_axis(axes: Axes) -> None:
    """A logarithmic axis whose ticks, in a short one 2 and 5 as well, are written as plain numbers."""
    from matplotlib.ticker import FuncFormatter

    def text(value: float, position: int) -> str:
        low, high = axes.get_ylim()
        return f"{value:g}" if f"{value:e}"[0] in ("125" if high / low < 300 else "1") else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(text))
    axes.yaxis.set_minor_formatter(FuncFormatter(text))


def short(name: str, most: int = 12) -> str:
    """A name cut to `most` characters, its end kept: that is where files say their type."""
    name = name.removesuffix(".gguf")
    return name if len(name) <= most else f"{name[: most // 3]}...{name[-(most - most // 3 - 3) :]}"


def shades(n: int) -> list[Any]:
    """n colours for an ordered series, early ones light and late ones dark, all readable on white."""
    from matplotlib import colormaps

    return [colormaps["plasma"](0.82 - 0.72 * i / max(n - 1, 1)) for i in range(n)]


def check_target(path: Path) -> None:
    """Raise GgufloopError if a plot could not be written to `path`; nothing is left there."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise GgufloopError("plots need matplotlib, which is not installed.", "run: pip install 'ggufloop[lab]'")
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        what = f"ends in {path.suffix!r}, which is no format" if suffix else "has no suffix that says the format"
        raise UsageError(f"plot {path} {what} matplotlib can write.", nearest(suffix, FORMATS))
    check_writable(path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format its suffix says. Raises GgufloopError."""
    with atomic_file(path) as partial, style():
        figure.savefig(partial, format=path.suffix.lower().removeprefix("."), dpi=160)
