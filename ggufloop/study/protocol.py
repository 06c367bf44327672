"""A protocol: what is to be measured of a model, written down before, and run step by step.

    protocol = read_protocol(Path("docs/protocol.toml"))
    for step in protocol.steps_for("smollm2-135m"):
        scores += run_step(path, protocol, step, Path("results"))

The file names loops by their settings behind the window, and steps: tasks of lm-eval, or texts, under which loops, how
many, of which models. Every step keeps its journals in a folder of its own, OUT/STEP/TASK, so a run may stop anywhere
and go on; machines share it by shards, and a run by itself takes over what shards have left there. What a step found is
scores by item (`scores.py`), which `protocol_report.py` judges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggufloop import reading, recipes
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.corpus import local
from ggufloop.measure.eval_run import EvalPlan, EvalResult, run_eval
from ggufloop.measure.planning import Planned, plan_eval, plan_sweep
from ggufloop.measure.slices import Shard, file_name
from ggufloop.measure.sweep_run import SweepPlan, run_shard, run_sweep
from ggufloop.measure.workers import eval_by_workers, sweep_by_workers
from ggufloop.models.info import describe
from ggufloop.opening import check_loops
from ggufloop.progress import Progress, named, silent
from ggufloop.study import scores
from ggufloop.study.scores import Score

KEYS = ("loops", "roles", "step")
_LIKE = "docs/protocol.toml shows what a protocol holds."
PRIMARY, SECONDARY, CONTROL = ROLES = ("primary", "secondary", "control")


@dataclass(frozen=True)
class ProtocolStep:
    """tasks of lm-eval, or texts, under some loops by their names. sample: questions drawn of each task; chunks of
    ctx_size tokens, of each text. models: as `ggufloop list` names them; empty for all. window: if not its own."""

    name: str
    loops: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    sample: int | None = None
    chunks: int | None = None
    ctx_size: int = 512
    models: tuple[str, ...] = ()
    window: str | None = None


@dataclass(frozen=True)
class Protocol:
    """loops: settings behind the window, by name; roles: of those that are not secondary."""

    loops: dict[str, str]
    roles: dict[str, str]
    steps: tuple[ProtocolStep, ...]

    def steps_for(self, name: str) -> list[ProtocolStep]:
        """Those for the model that `ggufloop list` calls so; all for one that no step names."""
        if not any(name in step.models for step in self.steps):
            return list(self.steps)
        return [step for step in self.steps if not step.models or name in step.models]

    @property
    def apart(self) -> set[str]:
        """Tasks that are asked with another window than the model's, so that no figure puts them with others."""
        return {task for step in self.steps if step.window is not None for task in step.tasks}

    def specs(self, step: ProtocolStep, path: Path) -> dict[str, LoopSpec]:
        """The loops of a step on a model file, by name. Raises UsageError for a model too small for the window."""
        window = step.window or "{}:{}".format(*window_of(path))
        return {name: LoopSpec.parse(f"{window} {self.loops[name]}") for name in step.loops}


def read_protocol(path: Path) -> Protocol:
    """Raises GgufloopError for a file that is none, naming what is wrong."""
    try:
        table = reading.toml(path.read_bytes())
        loops = reading.typed(table.pop("loops"), dict[str, str], "loops")
        roles = reading.typed(table.pop("roles", {}), dict[str, tuple[str, ...]], "roles")
        given = reading.typed(table.pop("step"), tuple[dict[str, Any], ...], "step")
        steps = tuple(_step(each, loops) for each in given)
        for name, settings in loops.items():
            try:
                LoopSpec.parse(f"1:2 {settings}")
            except UsageError as e:
                raise ValueError(f"loop {name}: {e.message}") from None
        of = {name: role for role, names in roles.items() for name in names}
        wrong = [*(name for name in of if name not in loops), *(role for role in roles if role not in ROLES)]
        if wrong:
            raise ValueError(f"roles: {wrong[0]!r} is no loop or role of this protocol")
        if table:
            raise ValueError(f"{next(iter(table))!r} is nothing a protocol has; {nearest(next(iter(table)), KEYS)}")
    except OSError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror}.", _LIKE) from None
    except KeyError as e:
        raise GgufloopError(f"{path} has no {e.args[0]!r}.", _LIKE) from None
    except ValueError as e:
        raise GgufloopError(f"{path}: {e}.", _LIKE) from None
    return Protocol(loops, of, steps)


