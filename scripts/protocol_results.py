"""The tables of docs/results.md that come from the protocol, from docs/data/protocol alone: no model is run.

    python3 scripts/bootstrap.py python scripts/protocol_results.py [--plot docs/protocol.png]

Every loop against plain, as `ggufloop study report` has it; then the one gain that was to be reproduced, on questions
that had neither chosen nor confirmed it, and how answers spread over the letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ggufloop.figures import forest, style
from ggufloop.loop import PLAIN
from ggufloop.measure.verdict import ACCURACY, WORTHS, judge_flips
from ggufloop.study import protocol_report, scores
from ggufloop.study.protocol import read_protocol
from ggufloop.study.scores import Score
from ggufloop.table import Column, Table

DOCS = Path(__file__).resolve().parent.parent / "docs"
SEEN = 1700
"""Questions of wordnet_definitions before this one chose a loop or confirmed it, before the protocol."""
LETTERS = "ABCDE"


def numbered(found: Sequence[Score], loop: str) -> dict[int, Score]:
    """The answers to wordnet_definitions under a loop, by the question's number."""
    return {int(s.item.split()[1]): s for s in found if s.measure == "wordnet_definitions" and s.loop == loop}


def reproduced(found: Sequence[Score]) -> Table:
    """Each loop on the questions not seen before, and on all."""
    plain = numbered(found, PLAIN)
    rows = []
    for loop in dict.fromkeys(s.loop for s in found if s.measure == "wordnet_definitions" and s.loop != PLAIN):
        mine = numbered(found, loop)
        for what, first in (("fresh", SEEN), ("all", 0)):
            asked = [i for i in sorted(plain) if i >= first and i in mine]
            gained = sum(mine[i].value > plain[i].value for i in asked)
            lost = sum(mine[i].value < plain[i].value for i in asked)
            v = judge_flips(gained, lost, len(asked), WORTHS[ACCURACY])
            share = sum(plain[i].value for i in asked) / len(asked)
            gain = v.gain
            rows.append([loop, what, len(asked), share, gain.mean, gain.low, gain.high, gained, lost, gain.p, v.word])
    columns = (Column("loop"), Column("questions"), Column("n"), Column("plain", ".4f"), Column("gain", "+.4f"),
               Column("low", "+.4f"), Column("high", "+.4f"), Column("right"), Column("wrong"), Column("p", ".2g"),
               Column("verdict"))  # fmt: skip
    return Table(columns, rows)


def letters(found: Sequence[Score]) -> Table:
    """Which answer is chosen how often."""
    rows = []
    for loop in dict.fromkeys(s.loop for s in found if s.measure == "wordnet_definitions"):
        mine = list(numbered(found, loop).values())
        rows.append([loop, *(sum(s.letter == i for s in mine) / len(mine) for i in range(4))])
    return Table((Column("loop"), *(Column(LETTERS[i], ".3f") for i in range(4))), rows)


@click.command()
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png")
def main(plot: Path | None) -> None:
    """Print the tables."""
    protocol = read_protocol(DOCS / "protocol.toml")
    found = [score for path in sorted((DOCS / "data" / "protocol").glob("*.csv.xz")) for score in scores.read(path)]
    rows = protocol_report.judged(found, protocol.roles, protocol.apart)
    click.echo(protocol_report.text(rows))
    if numbered(found, PLAIN):
        click.echo(f"wordnet_definitions; fresh: from question {SEEN} on\n\n{reproduced(found).render('md')}")
        click.echo(letters(found).render("md"))
    if plot is not None:
        style.save(forest.forest(rows, "Damped loops on 4-bit files, as the protocol has it"), plot)


if __name__ == "__main__":
    main()
