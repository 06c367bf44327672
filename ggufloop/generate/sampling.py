"""How the next token is drawn: `Sampling`, named and defaulted as llama.cpp does. No I/O.

    sampling = Sampling(temp=0.0, n=64)
    sampling = sampling.changed("top-k", "20")        # what /set does

The values are checked here and nowhere else, so a flag, a slash command and a saved chat refuse the same things in
the same words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from ggufloop.backend.settings import RANDOM_SEED, drawn
from ggufloop.errors import UsageError, nearest

_RULES = {
    "temp": (0.0, math.inf, "of 0 or more", "0 always takes the likeliest token."),
    "top_k": (0, 2**31 - 1, "of 0 or more", "0 turns it off."),
    "top_p": (0.0, 1.0, "from 0 to 1", "1 turns it off."),
    "min_p": (0.0, 1.0, "from 0 to 1", "0 turns it off."),
    "repeat_penalty": (math.ulp(0.0), math.inf, "above 0", "1 turns it off."),
    "seed": (-1, RANDOM_SEED - 1, f"from 0 to {RANDOM_SEED - 1}, or -1", "-1 draws one."),
    "n": (-1, 2**31 - 1, "of 1 or more, or -1", "-1 goes on until the model ends or the context is full."),
}


def spelled(name: str) -> str:
    """A field's name as flags, /set and messages write it: top_k -> top-k."""
    return name.replace("_", "-")


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler; the defaults are llama.cpp's.

    temp            temperature; 0 takes the likeliest token.
    top_k           keep the k likeliest tokens; 0: all.
    top_p, min_p    keep the likeliest tokens of total probability top_p, and those of at least min_p times the best.
    repeat_penalty  divides the logits of the last 64 tokens; 1: off.
    seed            the same seed gives the same text; -1: draw one.
    n               most tokens of one answer; -1: until the model ends it or the context is full.

    Raises UsageError naming the value and the rule.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = -1
    n: int = -1

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            low, high, rule, hint = _RULES[f.name]
            whole = isinstance(f.default, int)
            ok = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not ok or not math.isfinite(value) or not low <= value <= high or (f.name == "n" and value == 0):
                kind = "whole number" if whole else "number"
                raise UsageError(f"{spelled(f.name)} {value} is not a {kind} {rule}.", hint)

    def changed(self, name: str, text: str) -> Sampling:
        """A copy with one setting read from text; 'temperature' and 'top_k' are understood too. Raises UsageError."""
        key = {"temperature": "temp", "predict": "n", "n_predict": "n"}.get(name, name.replace("-", "_"))
        if key not in _RULES:
            raise UsageError(f"setting {name!r} is not known.", nearest(name, map(spelled, _RULES)))
        kind: type[Any] = type(getattr(type(self), key))
        try:
            value = kind(text)
        except ValueError:
            value = text
        return replace(self, **{key: value})

    def seeded(self) -> Sampling:
        """A copy whose seed is drawn if it is -1."""
        return replace(self, seed=drawn(self.seed)) if self.seed == -1 else self

    def __str__(self) -> str:
        values = ((spelled(f.name), getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name} {value}" if isinstance(value, int) else f"{name} {value:g}" for name, value in values)
