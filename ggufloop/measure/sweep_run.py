"""A sweep of a model file, from its path to the verdict: what `ggufloop sweep` prints.

    plan = SweepPlan(text=local("pydoc"), chunks=120, budget="30m")
    found = run_sweep(path, windows([8, 10, 12], [4], n_layer=30, k=(2, 3)), plan, Path("sweep.jsonl"))
    print(sweep_report.text(found))

Every score is kept in the journal; the same call goes on from there. A measure of several gets its share of the level.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop import reading
from ggufloop.backend import library
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import file_sha256
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import Text
from ggufloop.measure.eval_journal import device_of
from ggufloop.measure.eval_run import note_devices
from ggufloop.measure.items import Measure, TaskMeasure, TextMeasure
from ggufloop.measure.journal import Journal, beside
from ggufloop.measure.multiple_choice import SEQUENCES
from ggufloop.measure.selection import FINALISTS
from ggufloop.measure.slices import Shard, ShardDone
from ggufloop.measure.sweep import (
    Outcome,
    PartMeasure,
    SweepPart,
    check_record,
    items_within,
    registered,
    score_all,
    sweep,
    take_scores,
)
from ggufloop.measure.verdict import HURTS, LEVEL, WORTHS
from ggufloop.models.registry import save_loop
from ggufloop.opening import check_loops, open_model
from ggufloop.progress import Progress, note, silent
from ggufloop.tasks.loading import load_tasks
from ggufloop.tasks.own import task_name

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

SCHEMA_VERSION = 1
CONTEXT, TASK_CONTEXT = 512, 2048
SEED = 1234


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep measures and how it decides.

    text           its chunks of `chunk` tokens, the first `chunks` of them; tasks: of lm-eval, one verdict for each
    limit          questions of each task; chat: asked in the model's chat template, template: with these arguments
    budget         as many items as fit into this time: 90s, 30m, 2h
    racing         drop the worse loops early; finalists: loops it leaves for the last items
    worth          the smallest gain that would matter, None: `verdict.WORTHS` of each measure's unit
    looks          decisions planned as items grow in number, which share the level; seed: of their random order
    floor          score the leading loop once more with its damping moved by 1e-5, to see what is the arithmetic's
    pooled         take the questions of all tasks together, for one verdict
    offline        download no questions; include_path: a folder of more of lm-eval's tasks

    Raises UsageError if there is nothing to measure, or for a worth or looks not above 0.
    """

    text: Text | None = None
    tasks: tuple[str, ...] = ()
    chunk: int = CONTEXT
    chunks: int | None = None
    limit: int | None = None
    chat: bool = False
    budget: str | None = None
    racing: bool = True
    worth: float | None = None
    looks: int = 1
    finalists: int = FINALISTS
    seed: int = SEED
    floor: bool = False
    pooled: bool = False
    offline: bool = False
    include_path: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text is None and not self.tasks:
            raise UsageError("nothing to measure is given.", "give --text FILE (or pydoc), --tasks NAME, or both.")
        if len(set(self.tasks)) < len(self.tasks):
            raise UsageError(f"a task is named twice in {','.join(self.tasks)}.", "name each once.")
        if self.worth is not None and not 0 < self.worth < math.inf:
            raise UsageError(f"worth {self.worth:g} is not a finite number above 0.",
                             "use the smallest gain that would matter.")  # fmt: skip
        if self.looks < 1:
            raise UsageError(f"{self.looks} looks decide nothing.", "plan 1 at least.")
        if self.budget is not None:
            seconds(self.budget)

    def worth_of(self, measure: Measure) -> float:
        """The smallest gain that would matter in its unit."""
        return WORTHS[measure.unit] if self.worth is None else self.worth

    @property
    def context(self) -> int:
        """Tokens of context its items need."""
        return max(self.chunk if self.text is not None else 0, TASK_CONTEXT if self.tasks else 0)


@dataclass(frozen=True)
class SweepResult:
    """header: what the journal is of. costs: of each loop, in plain runs by layer count."""

    path: Path
    loops: tuple[LoopSpec, ...]
    seed: int
    header: dict[str, Any]
    costs: dict[str, float]
    outcomes: tuple[Outcome, ...]


