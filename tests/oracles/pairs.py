"""One tiny model in both implementations: what every test of the backend against the reference is made of.

    with pairs.opened(path, "qwen3moe", window) as pair:
        pair.set_loop("k=3 kv=last")
        batches = pairs.cut(pairs.TOKENS, pairs.PROMPT)
        pairs.by_backend(pair.llm, batches) - pairs.by_reference(pair.ref, batches)     # float32 rounding

The tiny models hold F32 weights and F32 K/V, so the two differ by float32 rounding alone (1e-5 to 1e-4) while the loop
moves the logits by 0.1 and more; `TOLERANCE` is between. A mixture of experts switches experts where float32 rounds
across a tie of the router, and a threshold is passed where float32 rounds across it, so each run also asserts that the
reference came no closer than `TIE` and `NEAR`: a case that fails this needs another seed in tiny.py, or another
threshold, not another tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from reference import Reference

from ggufloop.engine import LoopedLlama
from ggufloop.loop import LoopSpec

TOLERANCE = 1e-3
TIE = 2e-5
NEAR = 1e-4
MOVED = 0.1

TOKENS = np.random.default_rng(7).integers(0, 256, 34).tolist()
PROMPT = 24


def cut(tokens: Sequence[int], *sizes: int) -> list[Sequence[int]]:
    """The tokens in batches of these sizes, then one by one."""
    starts = np.cumsum([0, *sizes]).tolist()
    batches = [tokens[a:b] for a, b in pairwise(starts)]
    return batches + [[t] for t in tokens[starts[-1] :]]


def evaluated(ref: Reference, batches: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits of the batches, one step each, after an emptied cache."""
    ref.reset()
    return torch.cat([ref.eval(b) for b in batches]).numpy()


def by_reference(ref: Reference, batches: Sequence[Sequence[int]]) -> np.ndarray:
    """As `evaluated`, and known to be what float32 arithmetic must give."""
    rows = evaluated(ref, batches)
    assert ref.router_margin > TIE, "a tie in the router: give this family another seed"
    assert ref.threshold_margin > NEAR, "too close to a threshold: give this case another"
    return rows


def by_backend(llm: LoopedLlama, batches: Sequence[Sequence[int]]) -> np.ndarray:
    """As `by_reference`, by llama.cpp."""
    llm.reset()
    return np.concatenate([llm.logits(b) for b in batches])


def load(path: Path) -> LoopedLlama:
    """The model with everything in float32. One thread: the matrices are tiny."""
    return LoopedLlama(
        path, n_ctx=128, n_batch=128, n_ubatch=128, n_threads=1, n_threads_batch=1,
        type_k=0, type_v=0, flash_attn=False, verbose=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One tiny model in both implementations, the window to loop unless another is said, and its plain logits."""

    family: str
    window: tuple[int, int]
    llm: LoopedLlama
    ref: Reference
    plain: np.ndarray

    def spec(self, settings: str, window: tuple[int, int] | None = None) -> LoopSpec:
        """The settings as a loop of the window."""
        a, b = window or self.window
        return LoopSpec.parse(f"{a}:{b} {settings}")

    def set_loop(self, settings: str | None, window: tuple[int, int] | None = None) -> None:
        """Loop the window in both."""
        spec = None if settings is None else self.spec(settings, window)
        self.ref.set_loop(spec)
        self.llm.set_loop(spec)

    def reference(self, settings: str, batches: Sequence[Sequence[int]]) -> np.ndarray:
        """`evaluated` with these settings, to compare with nothing but the reference; the backend is left alone."""
        self.ref.set_loop(self.spec(settings))
        return evaluated(self.ref, batches)


@contextmanager
def opened(path: Path, family: str, window: tuple[int, int]) -> Iterator[Pair]:
    """The pair of a model file, on one thread; closed at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ref, llm = Reference(path), load(path)
    yield Pair(family, window, llm, ref, by_reference(ref, cut(TOKENS, PROMPT)))
    llm.close()
    torch.set_num_threads(threads)
