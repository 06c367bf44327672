"""An answer in one paragraph, and what stands behind it: paragraph(found), comparisons(found), tried(found), ..."""

from __future__ import annotations

import dataclasses
from typing import Any

from ggufloop.loop import PLAIN
from ggufloop.measure.verdict import ACCURACY, HELPS, HURTS, SAME, UNSURE, Verdict
from ggufloop.reading import finite
from ggufloop.study.across import BETTER, WORSE
from ggufloop.study.answer import SHARE, Finding, OtherFile
from ggufloop.study.protocol_report import AT_CHANCE
from ggufloop.table import Cell, Column, Table, columns

SCHEMA_VERSION = 1


def paragraph(a: Finding) -> str:
    """Does looping help here, with which loop, by how much, at what cost; against other files; what to do next."""
    said = [_headline(a), _judged(a), _cost(a), *_choice(a), *_guard(a), *(_other(a, o) for o in a.others), _next(a)]
    return " ".join(each for each in said if each)


def _headline(a: Finding) -> str:
    what, of = f"{a.name} on {a.measure.name}", a.measure.item
    if at_chance(a):
        return f"Whether looping helps {what} cannot be told: plain is not known to be above chance."
    looping = "Looping" if a.chosen is None else "The loop that was chosen"  # of the others nothing is known
    return {
        HELPS: f"Looping helps {what}{', by less than would matter' if a.verdict.small else ''}.",
        HURTS: f"{looping} hurts {what}.",
        SAME: f"{looping} has no effect that matters on {what}: none larger than {amount(a, a.verdict.worth)}.",
        UNSURE: f"{len(a.judging)} {of}s cannot tell whether looping helps {what}.",
    }[a.verdict.word]


def _judged(a: Finding) -> str:
    of, n = a.measure.item, len(a.judging)
    chosen = "" if a.chosen is None else f", chosen from {len(a.loops)} loops on {a.chosen.n} {of}s,"
    others = "other " * (a.chosen is not None)
    if a.paired is not None:
        gained, lost = a.paired.gained, a.paired.lost
        did = f"answers {100 * a.looped:.1f} % of {n} {others}{of}s right, plain {100 * a.plain:.1f} %"
        tail = f"; {gained} became right and {lost} wrong, p = {a.verdict.gain.p:.2g}"
    else:
        did = f"has a mean log-probability of {a.looped:.4f} nats per token on {n} {others}{of}s, plain {a.plain:.4f}"
        tail = f", p = {a.verdict.gain.p:.2g}"
    level = f"tested at level {1 - a.verdict.gain.level:.2g}: no confirmation."
    looked = f" This is look {a.look} at these data, {level}" if a.look > 1 else ""
    return f"`{a.loop}`{chosen} {did}: {interval(a, a.verdict)}{tail}.{looked}"


def _cost(a: Finding) -> str:
    return f"It evaluates {a.layers:.2f} times the layers, and takes about {a.layers:.2f} times as long."


def _choice(a: Finding) -> list[str]:
    """The finer measure, where it says something accuracy does not."""
    choice = None if a.paired is None else a.paired.choice
    if choice is None or choice.word in (a.verdict.word, UNSURE):
        return []
    e = choice.gain
    return [
        "The right answer's log-probability among those offered, which tells smaller effects, moves by "
        f"{e.mean:+.3f} nats [{e.low:+.3f}, {e.high:+.3f}]; a point of accuracy goes with about {choice.worth:g}."
    ]


def at_chance(a: Finding) -> bool:
    """Whether the plain model answers no better than a guess, and so tells nothing of a loop."""
    return a.paired is not None and a.paired.guard is not None and a.paired.guard.at_chance


def _guard(a: Finding) -> list[str]:
    guard = None if a.paired is None else a.paired.guard
    return [f"But {guard.sentence()}"] if guard is not None and guard.at_chance else []


def _other(a: Finding, o: OtherFile) -> str:
    name, of = o.name, a.measure.item
    said = {
        HELPS: f"This file with the loop is better than {name} without",
        HURTS: f"{name} without a loop is better than this file with it",
        SAME: f"This file with the loop and {name} without are the same to {amount(a, a.verdict.worth)}",
        UNSURE: f"Whether this file with the loop is better than {name} without cannot be told",
    }[o.looped.word]
    sizes = f"{a.nbytes / 2**20:.0f} MiB against {o.nbytes / 2**20:.0f}"
    both = f"without the loop the difference is {interval(a, o.plain, -1)}"
    return f"{said}: {interval(a, o.looped)} on the same {of}s, {sizes}; {both}."


def _next(a: Finding) -> str:
    of = a.measure.item
    if at_chance(a):
        return "Leave the loop off, and ask a task that this model can answer."
    found = f"A gain of {amount(a, a.seen)} would have been found in 80 %"
    if a.verdict.word == HELPS and not a.verdict.small:
        return f"Use it: {a.loop.flags}."
    if a.verdict.word != UNSURE:
        return "Leave the loop off here."
    takes = f"one of {amount(a, a.verdict.worth)} takes {a.verdict.needed:,} {of}s to judge"
    left = a.measure.available - a.used
    finer = "a longer text" if a.paired is None else "more questions, or --text, which tells smaller effects"
    narrows = f"; a larger --budget goes on with the {left:,} left" if left else ""
    if a.verdict.needed <= len(a.judging):
        return f"{found}, so if there is an effect it is hardly larger: take {finer}{narrows}. Leave it off until then."
    if left and a.verdict.needed <= a.measure.available * (1 if a.chosen is None else 1 - SHARE):
        more = f"the same command with a larger --budget goes on with the {left:,} left"
    else:
        more = f"{a.measure.name} has {a.measure.available:,}: take {finer}{narrows}"
    return f"{found}; {takes}, and {more}. Leave it off until then."


