"""The engine thread: loads a model, takes jobs from a fair queue, and has them answered in turns.

    worker = Worker(open_model, settings, limits)
    worker.start(); worker.submit(job); worker.cancel(job); worker.stop(seconds=3)

All llama.cpp work of a server happens in this one thread, but for tokenizing, which changes nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import numpy as np

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.records import Timings
from ggufloop.server.jobs import Done, Failed, FairQueue, Job
from ggufloop.server.lanes import Lanes
from ggufloop.server.limits import Limits
from ggufloop.server.slots import Cuts
from ggufloop.server.turns import STOPPING, Turns

_TURN = 0.1  # seconds one loop goes on while others wait


@dataclass(frozen=True)
class Settings:
    """The context of each answer: its tokens, and how prompts are cut."""

    n_ctx: int
    n_batch: int
    n_ubatch: int


@dataclass(frozen=True)
class Engine:
    """A loaded model, its contexts, and the answers being generated."""

    llm: LoopedLlama
    lanes: Lanes
    turns: Turns


class Worker:
    """One model, its thread, and the jobs.

    open_model: loads the model, called in the thread. on_state: told 'ready', 'failed' and 'stopped' from there.
    `engine` is there while it is ready; `error` says why it failed.
    """

    def __init__(
        self,
        open_model: Callable[[], LoopedLlama],
        settings: Settings,
        limits: Limits,
        on_state: Callable[[str], None] = lambda state: None,
    ) -> None:
        self._open_model = open_model
        self._settings = settings
        self._limits = limits
        self._on_state = on_state
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.state = "loading"
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.counts: Counter[str] = Counter()

    # from other threads

    def start(self) -> None:
        """Load the model and serve."""
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Queue a job; False if the server is loading, stopping, or has its fill."""
        with self._changed:
            full = len(self._queue) >= self._limits.queue + self._limits.parallel - self.running()
            if self.state != "ready" or self._stop_at is not None or full:
                self.counts["refused"] += 1
                return False
            self._queue.put(job)
            self._changed.notify_all()
            return True

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job: it leaves the queue or stops, in the middle of its prompt too."""
        job.cancel()
        with self._changed:
            if self.engine is not None:
                self.engine.turns.cancel(job)
            self._changed.notify_all()

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more jobs, refuse those waiting, and cut those running off after so many seconds."""
        with self._changed:
            self._stop_at = min(monotonic() + seconds, np.inf if self._stop_at is None else self._stop_at)
            if seconds <= 0 and self.engine is not None:
                self.engine.turns.abort()
            self._changed.notify_all()
        if seconds > 0:
            timer = threading.Timer(seconds, self.stop)
            timer.daemon = True
            timer.start()

    def join(self, seconds: float) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def waiting(self) -> int:
        """Jobs that have no sequence yet."""
        with self._changed:
            return len(self._queue)

    def running(self) -> int:
        """Jobs that are being answered."""
        return 0 if self.engine is None else len(self.engine.turns)

    # in the engine thread

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as e:  # whatever it is, whoever started the thread must learn of it
            self.error = e
            self.state = "failed"
            self._on_state("failed")
            return
        self.engine = engine
        self.state = "ready"
        self._on_state("ready")
        try:
            self._serve(engine)
        except BaseException as e:
            self.error = e
        self.state = "stopped"
        engine.turns.end_all()
        with self._changed:
            waiting = self._queue.take_if(lambda job: True)
            self.engine = None
        for job in waiting:
            job.send(Failed(STOPPING, busy=True))
        engine.lanes.close()
        engine.llm.close()
        self._on_state("stopped")

    def _load(self) -> Engine:
        s, limits = self._settings, self._limits
        llm = self._open_model()
        try:
            cuts = Cuts(s.n_batch, min(s.n_batch, s.n_ubatch))
            lanes = Lanes(llm, limits.parallel, s.n_ctx, cuts, limits.cache_bytes)
        except BaseException:
            llm.close()
            raise
        return Engine(llm, lanes, Turns(llm, lanes, limits.max_tokens, self.counts))

    def _serve(self, engine: Engine) -> None:
        turns = engine.turns
        while True:
            with self._changed:
                while not len(turns) and not len(self._queue) and self._stop_at is None:
                    self._changed.wait()
                stop_at = self._stop_at
                gone = self._queue.take_if(lambda job: job.cancelled or self._stop_at is not None)
            for job in gone:
                job.send(Done("cancelled", 0, 0, Timings()) if job.cancelled else Failed(STOPPING, busy=True))
            if stop_at is not None and (not len(turns) or monotonic() >= stop_at):
                return
            self._admit(engine)
            turns.go_on(monotonic() + _TURN, self._has_other_work)

    def _has_other_work(self) -> bool:
        """Whether a job could be given a sequence, or the server is stopping."""
        return self._stop_at is not None or (len(self._queue) > 0 and self.running() < self._limits.parallel)

    def _admit(self, engine: Engine) -> None:
        """Give sequences to waiting jobs; those in the same kind of context are not overtaken."""
        with self._changed:
            waiting = list(self._queue.in_order())
        full: set[bool] = set()
        for job in waiting:
            if len(engine.turns) >= self._limits.parallel:
                return
            own = engine.lanes.needs_own(job.ask.loop)
            if own in full:
                continue
            try:
                if not engine.turns.seat(job):
                    full.add(own)
                    continue
            except GgufloopError as e:
                job.send(Failed(e))
            with self._changed:
                self._queue.take(job)
