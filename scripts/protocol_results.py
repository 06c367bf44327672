"""The tables of docs/results.md that come from the protocol, from docs/data/protocol alone: no model is run.

    python3 scripts/bootstrap.py python scripts/protocol_results.py [--plot docs/protocol.png]

The page's first table and that of acc_norm, and docs/longctx.md's of RULER's tasks, which a test looks for there; every
loop against plain, as `ggufloop study report` has it; the one gain that was to be reproduced, on questions that had
neither chosen nor confirmed it; how answers spread over the letters.
"""

from __future__ import annotations

import lzma
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import click

from ggufloop.figures import forest, style
from ggufloop.loop import PLAIN
from ggufloop.measure import longctx, longctx_run
from ggufloop.measure.stats import Estimate, mean_interval
from ggufloop.measure.verdict import (
    ACCURACY,
    CHOICE,
    LEVEL,
    POWER,
    RECALL,
    SAME,
    UNSURE,
    WORTHS,
    Verdict,
    judge,
    judge_flips,
)
from ggufloop.study import protocol_report, scores
from ggufloop.study.protocol import read_protocol
from ggufloop.study.protocol_report import ALL, JudgedLoop, repeats
from ggufloop.study.scores import Score
from ggufloop.table import Cell, Column, Table
from ggufloop.tasks.loading import load_tasks

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODEL, REPRODUCED = "SmolLM2-135M-Instruct.Q4_1.gguf", "wordnet_definitions"
SEEN = 1700
"""Questions of it before this one chose a loop or confirmed it, before the protocol."""
TWIN = DOCS / "data" / "twin" / "SmolLM2-135M-Instruct.Q4_1-F32.csv.xz"
"""The answers of the same weights in F32, which no registered figure counts."""
OFFERED = DOCS / "data" / "wordnet_answers.csv.xz"
REGISTERED = "no-anchor"
"""The loop that was to be asked of those."""
EXPLORED = "all (exploration)"
FAMILY = 8
"""Two primary loops on four models."""
LETTERS = "ABCDE"


def numbered(found: Sequence[Score], loop: str, model: str = MODEL) -> dict[int, Score]:
    """The answers to it under a loop, by the question's number."""
    return {int(s.item.split()[1]): s for s in found if (s.model, s.measure, s.loop) == (model, REPRODUCED, loop)}


@dataclass(frozen=True)
class Asked:
    """A loop on wordnet_definitions from a question on. share: right under plain; choice: change of the choice
    log-probability."""

    n: int
    share: float
    gained: int
    lost: int
    choice: Verdict

    @property
    def verdict(self) -> Verdict:
        """At an accuracy that would matter."""
        return judge_flips(self.gained, self.lost, self.n, WORTHS[ACCURACY])


def asked(found: Sequence[Score], loop: str, first: int) -> Asked:
    """The questions that loop and plain have answered, from number `first` on."""
    plain, mine = numbered(found, PLAIN), numbered(found, loop)
    both = [(mine[i], plain[i]) for i in sorted(plain) if i >= first and i in mine]
    pairs = [(a.value, b.value) for a, b in both]
    choice = judge([a.choice - b.choice for a, b in both], WORTHS[CHOICE])
    return Asked(len(pairs), sum(b for _, b in pairs) / len(pairs), sum(a > b for a, b in pairs),
                 sum(a < b for a, b in pairs), choice)  # fmt: skip


def reproduced(found: Sequence[Score]) -> Table:
    """Each loop on the questions not seen before, and on all."""
    rows: list[list[Cell]] = []
    for loop in dict.fromkeys(s.loop for s in found if s.measure == REPRODUCED and s.model == MODEL):
        if loop == PLAIN:
            continue
        for what, first in (("fresh", SEEN), ("all", 0)):
            a = asked(found, loop, first)
            gain = a.verdict.gain
            rows.append([loop, what, a.n, a.share, gain.mean, gain.low, gain.high, a.gained, a.lost, gain.p,
                         a.verdict.word])  # fmt: skip
    columns = (Column("loop"), Column("questions"), Column("n"), Column("plain", ".4f"), Column("gain", "+.4f"),
               Column("low", "+.4f"), Column("high", "+.4f"), Column("right"), Column("wrong"), Column("p", ".2g"),
               Column("verdict"))  # fmt: skip
    return Table(columns, rows)


def registered(rows: Sequence[JudgedLoop], found: Sequence[Score]) -> list[JudgedLoop]:
    """The rows of the primary loops on tasks, by what was registered of them: of wordnet_definitions the questions that
    had neither chosen a loop nor confirmed it, and all of them by what they are."""
    said: list[JudgedLoop] = []
    for r in rows:
        if r.role != "primary" or r.unit != ACCURACY or repeats(r, rows):
            continue
        if (r.model, r.measure) == (MODEL, REPRODUCED):
            if r.loop == REGISTERED:
                a = asked(found, r.loop, SEEN)
                said.append(replace(r, measure=f"{REPRODUCED}, fresh", plain=a.share, verdict=a.verdict,
                                    p=a.verdict.gain.p, gained=a.gained, lost=a.lost, choice=a.choice))  # fmt: skip
            r = replace(r, measure=f"{REPRODUCED}, {EXPLORED}")
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
            word = f"{word} {100 * v.worth:g}"
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
    for s in sorted(found, key=lambda s: (s.loop != PLAIN, len(s.settings), s.settings)):
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


def letters(found: Sequence[Score]) -> Table:
    """Which answer is chosen how often."""
    rows: list[list[Cell]] = []
    for loop in dict.fromkeys(s.loop for s in found if s.measure == REPRODUCED and s.model == MODEL):
        mine = list(numbered(found, loop).values())
        rows.append([loop, *(sum(s.letter == i for s in mine) / len(mine) for i in range(4))])
    return Table((Column("loop"), *(Column(LETTERS[i], ".3f") for i in range(4))), rows)