def amount(a: Finding, x: float) -> str:
    """A difference in the measure's unit, as people say it."""
    if a.measure.unit != ACCURACY:
        return f"{x:.2g} nats per token"
    points = f"{100 * x:.2g}"
    return f"{points} point{'s' * (points != '1')}"


def interval(a: Finding, v: Verdict, sign: int = 1) -> str:
    """+1.7 points [-2.0, +5.4]; sign -1: of the opposite difference."""
    e = v.gain if sign > 0 else -v.gain
    scale, form, unit = (100, "+.1f", "points") if a.measure.unit == ACCURACY else (1, "+.4f", "nats")
    mean, low, high = (f"{scale * x + 0.0:{form}}" for x in (e.mean, e.low, e.high))  # no -0.0
    return f"{mean} {unit} [{low}, {high}]"


def percent(a: Finding) -> str:
    """Of the intervals of what was judged: 95 % at a first look."""
    return f"{100 * a.verdict.gain.level:.3g} %"


def comparisons(a: Finding) -> Table:
    """What was judged, a row for each difference on the judging items."""
    mine, loop = a.name, str(a.loop)
    word = AT_CHANCE if at_chance(a) else a.verdict.phrase(a.measure.item, a.measure.available)
    pairs = [(mine, loop, mine, a.looped, a.verdict, word)]
    for o in a.others:
        pairs.append((mine, loop, o.name, a.looped, o.looped, _across(a, o.looped)))
        pairs.append((o.name, PLAIN, mine, o.score, o.plain, _across(a, o.plain)))
    rows: list[list[Cell]] = [
        [a.measure.name, file, each, minus, len(a.judging), score, v.gain.mean, v.gain.low, v.gain.high, v.gain.p, word]
        for file, each, minus, score, v, word in pairs
    ]
    return Table(columns("measure", "file", "loop", "minus plain", "n:d", "score:.4f", "gain:+.4f", "low:+.4f",
                         "high:+.4f", "p:.3g", "verdict"), rows)  # fmt: skip


def _across(a: Finding, v: Verdict) -> str:
    """The word on two files."""
    return {HELPS: BETTER, HURTS: WORSE}.get(v.word) or v.phrase(a.measure.item, a.measure.available)


def tried(a: Finding) -> Table:
    """The loops on the items that chose, which quote none of them: the best of many is partly luck."""
    rows: list[list[Cell]] = [
        [c.name, c.gain.n, a.ranks.get(c.name), c.gain.mean, c.gain.low, c.gain.high, c.name == str(a.loop)]
        for c in (a.chosen.loops if a.chosen is not None else ())
    ]
    return Table(columns("loop", "n:d", "ranked by:+.4f", "gain:+.4f", "low:+.4f", "high:+.4f", "chosen"), rows)


def items(a: Finding) -> Table:
    """The scores of each item that judged."""
    rows: list[list[Cell]] = [list(row) for row in zip(a.judging, *a.scores.values(), strict=True)]
    return Table((Column("item"), *map(Column, a.scores)), rows)


def markdown(a: Finding, figure: str | None) -> str:
    """A report that needs nothing else. figure: its picture's name."""
    parts = [f"# Does looping help {a.name} on {a.measure.name}?", paragraph(a)]
    parts += [f"![gains with their intervals]({figure})"] if figure else []
    parts += ["## What was judged", f"Gains in {a.measure.unit}, above 0 the first is better; {percent(a)} intervals.",
              comparisons(a).render("md")]  # fmt: skip
    if a.chosen is not None:
        ranked = a.paired is not None and a.paired.choice is not None
        by = "what the right answer's log-probability among those offered gained" if ranked else "mean gain"
        parts += ["## How the loop was chosen",
                  f"On {a.chosen.n} {a.measure.item}s that judge nothing, by {by} (`ranked by`). Gains below are of "
                  "these: the best of many is partly luck.", tried(a).render("md")]  # fmt: skip
    return "\n\n".join(each.rstrip("\n") for each in parts) + "\n"


def record(a: Finding) -> dict[str, Any]:
    """For JSON."""
    data = {
        "schema_version": SCHEMA_VERSION, "model": a.path.name, "measure": a.measure.name, **a.measure.identity(),
        "unit": a.measure.unit, "loop": str(a.loop), "loops": list(map(str, a.loops)), "layers": a.layers,
        "n": len(a.judging), "plain": a.plain, "looped": a.looped, "verdict": dataclasses.asdict(a.verdict),
        "at_chance": at_chance(a), "seen_in_80_percent": a.seen, "look": a.look,
        "against": [{"file": o.name, "score": o.score, "minus_plain": dataclasses.asdict(o.plain),
                     "looped_minus_it": dataclasses.asdict(o.looped)} for o in a.others],
        "chosen_on": None if a.chosen is None else tried(a).records(),
        "paragraph": paragraph(a),
    }  # fmt: skip
    found: dict[str, Any] = finite(data)
    return found