def seconds(text: str) -> float:
    """A time such as 90s, 30m, 2h, or plain minutes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--budget {text!r} is no time.", "write it like 90s, 30m or 2h.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 60}[match[2]]


def run_sweep(
    path: Path,
    loops: Sequence[LoopSpec],
    plan: SweepPlan,
    journal: Path | None = None,
    settings: ContextSettings | None = None,
    *,
    verbose: bool = False,
    progress: Progress = silent,
) -> SweepResult:
    """Score the loops against the plain model on what is planned, and decide.

    journal: sweep-MODEL.jsonl in the current folder if nothing is said. settings: n_ctx is the plan's. Raises
    UsageError, GgufloopError and BackendError; KeyboardInterrupt leaves what is done in the journal.
    """
    with opened_sweep(path, loops, plan, journal_path(path, journal), settings, None, verbose, progress) as opened:
        llm, measures, kept, header = opened
        _keep_budget(llm, loops, measures, plan, kept)
        outcomes = [
            sweep(llm, loops, measure, kept, seed=plan.seed, finalists=plan.finalists, racing=plan.racing,
                  worth=plan.worth_of(measure), level=LEVEL / len(measures), looks=plan.looks, floor=plan.floor,
                  progress=progress)
            for measure in measures
        ]  # fmt: skip
        costs = {str(loop): loop.relative_cost(llm.n_layer()) for loop in loops}
    return SweepResult(path, tuple(loops), plan.seed, header, costs, tuple(outcomes))


def run_shard(
    path: Path,
    loops: Sequence[LoopSpec],
    plan: SweepPlan,
    shard: Shard,
    journal: Path,
    settings: ContextSettings | None = None,
    *,
    verbose: bool = False,
    progress: Progress = silent,
) -> ShardDone:
    """Score a part of the items under every loop; `sweep_merge` decides. Nothing is dropped before that: a race would
    have to wait for all shards at every round. Raises as `run_sweep`, and UsageError for a budget."""
    if plan.budget is not None:
        raise UsageError("--budget times this machine, and shards must agree on the items.",
                         "give --chunks or --limit; --plan says how long they take.")  # fmt: skip
    if plan.floor:
        raise UsageError("--noise-floor is of the loop that leads, which shards do not know.",
                         "run the merged sweep's best loop again without shards.")  # fmt: skip
    with opened_sweep(path, loops, plan, journal, settings, shard, verbose, progress) as opened:
        llm, measures, kept, _ = opened
        part = asdict(SweepPart(str(shard), tuple(map(str, loops)), plan.seed, tuple(map(plan.worth_of, measures)),
                           plan.looks, llm.n_layer(), device_of(llm), tuple(map(_measured, measures))))  # fmt: skip
        if [r for r in kept.records if "part" in r][-1:] != [json.loads(reading.line(part))]:
            kept.add(part)
        done = total = 0
        for measure in measures:
            slices = measure.slices()
            mine = shard.share(slices)
            score_all(llm, loops, measure, kept, [i for some in mine for i in some], progress)
            done, total = done + len(mine), total + len(slices)
    return ShardDone(shard, done, total, journal, "shards do not race: every loop is scored on all items.")


def _measured(m: Measure) -> PartMeasure:
    chunks, slices = (tuple(m.chunks), None) if isinstance(m, TextMeasure) else (None, tuple(map(len, m.slices())))
    return PartMeasure(m.name, m.item, m.unit, m.least, m.n, m.available, chunks, slices)


@contextmanager
def opened_sweep(
    path: Path, loops: Sequence[LoopSpec], plan: SweepPlan, target: Path, settings: ContextSettings | None,
    shard: Shard | None, verbose: bool, progress: Progress,
) -> Iterator[tuple[LoopedLlama, list[Measure], Journal, dict[str, Any]]]:  # fmt: skip
    """The model, what is measured, the open journal and its header. Raises as `run_sweep`."""
    settings = replace(settings or ContextSettings(n_ctx=plan.context), n_seq=SEQUENCES if plan.tasks else 1)
    check_loops(path, loops)
    settings.check_memory([path], loops)
    patch_id = library.activate().patch_id
    together = [plan.tasks] if plan.pooled and plan.tasks else [(name,) for name in plan.tasks]
    tasks = [(",".join(map(task_name, names)), load_tasks(names, plan.offline, None, progress, plan.include_path))
             for names in together]  # fmt: skip
    llm = open_model(path, settings, verbose=verbose, progress=progress)
    try:
        measures: list[Measure] = [TaskMeasure(*each, plan.limit, plan.chat, plan.template) for each in tasks]
        if plan.text is not None:
            measures.insert(0, TextMeasure(llm, plan.text, plan.chunk, plan.chunks))
        header: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": path.name,
            "model_sha256": file_sha256(path),
            "patch_id": patch_id,
            "settings": {"type_k": settings.type_k, "type_v": settings.type_v,
                         "flash_attn": settings.uses_flash(path), "batch_size": settings.n_batch,
                         "ubatch_size": settings.n_ubatch, **settings.kernels},
            "measures": [m.identity() for m in measures],
            **registered(measures, plan.worth_of(measures[0]), plan.looks),
            **({} if shard is None else {"shard": str(shard), "racing": False}),
        }  # fmt: skip
        with Journal.open(target, header, partial(check_record, measures)) as kept:
            if kept.dropped:
                note(progress, kept.dropped)
            if shard is None:
                note_devices([*_take_over(kept, header, measures, progress), device_of(llm)], progress)
            yield llm, measures, kept, header
    finally:
        llm.close()


def _take_over(
    journal: Journal, header: Mapping[str, Any], measures: Sequence[Measure], progress: Progress
) -> list[str]:
    """Take the scores of shards whose journals lie beside this one; their devices. Raises GgufloopError for a damaged
    one."""
    devices = []
    for shard in beside(journal.path, header, progress):
        records = Journal.lines(shard, partial(check_record, measures), "journal of a sweep")[1:]
        take_scores(journal, records)
        devices += [str(record["device"]) for record in records if "part" in record]
    return devices


def journal_path(path: Path, given: Path | None) -> Path:
    """Where the scores of a sweep of this model are kept."""
    return given or Path(f"sweep-{path.stem}.jsonl")


def _keep_budget(
    llm: LoopedLlama, loops: Sequence[LoopSpec], measures: Sequence[Measure], plan: SweepPlan, journal: Journal
) -> None:
    """Lower each measure's n to what the budget allows, by timing the plain model on a few items; timed once."""
    if plan.budget is None:
        return
    kept = next((r["items"] for r in journal.records if r.get("budget") == plan.budget), None)
    for measure, n in zip(measures, kept or [0] * len(measures), strict=True):
        share = seconds(plan.budget) / len(measures)
        measure.n = n or items_within(share, _per_item(llm, measure), loops, llm.n_layer(), measure, racing=plan.racing)
    if kept is None:
        journal.add({"budget": plan.budget, "items": [m.n for m in measures]})


