"""The process of one worker: does a shard of an evaluation or a sweep. `workers` starts it, nothing imports it.

A line of JSON comes in, a job with its arguments; steps and notes go out, and at the end where the shard's journal is.
Ctrl-C reaches it too and is ignored: the parent ends it.
"""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ggufloop.backend import process
from ggufloop.backend.process import Send
from ggufloop.backend.settings import ContextSettings
from ggufloop.loop import LoopSpec, loop_of
from ggufloop.measure.corpus import Text
from ggufloop.measure.eval_run import EvalPlan, run_eval
from ggufloop.measure.slices import Shard, ShardDone, file_name
from ggufloop.measure.sweep_run import SweepPlan, run_shard
from ggufloop.progress import Step


def do(job: dict[str, Any], send: Send) -> dict[str, Any]:
    """One shard. job: kind, path, loop or loops, plan, out, settings, shard, verbose."""
    path, out, shard = Path(job["path"]), Path(job["out"]), Shard.parse(job["shard"])
    settings, given = ContextSettings(**job["settings"]), dict(job["plan"])

    def progress(step: Step) -> None:
        send({"step": asdict(step)})

    how: Any = {"verbose": job["verbose"], "progress": progress}
    if job["kind"] == "eval":
        plan = EvalPlan(**given | {"names": tuple(given["names"])})
        done = run_eval(path, loop_of(job["loop"]), plan, out, settings, shard=shard, **how)
        assert isinstance(done, ShardDone)
    else:
        text = given["text"] and Text(**given["text"])
        planned = SweepPlan(**given | {"text": text, "tasks": tuple(given["tasks"])})
        loops = [LoopSpec.parse(word) for word in job["loops"]]
        journal = out / path.stem / file_name("sweep", shard)
        done = run_shard(path, loops, planned, shard, journal, settings, **how)
    return {"journal": str(done.journal)}


def main() -> None:
    """Do the jobs that come in, one line each, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    send = process.answers()
    process.serve_jobs(send, lambda job: do(job, send))
