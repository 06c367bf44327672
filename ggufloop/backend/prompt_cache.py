"""llama_cpp's prompt caches, kept apart by loop: what a state means depends on the loop that made it.

llm.set_cache(LlamaRAMCache())        # LoopedLlama puts a LoopCache around it
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from ggufloop.loop import LoopSpec


class _Looped(Protocol):
    @property
    def loop(self) -> LoopSpec | None: ...


class LoopCache:
    """A llama_cpp cache (BaseLlamaCache) whose keys start with the loop in force, so that loops never meet."""

    def __init__(self, inner: Any, llm: _Looped) -> None:
        self._inner = inner
        self._llm = llm

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        digest = hashlib.sha256(str(self._llm.loop).encode()).digest()
        return (-1 - int.from_bytes(digest[:6], "little"), *tokens)  # negative: never a token

    @property
    def cache_size(self) -> int:
        """Bytes of all states."""
        return int(self._inner.cache_size)

    @property
    def capacity_bytes(self) -> int:
        """Bytes it may hold."""
        return int(self._inner.capacity_bytes)

    def _find_longest_prefix_key(self, key: tuple[int, ...]) -> tuple[int, ...] | None:
        found = self._inner._find_longest_prefix_key(self._key(key))
        # the loop counts as a token in common, so a key that shares nothing else is found as well
        return tuple(found[1:]) if found is not None and found[1:2] == self._key(key)[1:2] else None

    def __getitem__(self, key: Sequence[int]) -> Any:
        if key not in self:
            raise KeyError("no entry shares a prefix")
        return self._inner[self._key(key)]

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._find_longest_prefix_key(tuple(key)) is not None

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        self._inner[self._key(key)] = value
