"""The steps of a protocol on a model file: what one takes, and measuring it.

    for step in protocol.steps_for("smollm2-135m"):
        scores += run_step(path, protocol, step, Path("results"))

Every step keeps its journals in a folder of its own, OUT/STEP, so a run may stop anywhere and go on; machines share it
by shards, and a run by itself takes over what shards have left there. What a step found is scores by item
(`scores.py`), which `protocol_report.py` judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ggufloop.backend.settings import ContextSettings
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.corpus import local
from ggufloop.measure.eval_run import EvalPlan, EvalResult, run_eval
from ggufloop.measure.longctx_run import run_long_context
from ggufloop.measure.planning import Planned, PlannedCell, cost, layers_of, plan_eval, plan_sweep
from ggufloop.measure.slices import Shard, ShardDone, file_name
from ggufloop.measure.sweep_run import SweepPlan, run_shard, run_sweep
from ggufloop.measure.workers import eval_by_workers, sweep_by_workers
from ggufloop.opening import check_loops
from ggufloop.progress import Progress, named, silent
from ggufloop.study import scores
from ggufloop.study.protocol import PRIMARY, Protocol, ProtocolStep, long_plan
from ggufloop.study.run import CHUNKS, StudyPlan, run_texts
from ggufloop.study.scores import Score


def _plans(task: str, step: ProtocolStep, specs: dict[str, LoopSpec], primary: str) -> list[tuple[LoopSpec, EvalPlan]]:
    return [(loop, EvalPlan((task,), paired=True, floor=name == primary, offline=True, drawn=step.sample))
            for name, loop in specs.items()]  # fmt: skip


def _sweep_plan(step: ProtocolStep, text: str, progress: Progress) -> SweepPlan:
    return SweepPlan(local(text, progress=progress), chunk=step.ctx_size, chunks=step.chunks, racing=False)


def _first(protocol: Protocol, step: ProtocolStep) -> str:
    """The loop that is run once more with its damping moved."""
    return next((name for name in step.loops if protocol.roles.get(name) == PRIMARY), "")


def plan_step(
    path: Path, protocol: Protocol, step: ProtocolStep, *, speed: float, part: bool = False, progress: Progress = silent
) -> list[Planned]:
    """What a step will take, at a speed of so many tokens per second. part: as `run_step` has it."""
    specs = protocol.specs(step, path)
    check_loops(path, list(specs.values()))
    found: list[Planned] = []
    for task in step.tasks:
        tasks = EvalPlan((task,), offline=True).load()
        for i, (loop, plan) in enumerate(_plans(task, step, specs, "" if part else _first(protocol, step))):
            planned = plan_eval(path, loop, plan, speed=speed, tasks=tasks, progress=progress)
            cells = [cell for cell in planned.cells if cell.loop != PLAIN or i == 0]  # plain is asked once,
            if not part:
                cells += [replace(cell, loop=scores.PLACEBO) for cell in cells if cell.loop == PLAIN]  # and so
            found.append(replace(planned, cells=tuple(cells)))
    if step.ruler or step.types:
        found.append(_by_length(path, step, specs, speed))
    for text in step.texts if not step.types else ():
        swept = _sweep_plan(step, text, progress)
        found.append(plan_sweep(path, list(specs.values()), swept, speed=speed, progress=progress))
    return found


def _by_length(path: Path, step: ProtocolStep, specs: dict[str, LoopSpec], speed: float) -> Planned:
    """Of what is so many times so many tokens: samples of RULER's at their lengths, and chunks of each file of a
    ladder, all as fast as this one."""
    if step.ruler:
        n = long_plan(step, step.ruler).n * len(step.ruler)
        sizes = {f"{scores.RULER} {length}": (n, length) for length in step.lengths}
    else:
        n = (step.chunks or CHUNKS) * (len(step.types) + 1)
        sizes = dict.fromkeys(step.texts, (n, step.ctx_size))
    layers, cells = layers_of(path), []
    for name, (items, size) in sizes.items():
        for loop, times in [(PLAIN, 1.0), *((str(spec), cost(spec, layers)) for spec in specs.values())]:
            cells.append(PlannedCell(name, loop, items, float(items * size), items * size * times))
    return Planned(tuple(cells), len(sizes), 1, speed, False, True, bool(step.ruler), False)


@dataclass(frozen=True)
class _Job:
    """A step of a model. part, shard, workers: as `run_step` has them."""

    path: Path
    protocol: Protocol
    step: ProtocolStep
    out: Path
    settings: ContextSettings
    part: bool
    shard: Shard | None
    workers: int
    progress: Progress

    @property
    def specs(self) -> dict[str, LoopSpec]:
        return self.protocol.specs(self.step, self.path)

    @property
    def names(self) -> dict[str, str]:
        return {str(loop): name for name, loop in self.specs.items()}

    def task(self, task: str) -> Iterator[Score]:
        """Questions, under every loop, and the placebo."""
        told, place, names = named(self.progress, task), self.out / task, self.names
        tasks = EvalPlan((task,), offline=True).load(told)
        asked: list[tuple[LoopSpec | None, EvalPlan, Path, ContextSettings, dict[str, str]]]
        asked = [(loop, plan, place, self.settings, names)
                 for loop, plan in _plans(task, self.step, self.specs,
                                          "" if self.part else _first(self.protocol, self.step))]  # fmt: skip
        if not self.part:
            other = replace(self.settings, flash_attn="off" if self.settings.uses_flash(self.path) else "on")
            asked.append((None, EvalPlan((task,), offline=True, drawn=self.step.sample),
                          place.with_name(f"{task}-placebo"), other, {PLAIN: scores.PLACEBO}))  # fmt: skip
        for loop, plan, where, how, called in asked:
            if self.workers > 1:
                done: EvalResult | ShardDone
                done = eval_by_workers(self.workers, self.path, loop, plan, where, how, progress=told)
            else:
                done = run_eval(self.path, loop, plan, where, how, tasks=tasks, shard=self.shard, progress=told)
            if isinstance(done, EvalResult):
                for score in scores.of_eval(self.path.name, done, called):
                    yield replace(score, measure=self.protocol.measure(self.step, task))

    def text(self, text: str) -> Iterator[Score]:
        """Chunks of a text, under every loop."""
        place, loops, told = self.out / text, list(self.specs.values()), named(self.progress, text)
        journal = place / self.path.stem / file_name("sweep", self.shard)
        journal.parent.mkdir(parents=True, exist_ok=True)
        plan, how = _sweep_plan(self.step, text, told), replace(self.settings, n_ctx=self.step.ctx_size)
        if self.shard is not None:
            run_shard(self.path, loops, plan, self.shard, journal, how, progress=told)
            return
        judged = (sweep_by_workers(self.workers, self.path, loops, plan, place, how, progress=told)
                  if self.workers > 1 else
                  run_sweep(self.path, loops, plan, journal, how, progress=told))  # fmt: skip
        yield from scores.of_sweep(self.path.name, judged, journal, self.names)

    def ladder(self) -> Iterator[Score]:
        """Chunks of the texts under every loop, of each file that is made of the model: a study of `compare`."""
        texts = [local(text, progress=self.progress) for text in self.step.texts]
        plan = StudyPlan(texts[0], self.step.types, self.step.ctx_size, self.step.chunks or CHUNKS)
        folder = self.out / self.path.stem
        if self.shard is not None and not self.shard.share(range(plan.chunks)):
            return
        studies = run_texts(self.path, list(self.specs.values()), plan, texts, folder, self.settings, shard=self.shard,
                            progress=self.progress)  # fmt: skip
        if self.shard is None:
            for study in studies.values():
                yield from scores.of_study(self.path.name, study, self.names)

    def long(self) -> Iterator[Score]:
        """RULER's tasks, under every loop. Shards share out the tasks of all lengths."""
        journal = self.out / self.path.stem / file_name("longctx", self.shard)
        journal.parent.mkdir(parents=True, exist_ok=True)
        pairs = [(length, task) for length in self.step.lengths for task in self.step.ruler]
        mine = pairs if self.shard is None else self.shard.share(pairs)
        for length in self.step.lengths:
            tasks = tuple(task for at, task in mine if at == length)
            if tasks:
                plan = replace(long_plan(self.step, tasks), lengths=(length,))
                run_long_context(self.path, list(self.specs.values()), plan, journal, self.settings,
                                 progress=self.progress)  # fmt: skip
        if self.shard is None:
            yield from scores.of_long(self.path.name, long_plan(self.step, self.step.ruler), journal, self.names)


def run_step(
    path: Path, protocol: Protocol, step: ProtocolStep, out: Path, settings: ContextSettings | None = None, *,
    part: bool = False, shard: Shard | None = None, workers: int = 1, progress: Progress = silent,
) -> list[Score]:  # fmt: skip
    """Measure a step and return the score of every item under every loop. part: of some of its loops, and no placebo;
    shard: only this part of the items, of which no score is returned; workers: so many processes, for tasks and texts.

    Raises UsageError, GgufloopError and BackendError; KeyboardInterrupt leaves in the journals what is done.
    """
    settings = settings or ContextSettings()
    job = _Job(path, protocol, step, out / step.name, settings, part, shard, workers, progress)
    if step.ruler:
        found = list(job.long())
    elif step.types:
        found = list(job.ladder())
    else:
        found = [score for task in step.tasks for score in job.task(task)]
        found += [score for text in step.texts for score in job.text(text)]
    return list({score.key: score for score in found}.values())
