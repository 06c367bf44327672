"""The command line in this process: `cli("inspect", path, "-o", "json")` is what a shell would run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from ggufloop.cli import main


class Ran(NamedTuple):
    """How a command ended: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Ran:
    """Run a command; anything it raises but SystemExit is a traceback, and fails the test."""
    with pytest.raises(SystemExit) as e:
        main([str(word) for word in words])
    return Ran(int(e.value.code or 0), *capsys.readouterr())