def _per_item(llm: LoopedLlama, measure: Measure) -> float:
    """Seconds the plain model takes for an item."""
    few = list(range(min(4, measure.n)))
    measure.score(llm, few[:1])  # the first is slower
    begun = time.perf_counter()
    measure.score(llm, few)
    return (time.perf_counter() - begun) / len(few)


def save_winner(path: Path, loops: Iterable[LoopSpec], outcomes: Sequence[Outcome]) -> str:
    """Write the loop that the last measure with a winner found to help into the user's models.toml, and say so.

    Raises GgufloopError where it hurts on another measure.
    """
    won = [o for o in outcomes if o.decision.winner is not None]
    if not won:
        return "no loop was shown to help, so none is saved."
    outcome = won[-1]
    name = outcome.decision.winner
    harmed = [o.measure.name for o in outcomes for c in o.decision.loops if c.name == name and c.verdict.word == HURTS]
    if harmed:
        raise GgufloopError(f"{name} helps on {outcome.measure.name} and hurts on {harmed[0]}: it is not saved.",
                            "choose with --tasks or --text alone.")  # fmt: skip
    best = next(c for c in outcome.decision.loops if c.name == name)
    origin = (f"sweep of {date.today()}: {best.verdict.phrase()}, {best.gain.show('+.4f')} {outcome.measure.item}s of "
              f"{outcome.measure.name}, the best of {len(outcome.decision.loops)}")  # fmt: skip
    where = save_loop(path, next(loop for loop in loops if str(loop) == name), origin)
    return f"saved {name} as --window auto of {path.name} in {where}."
