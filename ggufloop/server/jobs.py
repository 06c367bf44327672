"""A request on its way through the engine thread: what is asked, what comes back, and who is next.

job = Job(ask, client="127.0.0.1", send=put)     # send(event) is called from the engine thread
queue.put(job); queue.in_order()                 # one job of every client in turn
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec
from ggufloop.records import Timings
from ggufloop.sequences import Draw


@dataclass(frozen=True)
class Ask:
    """What one answer is generated from; everything in it is checked.

    stop, strip: as `generate.complete`. logprobs: how many likeliest tokens to report beside each; None: nothing.
    turns: whether the prompt may go on from a conversation as it was evaluated, instead of from exact cuts only.
    """

    prompt: tuple[int, ...]
    loop: LoopSpec | None
    draw: Draw
    stop: tuple[str, ...] = ()
    strip: bool = False
    logprobs: int | None = None
    turns: bool = True


@dataclass(frozen=True)
class Logprob:
    """A generated token: its bytes, its log-probability before sampling, and the likeliest tokens' in its place."""

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the tokens drawn since the last piece."""

    text: str
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    finish     'stop', 'length' or 'cancelled'.
    generated  tokens, the end-of-turn token not included. cached: prompt tokens that were not read again.
    """

    finish: str
    generated: int
    cached: int
    timings: Timings
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The answer could not be given. busy: the server's doing, so that another attempt may succeed."""

    error: GgufloopError
    busy: bool = False


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """An ask, whose it is, and where its events go. `cancel` may be called from any thread."""

    ask: Ask
    client: str
    send: Callable[[Event], None]
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self._cancelled.set()


class FairQueue:
    """Waiting jobs. Clients take turns, so one that asks a lot waits for itself; each client's are in order."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Job]] = {}  # in order of their turns

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._clients.values())

    def put(self, job: Job) -> None:
        """Queue a job."""
        self._clients.setdefault(job.client, deque()).append(job)

    def in_order(self) -> Iterator[Job]:
        """Every job in the order of turns: each client's first, each client's second, and so on."""
        lists = [list(jobs) for jobs in self._clients.values()]
        for i in range(max(map(len, lists), default=0)):
            yield from (jobs[i] for jobs in lists if i < len(jobs))

    def take(self, job: Job) -> None:
        """Remove a job; its client's next turn is after everybody else's."""
        jobs = self._clients.pop(job.client)
        jobs.remove(job)
        if jobs:
            self._clients[job.client] = jobs

    def take_if(self, condition: Callable[[Job], bool]) -> list[Job]:
        """Remove and return the jobs for which the condition holds; turns stay as they are."""
        taken = [job for job in self.in_order() if condition(job)]
        for job in taken:
            jobs = self._clients[job.client]
            jobs.remove(job)
            if not jobs:
                del self._clients[job.client]
        return taken
