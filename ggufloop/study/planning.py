"""What a study will take, before it is run: `compare --plan`.

    plan_study(path, loops, plan, settings, shards=4).sentences()

A cell is a type under a loop. Every file is taken to be as fast as the model that was given; quantising it is not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ggufloop.backend.settings import ContextSettings
from ggufloop.loop import LoopSpec
from ggufloop.measure.eval_run import EvalPlan
from ggufloop.measure.planning import Planned, PlannedCell, cost, layers_of, plan_eval, timed
from ggufloop.progress import Progress, silent
from ggufloop.study.measure import loop_name
from ggufloop.study.run import StudyPlan


def plan_study(
    path: Path, loops: Sequence[LoopSpec], plan: StudyPlan, settings: ContextSettings | None = None, *,
    shards: int = 1, speed: float | None = None, progress: Progress = silent,
) -> Planned:  # fmt: skip
    """What `run_study` will take, nothing of it measured yet. Raises UsageError, GgufloopError, BackendError."""
    settings = replace(settings or ContextSettings(), n_ctx=plan.chunk)
    with timed(path, settings, False, speed, progress) as (found, _, llm):
        counted = llm is not None
    types = [plan.reference, *(word for word in dict.fromkeys(plan.types) if word != plan.reference)]
    each: list[LoopSpec | None] = [None, *dict.fromkeys(loop for loop in loops if loop.is_loop)]
    layers, tokens = layers_of(path), float(plan.chunks * plan.chunk)
    cells = [
        PlannedCell(f"{type_}, {plan.text.name}", loop_name(loop), plan.chunks, tokens, tokens * cost(loop, layers))
        for type_ in types
        for loop in each
    ]
    slices, written = plan.chunks, False
    if plan.tasks:
        asked = EvalPlan(plan.tasks, plan.limit, offline=plan.offline, include_path=plan.include_path)
        plain = plan_eval(path, None, asked, replace(settings, n_ctx=None), speed=found if not counted else None,
                          progress=progress)  # fmt: skip
        slices, written = max(slices, plain.slices), plain.at_most
        for type_ in types:
            for loop in each:
                cells += [replace(cell, measure=f"{type_}, {cell.measure}", loop=loop_name(loop),
                                  work=cell.tokens * cost(loop, layers)) for cell in plain.cells]  # fmt: skip
    return Planned(tuple(cells), slices, shards, found, speed is None, counted, written, bool(plan.tasks))