def _step(table: dict[str, Any], loops: dict[str, str]) -> ProtocolStep:
    named_ = {key.replace("-", "_"): value for key, value in table.items()}
    step = reading.build(ProtocolStep, {"loops": list(loops), **named_})
    if step.window is not None:
        try:
            LoopSpec.parse(f"{step.window} k=2")
        except UsageError as e:
            raise ValueError(f"step {step.name}: {e.message}") from None
    unknown = next((name for name in step.loops if name not in loops), None)
    if unknown is not None:
        raise ValueError(f"step {step.name}: no loop is called {unknown!r}")
    if bool(step.tasks) == bool(step.texts):
        raise ValueError(f"step {step.name}: it has tasks or texts, one of them")
    if any(count is not None and count < 1 for count in (step.sample, step.chunks, step.ctx_size)):
        raise ValueError(f"step {step.name}: sample, chunks and ctx-size are counts")
    return step


def window_of(path: Path) -> tuple[int, int]:
    """The published rule: the middle four layers, or those published for the model. Raises UsageError."""
    return recipes.recipe_window("paper", describe(path).n_layer, path.name)


def _plans(task: str, step: ProtocolStep, specs: dict[str, LoopSpec], primary: str) -> list[tuple[LoopSpec, EvalPlan]]:
    return [(loop, EvalPlan((task,), paired=True, floor=name == primary, offline=True, drawn=step.sample))
            for name, loop in specs.items()]  # fmt: skip


def _sweep_plan(step: ProtocolStep, text: str, progress: Progress) -> SweepPlan:
    return SweepPlan(local(text, progress=progress), chunk=step.ctx_size, chunks=step.chunks, racing=False)


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
    for text in step.texts:
        swept = _sweep_plan(step, text, progress)
        found.append(plan_sweep(path, list(specs.values()), swept, speed=speed, progress=progress))
    return found


def _first(protocol: Protocol, step: ProtocolStep) -> str:
    """The loop that is run once more with its damping moved."""
    return next((name for name in step.loops if protocol.roles.get(name) == PRIMARY), "")


def run_step(
    path: Path, protocol: Protocol, step: ProtocolStep, out: Path, settings: ContextSettings | None = None, *,
    part: bool = False, shard: Shard | None = None, workers: int = 1, progress: Progress = silent,
) -> list[Score]:  # fmt: skip
    """Measure a step and return the score of every item under every loop. part: of some of its loops, and no placebo;
    shard: only this part of the items, of which no score is returned; workers: so many processes.

    Raises UsageError, GgufloopError and BackendError; KeyboardInterrupt leaves in the journals what is done.
    """
    specs = protocol.specs(step, path)
    names = {str(loop): name for name, loop in specs.items()}
    settings = settings or ContextSettings()
    found: dict[tuple[str, str, str], Score] = {}
    for task in step.tasks:
        told, place = named(progress, task), out / step.name / task
        tasks = EvalPlan((task,), offline=True).load(told)
        asked: list[tuple[LoopSpec | None, EvalPlan, Path, ContextSettings, dict[str, str]]]
        asked = [(loop, plan, place, settings, names)
                 for loop, plan in _plans(task, step, specs, "" if part else _first(protocol, step))]  # fmt: skip
        if not part:
            other = replace(settings, flash_attn="off" if settings.uses_flash(path) else "on")
            asked.append((None, EvalPlan((task,), offline=True, drawn=step.sample),
                          place.with_name(f"{task}-placebo"), other, {PLAIN: scores.PLACEBO}))  # fmt: skip
        for loop, plan, where, how, called in asked:
            result = (eval_by_workers(workers, path, loop, plan, where, how, progress=told) if workers > 1 else
                      run_eval(path, loop, plan, where, how, tasks=tasks, shard=shard, progress=told))  # fmt: skip
            if isinstance(result, EvalResult):
                found |= {s.key: s for s in scores.of_eval(path.name, result, called)}
    for text in step.texts:
        place = out / step.name / text
        journal = place / path.stem / file_name("sweep", shard)
        journal.parent.mkdir(parents=True, exist_ok=True)
        loops, swept = list(specs.values()), _sweep_plan(step, text, progress)
        how, told = replace(settings, n_ctx=step.ctx_size), named(progress, text)
        if shard is not None:
            run_shard(path, loops, swept, shard, journal, how, progress=told)
            continue
        judged = (sweep_by_workers(workers, path, loops, swept, place, how, progress=told) if workers > 1 else
                  run_sweep(path, loops, swept, journal, how, progress=told))  # fmt: skip
        found |= {s.key: s for s in scores.of_sweep(path.name, judged, journal, names)}
    return list(found.values())
