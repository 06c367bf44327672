"""The engine thread: takes jobs from a fair queue, gives each a sequence, and evaluates them in turns.

    worker = Worker(open_model, settings, limits)
    worker.start(); worker.submit(job); worker.cancel(job); worker.stop(seconds=4)

All llama.cpp work of a server happens in this one thread. Prompts are read a cut at a time and answers generated a few
tokens at a time, so a long prompt does not hold up the others; answers of the same loop go on together, and another
loop gets its turn after a while, for changing the loop costs time as well. What an answer is does not depend on any of
this: see slots.py and lanes.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter

import numpy as np
from numpy.typing import NDArray

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.generate import Text
from ggufloop.records import Timings
from ggufloop.score import entropy
from ggufloop.sequences import Aborted, Row, Sampler
from ggufloop.server.jobs import Done, Event, Failed, FairQueue, Job, Logprob, Piece
from ggufloop.server.lanes import Lane, Lanes, Seat
from ggufloop.server.limits import Limits
from ggufloop.server.slots import Cuts, Step

_TURN = 0.1  # seconds one loop goes on while others wait

_STOPPING = GgufloopError("the server is stopping.", "send the request again later.")


@dataclass(frozen=True)
class Settings:
    """The context of each answer: its tokens, and how prompts are cut."""

    n_ctx: int
    n_batch: int
    n_ubatch: int


@dataclass(eq=False)
class _Running:
    """A job that has a seat."""

    job: Job
    seat: Seat
    cached: int
    step: int
    sampler: Sampler
    text: Text
    limit: int
    pieces: list[str]
    next_token: int | None = None  # drawn, not yet evaluated
    decoded: int = 0
    tokens: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    started: bool = False

    @property
    def reading(self) -> bool:
        return not self.started


class Worker:
    """One model, its thread, and the jobs.

    open_model: loads the model, called in the thread. on_state: told 'ready', 'failed' and 'stopped' from there.
    `llm` is there once it is ready; `error` says why it failed.
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
        self._active: list[_Running] = []
        self._changed = threading.Condition()
        self._reading: tuple[Job, Lane] | None = None  # whose prompt llama.cpp is reading this moment
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.state = "loading"
        self.llm: LoopedLlama | None = None
        self.lanes: Lanes | None = None
        self.error: BaseException | None = None
        self.counts: Counter[str] = Counter()

    # from other threads

    def start(self) -> None:
        """Load the model and serve."""
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Queue a job; False if the server is loading, stopping, or has its fill."""
        with self._changed:
            full = len(self._queue) >= self._limits.queue + self._limits.parallel - len(self._active)
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
            if self._reading is not None and self._reading[0] is job:
                self._reading[1].sequences.abort(True)
            self._changed.notify_all()

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more jobs, refuse those waiting, and cut those running off after so many seconds."""
        with self._changed:
            self._stop_at = min(monotonic() + seconds, self._stop_at or np.inf)
            if seconds <= 0 and self._reading is not None:
                self._reading[1].sequences.abort(True)
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
        """Jobs that have no seat yet."""
        with self._changed:
            return len(self._queue)

    def running(self) -> int:
        """Jobs that are being answered."""
        return len(self._active)

    # in the engine thread

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as e:  # whatever it is, whoever started the thread must learn of it
            self.error = e
            self.state = "failed"
            self._on_state("failed")
            return
        try:
            self._serve()
        except BaseException as e:
            self.error = e
        self.state = "stopped"
        for running in list(self._active):
            self._end(running, Failed(_STOPPING, busy=True), whole=False)
        with self._changed:
            waiting = self._queue.take_if(lambda job: True)
        for job in waiting:
            job.send(Failed(_STOPPING, busy=True))
        if self.lanes is not None:
            self.lanes.close()
        if self.llm is not None:
            self.llm.close()
        self._on_state("stopped")

    def _load(self) -> None:
        llm = self._open_model()
        s = self._settings
        self.lanes = Lanes(
            llm, self._limits.parallel, s.n_ctx, Cuts(s.n_batch, min(s.n_batch, s.n_ubatch)), self._limits.cache_bytes
        )
        self.llm = llm
        self.state = "ready"
        self._on_state("ready")

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._active and not len(self._queue) and self._stop_at is None:
                    self._changed.wait()
                stop_at = self._stop_at
                gone = self._queue.take_if(lambda job: job.cancelled or self._stop_at is not None)
            for job in gone:
                job.send(Done("cancelled", 0, 0, Timings()) if job.cancelled else Failed(_STOPPING, busy=True))
            if stop_at is not None and (not self._active or monotonic() >= stop_at):
                return
            self._admit()
            if self._active:
                self._turn()

    def _admit(self) -> None:
        """Give seats to waiting jobs, as long as there are any; the first in turn are not overtaken to a lane."""
        assert self.lanes is not None
        with self._changed:
            waiting = list(self._queue.in_order())
        full: set[bool] = set()
        for job in waiting:
            if len(self._active) >= self._limits.parallel:
                return
            own = self.lanes.needs_own(job.ask.loop)
            if own in full:
                continue
            try:
                running = self._seat(job)
            except GgufloopError as e:
                with self._changed:
                    self._queue.take(job)
                job.send(Failed(e))
                continue
            if running is None:
                full.add(own)
                continue
            with self._changed:
                self._queue.take(job)
                self._active.append(running)

    def _seat(self, job: Job) -> _Running | None:
        assert self.lanes is not None
        assert self.llm is not None
        ask = job.ask
        found = self.lanes.find_seat(ask.loop, ask.prompt, job.client if ask.turns else None)
        if found is None:
            return None
        seat, cached, step = found
        seat.history.client, seat.history.ended = job.client, False
        try:
            sampler = Sampler(self.llm, ask.draw)
        except GgufloopError:
            self.lanes.leave(seat, whole=True)
            raise
        n = ask.draw.sampling.n
        room = self.lanes.n_ctx - len(ask.prompt)
        limit = min(x for x in (room, None if n == -1 else n, self._limits.max_tokens) if x is not None)
        pieces: list[str] = []
        text = Text(ask.stop, pieces.append, ask.strip)
        self.counts["cached"] += cached
        return _Running(job, seat, cached, step, sampler, text, limit, pieces)

    def _turn(self) -> None:
        """Go on with the answer whose turn it is, and with those of the same loop, for a while."""
        lead = self._active.pop(0)
        self._active.append(lead)
        self._drop_cancelled()
        if lead not in self._active:
            return
        try:
            if lead.seat.lane.sequences.loop != lead.job.ask.loop:
                lead.seat.lane.sequences.set_loop(lead.job.ask.loop)
        except GgufloopError as e:
            self._end(lead, Failed(e), whole=True)
            return
        if lead.reading:
            self._read(lead)
            return
        end = monotonic() + _TURN
        while True:
            group = [
                r
                for r in self._active
                if not r.reading and r.seat.lane is lead.seat.lane and r.job.ask.loop == lead.job.ask.loop
            ]
            if not group:
                return
            self._generate(group)
            self._drop_cancelled()
            others = len(self._active) > len(group) or len(self._queue)
            if (
                monotonic() >= end
                or (others and len(self._active) < self._limits.parallel)
                or self._stop_at is not None
            ):
                return

    def _drop_cancelled(self) -> None:
        for running in [r for r in self._active if r.job.cancelled]:
            self._end(running, self._done(running, "cancelled"), whole=True)

    def _read(self, running: _Running) -> None:
        """Read the prompt up to its next cut; draw the first token if that is its end."""
        assert self.lanes is not None
        prompt, history, seat = running.job.ask.prompt, running.seat.history, running.seat
        start = len(history.tokens)
        end = min(running.step + self.lanes.cuts.after(start - running.step), len(prompt))
        rows = [Row(seat.number, prompt[i], i, i == len(prompt) - 1) for i in range(start, end)]
        seat.lane.sequences.enable(True)
        with self._changed:
            self._reading = (running.job, seat.lane)
        begun = perf_counter()
        try:
            logits = seat.lane.sequences.decode(rows)
        except Aborted:
            seat.lane.sequences.cut(seat.number, start)
            stopped = not running.job.cancelled
            self._end(
                running, Failed(_STOPPING, busy=True) if stopped else self._done(running, "cancelled"), whole=True
            )
            return
        except GgufloopError as e:
            self._end(running, Failed(e), whole=False)
            return
        finally:
            with self._changed:
                self._reading = None
                seat.lane.sequences.abort(False)
        t = running.timings
        running.timings = Timings(t.prompt_tokens + len(rows), t.prompt_seconds + perf_counter() - begun)
        self.counts["prompt"] += len(rows)
        if not history.steps or history.steps[-1].start != running.step:
            history.steps.append(Step(running.step, True, reads=True))
        history.tokens.extend(prompt[start:end])
        if running.step == 0:
            history.read = end
        if end == len(prompt):
            running.started = history.ended = True
            self._draw(running, logits[0])

    def _generate(self, group: list[_Running]) -> None:
        """Evaluate one more token of each, and draw the next."""
        for looped in (True, False):
            some = [r for r in group if self._loops(r) == looped]
            some.sort(key=lambda r: r.seat.number)
            if not some:
                continue
            lane = some[0].seat.lane
            assert self.lanes is not None
            rows = []
            for r in some:
                assert r.next_token is not None
                rows.append(Row(r.seat.number, r.next_token, len(r.seat.history.tokens)))
            begun = perf_counter()
            try:
                logits = lane.decode(looped, rows, self.lanes.can_rewind)
                again = self._again(lane, some, rows, logits, looped)
            except (Aborted, GgufloopError) as e:
                failure = Failed(_STOPPING, busy=True) if isinstance(e, Aborted) else Failed(e)
                for r in some:
                    self._end(r, failure, whole=False)
                continue
            seconds = perf_counter() - begun
            for r, row, result in zip(some, rows, logits, strict=True):
                history = r.seat.history
                history.steps.append(Step(len(history.tokens), looped or r in again))
                history.tokens.append(row.token)
                r.decoded += 1
                t = r.timings
                r.timings = replace(
                    t, generated_tokens=t.generated_tokens + 1, generated_seconds=t.generated_seconds + seconds
                )
                self._draw(r, result)

    def _again(
        self, lane: Lane, some: list[_Running], rows: list[Row], logits: list[NDArray[np.float32]], looped: bool
    ) -> list[_Running]:
        """Those whose plain evaluation leaves too much doubt for their loop; their logits become the looped ones."""
        loop = lane.sequences.loop
        limit = loop.decode_entropy() if loop is not None and loop.is_loop else None
        if looped or limit is None:
            return []
        doubtful = [i for i in range(len(some)) if entropy(logits[i]) > limit]
        for i in doubtful:
            lane.sequences.cut(rows[i].sequence, rows[i].position)
            logits[i] = lane.decode(True, [rows[i]], True)[0]
        return [some[i] for i in doubtful]

    def _loops(self, running: _Running) -> bool:
        """Whether the next generated token loops: the decode policy, as `LoopedLlama` has it."""
        loop = running.job.ask.loop
        limit = loop.decode_loops() if loop is not None and loop.is_loop else None
        return limit is None or running.decoded < limit

    def _draw(self, running: _Running, row: NDArray[np.float32]) -> None:
        """Draw a token from logits, send what text is certain now, and end the answer if that is its end."""
        assert self.llm is not None
        token = running.sampler.pick(row)
        if token is None or self.llm.is_eog(token):
            self._finish(running, "stop")
            return
        running.tokens += 1
        self.counts["generated"] += 1
        piece = self.llm.detokenize([token])
        if running.job.ask.logprobs is not None:
            running.logprobs.append(self._logprob(token, row, running.job.ask.logprobs))
        stopped = running.text.feed(piece)
        if stopped or running.tokens == running.limit:
            self._finish(running, "stop" if stopped else "length")
            return
        running.next_token = token
        self._flush(running)

    def _logprob(self, token: int, row: NDArray[np.float32], n: int) -> Logprob:
        assert self.llm is not None
        values = row.astype(np.float64)
        values -= values.max()
        values -= np.log(np.exp(values).sum())
        n = min(n, len(values))
        top = np.argpartition(-values, n - 1)[:n] if n else np.array([], dtype=np.intp)
        likeliest = sorted(top.tolist(), key=lambda t: (-values[t], t))
        pieces = [(t, self.llm.detokenize([t], special=True), float(values[t])) for t in likeliest]
        return Logprob(token, self.llm.detokenize([token], special=True), float(values[token]), tuple(pieces))

    def _flush(self, running: _Running) -> None:
        if running.pieces:
            text, logprobs = "".join(running.pieces), tuple(running.logprobs)
            running.pieces.clear()
            running.logprobs.clear()
            running.job.send(Piece(text, logprobs))

    def _finish(self, running: _Running, finish: str) -> None:
        running.text.close()
        self._flush(running)
        self._end(running, self._done(running, finish), whole=True)

    def _done(self, running: _Running, finish: str) -> Done:
        return Done(finish, running.tokens, running.cached, running.timings, tuple(running.logprobs))

    def _end(self, running: _Running, event: Event, whole: bool) -> None:
        assert self.lanes is not None
        running.sampler.close()
        with self._changed:
            self._active.remove(running)
        self.lanes.leave(running.seat, whole)
        kind = "failed" if isinstance(event, Failed) else event.finish if isinstance(event, Done) else ""
        self.counts[f"answers {kind}"] += 1
        running.job.send(event)
