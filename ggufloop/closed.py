"""What stands in a model's place before it is loaded and after it is closed: using it is an error, not a crash.

    class Model:
        _ctx = Closed()              # the instance's own hides it while there is one

llama.cpp is handed pointers, and a freed one ends the process.
"""

from __future__ import annotations

from typing import NoReturn

from ggufloop.errors import GgufloopError


class Closed:
    """Anything asked of it raises GgufloopError."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        raise GgufloopError("this model is closed.", "load it again.")
