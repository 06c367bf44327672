"""What the scores of a protocol say: a row per model, measure and loop, and the primary loops over all their questions.

    rows = by_protocol(read_protocol(Path("docs/protocol.toml")), scores)
    table(rows).render("md"); sentences(rows)

Every loop is compared with plain on the same items. A task whose plain accuracy is not above chance judges no loop, nor
does a length at which plain finds nothing or all: its rows say so, and it is in no pooled figure. Pooled rows put all
questions of a model, or of all models, together; they have a word once everything planned is there, which a loop that
has only some of a task's questions is not. Holm's correction
is over the primary loops of all models; other rows are not corrected.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ggufloop.loop import PLAIN
from ggufloop.measure import longctx
from ggufloop.measure.endpoints import guard
from ggufloop.measure.stats import PairedEstimate, holm
from ggufloop.measure.verdict import (
    ACCURACY,
    CHOICE,
    RECALL,
    SAME,
    UNSURE,
    WORTHS,
    Verdict,
    corrected,
    judge,
    judge_flips,
)
from ggufloop.study.protocol import Protocol
from ggufloop.study.scores import NUDGED, PLACEBO, Score
from ggufloop.table import Cell, Column, Table

LARGE = 5000
"""Questions from which half a point is asked about, not a whole one."""
ALL, AT_CHANCE, INCOMPLETE = "all", "at chance", "not complete"
_ORDER = ("primary", "secondary", "control", PLACEBO)


@dataclass(frozen=True)
class JudgedLoop:
    """A loop against plain.

    model, measure  ALL for pooled rows; settings: of the loop, '' if they differ; plain: its mean
    gained, lost    answers that became right and wrong, None for texts
    p               of the pooled rows of single models under a primary loop, after Holm's correction
    choice, norm    by the choice log-probability and by acc_norm, secondary; None where there is none
    unfit           why plain's scores judge no loop, '' if they do
    lacks           planned measures, or models, that a pooled row is still without
    """

    model: str
    measure: str
    unit: str
    loop: str
    settings: str
    role: str
    plain: float
    verdict: Verdict
    p: float
    gained: int | None
    lost: int | None
    choice: Verdict | None
    unfit: str
    norm: Verdict | None = None
    lacks: tuple[str, ...] = ()

    @property
    def gain(self) -> PairedEstimate:
        """Above 0 the loop is better."""
        return self.verdict.gain

    @property
    def word(self) -> str:
        """What is said of it."""
        if self.lacks:
            return f"{INCOMPLETE}: lacks {', '.join(self.lacks)}"
        return self.unfit or self.verdict.phrase("question" if self.unit == ACCURACY else "item")

    @property
    def short(self) -> str:
        """The same without figures."""
        return INCOMPLETE if self.lacks else self.unfit or self.verdict.word


def by_protocol(protocol: Protocol, scores: Sequence[Score]) -> list[JudgedLoop]:
    """Scores of a protocol's run, whole or not, judged as it has it."""
    planned = protocol.planned({score.model for score in scores})
    return judged(scores, protocol.roles, protocol.apart, planned)


