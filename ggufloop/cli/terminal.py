"""What the user sees while a model answers: streamed text, the footer, notes and errors, and what Ctrl-C does.

    answer = stream(lambda emit, stopped: chat.ask("Hello", emit, stopped))

Generated text goes to stdout, everything else to stderr. Escape codes are written to terminals only, and not where
NO_COLOR asks for none; those a model generates are kept from the terminal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

import click

from ggufloop.errors import GgufloopError
from ggufloop.generate.complete import Answer, Emit, Interrupted, Stopped, Totals
from ggufloop.loop import LoopSpec

_CONTROL = dict.fromkeys((*range(9), *range(11, 32), 127, *range(128, 160)))


_DIM, _RESET = "\033[2m", "\033[0m"


def _plain() -> bool:
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def dim(text: str) -> None:
    """One dim line on stderr."""
    click.echo(text if _plain() else click.style(text, dim=True), err=True)


def note(text: str) -> None:
    """One line of advice on stderr."""
    click.echo(f"note: {text}", err=True)


def error(e: GgufloopError) -> None:
    """What went wrong and what to do next, on stderr."""
    click.echo(f"error: {e.message}", err=True)
    if e.hint:
        click.echo(f"  {e.hint}", err=True)


def describe(loop: LoopSpec | None) -> str:
    """A loop as the footer names it: 'plain', 'window 12:16, K 3', further settings as str(loop) writes them."""
    if loop is None:
        return "plain"
    window, _, *others = str(loop).split()
    words = [f"window {window}", f"K {loop.k}", *others]
    return ", ".join(words) + ("" if loop.is_loop else " (one evaluation: plain)")


def note_no_template(flags: Mapping[str, str | None]) -> None:
    """Say that a prompt is continued as it is, and which of these flags have no place then."""
    given = [flag for flag, value in flags.items() if value is not None]
    ignored = f", and {' and '.join(given)} {'is' if len(given) == 1 else 'are'} left out" if given else ""
    note(f"this model has no chat template: it continues the text as it is{ignored}.")


def say(text: str) -> None:
    """A whole answer, on stdout."""
    click.echo(text.translate(_CONTROL) if sys.stdout.isatty() else text)


def note_horizon(loop: LoopSpec | None) -> None:
    """Say so if a loop's damping makes it go further, or less far, than one unit of time."""
    horizon = None if loop is None else loop.horizon
    if horizon is not None and abs(horizon - 1) > 1e-9:
        note(f"K times damping is {horizon:g} here, not 1 as in a damped loop.")


def speeds(total: Totals) -> str:
    """Tokens and tokens per second of prompts and generation."""

    def part(name: str, tokens: int, evaluated: int, seconds: float) -> str:
        speed = f", {evaluated / seconds:.1f} t/s" if evaluated and seconds > 0 else ""
        return f"{name}: {tokens} token{'' if tokens == 1 else 's'}{speed}"

    prompt = part("Prompt", total.prompt_tokens, total.prompt_tokens, total.prompt_seconds)
    return f"{prompt} | {part('Generation', total.tokens, total.generated_tokens, total.generated_seconds)}"


class _StopOnInterrupt:
    """Ctrl-C while a model answers: the first asks it to stop, the second is a KeyboardInterrupt.

    Between tokens a flag is enough. Until the first one nobody looks at the flag, so there the first Ctrl-C raises
    Interrupted, which takes effect when the batch being evaluated is done.
    """

    def __init__(self) -> None:
        self._requested = self._polled = False

    def __call__(self) -> bool:
        self._polled = True
        return self._requested

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        if not self._polled:
            raise Interrupted

    def __enter__(self) -> _StopOnInterrupt:
        self._before: Any = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # a background job is not to be stopped
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)


class _Dimmed:
    """Text with what a model thinks made dim. A tag may come in pieces, so what may be one is held back."""

    def __init__(self, tags: tuple[str, str]) -> None:
        self._tags, self._inside, self._held = tags, False, ""

    def __call__(self, text: str) -> str:
        shown, self._held = "", self._held + text
        while (at := self._held.find(tag := self._tags[self._inside])) >= 0:
            end = at + len(tag)
            shown += self._held[:end] + _RESET if self._inside else self._held[:at] + _DIM + tag
            self._held, self._inside = self._held[end:], not self._inside
        keep = max(n for n in range(len(tag)) if self._held.endswith(tag[:n]))
        cut = len(self._held) - keep
        shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown

    def close(self) -> str:
        """What was held back, and the end of what is dim."""
        return self._held + _RESET * self._inside


def stream(ask: Callable[[Emit, Stopped], Answer], tags: tuple[str, str] | None = None) -> Answer | None:
    """Run `ask`, print its text as it comes, then the footer; None if it was stopped before the first token.

    tags: what the model thinks between, which is dim at a terminal."""
    on_terminal = sys.stdout.isatty()
    dimmed = _Dimmed(tags) if tags and on_terminal and not _plain() else None
    at_line_start = True

    def emit(text: str) -> None:
        nonlocal at_line_start
        at_line_start = text.endswith("\n")
        text = text.translate(_CONTROL) if on_terminal else text
        sys.stdout.write(dimmed(text) if dimmed else text)
        sys.stdout.flush()

    answer = None
    try:
        with _StopOnInterrupt() as stopped:
            answer = ask(emit, stopped)
    except Interrupted:
        pass
    finally:
        if dimmed:
            sys.stdout.write(dimmed.close())
        if not at_line_start:
            sys.stdout.write("\n")
        sys.stdout.flush()
    if sys.stderr.isatty() and (answer is None or (answer.finish == "interrupted" and not on_terminal)):
        click.echo(err=True)  # after the ^C
    if answer is None:
        dim("[ stopped before the first token ]")
        return None
    parts = [speeds(Totals.of([answer])), describe(answer.loop)]
    if answer.finish == "interrupted":
        parts.append("stopped")
    if answer.finish == "length":
        parts.append(f"cut by -n {len(answer.tokens)}: a larger -n gives more")
    dim(f"[ {' | '.join(parts)} ]")
    if not answer.tokens and answer.finish == "stop":
        note("the model ended its answer before it began.")
    if answer.dropped:
        turns = "turn was" if answer.dropped == 1 else f"{answer.dropped} turns were"
        note(f"the context is full: the oldest {turns} left out. A larger -c holds more.")
    if answer.finish == "context":
        note(f"the answer ends here because the context of {answer.context} tokens is full. A larger -c holds more.")
    return answer
