"""Which of many loops helps a model: every loop against plain on the same items.

    with Journal.open(path, header, partial(check_record, measures)) as journal:
        outcome = sweep(llm, loops, TextMeasure(llm, text, n_ctx=512), journal)
    outcome.decision.verdict

`selection.py` says what to score and decides; `items.py` scores; this module does it in slices, keeps every score in
a `Journal` and never computes one twice: the plain run is shared by all loops, and a run that was stopped goes on.

A decision is a look at the data, and the journal counts them: another seed, n or worth is another look, which the level
pays for (`verdict.adjusted_level`). The same command again is the same look.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufloop import reading
from ggufloop.errors import UsageError
from ggufloop.loop import PLAIN, LoopSpec, loop_text
from ggufloop.measure.endpoints import NoiseFloor, choice_log_probability, fit_temperature, noise_floor, nudged
from ggufloop.measure.items import Measure, TaskMeasure, TextMeasure, check_enough
from ggufloop.measure.journal import Journal
from ggufloop.measure.selection import FINALISTS, LEAST_ITEMS, WORTH, Decision, RaceAnswer, decide, planned_cost
from ggufloop.measure.verdict import LEVEL, SAME, adjusted_level, forecast
from ggufloop.progress import Progress, Step, duration, note, silent

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama
    from ggufloop.measure.tasks import Item

Values = NDArray[np.float64]

SLICE_SECONDS = 20.0
"""About how long a slice takes, and so how much is lost to a crash."""

MOST = 1e9
"""No score and no time, in seconds, is above it; their squares can still be added up."""


@dataclass(frozen=True)
class Cost:
    """What a sweep took, in layer evaluations over those of one plain run over all items.

    spent  the plain run, and of each loop the items it was scored on
    alone  each loop by itself on all items, with a plain run to compare it with
    seconds, plain_seconds  measured, of everything and of the plain run; journalled parts count as they were timed
    """

    spent: float
    alone: float
    seconds: float
    plain_seconds: float


@dataclass(frozen=True)
class SweepFloor:
    """The leading loop of those with a damping, run again with it moved (`endpoints.nudged`), on its own items."""

    loop: str
    found: NoiseFloor


@dataclass(frozen=True)
class Outcome:
    """The decision on one measure, plain's mean score over all items, and the cost.

    look, planned: which look at this journal's data the decision was, of how many that were planned. floor: how far
    the leading loop differs from itself, where that was asked for; what it took is not in the cost.
    """

    measure: Measure
    decision: Decision
    plain: float
    cost: Cost
    look: int = 1
    planned: int = 1
    floor: SweepFloor | None = None

    @property
    def words(self) -> str:
        """The verdict in words. A look that was not planned is marked."""
        said = self.decision.sentence(self.measure.item, self.measure.available)
        if self.look == 1 == self.planned:
            return said
        mark = "" if self.look <= self.planned else ": not planned, so this is no confirmation"
        return f"{said} Look {self.look} of {self.planned} at these data, at level {self.decision.level:.2g}{mark}."

    def said(self) -> dict[str, Any]:
        """A line of the journal: the verdict, for those who read it without a model. The last of a measure holds."""
        m = self.measure
        loops = [
            {"loop": c.name, "verdict": c.verdict.phrase(m.item, m.available), "gain": c.gain.mean, "low": c.gain.low,
             "high": c.gain.high, "p (Holm)": c.p, f"{m.item}s": c.gain.n}
            for c in self.decision.loops
        ]  # fmt: skip
        return {"said": m.name, "words": self.words, "unit": m.unit, "loops": loops}


@dataclass(frozen=True)
class _Slice:
    """A line of the journal: scores of a loop on some items, by number, and the seconds they took.

    answers, targets: log-probabilities of what each question offers, and which is right; where questions offer any.
    """

    measure: str
    loop: str
    items: tuple[int, ...]
    scores: tuple[float, ...]
    seconds: float
    answers: tuple[tuple[float, ...], ...] = ()
    targets: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Planned:
    """A line of the journal: how many items of each measure fit a budget."""

    budget: str
    items: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """A line of the journal: a decision was made, and on what. Another one is another look at the data."""

    look: str
    n: int
    seed: int
    worth: float
    loops: tuple[str, ...]

    def number(self, journal: Journal) -> int:
        """Which look at its data this is: the same one again, or one more than there are."""
        seen = self._seen(journal)
        return 1 + (seen.index(self) if self in seen else len(seen))

    def keep(self, journal: Journal) -> None:
        """Add it where it is not there."""
        if self not in self._seen(journal):
            journal.add(asdict(self))

    def _seen(self, journal: Journal) -> list[Look]:
        return [reading.build(Look, record) for record in journal.records if record.get("look") == self.look]


@dataclass(frozen=True)
class PartMeasure:
    """What a merge needs to know of a measure. chunks: of each text, None for questions; slices: lengths of theirs."""

    name: str
    item: str
    unit: str
    least: int
    n: int
    available: int
    chunks: tuple[int, ...] | None
    slices: tuple[int, ...] | None


@dataclass(frozen=True)
class SweepPart:
    """A line of a shard's journal: what all shards together are to decide on, and what this one computes on."""

    part: str
    loops: tuple[str, ...]
    seed: int
    worths: tuple[float, ...]
    looks: int
    n_layer: int
    device: str
    measures: tuple[PartMeasure, ...]


