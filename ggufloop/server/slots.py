"""What sequences hold, and how much of it a prompt may start from. Pure bookkeeping: knows no llama.cpp.

    n, step = history.reusable(prompt, cuts, client="a", can_rewind=True)
    store.put(Saved(loop, history, data)); n, saved = store.find(loop, prompt, ...); store.take(saved)

An answer must not depend on who else was served, to the bit: kernels add up in another order when a text is cut into
batches elsewhere, and for some loops the cut is part of what is computed. So a prompt starts from what is held in two
places only. Where a reading from the first token would have cut as well (`Cuts`): that is exact. And, in a client's own
conversation (`turns`), where an answer ended, as a conversation in a context of its own does: then the history is what
it was when it was written, not what a reading of it anew would make of it. A conversation that had to make room is read
anew; cached_tokens of its usage tells which it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ggufloop.loop import LoopSpec

_LONG = 64  # tokens


@dataclass(frozen=True)
class Cuts:
    """Where a text that is read from `start` on is cut: into batches, and those into ubatches (llama.cpp's words)."""

    n_batch: int
    n_ubatch: int

    def before(self, n: int) -> int:
        """The last cut at or before n tokens, 0 being one."""
        batches, rest = divmod(n, self.n_batch)
        return batches * self.n_batch + rest // self.n_ubatch * self.n_ubatch

    def after(self, n: int) -> int:
        """The first cut behind n tokens."""
        batches, rest = divmod(n, self.n_batch)
        return batches * self.n_batch + min((rest // self.n_ubatch + 1) * self.n_ubatch, self.n_batch)


@dataclass(frozen=True)
class Step:
    """One evaluation of a sequence: where it began, whether it looped, and whether it read a prompt."""

    start: int
    looped: bool
    reads: bool = False


@dataclass
class History:
    """The tokens a sequence holds and the steps that evaluated them.

    read: so many tokens were read as the beginning of a prompt in its first step, in whole cuts and the rest.
    client: whose conversation it is. ended: whether its last prompt was read to the end.
    """

    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    read: int = 0
    client: str = ""
    ended: bool = True

    def reusable(self, prompt: Sequence[int], cuts: Cuts, client: str | None, can_rewind: bool) -> tuple[int, int]:
        """How many tokens a prompt may start from, and where the step began that reads on from there.

        At least one token is left to evaluate. client: who asks; None: not to go on with a conversation. can_rewind:
        whether a sequence can be cut back; if not, only all of it can be used.
        """
        common = common_prefix(self.tokens, prompt)
        limit = min(common, len(prompt) - 1)
        best = (cuts.before(min(self.read, limit)), 0)
        if client == self.client:
            ends = [step.start for step in self.steps if step.reads and step.start <= limit]
            if common == len(self.tokens) <= limit and self.goes_on:
                ends.append(common)
            # what was written without the loop is read again with it
            plain = next((step.start for step in self.steps if not step.looped), len(self.tokens))
            at = min(max(ends, default=0), plain)
            if at > best[0]:
                best = (at, at)
        if best[0] < len(self.tokens) and not can_rewind:
            return 0, 0
        return best

    @property
    def goes_on(self) -> bool:
        """Whether what follows is taken for the same conversation.

        Behind an answer. Behind a prompt nothing was written to yet, if it is long: a text that happens to begin like
        a short one is none, and reading that again costs nothing.
        """
        written = bool(self.steps) and not self.steps[-1].reads
        return self.ended and (written or len(self.tokens) >= _LONG)

    def cut(self, length: int) -> None:
        """Forget what comes after `length` tokens."""
        del self.tokens[length:]
        while self.steps and self.steps[-1].start >= length:
            self.steps.pop()
        self.read = min(self.read, length)

    def copy(self) -> History:
        """One that can change by itself."""
        return History(list(self.tokens), list(self.steps), self.read, self.client, self.ended)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass(frozen=True)
class Saved:
    """What a sequence held, out of its context: `data` is llama.cpp's, and good under the same loop only."""

    loop: LoopSpec | None
    history: History
    data: Any

    @property
    def size(self) -> int:
        """Bytes it takes; a token and its step are some 100 in Python."""
        return int(self.data.nbytes) + 100 * len(self.history.tokens)


class Store:
    """Saved sequences up to so many bytes, those longest unused leaving first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._entries: list[Saved] = []  # the newest last

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, saved: Saved) -> None:
        """Keep it, in place of any that it continues, if there is room for it at all."""
        if saved.size > self.capacity:
            return
        for old in [e for e in self._entries if (e.loop, e.history.client) == (saved.loop, saved.history.client)]:
            n = len(old.history.tokens)
            if n <= len(saved.history.tokens) and old.history.tokens == saved.history.tokens[:n]:
                self._remove(old)
        self._entries.append(saved)
        self.size += saved.size
        while self.size > self.capacity:
            self._remove(self._entries[0])

    def find(
        self, loop: LoopSpec | None, prompt: Sequence[int], cuts: Cuts, client: str | None, can_rewind: bool
    ) -> tuple[int, Saved | None]:
        """The entry of this loop that saves most of reading a prompt, and how many tokens."""
        best: tuple[int, Saved | None] = (0, None)
        for entry in self._entries:
            if entry.loop == loop:
                n = entry.history.reusable(prompt, cuts, client, can_rewind)[0]
                if n > best[0]:
                    best = (n, entry)
        return best

    def take(self, saved: Saved) -> Saved:
        """Take an entry out."""
        self._remove(saved)
        return saved

    def drop(self, keep: Any) -> None:
        """Remove every entry for which keep(entry) is false."""
        for entry in [e for e in self._entries if not keep(e)]:
            self._remove(entry)

    def _remove(self, saved: Saved) -> None:
        self._entries = [e for e in self._entries if e is not saved]
        self.size -= saved.size
