"""What long work says while it goes on: one callable for everything, and the command line decides how that looks.

def quantize(..., progress: Progress = silent) -> Quantized:
    progress(Step("blk.0.attn_q.weight", 3, 211, "tensor"))
evaluate(llm, tasks, progress=named(progress, "12:16 k=2"))        # the same, with its name in front
note(progress, "layers go to CUDA0.")
with doing(progress, "loading model.gguf ..."):
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Step:
    """Something a long task is doing.

    done of total: how far, in `unit`, "B" for bytes, "" for none to speak of; total 0: a line to be said once, without
    words the end of what was going on; total infinity: nobody knows how far.
    Steps of one task have the same total and unit, and done does not fall.
    """

    text: str
    done: float = 0
    total: float = 0
    unit: str = ""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """The Progress that shows nothing."""


def named(progress: Progress, name: str) -> Progress:
    """A Progress that says `name` before each step's own text."""
    return lambda step: progress(
        replace(step, text=f"{name}: {step.text}" if step.text else name if step.total else "")
    )


def note(progress: Progress, text: str) -> None:
    """Say a sentence that somebody may want to know."""
    progress(Step(f"note: {text}"))


@contextmanager
def doing(progress: Progress, text: str) -> Iterator[None]:
    """Show a few words while the block runs."""
    progress(Step(text, total=math.inf))
    try:
        yield
    finally:
        progress(Step(""))


def duration(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