def take_scores(journal: Journal, records: Iterable[dict[str, Any]]) -> None:
    """Add to an open journal the scores of another that it lacks; what else the other holds is left there."""
    have = {(r["measure"], r["loop"], i) for r in journal.records if _has_scores(r) for i in r["items"]}
    for record in records:
        if _has_scores(record) and not all((record["measure"], record["loop"], i) in have for i in record["items"]):
            journal.add(record)
            journal.records.append(record)


def _has_scores(record: dict[str, Any]) -> bool:
    return "items" in record and "loop" in record


def check_record(measures: Sequence[Measure], record: dict[str, Any]) -> None:
    """Raise ValueError for a record that a sweep of these measures has not written. Before a budget cuts them."""
    if "budget" in record:
        planned = reading.build(_Planned, record)
        if len(planned.items) != len(measures):
            raise ValueError(f"it plans {len(planned.items)} measures of {len(measures)}")
        if not all(1 <= n <= m.n for n, m in zip(planned.items, measures, strict=True)):
            raise ValueError("it plans more items than there are")
        return
    if "look" in record:
        reading.build(Look, record)
        return
    if "part" in record:
        part_of(record)
        return
    if "said" in record:
        reading.typed(record.get("words"), str, "words")
        return
    part = reading.build(_Slice, record)
    measure = next((m for m in measures if m.name == part.measure), None)
    if measure is None:
        raise ValueError(f"measure {reading.shown(part.measure)} is none of this sweep's")
    if not 0 < len(part.items) == len(set(part.items)) == len(part.scores):
        raise ValueError(f"it has {len(part.scores)} scores of {len(set(part.items))} items")
    if min(part.items) < 0 or max(part.items) >= measure.n:
        raise ValueError(f"it has items outside 0 to {measure.n - 1}")
    if max(map(abs, part.scores)) > MOST or not 0 <= part.seconds <= MOST:
        raise ValueError("it has a score or a time that nothing has")
    if part.answers or part.targets:
        if not len(part.answers) == len(part.targets) == len(part.items):
            raise ValueError(f"it has answers to {len(part.answers)} of {len(part.items)} questions")
        if not all(
            0 <= t < len(a) and max(map(abs, a)) <= MOST for t, a in zip(part.targets, part.answers, strict=True)
        ):
            raise ValueError("it has an answer that no question offers")


def part_of(record: dict[str, Any]) -> SweepPart:
    """A line that says what a shard is part of. Raises ValueError."""
    measures = reading.typed(record.get("measures"), tuple[Any, ...], "measures")
    if not all(isinstance(each, dict) for each in measures):
        raise ValueError("a measure is no record")
    return reading.build(SweepPart, record | {"measures": [reading.build(PartMeasure, each) for each in measures]})


