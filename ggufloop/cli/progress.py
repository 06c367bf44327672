"""Shows a download on stderr: a bar on a terminal, else one line per file and one at every quarter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ggufloop.models.wheels import Progress


class _Bars:
    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if total == 0:
            self.close()
            click.echo(what, err=True)
            return
        if what != self.what or self.bar is None:
            self.close()
            from tqdm import tqdm

            self.what = what
            self.bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr)
        self.bar.n = done
        self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class _Lines:
    def __init__(self) -> None:
        self.what, self.quarter = "", 0

    def __call__(self, what: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 0
        if what == self.what and quarter <= self.quarter:
            return
        self.what, self.quarter = what, quarter
        share = f" {25 * quarter}% of {total / 2**20:.0f} MiB" if quarter else ""
        click.echo(what + share, err=True)

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def download_progress() -> Iterator[Progress]:
    """A Progress for `registry.resolve`; it leaves the terminal as it found it."""
    shown = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        yield shown
    finally:
        shown.close()
