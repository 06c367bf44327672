"""One gain, taken apart: SmolLM2's on wordnet_definitions, from docs/data alone: no model is run.

    python3 scripts/bootstrap.py python scripts/wordnet_results.py

The loop that was to be reproduced, on questions that had neither chosen nor confirmed it; other loops and placebos;
which questions it gains; other files of the same weights. A test looks for these tables in docs/results.md.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ggufloop.loop import PLAIN
from ggufloop.measure.stats import mean_interval
from ggufloop.measure.verdict import ACCURACY, CHOICE, SAME, WORTHS, Verdict, judge, judge_flips
from ggufloop.study import scores
from ggufloop.study.scores import NUDGED, PLACEBO, Score
from ggufloop.table import Cell, Column, Table
from ggufloop.tasks.loading import load_tasks

DATA = Path(__file__).resolve().parent.parent / "docs" / "data"
MODEL, TASK = "SmolLM2-135M-Instruct.Q4_1.gguf", "wordnet_definitions"
SEEN = 1700
"""Questions of it before this one chose a loop or confirmed it, before the protocol."""
REGISTERED = "no-anchor"
"""The loop that was to be asked of those from there on."""
LOOPS = (REGISTERED, "recipe", "frozen", "layer", NUDGED, PLACEBO)
OTHER_FILES = DATA / "wordnet"
"""Answers of other files of the same weights, which no registered figure counts."""
OFFERED = OTHER_FILES / "answers.csv.xz"
LETTERS = "ABCD"


def measured() -> list[Score]:
    """The answers of the model's file, and of files made from it."""
    files = [DATA / "protocol" / f"{MODEL.removesuffix('.gguf')}.csv.xz", *sorted(OTHER_FILES.glob("SmolLM2*.csv.xz"))]
    return [score for path in files for score in scores.read(path) if score.measure == TASK]


def numbered(found: Sequence[Score], loop: str, model: str = MODEL) -> dict[int, Score]:
    """The answers to it under a loop, by the question's number."""
    return {int(s.item.split()[1]): s for s in found if (s.model, s.measure, s.loop) == (model, TASK, loop)}


@dataclass(frozen=True)
class Asked:
    """A loop from a question on. share: right under plain; choice: change of the choice log-probability."""

    n: int
    share: float
    gained: int
    lost: int
    choice: Verdict

    @property
    def verdict(self) -> Verdict:
        """At an accuracy that would matter."""
        return judge_flips(self.gained, self.lost, self.n, WORTHS[ACCURACY])

    @property
    def cells(self) -> list[Cell]:
        """n, plain and gain in points, flips and p."""
        gain = self.verdict.gain
        return [self.n, 100 * self.share, 100 * gain.mean, 100 * gain.low, 100 * gain.high, self.gained, self.lost,
                gain.p]  # fmt: skip


COUNTED = (Column("n", ","), Column("plain, %", ".1f"), Column("points", "+.2f"), Column("low", "+.2f"),
           Column("high", "+.2f"), Column("right"), Column("wrong"), Column("p", ".2g"))  # fmt: skip


def asked(found: Sequence[Score], loop: str, first: int = 0, model: str = MODEL) -> Asked:
    """The questions that loop and plain have answered, from number `first` on."""
    plain, mine = numbered(found, PLAIN, model), numbered(found, loop, model)
    return counted([(mine[i], plain[i]) for i in sorted(plain) if i >= first and i in mine])


def counted(pairs: Sequence[tuple[Score, Score]]) -> Asked:
    """Looped and plain answers to the same questions."""
    choice = judge([a.choice - b.choice for a, b in pairs], WORTHS[CHOICE])
    return Asked(len(pairs), sum(b.value for _, b in pairs) / len(pairs), sum(a.value > b.value for a, b in pairs),
                 sum(a.value < b.value for a, b in pairs), choice)  # fmt: skip


def no_effect(v: Verdict) -> str:
    """'no effect larger than' so many points, '' where something else is said."""
    return f"{SAME} {100 * v.worth:g}" if v.word == SAME else ""


def reproduced(found: Sequence[Score]) -> Table:
    """The registered loop on the questions not seen before, and every loop on all."""
    called = {loop: f"`{next(iter(numbered(found, loop).values())).settings}`" for loop in LOOPS}
    called |= {PLACEBO: "no loop, flash attention off", NUDGED: f"{called[REGISTERED]}, damping moved by 1e-5"}
    rows: list[list[Cell]] = []
    for loop, what, first in [(REGISTERED, "registered, fresh", SEEN), *((loop, "all", 0) for loop in LOOPS)]:
        a = asked(found, loop, first)
        rows.append([called[loop], what, *a.cells, no_effect(a.verdict) or a.verdict.phrase("question")])
    return Table((Column("loop"), Column("questions"), *COUNTED, Column("")), rows)


