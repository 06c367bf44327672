"""Tasks of lm-eval on a model file, from its path to what is said of them: what `ggufloop eval` prints.

    plan = EvalPlan(("mmlu_dev", "brackets"), limit=100, paired=True)
    found = run_eval(path, LoopSpec((12, 16), k=3), plan, out=Path("results"))
    found.runs["plain"].items["brackets"], found.compared["brackets"].verdict

Every answer is in a journal when the next slice begins, and the same call goes on from there. Without `out` it lies in
the cache until the run is done. A shard answers its part of the questions and leaves the rest to `merge`, or to a run
by itself with the same `out`, which finds the answers of the shards there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop import reading
from ggufloop.backend import library
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import UsageError
from ggufloop.files import cache_dir, file_sha256
from ggufloop.loop import LoopSpec, loop_text
from ggufloop.measure.endpoints import NoiseFloor, nudged
from ggufloop.measure.eval_journal import KIND, SCHEMA_VERSION, Started, device_of, open_journal, registered
from ggufloop.measure.multiple_choice import SEQUENCES
from ggufloop.measure.slices import Answers, Shard, ShardDone, docs_of, file_name, sizes_of, slices_of
from ggufloop.measure.tasks import SEED, Comparison, Run, compare, evaluate, noise_between
from ggufloop.models.info import describe
from ggufloop.opening import check_loops, open_model
from ggufloop.progress import Progress, named, note, silent
from ggufloop.tasks.loading import Tasks, load_tasks

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama


@dataclass(frozen=True)
class EvalPlan:
    """What is asked.

    names         tasks, groups or tags of lm-eval, or files; limit: only the first questions of each task; drawn: so
                  many of each name, at random, always the same
    num_fewshot   worked examples before each question; None: as many as the task has it
    chat          ask in the model's chat template; template: what that is rendered with (`template.arguments_for`)
    paired        run the plain model too, and compare
    floor         and the loop again with its damping moved by `endpoints.NUDGE`
    offline       download no questions
    include_path  a folder of more of lm-eval's tasks

    Raises UsageError for a floor without a comparison, and for a limit of what is drawn.
    """

    names: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    paired: bool = False
    floor: bool = False
    offline: bool = False
    drawn: int | None = None
    include_path: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.floor and not self.paired:
            raise UsageError("--noise-floor is of a comparison.", "give --paired as well.")
        if self.limit is not None and self.drawn is not None:
            raise UsageError("--limit takes the first questions, --sample draws from all.", "give one of them.")

    def load(self, progress: Progress = silent) -> Tasks:
        """Its tasks, their questions read. Raises UsageError and GgufloopError as `load_tasks` does."""
        return load_tasks(self.names, self.offline, self.num_fewshot, progress, self.include_path)

    def loops(self, loop: LoopSpec | None) -> list[LoopSpec | None]:
        """What is run, in this order. Raises UsageError if a comparison has no loop."""
        if not self.paired:
            return [loop]
        if loop is None:
            raise UsageError(
                "--paired compares a loop with the plain model, and no loop is given.", "give --window A:B."
            )
        if not loop.is_loop:
            raise UsageError(f"the loop {loop} is one evaluation, the plain model.", "give --K 2 or more.")
        return [None, loop, nudged(loop)] if self.floor else [None, loop]


@dataclass(frozen=True)
class EvalResult:
    """header: the first line of the journal. runs: by loop, in their order; compared, noise: by task, if paired.
    available: questions of each name that was asked for."""

    header: dict[str, Any]
    runs: dict[str, Run]
    compared: dict[str, Comparison] = field(default_factory=dict)
    noise: dict[str, NoiseFloor] = field(default_factory=dict)
    available: dict[str, int] = field(default_factory=dict)


def run_eval(
    path: Path,
    loop: LoopSpec | None,
    plan: EvalPlan,
    out: Path | None = None,
    settings: ContextSettings | None = None,
    *,
    tasks: Tasks | None = None,
    shard: Shard | None = None,
    verbose: bool = False,
    progress: Progress = silent,
) -> EvalResult | ShardDone:
    """Ask a model file the tasks, under a loop, the plain model or both.

    out: the journal is kept in out/MODEL. tasks: those of the plan, if they are loaded already. shard: do only this
    part. Raises UsageError, GgufloopError and BackendError; KeyboardInterrupt leaves in the journal what is done.
    """
    loops = plan.loops(loop)
    shard = None if shard is None or shard.of == 1 else shard
    if shard is not None and out is None:
        raise UsageError(f"shard {shard} keeps its part for a merge, and no folder is given.", "give --out DIR.")
    settings = replace(settings or ContextSettings(), n_seq=SEQUENCES)
    check_loops(path, loops)
    tasks = tasks or plan.load(progress)
    slices = slices_of(tasks, plan.limit, plan.drawn)
    settings.check_memory([path], loops)
    header = header_of(path, plan, tasks, settings, shard)
    target = journal_path(path, header, out, shard)
    mine = slices if shard is None else shard.share(slices)
    with open_journal(target, header, slices) as kept:
        if kept.dropped:
            note(progress, kept.dropped)
        if shard is None:
            kept.take_over(target, header, slices, progress)
        llm = open_model(path, settings, verbose=verbose, progress=progress)
        try:
            started = Started(tuple(map(loop_text, loops)), plan.paired, device_of(llm), settings.threads)
            note_devices([*kept.devices, started.device], progress)
            kept.begin(started)
            docs = None if shard is None and plan.drawn is None else docs_of(mine)
            runs = _ask_all(llm, loops, tasks, plan, kept.answers, docs, progress) if mine else {}
        finally:
            llm.close()
    if shard is not None:
        return ShardDone(shard, len(mine), len(slices), target)
    if out is None:
        target.unlink(missing_ok=True)
    return concluded(header, runs, plan.paired, tasks, progress)


def concluded(
    header: dict[str, Any], runs: dict[str, Run], paired: bool, tasks: Tasks, progress: Progress = silent
) -> EvalResult:
    """What is said of the runs; where there is nothing to compare, a note says so."""
    compared: dict[str, Comparison] = {}
    noise: dict[str, NoiseFloor] = {}
    if paired:
        plain, looped, *again = runs.values()
        for name, items in plain.items.items():
            if len(items) < 2:
                note(progress, f"{name} has {len(items)} questions that are right or wrong: nothing to compare.")
            else:
                compared[name] = compare(items, looped.items[name])
        noise = {name: noise_between(looped.items[name], run.items[name]) for run in again for name in compared}
    sizes = tasks.sizes()
    available = {name: sum(sizes[task] for task in members) for name, members in tasks.members.items()}
    return EvalResult(header, runs, compared, noise, available)


def note_devices(devices: Sequence[str], progress: Progress) -> None:
    """Say so if not all was computed on the same."""
    different = list(dict.fromkeys(devices))
    if len(different) > 1:
        note(
            progress,
            f"not all of this was computed on the same device: {'; '.join(different)}. They round differently.",
        )


def header_of(
    path: Path, plan: EvalPlan, tasks: Tasks, settings: ContextSettings, shard: Shard | None
) -> dict[str, Any]:
    """The first line of a journal: what its answers are of, and what will decide."""
    sizes, versions, groups = tasks.sizes(), tasks.versions(), sizes_of(tasks)
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "model": path.name,
        "model_sha256": file_sha256(path),
        "n_layer": describe(path).n_layer,
        "patch_id": library.activate().patch_id,
        "settings": {"n_ctx": settings.context(path), "type_k": settings.type_k, "type_v": settings.type_v,
                     "flash_attn": settings.uses_flash(path), "batch_size": settings.n_batch,
                     "ubatch_size": settings.n_ubatch, **settings.kernels},
        "names": list(plan.names),
        **({} if plan.include_path is None else {"include_path": plan.include_path}),
        "limit": plan.limit,
        "drawn": plan.drawn,
        "num_fewshot": plan.num_fewshot,
        "chat_template": plan.chat,
        **({} if not plan.template else {"chat_template_kwargs": dict(plan.template)}),
        "served": tasks.served,
        "seed": SEED,
        "tasks": {name: {"version": versions[name], "n": min(n, plan.limit or n), "slice": groups[name]}
                  for name, n in sizes.items()},
        **registered(),
        "shard": None if shard is None else str(shard),
    }  # fmt: skip


def journal_path(path: Path, header: Mapping[str, Any], out: Path | None, shard: Shard | None = None) -> Path:
    """Where the answers of a model are kept: without a folder in the cache, under what they are of."""
    if out is not None:
        return out / path.stem / file_name(KIND, shard)
    return cache_dir() / "eval" / f"{path.stem}-{hashlib.sha256(reading.line(header)).hexdigest()[:16]}.jsonl"


def _ask_all(
    llm: LoopedLlama, loops: Sequence[LoopSpec | None], tasks: Tasks, plan: EvalPlan, answers: Answers,
    docs: Mapping[str, list[int]] | None, progress: Progress,
) -> dict[str, Run]:  # fmt: skip
    """A run under each loop. docs: the questions of a shard, None for all."""
    limit, found = plan.limit if docs is None else None, {}
    for loop in loops:
        llm.set_loop(loop)
        found[loop_text(loop)] = evaluate(llm, tasks, limit, plan.chat, named(progress, loop_text(loop)), docs, answers,
                                          plan.template)  # fmt: skip
    return found
