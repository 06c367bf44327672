"""A model whose layers are a few lines of numpy, to be traced: every state can be computed by hand.

Layer il is x + x @ M_il, so a window is linear, and the head is a matrix. A trace is the loop's tableau carried out
literally, its states named as the engine names them: what enters pass j of layers a .. b - 1 is (a - 1, j).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from reference.tableau import apply

from ggufloop.loop import LoopSpec
from support.fake_llama import FakeLlama

WIDTH, VOCABULARY = 6, 300


class State(NamedTuple):
    layer: int
    evaluation: int
    rows: np.ndarray


class FakeTracer(FakeLlama):
    def __init__(self, path: object = "", **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        rng = np.random.default_rng(3)
        self.embedding = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
        self.matrices = 0.15 * rng.normal(size=(self.n_layers, WIDTH, WIDTH)).astype(np.float32)
        self.head = rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
        self.runs: list[tuple[LoopSpec | None, list[int]]] = []
        self.lens_rows: list[int] = []

    def n_vocab(self) -> int:
        return VOCABULARY

    def layer(self, il: int, x: np.ndarray) -> np.ndarray:
        out: np.ndarray = x + x @ self.matrices[il]
        return out

    def trace(self, tokens: Sequence[int]) -> list[State]:
        self.runs.append((self.loop, list(tokens)))
        states: list[State] = []
        x = self.embedding[list(tokens)]

        def run(first: int, last: int, evaluation: int, x: np.ndarray) -> np.ndarray:
            for il in range(first, last):
                x = self.layer(il, x)
                states.append(State(il, evaluation, x))
            return x

        loop = self.loop
        a, b = (self.n_layers, self.n_layers) if loop is None or not loop.is_loop else loop.window
        x = run(0, a, 1, x)
        if loop is not None and loop.is_loop:
            for first, last in [(a, b)] if loop.mode == "block" else [(il, il + 1) for il in range(a, b)]:
                evaluation = 0

                def g(y: np.ndarray, first: int = first, last: int = last) -> np.ndarray:
                    nonlocal evaluation
                    evaluation += 1
                    if evaluation > 1:
                        states.append(State(first - 1, evaluation, y))
                    return run(first, last, evaluation, y)

                x = apply(loop.tableau(), g, x).astype(np.float32)
        run(b, self.n_layers, 1, x)
        return states

    def lens(self, rows: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        assert len(rows) == len(tokens)
        self.lens_rows.append(len(rows))
        out: np.ndarray = rows @ self.head
        return out
