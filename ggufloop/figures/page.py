"""What is put beside a study for people: its table, its figures, and one page with both. Needs the `lab` extra.

check(folder)                                    # before the run: whether figures can be written there
publish(study, folder, "ggufloop compare --study ...")
"""

from __future__ import annotations

import io
from pathlib import Path

from ggufloop.figures import study as drawn
from ggufloop.figures import style
from ggufloop.files import write_text
from ggufloop.study import report
from ggufloop.study.file import Study


def check(folder: Path) -> None:
    """Raise GgufloopError if no figure could be written there."""
    style.check_target(folder / f"{drawn.SIZE}.png")


def publish(study: Study, folder: Path, again: str) -> Path:
    """Write table.md, table.csv, the figures and report.html, which is returned. again: the command that repeats it."""
    write_text(folder / "table.md", report.shown(study).render("md"))
    write_text(folder / "table.csv", report.numbers(study).render("csv"))
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
