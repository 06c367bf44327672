"""A model and a clock for tests of what is measured and printed: an evaluation takes as long as its layers.

A token takes 1 ms through the plain model, and what the loop's layer count says when it loops; the n-th evaluation of
the process takes n microseconds more, so that repetitions differ. `log` has what happened, in order, of all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggufloop.loop import LoopSpec
from support.fake_llama import FakeLlama


class Clock:
    def __init__(self) -> None:
        self.ns = 0
        self.evaluations = 0
        self.log: list[str] = []

    def __call__(self) -> int:
        self.log.append("clock")
        return self.ns


class FakeSpeed(FakeLlama):
    """As FakeLlama; its time is `clock`'s."""

    clock: Clock

    def __init__(self, path: object = "", **kwargs: Any) -> None:
        self.seen: list[tuple[LoopSpec | None, list[int]]] = []
        super().__init__(path, **kwargs)

    def n_vocab(self) -> int:
        return 300

    def model_type(self) -> str:
        return "llama 7B Q4_1"

    def close(self) -> None:
        self.clock.log.append("close")

    def set_loop(self, loop: LoopSpec | None) -> None:
        super().set_loop(loop)
        self.clock.log.append(f"loop {loop}")

    def reset(self) -> None:
        self.clock.log.append("reset")
        self.cached = 0

    def eval(self, tokens: Sequence[int]) -> None:
        self.clock.log.append(f"eval {len(tokens)}")
        self.seen.append((self.loop, list(tokens)))
        self.cached += len(tokens)
        assert self.cached <= self.n_ctx()
        cost = 1.0 if self.loop is None else self.loop.relative_cost(self.n_layers)
        self.clock.evaluations += 1
        self.clock.ns += round(len(tokens) * cost * 1e6) + self.clock.evaluations * 1000

    def synchronize(self) -> None:
        self.clock.log.append("wait")
