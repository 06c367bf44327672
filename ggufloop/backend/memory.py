"""How much memory is free, and whether a model fits: Linux lends what it has not, and ends the process that uses it.

    check([Need.of(path, 4096, loops=[loop])])       # GgufloopError, with the sums, if it cannot fit

Counted are the weights, the K/V cache and the slots a loop with kv each adds; a few MB of scratch are not. Weights
are mapped from the file, so a model that is too large might crawl along, read from disk for every token; somebody
who wants that sets GGUFLOOP_MEMORY_CHECK=off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec
from ggufloop.models.info import KV_PREDICTED, describe, plain_kv_bytes

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Bytes a process can still use without swapping, within its container's limit; None where that is not said."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", MEMINFO.read_text()) if MEMINFO.is_file() else None
    known = [n for n in (None if found is None else 1024 * int(found[1]), _cgroup_free()) if n is not None]
    return min(known, default=None)


def _cgroup_free() -> int | None:
    """What a container of Docker or systemd (cgroup v2) may still use; file pages it can drop count as free."""
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        dropped = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - int(used) + (int(dropped[1]) if dropped else 0)


@dataclass(frozen=True)
class Need:
    """Bytes one open model takes. kv: its plain cache, slots: what the hungriest loop adds; 0 if not known."""

    name: str
    n_ctx: int
    weights: int
    kv: int
    slots: int

    @classmethod
    def of(
        cls,
        path: Path,
        n_ctx: int,
        type_k: str = "f16",
        type_v: str = "f16",
        *,
        flash_attn: bool = False,
        loops: Iterable[LoopSpec | None] = (),
    ) -> Need:
        """What the model at `path` needs with a context of n_ctx tokens (0: its own) under each of `loops` in turn."""
        info = describe(path)
        n_ctx = n_ctx or info.n_ctx_train
        sizes = []
        if info.architecture in KV_PREDICTED:
            sizes = plain_kv_bytes(info, n_ctx, type_k, type_v, flash_attn=flash_attn)
        slots = max((loop.extra_kv_bytes(sizes) for loop in loops if loop is not None), default=0)
        return cls(path.name, n_ctx, info.weight_bytes, sum(sizes), slots)

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.slots


def check(needs: Sequence[Need]) -> None:
    """Raise GgufloopError if models that are open at the same time cannot fit the memory that is free."""
    free, total = free_bytes(), sum(need.total for need in needs)
    if free is None or total <= free or os.environ.get("GGUFLOOP_MEMORY_CHECK") == "off":
        return
    weights, kv, slots = (sum(getattr(need, part) for need in needs) for part in ("weights", "kv", "slots"))
    parts = [f"weights {_size(weights)}", f"K/V cache of {max(need.n_ctx for need in needs)} tokens {_size(kv)}"]
    if slots:
        parts.append(f"slots of kv each {_size(slots)}")
    what = f"{needs[0].name} needs" if len(needs) == 1 else f"{len(needs)} files are open at once and need"
    file = "a smaller quantisation" if len(needs) == 1 else "fewer files"
    smaller = ["a smaller -c" if kv + slots > weights else file]
    if slots:
        smaller.append("fewer passes, or kv first")
    raise GgufloopError(
        f"{what} {_size(total)} ({', '.join(parts)}), and {_size(free)} of memory are free.",
        f"give {' or '.join(smaller)}; GGUFLOOP_MEMORY_CHECK=off tries it all the same.",
    )


def check_slots(slots: int, loop: str) -> None:
    """Raise GgufloopError if the slots of a loop, in bytes, cannot fit; the model is loaded already."""
    free = free_bytes()
    if free is not None and slots > free and os.environ.get("GGUFLOOP_MEMORY_CHECK") != "off":
        raise GgufloopError(
            f"the loop {loop} adds {_size(slots)} of K/V cache, and {_size(free)} of memory are free.",
            "give a smaller -c, fewer passes or kv first; GGUFLOOP_MEMORY_CHECK=off tries it all the same.",
        )


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 5e7 else f"{n / 1e6:.1f} MB"
