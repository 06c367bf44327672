"""What a sweep asks of a model and a measure, without either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ggufloop.loop import PLAIN, LoopSpec

LAYERS = 30


class FakeEngine:
    """A loop in force and nothing else."""

    loop: LoopSpec | None = None

    def set_loop(self, loop: LoopSpec | None) -> None:
        self.loop = loop

    def n_layer(self) -> int:
        return LAYERS


class FakeMeasure:
    """Scores that follow from loop and item, and a note of everything that was asked for."""

    name, item, unit, least = "fake", "chunk", "nats per token", 8
    places: Sequence[tuple[int, int]] | None = None

    def __init__(self, n: int, gains: dict[str, float] | None = None, stop_after: int | None = None) -> None:
        self.n = self.available = n
        self.gains = gains or {}
        self.asked: list[tuple[str, int]] = []
        self.stop_after = stop_after

    def slices(self) -> list[list[int]]:
        return [[i] for i in range(self.n)]

    def identity(self) -> dict[str, Any]:
        return {"text": self.name}

    def score(self, llm: Any, items: Sequence[int]) -> list[float]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        name = PLAIN if llm.loop is None else str(llm.loop)
        self.asked += [(name, i) for i in items]
        return [self.value(name, i) for i in items]

    def value(self, name: str, item: int) -> float:
        shared = np.random.default_rng(item).normal(-3, 0.5)
        noise = 0 if name == PLAIN else np.random.default_rng([item, *name.encode()]).normal(0, 0.02)
        return float(shared + self.gains.get(name, 0.0) + noise)
