"""What `scripts/mutate.py` damages: a module per kind of file, each with `cases(folder)` and `mutate(data, rng)`.

    for case in gguf.cases(folder):
        damaged = case.mutate(case.data, random.Random(seed))

A case is a sound file, how to damage it, and the commands that are to survive reading it. `mutate` draws from `rng`
alone, so that a case and a seed name one file for good; `cases` writes what else its commands need into `folder`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Mutate = Callable[[bytes, random.Random], bytes]

FILE, FOLDER = "{file}", "{folder}"
"""In the words of a command: the damaged file, and an empty folder that is gone afterwards."""


@dataclass(frozen=True)
class Case:
    """A sound file to damage.

    name: one word or two, such as "gguf llama". file: what it is called on disk. commands: by name, the words of a
    command line in which FILE and FOLDER stand for what they say. share: how often it is drawn, against 1 of the rest.
    """

    name: str
    file: str
    data: bytes
    mutate: Mutate
    commands: Mapping[str, tuple[str, ...]]
    share: float = 1.0
