"""The tables of docs/results-quantisation.md from studies that `ggufloop compare` or a protocol's ladder wrote.

    python3 scripts/bootstrap.py python scripts/results_quantisation.py        # of docs/data/ladder, which a test
                                                                               # looks for in the page
    python3 scripts/bootstrap.py python scripts/results_quantisation.py --figures docs studies/*/study.jsonl

A file that has the same weights as an earlier one is left out: it would count as a second measurement of nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click

from ggufloop.errors import GgufloopError
from ggufloop.figures import study as study_plots
from ggufloop.figures import style
from ggufloop.loop import PLAIN
from ggufloop.measure.stats import Estimate
from ggufloop.measure.verdict import HELPS, HURTS
from ggufloop.study import across, analysis, file, report
from ggufloop.study.file import Study
from ggufloop.table import Cell, Column, Table

LADDERS = Path(__file__).resolve().parent.parent / "docs" / "data" / "ladder"


def interval(e: Estimate | None, form: str) -> str:
    return "" if e is None else f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"


def distinct(s: Study) -> list[str]:
    """The types that were measured plain, each weights once."""
    measured = {row.file.type for row in analysis.rows(s) if row.loop == PLAIN}
    return [t for t in s.types if t in measured and s.same_weights(t) is None]


def ladder(s: Study) -> Table:
    """The plain files."""
    rows: list[list[Cell]] = []
    for t in distinct(s):
        f, cell = s.file(t), s.cell(t)
        row: list[Cell] = [t, f"{f.nbytes / 2**20:.0f}", f"{f.bits_per_weight:.2f}"]
        row += ["" if math.isinf(snr) else f"{snr:.1f}" for snr in (f.window_snr, f.snr)]
        row.append("{:.3f} +/- {:.2f}".format(*cell.ppl))
        if t == s.types[0]:
            row += ["", "", ""]
        else:
            row += [interval(-analysis.lost(s, t), "+.4f"), interval(analysis.kld(s, t), ".4f"),
                    f"{100 * cell.mean('same_top'):.1f}"]  # fmt: skip
        rows.append(row)
    names = ("type", "MiB", "bits", "SNR of window, dB", "of all, dB", "PPL", f"gain over {s.types[0]}", "KLD",
             "same top %")  # fmt: skip
    return Table(tuple(map(Column, names)), rows)


def loops_of(s: Study) -> list[str]:
    measured = {row.loop for row in analysis.rows(s)}
    return [loop for loop in s.loops if loop != PLAIN and loop in measured]


def amplification(s: Study) -> Table:
    rows: list[list[Cell]] = [[t, *(interval(analysis.amplification(s, t, loop), ".2f") for loop in loops_of(s))]
                              for t in distinct(s)[1:]]  # fmt: skip
    return Table((Column("A_K"), *(Column(f"`{loop}`") for loop in loops_of(s))), rows)


def gains(s: Study) -> Table:
    """In bold what Holm's correction leaves."""
    rows: list[list[Cell]] = []
    for t in distinct(s):
        said, cells = analysis.verdicts(s, t), []
        for loop in loops_of(s):
            text = interval(said[loop].gain, "+.4f")
            cells.append(f"**{text}**" if said[loop].word in (HELPS, HURTS) else text)
        rows.append([t, *cells])
    return Table((Column("gain by looping"), *(Column(f"`{loop}`") for loop in loops_of(s))), rows)


def interactions(s: Study) -> Table:
    """Uncorrected; in bold where the interval leaves out 0."""
    rows: list[list[Cell]] = []
    for t in distinct(s)[1:]:
        found = [analysis.interaction(s, t, loop) for loop in loops_of(s)]
        rows.append([t, *(f"**{interval(e, '+.4f')}**" if e.low * e.high > 0 else interval(e, "+.4f") for e in found)])
    return Table((Column(f"gain beyond {s.types[0]}'s"), *(Column(f"`{loop}`") for loop in loops_of(s))), rows)


def tables(s: Study) -> list[Table]:
    """What the page shows of a study."""
    return [ladder(s), *([amplification(s), gains(s), interactions(s), across.table([s])] if loops_of(s) else [])]


def draw(s: Study, folder: Path) -> None:
    """The two figures over SNR, named by the model up to its quantisation."""
    model = s.header.model.removesuffix(".gguf").lower()
    for name, figure in study_plots.figures(s).items():
        if name not in (study_plots.SIZE, study_plots.KLD):
            with style.style():
                figure.savefig(folder / f"{name}-{model}.png", dpi=85)


@click.command()
@click.argument("studies", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="[STUDY...]")
@click.option("--figures", type=click.Path(path_type=Path, exists=True, file_okay=False, writable=True),
              metavar="DIR")  # fmt: skip
def main(studies: Sequence[Path], figures: Path | None) -> None:
    """Print the tables."""
    for path in studies or sorted(LADDERS.glob("*.jsonl")):
        try:
            s = file.read(path)
        except GgufloopError as e:
            raise click.ClickException(f"{e.message} {e.hint}") from None
        click.echo(f"## {s.header.model}\n")
        click.echo("\n".join(f"* {line}" for line in report.summary(s) if line != report.DIRECTION) + "\n")
        for table in tables(s):
            click.echo(table.render("md"))
        if figures is not None:
            draw(s, figures)


if __name__ == "__main__":
    main()