class CachedScores:
    """Scores of one measure under any loop, computed in slices where the journal has none."""

    def __init__(self, llm: LoopedLlama, measure: Measure, journal: Journal, progress: Progress, total: float) -> None:
        """total: the plain runs that will be asked for, for the progress."""
        self._llm, self._measure, self._journal = llm, measure, journal
        self._progress, self._total = progress, total
        self._known: dict[str, dict[int, float]] = {}
        self._asked: dict[str, set[int]] = {}
        self._answers: dict[str, dict[int, tuple[float, ...]]] = {}
        self._targets: dict[int, int] = {}
        self.seconds: dict[str, float] = {}
        self._work = 0.0  # wanted so far
        self._slice = {i: number for number, items in enumerate(measure.slices()) for i in items}
        for record in journal.records:
            if record.get("measure") == measure.name:
                name = record["loop"]
                self._known.setdefault(name, {}).update(zip(record["items"], record["scores"], strict=True))
                self._keep_answers(name, record["items"], record.get("answers", ()), record.get("targets", ()))
                self.seconds[name] = self.seconds.get(name, 0.0) + record["seconds"]

    def of(self, loop: LoopSpec | None, items: Iterable[int], stage: str) -> Values:
        """The scores of a loop, or of the plain model, on these items."""
        name = loop_text(loop)
        items = [int(i) for i in items]
        missing = self._ask(name, loop, items)
        if missing:
            self._llm.set_loop(loop)
        size = 1
        while missing:
            self._tell(stage, name)
            cut = self._end(missing, size)
            part, missing = missing[:cut], missing[cut:]
            start = time.perf_counter()
            if isinstance(self._measure, TaskMeasure):
                asked = self._measure.asked(self._llm, part)
                self._add(name, loop, part, [each.right for each in asked], time.perf_counter() - start, asked)
            else:
                self._add(name, loop, part, self._measure.score(self._llm, part), time.perf_counter() - start)
            seconds = time.perf_counter() - start
            size = max(4, int(len(part) * SLICE_SECONDS / max(seconds, 1e-3)))
        return self._values(name, items)

    def of_each(self, loops: Mapping[str, LoopSpec], items: Iterable[int], stage: str) -> dict[str, Values]:
        """The scores of these loops on these items; plain's are known afterwards as well."""
        items = [int(i) for i in items]
        if not isinstance(self._measure, TextMeasure):
            self.of(None, items, stage)
            return {name: self.of(loop, items, stage) for name, loop in loops.items()}
        named: dict[str, LoopSpec | None] = {PLAIN: None, **loops}
        missing = {name: set(self._ask(name, loop, items)) for name, loop in named.items()}
        waiting = [(i, lacks) for i in items if (lacks := [name for name in named if i in missing[name]])]
        size = 1
        while waiting:
            lacks = waiting[0][1]
            part = [i for i, some in waiting if some == lacks][:size]
            waiting = [(i, some) for i, some in waiting if i not in part]
            self._tell(stage, f"{len(lacks)} loops" if len(lacks) > 2 else lacks[-1])
            start = time.perf_counter()
            for name, (values, seconds) in self._measure.score_each(
                self._llm, {name: named[name] for name in lacks}, part
            ).items():
                self._add(name, named[name], part, values, seconds)
            size = max(1, int(len(part) * SLICE_SECONDS / max(time.perf_counter() - start, 1e-3)))
        return {name: self._values(name, items) for name in loops}

    def _ask(self, name: str, loop: LoopSpec | None, items: Sequence[int]) -> list[int]:
        """Those of the items that have no score yet."""
        known, asked = self._known.setdefault(name, {}), self._asked.setdefault(name, set())
        missing = [i for i in items if i not in known]
        self._work += self._cost(loop) * (len(set(items) - asked) - len(missing))
        asked.update(items)
        return missing

    def _tell(self, stage: str, name: str) -> None:
        self._progress(Step(f"{self._measure.name}: {stage} {name}", min(self._work, self._total), self._total))

    def _add(
        self, name: str, loop: LoopSpec | None, items: Sequence[int], values: Sequence[float], seconds: float,
        asked: Sequence[Item] = (),
    ) -> None:  # fmt: skip
        record: dict[str, Any] = {"measure": self._measure.name, "loop": name, "items": items, "scores": values,
                  "seconds": round(seconds, 4)}  # fmt: skip
        if asked and all(each.target is not None and np.isfinite(each.answers).all() for each in asked):
            record |= {"answers": [each.answers for each in asked], "targets": [each.target for each in asked]}
            self._keep_answers(name, items, record["answers"], record["targets"])
        self._journal.add(record)
        self._known[name].update(zip(items, values, strict=True))
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._work += self._cost(loop) * len(items)

    def _keep_answers(
        self, name: str, items: Sequence[int], answers: Sequence[Sequence[float]], targets: Sequence[int]
    ) -> None:
        known = self._answers.setdefault(name, {})
        for i, some, target in zip(items, answers, targets, strict=bool(answers)):
            known[i], self._targets[i] = tuple(some), target

    def choice_gains(self, names: Sequence[str], items: Sequence[int]) -> dict[str, float] | None:
        """What each loop gained in choice log-probability on these questions, in nats.

        At the temperature that fits plain's on them; None where not all of them offer answers. What else is known, of a
        run that was stopped or of questions that judge, has no part in it.
        """
        if not all(i in self._answers.get(name, {}) for name in (PLAIN, *names) for i in items):
            return None
        gold = [self._targets[i] for i in items]
        plain = [self._answers[PLAIN][i] for i in items]
        temperature = fit_temperature(plain, gold)
        base = choice_log_probability(plain, gold, temperature)
        return {
            name: float(np.mean(choice_log_probability([self._answers[name][i] for i in items], gold, temperature)
                                - base))
            for name in names
        }  # fmt: skip

    def _values(self, name: str, items: Sequence[int]) -> Values:
        return np.array([self._known[name][i] for i in items])

    def _cost(self, loop: LoopSpec | None) -> float:
        """Of an item, in plain runs over all of them."""
        return (1.0 if loop is None else loop.relative_cost(self._llm.n_layer())) / self._measure.n

    def _end(self, items: Sequence[int], least: int) -> int:
        """Where to cut items, after so many or more: a slice stays together, and scores what it does in any cut."""
        if least >= len(items):
            return len(items)
        last = self._slice[items[least - 1]]
        return next((i for i in range(least, len(items)) if self._slice[items[i]] != last), len(items))

    def questions(self, loop: LoopSpec | None, items: Sequence[int]) -> list[Item]:
        """What is known of these items, which have been scored; without answers where a question offers none."""
        from ggufloop.measure.tasks import Item

        name = loop_text(loop)
        answers, found = self._answers.get(name, {}), []
        for i in items:
            mine, right = answers.get(i, ()), self._known[name][i]
            target = self._targets[i] if mine else None
            gold = None if target is None else mine[target]
            found.append(Item(self._measure.name, i, right, gold, mine, target))
        return found

    def items_of(self, loop: LoopSpec) -> list[int]:
        """The items it was scored on."""
        return sorted(self._known[loop_text(loop)])

    def items_scored(self) -> dict[str, int]:
        """How many items each loop was scored on, plain among them."""
        return {name: len(known) for name, known in self._known.items()}


