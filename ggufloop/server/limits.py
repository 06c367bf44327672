"""What a server accepts at most: sizes of requests and answers, and how many of them at a time."""

from __future__ import annotations

from dataclasses import dataclass

from ggufloop.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    parallel       answers being generated at a time.
    queue          requests waiting beyond these; more are refused with 503.
    body_bytes     of a request's body; more are refused with 413.
    prompt_tokens  None: what the context holds.
    max_tokens     generated tokens of one answer, whatever it asks for; None: what the context holds.
    cache_bytes    of conversations kept outside the context.
    stop_seconds   until answers being generated are cut off when the server is stopped.

    Raises UsageError for a bound that would serve nobody.
    """

    parallel: int = 2
    queue: int = 256
    body_bytes: int = 4 * 2**20
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    cache_bytes: int = 512 * 2**20
    stop_seconds: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("parallel", 1), ("queue", 0), ("body_bytes", 1024), ("cache_bytes", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)} is less than {least}.", f"give {least} or more.")
        if self.parallel > 64:
            raise UsageError(f"parallel {self.parallel} is more than 64.", "a queue serves more clients than that.")
        for name in ("prompt_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is less than 1.", "give 1 or more, or leave it out.")
