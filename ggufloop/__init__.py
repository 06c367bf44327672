"""Training-free looped transformers for GGUF models, on llama.cpp.

    import ggufloop

    llm = ggufloop.load("smollm2-135m", loop="12:16")        # docs/python.md

The names are loaded when they are used: `LoopedLlama` brings llama.cpp with it, and most commands need neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama
    from ggufloop.errors import BackendError, GgufloopError, UsageError
    from ggufloop.loop import LoopSpec
    from ggufloop.opening import load
    from ggufloop.study.collection import results

__all__ = ["BackendError", "GgufloopError", "LoopSpec", "LoopedLlama", "UsageError", "__version__", "load", "results"]
__version__ = "0.1.0"

_HOMES = {"LoopedLlama": "engine", "LoopSpec": "loop", "load": "opening", "results": "study.collection"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ggufloop.{_HOMES.get(name, 'errors')}"), name)
