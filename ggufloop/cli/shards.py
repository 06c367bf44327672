"""--shard: which part of a measurement this machine does, by itself or as a task of a Slurm array.

@shard_option
def command(**flags):
    shard = shard_from_flags(flags, out)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ggufloop.cli.options import adder
from ggufloop.errors import UsageError
from ggufloop.measure.slices import Shard

_SHARD = click.option("--shard", metavar="I/N", help="Do the I-th part of N, 1/N to N/N, for `ggufloop merge` "
                      "(default: this task's of a Slurm array).")  # fmt: skip

_WORKERS = click.option("--workers", type=click.IntRange(min=1), metavar="N", default=1,
                        help="Do it by N processes at once, which share the threads; needs --out.")  # fmt: skip

_PLAN = click.option("--plan", "only_plan", is_flag=True,
                     help="Say what it takes, all of it and each shard, and do nothing.")  # fmt: skip
_SPEED = click.option("--tokens-per-second", type=click.FloatRange(min=0, min_open=True), metavar="X",
                      help="For --plan: of the plain model (default: timed on this machine).")  # fmt: skip

shard_options: Callable[[Any], Any] = adder([_SHARD, _WORKERS, _PLAN, _SPEED])
study_shard_options: Callable[[Any], Any] = adder([_SHARD, _PLAN, _SPEED])


@dataclass(frozen=True)
class Parts:
    """shard: the part that is asked for, None for all of it; workers: how many processes are to do it; plan: only say
    what it takes, at `speed` tokens per second if that is given."""

    shard: Shard | None
    workers: int
    plan: bool
    speed: float | None

    @property
    def of(self) -> int:
        """Into how many parts it is cut."""
        return self.workers if self.shard is None else self.shard.of


def parts_from_flags(flags: dict[str, Any], out: Path | None) -> Parts:
    """What `shard_options` say; takes their flags out of `flags`. Raises UsageError."""
    word, plan, speed = (flags.pop(name) for name in ("shard", "only_plan", "tokens_per_second"))
    workers = flags.pop("workers", 1)
    if speed is not None and not plan:
        raise UsageError("--tokens-per-second is for --plan.", "give both, or none.")
    if workers > 1 and word is not None:
        raise UsageError("--workers makes shards of its own.", "leave out --shard, or --workers.")
    shard = Shard.parse(word) if word is not None else None if workers > 1 else Shard.of_array()
    shard = None if shard is None or shard.of == 1 else shard
    if workers > 1 and out is None and not plan:
        raise UsageError("--workers keep their parts in journals, and no folder is given.", "give --out DIR.")
    if shard is not None and out is None and not plan:
        where = "" if word is not None else " (SLURM_ARRAY_TASK_ID; --shard 1/1 does all)"
        raise UsageError(f"shard {shard}{where} keeps its part for a merge, and no folder is given.", "give --out DIR.")
    return Parts(shard, workers, plan, speed)
