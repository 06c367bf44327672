"""--shard: which part of a measurement this machine does, by itself or as a task of a Slurm array.

@shard_option
def command(**flags):
    shard = shard_from_flags(flags, out)
"""

from __future__ import annotations

from collections.abc import Callable
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

shard_options: Callable[[Any], Any] = adder([_SHARD, _WORKERS])


def shard_from_flags(flags: dict[str, Any], out: Path | None) -> tuple[Shard | None, int]:
    """The shard that is asked for, None for all of it, and how many processes are to do it; takes their flags out of
    `flags`. Raises UsageError."""
    word, workers = flags.pop("shard"), flags.pop("workers")
    if workers > 1 and word is not None:
        raise UsageError("--workers makes shards of its own.", "leave out --shard, or --workers.")
    shard = Shard.parse(word) if word is not None else None if workers > 1 else Shard.of_array()
    if workers > 1 and out is None:
        raise UsageError("--workers keep their parts in journals, and no folder is given.", "give --out DIR.")
    if shard is None or shard.of == 1:
        return None, workers
    if out is None:
        where = "" if word is not None else " (SLURM_ARRAY_TASK_ID; --shard 1/1 does all)"
        raise UsageError(f"shard {shard}{where} keeps its part for a merge, and no folder is given.", "give --out DIR.")
    return shard, workers
