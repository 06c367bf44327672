"""Answers being generated, evaluated in turns: prompts a cut at a time, tokens of the same loop together.

    turns = Turns(llm, lanes, max_tokens, counts)
    turns.seat(job)                 # False while there is no sequence for it
    turns.go_on(until)              # some work on one loop; sends events as they come

A long prompt does not hold up the others, and neither does another loop, for changing the loop takes time as well.
What an answer is depends on none of this: see slots.py and lanes.py.
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
from ggufloop.server.jobs import Done, Event, Failed, Job, Logprob, Piece
from ggufloop.server.lanes import Lane, Lanes, Seat
from ggufloop.server.slots import Step

STOPPING = GgufloopError("the server is stopping.", "send the request again later.")


@dataclass(eq=False)
class _Running:
    """A job that has a seat. step: where the step began that reads its prompt; pieces: text not yet sent."""

    job: Job
    seat: Seat
    cached: int
    step: int
    limit: int
    sampler: Sampler
    text: Text
    pieces: list[str]
    reading: bool = True
    next_token: int = -1  # drawn, not yet evaluated
    decoded: int = 0
    tokens: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)


class Turns:
    """The answers being generated. Everything but `cancel` and `abort` is called in the engine thread.

    max_tokens: of one answer; None: what the context holds. counts: what is counted for the metrics.
    """

    def __init__(self, llm: LoopedLlama, lanes: Lanes, max_tokens: int | None, counts: Counter[str]) -> None:
        self._llm = llm
        self._lanes = lanes
        self._max_tokens = max_tokens
        self._counts = counts
        self._running: list[_Running] = []
        self._lock = threading.Lock()
        self._read_by: tuple[Job, Lane] | None = None  # whose prompt llama.cpp is reading this moment

    def __len__(self) -> int:
        return len(self._running)

    def cancel(self, job: Job) -> None:
        """Give the reading of this job's prompt up, if that is what is happening; from any thread."""
        with self._lock:
            if self._read_by is not None and self._read_by[0] is job:
                self._read_by[1].sequences.abort(True)

    def abort(self) -> None:
        """Give up whatever prompt is being read; from any thread."""
        with self._lock:
            if self._read_by is not None:
                self._read_by[1].sequences.abort(True)

    def seat(self, job: Job) -> bool:
        """Take a job, if there is a sequence for it. Raises GgufloopError if it can never be answered."""
        ask = job.ask
        found = self._lanes.find_seat(ask.loop, ask.prompt, job.client if ask.turns else None)
        if found is None:
            return False
        seat, cached, step = found
        try:
            sampler = Sampler(self._llm, ask.draw)
        except GgufloopError:
            self._lanes.leave(seat, whole=True)
            raise
        seat.history.client, seat.history.ended = job.client, False
        n = ask.draw.sampling.n
        room = self._lanes.n_ctx - len(ask.prompt)
        limit = min(x for x in (room, None if n == -1 else n, self._max_tokens) if x is not None)
        pieces: list[str] = []
        text = Text(ask.stop, pieces.append, ask.strip)
        self._counts["cached"] += cached
        self._running.append(_Running(job, seat, cached, step, limit, sampler, text, pieces))
        return True

    def go_on(self, until: float, interrupted: Callable[[], bool]) -> None:
        """Go on with the answer whose turn it is, and with those of the same loop, until then or until interrupted."""
        self._drop_cancelled()
        if not self._running:
            return
        lead = self._running.pop(0)
        self._running.append(lead)
        lane, loop = lead.seat.lane, lead.job.ask.loop
        try:
            lane.sequences.set_loop(loop)
        except GgufloopError as e:
            self._end(lead, Failed(e), whole=True)
            return
        if lead.reading:
            self._read(lead)
            return
        while True:
            group = [r for r in self._running if not r.reading and r.seat.lane is lane and r.job.ask.loop == loop]
            if not group:
                return
            self._generate(lane, group)
            self._drop_cancelled()
            if monotonic() >= until or interrupted():
                return

    def end_all(self) -> None:
        """Cut every answer off: the server is stopping."""
        for running in list(self._running):
            self._end(running, Failed(STOPPING, busy=True), whole=False)

    def _drop_cancelled(self) -> None:
        for running in [r for r in self._running if r.job.cancelled]:
            self._end(running, self._done(running, "cancelled"), whole=True)

    def _read(self, running: _Running) -> None:
        """Read the prompt up to its next cut; draw the first token if that is its end."""
        prompt, history, seat = running.job.ask.prompt, running.seat.history, running.seat
        sequences = seat.lane.sequences
        start = len(history.tokens)
        end = min(running.step + self._lanes.cuts.after(start - running.step), len(prompt))
        rows = [Row(seat.number, prompt[i], i, i == len(prompt) - 1) for i in range(start, end)]
        sequences.enable(True)
        with self._lock:
            self._read_by = (running.job, seat.lane)
        begun = perf_counter()
        try:
            logits = sequences.decode(rows)
        except Aborted:
            sequences.cut(seat.number, start)
            ended = self._done(running, "cancelled") if running.job.cancelled else Failed(STOPPING, busy=True)
            self._end(running, ended, whole=self._lanes.can_rewind)
            return
        except GgufloopError as e:
            self._end(running, Failed(e), whole=False)
            return
        finally:
            with self._lock:
                self._read_by = None
                sequences.abort(False)
        t = running.timings
        running.timings = Timings(t.prompt_tokens + len(rows), t.prompt_seconds + perf_counter() - begun)
        self._counts["prompt"] += len(rows)
        if not history.steps or history.steps[-1].start != running.step:
            history.steps.append(Step(running.step, True, reads=True))
        history.tokens.extend(prompt[start:end])
        if running.step == 0:
            history.read = end
        if end == len(prompt):
            running.reading, history.ended = False, True
            self._draw(running, logits[0])

    def _generate(self, lane: Lane, group: list[_Running]) -> None:
        """Evaluate one more token of each, and draw the next."""
        for looped in (True, False):
            some = sorted((r for r in group if self._loops(r) == looped), key=lambda r: r.seat.number)
            if not some:
                continue
            rows = [Row(r.seat.number, r.next_token, len(r.seat.history.tokens)) for r in some]
            begun = perf_counter()
            try:
                logits = lane.decode(looped, rows, self._lanes.can_rewind)
                again = set() if looped else self._again(lane, rows, logits)
            except GgufloopError as e:
                for r in some:
                    self._end(r, Failed(e), whole=False)
                continue
            seconds = perf_counter() - begun
            for i, (r, row) in enumerate(zip(some, rows, strict=True)):
                history, t = r.seat.history, r.timings
                history.steps.append(Step(len(history.tokens), looped or i in again))
                history.tokens.append(row.token)
                r.decoded += 1
                generated = t.generated_tokens + 1, t.generated_seconds + seconds
                r.timings = replace(t, generated_tokens=generated[0], generated_seconds=generated[1])
                self._draw(r, logits[i])

    def _again(self, lane: Lane, rows: list[Row], logits: list[NDArray[np.float32]]) -> set[int]:
        """Which rows, evaluated plain, leave too much doubt for their loop; their logits become the looped ones."""
        loop = lane.sequences.loop
        limit = loop.decode_entropy() if loop is not None and loop.is_loop else None
        doubtful = {i for i, row in enumerate(logits) if limit is not None and entropy(row) > limit}
        for i in doubtful:
            lane.sequences.cut(rows[i].sequence, rows[i].position)
            logits[i] = lane.decode(True, [rows[i]], True)[0]
        return doubtful

    def _loops(self, running: _Running) -> bool:
        """Whether the next generated token loops: the decode policy, as `LoopedLlama` has it."""
        loop = running.job.ask.loop
        limit = loop.decode_loops() if loop is not None and loop.is_loop else None
        return limit is None or running.decoded < limit

    def _draw(self, running: _Running, row: NDArray[np.float32]) -> None:
        """Draw a token from logits, send what text is certain now, and end the answer if that is its end."""
        token = running.sampler.pick(row)
        if token is None or self._llm.is_eog(token):
            self._finish(running, "stop")
            return
        running.tokens += 1
        self._counts["generated"] += 1
        if running.job.ask.logprobs is not None:
            running.logprobs.append(self._logprob(token, row, running.job.ask.logprobs))
        stopped = running.text.feed(self._llm.detokenize([token]))
        if stopped or running.tokens == running.limit:
            self._finish(running, "stop" if stopped else "length")
            return
        running.next_token = token
        self._flush(running)

    def _logprob(self, token: int, row: NDArray[np.float32], n: int) -> Logprob:
        values = row.astype(np.float64)
        values -= values.max()
        values -= np.log(np.exp(values).sum())
        n = min(n, len(values))
        top = np.argpartition(-values, n - 1)[:n].tolist() if n else []
        top.sort(key=lambda t: (-values[t], t))
        pieces = tuple((t, self._llm.detokenize([t], special=True), float(values[t])) for t in top)
        return Logprob(token, self._llm.detokenize([token], special=True), float(values[token]), pieces)

    def _flush(self, running: _Running) -> None:
        if running.pieces:
            piece = Piece("".join(running.pieces), tuple(running.logprobs))
            running.pieces.clear()
            running.logprobs.clear()
            running.job.send(piece)

    def _finish(self, running: _Running, finish: str) -> None:
        running.text.close()
        self._flush(running)
        self._end(running, self._done(running, finish), whole=True)

    def _done(self, running: _Running, finish: str) -> Done:
        return Done(finish, running.tokens, running.cached, running.timings, tuple(running.logprobs))

    def _end(self, running: _Running, event: Event, whole: bool) -> None:
        running.sampler.close()
        self._running.remove(running)
        self._lanes.leave(running.seat, whole)
        self._counts[f"answers {event.finish if isinstance(event, Done) else 'failed'}"] += 1
        running.job.send(event)
