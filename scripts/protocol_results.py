"""The tables of docs/results.md that come from the protocol, from docs/data/protocol alone: no model is run.

    python3 scripts/bootstrap.py python scripts/protocol_results.py [--plot docs/protocol.png]

The page's first table and that of acc_norm, and docs/longctx.md's of RULER's tasks, which a test looks for there; every
loop against plain, as `ggufloop study report` has it; what gain so many questions find. `wordnet_results.py` takes the
one gain apart that was to be reproduced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import click
from wordnet_results import MODEL, REGISTERED, SEEN, TASK, asked, no_effect

from ggufloop.errors import GgufloopError
from ggufloop.figures import forest, style
from ggufloop.loop import PLAIN
from ggufloop.measure import longctx, longctx_run
from ggufloop.measure.stats import Estimate
from ggufloop.measure.verdict import (
    ACCURACY,
    LEVEL,
    POWER,
    RECALL,
    SAME,
    UNSURE,
)
from ggufloop.study import protocol_report, scores
from ggufloop.study.protocol import read_protocol
from ggufloop.study.protocol_report import ALL, JudgedLoop, repeats
from ggufloop.study.scores import Score
from ggufloop.table import Cell, Column, Table

DOCS = Path(__file__).resolve().parent.parent / "docs"
EXPLORED = "all (exploration)"
FAMILY = 8
"""Two primary loops on four models."""


def registered(rows: Sequence[JudgedLoop], found: Sequence[Score]) -> list[JudgedLoop]:
    """The rows of the primary loops on tasks, by what was registered of them: of wordnet_definitions the questions that
    had neither chosen a loop nor confirmed it, and all of them by what they are."""
    said: list[JudgedLoop] = []
    for r in rows:
        if r.role != "primary" or r.unit != ACCURACY or repeats(r, rows):
            continue
        if (r.model, r.measure) == (MODEL, TASK):
            if r.loop == REGISTERED:
                a = asked(found, r.loop, SEEN)
                said.append(replace(r, measure=f"{TASK}, fresh", plain=a.share, verdict=a.verdict,
                                    p=a.verdict.gain.p, gained=a.gained, lost=a.lost, choice=a.choice))  # fmt: skip
            r = replace(r, measure=f"{TASK}, {EXPLORED}")
        said.append(r)
    return said


def headline(rows: Sequence[JudgedLoop], found: Sequence[Score]) -> Table:
    """The primary loops: one look each, as registered, and all of them together. p is that of the word; a row of all
    tasks that is not complete has no word and is not bold."""
    cells: list[list[Cell]] = []
    for r in registered(rows, found):
        task = r.measure if r.measure != ALL else "all tasks" if r.lacks else "**all tasks**"
        v, word = r.verdict, r.short
        if r.short == SAME:
            word = no_effect(v)
        elif r.short == UNSURE:
            word += f": {v.needed:,} would"
        choice = "" if r.choice is None or r.unfit else _brackets(r.choice.gain, "+.4f")
        points = _brackets(v.gain.mapped(lambda share: 100 * share), "+.2f")
        cells.append([_file(r.model), task, f"{v.gain.n:,}", f"{100 * r.plain:.1f} %",
                      f"`{r.settings}`" if r.settings else r.loop, points,
                      "" if r.unfit or r.lacks else f"{r.p:.2g}", choice, word])  # fmt: skip
    names = ("model, file", "task", "n", "plain", "loop", "gain, points", "p", "choice, nats", "")
    return Table(tuple(map(Column, names)), cells)


def _brackets(e: Estimate, form: str) -> str:
    return f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"


def normed(rows: Sequence[JudgedLoop]) -> Table:
    """What the primary loops gain in lm-eval's acc_norm, in points, where a task has it. It decides nothing."""
    cells: list[list[Cell]] = []
    for r in rows:
        if r.norm is not None and r.role == "primary" and r.measure != ALL:
            mean, low, high = (100 * share for share in (r.norm.gain.mean, r.norm.gain.low, r.norm.gain.high))
            cells.append([_file(r.model), r.measure, r.norm.gain.n, f"`{r.settings}`", mean, low, high, r.norm.gain.p])
    columns = (Column("model, file"), Column("task"), Column("n", ","), Column("loop"), Column("acc_norm", "+.2f"),
               Column("low", "+.2f"), Column("high", "+.2f"), Column("p", ".2g"))  # fmt: skip
    return Table(columns, cells)


def long_contexts(found: Sequence[Score]) -> list[tuple[str, Table]]:
    """What each model finds in RULER's contexts, by length and task, as `ggufloop longctx` shows it."""
    by_model: dict[str, dict[tuple[int, str, str], list[float]]] = {}
    for s in sorted(found, key=lambda s: (s.loop != PLAIN, len(s.settings), s.settings, s.item)):
        if s.unit == RECALL:
            place = int(s.measure.split()[1]), s.item.split()[0], s.settings
            by_model.setdefault(s.model, {}).setdefault(place, []).append(s.value)
    return [(model, longctx_run.table(longctx.cells(scores))) for model, scores in by_model.items()]


def _file(model: str) -> str:
    return "all models" if model == ALL else re.sub(r"[.-](I?Q\d\w*)\.gguf$", r" \1", model, flags=re.I)


def powers(rows: Sequence[JudgedLoop]) -> Table:
    """Of each model's row of all tasks the true gain that so many questions find in four of five cases, in points, if
    it is the smallest p of the eight: Holm's first step."""
    decided = [r for r in rows if r.measure == ALL and r.model != ALL and r.role == "primary"]
    z = NormalDist().inv_cdf(1 - LEVEL / FAMILY / 2) + NormalDist().inv_cdf(POWER)
    cells: list[list[Cell]] = [[_file(r.model), r.loop, r.gain.n, 100 * z * r.gain.sd / math.sqrt(r.gain.n)]
                               for r in decided]  # fmt: skip
    return Table((Column("model, file"), Column("loop"), Column("n", ","), Column("finds, points", ".2f")), cells)


def measured() -> tuple[list[JudgedLoop], list[Score]]:
    """Every loop of the protocol that was run, judged, and the scores by item."""
    protocol = read_protocol(DOCS / "protocol.toml")
    found = [score for path in sorted((DOCS / "data" / "protocol").glob("*.csv.xz")) for score in scores.read(path)]
    return protocol_report.by_protocol(protocol, found), found


@click.command()
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png")
def main(plot: Path | None) -> None:
    """Print the tables."""
    rows, found = measured()
    if plot is not None:
        decided = [r for r in registered(rows, found) if EXPLORED not in r.measure]
        try:
            style.save(forest.forest(decided, "Damped loops on 4-bit files, as the protocol has it"), plot)
        except GgufloopError as e:
            raise click.ClickException(f"{e.message} {e.hint}") from None
    click.echo(headline(rows, found).render("md"))
    click.echo(protocol_report.text(rows))
    click.echo(powers(rows).render("md"))
    click.echo(normed(rows).render("md"))
    roles, mine = read_protocol(DOCS / "protocol.toml").roles, [s for s in found if s.model == MODEL]
    click.echo(f"With {TASK}, uncorrected for other models:")
    click.echo("\n".join(protocol_report.sentences(protocol_report.judged(mine, roles))) + "\n")
    for model, table in long_contexts(found):
        click.echo(f"{model}, RULER\n\n{table.render('md')}")


if __name__ == "__main__":
    main()
