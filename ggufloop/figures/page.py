"""What is put beside a study for people: its table, its figures, and one page with both. Needs the `lab` extra.

check(folder)                                    # before the run: whether figures can be written there
publish(study, folder, "ggufloop compare --study ...")
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ggufloop.figures import study as drawn
from ggufloop.figures import style
from ggufloop.figures.size import size_figure
from ggufloop.files import write_text
from ggufloop.flat import flat
from ggufloop.study import across, pareto, report
from ggufloop.study.file import Study


def check(folder: Path) -> None:
    """Raise GgufloopError if no figure could be written there."""
    style.check_target(folder / f"{drawn.SIZE}.png")


def publish_sizes(studies: Sequence[Study], folder: Path) -> None:
    """KLD against bytes of several texts: kld-size.md, .csv and .png; of one text its report has it already."""
    if len(studies) > 1:
        found = pareto.table(studies)
        write_text(folder / "kld-size.md", found.render("md") + "\n" + "\n".join(pareto.summary(studies)) + "\n")
        write_text(folder / "kld-size.csv", flat(pareto.numbers(studies)).render("csv"))
        figure = size_figure(studies)
        if figure is not None:
            style.save(figure, folder / f"{drawn.KLD}.png")


def publish(study: Study, folder: Path, again: str) -> Path:
    """Write table.md, table.csv, across.csv, the figures and report.html, which is returned. again: the command that
    repeats it."""
    write_text(folder / "table.md", report.shown(study).render("md"))
    write_text(folder / "table.csv", flat(report.numbers(study)).render("csv"))
    write_text(folder / "across.csv", flat(across.numbers([study])).render("csv"))
    pictures = {}
    for name, figure in drawn.figures(study).items():
        style.save(figure, folder / f"{name}.png")
        svg = io.StringIO()
        with style.style():
            figure.savefig(svg, format="svg")
        pictures[name] = svg.getvalue()
    page = folder / "report.html"
    write_text(page, report.html(study, pictures, again))
    return page
