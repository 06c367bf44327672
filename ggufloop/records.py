"""What the engine reports of its work: how long an answer took, and the states a trace met."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Timings:
    """What the last completion evaluated, in tokens and seconds; cached prompt tokens are not counted.

    The first generated token is sampled from the prompt's logits, so n new tokens take n - 1 evaluations.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generated_seconds: float = 0.0


@dataclass(frozen=True)
class State:
    """The state of all tokens where it leaves a layer.

    layer       its number, from 0.
    evaluation  1, and inside the window which evaluation of it, from 1. What enters evaluation n > 1 of the window is
                the state of the layer before it with evaluation n; what leaves it is one more of its last layer.
    rows        float32 (n_tokens, n_embd); architectures with several residual streams have one more axis in front.
    """

    layer: int
    evaluation: int
    rows: NDArray[np.float32]