def judged(
    scores: Iterable[Score],
    roles: Mapping[str, str],
    apart: Collection[str] = (),
    planned: Mapping[str, Collection[str]] | None = None,
) -> list[JudgedLoop]:
    """A row per model, measure and loop, in that order, then the pooled ones.

    apart: measures of other windows. planned: the measures of each model that was registered, None: those here.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, Score]]] = {}
    for score in scores:
        groups.setdefault((score.model, score.measure), {}).setdefault(score.loop, {})[score.item] = score
    models = {model for model, _ in groups}
    found: list[JudgedLoop] = []
    pooled: dict[tuple[str, str], list[tuple[Score, Score]]] = {}
    there: dict[tuple[str, str], set[str]] = {}
    for (model, measure), loops in sorted(groups.items()):
        plain = loops.get(PLAIN, {})
        unfit = _unfit(list(plain.values()))
        for loop, items in sorted(loops.items(), key=lambda each: (_ORDER.index(_role(each[0], roles)), each[0])):
            pairs = [(items[item], plain[item]) for item in plain if item in items]
            if loop == PLAIN or len(pairs) < 2:
                continue
            found.append(_row(model, measure, loop, _role(loop, roles), pairs, unfit))
            if len(pairs) == len(plain):
                there.setdefault((model, loop), set()).add(measure)
            if found[-1].unit == ACCURACY and not unfit and measure not in apart:
                for name in (model, ALL) if len(models) > 1 else (model,):
                    pooled.setdefault((name, loop), []).extend(pairs)
    together = [
        _row(model, ALL, loop, _role(loop, roles), pairs, "")
        for (model, loop), pairs in sorted(pooled.items(), key=lambda each: (each[0][0] == ALL, each[0]))
    ]
    planned = planned or {}
    together = _corrected(together, len(planned) * sum(role == "primary" for role in roles.values()))
    together = [replace(row, lacks=_lacks(row, planned, there)) for row in together]
    alone = {(row.model, row.loop, row.gain): row for row in together if repeats(row, found) and not row.lacks}
    for i, row in enumerate(found):  # the only task is what is decided, by the same p
        same = alone.get((row.model, row.loop, row.gain))
        found[i] = row if same is None else replace(row, p=same.p, verdict=same.verdict)
    return [*found, *together]


def _lacks(
    row: JudgedLoop, planned: Mapping[str, Collection[str]], there: Mapping[tuple[str, str], Collection[str]]
) -> tuple[str, ...]:
    """What a pooled row of a primary loop is still without: measures of its model, or models that lack some."""
    if row.role != "primary":
        return ()
    missing = {
        model: sorted(set(measures) - set(there.get((model, row.loop), ()))) for model, measures in planned.items()
    }
    if row.model != ALL:
        return tuple(missing.get(row.model, ()))
    return tuple(model.removesuffix(".gguf") for model, without in missing.items() if without)


def _role(loop: str, roles: Mapping[str, str]) -> str:
    return PLACEBO if loop in (PLACEBO, NUDGED) else roles.get(loop, "secondary")


def _row(
    model: str, measure: str, loop: str, role: str, pairs: Sequence[tuple[Score, Score]], unfit: str
) -> JudgedLoop:
    unit, norm = pairs[0][0].unit, None
    if unit == ACCURACY:
        gained, lost = (sum(a.value > b.value for a, b in some) for some in (pairs, [(b, a) for a, b in pairs]))
        worth = WORTHS[ACCURACY] / 2 if len(pairs) > LARGE else WORTHS[ACCURACY]
        verdict = judge_flips(gained, lost, len(pairs), worth)
        changes = np.array([a.choice - b.choice for a, b in pairs])
        choice = judge(changes, WORTHS[CHOICE]) if np.isfinite(changes).all() else None
        changes = np.array([a.norm - b.norm for a, b in pairs])
        norm = judge(changes, worth) if np.isfinite(changes).all() else None
        counts: tuple[int | None, int | None] = (gained, lost)
    elif unit == RECALL:
        verdict = _rare(judge([a.value - b.value for a, b in pairs], WORTHS[unit]))
        choice, counts = None, (None, None)
    else:
        order = sorted(pairs, key=lambda pair: tuple(map(int, pair[0].item.split())))
        changes = np.array([a.value - b.value for a, b in order])
        verdict = judge(changes, WORTHS[unit], documents=[int(a.item.split()[0]) for a, _ in order])
        choice, counts = None, (None, None)
    different = {a.settings for a, _ in pairs}
    settings = different.pop() if len(different) == 1 else ""
    mean = float(np.mean([b.value for _, b in pairs]))
    return JudgedLoop(
        model, measure, unit, loop, settings, role, mean, verdict, verdict.gain.p, *counts, choice, unfit, norm
    )


def _rare(v: Verdict) -> Verdict:
    """With intervals no narrower than n items of which none changed would have: few samples hold no rare change."""
    wide = replace(v, gain=longctx.no_point(v.gain), near=longctx.no_point(v.near))
    return replace(wide, word=UNSURE) if v.word == SAME and not wide.small else wide


def _unfit(plain: Sequence[Score]) -> str:
    """Why the plain model cannot judge a loop, '' if it can. Where no answers are offered there is no chance."""
    if plain and plain[0].unit == RECALL:
        mean = float(np.mean([s.value for s in plain]))
        return "at the floor" if mean <= longctx.FLOOR else "at the ceiling" if mean >= longctx.CEILING else ""
    if not plain or plain[0].unit != ACCURACY or min(s.n_choices for s in plain) < 2:
        return ""
    chosen, choices = [s.letter for s in plain], [s.n_choices for s in plain]
    return AT_CHANCE if guard([s.value for s in plain], chosen, choices).at_chance else ""


def _corrected(rows: list[JudgedLoop], family: int) -> list[JudgedLoop]:
    """With Holm's p, and the word by it, for the primary loops of single models."""
    mine = [i for i, row in enumerate(rows) if row.role == "primary" and row.model != ALL]
    ps = [rows[i].p for i in mine] + [1.0] * (family - len(mine))
    for i, p in zip(mine, holm(ps)[: len(mine)] if mine else [], strict=True):
        rows[i] = replace(rows[i], p=float(p), verdict=corrected(rows[i].verdict, float(p)))
    return rows


