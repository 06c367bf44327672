"""Does looping help this model on this task, and is it worth more than bits? One question, from files to a sentence.

    plan = SweepPlan(tasks=("questions.csv",), budget="30m", pooled=True)
    found = run_answer(path, loops, plan, Path("answers/mine"), against=[Path("Q5_K_M.gguf")])
    answer_report.paragraph(found)

Items are drawn at random and parted once. The smaller part chooses a loop, by a race as in a sweep; the rest, which
chose nothing, judges that loop against plain by one test. Other files are scored plain on what judges, so that a loop
is compared with bits on the same items. Every score is kept in the folder, in a journal for each file, and the same
call goes on from there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import file_sha256
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.items import Measure, TextMeasure
from ggufloop.measure.journal import Journal
from ggufloop.measure.selection import Decision, RaceAnswer, Request, decide, planned_cost
from ggufloop.measure.stats import Values
from ggufloop.measure.sweep import CachedScores, Look, outlook
from ggufloop.measure.sweep_run import SweepPlan, opened_sweep, seconds
from ggufloop.measure.tasks import Comparison, compare
from ggufloop.measure.verdict import ACCURACY, LEVEL, POWER, Verdict, adjusted_level, chances, judge
from ggufloop.models.info import describe
from ggufloop.opening import open_model
from ggufloop.progress import Progress, duration, named, note, silent

SHARE = 0.4
"""Of the items, to choose with: that needs no level, only the better half in front."""

LEAST = 10
FEW_FLIPS = 50
JOURNAL = "answer.jsonl"


@dataclass(frozen=True)
class OtherFile:
    """A file without a loop on the items that judge. name: tells it from the others; score: its mean; plain: it minus
    the first file plain; looped: the first file under its loop minus it."""

    name: str
    nbytes: int
    score: float
    plain: Verdict
    looped: Verdict


@dataclass(frozen=True)
class Finding:
    """What came out.

    chosen     how the loop was chosen, on items of their own; None where only one was asked about. ranks: what decided,
               of the loops that were scored on all of these: choice log-probability gained, or the mean gain
    loop       the one that was judged, and by verdict on the other items; paired: all there is to say of questions
    plain, looped    mean scores on what judged; scores: of each item there, by the name of a column
    seen       the smallest gain that would have been found in 80 %
    layers     evaluations of layers over plain's
    used       items in all, of `measure.available`; look: at these data, the first of which is 1
    """

    path: Path
    name: str
    nbytes: int
    measure: Measure
    loops: tuple[LoopSpec, ...]
    chosen: Decision | None
    ranks: dict[str, float]
    loop: LoopSpec
    verdict: Verdict
    paired: Comparison | None
    plain: float
    looped: float
    scores: dict[str, list[float]]
    judging: list[int]
    seen: float
    layers: float
    used: int
    look: int
    others: tuple[OtherFile, ...]


@dataclass(frozen=True)
class _Parts:
    """Items that choose and that judge, in the order of their texts."""

    choosing: list[int]
    judging: list[int]


def run_answer(
    path: Path,
    loops: Sequence[LoopSpec],
    plan: SweepPlan,
    folder: Path,
    settings: ContextSettings | None = None,
    *,
    against: Sequence[Path] = (),
    verbose: bool = False,
    progress: Progress = silent,
) -> Finding:
    """Choose, judge, compare. plan: of one measure, tasks pooled. against: other files, without a loop.

    Raises UsageError for a budget below what the least takes, GgufloopError for too few items or a file that cuts the
    text into other tokens, and as `run_sweep`; KeyboardInterrupt leaves what is done in the folder.
    """
    nbytes = [sum(part.stat().st_size for part in describe(file).files) for file in (path, *against)]  # or refuses it
    name, *names = told_apart([path, *against])

    def opened(path: Path, loops: Sequence[LoopSpec], journal: str, told: Progress) -> Any:
        return opened_sweep(path, loops, plan, folder / journal, settings, None, verbose, told)

    with opened(path, loops, JOURNAL, progress) as (llm, (measure,), journal, _):
        if isinstance(measure, TextMeasure):
            _check_text(path, measure, against, plan, settings)
        costs = [loop.relative_cost(llm.n_layer()) for loop in loops]
        sizes = [size / nbytes[0] for size in nbytes[1:]]
        first = CachedScores(llm, measure, journal, progress, 1)
        n = _items(first, measure, loops, costs, sizes, plan, journal, progress)
        parts, worth = _parted(measure, n, len(loops), plan.seed), plan.worth_of(measure)
        look = Look(measure.name, n, plan.seed, worth, tuple(map(str, loops)))
        number = look.number(journal)
        level = adjusted_level(LEVEL, number, plan.looks)
        total = (
            n + (_race(measure, len(parts.choosing), len(loops), plan) + len(parts.judging)) * float(np.mean(costs))
        ) / measure.n
        scores = CachedScores(llm, measure, journal, progress, total)
        chosen, loop, ranks = None, loops[0], dict[str, float]()
        if parts.choosing:
            chosen, loop, ranks = _choose(scores, measure, loops, parts, plan, progress)
        plain, looped = (scores.of(each, parts.judging, "judging,") for each in (None, loop))
        llm.set_loop(None)
        look.keep(journal)
        paired = None
        if measure.unit == ACCURACY:
            before, after = (scores.questions(each, parts.judging) for each in (None, loop))
            paired = compare(before, after, worth, level)
        verdict = paired.verdict if paired is not None else _judge(measure, parts.judging, looped - plain, worth, level)
        flips = None if paired is None else paired.gained + paired.lost
        identity, cost = measure.identity(), loop.relative_cost(llm.n_layer())
    columns = {PLAIN: plain, str(loop): looped}
    others = []
    for other, called, size in zip(against, names, nbytes[1:], strict=True):
        told = named(progress, called)
        kept = f"answer-{other.stem}-{file_sha256(other)[:8]}.jsonl"  # two folders may each have a file of this name
        with opened(other, (), kept, told) as (llm, (its,), journal, _):
            if its.identity() != identity:
                raise GgufloopError(f"{other.name} is asked something else than {path.name}.",
                                    "compare quantisations of one model, or take a task.")  # fmt: skip
            found = CachedScores(llm, its, journal, told, len(parts.judging) / its.n)
            mine = columns[called + other.suffix] = found.of(None, parts.judging, "judging,")
        pair = [_judge(measure, parts.judging, x, worth, level) for x in (mine - plain, looped - mine)]
        others.append(OtherFile(called, size, float(mine.mean()), *pair))
    return Finding(
        path, name, nbytes[0], measure, tuple(loops), chosen, ranks, loop, verdict, paired, float(plain.mean()),
        float(looped.mean()), {column: values.tolist() for column, values in columns.items()}, parts.judging,
        seen(verdict, level, flips), cost, n, number, tuple(others),
    )  # fmt: skip


def told_apart(files: Sequence[Path]) -> list[str]:
    """The files by name, without the ending, and by so many folders as no two have the same."""
    parts = [file.absolute().with_suffix("").parts[1:] for file in files]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def seen(verdict: Verdict, level: float = LEVEL, flips: int | None = None) -> float:
    """The smallest gain a test like this one finds in 80 %: by the normal formula, McNemar's exact test of few flips,
    which sees less, by simulation. flips: answers that changed; none: as if one had."""
    gain, normal = verdict.gain, NormalDist()
    if flips is None or flips >= FEW_FLIPS:
        return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER)) * gain.sd / math.sqrt(gain.n)
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        (found,) = chances(gain.n, max(1, flips) / gain.n, verdict.worth, [middle], level=level, runs=400)
        low, high = (low, middle) if found.helps >= POWER else (middle, high)
    return high


def _judge(measure: Measure, items: Sequence[int], diff: Values, worth: float, level: float) -> Verdict:
    documents = None if measure.places is None else [measure.places[i][0] for i in items]
    return judge(diff, worth, documents=documents, level=level)


def _split(n: int, n_loops: int) -> int:
    """How many of n items choose."""
    return max(4, int(SHARE * n)) if n_loops > 1 else 0


def _race(measure: Measure, choosing: int, n_loops: int, plan: SweepPlan) -> int:
    """Loops times items that choosing takes at most."""
    return planned_cost(n_loops, choosing, plan.finalists, True, measure.least) if choosing else 0


def _parted(measure: Measure, n: int, n_loops: int, seed: int) -> _Parts:
    """n items at random, and of more items these as well: no item is ever in the other part.

    Of a text the front chooses and the rest judges, for a chunk says something of its neighbours.
    """
    order, places = np.random.default_rng(seed).permutation(measure.n).tolist(), measure.places

    def place(i: int) -> tuple[int, int]:
        return (0, i) if places is None else places[i]

    row = order if places is None else sorted(order, key=place)
    front, cut = set(row[: _split(measure.n, n_loops)]), _split(n, n_loops)
    choosing = [i for i in order if i in front][:cut]
    judging = [i for i in order if i not in front][: n - cut]
    return _Parts(sorted(choosing, key=place), sorted(judging, key=place))


def _items(
    scores: CachedScores, measure: Measure, loops: Sequence[LoopSpec], costs: Sequence[float], sizes: Sequence[float],
    plan: SweepPlan, journal: Journal, progress: Progress,
) -> int:  # fmt: skip
    """How many items the budget allows, by the speed of the plain model on the first; said before the rest."""
    if measure.n < LEAST:
        has = f"{measure.name} has {measure.n} {measure.item}{'s' * (measure.n != 1)}"
        raise GgufloopError(f"{has}, too few to say anything of a loop.",
                            f"{LEAST} is the least, thousands give an answer.")  # fmt: skip
    asked = f"{plan.budget} for {', '.join(map(str, loops))}"
    kept = next((r["items"][0] for r in journal.records if r.get("budget") == asked), None)
    if kept is not None:
        return int(kept)
    low = min(measure.n, math.ceil(measure.least / SHARE) if len(costs) > 1 else measure.least)
    parts = _parted(measure, low, len(costs), plan.seed)
    few = (parts.choosing or parts.judging)[: measure.least]
    scores.of(None, few[:1], "timing")  # the first is slower
    warm, known = scores.seconds[PLAIN], scores.items_scored()[PLAIN]
    scores.of(None, few, "timing")
    fresh = scores.items_scored()[PLAIN] - known  # fewer where a run was stopped
    each = (scores.seconds[PLAIN] - warm) / fresh if fresh else warm / known

    def needs(n: int) -> float:
        choosing = _split(n, len(costs))
        race = _race(measure, choosing, len(costs), plan)
        return each * (n + float(np.mean(costs)) * race + (n - choosing) * (max(costs) + sum(sizes)))

    budget = math.inf if plan.budget is None else seconds(plan.budget)
    if needs(low) > budget:
        raise UsageError(f"{low} {measure.item}s of {measure.name} take {duration(needs(low))}, and the budget is "
                         f"{duration(budget)}.", "give that much, or fewer loops.")  # fmt: skip
    n = bisect_right(range(low, measure.n + 1), budget, key=needs) + low - 1
    journal.add({"budget": asked, "items": [n]})
    choosing = _split(n, len(costs))
    first = f"{choosing} choose among {len(costs)} loops, {n - choosing} others judge" if choosing else f"{n} judge"
    note(progress, f"{n} of {measure.available} {measure.item}s: {first}; about {duration(needs(n))}.")
    return n


def _choose(
    scores: CachedScores, measure: Measure, loops: Sequence[LoopSpec], parts: _Parts, plan: SweepPlan,
    progress: Progress,
) -> tuple[Decision, LoopSpec, dict[str, float]]:  # fmt: skip
    """The race on the items that choose, the best of those that ran it to its end, and what said so of them."""
    by_name = {str(loop): loop for loop in loops}
    places, worth = measure.places, plan.worth_of(measure)
    steps = decide(list(by_name), len(parts.choosing), plan.seed, finalists=plan.finalists, least=measure.least,
                   worth=worth, places=None if places is None else [places[i] for i in parts.choosing])  # fmt: skip
    asked: list[int] = []
    try:
        request: Request = next(steps)
        while True:
            items = [parts.choosing[i] for i in request.items]
            found = scores.of_each({name: by_name[name] for name in request.names}, items, "choosing,")
            plain = scores.of(None, items, "choosing,")
            gains = {name: values - plain for name, values in found.items()}
            if not asked:
                note(progress, outlook(measure, items, list(gains.values()), worth, LEVEL, len(parts.judging)))
            asked += items
            request = steps.send(RaceAnswer(gains, scores.choice_gains(request.names, asked)))
    except StopIteration as e:
        decision: Decision = e.value
    last = [c for c in decision.loops if c.gain.n == len(asked)]
    ranks = scores.choice_gains([c.name for c in last], asked) or {c.name: c.gain.mean for c in last}
    return decision, by_name[max(last, key=lambda c: ranks[c.name]).name], ranks


def _check_text(
    path: Path, measure: TextMeasure, against: Sequence[Path], plan: SweepPlan, settings: ContextSettings | None
) -> None:
    """Raise GgufloopError for a file that cuts the text into other tokens, before anything is scored."""
    for other in against:
        llm = open_model(other, settings or ContextSettings(n_ctx=plan.context))
        try:
            assert plan.text is not None
            theirs = TextMeasure(llm, plan.text, plan.chunk, plan.chunks).identity()
        finally:
            llm.close()
        if theirs != measure.identity():
            raise GgufloopError(f"{other.name} cuts the text into other tokens than {path.name}.",
                                "compare quantisations of one model, or take a task.")  # fmt: skip
