"""Contexts and their sequences as the worker uses them: which sequence a prompt goes to, and rows evaluated exactly.

    lane, seat = lanes.seat(ask)                     # None while everything suitable is taken
    row = lanes.read(seat, ...), lanes.decode(lane, looped, rows)

Loops whose cache means the same with every loop share one context. kv each has a K/V slot for every pass, and llama.cpp
empties a context whose slots change, so those have a second context, for one such loop at a time.

Sequences that are evaluated together ought to give what each gives alone. Whether they do, to the bit, depends on the
device, the weights' type, the number of threads and the length of the texts: matrix products and attention have other
kernels for one row than for several. So it is found out by doing both: `decode` trusts a batch only after computing the
same rows together and one by one gave the same logits, and otherwise computes them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from ggufloop.engine import LoopedLlama
from ggufloop.loop import LoopSpec
from ggufloop.sequences import Row, Sequences
from ggufloop.server.slots import Cuts, History, Saved, Store

_TRIALS = 2  # equal results before rows are computed together
_WORTH_SAVING = 32  # tokens; reading fewer again is as cheap


@dataclass(eq=False)
class Seat:
    """One sequence of a lane: what it holds, under which loop, and whether an answer is being generated in it."""

    lane: Lane
    number: int
    loop: LoopSpec | None = None
    history: History = field(default_factory=History)
    taken: bool = False
    used: float = 0.0


class Lane:
    """A context and its seats."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self.seats = [Seat(self, i) for i in range(sequences.n)]
        self._trials: dict[tuple[object, ...], int] = {}  # how often equal; -1: they differ

    def decode(self, looped: bool, rows: Sequence[Row], can_rewind: bool) -> list[NDArray[np.float32]]:
        """The logits after each of these rows, of one sequence each, as evaluating each row alone gives them."""
        self.sequences.enable(looped)
        loop = self.sequences.loop
        together = len(rows) > 1 and can_rewind and (loop is None or loop.halt is None)
        if not together:
            return [self.sequences.decode([row])[0] for row in rows]
        key = (loop, looped, *((row.sequence, row.position // 256) for row in rows))
        trials = self._trials.get(key, 0)
        if trials >= _TRIALS:
            return list(self.sequences.decode(rows))
        if trials < 0:
            return [self.sequences.decode([row])[0] for row in rows]
        tried = self.sequences.decode(rows)
        for row in rows:
            self.sequences.cut(row.sequence, row.position)
        alone = [self.sequences.decode([row])[0] for row in rows]
        equal = all(np.array_equal(a, b) for a, b in zip(tried, alone, strict=True))
        if len(self._trials) > 4096:  # of texts long gone
            self._trials.clear()
        self._trials[key] = trials + 1 if equal else -1
        return alone

    def batches_exactly(self) -> dict[str, int]:
        """How many combinations of rows were found equal, different, and are on trial."""
        values = list(self._trials.values())
        return {
            "equal": sum(v >= _TRIALS for v in values),
            "different": sum(v < 0 for v in values),
            "tried": sum(0 <= v < _TRIALS for v in values),
        }


class Lanes:
    """All contexts of one server, and the conversations saved out of them."""

    def __init__(self, llm: LoopedLlama, parallel: int, n_ctx: int, cuts: Cuts, cache_bytes: int) -> None:
        self._llm = llm
        self._parallel = parallel
        self._n_ctx = n_ctx
        self.cuts = cuts
        self.store = Store(cache_bytes)
        self.can_rewind = llm.can_rewind
        self.shared = self._open()
        self.each: Lane | None = None

    def _open(self) -> Lane:
        return Lane(Sequences(self._llm, self._parallel, self._n_ctx, self.cuts.n_batch, self.cuts.n_ubatch))

    @property
    def n_ctx(self) -> int:
        """Tokens one sequence holds."""
        return self.shared.sequences.n_ctx

    def close(self) -> None:
        """Free the contexts."""
        for lane in (self.shared, self.each):
            if lane is not None:
                lane.sequences.close()
        self.store.drop(lambda entry: False)

    def memory_bytes(self) -> int:
        """Bytes of K/V in the contexts and in the store."""
        lanes = [lane for lane in (self.shared, self.each) if lane is not None]
        return sum(lane.sequences.memory_bytes() for lane in lanes) + self.store.size

    def needs_own(self, loop: LoopSpec | None) -> bool:
        """Whether a loop's K/V slots differ from the plain model's."""
        return loop is not None and loop.is_loop and loop.kv == "each"

    def find_seat(
        self, loop: LoopSpec | None, prompt: Sequence[int], client: str | None
    ) -> tuple[Seat, int, int] | None:
        """A seat for a prompt, the tokens it can start from there, and where that step began; None if none is free.

        client: whose conversations it may go on with; None: with none.
        The seat's sequence holds exactly these tokens then. Raises GgufloopError if the loop cannot be set.
        """
        lane = self._lane(loop)
        free = [] if lane is None else [seat for seat in lane.seats if not seat.taken]
        if lane is None or not free:
            return None
        own = [seat for seat in free if seat.loop == loop and seat.history.tokens]
        scored = [(seat.history.reusable(prompt, self.cuts, client, self.can_rewind)[0], seat) for seat in own]
        here, seat = max(scored, key=lambda pair: pair[0], default=(0, free[0]))
        saved_n, saved = self.store.find(loop, prompt, self.cuts, client, self.can_rewind)
        if here == 0 or saved_n > here:
            seat = min(free, key=lambda s: (len(s.history.tokens) > 0, s.used))
        if saved is not None and saved_n > here:
            self.store.take(saved)
            self._keep(seat)
            self._restore(seat, saved)
        return self._start(seat, loop, prompt, client)

    def _start(
        self, seat: Seat, loop: LoopSpec | None, prompt: Sequence[int], client: str | None
    ) -> tuple[Seat, int, int]:
        n = step = 0
        if seat.loop == loop:
            n, step = seat.history.reusable(prompt, self.cuts, client, self.can_rewind)
        held = len(seat.history.tokens)
        if n < held:
            self._keep(seat)
            if not seat.lane.sequences.cut(seat.number, n):
                n = step = 0
                seat.lane.sequences.cut(seat.number, 0)
        seat.loop = loop
        seat.history = seat.history.copy()  # what was kept must not change
        seat.history.cut(n)
        seat.taken, seat.used = True, monotonic()
        return seat, n, step

    def _keep(self, seat: Seat) -> None:
        """Save what a seat holds before it is lost."""
        if len(seat.history.tokens) >= _WORTH_SAVING and self.store.capacity:
            self.store.put(Saved(seat.loop, seat.history, seat.lane.sequences.save(seat.number)))

    def _restore(self, seat: Seat, saved: Saved) -> None:
        whole = seat.lane.sequences.restore(seat.number, saved.data)
        seat.loop, seat.history = saved.loop, saved.history if whole else History()

    def _lane(self, loop: LoopSpec | None) -> Lane | None:
        """The lane for a loop; None if it is taken by another loop of its kind."""
        if not self.needs_own(loop):
            return self.shared
        if self.each is None:
            self.each = self._open()
        if self.each.sequences.loop != loop:
            if any(seat.taken for seat in self.each.seats):
                return None
            for seat in self.each.seats:
                self._keep(seat)
                self.each.sequences.cut(seat.number, 0)  # a loop that is refused leaves them
                seat.loop, seat.history = None, History()
            self.each.sequences.set_loop(loop)
        return self.each

    def leave(self, seat: Seat, whole: bool) -> None:
        """An answer has ended; whole: the sequence holds what its history says."""
        seat.taken, seat.used = False, monotonic()
        if not whole:
            seat.history = History()
            seat.lane.sequences.cut(seat.number, 0)
