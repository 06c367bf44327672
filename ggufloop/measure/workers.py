"""A measurement by several processes of this machine, one shard each, and put together: what `--workers n` does.

    eval_by_workers(4, path, loop, plan, Path("results"), settings)      # as run_eval, four at once
    sweep_by_workers(4, path, loops, plan, Path("results"), settings)    # as run_sweep, which then does not race

Two processes of one thread are often faster than one of two where a model is small. Each shard has its journal, so a
worker that dies loses one slice, and the same call goes on. All processes end with the block, whatever ends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from ggufloop.backend import process
from ggufloop.backend.process import Worker
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec, loop_text
from ggufloop.measure import merge, sweep_merge
from ggufloop.measure.eval_run import EvalPlan, EvalResult
from ggufloop.measure.slices import Shard
from ggufloop.measure.sweep_run import SweepPlan, SweepResult
from ggufloop.progress import Progress, Step, silent

_START = process.main_of("ggufloop.measure.shard_child")


def eval_by_workers(
    n: int, path: Path, loop: LoopSpec | None, plan: EvalPlan, out: Path, settings: ContextSettings | None = None,
    *, verbose: bool = False, progress: Progress = silent,
) -> EvalResult:  # fmt: skip
    """As `run_eval`. Raises what it does, with the shard it happened in."""
    plan.loops(loop)
    job = {"kind": "eval", "loop": loop_text(loop), "plan": asdict(plan)}
    return merge.merge_evals(_run(n, path, job, out, settings, verbose, progress), out, progress)


def sweep_by_workers(
    n: int, path: Path, loops: Sequence[LoopSpec], plan: SweepPlan, out: Path, settings: ContextSettings,
    *, verbose: bool = False, progress: Progress = silent,
) -> SweepResult:  # fmt: skip
    """As `run_sweep`, without a race. Raises what it does, with the shard it happened in."""
    job = {"kind": "sweep", "loops": list(map(str, loops)), "plan": asdict(plan)}
    return sweep_merge.merge_sweeps(_run(n, path, job, out, settings, verbose, progress), out, progress)


class Together:
    """One progress of all shards, and each note once."""

    def __init__(self, n: int, progress: Progress) -> None:
        self._shares: dict[str, dict[int, float]] = {}  # of what is being done, by worker: one may be a loop ahead
        self._n, self._progress = n, progress
        self._told: set[str] = set()
        self._lock = Lock()

    def __call__(self, i: int, event: dict[str, Any]) -> None:
        with self._lock:
            step = Step(**event["step"])
            if not step.total:
                if step.text and step.text not in self._told:
                    self._progress(step)
                self._told.add(step.text)
                return
            if math.isinf(step.total):
                return
            mine = self._shares.setdefault(step.text, {})
            mine[i] = max(mine.get(i, 0.0), step.done / step.total)
            share = 100 * min(sum(mine.values()) / self._n, 1.0)
            self._progress(Step(f"{self._n} workers: {step.text}", share, 100))


def _run(
    n: int, path: Path, job: dict[str, Any], out: Path, settings: ContextSettings | None, verbose: bool,
    progress: Progress,
) -> list[Path]:  # fmt: skip
    """The journals of n shards, each done by a process. Raises GgufloopError if one of them fails."""
    if n < 2:
        raise UsageError(f"{n} workers share nothing out.", "give --workers 2 or more.")
    settings = settings or ContextSettings()
    settings = replace(settings, n_threads=max(settings.threads // n, 1))
    together = Together(n, progress)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(n))
        workers = [stack.enter_context(Worker(_START)) for _ in range(n)]  # closed first, which ends their threads
        asked = [
            job | {"path": str(path), "out": str(out), "settings": asdict(settings), "shard": str(Shard(i + 1, n)),
                   "verbose": verbose}
            for i in range(n)
        ]  # fmt: skip
        done = [
            pool.submit(worker.run, each, partial(together, i))
            for i, (worker, each) in enumerate(zip(workers, asked, strict=True))
        ]
        wait(done, return_when=FIRST_EXCEPTION)
        for i, future in enumerate(done):
            e = future.exception() if future.done() else None
            if isinstance(e, GgufloopError):
                raise type(e)(f"shard {i + 1}/{n}: {e.message}", e.hint or "the same command goes on.") from e
        return [Path(future.result()["journal"]) for future in done]