def letters(found: Sequence[Score]) -> Table:
    """Which answer is chosen how often, per cent."""
    rows: list[list[Cell]] = []
    for loop in (PLAIN, *LOOPS):
        mine = list(numbered(found, loop).values())
        rows.append([loop, *(100 * sum(s.letter == i for s in mine) / len(mine) for i in range(4))])
    return Table((Column("chosen by"), *(Column(letter, ".1f") for letter in LETTERS)), rows)


def write_offered() -> None:
    """Of each question the letter of the right answer, and how many characters each answer has."""
    docs = load_tasks([TASK], offline=True).leaves[TASK].eval_docs
    rows = ["".join(f"{value}," for value in (doc["answer"], *map(len, doc["choices"]))).rstrip(",") for doc in docs]
    OFFERED.write_bytes(lzma.compress("\n".join(["answer,A,B,C,D", *rows, ""]).encode()))


def read_offered() -> list[list[int]]:
    """What `write_offered` wrote, a row per question."""
    lines = lzma.decompress(OFFERED.read_bytes()).decode().splitlines()[1:]
    return [[int(word) for word in line.split(",")] for line in lines]


def flips(found: Sequence[Score], offered: Sequence[Sequence[int]]) -> Table:
    """Where the registered loop's gain comes from: by the letter of the right answer, and by its length among the four
    (of equal ones neither is the longest). Exploration: the groups were not registered."""
    plain, mine = numbered(found, PLAIN), numbered(found, REGISTERED)
    groups: dict[str, list[int]] = {f"right answer is {letter}": [] for letter in LETTERS}
    groups |= {f"right answer is {what}": [] for what in ("the shortest", "between", "the longest")}
    for i, (right, *lengths) in enumerate(offered):
        others = lengths[:right] + lengths[right + 1 :]
        length = lengths[right]
        what = "the shortest" if length < min(others) else "the longest" if length > max(others) else "between"
        groups[f"right answer is {LETTERS[right]}"].append(i)
        groups[f"right answer is {what}"].append(i)
    rows: list[list[Cell]] = [
        [name, *counted([(mine[i], plain[i]) for i in items]).cells] for name, items in groups.items()
    ]
    return Table((Column("questions"), *COUNTED), rows)


def longer(found: Sequence[Score], offered: Sequence[Sequence[int]]) -> str:
    """How much longer the answers are that the registered loop chooses."""
    plain, mine = numbered(found, PLAIN), numbered(found, REGISTERED)
    change = mean_interval([offered[i][1 + mine[i].letter] - offered[i][1 + plain[i].letter] for i in plain])
    return f"characters of the chosen answer, looped - plain: {change.show('+.2f')}"


def by_file(found: Sequence[Score]) -> Table:
    """The registered loop on files of the same weights in other types, on all questions: whether it gains there what
    it gains in the file it was found on, and whether it is as good looped as that one is plain. Exploration."""
    rows: list[list[Cell]] = []
    gains: dict[str, dict[int, float]] = {}
    others = {s.model for s in found} - {MODEL}
    for model in (MODEL, *sorted(others, key=lambda name: -asked(found, REGISTERED, model=name).share)):
        plain, mine = numbered(found, PLAIN, model), numbered(found, REGISTERED, model)
        gains[model] = {i: mine[i].value - plain[i].value for i in plain}
        a = asked(found, REGISTERED, model=model)
        apart: list[Cell] = [None] * 7
        if model != MODEL:
            more = mean_interval([gains[model][i] - gains[MODEL][i] for i in plain])
            both = sum(gains[model][i] > 0 and gains[MODEL][i] > 0 for i in plain)
            first = numbered(found, PLAIN)
            against = mean_interval([mine[i].value - first[i].value for i in plain])
            apart = [both, *(100 * x for e in (more, against) for x in (e.mean, e.low, e.high))]
        name = model.removesuffix(".gguf").removeprefix("SmolLM2-135M-Instruct.").replace("Q4_1-", "made from it: ")
        rows.append([name, *a.cells, 100 * a.gained / (a.n * (1 - a.share)), *apart])
    beyond = (Column("of the wrong, %", ".1f"), Column("right in both"),
              Column("beyond Q4_1's", "+.2f"), Column("low", "+.2f"), Column("high", "+.2f"),
              Column("over Q4_1 plain", "+.2f"), Column("low", "+.2f"), Column("high", "+.2f"))  # fmt: skip
    return Table((Column("file"), *COUNTED, *beyond), rows)


def tables(found: Sequence[Score]) -> list[Table]:
    """What the page shows."""
    return [reproduced(found), flips(found, read_offered()), by_file(found)]


@click.command()
@click.option("--offered", is_flag=True, help="Write how long the answers are that the questions offer, and end.")
def main(offered: bool) -> None:
    """Print the tables."""
    if offered:
        write_offered()
        return
    found = measured()
    for table in [*tables(found), letters(found)]:
        click.echo(table.render("md"))
    click.echo(longer(found, read_offered()))


if __name__ == "__main__":
    main()
