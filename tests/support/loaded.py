"""A model loaded small and exact, tokens for it, and how far two results may be apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ggufloop.engine import LoopedLlama
from ggufloop.loop import LoopSpec

F32 = {"type_k": 0, "type_v": 0}
ROUNDING = 2e-4
"""Most the same sum may differ when it is computed in other batches: F32, logits of size 1 to 10."""


def load(path: Path, loop: str | None = None, **settings: object) -> LoopedLlama:
    settings = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "n_threads_batch": 1, **settings}
    return LoopedLlama(path, loop=LoopSpec.parse(loop) if loop else None, verbose=False, **settings)


def tokens(llm: LoopedLlama, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, llm.n_vocab(), n).tolist()


def spread(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())
