"""Shows the steps of long work on stderr: a bar on a terminal, else some lines into a log, with the time that is left.

    with shown() as progress:
        quantize(..., progress=named(progress, "Q4_K_M"))

Into a log goes a line per tenth of a task, and none within LOG_SECONDS of the last: a log of a day has some dozens,
one of a second's work none. A download says that it begins.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ggufloop.cli.width import columns, remark
from ggufloop.progress import Progress, Step, duration

LOG_SECONDS = 3.0

_BYTES = "B"
_BAR = "{desc}: {percentage:3.0f}%|{bar}| "
_COUNT = "{n_fmt}/{total_fmt} {unit}s, "
_BESIDE = 46  # columns for the share, a short bar, the count and the time that is left


class _Shown(ABC):
    """One task at a time: the next begins with another total or unit, or where `done` falls."""

    def __init__(self) -> None:
        self._step: Step | None = None

    def __call__(self, step: Step) -> None:
        last = self._step
        if not step.total:
            self.close()
            if step.text and last != step:
                remark(step.text)
        elif last is None or (last.total, last.unit) != (step.total, step.unit) or step.done < last.done:
            self.close()
            self.begin(step)
        else:
            self.go_on(step)
        self._step = step

    @abstractmethod
    def begin(self, step: Step) -> None:
        """Show the first step of a task."""

    @abstractmethod
    def go_on(self, step: Step) -> None:
        """Show a later one."""

    @abstractmethod
    def close(self) -> None:
        """Leave the terminal as it was found."""


class _Bar(_Shown):
    _bar: Any = None

    def begin(self, step: Step) -> None:
        from tqdm import tqdm

        self._columns = columns(sys.stderr) - 1  # a full line would wrap on some terminals
        in_bytes = step.unit == _BYTES
        left = "{n_fmt}/{total_fmt}B, " if in_bytes else _COUNT if step.unit else ""
        self._bar = tqdm(
            desc=self._cut(step), initial=step.done, total=step.total, unit=step.unit,
            bar_format="{desc}" if math.isinf(step.total) else f"{_BAR}{left}{{remaining}} left",
            unit_scale=in_bytes, unit_divisor=1024, leave=in_bytes, ncols=self._columns, file=sys.stderr, disable=False,
        )  # fmt: skip

    def go_on(self, step: Step) -> None:
        self._bar.ncols = self._columns = columns(sys.stderr) - 1
        self._bar.set_description_str(self._cut(step), refresh=False)
        self._bar.update(step.done - self._bar.n)

    def _cut(self, step: Step) -> str:
        """The words that leave room for count and time."""
        room = self._columns - (0 if math.isinf(step.total) else _BESIDE)
        return step.text if len(step.text) <= room else f"{step.text[: max(room - 3, 0)]}..."

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class _Log(_Shown):
    def begin(self, step: Step) -> None:
        self._start = self._said = time.monotonic()
        self._from, self._tenth = step.done, int(10 * step.done / step.total)
        if step.unit == _BYTES:
            click.echo(f"{step.text}, {step.total / 2**20:.0f} MiB", err=True)

    def go_on(self, step: Step) -> None:
        now, tenth = time.monotonic(), int(10 * step.done / step.total)
        if tenth > self._tenth and now - self._said >= LOG_SECONDS:
            self._tenth, self._said = tenth, now
            left = (now - self._start) / (step.done - self._from) * (step.total - step.done)
            share = f"{100 * step.done / step.total:.0f} %"
            count = f" of {step.total:.0f} {step.unit}s" if step.unit not in ("", _BYTES) else ""
            click.echo(f"{step.text}: {share}{count}, about {duration(left)} left", err=True)

    def close(self) -> None:
        """Lines leave nothing open."""


@contextmanager
def shown() -> Iterator[Progress]:
    """A Progress that shows what it is told; nothing of it is left on a terminal but downloads."""
    shown = _Bar() if sys.stderr.isatty() else _Log()
    try:
        yield shown
    finally:
        shown.close()
