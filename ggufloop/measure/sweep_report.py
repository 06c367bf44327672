"""A sweep in words and tables.

text(result)                                     # for eyes
table(result).render("csv")                      # a row per loop
record(result)                                   # for json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ggufloop.measure.sweep import Outcome
from ggufloop.measure.sweep_run import SweepResult
from ggufloop.progress import duration
from ggufloop.table import Cell, Column, Table

_COLUMNS = (Column("measure"), Column("loop"), Column("layers", ".2f"), Column("n", "d"), Column("gain", "+.5f"),
            Column("low", "+.5f"), Column("high", "+.5f"), Column("held-out n", "d"), Column("held-out gain", "+.5f"),
            Column("held-out low", "+.5f"), Column("held-out high", "+.5f"), Column("p (Holm)", ".3g"))  # fmt: skip


def text(result: SweepResult) -> str:
    """All of it for eyes."""
    n = len(result.loops)
    head = f"# {result.path.name}: {n} loop{'s' if n > 1 else ''} against plain, seed {result.seed}\n\n"
    return head + "\n".join(_section(outcome, result.costs) for outcome in result.outcomes)


def table(result: SweepResult) -> Table:
    """One row per measure and loop."""
    return Table(_COLUMNS, [row for outcome in result.outcomes for row in rows(outcome, result.costs)])


def record(result: SweepResult) -> dict[str, Any]:
    """For JSON."""
    head = {name: value for name, value in result.header.items() if name != "measures"}
    return {**head, "seed": result.seed, "loops": list(result.costs), "results": list(map(_record, result.outcomes))}


def rows(outcome: Outcome, costs: Mapping[str, float]) -> list[list[Cell]]:
    """One row per loop, in the order of the selection."""
    decision = outcome.decision
    held_out = {c.name: c for c in decision.finalists}
    gains = {s.name: s.gain for s in decision.selection}
    found: list[list[Cell]] = []
    for name in gains or held_out:
        gain, end = gains.get(name), held_out.get(name)
        first: list[Cell] = [None] * 4 if gain is None else [gain.n, gain.mean, gain.low, gain.high]
        last: list[Cell] = (
            [None] * 5 if end is None else [end.gain.n, end.gain.mean, end.gain.low, end.gain.high, end.p]
        )
        found.append([outcome.measure.name, name, costs[name], *first, *last])
    return found


def verdict(outcome: Outcome) -> str:
    """The decision in words, with the numbers behind it."""
    return outcome.words


def _section(outcome: Outcome, costs: Mapping[str, float]) -> str:
    """One measure for eyes."""
    d, m, spent = outcome.decision, outcome.measure, outcome.cost
    head = [f"## {m.name}: {m.n} {m.item}s, gain in {m.unit} over plain ({outcome.plain:.5f}); above 0 is better", ""]
    if d.selection:
        head += [f"n: {m.item}s of the selection half ({d.n_select}) a loop was scored on, worse halves dropped early. "
                 "The best gains of many are too good to be quoted.", f"held-out: the other {d.n_confirm}, which chose "
                 f"nothing; their intervals hold for all {len(d.finalists)} finalists together.", ""]  # fmt: skip
    kept = [i for i in range(1, len(_COLUMNS)) if d.selection or not 3 <= i <= 6]  # a single loop is not selected
    cells = [[row[i] for i in kept] for row in rows(outcome, costs)]
    shown = Table(tuple(_COLUMNS[i] for i in kept), cells).render("md")
    clock = spent.seconds / max(spent.plain_seconds, 1e-4)  # a journal rounds to that
    tail = [
        "",
        f"Verdict: {verdict(outcome)}",
        "",
        f"Cost: {spent.spent:.1f} plain runs by layer count, {clock:.1f} by the clock"
        f" ({duration(spent.seconds)}); each loop alone with its own plain run: {spent.alone:.1f}.",
        "",
    ]
    return "\n".join(head) + "\n" + shown + "\n".join(tail)


def _record(outcome: Outcome) -> dict[str, Any]:
    d = dataclasses.asdict(outcome.decision)
    cost = dataclasses.asdict(outcome.cost)
    return {"measure": outcome.measure.name, "n": outcome.measure.n, **outcome.measure.identity(),
            "unit": outcome.measure.unit, "plain": outcome.plain, **d, "cost": cost,
            "words": verdict(outcome)}  # fmt: skip