def sweep(
    llm: LoopedLlama,
    loops: Sequence[LoopSpec],
    measure: Measure,
    journal: Journal,
    *,
    seed: int = 0,
    finalists: int = FINALISTS,
    racing: bool = True,
    worth: float = WORTH,
    level: float = LEVEL,
    looks: int = 1,
    floor: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Score the loops against plain on the items of `measure` as `selection.decide` asks, and decide.

    journal: with a header that names all this depends on. looks: how many at growing n were planned, which share
    `level`. floor: score the leading loop again with its damping moved. progress: is told after the first items how
    likely each verdict is. The loop in force is the old one afterwards.
    Raises GgufloopError for fewer than 4 items, UsageError as `decide` does.
    """
    check_enough(measure)
    n_layer, n = llm.n_layer(), measure.n
    by_name = {str(loop): loop for loop in loops}
    this = Look(measure.name, n, seed, worth, tuple(by_name))
    look = this.number(journal)
    costs = {name: loop.relative_cost(n_layer) for name, loop in by_name.items()}
    planned = planned_cost(len(loops), n, finalists, racing, measure.least) * float(np.mean(list(costs.values()))) / n
    scores = CachedScores(llm, measure, journal, progress, 1 + planned)
    before = llm.loop

    def gains(names: Sequence[str], items: Iterable[int], stage: str) -> dict[str, Values]:
        found = scores.of_each({name: by_name[name] for name in names}, items, stage)
        plain = scores.of(None, items, stage)
        return {name: values - plain for name, values in found.items()}

    try:
        now = adjusted_level(level, look, looks)
        steps = decide(list(by_name), n, seed, finalists=finalists, racing=racing, least=measure.least, worth=worth,
                       level=now, places=measure.places)  # fmt: skip
        try:
            request = next(steps)
            if n >= LEAST_ITEMS:
                few = request.items if len(request.items) < n else _some(measure, seed)
                few = _in_order(measure, few)
                pilot = list(gains(request.names, few, "pilot").values())
                note(progress, outlook(measure, few, pilot, worth, now / len(loops)))
            seen: list[int] = []
            while True:
                answer = gains(request.names, request.items, request.stage)
                seen += request.items.tolist()
                request = steps.send(RaceAnswer(answer, scores.choice_gains(request.names, seen)))
        except StopIteration as e:
            decision: Decision = e.value
        plain = scores.of(None, range(n), PLAIN)  # of items that no loop needed any more, too
        counts, seconds = scores.items_scored(), dict(scores.seconds)
        again = _floor(scores, [by_name[c.name] for c in decision.loops]) if floor else None
    finally:
        llm.set_loop(before)
    this.keep(journal)
    outcome = Outcome(
        measure,
        decision,
        float(plain.mean()),
        Cost(
            spent=1 + sum(costs[name] * counts[name] for name in by_name) / n,
            alone=sum(1 + cost for cost in costs.values()),
            seconds=sum(seconds.get(name, 0.0) for name in (PLAIN, *by_name)),
            plain_seconds=seconds[PLAIN],
        ),
        look,
        looks,
        again,
    )
    said = json.loads(reading.line(reading.finite(outcome.said())))
    if said != next((r for r in reversed(journal.records) if r.get("said") == measure.name), None):
        journal.add(said)
    return outcome


def _floor(scores: CachedScores, leading: Sequence[LoopSpec]) -> SweepFloor | None:
    """Of the first of these loops that has a damping to move; None if none has."""
    for loop in leading:
        try:
            other = nudged(loop)
        except UsageError:
            continue
        items = scores.items_of(loop)
        return SweepFloor(str(loop), noise_floor(*(scores.of(each, items, "noise floor,") for each in (loop, other))))
    return None


def score_all(
    llm: LoopedLlama,
    loops: Sequence[LoopSpec],
    measure: Measure,
    journal: Journal,
    items: Sequence[int],
    progress: Progress = silent,
) -> None:
    """Score plain and every loop on these items, and decide nothing: a shard's part. The loop in force is another
    afterwards."""
    share = len(items) / max(measure.n, 1)
    total = share * (1 + sum(loop.relative_cost(llm.n_layer()) for loop in loops))
    scores = CachedScores(llm, measure, journal, progress, total)
    scores.of_each({str(loop): loop for loop in loops}, items, "shard")


def _some(measure: Measure, seed: int) -> NDArray[np.intp]:
    """Items for a pilot, of slices drawn at random."""
    slices, found = measure.slices(), list[int]()
    for i in np.random.default_rng(seed).permutation(len(slices)):
        found += slices[i]
        if len(found) >= min(4 * measure.least, measure.n):
            break
    return np.array(found, dtype=np.intp)


def _in_order(measure: Measure, items: NDArray[np.intp]) -> NDArray[np.intp]:
    """The items in the order of their texts."""
    places = measure.places
    return np.array(sorted(items.tolist(), key=lambda i: i if places is None else places[i]), dtype=np.intp)


def outlook(
    measure: Measure, items: Sequence[int] | NDArray[np.intp], pilot: Sequence[Values], worth: float, level: float,
    n: int | None = None,
) -> str:  # fmt: skip
    """How likely the verdicts on one loop are, in words, from the gains of loops on some `items` in their order. n: of
    items that will judge it, all if None."""
    documents = None if measure.places is None else [measure.places[i][0] for i in items]
    n = n or measure.n
    found = forecast(pilot, n, worth, documents=documents, level=level)
    if not found:
        return f"{measure.name}: no loop differs from plain on a pilot of {len(items)} {measure.item}s."
    hurts, half_hurts, none, half_helps, helps = found
    return (
        f"{measure.name}: by a pilot of {len(items)}, {n} {measure.item}s would show that a loop helps in "
        f"{_percent(helps.helps)} of runs if it gains {worth:g}, in {_percent(half_helps.helps)} if {worth / 2:g}; "
        f"that it hurts in {_percent(hurts.hurts)} and {_percent(half_hurts.hurts)} if it loses as much; that it has "
        f"{SAME} {worth:g} in {_percent(none.same)} if it has none."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def registered(measures: Sequence[Measure], worth: float, looks: int = 1) -> dict[str, Any]:
    """For a journal's header, written before the first score: what will decide, and by what; anyone can read it."""
    return {"primary": measures[0].name, "unit": measures[0].unit, "worth": worth, "level": LEVEL, "looks": looks,
            "secondary": [m.name for m in measures[1:]]}  # fmt: skip


def items_within(
    seconds: float,
    per_item: float,
    loops: Sequence[LoopSpec],
    n_layer: int,
    measure: Measure,
    finalists: int = FINALISTS,
    racing: bool = True,
) -> int:
    """The most items of `measure` that a sweep gets through in so many seconds.

    per_item: seconds the plain model takes for one. Raises UsageError if they are fewer than twice what a race begins
    with, naming the time that these take.
    """
    mean = float(np.mean([loop.relative_cost(n_layer) for loop in loops]))

    def needs(n: int) -> float:
        return per_item * (n + mean * planned_cost(len(loops), n, finalists, racing, measure.least))

    low, high = min(2 * measure.least, measure.n), measure.n
    if needs(low) > seconds:
        raise UsageError(
            f"{low} {measure.item}s of {measure.name} take {duration(needs(low))}, and the budget is "
            f"{duration(seconds)}.", "give that much, or fewer loops.")  # fmt: skip
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= seconds else (low, middle - 1)
    return low
