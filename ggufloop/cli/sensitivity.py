"""What `ggufloop compare --sensitivity TYPE` does: one part of a model at a time at a lower type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from ggufloop.backend.settings import ContextSettings
from ggufloop.cli.progress import shown
from ggufloop.cli.types import show_table
from ggufloop.cli.width import tell
from ggufloop.figures import style
from ggufloop.files import write_text
from ggufloop.flat import flat
from ggufloop.measure.corpus import Text
from ggufloop.study import sensitivity_report as report
from ggufloop.study.run import StudyPlan, text_folder
from ggufloop.study.sensitivity import parts, run_sensitivity


def show_sensitivity(
    models: Iterable[tuple[Path, tuple[int, int]]], lower: str, by: str, plan: StudyPlan, texts: list[Text], out: Path,
    settings: ContextSettings, form: str, verbose: bool, keep: bool,
) -> None:  # fmt: skip
    """Measure each model on each text and print it; table, csv and figure go beside the study. Raises GgufloopError."""
    from ggufloop.figures.sensitivity import sensitivity_figure

    for path, window in models:
        top = out / path.stem / f"sensitivity-{lower.upper()}-{by}"
        for text in texts:
            folder = top if len(texts) == 1 else text_folder(top, text)

            def begun(folder: Path = folder) -> None:
                style.check_target(folder / "sensitivity.png")

            with shown() as progress:
                study = run_sensitivity(path, lower, by, window, replace(plan, text=text), folder, settings,
                                        verbose=verbose, begun=begun, progress=progress, keep=keep)  # fmt: skip
            said = "\n".join(report.summary(study))
            if parts(study):
                write_text(folder / "table.md", f"{report.table(study).render('md')}\n{said}\n")
                write_text(folder / "table.csv", flat(report.numbers(study)).render("csv"))
                style.save(sensitivity_figure(study), folder / "sensitivity.png")
            if form == "text":
                tell(f"{path.name}\n\n{report.table(study).render('md')}\n{said}\n")
                click.echo(f"figure: {folder / 'sensitivity.png'}\n" if parts(study) else "")
            else:
                show_table(form, partial(report.numbers, study))