def write_offered(path: Path = OFFERED) -> None:
    """Of each question the letter of the right answer, and how many characters each answer has."""
    docs = load_tasks([REPRODUCED], offline=True).leaves[REPRODUCED].eval_docs
    rows = ["".join(f"{value}," for value in (doc["answer"], *map(len, doc["choices"]))).rstrip(",") for doc in docs]
    path.write_bytes(lzma.compress("\n".join(["answer,A,B,C,D", *rows, ""]).encode()))


def flips(found: Sequence[Score]) -> Table:
    """Where the registered loop's gain comes from: by the letter of the right answer, and by its length among the four
    (of equal ones neither is the longest). Exploration: the groups were not registered."""
    offered = [[int(word) for word in line.split(",")]
               for line in lzma.decompress(OFFERED.read_bytes()).decode().splitlines()[1:]]  # fmt: skip
    plain, mine = numbered(found, PLAIN), numbered(found, REGISTERED)
    groups: dict[str, list[int]] = {f"right answer is {letter}": [] for letter in LETTERS[:4]}
    groups |= {f"right answer is {what}": [] for what in ("the shortest", "between", "the longest")}
    for i, (right, *lengths) in enumerate(offered):
        others = lengths[:right] + lengths[right + 1 :]
        length = lengths[right]
        what = "the shortest" if length < min(others) else "the longest" if length > max(others) else "between"
        groups[f"right answer is {LETTERS[right]}"].append(i)
        groups[f"right answer is {what}"].append(i)
    rows: list[list[Cell]] = []
    for name, items in groups.items():
        gained = sum(mine[i].value > plain[i].value for i in items)
        lost = sum(mine[i].value < plain[i].value for i in items)
        gain = judge_flips(gained, lost, len(items), WORTHS[ACCURACY]).gain
        share = sum(plain[i].value for i in items) / len(items)
        rows.append([name, len(items), share, gain.mean, gain.low, gain.high, gained, lost])
    change = mean_interval([offered[i][1 + mine[i].letter] - offered[i][1 + plain[i].letter] for i in plain])
    rows.append(
        ["characters chosen, looped minus plain", change.n, None, change.mean, change.low, change.high, None, None]
    )
    return Table((Column("where"), Column("n"), Column("plain", ".4f"), Column("gain", "+.4f"), Column("low", "+.4f"),
                  Column("high", "+.4f"), Column("right"), Column("wrong")), rows)  # fmt: skip


def twin(found: Sequence[Score], exact: Sequence[Score]) -> Table:
    """The registered loop on the same weights in F32: whether it gains there what it gains in the quantised file. All
    of the questions; exploration."""
    name = exact[0].model
    q, looped_q = numbered(found, PLAIN), numbered(found, REGISTERED)
    f, looped_f = numbered(exact, PLAIN, name), numbered(exact, REGISTERED, name)
    rows: list[list[Cell]] = []
    for what, a, b in (("Q4_1, looped - plain", looped_q, q), ("F32, looped - plain", looped_f, f),
                       ("plain, F32 - Q4_1", f, q), ("looped, F32 - Q4_1", looped_f, looped_q)):  # fmt: skip
        gained, lost = (sum(x[i].value > y[i].value for i in q) for x, y in ((a, b), (b, a)))
        gain = judge_flips(gained, lost, len(q), WORTHS[ACCURACY]).gain
        rows.append([what, gain.n, 100 * gain.mean, 100 * gain.low, 100 * gain.high, gained, lost, gain.p])
    apart = mean_interval([looped_f[i].value - f[i].value - looped_q[i].value + q[i].value for i in q])
    rows.append(["gain in F32 - gain in Q4_1", apart.n, *(100 * x for x in (apart.mean, apart.low, apart.high)),
                 None, None, None])  # fmt: skip
    return Table((Column("wordnet_definitions"), Column("n", ","), Column("points", "+.2f"), Column("low", "+.2f"),
                  Column("high", "+.2f"), Column("right"), Column("wrong"), Column("p", ".2g")), rows)  # fmt: skip


def measured() -> tuple[list[JudgedLoop], list[Score]]:
    """Every loop of the protocol that was run, judged, and the scores by item."""
    protocol = read_protocol(DOCS / "protocol.toml")
    found = [score for path in sorted((DOCS / "data" / "protocol").glob("*.csv.xz")) for score in scores.read(path)]
    return protocol_report.by_protocol(protocol, found), found


@click.command()
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png")
@click.option("--offered", is_flag=True, help="Write how long the answers are that the questions offer, and end.")
def main(plot: Path | None, offered: bool) -> None:
    """Print the tables."""
    if offered:
        write_offered()
        return
    rows, found = measured()
    if plot is not None:
        decided = [r for r in registered(rows, found) if EXPLORED not in r.measure]
        style.save(forest.forest(decided, "Damped loops on 4-bit files, as the protocol has it"), plot)
    click.echo(headline(rows, found).render("md"))
    click.echo(protocol_report.text(rows))
    click.echo(powers(rows).render("md"))
    click.echo(normed(rows).render("md"))
    for model, table in long_contexts(found):
        click.echo(f"{model}, RULER\n\n{table.render('md')}")
    if numbered(found, PLAIN):
        click.echo(f"{REPRODUCED}; fresh: from question {SEEN} on\n\n{reproduced(found).render('md')}")
        click.echo(letters(found).render("md"))
        click.echo(flips(found).render("md"))
        if TWIN.exists():
            click.echo(twin(found, scores.read(TWIN)).render("md"))


if __name__ == "__main__":
    main()
