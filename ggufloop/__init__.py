"""Training-free looped transformers for GGUF models, on llama.cpp.

    from ggufloop import LoopedLlama, LoopSpec

The names are loaded when they are used: `LoopedLlama` brings llama.cpp with it, and most commands need neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama
    from ggufloop.errors import BackendError, GgufloopError, UsageError
    from ggufloop.loop import LoopSpec

__all__ = ["BackendError", "GgufloopError", "LoopSpec", "LoopedLlama", "UsageError"]

_HOMES = {"LoopedLlama": "engine", "LoopSpec": "loop"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ggufloop.{_HOMES.get(name, 'errors')}"), name)
