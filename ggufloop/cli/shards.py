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

shard_option: Callable[[Any], Any] = adder([_SHARD])


def shard_from_flags(flags: dict[str, Any], out: Path | None) -> Shard | None:
    """The shard that is asked for, None for all of it; takes its flag out of `flags`. Raises UsageError."""
    word = flags.pop("shard")
    shard = Shard.parse(word) if word is not None else Shard.of_array()
    if shard is None or shard.of == 1:
        return None
    if out is None:
        where = "" if word is not None else " (SLURM_ARRAY_TASK_ID; --shard 1/1 does all)"
        raise UsageError(f"shard {shard}{where} keeps its part for a merge, and no folder is given.", "give --out DIR.")
    return shard