def repeats(row: JudgedLoop, rows: Iterable[JudgedLoop]) -> bool:
    """Whether a pooled row of a model is of one measure only, which has a row of its own."""
    if row.measure != ALL or row.model == ALL:
        return False
    return any(other.measure != ALL and (other.model, other.loop, other.gain) == (row.model, row.loop, row.gain)
               for other in rows)  # fmt: skip


COLUMNS = (
    Column("model"), Column("measure"), Column("loop"), Column("role"), Column("n"), Column("plain", ".4f"),
    Column("gain", "+.4f"), Column("low", "+.4f"), Column("high", "+.4f"), Column("right"), Column("wrong"),
    Column("p", ".2g"), Column("choice", "+.4f"), Column("choice low", "+.4f"), Column("choice high", "+.4f"),
    Column("acc_norm", "+.4f"), Column("acc_norm low", "+.4f"), Column("acc_norm high", "+.4f"), Column("verdict"),
)  # fmt: skip


def table(rows: Sequence[JudgedLoop]) -> Table:
    """A row each. right, wrong: answers that became so; choice: change of the choice log-probability, in nats;
    acc_norm: of that share."""
    cells: list[list[Cell]] = []
    for r in rows:
        secondary: list[Cell] = []
        for v in (r.choice, r.norm):
            secondary += [None] * 3 if v is None else [v.gain.mean, v.gain.low, v.gain.high]
        p = None if math.isnan(r.p) else r.p
        cells.append([r.model, r.measure, r.loop, r.role, r.gain.n, r.plain, r.gain.mean, r.gain.low, r.gain.high,
                      r.gained, r.lost, p, *secondary, r.word])  # fmt: skip
    return Table(COLUMNS, cells)


def numbers(rows: Sequence[JudgedLoop]) -> Table:
    """The same for programs: a loop by its name in the protocol and by its settings, if it has the same for all models;
    the unit, and the verdict's word."""
    cells = [
        [*cells[:-1], r.unit, r.settings or None, r.short, r.verdict.worth]
        for r, cells in zip(rows, table(rows).rows, strict=True)
    ]
    names = ["name" if column.name == "loop" else column.name for column in COLUMNS[:-1]]
    return Table(tuple(map(Column, (*names, "unit", "loop", "verdict", "worth"))), cells)


_SHOWN = ("measure", "loop", "n", "plain", "gain", "low", "high", "p", "choice", "verdict")


def text(rows: Sequence[JudgedLoop]) -> str:
    """For eyes: a narrower table of each model, then the primary loops over all questions."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        whole = table([row for row in rows if row.model == model])
        places = [i for i, column in enumerate(whole.columns) if column.name in _SHOWN]
        narrow = Table(tuple(whole.columns[i] for i in places), [[row[i] for i in places] for row in whole.rows])
        found.append(f"{'all models' if model == ALL else model}\n\n{narrow.render('md')}\n")
    return "".join(found) + "".join(f"{line}\n" for line in sentences(rows))


def sentences(rows: Sequence[JudgedLoop]) -> list[str]:
    """The pooled rows of the primary loops, in words."""
    found = []
    for r in rows:
        if r.measure == ALL and r.role == "primary":
            where = "all models" if r.model == ALL else r.model
            found.append(f"{r.loop}, {where}: {100 * r.gain.mean:+.2f} points [{100 * r.gain.low:+.2f}, "
                         f"{100 * r.gain.high:+.2f}] of {r.gain.n:,} questions, {r.gained} became right and {r.lost} "
                         f"wrong: {r.word}.")  # fmt: skip
    return found
