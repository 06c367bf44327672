"""The float64 reference as a model that can be traced: what leaves each of its layers, recorded in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from reference.layers import rms_norm
from reference.model import Reference
from torch.nn.functional import linear

from ggufloop.loop import LoopSpec


class State(NamedTuple):
    layer: int
    evaluation: int
    rows: np.ndarray


class _Recorded:
    """A layer that notes down what leaves it; all else of it is its own."""

    def __init__(self, il: int, layer: Any, seen: list[tuple[int, torch.Tensor]]) -> None:
        self._il, self._layer, self._seen = il, layer, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def run(self, *args: Any, **options: Any) -> Any:
        done = self._layer.run(*args, **options)
        self._seen.append((self._il, done[0]))
        return done


class ReferenceTracer:
    def __init__(self, path: Path, loop: LoopSpec | None) -> None:
        self.reference = Reference(path)
        self.loop: LoopSpec | None = None
        self._seen: list[tuple[int, torch.Tensor]] = []
        layers: list[Any] = self.reference._layers
        for il, layer in enumerate(layers):
            layers[il] = _Recorded(il, layer, self._seen)
        self.set_loop(loop)

    def set_loop(self, loop: LoopSpec | None) -> None:
        self.loop = loop
        self.reference.set_loop(loop)

    def n_layer(self) -> int:
        return self.reference.n_layer

    def n_vocab(self) -> int:
        return int(self.reference._output.shape[0])

    def trace(self, tokens: Sequence[int]) -> list[State]:
        self._seen.clear()
        self.reference.reset()
        self.reference.eval(tokens)
        counts = [0] * self.n_layer()
        states = []
        for il, x in self._seen:
            counts[il] += 1
            states.append(State(il, counts[il], x.numpy()))
        return states

    def lens(self, rows: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        r = self.reference
        assert not r._softcap
        x = torch.from_numpy(np.asarray(rows, dtype=np.float64))
        logits: np.ndarray = linear(rms_norm(x, r._norm, r._eps), r._output, r._output_bias).numpy()
        return logits
