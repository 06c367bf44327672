"""Who is told what a long piece of work is doing: nobody, unless somebody listens. The terminal does (cli/terminal.py).

    run_sweep(path, loops, plan, listener=Listener(note=print))

What a step counts (chunks, tensors, requests) has callables of its own; this is what is said in words.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Listener:
    """note: gets a sentence somebody may want to know. doing: shows a few words while its block runs."""

    note: Callable[[str], None] = lambda text: None
    doing: Callable[[str], AbstractContextManager[Any]] = nullcontext


SILENT = Listener()
