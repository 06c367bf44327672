"""A sweep in words and tables.

text(result)                                     # for eyes
table(result).render("md")                       # a row per loop
numbers(result)                                  # the same for programs
record(result)                                   # for json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ggufloop.measure.endpoints import NUDGE
from ggufloop.measure.selection import Decision, Judged
from ggufloop.measure.sweep import Outcome
from ggufloop.measure.sweep_run import SweepResult
from ggufloop.progress import duration
from ggufloop.table import Cell, Table, columns

_COLUMNS = columns("measure", "loop", "layers:.2f", "n:d", "gain:+.5f", "low:+.5f", "high:+.5f", "p (Holm):.3g",
                   "settled", "verdict")  # fmt: skip


def text(result: SweepResult) -> str:
    """All of it for eyes."""
    n = len(result.loops)
    head = f"# {result.path.name}: {n} loop{'s' if n > 1 else ''} against plain, seed {result.seed}\n\n"
    return head + "\n".join(_section(outcome, result.costs) for outcome in result.outcomes)


def table(result: SweepResult) -> Table:
    """One row per measure and loop."""
    return Table(_COLUMNS, [row for outcome in result.outcomes for row in rows(outcome, result.costs)])


def numbers(result: SweepResult) -> Table:
    """The same rows for programs. plain: its mean score; verdict: the word, with the worth it is about; needed: items
    at which such a gain would be seen; words: the verdict as it is printed."""
    names = ("model", "measure", "unit", "loop", "cost", "n", "available", "plain", "gain", "low", "high", "level",
             "p", "settled", "whole", "verdict", "worth", "needed", "words")  # fmt: skip
    rows: list[list[Cell]] = []
    for o in result.outcomes:
        m = o.measure
        for c in o.decision.loops:
            gain, v = c.gain, c.verdict
            rows.append([result.path.name, m.name, m.unit, c.name, result.costs[c.name], gain.n, m.available, o.plain,
                         gain.mean, gain.low, gain.high, gain.level, c.p, c.settled, c.whole, v.word, v.worth, v.needed,
                         v.phrase(m.item, m.available)])  # fmt: skip
    return Table(columns(*names), rows)


def record(result: SweepResult) -> dict[str, Any]:
    """For JSON."""
    head = {name: value for name, value in result.header.items() if name != "measures"}
    return {**head, "seed": result.seed, "loops": list(result.costs), "results": list(map(_record, result.outcomes))}


def rows(outcome: Outcome, costs: Mapping[str, float]) -> list[list[Cell]]:
    """One row per loop, in the order of the decision: scored on more items first, then by gain."""
    m = outcome.measure
    return [
        [m.name, c.name, costs[c.name], c.gain.n, c.gain.mean, c.gain.low, c.gain.high, c.p,
         "yes" if c.settled else "no", c.verdict.phrase(m.item, m.available)]
        for c in outcome.decision.loops
    ]  # fmt: skip


def verdict(outcome: Outcome) -> str:
    """The decision in words, with the numbers behind it."""
    return outcome.words


def _section(outcome: Outcome, costs: Mapping[str, float]) -> str:
    """One measure for eyes."""
    d, m, spent = outcome.decision, outcome.measure, outcome.cost
    head = [f"## {m.name}: {m.n} {m.item}s, gain in {m.unit} over plain ({outcome.plain:.5f}); above 0 is better", "",
            *_reading(d, m.item)]  # fmt: skip
    shown = Table(_COLUMNS[1:], [row[1:] for row in rows(outcome, costs)]).render("md")
    clock = spent.seconds / max(spent.plain_seconds, 1e-4)  # a journal rounds to that
    tail = [
        "",
        f"Verdict: {verdict(outcome)}",
        "",
        *_floor(outcome),
        f"Cost: {spent.spent:.1f} plain runs by layer count, {clock:.1f} by the clock"
        f" ({duration(spent.seconds)}); each loop alone with its own plain run: {spent.alone:.1f}.",
        "",
    ]
    return "\n".join(head) + "\n" + shown + "\n".join(tail)


def _floor(outcome: Outcome) -> list[str]:
    """What of a gain is the arithmetic's, in words; nothing where it was not asked for."""
    if outcome.floor is None:
        return []
    again, d, m = outcome.floor.found, outcome.floor.found.difference, outcome.measure
    return [f"Noise floor: {outcome.floor.loop} differs from itself with its damping moved by {NUDGE:g} by "
            f"{d.mean:+.5f} [{d.low:+.5f}, {d.high:+.5f}] {m.unit} on average over {d.n} {m.item}s, by "
            f"{again.typical:.2g} on a typical one; {again.changed} of them differ.", ""]  # fmt: skip


def _reading(d: Decision, item: str) -> list[str]:
    """How to read the table, where it needs that: of one loop on all items it does not."""
    found = []
    if len(d.loops) > 1:
        found += [f"Intervals hold for all {len(d.loops)} loops together; p is corrected for all of them. The largest "
                  "gain of many is partly luck."]  # fmt: skip
    if not all(c.whole for c in d.loops):
        found += [f"n below {d.n}: settled, so a gain of {d.worth:g} is ruled out, or dropped by the race before that "
                  f"was known. Only a loop scored on all {item}s can help."]  # fmt: skip
    return [*found, ""] if found else []


def _record(outcome: Outcome) -> dict[str, Any]:
    d, m = outcome.decision, outcome.measure
    decided = {f.name: getattr(d, f.name) for f in dataclasses.fields(d) if f.name != "loops"}
    return {"measure": m.name, "n": m.n, **m.identity(), "unit": m.unit, "plain": outcome.plain, **decided,
            "loops": list(map(_loop, d.loops)),
            "noise_floor": None if outcome.floor is None else dataclasses.asdict(outcome.floor),
            "look": outcome.look, "looks": outcome.planned,
            "cost": dataclasses.asdict(outcome.cost), "words": verdict(outcome)}  # fmt: skip


def _loop(c: Judged) -> dict[str, Any]:
    """One loop: level is of its interval low to high, near the interval of the equivalence."""
    gain, v = c.gain, c.verdict
    return {"name": c.name, "gain": gain.mean, "low": gain.low, "high": gain.high, "level": gain.level, "n": gain.n,
            "p": c.p, "verdict": v.word, "small": v.small, "near": [v.near.low, v.near.high], "needed": v.needed,
            "settled": c.settled, "whole": c.whole}  # fmt: skip
