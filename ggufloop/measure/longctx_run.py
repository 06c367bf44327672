"""Long contexts from a model file to its table: what `ggufloop longctx` prints.

    plan = LongPlan(lengths=(1024, 2048), tasks=("niah_single_1", "vt"), n=50)
    cells = run_long_context(path, [LoopSpec((12, 16), 4)], plan, Path("longctx.jsonl"))
    print(table(cells).render("md"), notes(cells))

Every answer is kept in the journal; the same call goes on from there, also with more loops, lengths or samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ggufloop.backend import library
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import UsageError, nearest
from ggufloop.files import file_sha256
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import Text
from ggufloop.measure.journal import Journal, beside
from ggufloop.measure.longctx import CEILING, FLOOR, LengthCell, cells, check_record, long_context
from ggufloop.measure.verdict import HELPS, HURTS, UNSURE
from ggufloop.opening import check_loops, open_model
from ggufloop.progress import Progress, note, silent
from ggufloop.table import Cell, Table, columns
from ggufloop.tasks import ruler

SCHEMA_VERSION = 1
LENGTHS, SAMPLES, SEED = (1024, 2048, 4096), 50, 42


@dataclass(frozen=True)
class LongPlan:
    """What is asked: n samples of each task at each length in tokens. chat: in the model's chat template, rendered with
    `template`; prose: for tasks that hide needles in it.

    Raises UsageError for a task that is not known, a length given twice, or prose that is missing.
    """

    lengths: tuple[int, ...] = LENGTHS
    tasks: tuple[str, ...] = ruler.TASKS
    n: int = SAMPLES
    seed: int = SEED
    chat: bool = False
    prose: Text | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, given in (("length", self.lengths), ("task", self.tasks)):
            if not given:
                raise UsageError(f"no {what} is given.", "give one at least.")
            if len(set(given)) < len(given):
                raise UsageError(f"a {what} is given twice in {','.join(map(str, given))}.", "give each once.")
        for task in self.tasks:
            if task not in (*ruler.TASKS, *ruler.PROSE_TASKS):
                hint = nearest(task, (*ruler.TASKS, *ruler.PROSE_TASKS))
                raise UsageError(f"task {task!r} is not one of RULER's that are here.", hint)
            if task in ruler.PROSE_TASKS and self.prose is None:
                raise UsageError(f"{task} needs prose to hide needles in.", "give --text FILE.")


def run_long_context(
    path: Path,
    loops: Sequence[LoopSpec],
    plan: LongPlan,
    journal: Path | None = None,
    settings: ContextSettings | None = None,
    *,
    verbose: bool = False,
    progress: Progress = silent,
) -> list[LengthCell]:
    """Ask the plain model and each loop the same samples.

    journal: longctx-MODEL.jsonl in the current folder if nothing is said. settings: n_ctx is the longest length.
    Raises UsageError, GgufloopError and BackendError; KeyboardInterrupt leaves what is done in the journal.
    """
    settings = replace(settings or ContextSettings(), n_ctx=max(plan.lengths))
    check_loops(path, loops)
    settings.check_memory([path], loops)
    patch_id = library.activate().patch_id
    llm = open_model(path, settings, verbose=verbose, progress=progress)
    try:
        header = {
            "schema_version": SCHEMA_VERSION, "model": path.name, "model_sha256": file_sha256(path),
            "patch_id": patch_id, "seed": plan.seed, "chat_template": plan.chat,
            **({"chat_template_kwargs": dict(plan.template)} if plan.template else {}),
            "prose": plan.prose.name if plan.prose else None, "flash_attn": settings.uses_flash(path),
            "type_k": settings.type_k, "type_v": settings.type_v, **settings.kernels,
        }  # fmt: skip
        with Journal.open(journal_path(path, journal), header, check_record) as kept:
            if kept.dropped:
                note(progress, kept.dropped)
            _take_over(kept, header, progress)
            prose = plan.prose.text if plan.prose else ""
            return cells(long_context(llm, loops, plan.tasks, plan.lengths, plan.n, kept, seed=plan.seed,
                                      chat=plan.chat, arguments=plan.template, prose=prose,
                                      progress=progress))  # fmt: skip
    finally:
        llm.close()


def _take_over(journal: Journal, header: Mapping[str, Any], progress: Progress) -> None:
    """Take what is answered in journals of shards beside this one. Raises GgufloopError for a damaged one."""
    have = {(r["length"], r["task"], r["loop"], r["sample"]) for r in journal.records}
    for shard in beside(journal.path, header, progress):
        for r in Journal.lines(shard, check_record, "journal of long contexts")[1:]:
            if (r["length"], r["task"], r["loop"], r["sample"]) not in have:
                journal.add(r)
                journal.records.append(r)


def journal_path(path: Path, journal: Path | None) -> Path:
    """Where the answers of a model are kept."""
    return journal or Path(f"longctx-{path.stem}.jsonl")


COLUMNS = columns("length", "task", "loop", "n", "score:.3f", "low:.3f", "high:.3f", "gain:+.3f", "gain low:+.3f",
                  "gain high:+.3f", "plain is")  # fmt: skip


def table(found: Sequence[LengthCell]) -> Table:
    """A row per length, task and loop; gains over plain on the same samples, above 0 is better."""
    rows: list[list[Cell]] = []
    for c in found:
        gain: list[Cell] = [None] * 3 if c.gain is None else [c.gain.mean, c.gain.low, c.gain.high]
        where = "at the floor" if c.at_floor else "at the ceiling" if c.at_ceiling else None
        score = c.score
        rows.append([c.length, c.task, c.loop, score.n, score.mean, score.low, score.high, *gain, where])
    return Table(COLUMNS, rows)


def numbers(path: Path, found: Sequence[LengthCell]) -> Table:
    """The same for programs, with the model, what plain scores there, and the verdict that a row alone allows."""
    plain = {(c.length, c.task): c.score.mean for c in found if c.gain is None}
    rows: list[list[Cell]] = []
    for c, row in zip(found, table(found).rows, strict=True):
        word = None if c.gain is None else HELPS if c.gain.low > 0 else HURTS if c.gain.high < 0 else UNSURE
        rows.append([path.name, *row, plain.get((c.length, c.task)), word])
    return Table((*columns("model"), *columns("length", "task", "loop", "n", "score", "score low", "score high", "gain",
                                              "low", "high", "plain is", "plain", "verdict")), rows)  # fmt: skip


def notes(found: Sequence[LengthCell]) -> str:
    """What the table cannot show."""
    lines = ["Scores are RULER's, 0 to 1; intervals hold for each row alone."]
    if any(c.at_floor or c.at_ceiling for c in found):
        lines.append(f"Where plain is at the floor (below {FLOOR:g}) or the ceiling (above {CEILING:g}) a loop can "
                     "hardly gain or lose.")  # fmt: skip
    return "\n".join(lines)
